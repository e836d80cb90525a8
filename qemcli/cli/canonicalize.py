"""qem canonicalize: one representative of every network's orbit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qemcli.cli import _options as options
from qemcli.cli._out import Answer, Sink

app = typer.Typer(add_completion=False)

Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the new zoo.")]


@app.command()
def canonicalize(
    zoo: Annotated[str | None, typer.Argument(help="Directory, index, zoo name or hf://…")] = None,
    out: Out = None,
    where: options.Where = None,
    limit: options.Limit = None,
    activation: options.Activation = None,
    resume: options.Resume = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write every network balanced, with signs chosen and neurons in order; functions unchanged.

    Two networks of one orbit become the same; ties that leave the order open are counted.
    Example: qem canonicalize zoo/ --out canonical
    """
    from qemcli import orbits
    from qemcli.machine import steady
    from qemcli.zoos.opening import open_zoo

    sink = Sink(json, quiet, verbose)
    steady()
    opened = open_zoo(zoo, sink.note, where=where, limit=limit, activation=activation)
    folder = out or Path(f"{opened.name}-canonical")
    with sink.progress("canonicalizing", len(opened)) as advance:
        rows, failed = orbits.rewrite(opened, orbits.Canonicalise(), folder, resume, advance)
    sink.note(f"{sum(row['networks'] for row in rows)} networks written to {folder}")
    sink.answer(
        Answer(rows, {"zoo": str(folder), "function_error_max": orbits.worst(rows)}, failed)
    )
