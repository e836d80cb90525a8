"""qem models: the predictors that ship, and the architectures that can be trained."""

from __future__ import annotations

from typing import Annotated

import typer

from qemcli.cli import _options as options
from qemcli.cli._out import Answer, Sink

app = typer.Typer(add_completion=False)

Presets = Annotated[
    bool, typer.Option("--presets", help="The published configurations, with parameter counts.")
]


@app.command()
def models(
    presets: Presets = False,
    json: options.Json = False,
    out: options.OutFile = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """List the shipped predictors: task, weight space, score; or the published presets.

    Example: qem models --presets --json
    """
    from qemcli import catalogue

    sink = Sink(json, quiet, verbose)
    rows = catalogue.presets() if presets else catalogue.predictors()
    architectures = catalogue.architectures()
    summary = {"architectures": list(architectures)} if not presets else {}
    sink.answer(Answer(rows, summary), out)
