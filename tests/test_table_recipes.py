"""The papers' tables as recipes: each loads, its designs are made, a tiny run of each works."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

from qemcli import comparison, contest, edits, recipes, registry, runs
from qemcli.comparison import Comparison
from qemcli.layers.presets import SPACES
from qemcli.points import Points
from qemcli.samples import Sample
from qemcli.spaces import WeightSpace

KINDS = {  # zoos by the beginning of their names, and what their networks are
    "small-cnn": "cnn-zoo",
    "cnn": "cnn-zoo",
    "cnn-digits-tanh": "cnn-zoo-tanh",
    "siren": "siren-mnist",
    "siren-cifar": "siren-cifar",
    "siren-fashion": "siren-fashion",
    "nfn-sirens": "siren-mnist",
    "dws-inrs": "siren-mnist",
    "transformer": "transformer-mnist",
    "transformer-text": "transformer-ag-news",
    "small-transformer": "transformer-mnist",
    "small-transformer-ag-news": "transformer-ag-news",
}
CLASSES = tuple("abcdefghij")
NAMES = [row["name"] for row in contest.recipes()]
TABLES = [name for name in NAMES if "/table-" in name or name.endswith("/oce")]


@cache
def plan_of(name: str) -> Comparison:
    return comparison.load(recipes.find(name, "comparison", contest.FILE))


def space_of(name: str) -> WeightSpace:
    zoo = Path(plan_of(name).zoos[0]).name
    if zoo == "nfn-sirens" and name.endswith(("cifar", "contrast")):
        zoo = "siren-cifar"
    return SPACES[KINDS[max((k for k in KINDS if zoo.startswith(k)), key=len)]]()


@cache
def sizes_of(name: str) -> dict[str, int]:
    """Parameters of every design of a comparison, on the networks of its zoo."""
    plan, space = plan_of(name), space_of(name)
    outputs = registry.load("tasks", plan.task).outputs(CLASSES)
    with torch.device("meta"):
        models = {n: design.build(space, outputs) for n, design in plan.entries.items()}
    return {n: sum(p.numel() for p in model.parameters()) for n, model in models.items()}


def sample_of(space: WeightSpace, plan: Comparison, n: int = 32) -> Sample:
    """Networks with targets of the task."""
    rng = torch.Generator().manual_seed(0)
    flat = 0.2 * torch.randn(n, space.size, generator=rng)
    target = torch.linspace(0.1, 0.9, n)
    if plan.task == "classification":
        target = torch.arange(n).remainder(10).float()
    elif plan.edit:
        target = edits.find(plan.edit).of(space, flat)
    index = pandas.DataFrame({"split": np.resize(["train", "train", "val", "test"], n)})
    classes = CLASSES if plan.task == "classification" else ()
    return Sample(Points.of(space, flat), target, index, classes)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_says_what_it_is_and_its_designs_are_made(name: str) -> None:
    path, plan = recipes.find(name, "comparison", contest.FILE), plan_of(name)
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert plan.title or name not in TABLES
    assert any("qem compare" in line for line in head)
    assert list(sizes_of(name)) == list(plan.entries)
    assert plan.reference in plan.entries or len(plan.designs) == 1


def test_published_rows_have_the_published_sizes() -> None:
    counts = sizes_of("small-cnn-cifar10/table-1")
    wanted = {
        "StatNN": 1_059_001, "NP": 2_031_390, "HNP": 2_811_743, "Monomial-NFN": 254_619,
        "Monomial-NFN large": 429_421, "Monomial-NFN Quasi, as released": 264_525,
    }  # fmt: skip
    assert wanted.items() <= counts.items()
    counts = sizes_of("nfn-sirens/table-2-cifar")
    assert counts["HNP"] == 42_379_306
    assert counts["Monomial-NFN tuned"] == 16_386_093
    counts = sizes_of("small-transformer-ag-news/table-3")
    assert counts["Transformer-NFN Quasi, as released"] == 1_887_049
    assert counts["MLP"] == 896_051
    assert sizes_of("dws-inrs/oce")["DWS, k = 8"] == 397_162


def test_every_table_is_there_for_our_zoos_and_for_the_published_ones() -> None:
    wanted = {
        "table-1": {"cnn-fashion", "small-cnn-cifar10"},
        "table-2": {"siren-mnist", "siren-fashion", "siren-cifar"},
        "table-2-mnist": {"nfn-sirens"},
        "table-3": {
            "transformer-digits", "transformer-text",
            "small-transformer-mnist", "small-transformer-ag-news",
        },
        "table-11": {"transformer-text", "small-transformer-ag-news"},
        "table-12": {"transformer-text", "small-transformer-ag-news"},
        "table-13": {"cnn-fashion", "small-cnn-cifar10"},
        "table-14": {"transformer-digits", "small-transformer-mnist"},
        "table-15-dilate": {"siren-mnist", "nfn-sirens"},
        "table-15-contrast": {"siren-cifar", "nfn-sirens"},
        "oce": {"siren-mnist", "dws-inrs"},
    }  # fmt: skip
    assert {f"{zoo}/{table}" for table, zoos in wanted.items() for zoo in zoos} <= set(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_a_tiny_run_of_each_table(name: str) -> None:
    """The smallest design that is trained, one epoch."""
    sizes = sizes_of(name)
    smallest = min((n for n in sizes if sizes[n]), key=lambda n: sizes[n])
    plan = plan_of(name).only([smallest])
    schedule = dataclasses.replace(plan.schedule, epochs=1, batch_size=16)
    plan = dataclasses.replace(
        plan, seeds=(0,), augment=(), ranges=plan.ranges[:1], schedule=schedule
    )
    sample = sample_of(space_of(name), plan)
    (trial,) = comparison.trials(plan)
    row, predictions = runs.run(trial, plan, sample)
    assert row["design"] == smallest
    assert row["parameters"] == sizes[smallest]
    assert all(np.isfinite(found).all() for found in predictions.values())
