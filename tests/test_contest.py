"""Comparisons from end to end: zoos, searches, kept runs, files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from zoo_kit import write_zoo

from qemcli import comparison, contest, runs, search
from qemcli.comparison import Comparison
from qemcli.designs import Design
from qemcli.errors import UnsupportedError, UsageError
from qemcli.fitting import with_split
from qemcli.points import Points
from qemcli.samples import Sample
from qemcli.spaces import cnn, mlp
from qemcli.training import Schedule

SCHEDULE = Schedule(epochs=2, batch_size=16)
RECIPE = """
title = "T & U"
seeds = [0, 1]
reference = "A"
ranges = [[1, 10]]
[schedule]
epochs = 2
[[design]]
architecture = "statnn"
config = { head = 8 }
name = "A"
[[design]]
architecture = "spectral"
quasi = "balanced"
config = { head = 8 }
name = "B"
"""


def sample_of(*parts: tuple, seed: int = 0) -> Sample:
    """(space, n) pairs; the target is the logistic of the mean weight."""
    generator = torch.Generator().manual_seed(seed)
    spaces = [space for space, _ in parts]
    flats = [torch.randn(n, s.size, generator=generator) + 0.2 for s, n in parts]
    networks = Points.joined(spaces, list(enumerate(flats)))
    target = torch.cat([(5 * flat.mean(1)).sigmoid() for flat in flats])
    side = np.resize(["train", "train", "val", "test"], len(target))
    return Sample(networks, target, pandas.DataFrame({"split": side}))


SAMPLE = sample_of((mlp([3, 6, 4]), 80))
PLAN = Comparison(
    seeds=(0,), reference="statnn none head=8", schedule=SCHEDULE,
    designs=(Design("statnn", config={"head": 8}), Design("spectral", config={"head": 8})),
)  # fmt: skip


@pytest.fixture
def small_zoo(tmp_path: Path) -> Path:
    space = cnn([1, 4, 4], 3)
    rng = torch.Generator().manual_seed(0)
    return write_zoo(tmp_path / "zoo", space, torch.randn(60, space.size, generator=rng))


def test_command_compares_writes_and_goes_on(
    run: Callable, small_zoo: Path, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "c.toml", tmp_path / "out"
    recipe.write_text(RECIPE)
    call = ("compare", recipe, "--zoo", small_zoo, "--out", out, "--workers", 1)
    planned = run(*call, "--dry-run", "--json")
    assert planned.json["to_do"] == 4
    assert not out.exists()
    ran = run(*call, "--json")
    assert ran.code == 0, ran.err
    rows = {row["design"]: row for row in ran.json["rows"]}
    assert set(rows) == {"A", "B"}
    assert rows["B"]["invariance_error"] < 1e-6 < rows["A"]["invariance_error"]
    assert rows["B"]["low"] <= rows["B"]["difference"] <= rows["B"]["high"]
    kept = pandas.read_parquet(out / "results.parquet")
    assert len(kept) == 4
    wanted = {"zoo", "design", "seed", "augment", "tau", "parameters", "seconds", "inference_ms"}
    assert wanted | {"memory_mb", "invariance_error", "lr", "config"} <= set(kept)
    names = ("tradeoff", "cost-parameters", "cost-seconds", "ranges")
    assert all((out / f"{name}.png").stat().st_size > 1000 for name in names)
    before = {p: p.stat().st_mtime_ns for p in (out / "runs").iterdir()}
    recipe.write_text(RECIPE.replace('name = "A"', 'name = "Z"').replace('"A"', '"Z"'))
    shown = run(*call, "--format", "latex")
    assert shown.out.startswith("\\begin{table}")
    assert r"\caption{T \& U}" in shown.out
    assert "Z & 2 &" in shown.out
    assert {p: p.stat().st_mtime_ns for p in (out / "runs").iterdir()} == before
    assert run(*call, "--dry-run", "--json").json["done"] == 4
    searching = run(*call, "--search", 2, "--dry-run", "--json").json
    assert (searching["search"], searching["done"]) == (4, 0)


def test_several_zoos_are_told_apart(tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, zoos=("a", "z/b"), designs=PLAN.designs[:1])
    (trial,) = comparison.trials(plan)
    row, told = runs.run(trial, plan, SAMPLE)
    found = [({"zoo": zoo, **row}, told) for zoo in plan.zoos]
    rows, files = contest.write(plan, found, [], tmp_path)
    assert [r["zoo"] for r in rows] == ["a", "z/b"]
    assert [r["seeds"] for r in rows] == [1, 1]
    pictures = {"a-tradeoff.png", "b-tradeoff.png", "a-cost-seconds.png"}
    assert pictures <= {path.name for path in files} == {p.name for p in tmp_path.iterdir()}
    assert (tmp_path / "table.md").read_text().splitlines()[0].startswith("| zoo | design |")


def searched(plan: Comparison, sample: Sample, folder: Path, count: int) -> search.Chosen:
    """As search.search, of the first design and in this process."""
    folder.mkdir(exist_ok=True)
    name = next(iter(plan.entries))
    return search._best(name, search.study(name, plan, folder, count, "data", sample))


def test_search_starts_from_the_recipe_and_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    chosen = searched(PLAN, SAMPLE, folder, 3)
    assert [row["trial"] for row in chosen.rows] == [0, 1, 2]
    assert chosen.rows[0]["lr"] == PLAN.schedule.lr
    assert chosen.rows[0]["width"] == 1
    assert len({row["lr"] for row in chosen.rows}) == 3
    best = max(chosen.rows, key=lambda row: row["score"])
    assert set(chosen.settings) == {"lr", "weight_decay", "width", "dropout"}
    assert chosen.settings.items() <= best.items()
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert len(before) == 3
    more = searched(PLAN, SAMPLE, folder, 4)
    assert more.rows[:3] == chosen.rows
    after = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert len(after) == 4
    assert before.items() <= after.items()
    trial = chosen.applied(next(iter(comparison.trials(PLAN))))
    assert trial.schedule.lr == chosen.settings["lr"]
    assert f"lr={chosen.settings['lr']:g}" in trial.settings


def test_search_looks_at_no_test_network(tmp_path: Path) -> None:
    test = np.flatnonzero(SAMPLE.index["split"] == "test")
    target = SAMPLE.target.clone()
    target[torch.from_numpy(test)] = torch.nan
    blind = dataclasses.replace(SAMPLE, target=target)
    seen = searched(PLAN, SAMPLE, tmp_path / "a", 2)
    unseen = searched(PLAN, blind, tmp_path / "b", 2)
    assert [r["score"] for r in seen.rows] == [r["score"] for r in unseen.rows]


def test_settings_scale_all_widths_and_keep_heads_whole() -> None:
    design = Design("neural_graphs", config={"channels": 16, "heads": 4})
    half, schedule = search.with_settings(design, SCHEDULE, {"width": 0.5, "lr": 0.01})
    assert half.config == {"channels": 8, "heads": 4}
    assert schedule == dataclasses.replace(SCHEDULE, lr=0.01)
    tiny, _ = search.with_settings(
        Design("nft", config={"channels": 4, "heads": 4}), SCHEDULE, {"width": 0.5}
    )
    assert tiny.config["channels"] == 4
    nfn, _ = search.with_settings(Design("nfn"), SCHEDULE, {"width": 2.0, "dropout": 0.1})
    assert nfn.config == {"channels": [32, 32, 10], "head": 2000, "dropout": 0.1}
    same, _ = search.with_settings(Design("nfn"), SCHEDULE, {"width": 1.0, "dropout": 0.0})
    assert same == Design("nfn")  # so that its runs are those of the recipe without a search


def test_trees_have_settings_of_their_own() -> None:
    found = search.ranges(Design("xgboost"), SCHEDULE)
    assert "rate" in found
    assert "lr" not in found
    assert {"lr", "weight_decay", "width", "dropout"} == set(
        search.ranges(Design("statnn"), SCHEDULE)
    )


def test_trials_that_fail_are_told_and_never_chosen(tmp_path: Path) -> None:
    wild = dataclasses.replace(PLAN, schedule=Schedule(2, 16, lr=1e30))
    with pytest.raises(UsageError, match="no trial of 'statnn none head=8' ends in a score"):
        searched(wild, SAMPLE, tmp_path, 1)
    kept = json.loads(next(iter(tmp_path.iterdir())).read_text())
    assert kept["score"] is None
    assert kept["reason"]


def test_designs_that_cannot_read_a_zoo_are_left_out_with_their_reason() -> None:
    designs = (Design("statnn"), Design("transformer_nfn"))
    plan = dataclasses.replace(PLAN, reference="", designs=designs)
    sizes, refused = contest._built(plan, SAMPLE)
    assert list(sizes) == ["statnn none"]
    assert [row["design"] for row in refused] == ["transformer_nfn none"]
    with pytest.raises(UnsupportedError):
        contest._built(dataclasses.replace(plan, designs=designs[1:]), SAMPLE)


def test_runs_of_many_architectures() -> None:
    """Splits go across architectures, and designs that read one only are left out."""
    sample = sample_of((mlp([3, 6, 4]), 40), (mlp([3, 5, 5, 4]), 24), (cnn([1, 4, 4], 3), 16))
    designs = (*PLAN.designs, Design("nfn"))
    plan = dataclasses.replace(PLAN, group="permutation", reference="", designs=designs)
    sizes, refused = contest._built(plan, sample)
    assert [row["design"] for row in refused] == ["nfn none"]
    found = [runs.run(t, plan, sample) for t in comparison.trials(plan.only(list(sizes)))]
    assert [row["architecture"] for row, _ in found] == ["statnn", "spectral"]
    for row, predictions in found:
        assert len(predictions["none"]) == 20
        assert row["invariance_error"] < 1e-9


def test_splits_keep_the_values_of_a_column_apart() -> None:
    kinds = np.resize([*"abcdefghijklmnopqrs", None], 80)
    index = SAMPLE.index.assign(kind=kinds, checkpoint=[f"n{i}" for i in range(80)])
    said: list[str] = []
    sample = dataclasses.replace(SAMPLE, index=index)
    found = with_split(contest._apart(sample, "kind", said.append), 0, said.append).index
    known = found[found["kind"].notna()]
    assert (known.groupby("kind")["split"].nunique() == 1).all()
    assert set(known["split"]) == {"train", "val", "test"}
    assert "'kind' is split by" in said[0]
    assert contest._apart(sample, None, said.append) is sample
    with pytest.raises(UsageError, match="no such column"):
        contest._apart(sample, "kinds", said.append)


def test_a_run_that_comes_to_nothing_is_told_and_tried_again(tmp_path: Path) -> None:
    wild = dataclasses.replace(PLAN, schedule=Schedule(2, 16, lr=1e30))
    (trial, *_) = comparison.trials(wild)
    (path,) = runs.planned([trial], wild, SAMPLE, tmp_path)
    (tmp_path / "runs").mkdir()
    runs.start(SAMPLE)
    torch.set_flush_denormal(False)
    runs._work(trial, wild, path)
    assert not path.exists()
    (told,) = runs.failures({path: trial})
    assert told["design"] == trial.name
    assert "not finite" in told["reason"]
    tame = dataclasses.replace(trial, schedule=SCHEDULE)
    runs._work(tame, PLAN, path)
    assert path.exists()
    assert runs.failures({path: trial}) == []


def test_every_comparison_that_ships_is_listed(run: Callable) -> None:
    rows = {row["name"]: row for row in run("compare", "--list", "--json").json["rows"]}
    assert {"cnn-small", "cnn-fashion", "dilate-mnist"} <= set(rows)
    for name, row in rows.items():
        assert row["about"], name
        plan = comparison.load(_path(name))
        assert row["runs"] == sum(1 for _ in comparison.trials(plan))


def test_near_miss_of_a_recipe_beside_a_zoo_is_suggested(run: Callable) -> None:
    found = run("compare", "cnn-fashion/feild")
    assert found.code == 2
    assert "Did you mean 'cnn-fashion/field'?" in found.err
    train = run("train", "siren-mnist/rendered-cnn")
    assert "Did you mean 'siren-mnist/rendered_cnn'?" in train.err


def _path(name: str) -> Path:
    from qemcli import recipes

    return recipes.find(name, "comparison", contest.FILE)
