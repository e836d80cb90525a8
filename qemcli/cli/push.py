"""qem push: a predictor or a zoo, with its card, to a repository of the Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from qemcli.cli import _options as options
from qemcli.cli._out import Answer, Sink

app = typer.Typer(add_completion=False)

What = Annotated[str, typer.Argument(help="PREDICTOR or ZOO: name, folder or file.")]
Where = Annotated[str, typer.Argument(help="hf://owner/name, or hf://datasets/owner/name.")]
Private = Annotated[
    bool,
    typer.Option("--private/--public", help="Who can read a new repository; an old one stays."),
]


@app.command()
def push(
    what: What,
    where: Where,
    private: Private = True,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Publish a predictor or a zoo in one commit, and check that it arrived.

    A new repository is private until you say --public. A zoo usually goes to hf://datasets/...;
    what has no card gets one from its header or index.

    Example: qem push mine hf://owner/mine && qem predict sweep/ -p hf://owner/mine
    """
    from qemcli.hub import pushing
    from qemcli.pushing import parcel, target

    sink = Sink(json, quiet, verbose)
    ref = target(where)
    found = parcel(what, ref)
    rows = found.rows()
    summary = {"kind": found.kind, "to": str(ref), "bytes": sum(row["size"] for row in rows)}
    if dry_run:
        sink.answer(Answer(rows, {**summary, "private": private}))
        return
    pinned = found.push(ref, private)
    public = pushing.visible(ref)
    sink.note(f"{len(rows)} files pushed; read again as {ref}")
    if public and private:
        sink.warn(f"{ref} was there before and is public")
    sink.answer(Answer(rows, {**summary, "commit": str(pinned), "private": not public}))
