"""qem compare: several architectures and quasi modes on one zoo, same splits and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qemcli.cli import _options as options
from qemcli.cli._out import Answer, Sink

app = typer.Typer(add_completion=False)

Folder = Annotated[Path, typer.Option("--out", "-o", help="Folder of runs, table and picture.")]
ZooOption = Annotated[str | None, typer.Option("--zoo", help="Another zoo than the recipe's.")]


@app.command()
def compare(
    recipe: Annotated[
        str, typer.Argument(help="TOML file, ZOO with a compare.toml, or ZOO/OTHER.")
    ] = "cnn-small",
    out: Folder = Path("comparison"),
    zoo: ZooOption = None,
    workers: options.Workers = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train and score several designs; runs already in --out are not done again.

    Writes results.parquet (one row a run), table.md and tradeoff.png to --out.
    Example: qem compare zoos/cnn-fashion/compare.toml --zoo zoo/ --out comparison
    """
    import os

    from qemcli import comparison, leaderboard, recipes, report
    from qemcli.fitting import with_split
    from qemcli.registry import load
    from qemcli.samples import gather
    from qemcli.zoos.opening import open_zoo

    sink = Sink(json, quiet, verbose)
    plan = comparison.load(recipes.find(recipe, "comparison", "compare.toml"))
    opened = open_zoo(zoo or plan.zoo, sink.note, where=plan.where, splits=plan.splits)
    gathered = gather([opened], load("tasks", plan.task), edit=plan.edit)
    sample = with_split(gathered, 0, sink.note)
    total = len(list(comparison.trials(plan)))
    with sink.progress("comparing", total) as advance:
        workers = workers or os.cpu_count() or 1
        runs = comparison.compare(plan, sample, out, workers, advance)
    rows = leaderboard.table(plan, runs)
    metric = load("tasks", plan.task).METRIC
    ranges = [f"{metric} {low:g}:{high:g}" for low, high in plan.ranges]
    shown = [
        "design",
        "augment",
        "seeds",
        metric,
        "sd",
        "r2",
        "macro_f1",
        "mse",
        "difference",
        "low",
        "high",
        *ranges,
    ]
    shown += ["invariance_error", "eps", "parameters", "seconds", "inference_ms"]
    if not plan.augment:
        shown.remove("augment")
    (out / "table.md").write_text(leaderboard.tables(plan, rows, shown))
    report.tradeoff(rows, metric, out / "tradeoff.png")
    if plan.augment:
        report.augmented(leaderboard.augmented(plan, rows), metric, out / "augmented.png")
    import pandas

    pandas.DataFrame([row for row, _ in runs]).to_parquet(out / "results.parquet", index=False)
    sink.note(f"{out}/table.md, {out}/tradeoff.png, {out}/results.parquet")
    sink.answer(Answer(rows, {"reference": plan.reference}, list(opened.failures), shown))
