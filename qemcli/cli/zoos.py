"""qem zoos: what is embedded and what is known."""

from __future__ import annotations

import typer

from qemcli.cli import _options as options
from qemcli.cli._out import Answer, Sink

app = typer.Typer(add_completion=False)


@app.command()
def zoos(
    json: options.Json = False,
    out: options.OutFile = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """List the zoos: the embedded ones, and the published layouts that qem reads.

    Example: qem zoos --json
    """
    from qemcli.zoos.known import layouts, rows

    columns = ["name", "checkpoints", "family", "activations", "labels", "licence", "recipe"]
    Sink(json, quiet, verbose).answer(Answer(rows(), {"layouts": layouts()}, columns=columns), out)
