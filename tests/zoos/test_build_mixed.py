"""A zoo of many architectures: no two alike, each trained as one would train it alone."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from qemcli.errors import UsageError
from qemcli.functions import respond
from qemcli.spaces import Chain, Residual
from qemcli.zoos.build import cnn, mixed, recipe, run, sources
from qemcli.zoos.build.mixed_recipe import MixedRecipe
from qemcli.zoos.zoo import Zoo

PLAN = MixedRecipe(
    name="tiny", test_images=200, models=8, checkpoints=(2, 5), batch=8, block=2, width=(3, 4, 5),
    residual=0.5, seed=5,
)  # fmt: skip
SUMS = mixed.Architecture((5, 3, 5, 3), 5, 2, "flatten", "tanh", (-1, -1, 0, 1))
CHAINED = mixed.Architecture((5, 3), 3, 3, "pool", "gelu", (-1, -1))


@pytest.fixture(scope="module")
def images() -> sources.Images:
    return sources.load(PLAN)


def test_architectures_differ_and_use_every_list() -> None:
    plan = dataclasses.replace(PLAN, models=160)
    found = mixed.architectures(plan)
    assert len(set(found)) == 80
    assert {len(a.widths) for a in found} == set(plan.depth)
    for name in ("kernel", "stride", "junction", "activation"):
        assert {getattr(a, name) for a in found} == set(getattr(plan, name))
    assert 20 < sum(a.sums for a in found) < 60
    assert found[:10] == mixed.architectures(dataclasses.replace(plan, models=20))
    assert found != mixed.architectures(dataclasses.replace(plan, seed=6))


def test_sums_are_of_one_width_and_never_of_the_layer_before() -> None:
    plan = dataclasses.replace(PLAN, models=120, residual=1.0)
    seen: Counter[int] = Counter()
    for arch in mixed.architectures(plan):
        assert arch.sums
        for i, earlier in enumerate(arch.added):
            seen[earlier] += 1
            assert earlier < max(i - 1, 0)
            assert earlier == -1 or arch.widths[earlier] == arch.widths[i]
    assert set(seen) == {-1, 0, 1}
    assert not any(a.sums for a in mixed.architectures(dataclasses.replace(plan, residual=0.0)))


def test_more_architectures_than_there_are_is_said() -> None:
    plan = dataclasses.replace(
        PLAN, depth=(1,), width=(4,), kernel=(3,), stride=(2,), residual=0.0, models=100
    )
    with pytest.raises(UsageError, match="50 architectures are asked for, and 10 were found"):
        mixed.architectures(plan)


@pytest.mark.parametrize("arch", [SUMS, CHAINED])
@pytest.mark.parametrize("optimizer", cnn.OPTIMIZERS)
def test_block_equals_the_loop(
    arch: mixed.Architecture, optimizer: str, images: sources.Images
) -> None:
    """Each network trained alone, by autograd through `respond` and torch's own optimiser."""
    plan = dataclasses.replace(
        PLAN, optimizer=(optimizer,), dropout=(0.0, 0.0), l2=(1e-3, 1e-2), init=("he_normal",)
    )
    space = mixed.space_of(arch, images)
    assert isinstance(space, Residual if arch.sums else Chain)
    networks = [cnn.draw(plan, number) for number in range(3)]
    block = cnn.Block(space, networks, plan.batch, images)
    start = block.flat.detach().clone()
    for _ in range(5):
        block.step()
    for i, network in enumerate(block.networks):
        alone = start[i].clone().requires_grad_()
        decay = torch.cat([torch.full((t.size,), float(len(t.dims) > 1)) for t in space.tensors])
        optimiser = {
            "adam": lambda p, lr: torch.optim.Adam([p], lr=lr, eps=1e-7),
            "rmsprop": lambda p, lr: torch.optim.RMSprop([p], lr=lr, alpha=0.9, eps=1e-7),
            "sgd": lambda p, lr: torch.optim.SGD([p], lr=lr),
        }[optimizer](alone, network.hyper["lr"])
        generator = torch.Generator().manual_seed(network.seed ^ 1)
        subset = block.subsets[i]
        for _ in range(5):
            rows = subset[torch.randint(len(subset), (plan.batch,), generator=generator)]
            logits = respond(space, space.unflatten(alone[None]), images.train[rows])[0]
            loss = F.cross_entropy(logits, images.train_label[rows])
            loss = loss + network.hyper["l2"] * (decay * alone).square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert (alone.detach() - start[i]).abs().max() > 1e-4
        torch.testing.assert_close(block.flat.detach()[i], alone.detach(), rtol=1e-4, atol=2e-5)


def test_dropout_masks_are_of_every_convolution(images: sources.Images) -> None:
    plan = dataclasses.replace(PLAN, dropout=(0.5, 0.5))
    space = mixed.space_of(SUMS, images)
    block = cnn.Block(space, [cnn.draw(plan, n) for n in range(3)], plan.batch, images)
    masks = block._masks()
    assert [tuple(m.shape) for m in masks or []] == [(3, 8, 4, 4, c) for c in SUMS.widths]
    block.step()
    assert block.flat.isfinite().all()


def test_build_resumes_to_the_same_bytes(images: sources.Images, tmp_path: Path) -> None:
    import pandas

    whole = run.build(PLAN, images, tmp_path / "a", 1)
    assert whole["architectures"] == 4
    assert whole["checkpoints"] == 16
    done = tmp_path / "b"
    store = run.Store(done, recipe=dataclasses.asdict(PLAN))
    run._start(PLAN, images)
    run._block(2, run.blocks(PLAN)[2], done)
    assert store.done(2)
    run.build(PLAN, images, done, 1, resume=True)
    tables = [pandas.read_parquet(tmp_path / n / "index.parquet") for n in "ab"]
    pandas.testing.assert_frame_equal(*tables)
    for path in sorted((tmp_path / "a").rglob("*.safetensors")):
        assert path.read_bytes() == (done / path.relative_to(tmp_path / "a")).read_bytes()


def test_zoo_holds_every_architecture_as_it_is_run(images: sources.Images, tmp_path: Path) -> None:
    run.build(PLAN, images, tmp_path / "zoo", 1)
    zoo = Zoo.open(tmp_path / "zoo", statistics=True)
    archs = mixed.architectures(PLAN)
    kinds = set()
    for space, flat, positions in zoo.load():
        rows = zoo.index.iloc[positions]
        (number,) = set(rows["config.architecture"])
        assert space == mixed.space_of(archs[number], images)
        assert isinstance(space, Residual) == archs[number].sums == rows["config.sums"].iloc[0]
        kinds.add(type(space))
        logits = respond(space, space.unflatten(flat), images.test)
        accuracy = (logits.argmax(-1) == images.test_label).double().mean(1)
        np.testing.assert_allclose(accuracy, rows["test_accuracy"], atol=0.011)
        assert rows["stat.fc.weight.var"].notna().all()
        assert rows["stat.conv4.bias.var"].notna().all() == ("conv4.bias" in space.names)
    assert kinds == {Chain, Residual}
    assert len(list(zoo.groups())) == 4
    text = (tmp_path / "zoo" / "README.md").read_text()
    assert "8 networks of 4 architectures" in text
    assert "Built again by `qem build tiny --models 8 --seed 5" in text


def test_architectures_that_differ_in_stride_alone_are_two(
    images: sources.Images, tmp_path: Path
) -> None:
    """The same tensors run in another way: pooled, so that their shapes do not tell."""
    plan = dataclasses.replace(
        PLAN, depth=(3,), width=(4,), kernel=(3,), junction=("pool",), activation=("relu",),
        residual=0.5, checkpoints=(1,), models=8,
    )  # fmt: skip
    run.build(plan, images, tmp_path / "zoo", 1)
    zoo = Zoo.open(tmp_path / "zoo")
    assert len({space.to_json() for space in zoo.spaces.values()}) == 4
    assert len({tuple(space.shapes.items()) for space in zoo.spaces.values()}) == 1
    for space, flat, positions in zoo.load():
        logits = respond(space, space.unflatten(flat), images.test)
        accuracy = (logits.argmax(-1) == images.test_label).double().mean(1)
        found = zoo.index.iloc[positions]["test_accuracy"]
        np.testing.assert_allclose(accuracy, found, atol=0.011)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kernel = [3, 4]", "odd sizes"),
        ("depth = []", "'depth' is empty"),
        ("depth = [0]", "positive"),
        ("depth = [2]", "a `depth` of 3"),
        ("residual = 1.5", "0 to 1"),
        ("activation = ['rely']", "Did you mean 'relu'"),
        ("junction = ['mean']", "'junction' has 'mean'"),
        ("lr = [0.0, 1.0]", "above 0"),
        ("dropout = [0.5, 1.0]", "dropout"),
        ("models = 0", "positive"),
        ("channels = [3]", "no setting is called 'channels'"),
    ],
)
def test_recipe_names_what_is_wrong(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('family = "mixed"\n' + text)
    with pytest.raises(UsageError) as error:
        recipe.load(path)
    assert said in f"{error.value.message} {error.value.hint}"


def test_images_too_small_for_the_stride_are_named(images: sources.Images) -> None:
    assert cnn.sides([(3, 2, 0), (3, 2, 0)], images) == [3, 1]
    with pytest.raises(UsageError, match="nothing is left of the image after convolution 3"):
        cnn.sides([(3, 2, 0)] * 3, images)


def test_build_command_makes_a_mixed_zoo(run: Callable, tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(
        'family = "mixed"\nmodels = 4\nblock = 2\ncheckpoints = [1]\nbatch = 4\nwidth = [3]\n'
        "test_images = 50\n"
    )
    dry = run("build", path, "--out", tmp_path / "zoo", "--dry-run", "--json")
    assert dry.json["networks"] == 4
    assert not (tmp_path / "zoo").exists()
    ran = run("build", path, "--out", tmp_path / "zoo", "--workers", "1", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["architectures"] == 2
