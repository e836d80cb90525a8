"""What ships: predictors that give their expected answers, hold their claims, and carry a whole
card."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qemcli import edits, registry, verification
from qemcli.predictor_files import installed
from qemcli.predictors import Predictor
from qemcli.samples import scored
from qemcli.shipped import shipped
from qemcli.verification import Check
from qemcli.zoos.resolve import embedded
from qemcli.zoos.zoo import Zoo

PREDICTORS = [folder.name for folder in installed()]
ZOOS = [folder.name for folder in embedded()]


def _front_matter(card: str) -> dict[str, str]:
    head = card.split("---")[1]
    return dict(line.split(": ", 1) for line in head.strip().splitlines())


def test_something_ships() -> None:
    assert {"cnn-relu", "cnn-tanh"} <= set(PREDICTORS)
    assert {"cnn-heldout", "cnn-heldout-tanh", "cnn-small"} <= set(ZOOS)


@pytest.mark.parametrize("name", PREDICTORS)
def test_predictor_gives_its_expected_answers(name: str) -> None:
    expected = json.loads((shipped("models") / name / "expected.json").read_text())
    zoo = Zoo.open(shipped("zoos") / expected["zoo"])
    ((space, flat, positions),) = zoo.load()
    predictor = Predictor.load(name)
    found, edit = predictor.predict(flat), predictor.design.edit
    if edit:  # of its pictures, the errors
        task = registry.load("tasks", predictor.task)
        found = torch.from_numpy(scored(task, found, edits.find(edit).of(space, flat))[0])
    names = zoo.index["checkpoint"].iloc[positions].tolist()
    wanted = [expected["predictions"][n] for n in names]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-4)
    assert np.std(wanted) > 2e-3  # far above the tolerance: other networks have other answers


@pytest.mark.parametrize("name", PREDICTORS)
def test_predictor_holds_what_it_claims(name: str) -> None:
    predictor = Predictor.load(name)
    zoos = [Zoo.open(folder) for folder in embedded()]
    flat = verification.networks(predictor.space, zoos, 16, None)
    report = verification.verify(predictor, flat, None, Check(samples=3))
    assert report.code == 0
    assert "monomial" in report.claimed
    assert report.tolerance < 1e-10


@pytest.mark.parametrize("name", PREDICTORS)
def test_card_equals_the_header(name: str) -> None:
    card = (shipped("models") / name / "README.md").read_text()
    predictor = Predictor.load(name)
    front = _front_matter(card)
    assert front["architecture"] == predictor.design.architecture
    assert front["quasi"] == predictor.design.quasi
    assert front["task"] == predictor.task
    metric = registry.load("tasks", predictor.task).METRIC
    assert f"{predictor.provenance['test'][metric]:.4f}" in card
    for wanted in ("qem train", "held-out", "seed", "licence", "invariance error"):
        assert wanted in card, wanted


@pytest.mark.parametrize("name", ZOOS)
def test_embedded_zoo_is_what_its_index_says(name: str) -> None:
    import hashlib

    zoo = Zoo.open(shipped("zoos") / name)
    table, read = zoo.index, []
    for _, flat, positions in zoo.load():
        hashes = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in flat]
        assert hashes == table["sha256"].iloc[positions].tolist()
        read += positions.tolist()
    assert sorted(read) == list(range(len(table)))
    if zoo.spaces[table["arch"].iloc[0]].family == "siren":
        assert (table["psnr"] >= 40).all()
        assert set(table["label"]) == set(range(10))
    else:
        assert table["test_accuracy"].between(0, 1).all()
    assert (shipped("zoos") / name / "README.md").read_text().startswith("---")


def test_no_network_is_both_held_out_and_trained_on() -> None:
    held, small = (Zoo.open(shipped("zoos") / n).index for n in ("cnn-heldout", "cnn-small"))
    assert not set(held["sha256"]) & set(small["sha256"])


def test_predict_with_nothing_else_ranks_the_held_out(run) -> None:
    ran = run("predict", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["n"] == 200
    assert ran.json["tau"] > 0.7
    assert "cnn-relu" in ran.err
    assert "embedded" in ran.err


def test_embedded_zoos_are_small() -> None:
    files = [p for p in Path(shipped("zoos")).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 18e6


def test_default_recipes_are_there_and_read() -> None:
    from qemcli import comparison, recipes

    plan = comparison.load(recipes.find(recipes.DEFAULT, "comparison", "compare.toml"))
    assert set(plan.zoos) <= set(ZOOS)
    training = recipes.load(recipes.find(recipes.DEFAULT, "training", "train.toml"))
    assert set(training.zoos) <= set(ZOOS)


def test_networks_of_unknown_activation_are_not_guessed_at(run, tmp_path: Path) -> None:
    zoo = Zoo.open("cnn-small").limit(3)
    ((space, flat, _),) = zoo.load()
    for i, row in enumerate(flat):
        w = {name: x[0].clone() for name, x in space.unflatten(row[None]).items()}
        save_file(w, tmp_path / f"net{i}.safetensors")
    ran = run("predict", tmp_path)
    assert ran.code == 3
    assert "--activation relu or tanh" in ran.err
    assert run("predict", tmp_path, "--activation", "relu", "--json").code == 0
