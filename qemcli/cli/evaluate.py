"""qem evaluate: the score of a predictor on a labelled zoo, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qemcli.cli import _options as options
from qemcli.cli._out import Answer, Sink

app = typer.Typer(add_completion=False)

Thresholds = Annotated[
    str, typer.Option("--thresholds", help="Keep networks with at least this accuracy: 0,.2,.4")
]
Augment = Annotated[
    str | None, typer.Option("--augment", help="Also under random elements of this group.")
]
ScaleRange = Annotated[str, typer.Option("--scale-range", help="LO:HI of the scales.")]
Split = Annotated[
    str, typer.Option("--split", help="test, val, train or all; test where the zoo has one.")
]


@app.command()
def evaluate(
    predictor: Annotated[str, typer.Argument(help="Name, file, folder or hf://…")],
    zoo: Annotated[str | None, typer.Argument(help="Directory, index, zoo name or hf://…")] = None,
    thresholds: Thresholds = "0",
    augment: Augment = None,
    scale_range: ScaleRange = "1:10",
    split: Split = "auto",
    where: options.Where = None,
    limit: options.Limit = None,
    activation: options.Activation = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 256,
    device: options.DeviceOption = options.Device.auto,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Predicted against true.")
    ] = None,
    json: options.Json = False,
    out: options.OutFile = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Score a predictor with 95 % bootstrap intervals: tau, R2 and mean error, or accuracy.

    Example: qem evaluate cnn-relu zoo/ --thresholds 0,.4 --augment monomial --scale-range 1:10000
    """
    from qemcli import evaluation, registry, report
    from qemcli.machine import steady
    from qemcli.predictors import Predictor
    from qemcli.zoos.opening import open_zoo

    sink = Sink(json, quiet, verbose)
    steady()
    loaded = Predictor.load(predictor)
    opened = open_zoo(zoo, sink.note, where=where, limit=limit, activation=activation)
    opened = evaluation.held_out(opened, split, sink.note)
    plan = evaluation.Plan(
        evaluation.numbers(thresholds, "--thresholds"),
        augment,
        evaluation.scales(scale_range),
        seed,
        batch_size,
        options.device(device),
    )
    rows = evaluation.evaluate(loaded, opened, plan)
    metric = registry.load("tasks", loaded.task).METRIC
    if picture:
        prediction, label = evaluation.predicted(loaded, opened, plan)
        title = f"{loaded.name}: {metric} {rows[0][metric]:.3f}, n {rows[0]['n']}"
        if loaded.classes:
            report.confusion(prediction, label, loaded.classes, title, picture)
        else:
            report.scatter(prediction, label, title, picture)
        sink.note(f"picture: {picture}")
    others = [name for name in ("r2", "mae", "macro_f1") if name in rows[0]]
    columns = ["augment", "threshold", "n", metric, f"{metric}_low", f"{metric}_high", *others]
    summary = {"predictor": loaded.name, "zoo": str(opened.path)}
    sink.answer(Answer(rows, summary, list(opened.failures), columns), out)
