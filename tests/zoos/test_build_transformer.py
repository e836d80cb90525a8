"""Transformers trained side by side are those that torch would train one by one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from torch import Tensor

from qemcli import attention
from qemcli.errors import InputError, UsageError
from qemcli.functions import respond
from qemcli.zoos.build import recipe, run, sources, texts, transformer, transformer_zoo
from qemcli.zoos.build.optimizers import Optimizers
from qemcli.zoos.build.transformer import Block, Data
from qemcli.zoos.build.transformer_recipe import OPTIMIZERS, TransformerRecipe
from qemcli.zoos.zoo import Zoo

PLAN = TransformerRecipe(
    name="tiny", models=6, checkpoints=(1, 2), batch=16, warmup=1, width=8, ffn=12, patch=4,
    train_images=64, test_images=40, train_fraction=(1.0, 0.7), block=4,
)  # fmt: skip
WORDS = {0: "a cat sat on the mat", 1: "red ships sail far over blue water"}


@pytest.fixture(scope="module")
def data() -> Data:
    return transformer_zoo.load(PLAN)


@pytest.fixture
def glosses(tmp_path: Path) -> Path:
    """A parquet in the Hub's schema: a column of text, and a class behind a number."""
    import pyarrow
    from pyarrow import parquet

    rng = np.random.default_rng(0)
    label = [i % 2 for i in range(60)]
    said = [" ".join(rng.permutation(WORDS[i].split())[: 1 + j % 5]) for j, i in enumerate(label)]
    value = {"dtype": "string", "_type": "Value"}
    number = {"dtype": "int64", "_type": "Value"}
    kind = {"names": ["pet", "ship"], "_type": "ClassLabel"}
    features = {"page": number, "gloss": value, "kind": kind}
    table = pyarrow.table({"page": list(range(60)), "gloss": said, "kind": label})
    record = json.dumps({"info": {"features": features}})
    path = tmp_path / "train.parquet"
    parquet.write_table(table.replace_schema_metadata({"huggingface": record}), path)
    return path


def test_network_depends_on_its_number_alone(data: Data) -> None:
    plan = dataclasses.replace(PLAN, train_fraction=(1.0,))
    _, together, rows = transformer_zoo.block(plan, data, [0, 1, 2, 3, 4])
    _, alone, own = transformer_zoo.block(plan, data, [3])
    kept = [i for i, row in enumerate(rows) if row["run"] == "run-00003"]
    assert together[kept].tobytes() == alone.tobytes()
    assert [rows[i] for i in kept] == own
    assert not np.array_equal(together[kept], together[:2])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_is_torch_s(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    slopes = torch.randn(4, 2, 5, generator=generator, dtype=torch.float64)
    rate, decay = torch.tensor([0.02, 0.3]).double(), torch.tensor([0.1, 0.0]).double()
    ours, flat = Optimizers([kind, kind], decay, start.clone()), start.clone()
    for slope in slopes:
        ours.step(flat, slope, rate)
    made: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop, "sgd": torch.optim.SGD,
        "momentum": torch.optim.SGD,
    }  # fmt: skip
    more = {"momentum": 0.9} if kind == "momentum" else {}
    for i in range(2):
        weights = start[i].clone().requires_grad_()
        theirs = made[kind]([weights], lr=float(rate[i]), weight_decay=float(decay[i]), **more)
        for slope in slopes:
            weights.grad = slope[i].clone()
            theirs.step()
        assert (weights.detach() - flat[i]).abs().max() < 1e-9


def test_step_follows_the_gradient_of_the_mean_loss(data: Data) -> None:
    plan = dataclasses.replace(PLAN, optimizer=("sgd",), dropout=(0.0,), l2=(0.0,))
    block = Block(data, [transformer.draw(plan, 0)], plan)
    before, rows = block.flat.detach().clone().requires_grad_(), block.subsets[:, :16]
    logits = attention.logits(data.space, data.space.unflatten(before), data.train.x[rows])
    loss = torch.nn.functional.cross_entropy(logits[0], data.train.label[rows][0])
    loss.backward()
    block._step(rows, 1.0)
    assert isinstance(before.grad, Tensor)
    assert torch.allclose(block.flat, before - block.lr[0] * before.grad, atol=1e-7)
    assert before.grad.abs().max() > 1e-3


def test_diverged_network_stays_where_it_was_finite(data: Data) -> None:
    plan = dataclasses.replace(
        PLAN, optimizer=("sgd",), lr_sgd=(1e-2, 1e38), train_fraction=(1.0,), models=12
    )
    _, flat, rows = transformer_zoo.block(plan, data, list(range(12)))
    lost = np.array([row["diverged"] >= 0 for row in rows])
    wild = np.array([row["config.lr"] > 1 for row in rows])
    assert np.isfinite(flat).all()
    assert (lost == wild).all()
    assert lost.any()
    assert not lost.all()
    calm = next(i for i, w in enumerate(wild) if not w)
    number = int(rows[calm]["run"][4:])
    assert np.array_equal(transformer_zoo.block(plan, data, [number])[1][0], flat[calm])


def test_dropout_is_of_the_network_s_rate(data: Data) -> None:
    plan = dataclasses.replace(PLAN, dropout=(0.0, 0.2), train_fraction=(1.0,))
    block = Block(data, [transformer.draw(plan, i) for i in range(6)], plan)
    drops = torch.stack(block._drops(torch.Size((6, 64, 4, 16))) or [])
    assert drops.shape == (5, 6, 64, 4, 8)
    for i, rate in enumerate(block.rates.tolist()):
        assert abs((drops[:, i] == 0).double().mean() - rate) < 0.01
    assert len(set(block.rates.tolist())) == 2


def test_cells_are_drawn_once_and_split_whole() -> None:
    cells = transformer.grid(PLAN)
    assert len({tuple(c.items()) for c in cells}) == len(cells) == 2 * (8 * 5 * 5 * 2 * 5) * 2
    small = dataclasses.replace(PLAN, optimizer=("adam",), lr=(1e-3,), l2=(0.0,), models=250)
    count = transformer_zoo.cells(small)
    split = transformer_zoo.splits(small)
    assert count == len(transformer.grid(small)) == 50
    assert all(len(set(split[i::count])) == 1 for i in range(count))
    assert pandas.Series(split[:count]).value_counts().to_dict() == {
        "train": 35, "val": 7, "test": 8,
    } or set(split) == {"train", "val", "test"}  # fmt: skip
    first, again = transformer.draw(small, 3), transformer.draw(small, 3 + count)
    assert first.hyper == again.hyper
    assert first.seed != again.seed


def test_published_grid_is_that_of_the_paper() -> None:
    assert len(transformer.grid(TransformerRecipe())) == 16_000


def test_shared_start_is_one_direction(data: Data) -> None:
    plan = dataclasses.replace(PLAN, shared_init=True, init_std=(0.1, 0.3), optimizer=("adam",))
    made = [transformer.draw(plan, i) for i in range(8)]
    flat = [transformer.initial(data.space, n) / n.hyper["init_std"] for n in made]
    assert all(torch.allclose(f, flat[0], atol=1e-5) for f in flat)
    apart = transformer.initial(data.space, transformer.draw(PLAN, 0))
    assert not torch.allclose(apart, transformer.initial(data.space, transformer.draw(PLAN, 1)))


def test_initial_weights_are_cut_and_biases_zero(data: Data) -> None:
    network = transformer.Network(0, {"init_std": 1.5}, 7)
    w = data.space.unflatten(transformer.initial(data.space, network)[None])
    assert all(bool((v == 0).all()) for k, v in w.items() if k.endswith(".bias"))
    weights = torch.cat([v.flatten() for k, v in w.items() if not k.endswith(".bias")])
    assert 1.8 < weights.abs().max() <= transformer.CUT


def test_built_zoo_has_the_accuracies_that_its_networks_have(tmp_path: Path, data: Data) -> None:
    found = run.build(PLAN, data, tmp_path / "zoo", 1)
    assert found["networks"] == 6
    assert found["checkpoints"] == 12
    zoo = Zoo.open(tmp_path / "zoo")
    images = sources.load(PLAN)
    for space, flat, rows in zoo.load():
        right = respond(space, space.unflatten(flat), images.test).argmax(-1) == images.test_label
        stated = zoo.index["test_accuracy"].to_numpy()[rows]
        assert np.allclose(right.double().mean(1), stated)
    assert {"config.lr", "config.optimizer", "epoch", "seed", "split", "train_loss"} <= set(
        zoo.index
    )
    card = (tmp_path / "zoo" / "README.md").read_text()
    assert "without residual sums" in card


def test_texts_are_learned_and_their_vectors_kept(tmp_path: Path, glosses: Path) -> None:
    from safetensors import safe_open

    plan = dataclasses.replace(
        PLAN, source=str(glosses), patch=0, tokens=6, test_images=20, models=4, width=4, ffn=5,
        checkpoints=(30,), lr=(1e-2,), optimizer=("adam",), init_std=(0.5,), dropout=(0.0,),
        train_images=0, train_fraction=(1.0,), l2=(0.0,),
    )  # fmt: skip
    found = run.build(plan, transformer_zoo.load(plan), tmp_path / "zoo", 1)
    assert found["test_accuracy_quantiles"][-1] > 0.9
    with safe_open(tmp_path / "zoo" / "embedding.safetensors", "pt") as file:
        words = json.loads(file.metadata()["words"])
        vectors = file.get_tensor("vectors")
    assert set(words) <= set(" ".join(WORDS.values()).split())
    assert vectors.shape == (1 + len(words), 4)
    assert not vectors[0].any()
    assert json.loads((tmp_path / "zoo" / "zoo.json").read_text())["classes"] == ["pet", "ship"]


def test_mask_is_a_setting(glosses: Path) -> None:
    plan = dataclasses.replace(PLAN, source=str(glosses), patch=0, tokens=6, test_images=9, width=4)
    real = transformer_zoo.load(plan).train.real
    assert real is not None
    assert not real.all()
    open_ = dataclasses.replace(plan, mask=False)
    assert transformer_zoo.load(open_).train.real is None


def test_words_that_stand_together_have_near_vectors() -> None:
    ids = [[1, 2, 3, 4]] * 5 + [[5, 6, 7, 8]] * 5
    found = texts.vectors(ids, 9, 3)
    unit = found[1:] / np.linalg.norm(found[1:], axis=1, keepdims=True)
    alike = unit @ unit.T
    assert alike[:4, :4].min() > alike[:4, 4:].max()
    assert abs((found[1:] ** 2).mean() - 1) < 1e-6


def test_vocabulary_is_the_most_frequent_words() -> None:
    words = [["b", "a", "c"], ["b", "a"], ["d"]]
    assert texts.vocabulary(words, 3) == {"a": 1, "b": 2, "c": 3}
    assert texts.padded([[1, 2, 3], [], [3]], 2).tolist() == [[1, 2], [0, 0], [3, 0]]


def test_file_without_texts_is_named(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "numbers.parquet"
    parquet.write_table(pyarrow.table({"label": [0, 1]}), path)
    with pytest.raises(InputError, match="no text and label columns among label"):
        sources.read_texts(str(path))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('optimizer = ["adamw"]', "optimizer"),
        ("heads = 3", "3 heads do not divide"),
        ("dropout = [1.0]", "dropout"),
        ("lr = [0.0]", "'lr'"),
        ("depth = 0", "depth"),
        ("laers = 2", "laers"),
    ],
)
def test_recipe_that_cannot_be_trained_is_refused(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f'family = "transformer"\n{line}\n')
    with pytest.raises(UsageError, match=said):
        recipe.load(path)


def test_recipes_of_transformers_can_be_read() -> None:
    root = Path(__file__).parents[2] / "zoos"
    names = {"digits", "mnist", "text", "agnews"}
    plans = {n: recipe.load(root / f"transformer-{n}" / "recipe.toml") for n in names}
    assert all(isinstance(plan, TransformerRecipe) for plan in plans.values())
    assert {n for n, plan in plans.items() if getattr(plan, "patch", 0)} == {"digits", "mnist"}
