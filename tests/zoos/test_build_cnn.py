"""Networks trained side by side are the networks that one would train alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qemcli.errors import UsageError
from qemcli.spaces import Chain
from qemcli.zoos.build import cnn, cnn_zoo, recipe, run, sources
from qemcli.zoos.build.recipe import Recipe

PLAN = Recipe(
    name="tiny", test_images=200, models=7, checkpoints=(2, 5), batch=8, channels=(5, 4), block=3
)


@pytest.fixture(scope="module")
def images() -> sources.Images:
    return sources.load(PLAN)


def _module(space: Chain, flat: torch.Tensor, activation: str) -> nn.Sequential:
    act = {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]
    layers: list[nn.Module] = []
    for la in space.layers[:-1]:
        layers += [nn.Conv2d(la.cols, la.rows, 3, stride=2, padding=1), act()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(space.layers[-1].cols, 10)]
    module = nn.Sequential(*layers)
    names = list(module.state_dict())
    w = space.unflatten(flat[None])
    values = [w[t.name][0] for t in space.tensors]
    module.load_state_dict(dict(zip(names, values, strict=True)))
    return module


def _alone(
    module: nn.Module, network: cnn.Network, block: cnn.Block, images: sources.Images
) -> torch.Tensor:
    """The same network trained by an ordinary loop of nn.Module and torch.optim."""
    h = network.hyper
    kernels = [p for p in module.parameters() if p.dim() > 1]
    biases = [p for p in module.parameters() if p.dim() == 1]
    groups = [{"params": kernels, "weight_decay": 2 * h["l2"]}, {"params": biases}]
    optimiser = {
        "adam": lambda: torch.optim.Adam(groups, lr=h["lr"], eps=1e-7),
        "rmsprop": lambda: torch.optim.RMSprop(groups, lr=h["lr"], alpha=0.9, eps=1e-7),
        "sgd": lambda: torch.optim.SGD(groups, lr=h["lr"]),
    }[h["optimizer"]]()
    generator = torch.Generator().manual_seed(network.seed ^ 1)
    subset = block.subsets[block.networks.index(network)]
    for _ in range(5):
        rows = subset[torch.randint(len(subset), (PLAN.batch,), generator=generator)]
        loss = nn.functional.cross_entropy(module(images.train[rows]), images.train_label[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("optimizer", cnn.OPTIMIZERS)
def test_block_equals_the_loop(activation: str, optimizer: str, images: sources.Images) -> None:
    plan = dataclasses.replace(
        PLAN, activation=(activation,), optimizer=(optimizer,), dropout=(0.0, 0.0), l2=(1e-3, 1e-2)
    )
    space = cnn.space_of(plan, activation, images)
    networks = [cnn.draw(plan, number) for number in range(4)]
    block = cnn.Block(space, networks, plan.batch, images)
    start = block.flat.detach().clone()
    for _ in range(5):
        block.step()
    for i, network in enumerate(block.networks):
        module = _module(space, start[i], activation)
        alone = _alone(module, network, block, images)
        moved = (alone - start[i]).abs().max()
        assert moved > 1e-4
        torch.testing.assert_close(block.flat.detach()[i], alone, rtol=1e-4, atol=2e-5)


def test_network_is_the_same_in_any_block(images: sources.Images) -> None:
    plan = dataclasses.replace(PLAN, dropout=(0.2, 0.6), checkpoints=(3,))
    networks = [cnn.draw(plan, number) for number in range(8)]
    found = []
    for size in (1, 3, 8):
        flats = {}
        for i in range(0, 8, size):
            space = cnn.space_of(plan, "relu", images)
            block = cnn.Block(space, networks[i : i + size], plan.batch, images)
            *_, (_, flat, _) = cnn.train(block, plan.checkpoints)
            flats |= {n.number: f for n, f in zip(block.networks, flat, strict=True)}
        found.append(np.stack([flats[i] for i in range(8)]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-4, atol=1e-5)


def test_dropout_keeps_the_mean_and_the_rate(images: sources.Images) -> None:
    plan = dataclasses.replace(PLAN, dropout=(0.5, 0.5), batch=64)
    networks = [cnn.draw(plan, number) for number in range(4)]
    block = cnn.Block(cnn.space_of(plan, "relu", images), networks, plan.batch, images)
    masks = block._masks()
    assert masks is not None
    for mask in masks:
        assert abs(float((mask == 0).double().mean()) - 0.5) < 0.02
        assert abs(float(mask.double().mean()) - 1) < 0.04
    first, second = block._masks(), masks
    assert not torch.equal(first[0], second[0])  # type: ignore[index]


def test_accuracy_is_that_of_the_network(images: sources.Images) -> None:
    plan = dataclasses.replace(PLAN, models=2, dropout=(0.0, 0.0), checkpoints=(5,))
    space = cnn.space_of(plan, "relu", images)
    block = cnn.Block(space, [cnn.draw(plan, i) for i in range(2)], plan.batch, images)
    *_, (_, flat, scores) = cnn.train(block, plan.checkpoints)
    module = _module(space, torch.from_numpy(flat[1]), "relu")
    logits = module(images.test)
    accuracy = (logits.argmax(1) == images.test_label).double().mean()
    assert scores[1]["test_accuracy"] == pytest.approx(float(accuracy), abs=1e-9)
    loss = nn.functional.cross_entropy(logits, images.test_label)
    assert scores[1]["test_loss"] == pytest.approx(float(loss.detach()), rel=1e-4)


def test_build_resumes_to_the_same_zoo(images: sources.Images, tmp_path: Path) -> None:
    import pandas

    whole = run.build(PLAN, images, tmp_path / "a", 1)
    assert whole["networks"] == 7
    assert whole["checkpoints"] == 14
    run.build(PLAN, images, tmp_path / "b", 2)
    # An interrupted build: its index was never written and its last block is missing.
    done = tmp_path / "c"
    store = run.Store(done, recipe=dataclasses.asdict(PLAN))
    run._start(PLAN, images)
    run._block(1, run.blocks(PLAN)[1], done)
    assert store.done(1)
    run.build(PLAN, images, done, 1, resume=True)
    tables = [pandas.read_parquet(tmp_path / n / "index.parquet") for n in "abc"]
    pandas.testing.assert_frame_equal(tables[0], tables[1])
    pandas.testing.assert_frame_equal(tables[0], tables[2])
    assert not list(done.rglob("*.tmp"))


def test_interrupted_build_goes_on(images: sources.Images, tmp_path: Path) -> None:
    import pandas

    def stop(trained: int) -> None:
        if trained:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.build(PLAN, images, tmp_path / "cut", 1, advance=stop)
    assert run.Store(tmp_path / "cut", resume=True).done(0)
    assert not (tmp_path / "cut" / "index.parquet").exists()
    advanced: list[int] = []
    run.build(PLAN, images, tmp_path / "cut", 1, resume=True, advance=advanced.append)
    assert advanced == [3, 3, 1]  # the first block was not trained again
    run.build(PLAN, images, tmp_path / "whole", 1)
    tables = [pandas.read_parquet(tmp_path / n / "index.parquet") for n in ("cut", "whole")]
    pandas.testing.assert_frame_equal(*tables)


def test_zoo_of_two_activations_says_each_network_s_own(
    images: sources.Images, tmp_path: Path
) -> None:
    from qemcli.functions import respond
    from qemcli.zoos.zoo import Zoo

    plan = dataclasses.replace(PLAN, activation=("relu", "tanh"), checkpoints=(3,))
    run.build(plan, images, tmp_path / "zoo", 1)
    zoo = Zoo.open(tmp_path / "zoo")
    assert set(zoo.index["activation"]) == {"relu", "tanh"}
    assert (zoo.index["activation"] == zoo.index["config.activation"]).all()
    for space, flat, positions in zoo.load():
        rows = zoo.index.iloc[positions]
        for name in ("relu", "tanh"):
            chosen = (rows["activation"] == name).to_numpy(copy=True)
            w = space.unflatten(flat[torch.from_numpy(chosen)])
            logits = respond(space.running(name), w, images.test)
            accuracy = (logits.argmax(-1) == images.test_label).double().mean(1)
            np.testing.assert_allclose(accuracy, rows["test_accuracy"][chosen], atol=0.011)


def test_diverged_network_is_kept_and_named(images: sources.Images, tmp_path: Path) -> None:
    import pandas

    plan = dataclasses.replace(
        PLAN, models=2, lr=(1e9, 1e9), optimizer=("sgd",), dropout=(0.0, 0.0), checkpoints=(1, 30)
    )
    summary = run.build(plan, images, tmp_path / "zoo", 1)
    table = pandas.read_parquet(tmp_path / "zoo" / "index.parquet")
    assert len(table) == 4
    assert summary["not_finite"] == (~table["finite"]).sum() > 0


def test_scores_do_not_depend_on_the_block(images: sources.Images) -> None:
    plan = dataclasses.replace(PLAN, train_fraction=(0.05, 1.0), checkpoints=(2,))
    networks = [cnn.draw(plan, number) for number in range(6)]
    assert len({n.hyper["train_fraction"] for n in networks}) == 2
    space = cnn.space_of(plan, "relu", images)
    found = []
    for size in (1, 6):
        scores = {}
        for i in range(0, 6, size):
            block = cnn.Block(space, networks[i : i + size], plan.batch, images)
            *_, (_, _, measured) = cnn.train(block, plan.checkpoints)
            scores |= {n.number: s for n, s in zip(block.networks, measured, strict=True)}
        found.append([[scores[i][k] for k in sorted(scores[i])] for i in range(6)])
    np.testing.assert_allclose(found[0], found[1], atol=2e-3)


def test_windows_may_be_kept_or_made_at_each_step(
    images: sources.Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = dataclasses.replace(PLAN, junction="flatten")
    networks = [cnn.draw(plan, number) for number in range(3)]
    flats = []
    for limit in (cnn.BANK, 0):
        monkeypatch.setattr(cnn, "BANK", limit)
        block = cnn.Block(cnn.space_of(plan, "tanh", images), networks, plan.batch, images)
        assert (block.bank is None) == (limit == 0)
        block.step()
        flats.append(block.flat.detach())
    assert torch.equal(*flats)


def test_flattened_junction_is_torch_s(images: sources.Images) -> None:
    from qemcli.functions import respond

    plan = dataclasses.replace(PLAN, junction="flatten")
    space = cnn.space_of(plan, "relu", images)
    block = cnn.Block(space, [cnn.draw(plan, i) for i in range(3)], plan.batch, images)
    rows = torch.arange(20).expand(3, -1)
    ours = block.forward(block.flat.detach(), block._read(rows))
    theirs = respond(space, space.unflatten(block.flat.detach()), images.train[:20])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_images_that_vanish_are_named(images: sources.Images) -> None:
    plan = dataclasses.replace(PLAN, padding=0, channels=(4, 4, 4, 4))
    with pytest.raises(UsageError, match="nothing is left of the image after convolution 3"):
        cnn.space_of(plan, "relu", images)


def test_split_keeps_runs_together() -> None:
    plan = dataclasses.replace(PLAN, models=1000)
    names, counts = np.unique(cnn_zoo.splits(plan), return_counts=True)
    assert dict(zip(names, counts, strict=True)) == {"test": 300, "train": 600, "val": 100}


def test_build_refuses_what_it_did_not_begin(images: sources.Images, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        run.build(PLAN, images, tmp_path, 1)
    other = tmp_path / "zoo"
    run.Store(other, recipe=dataclasses.asdict(PLAN)).begin()
    with pytest.raises(UsageError, match="another recipe"):
        run.build(dataclasses.replace(PLAN, seed=9), images, other, 1, resume=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modls = 3", "Did you mean 'models'"),
        ("models = 'many'", "something like"),
        ("lr = [0.1]", "low, high"),
        ("dropout = [0.5, 1.0]", "dropout"),
        ("optimizer = ['adamw']", "Did you mean 'adam'"),
        ("optimizer = []", "'optimizer' is empty"),
        ("init = ['he_norml']", "Did you mean 'he_normal'"),
        ("activation = ['rleu']", "Did you mean 'relu'"),
        ("junction = 'flaten'", "Did you mean 'flatten'"),
        ("train_fraction = [3.0]", "up to 1"),
        ("train_fraction = []", "up to 1"),
        ("channels = []", "positive"),
        ("test_images = -5", "positive"),
        ("family = 'mixed'\njunction = ['pol']", "Did you mean 'pool'"),
        ("models = ", "not TOML"),
    ],
)
def test_recipe_names_what_is_wrong(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        recipe.load(path)
    assert said in f"{error.value.message} {error.value.hint}"


def test_build_command_makes_a_zoo(run: Callable, tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text("models = 2\ncheckpoints = [1]\nbatch = 4\nchannels = [3]\ntest_images = 50\n")
    ran = run("build", path, "--out", tmp_path / "zoo", "--workers", "1", "--json")
    assert ran.code == 0
    assert ran.json["networks"] == 2
    about = json.loads((tmp_path / "zoo" / "zoo.json").read_text())
    assert about["format"] == "qem-zoo"
    assert run("build", path, "--out", tmp_path / "zoo").code == 2
    assert run("build", "no-such-recipe").code == 2
    dry = run("build", path, "--out", tmp_path / "dry", "--dry-run")
    assert dry.code == 0
    assert not (tmp_path / "dry").exists()


def test_interrupted_command_says_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable
) -> None:
    from qemcli.zoos.build import run as building

    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "tiny.toml"
    path.write_text("models = 9\ncheckpoints = [1]\ntest_images = 50\n")
    monkeypatch.setattr(building, "build", stop)
    ran = run("build", path, "--out", "my zoo", "--models", 3, "--seed", 5)
    assert ran.code == 130
    again = f"qem build {path} --out 'my zoo' --models 3 --seed 5 --resume"
    assert again in ran.err


def test_parquet_without_images_is_named(tmp_path: Path) -> None:
    import pandas

    from qemcli.errors import InputError

    path = tmp_path / "x.parquet"
    pandas.DataFrame({"text": ["a"], "label": [0]}).to_parquet(path)
    with pytest.raises(InputError, match="no image"):
        sources.load(dataclasses.replace(PLAN, source=str(path)))
    path.write_bytes(b"PAR1 cut")
    with pytest.raises(InputError, match="not a readable parquet"):
        sources.load(dataclasses.replace(PLAN, source=str(path)))
