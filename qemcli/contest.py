"""A comparison from its zoos to its files: what is read, what can read it, what is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qemcli import comparison, leaderboard, registry, report, runs, search
from qemcli.comparison import Comparison, named, trials
from qemcli.errors import QemError, UnsupportedError, UsageError
from qemcli.fitting import with_split
from qemcli.leaderboard import Runs
from qemcli.recipes import read_toml
from qemcli.samples import Sample, gather
from qemcli.shipped import shipped
from qemcli.writing import beside
from qemcli.zoos.opening import open_zoo

FILE = "compare.toml"
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Ground:
    """What is compared on one zoo.

    Attributes:
        name: the zoo's, as it was asked for.
        plan: the comparison with the designs that read its networks.
        sample: those networks, split.
        parameters: of each design.
        failed: (what, reason) of checkpoints and of designs that are left out.
    """

    name: str
    plan: Comparison
    sample: Sample
    parameters: dict[str, int]
    failed: list[dict[str, Any]]


def grounds(plan: Comparison, zoos: Sequence[str], say: Callable[[str], None]) -> list[Ground]:
    """The zoos, opened; those of the comparison where none are given.

    A design that cannot read a zoo's networks is left out there, with the reason. Raises
    UnsupportedError where none can.
    """
    task = registry.load("tasks", plan.task)
    wanted: list[str | None] = list(zoos or plan.zoos) or [None]
    found = []
    for zoo in wanted:
        opened = open_zoo(zoo, say, where=plan.where, splits=plan.splits)
        gathered = gather([opened], task, edit=plan.edit)
        sample = with_split(_apart(gathered, plan.apart, say), 0, say)
        sizes, refused = _built(plan, sample)
        kept = plan.only(list(sizes))
        failed = [*sample.failed, *refused]
        found.append(Ground(str(zoo or opened.name), kept, sample, sizes, failed))
    return found


def _apart(sample: Sample, column: str | None, say: Callable[[str], None]) -> Sample:
    """Where a column is named, the sample without a split, and with its values as the runs that
    are split by: networks of one value are all on one side. Those without a value are alone."""
    if column is None:
        return sample
    if column not in sample.index:
        raise UsageError(
            f'apart = "{column}": the zoo has no such column',
            registry.suggest(column, [str(name) for name in sample.index]),
        )
    say(f"'{column}' is split by: each of its values is a run, on one side")
    values, own = sample.index[column], sample.index["checkpoint"].astype(str)
    run = values.astype(str).where(values.notna(), own)
    index = sample.index.drop(columns="split", errors="ignore").assign(run=run)
    return dataclasses.replace(sample, index=index)


def _built(plan: Comparison, sample: Sample) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """(parameters of each design that reads the sample, what the others say)."""
    outputs = registry.load("tasks", plan.task).outputs(sample.classes)
    sizes, refused = {}, []
    first: QemError | None = None
    for name, design in plan.entries.items():
        try:
            with torch.device("meta"):  # shapes are all that is asked for
                model = design.build_mixed(sample.spaces, outputs)
        except UnsupportedError as error:
            first = first or error
            refused.append({"design": name, "reason": str(error)})
            continue
        sizes[name] = sum(p.numel() for p in model.parameters())
    if not sizes and first is not None:
        raise first
    return sizes, refused


def planned(found: Sequence[Ground], folder: Path, count: int) -> list[dict[str, Any]]:
    """One row a zoo and design: its parameters, its runs, those of them that are kept, and the
    trials of a search before them, with which it is not known yet what the runs are."""
    rows = []
    for ground in found:
        kept = runs.planned(trials(ground.plan), ground.plan, ground.sample, folder)
        for name, size in ground.parameters.items():
            own = [path for path, trial in kept.items() if trial.name == name]
            done = 0 if count else sum(path.is_file() for path in own)
            told = {"zoo": ground.name, "design": name, "parameters": size, "search": count}
            rows.append({**told, "runs": len(own), "done": done, "to_do": len(own) - done})
    return rows


def compete(
    ground: Ground, folder: Path, workers: int, count: int = 0, advance: Advance = lambda n: None
) -> tuple[Runs, list[dict[str, Any]], list[dict[str, Any]]]:
    """(every run on one zoo, one row a trial of the search where there is one, and what trials
    say that came to nothing).

    Raises UsageError where all did.
    """
    plan, sample = ground.plan, ground.sample
    wanted, tried = list(trials(plan)), []
    if count:
        chosen = search.search(plan, sample, folder, count, workers, advance)
        wanted = [chosen[trial.name].applied(trial) for trial in wanted]
        tried = [{"zoo": ground.name, **row} for c in chosen.values() for row in c.rows]
    found = runs.compare(plan, sample, folder, workers, advance, wanted)
    failed = runs.failures(runs.planned(wanted, plan, sample, folder))
    if not found:
        raise UsageError(f"no run of {len(failed)} came to an end: {failed[0]['reason']}")
    return [({"zoo": ground.name, **row}, told) for row, told in found], tried, failed


def write(
    plan: Comparison, found: Runs, tried: list[dict[str, Any]], folder: Path
) -> tuple[list[dict[str, Any]], list[Path]]:
    """The rows of the table, and the files: one row a run, one a trial, the tables, the pictures
    (with several zoos, of each)."""
    import pandas

    rows = leaderboard.summary(plan, found)
    files = [folder / "results.parquet", folder / "table.md", folder / "table.tex"]
    frame = pandas.DataFrame([row for row, _ in found])
    beside(files[0], lambda p: frame.to_parquet(p, index=False))
    tables = leaderboard.tables(plan, rows)
    beside(files[1], lambda p: p.write_text(markdown(tables), encoding="utf-8"))
    beside(files[2], lambda p: p.write_text(latex(tables), encoding="utf-8"))
    if tried:
        files.append(folder / "search.parquet")
        beside(files[-1], lambda p: pandas.DataFrame(tried).to_parquet(p, index=False))
    zoos = dict.fromkeys(row["zoo"] for row in rows)
    for zoo in zoos:
        own = [row for row in rows if row["zoo"] == zoo]
        files += _pictures(plan, own, folder, f"{Path(zoo).name}-" if len(zoos) > 1 else "")
    return rows, files


def markdown(tables: Sequence[Any]) -> str:
    """The tables one after the other."""
    return "\n".join(table.markdown() for table in tables)


def latex(tables: Sequence[Any]) -> str:
    """The tables one after the other; they need the packages booktabs and inputenc (utf8)."""
    return "\n".join(table.latex() for table in tables)


def _pictures(
    plan: Comparison, rows: list[dict[str, Any]], folder: Path, prefix: str
) -> list[Path]:
    metric = registry.load("tasks", plan.task).METRIC
    scored = [row for row in rows if row.get(metric) == row.get(metric)]  # not NaN
    made = [folder / f"{prefix}tradeoff.png"]
    report.tradeoff(scored, metric, made[0])
    for name in ("parameters", "seconds"):
        made.append(folder / f"{prefix}cost-{name}.png")
        report.cost(scored, metric, name, made[-1])
    if plan.ranges:
        made.append(folder / f"{prefix}ranges.png")
        names = ["none", *map(named, plan.ranges)]
        report.ranges(scored, metric, names, made[-1])
    if plan.augment:
        made.append(folder / f"{prefix}augmented.png")
        report.augmented(leaderboard.augmented(plan, rows), metric, made[-1])
    return made


def recipes() -> list[dict[str, Any]]:
    """One row a comparison that ships: what it is called, what it shows, on which zoo."""
    rows = []
    for kind in ("zoos", "models"):
        for path in sorted(shipped(kind).glob("*/*.toml")):
            if "design" not in read_toml(path):
                continue
            plan = comparison.load(path)
            name = path.parent.name if path.name == FILE else f"{path.parent.name}/{path.stem}"
            told = {"name": name, "about": plan.title or _head(path)}
            told["zoo"] = ", ".join(plan.zoos)
            count = sum(1 for _ in trials(plan))
            rows.append({**told, "designs": len(plan.designs), "runs": count})
    return rows


def _head(path: Path) -> str:
    """The first line of a recipe, where that is a comment."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def formatted(choice: str, plan: Comparison, rows: list[dict[str, Any]]) -> str | None:
    """What is shown instead of the terminal's table; None for that one."""
    if choice not in ("table", "markdown", "latex"):
        raise UsageError(f"--format {choice}: unknown", "table, markdown or latex")
    if choice == "table":
        return None
    return {"markdown": markdown, "latex": latex}[choice](leaderboard.tables(plan, rows))
