"""Comparisons: what is run, with how many steps, and what the tables say of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

from qemcli import comparison, leaderboard, runs, tables
from qemcli.comparison import Comparison, trials
from qemcli.designs import Design
from qemcli.errors import UsageError
from qemcli.points import Points
from qemcli.samples import Sample
from qemcli.spaces.transformer import small_transformer
from qemcli.training import Schedule

RAW, BALANCED = Design("statnn"), Design("statnn", "balanced")
PLAN = Comparison(
    seeds=(0, 1),
    reference="statnn none",
    ranges=((1.0, 10.0),),
    augment=((1.0, 10.0), (1.0, 100.0)),
    augmented=("statnn none",),
    schedule=Schedule(epochs=5),
    designs=(RAW, BALANCED),
)


def test_augmented_zoos_are_for_the_designs_that_are_named() -> None:
    found = [(t.name, t.augment) for t in trials(PLAN) if t.seed == 0]
    assert found == [
        ("statnn none", None),
        ("statnn balanced", None),
        ("statnn none", (1.0, 10.0)),
        ("statnn none", (1.0, 100.0)),
    ]


def test_doubled_zoos_take_as_many_steps() -> None:
    assert {t.schedule.epochs for t in trials(PLAN) if t.augment is None} == {5}
    assert {t.schedule.epochs for t in trials(PLAN) if t.augment} == {3}


def _runs(scores: dict[tuple[str, str], float]) -> leaderboard.Runs:
    """Two seeds a design and zoo whose predictions are the labels plus noise of a given size."""
    runs = []
    for (design, augment), noise in scores.items():
        for seed in (0, 1):
            rng = np.random.default_rng((seed, len(runs)))
            label = np.linspace(0, 1, 60)
            own, other = (label + noise * rng.normal(size=60) for _ in range(2))
            predictions = {"label": label, "none": other, augment: own}
            row = {"design": design, "augment": augment, "seed": seed, "tau": 1 - noise}
            runs.append((row | {"invariance_error": 10.0**seed, "parameters": 7}, predictions))
    return runs


def test_difference_is_taken_on_networks_augmented_alike() -> None:
    scores = {("statnn none", "1:10"): 2.0, ("statnn balanced", "1:10"): 0.01}
    raw, balanced = leaderboard.summary(PLAN, _runs(scores))
    assert "difference" not in raw
    assert balanced["low"] > 0.3
    assert balanced["seeds"] == 2
    assert balanced["invariance_error"] == 10  # the worst seed, not the mean
    assert balanced["parameters"] == 7


def test_tables_show_augmented_zoos_beside_the_plain_one() -> None:
    zoos = ("none", "1:10", "1:100")
    scores = {("statnn none", zoo): 1 - 0.1 * i for i, zoo in enumerate(zoos)}
    scores[("statnn balanced", "none")] = 0.1
    rows = leaderboard.summary(PLAN, _runs(scores))
    found = leaderboard.augmented(PLAN, rows)
    assert [row["design"] for row in found] == ["statnn none"]
    assert found[0]["1:100"] == pytest.approx(0.2)
    plain, second = leaderboard.tables(PLAN, rows)
    assert [row[0] for row in plain.rows] == ["statnn none", "statnn balanced"]
    assert plain.best == {(1, plain.columns.index("tau"))}
    assert second.markdown().splitlines()[-1] == (
        "| statnn none | **0.000** | **0.100** | **0.200** |"
    )


def test_thresholds_keep_the_networks_of_that_accuracy() -> None:
    plan = dataclasses.replace(PLAN, augment=(), thresholds=(0.0, 0.5, 0.99))
    scores = {("statnn none", "none"): 0.3, ("statnn balanced", "none"): 1e-9}
    rows = leaderboard.summary(plan, _runs(scores))
    raw, balanced = rows
    assert (raw["n from 0"], raw["n from 0.5"]) == (60, 30)
    assert raw["tau from 0.5 low"] < raw["tau from 0.5"] < raw["tau from 0.5 high"]
    assert raw["tau from 0.5"] < raw["tau from 0"]  # noise weighs more among alike networks
    assert balanced["tau from 0.5"] == pytest.approx(1)
    assert "tau from 0.99" not in raw  # one network is left
    table = leaderboard.tables(plan, rows)[1]
    assert table.columns == ("design", "tau from 0", "tau from 0.5")
    whole = "1.000 (1.000 to 1.000)"
    assert table.rows[1:] == (("statnn balanced", whole, whole), ("networks", "60", "30"))
    assert table.best == {(1, 1), (1, 2)}


def test_thresholds_need_an_order(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    text = 'task = "classification"\nthresholds = [0.5]\n[[design]]\narchitecture = "statnn"\n'
    path.write_text(text)
    with pytest.raises(UsageError, match="thresholds are for accuracies"):
        comparison.load(path)
    path.write_text(text.replace("classification", "generalization"))
    assert comparison.load(path).thresholds == (0.5,)


def test_scores_that_are_no_number_are_shown_as_unknown_and_never_best() -> None:
    rows = [{"design": "a", "tau": float("nan"), "seeds": 3}, {"design": "b", "tau": -0.5}]
    found = tables.table(rows, ["tau", "seeds"], highest=["tau"])
    assert found.markdown().splitlines()[-2:] == ["| – | 3 |", "| **-0.500** | – |"]


def test_latex_is_escaped_and_ruled() -> None:
    rows = [{"design": "a_b & 50% {x}", "mse": 2.0}, {"design": "c", "mse": 1.0}]
    text = tables.table(rows, ["design", "mse"], lowest=["mse"], title="R&D").latex()
    assert r"a\_b \& 50\% \{x\} & 2.000 \\" in text
    assert r"c & \textbf{1.000} \\" in text
    assert r"\caption{R\&D}" in text
    assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert r"a\|b" in tables.table([{"design": "a|b"}], ["design"]).markdown()


def test_presets_are_what_their_configurations_say(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        '[[design]]\narchitecture = "monomial_nfn"\npreset = "monomial-nfn-large"\n'
        'name = "large"\n[[design]]\narchitecture = "monomial_nfn"\n'
        'preset = "monomial-nfn-released"\nconfig = { head = 7 }\n'
    )
    plan = comparison.load(path)
    assert plan.entries["large"] == Design("monomial_nfn", "none", {"channels": [20, 20, 10]})
    assert plan.designs[1] == Design("monomial_nfn", "released", {"head": 7})
    path.write_text('[[design]]\narchitecture = "statnn"\npreset = "statn"\n')
    with pytest.raises(UsageError, match="no preset 'statn'") as refused:
        comparison.load(path)
    assert refused.value.hint == "Did you mean 'statnn'?"
    path.write_text('[[design]]\narchitecture = "statnn"\n' * 2)
    with pytest.raises(UsageError, match="two designs are called"):
        comparison.load(path)


def test_what_a_run_is_called_is_no_part_of_its_key() -> None:
    one, *_ = trials(PLAN)
    other = dataclasses.replace(one, called="A", settings="lr=1")
    assert one.key(PLAN, "d") == other.key(PLAN, "d")
    assert one.key(PLAN, "d") != dataclasses.replace(one, seed=9).key(PLAN, "d")


def test_a_design_may_have_a_schedule_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(
        'zoo = "x"\n[schedule]\nepochs = 6\nlr = 1e-3\n'
        '[[design]]\narchitecture = "statnn"\n'
        '[[design]]\narchitecture = "statnn"\nschedule = { lr = 4e-3 }\n'
    )
    plan = comparison.load(path)
    assert list(plan.entries) == ["statnn none", "statnn none lr=0.004"]
    first, second = list(trials(plan))[:2]
    assert first.schedule == Schedule(epochs=6, lr=1e-3)
    assert not first.settings
    assert second.schedule == Schedule(epochs=6, lr=4e-3)
    assert second.settings == "lr=0.004"
    assert first.key(plan, "data") != second.key(plan, "data")
    kept = plan.only(["statnn none lr=0.004"])
    assert [t.schedule.lr for t in trials(kept)] == [4e-3] * 3
    path.write_text(path.read_text().replace("{ lr", "{ rate"))
    with pytest.raises(UsageError, match="rate"):
        comparison.load(path)


def test_names_that_are_no_design_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('augmented = ["statnn exact"]\n[[design]]\narchitecture = "statnn"\n')
    with pytest.raises(UsageError, match="'statnn exact' is not among the designs"):
        comparison.load(path)


def test_orbits_of_heads_are_tried_and_doubled_at_growing_conditions() -> None:
    space = small_transformer(8, 2, 12, 2, 5, (1, 2))
    generator = torch.Generator().manual_seed(1)
    flat = torch.randn(40, space.size, generator=generator)
    side = ["train"] * 20 + ["val"] * 8 + ["test"] * 12
    index = pandas.DataFrame({"split": side})
    sample = Sample(Points.of(space, flat), torch.linspace(0, 1, 40), index)
    designs = (Design("transformer_nfn", "exact"), Design("branched_mlp"))
    ranges = ((1.0, 10.0), (1.0, 1000.0))
    plan = Comparison(
        seeds=(0,), group="general-linear", ranges=ranges[:1], augment=ranges[1:],
        schedule=Schedule(epochs=1, batch_size=8), designs=designs,
    )  # fmt: skip
    found = {(t.name, t.augment): runs.run(t, plan, sample) for t in trials(plan)}
    for (name, augment), (row, predictions) in found.items():
        exact = name.startswith("transformer_nfn")
        assert (row["invariance_error"] < 1e-9) == exact
        assert {"label", "none", "1:10"} <= set(predictions)
        assert ("1:1000" in predictions) == (augment is not None)
        apart = abs(predictions["1:10"] - predictions["none"]).max()
        assert (apart < 1e-3 * predictions["none"].std()) == exact
        assert ("eps" in row) == exact
    doubled = runs.doubled(sample, "general-linear", ranges[1], 0)
    assert doubled.networks.flats[0].shape == (80, space.size)
    queries = space.unflatten(doubled.networks.flats[0][40:])["encoder.0.attention.queries.weight"]
    assert queries.abs().max() > 50


@pytest.mark.parametrize(
    "text",
    ["seeds = 3", "designs = 5", "names = ['a']", "ranges = [1, 10]", "schedule = 5",
     "thresholds = ['a']", "[schedule]\nlr = 'a'"],
)  # fmt: skip
def test_a_recipe_of_the_wrong_kinds_is_a_usage_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "compare.toml"
    path.write_text(f'{text}\n[[design]]\narchitecture = "statnn"\n')
    with pytest.raises(UsageError):
        comparison.load(path)
