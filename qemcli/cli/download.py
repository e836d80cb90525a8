"""qem download: a repository of the Hub, a published zoo, or files from an address."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qemcli.cli import _options as options
from qemcli.cli._out import Answer, Sink

app = typer.Typer(add_completion=False)

What = Annotated[
    str, typer.Argument(help="hf://[datasets/]owner/name[@revision], a zoo's name, or an address.")
]
Dest = Annotated[
    Path | None,
    typer.Option("--dest", help="Folder; left out: the Hub's cache for hf://, else ./NAME."),
]
Include = Annotated[
    list[str] | None,
    typer.Option("--include", help="Only files that match, e.g. '*.safetensors'; repeatable."),
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", help="No files that match; repeatable.")
]


@app.command()
def download(
    what: What,
    dest: Dest = None,
    include: Include = None,
    exclude: Exclude = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Fetch a zoo or a predictor, every file checked against its published hash.

    Zenodo (zenodo:6632086), Google Cloud Storage (gs://bucket/file) and plain addresses go on where
    they stopped; what only a browser can fetch is named. HF_HUB_OFFLINE=1 answers from the cache.

    Example: qem download hf://datasets/owner/name@v1 --include '*.safetensors' --dry-run
    """
    from qemcli.downloads import embedded, planned

    sink = Sink(json, quiet, verbose)
    here = embedded(what)
    if here is not None:
        sink.note(f"{what} ships with qem: nothing to fetch")
        sink.answer(Answer(summary={"path": str(here), "files": 0, "bytes": 0}))
        return
    plan = planned(what, include or (), exclude or (), dest)
    rows = plan.rows()
    summary = plan.summary(rows)
    if not dry_run:
        with sink.transfer("downloading", summary["bytes"] or None) as advance:
            summary = plan.fetch(advance)
        sink.note(f"whole and checked: {summary['files']} files in {summary['path']}")
        if summary["unchecked"]:
            sink.warn(f"{summary['unchecked']} by length alone: nobody publishes their checksums")
    sink.answer(Answer(rows if dry_run or json else [], summary))
