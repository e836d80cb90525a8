"""qem index: one parquet row a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qemcli.cli import _options as options
from qemcli.cli._out import Answer, Sink

app = typer.Typer(add_completion=False)

Zoo = Annotated[str | None, typer.Argument(help="Directory, index, checkpoint, zoo name or hf://…")]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder of index.parquet; left out: the zoo's.")
]
Update = Annotated[
    bool, typer.Option("--update", help="Read only files that are new or have changed.")
]

Balanced = Annotated[
    bool, typer.Option("--balanced", help="Also keep every network's balanced representative.")
]


@app.command()
def index(
    zoo: Zoo = None,
    out: Out = None,
    update: Update = False,
    balanced: Balanced = False,
    activation: options.Activation = None,
    heads: options.Heads = None,
    workers: options.Workers = 1,
    strict: options.Strict = False,
    resume: options.Resume = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write index.parquet: id, architecture, statistics, sha256, labels of every checkpoint.

    Chunks that an interrupted run has finished are always used again. With --balanced predictors
    that balance take the representatives from OUT/balanced, computed once; as large as the zoo.

    Example: qem index sweep/ --out sweep-index --update
    """
    from qemcli.zoos.balanced import FOLDER, keep
    from qemcli.zoos.indexing import index as write_index
    from qemcli.zoos.indexing import planned
    from qemcli.zoos.resolve import resolve
    from qemcli.zoos.zoo import Zoo as Opened

    sink = Sink(json, quiet, verbose)
    path = resolve(zoo, sink.note)
    plan = planned(path, out, update, activation, strict, heads)
    if dry_run:
        sink.answer(Answer(summary=plan.summary(), failed=list(plan.failures)))
        return
    with sink.progress("indexing", plan.total) as advance:
        summary = write_index(plan, workers, advance, strict)
    failed = summary.pop("failed")
    if balanced:
        opened = Opened.open(summary["index"])
        with sink.progress("balancing", len(opened)) as advance:
            kept = Path(summary["index"]).parent / FOLDER
            summary["balanced"] = keep(opened, kept, advance)
        failed += opened.failures
    sink.note(f"{summary['checkpoints']} checkpoints indexed in {summary['index']}")
    sink.answer(Answer(summary=summary, failed=failed))
