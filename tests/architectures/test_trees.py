"""Trees on zoos: train, save, load, score; what they claim; same seed, same bytes; the extra."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from layer_kit import draw_weights
from torch import Tensor
from zoo_kit import write_zoo

from qemcli import groups, registry
from qemcli.designs import Design
from qemcli.errors import EnvironmentFailure, InputError, UsageError
from qemcli.points import Points
from qemcli.predictor_files import FILE
from qemcli.predictors import Predictor
from qemcli.spaces import cnn
from qemcli.testing import CONTROLS, change, invariance_error
from qemcli.training import Rows, Run, Schedule

SPACE = cnn([1, 3, 4], 2)
NAMES = ("xgboost", "lightgbm", "random_forest")
GENERALIZATION = registry.load("tasks", "generalization")
CLASSIFICATION = registry.load("tasks", "classification")


def networks(count: int = 160) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = 0.1 + torch.rand(count, 1, generator=generator)
    flat = size * torch.randn(count, SPACE.size, generator=generator)
    return flat, (size[:, 0] - 0.1) * 0.8 + 0.1


def grown(design: Design, target: Tensor, seed: int = 0, outputs: int = 1) -> Predictor:
    flat, _ = networks()
    task = GENERALIZATION if outputs == 1 else CLASSIFICATION
    model = design.build(SPACE, outputs)
    rows = [Rows(Points.of(SPACE, flat[a:b]), target[a:b]) for a, b in ((0, 100), (100, 160))]
    Run(model, task, Schedule(), seed).fit(*rows)
    return Predictor("trees", SPACE, design, task.__name__.rpartition(".")[2], model.eval())


def small(name: str, quasi: str = "none", **config: object) -> Design:
    return Design(name, quasi, {"leaf": 5, "rounds": 20, "reads": "statistics", **config})


@pytest.mark.parametrize("name", NAMES)
def test_trees_rank_held_out_networks(name: str) -> None:
    flat, target = networks()
    predictor = grown(small(name), target)
    score = GENERALIZATION.score(predictor.predict(flat[100:]).numpy(), target[100:].numpy())
    assert score["tau"] > 0.7
    assert score["mae"] < 0.1
    assert predictor.parameters > 20


@pytest.mark.parametrize("name", NAMES)
def test_trees_tell_classes(name: str) -> None:
    flat, target = networks()
    classes = (target * 3).floor()
    predictor = grown(small(name), classes, outputs=3)
    found = predictor.predict(flat[100:])
    assert torch.allclose(found.sum(1), torch.ones(60, dtype=found.dtype))
    assert (found.argmax(1) == classes[100:]).float().mean() > 0.6


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_gives_the_same_bytes(name: str) -> None:
    _, target = networks()
    design = small(name, columns=0.5)
    states = [grown(design, target, seed).model.state_dict() for seed in (1, 1, 2)]
    once, again, other = (b"".join(x.numpy().tobytes() for x in s.values()) for s in states)
    assert once == again
    assert once != other


def test_predictor_survives_saving_and_needs_no_library(tmp_path: Path, monkeypatch) -> None:
    flat, target = networks()
    predictor = grown(small("lightgbm"), target)
    predictor.save(tmp_path)
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    assert torch.equal(predictor.predict(flat), Predictor.load(tmp_path / FILE).predict(flat))


@pytest.mark.parametrize(
    ("name", "package"), [("xgboost", "xgboost"), ("random_forest", "lightgbm")]
)
def test_missing_extra_is_one_clear_line(name: str, package: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EnvironmentFailure, match=f"needs {package}") as caught:
        grown(small(name), networks()[1])
    assert "qemcli[trees]" in caught.value.hint


def test_balanced_statistics_are_invariant_and_weights_are_not(rng) -> None:
    _, target = networks()
    w = draw_weights(SPACE, 40, rng)
    for design, claims in (
        (small("xgboost", "balanced"), {"permutation", "scale", "monomial"}),
        (small("xgboost"), {"permutation"}),
        (small("xgboost", reads="weights"), set()),
    ):
        predictor = grown(design, target)
        predictor.model.double()
        assert predictor.claims == claims
        for group in groups.applicable(SPACE):
            element = groups.sample(group, SPACE, 40, rng)
            error = invariance_error(predictor, SPACE, w, element)
            assert (error.max() < 1e-10) == (group in claims), (design, group)
        before, moved = (predictor(x) for x in (w, CONTROLS["unmatched"](SPACE, w, rng)))
        assert change(before, moved).max() > 0.1


def test_early_stop_keeps_the_best_round() -> None:
    _, target = networks()
    predictor = grown(small("lightgbm", rounds=400, patience=5, rate=0.5), target)
    trees = len(predictor.model.forest.root)
    assert trees < 100
    again = grown(small("lightgbm", rounds=trees, patience=0, rate=0.5), target)
    assert len(again.model.forest.root) == trees


def test_what_cannot_be_grown_is_said() -> None:
    _, target = networks()
    with pytest.raises(InputError, match="no tree splits the 100") as caught:
        grown(small("lightgbm", leaf=60), target)
    assert "leaf" in caught.value.hint
    with pytest.raises(UsageError, match="cannot read 'statistic'"):
        small("xgboost", reads="statistic").build(SPACE)
    with pytest.raises(UsageError, match="no equivariant layer"):
        small("xgboost", "exact").build(SPACE)


def test_train_evaluate_and_verify_from_the_command_line(run, tmp_path: Path, monkeypatch) -> None:
    # Intervals are tested where they are made, and take seconds.
    monkeypatch.setattr("qemcli.evaluation.interval", lambda *asked: (0.0, 1.0))
    flat, _ = networks()
    zoo = write_zoo(tmp_path / "zoo", SPACE, flat)
    recipe = tmp_path / "train.toml"
    text = 'architecture = "random_forest"\nquasi = "balanced"\n'
    config = 'config = { reads = "statistics", leaf = 5, rounds = 10 }\n'
    recipe.write_text(text + config)
    trained = run("train", recipe, "--zoo", zoo, "--out", tmp_path / "p", "--json")
    assert trained.code == 0, trained.err
    assert trained.json["rows"][0]["tau"] > 0.5
    rows = run("evaluate", tmp_path / "p", zoo, "--augment", "monomial", "--json").json["rows"]
    assert rows[0]["tau"] == pytest.approx(rows[1]["tau"], abs=0.05)
    assert run("predict", zoo, "--predictor", tmp_path / "p", "--json").json["n"] == len(flat)
    call = ["verify-invariance", tmp_path / "p", "--zoo", zoo, "--samples", 3, "-q"]
    assert run(*call).code == 0
    assert run(*call, "--twin").code == 1
