"""Small transformers trained many at a time: every product is batched over a block of networks.

Everything random is drawn from the network's own generators and no sum runs over networks, so a
network does not depend on those it is trained beside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qemcli import attention
from qemcli.spaces import Transformer
from qemcli.zoos.build.optimizers import Optimizers
from qemcli.zoos.build.texts import Texts
from qemcli.zoos.build.transformer_recipe import ADAPTIVE, TransformerRecipe

CUT = 2.0  # initial weights are drawn again beyond it, as in the published zoo


@dataclass(frozen=True)
class Examples:
    """What the networks read: tokens x (n, t, numbers) (patches, or embedded words), which of them
    are real (n, t) (None: all), and labels (n,)."""

    x: Tensor
    real: Tensor | None
    label: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Tokens, which are real, and labels of examples `rows`, of any shape."""
        real = None if self.real is None else self.real[rows]
        return self.x[rows], real, self.label[rows]


@dataclass(frozen=True)
class Data:
    """Training and test examples, the weight space of networks that read them, and of texts the
    words that they were read by."""

    train: Examples
    test: Examples
    space: Transformer
    texts: Texts | None = None


@dataclass(frozen=True)
class Network:
    """One network to train: its number, its cell of the grid, and its generators' seed."""

    number: int
    hyper: dict[str, Any]
    seed: int


@lru_cache(maxsize=4)
def grid(recipe: TransformerRecipe) -> list[dict[str, Any]]:
    """All cells of the recipe's grid, in an order drawn from its seed."""
    cells: list[dict[str, Any]] = []
    for optimizer in recipe.optimizer:
        adaptive = optimizer in ADAPTIVE
        rates = {"sgd": recipe.lr_sgd, "momentum": recipe.lr_momentum}
        axes = {
            "optimizer": (optimizer,),
            "lr": rates.get(optimizer, recipe.lr),
            "init_std": recipe.init_std if adaptive else recipe.init_std_sgd,
            "l2": recipe.l2,
            "train_fraction": recipe.train_fraction,
            "dropout": recipe.dropout,
        }
        shape = [len(values) for values in axes.values()]
        for index in np.ndindex(*shape):
            cells.append({n: v[i] for (n, v), i in zip(axes.items(), index, strict=True)})
    order = np.random.default_rng((recipe.seed, 2**32 + 2)).permutation(len(cells))
    return [cells[i] for i in order]


def draw(recipe: TransformerRecipe, number: int) -> Network:
    """Network `number`: its cell, and a seed of its own unless the recipe shares one."""
    cells = grid(recipe)
    key = (recipe.seed,) if recipe.shared_init else (recipe.seed, number)
    seed = int(np.random.default_rng(key).integers(2**62))
    return Network(number, cells[number % len(cells)], seed)


def initial(space: Transformer, network: Network) -> Tensor:
    """(D,) initial weights: normal numbers of `init_std`, cut at 2; biases are zero."""
    generator = torch.Generator().manual_seed(network.seed)
    w = {}
    for t in space.tensors:
        if t.name.endswith(".bias"):
            w[t.name] = torch.zeros(1, *t.shape)
            continue
        z = torch.randn(1, *t.shape, generator=generator) * network.hyper["init_std"]
        while (far := z.abs() > CUT).any():
            again = torch.randn(z.shape, generator=generator) * network.hyper["init_std"]
            z = torch.where(far, again, z)
        w[t.name] = z
    return space.flatten(w)[0]


class Block:
    """Networks of one train fraction side by side: weights (n, D), one optimiser state."""

    def __init__(self, data: Data, networks: list[Network], recipe: TransformerRecipe) -> None:
        self.data, self.recipe = data, recipe
        # The optimisers are applied to slices, so networks of one optimiser stand together.
        self.networks = sorted(networks, key=lambda n: (n.hyper["optimizer"], n.number))
        flat = torch.stack([initial(data.space, n) for n in self.networks])
        self.flat = flat.requires_grad_()
        kinds = [n.hyper["optimizer"] for n in self.networks]
        self.optimizers = Optimizers(kinds, self._column("l2"), flat.detach())
        self.lr, self.rates = self._column("lr"), self._column("dropout")
        self.generators = [torch.Generator().manual_seed(n.seed ^ 1) for n in self.networks]
        self.droppers = [torch.Generator().manual_seed(n.seed ^ 2) for n in self.networks]
        fraction = self.networks[0].hyper["train_fraction"]
        size = max(min(recipe.batch, len(data.train)), round(len(data.train) * fraction))
        self.subsets = torch.stack(
            [torch.randperm(len(data.train), generator=g)[:size] for g in self.generators]
        )
        self.diverged = torch.full((len(flat),), -1)  # epoch, of those that did
        self.epoch = 0

    def _column(self, name: str) -> Tensor:
        return torch.tensor([float(n.hyper[name]) for n in self.networks])

    def pass_through(self) -> None:
        """One epoch: every network through its own examples, in its own order."""
        size, batch = self.subsets.shape[1], min(self.recipe.batch, self.subsets.shape[1])
        order = torch.stack([torch.randperm(size, generator=g) for g in self.generators])
        rows = self.subsets.gather(1, order)
        steps = size // batch  # the examples left over come in another epoch
        for i in range(steps):
            self._step(rows[:, i * batch : (i + 1) * batch], self._rate(self.epoch + i / steps))
        self.epoch += 1
        fresh = (self.diverged < 0) & ~self.optimizers.alive
        self.diverged[fresh] = self.epoch

    def _rate(self, epoch: float) -> float:
        """Factor on the learning rate: a linear rise, then a cosine to zero."""
        warm, last = self.recipe.warmup, max(self.recipe.checkpoints)
        if epoch < warm:
            return (epoch + 0.1) / (warm + 0.1)
        return 0.5 * (1 + math.cos(math.pi * (epoch - warm) / max(last - warm, 1)))

    def _step(self, rows: Tensor, rate: float) -> None:
        x, real, label = self.data.train.at(rows)
        w = self.data.space.unflatten(self.flat)
        logits = attention.logits(self.data.space, w, x, real, self._drops(x.shape))
        loss = F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss / rows.shape[1], self.flat)
        with torch.no_grad():
            self.optimizers.step(self.flat, gradient, rate * self.lr)

    def _drops(self, shape: torch.Size) -> list[Tensor] | None:
        """Dropout factors (n, p, t, D), one behind the embedding and each attention and
        feed-forward, from the networks' own generators.

        Each 64-bit draw serves eight numbers, so a rate is rounded to 1/256.
        """
        if not self.rates.any():
            return None
        n, *rest = shape[:-1]
        sites = 1 + 2 * self.recipe.depth
        size = sites * math.prod(rest) * self.recipe.width
        words = torch.empty(n, -(-size // 8), dtype=torch.int64)
        for row, generator in zip(words, self.droppers, strict=True):
            row.random_(-(2**63), None, generator=generator)
        levels = (self.rates * 256).round()[:, None]
        keep = words.view(torch.uint8)[:, :size] >= levels.to(torch.uint8)
        factors = keep.float().mul_(256 / (256 - levels))
        return list(factors.view(n, sites, *rest, -1).unbind(1))

    @torch.no_grad()
    def measure(self) -> list[dict[str, float]]:
        """Accuracy and loss of every network on the test examples and on (up to 512 of) its own
        training examples."""
        w = self.data.space.unflatten(self.flat.detach())
        sides = {"test": self._over(w, None), "train": self._over(w, self.subsets[:, :512])}
        return [
            {f"{side}_{name}": float(values[name][i]) for side, values in sides.items()
             for name in ("accuracy", "loss")}
            for i in range(len(self.networks))
        ]  # fmt: skip

    def _over(self, w: dict[str, Tensor], rows: Tensor | None) -> dict[str, Tensor]:
        """Accuracy and loss (n,) over the training examples rows (n, p); None: all test ones."""
        examples = self.data.test if rows is None else self.data.train
        if rows is None:
            rows = torch.arange(len(examples)).expand(len(self.networks), -1)
        right = torch.zeros(len(self.networks), dtype=torch.float64)
        loss = torch.zeros_like(right)
        for part in rows.split(self.recipe.batch, dim=1):
            x, real, label = examples.at(part)
            z = attention.logits(self.data.space, w, x, real)
            right += (z.argmax(-1) == label).sum(1)
            each = F.cross_entropy(z.flatten(0, 1), label.flatten(), reduction="none")
            loss += each.view(label.shape).double().sum(1)
        return {"accuracy": right / rows.shape[1], "loss": loss / rows.shape[1]}


def train(block: Block) -> Iterator[tuple[int, np.ndarray, list[dict[str, float]]]]:
    """Train the block; at every checkpoint yields (epoch, weights (n, D), one score dict a
    network)."""
    last = max(block.recipe.checkpoints)
    for epoch in range(last + 1):
        if epoch in block.recipe.checkpoints:
            yield epoch, block.flat.detach().numpy().copy(), block.measure()
        if epoch < last:
            block.pass_through()
