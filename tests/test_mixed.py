"""Zoos of many architectures: one predictor trained, saved, asked, scored, compared over all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from zoo_kit import mixed_flats, mixed_spaces, write_mixed

from qemcli import registry, runs
from qemcli.comparison import Comparison, trials
from qemcli.designs import Design, calibrate, mixers
from qemcli.errors import InputError, UnsupportedError
from qemcli.points import Points
from qemcli.predictors import Predictor
from qemcli.samples import gather
from qemcli.spaces import Chain, WeightSpace, cnn
from qemcli.training import TOGETHER, Rows, Run, Schedule, order
from qemcli.zoos.zoo import Zoo

TASK = registry.load("tasks", "generalization")
SMALL = {
    "statnn": {"head": 16},
    "gmn": {"channels": 8, "layers": 2},
    "probegen": {"probes": 6, "head": [16, 16]},
    "neural_graphs": {"channels": 8, "layers": 2},
}
IMAGES = mixed_spaces()[:4]  # those that read images of one shape
CHAINS = [space for space in mixed_spaces() if isinstance(space, Chain)]
READ = {"probegen": IMAGES}


def _write(folder: Path, architecture: str) -> Path:
    return write_mixed(folder, READ.get(architecture, mixed_spaces()), 8)


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return write_mixed(tmp_path / "zoo")


def _recipe(folder: Path, architecture: str, text: str = "") -> Path:
    path = folder / f"{architecture}.toml"
    config = "\n".join(f"{k} = {json.dumps(v)}" for k, v in SMALL[architecture].items())
    path.write_text(
        f'architecture = "{architecture}"\n{text}\n[config]\n{config}\n'
        "[schedule]\nepochs = 3\nbatch_size = 16\nlr = 0.01\n"
    )
    return path


def _points(count: int = 16, spaces: Sequence[WeightSpace] = ()) -> Points:
    spaces = spaces or mixed_spaces()
    flats = mixed_flats(spaces, count)
    which = np.random.default_rng(3).permutation(np.repeat(np.arange(len(spaces)), count))
    each = [iter(flat) for flat in flats]
    return Points.joined(spaces, [(int(n), next(each[n])[None]) for n in which])


def test_points_keep_their_order() -> None:
    points = _points()
    positions = torch.tensor([70, 3, 3, 41, 0, 12])
    taken = points.rows(positions)
    assert len(taken) == 6
    for i, position in enumerate(positions.tolist()):
        ((space, row, _),) = points.parts(torch.tensor([position]))
        ((theirs, same, _),) = taken.parts(torch.tensor([i]))
        assert theirs == space
        assert torch.equal(row, same)
    both = points.followed(taken)
    sums = both.restored([(at, flat.sum(1)) for _, flat, at in both.parts()])
    again = [points.restored([(at, flat.sum(1)) for _, flat, at in points.parts()])]
    assert torch.equal(sums, torch.cat([*again, again[0][positions]]))
    doubled = points.map(lambda space, flat: 2 * flat)
    assert torch.equal(doubled.flats[2], 2 * points.flats[2])
    assert points.hash() != doubled.hash()
    assert points.hash() != points.rows(torch.arange(79, -1, -1)).hash()


def test_an_epoch_takes_every_network_once_and_a_few_of_one_kind_at_a_time() -> None:
    points = _points(20)
    drawn = order(points, 0, 1)
    assert sorted(drawn.tolist()) == list(range(100))
    assert not torch.equal(drawn, order(points, 0, 2))
    assert torch.equal(drawn, order(points, 0, 1))
    runs = 1 + int((points.which[drawn].diff() != 0).sum())
    assert runs <= 5 * 3  # 20 = 8 + 8 + 4
    assert TOGETHER == 8
    one = Points.of(points.spaces[0], points.flats[0])
    plain = np.random.default_rng((0, 1)).permutation(20)
    assert order(one, 0, 1).tolist() == plain.tolist()


@pytest.mark.parametrize("architecture", SMALL)
def test_mixed_zoo_is_trained_predicted_and_scored(run, tmp_path, architecture) -> None:
    zoo = _write(tmp_path / "zoo", architecture)
    count = len(Zoo.open(zoo).spaces)
    recipe = _recipe(tmp_path, architecture)
    trained = run("train", recipe, "--zoo", zoo, "--out", tmp_path / "p", "--json")
    assert trained.code == 0, trained.err
    history = json.loads((tmp_path / "p" / "history.json").read_text())
    assert history[-1]["loss"] < history[0]["loss"]
    assert "many architectures; it was trained on" in (tmp_path / "p" / "README.md").read_text()
    ranked = run("predict", zoo, "--predictor", tmp_path / "p", "--json")
    assert ranked.code == 0, ranked.err
    assert ranked.json["n"] == 8 * count
    predictor = Predictor.load(tmp_path / "p")
    assert len(predictor.spaces) == count
    sample = gather([Zoo.open(zoo)], TASK)
    found = predictor.predict_all(sample.networks, batch_size=7)
    told = dict(zip(sample.index["checkpoint"], found.tolist(), strict=True))
    for row in ranked.json["rows"]:
        assert row["prediction"] == pytest.approx(told[row["checkpoint"]], abs=1e-6)
    space, flat, places = list(sample.networks.parts())[1]
    alone = predictor.on(space).predict(flat)
    torch.testing.assert_close(alone, found[places])
    scored = run("evaluate", tmp_path / "p", zoo, "--augment", "permutation", "--json")
    assert scored.code == 0, scored.err
    plain, moved = scored.json["rows"]
    assert plain["mae"] == pytest.approx(moved["mae"], abs=1e-5)


def test_invariance_is_verified_on_every_architecture(run, zoo, tmp_path) -> None:
    sample = gather([Zoo.open(zoo)], TASK)
    design = Design("gmn", config=SMALL["gmn"])
    space, *others = sample.spaces
    torch.manual_seed(0)
    model = design.build_mixed(sample.spaces)
    Predictor("p", space, design, TASK.__name__.rpartition(".")[2], model, others=tuple(others)
    ).save(tmp_path / "p")  # fmt: skip
    asked = ("verify-invariance", tmp_path / "p", "--zoo", zoo, "--samples", "3", "--networks", "4")
    shown = run(*asked, "--json")
    assert shown.code == 0, shown.err
    rows = shown.json["rows"]
    assert len({row["architecture"] for row in rows}) == len(mixed_spaces())
    assert sum(row["kind"] == "control" and row["holds"] for row in rows) == 2 * len(others) + 2
    twin = run(*asked, "--twin", "--json")
    assert twin.code == 1
    assert twin.json["verdict"] == "does not hold: permutation"


@pytest.mark.parametrize("architecture", SMALL)
def test_saved_and_loaded_is_the_same(tmp_path, architecture) -> None:
    sample = gather([Zoo.open(_write(tmp_path / "zoo", architecture))], TASK)
    design = Design(architecture, config=SMALL[architecture])
    torch.manual_seed(0)
    model = design.build_mixed(sample.spaces)
    calibrate(model, sample.networks)
    space, *others = sample.spaces
    made = Predictor("p", space, design, "generalization", model, others=tuple(others))
    first = made.save(tmp_path / "a")
    loaded = Predictor.load(first)
    assert loaded.spaces == made.spaces
    assert loaded.claims == made.claims
    every = {"permutation", "scale", "sign", "monomial"}
    assert made.claims == (every if architecture == "probegen" else {"permutation"})
    with safe_open(first, framework="np") as file:
        record = json.loads(file.metadata()["qem.config"])
    assert len(record["others"]) == len(others) == len(READ.get(architecture, mixed_spaces())) - 1
    assert loaded.save(tmp_path / "b").read_bytes() == first.read_bytes()
    assert torch.equal(loaded.predict_all(sample.networks), made.predict_all(sample.networks))


def test_models_says_how_many_architectures_are_read(run, tmp_path, monkeypatch) -> None:
    first, *others = mixed_spaces()
    for name, more in (("many", tuple(others)), ("one", ())):
        design = Design("gmn", config=SMALL["gmn"])
        model = design.build_mixed((first, *more))
        Predictor(name, first, design, "generalization", model, others=more).save(tmp_path / name)
    monkeypatch.setattr("qemcli.catalogue.installed", lambda: sorted(tmp_path.iterdir()))
    told = {row["name"]: row["reads"] for row in run("models", "--json").json["rows"]}
    assert told["many"] == f"{told['one']} and {len(others)} other architectures"


def test_one_architecture_is_built_and_saved_as_ever(tmp_path) -> None:
    space = cnn([1, 3, 4], 3)
    for architecture, config in SMALL.items():
        design = Design(architecture, config=config)
        torch.manual_seed(0)
        alone = design.build(space)
        torch.manual_seed(0)
        same = design.build_mixed((space,))
        assert alone.state_dict().keys() == same.state_dict().keys()
        file = Predictor("p", space, design, "generalization", same).save(tmp_path / architecture)
        assert b'"others"' not in file.read_bytes()
        assert Predictor.load(file).reads(space)
        assert not Predictor.load(file).fits(cnn([1, 3, 5], 3))


@pytest.mark.parametrize("architecture", SMALL)
def test_resumed_training_over_many_equals_the_uninterrupted(tmp_path, architecture) -> None:
    points = _points(27, CHAINS[:3]).rows(torch.arange(80))
    target, parts = torch.linspace(0.1, 0.9, 80), (torch.arange(60), torch.arange(60, 80))
    train, val = (Rows(points.rows(at), target[at]) for at in parts)

    def made(state: Path) -> Run:
        torch.manual_seed(0)
        config = {**SMALL[architecture], "dropout": 0.2}
        model = Design(architecture, config=config).build_mixed(points.spaces)
        calibrate(model, train.networks)
        return Run(model, TASK, Schedule(epochs=3, batch_size=16), 0, state=state)

    class Killed(Exception):
        pass

    def kill(row: dict[str, float]) -> None:
        if row["epoch"] == 2:
            raise Killed

    whole = made(tmp_path / "whole.pt")
    whole.fit(train, val)
    cut = made(tmp_path / "cut.pt")
    with pytest.raises(Killed):
        cut.fit(train, val, on_epoch=kill)
    resumed = made(tmp_path / "cut.pt")
    assert resumed.fit(train, val, resume=True) == whole.history
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_designs_of_one_architecture_say_which_were_met(run, zoo, tmp_path) -> None:
    assert set(SMALL) <= set(mixers())
    refused = run("train", "--zoo", zoo, "-a", "nfn", "--quasi", "none", "--out", tmp_path / "p")
    assert refused.code == 3
    assert "'nfn' reads networks of one architecture, and these are 5: " in refused.err
    assert "gmn" in refused.err
    assert "--where" in refused.err
    assert refused.err.count("\n") <= 4
    with pytest.raises(UnsupportedError, match="a quasi layer belongs to one architecture"):
        Design("statnn", "exact").build_mixed(mixed_spaces())


def test_an_architecture_that_was_not_met_is_answered_with_a_note(run, zoo, tmp_path) -> None:
    assert run("train", _recipe(tmp_path, "gmn"), "--zoo", zoo, "--out", tmp_path / "p").code == 0
    other = write_mixed(tmp_path / "other", [cnn([1, 7, 3], 3), mixed_spaces()[0]])
    found = run("predict", other, "--predictor", tmp_path / "p", "--json")
    assert found.code == 0, found.err
    assert found.json["n"] == 32
    assert found.err.count("has met no cnn (1, 7, 3, 3) relu in training") == 1
    sirens = run("predict", "siren-heldout", "--predictor", tmp_path / "p")
    assert sirens.code == 3
    assert "siren (2, 32, 32, 1) sin: not what 'p' reads" in sirens.err


def test_designs_are_compared_over_many_architectures(zoo) -> None:
    sample = gather([Zoo.open(zoo)], TASK)
    designs = tuple(Design(name, config=SMALL[name]) for name in ("statnn", "gmn"))
    ranges = ((1.0, 10.0),)
    plan = Comparison(
        seeds=(0,), group="permutation", ranges=ranges, augment=ranges, designs=designs,
        schedule=Schedule(epochs=1, batch_size=16),
    )  # fmt: skip
    for trial in trials(plan):
        row, predictions = runs.run(trial, plan, sample)
        assert row["invariance_error"] < 1e-9
        assert np.allclose(predictions["none"], predictions["1:10"], atol=1e-5)
        assert len(predictions["label"]) == len(sample.split("test"))


def test_probes_are_for_inputs_of_one_shape() -> None:
    design = Design("probegen", config=SMALL["probegen"])
    with pytest.raises(UnsupportedError, match="numbers"):
        design.build_mixed(mixed_spaces())
    with pytest.raises(UnsupportedError, match="give 4 answers"):
        design.build_mixed([IMAGES[0], cnn([1, 3], 4)])
    with pytest.raises(InputError, match="activation is not known"):
        design.build_mixed([IMAGES[0], cnn([1, 3], 3, activation=None)])


def test_networks_of_a_damaged_shard_are_named_and_the_rest_is_done(run, zoo, tmp_path) -> None:
    shards = sorted((zoo / "weights").glob("*/*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-8])
    out = tmp_path / "p"
    trained = run("train", _recipe(tmp_path, "gmn"), "--zoo", zoo, "--out", out, "--json")
    asked = run("predict", zoo, "--predictor", out, "--json")
    scored = run("evaluate", out, zoo, "--json")
    for found, lost in ((trained, 16), (asked, 16), (scored, 2)):  # two of them are held out
        assert found.code == 4, found.err
        assert len(found.json["failed"]) == lost
        assert {"cut short" in item["reason"] for item in found.json["failed"]} == {True}
    assert asked.json["n"] == 16 * (len(shards) - 1)
    assert "warning" not in asked.err.lower()
    strictly = run("predict", zoo, "--predictor", out, "--strict")
    assert strictly.code == 3
    assert "cut short" in strictly.err
    for shard in shards[1:]:
        shard.unlink()
    nothing = run("train", _recipe(tmp_path, "gmn"), "--zoo", zoo, "--out", tmp_path / "q")
    assert nothing.code == 3
    assert "cut short" in nothing.err or "missing" in nothing.err
