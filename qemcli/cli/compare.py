"""qem compare: several architectures and quasi modes on a zoo, same splits, seeds and budgets."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from qemcli.cli import _options as options
from qemcli.cli._out import Answer, Sink

app = typer.Typer(add_completion=False)


class Format(StrEnum):
    """How the table is printed."""

    table = "table"
    markdown = "markdown"
    latex = "latex"


RecipeName = Annotated[
    str, typer.Argument(help="TOML file, ZOO with a compare.toml, or ZOO/OTHER: see --list.")
]
Folder = Annotated[Path, typer.Option("--out", "-o", help="Folder of runs, tables and pictures.")]
Zoos = Annotated[
    list[str] | None, typer.Option("--zoo", help="Another zoo than the recipe's; may be repeated.")
]
Search = Annotated[
    int,
    typer.Option("--search", min=0, help="Before that, so many trials of settings a design."),
]
FormatOption = Annotated[Format, typer.Option("--format", help="How the table is printed.")]
Listed = Annotated[bool, typer.Option("--list", help="List the comparisons that ship.")]


@app.command()
def compare(
    recipe: RecipeName = "cnn-small",
    out: Folder = Path("comparison"),
    zoo: Zoos = None,
    search: Search = 0,
    format: FormatOption = Format.table,
    list_: Listed = False,
    dry_run: options.DryRun = False,
    workers: options.Workers = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train and score several designs; runs already in --out are not done again.

    Writes results.parquet (one row a run), table.md, table.tex and pictures to --out.
    Example: qem compare cnn-fashion/table-1 --zoo built/cnn-fashion --out comparison
    """
    import os
    from dataclasses import replace

    from qemcli import comparison, contest, leaderboard, recipes

    sink = Sink(json, quiet, verbose)
    if list_:
        sink.answer(Answer(contest.recipes()))
        return
    plan = comparison.load(recipes.find(recipe, "comparison", contest.FILE))
    grounds = contest.grounds(plan, zoo or [], sink.note)
    planned = contest.planned(grounds, out, search)
    failed = [row for ground in grounds for row in ground.failed]
    if dry_run:
        told = {n: sum(row[n] for row in planned) for n in ("runs", "done", "to_do", "search")}
        sink.answer(Answer(planned, told, failed))
        return
    plan = replace(plan, zoos=tuple(ground.name for ground in grounds))
    workers = workers or os.cpu_count() or 1
    found: list[Any] = []
    tried: list[Any] = []
    with sink.progress("comparing", sum(row["runs"] + row["search"] for row in planned)) as advance:
        for ground in grounds:
            runs, trials, lost = contest.compete(ground, out, workers, search, advance)
            found, tried, failed = found + runs, tried + trials, failed + lost
    rows, files = contest.write(plan, found, tried, out)
    sink.note(", ".join(map(str, files)))
    text = contest.formatted(format, plan, rows)
    columns = leaderboard.columns(plan, rows)
    sink.answer(Answer(rows, {"reference": plan.reference}, failed, columns, text=text))
