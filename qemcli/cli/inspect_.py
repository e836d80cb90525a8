"""qem inspect: the weight space of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qemcli.cli import _options as options
from qemcli.cli._out import Answer, Sink

app = typer.Typer(add_completion=False)

BELOW = ("tensors", "skipped", "space", "refused")  # not in a person's summary
Files = Annotated[
    list[str],
    typer.Argument(
        help="Checkpoints: files, directories with config.json, or hf://…", metavar="CHECKPOINT..."
    ),
]


@app.command()
def inspect(
    checkpoints: Files,
    activation: options.Activation = None,
    heads: options.Heads = None,
    w0: options.W0 = None,
    convention: options.Convention = None,
    allow_pickle: options.AllowPickle = False,
    strict: options.Strict = False,
    json: options.Json = False,
    out: options.OutFile = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Find a checkpoint's weight space: named axes, activation, symmetry groups, what is left out.

    Example: qem inspect model.safetensors --json
    """
    from qemcli import inspection
    from qemcli.formats import _unpickling
    from qemcli.hub.reference import PREFIX
    from qemcli.zoos.resolve import locate

    sink = Sink(json, quiet, verbose)
    paths = [locate(name) if name.startswith(PREFIX) else Path(name) for name in checkpoints]
    if allow_pickle:
        paths = [_unpickling.twin(path, sink.warn) for path in paths]
    rows, failed = inspection.inspect(paths, activation, strict, w0, convention, heads)
    for hint in dict.fromkeys(row["hint"] for row in rows if "hint" in row):
        sink.note(f"hint: {hint}")
    if len(rows) == 1 and not failed:
        sink.answer(inspection_answer(rows[0], json), out)
        return
    columns = ["checkpoint", "family", "widths", "activation", "groups", "parameters", "coverage"]
    sink.answer(Answer(rows, {"n": len(rows)}, failed, columns), out)


def inspection_answer(row: dict, json: bool) -> Answer:
    """One checkpoint: its tensors are the table; JSON has the record on top and as the row."""
    if json:
        return Answer([row], row)
    tensors = [{"tensor": n, **t} for n, t in row["tensors"].items()]
    skipped = [{"tensor": s["tensor"], "axes": f"left out: {s['reason']}"} for s in row["skipped"]]
    summary = {k: v for k, v in row.items() if k not in (*BELOW, "hint")}
    if "blocks" in row:  # of a transformer every group has its own condition
        summary |= {f"not {group}": reason for group, reason in row["refused"].items()}
    return Answer(tensors + skipped, summary, columns=["tensor", "axes", "shape", "dtype"])
