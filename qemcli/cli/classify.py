"""qem classify: what each INR shows, read from its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qemcli.cli import _options as options
from qemcli.cli._out import Answer, Sink

if TYPE_CHECKING:
    from qemcli.answering import Answers

app = typer.Typer(add_completion=False)

EMBEDDED = "siren-heldout"
Zoo = Annotated[str | None, typer.Argument(help="Directory, index, checkpoint, zoo name or hf://…")]
Name = Annotated[str | None, typer.Option("--predictor", "-p", help="Name, file, folder or hf://…")]


@app.command()
def classify(
    zoo: Zoo = None,
    predictor: Name = None,
    where: options.Where = None,
    limit: options.Limit = None,
    w0: options.W0 = None,
    convention: options.Convention = None,
    batch_size: options.BatchSize = 256,
    device: options.DeviceOption = options.Device.auto,
    strict: options.Strict = False,
    seed: options.Seed = 0,
    json: options.Json = False,
    out: options.OutFile = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Say of every INR which class of image it shows; accuracy where labels are there.

    Example: qem classify sirens/ --predictor siren-mnist --out classes.csv
    """
    from qemcli import answering
    from qemcli.machine import steady
    from qemcli.predictors import Predictor
    from qemcli.zoos.opening import as_sirens, open_zoo

    sink = Sink(json, quiet, verbose)
    steady()
    given = Predictor.load(predictor) if predictor else None
    opened = open_zoo(
        zoo,
        sink.note,
        where=where,
        limit=limit,
        strict=strict,
        ships=EMBEDDED,
    )
    opened = as_sirens(opened, w0, convention)
    with sink.progress("classifying", len(opened.index)) as advance:
        found = answering.answer(
            opened,
            "classification",
            given,
            batch_size,
            options.device(device),
            sink.note,
            advance,
            strict,
        )
    summary = {"n": len(found.rows), **_scores(found, seed), "predictors": found.predictors}
    columns = ["checkpoint", "class", "probability", "label"]
    labelled = any("label" in row for row in found.rows)
    sink.answer(
        Answer(found.rows, summary, found.failed, columns if labelled else columns[:3]), out
    )


def _scores(found: Answers, seed: int) -> dict[str, Any]:
    """How many labels are known, and accuracy and macro-F1 over them with their intervals."""
    from qemcli import answering, registry
    from qemcli.evaluation import with_intervals

    prediction, label = answering.labelled(found)
    if not len(label):
        return {}
    task = registry.load("tasks", "classification")
    scores = with_intervals(task, prediction, label, seed) or task.score(prediction, label)
    return {"labelled": len(label), **scores}
