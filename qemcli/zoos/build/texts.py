"""Texts to train zoos on, and word vectors made from them: nothing is fetched but the texts."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from qemcli.errors import InputError, UsageError
from qemcli.zoos.build import sources
from qemcli.zoos.build.transformer_recipe import TransformerRecipe

WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")
WINDOW = 4  # words to either side that count as beside
VECTORS = (
    "log co-occurrence over chance in the training texts, where above chance; its largest singular "
    "directions"
)


@dataclass(frozen=True)
class Texts:
    """Word numbers (n, t) of training and test texts, 0 for padding, their labels (n,), and the
    words with their vectors (1 + words, D), of which the first is padding's, zero."""

    train: Tensor
    train_label: Tensor
    test: Tensor
    test_label: Tensor
    words: tuple[str, ...]
    vectors: Tensor

    def save(self, path: Path) -> None:
        """The word vectors as safetensors, the words in order as a JSON list in its header."""
        save_file({"vectors": self.vectors}, path, metadata={"words": json.dumps(self.words)})


def load(recipe: TransformerRecipe) -> Texts:
    """The recipe's texts: words of the training texts by frequency, vectors from them alone.

    Raises InputError for files that hold no texts.
    """
    train, train_label = sources.read_texts(recipe.source)
    order = np.random.default_rng(0)
    if recipe.test_source:
        test, test_label = sources.read_texts(recipe.test_source)
        held = order.permutation(len(test))[: recipe.test_images]
        rest = np.arange(len(train))
    else:
        if not 0 < recipe.test_images < len(train):
            raise UsageError(f"test_images is {recipe.test_images}, of {len(train)} texts in all")
        mixed = order.permutation(len(train))
        test, test_label = train, train_label
        held, rest = mixed[: recipe.test_images], mixed[recipe.test_images :]
    words = [WORD.findall(train[i].lower()) for i in rest]
    known = vocabulary(words, recipe.vocabulary)
    ids = [[known[w] for w in text if w in known] for text in words]
    tests = [[known[w] for w in WORD.findall(test[i].lower()) if w in known] for i in held]
    return Texts(
        padded(ids, recipe.tokens),
        torch.from_numpy(train_label[rest].astype(np.int64)),
        padded(tests, recipe.tokens),
        torch.from_numpy(test_label[held].astype(np.int64)),
        tuple(known),
        torch.from_numpy(vectors(ids, len(known) + 1, recipe.width)),
    )


def vocabulary(words: list[list[str]], size: int) -> dict[str, int]:
    """word -> number from 1, the most frequent first; equally frequent ones by alphabet."""
    counts = Counter(w for text in words for w in text)
    ranked = sorted(counts, key=lambda w: (-counts[w], w))[:size]
    return {word: i for i, word in enumerate(ranked, start=1)}


def padded(ids: list[list[int]], tokens: int) -> Tensor:
    """(n, tokens) word numbers: the first ones of a text, then 0."""
    out = torch.zeros(len(ids), tokens, dtype=torch.int64)
    for row, text in zip(out, ids, strict=True):
        part = text[:tokens]
        row[: len(part)] = torch.tensor(part, dtype=torch.int64)
    return out


def vectors(ids: list[list[int]], words: int, width: int) -> np.ndarray:
    """(words, width) float32, entries of mean square 1: the largest singular directions of the
    positive pointwise mutual information (Levy and Goldberg, 2014). Row 0 is zero.

    Raises InputError where there are fewer words than numbers of a vector.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.linalg import svds

    if words <= width + 1:
        raise InputError(f"{words - 1} words are too few for vectors of {width} numbers")
    pairs = [_beside(np.array(text), step) for text in ids for step in range(1, WINDOW + 1)]
    left, right = np.concatenate(pairs, axis=1)
    both = (np.concatenate([left, right]), np.concatenate([right, left]))
    count = csr_matrix((np.ones(len(both[0])), both), shape=(words, words)).tocoo()
    total = count.sum()
    share = np.asarray(count.sum(1)).ravel() / max(total, 1)
    lift = np.log(count.data / total / (share[count.row] * share[count.col]))
    kept = lift > 0
    table = csr_matrix((lift[kept], (count.row[kept], count.col[kept])), shape=(words, words))
    u, s, _ = svds(table, k=width, v0=np.ones(words))
    u = u * np.sign(u[np.abs(u).argmax(0), np.arange(width)])  # the sign of a direction is free
    out = u[:, ::-1] * np.sqrt(s[::-1])
    out[0] = 0
    return np.ascontiguousarray(out / np.sqrt((out[1:] ** 2).mean()), dtype=np.float32)


def _beside(text: np.ndarray, step: int) -> np.ndarray:
    """(2, pairs): words that stand `step` apart."""
    text = text.astype(np.int64)
    return np.stack([text[:-step], text[step:]]) if len(text) > step else np.zeros((2, 0), np.int64)
