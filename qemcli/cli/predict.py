"""qem predict: how well does each network generalise, best first."""

from __future__ import annotations

from typing import Annotated

import typer

from qemcli.cli import _options as options
from qemcli.cli._out import Answer, Sink

app = typer.Typer(add_completion=False)

Zoo = Annotated[str | None, typer.Argument(help="Directory, index, checkpoint, zoo name or hf://…")]
Name = Annotated[str | None, typer.Option("--predictor", "-p", help="Name, file, folder or hf://…")]


@app.command()
def predict(
    zoo: Zoo = None,
    predictor: Name = None,
    where: options.Where = None,
    limit: options.Limit = None,
    activation: options.Activation = None,
    batch_size: options.BatchSize = 256,
    device: options.DeviceOption = options.Device.auto,
    strict: options.Strict = False,
    json: options.Json = False,
    out: options.OutFile = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Predict the test accuracy of every checkpoint from its weights alone, best first.

    Example: qem predict sweep/ --where "lr < 0.1" --json
    """
    from qemcli import answering, registry
    from qemcli.machine import steady
    from qemcli.predictors import Predictor
    from qemcli.zoos.opening import open_zoo

    sink = Sink(json, quiet, verbose)
    steady()
    given = Predictor.load(predictor) if predictor else None
    opened = open_zoo(
        zoo, sink.note, where=where, limit=limit, activation=activation, strict=strict
    )
    with sink.progress("predicting", len(opened.index)) as advance:
        found = answering.answer(
            opened,
            "generalization",
            given,
            batch_size,
            options.device(device),
            sink.note,
            advance,
            strict,
        )
    task = registry.load("tasks", "generalization")
    summary = {**answering.scores(task, found), "predictors": found.predictors}
    columns = ["checkpoint", "prediction", "label"]
    labelled = any("label" in row for row in found.rows)
    sink.answer(
        Answer(found.rows, summary, found.failed, columns if labelled else columns[:2]), out
    )
