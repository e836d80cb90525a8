"""qem index: one parquet row a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from qemcli.cli import _options as options
from qemcli.cli._out import Answer, Sink
from qemcli.errors import UsageError

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

Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels", help="Table of labels: csv, parquet, JSON lines; also W&B's and MLflow's."
    ),
]


Headers = Annotated[
    bool, typer.Option("--headers", help="hf:// only: read headers and hashes, fetch no weights.")
]


@app.command()
def index(
    zoo: Zoo = None,
    out: Out = None,
    update: Update = False,
    labels: Labels = None,
    balanced: Balanced = False,
    activation: options.Activation = None,
    heads: options.Heads = None,
    workers: options.Workers = 1,
    headers: Headers = False,
    allow_pickle: options.AllowPickle = False,
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

    --labels joins a table by a column of paths, or of run ids, which are parts of the paths; what
    meets nothing is counted and named.

    --headers lists a repository of the Hub without its weights and finds byte-identical files; the
    weights of the rows that a later command takes are fetched then.

    Example: qem index sweep/ --labels runs.csv --out sweep-index
    """
    from qemcli.machine import steady
    from qemcli.zoos.balanced import FOLDER, keep
    from qemcli.zoos.indexing import index as write_index
    from qemcli.zoos.indexing import planned
    from qemcli.zoos.resolve import resolve
    from qemcli.zoos.zoo import Zoo as Opened

    sink = Sink(json, quiet, verbose)
    out = out or folder_of(zoo)
    if headers:
        given = {
            "--update": update, "--labels": labels, "--balanced": balanced, "--heads": heads,
            "--strict": strict, "--allow-pickle": allow_pickle, "--workers": workers != 1,
        }  # fmt: skip
        refuse_with_headers([name for name, value in given.items() if value])
        by_headers(sink, str(zoo), out, activation, dry_run)
        return
    path = resolve(zoo, sink.note)
    path, stopped = run_pickles(path, sink.warn) if allow_pickle else (path, {})
    plan = planned(path, out, update, activation, strict, heads, labels)
    if dry_run:
        sink.answer(Answer(summary=plan.summary(), failed=list(plan.failures)))
        return
    with sink.progress("indexing", plan.total) as advance:
        summary = write_index(plan, workers, advance, strict)
    failed = [
        {**item, "reason": stopped.get(item["checkpoint"], item["reason"])}
        for item in summary.pop("failed")
    ]
    for reason, count in summary.get("only_listed", {}).items():
        sink.note(f"listed without being understood: {count} ({reason})")
    if "labels" in summary:
        sink.note(met(summary["labels"]))
    if balanced:
        steady()  # as the predictors do that take what is kept: the same bytes
        opened = Opened.open(summary["index"])
        with sink.progress("balancing", len(opened)) as advance:
            kept = Path(summary["index"]).parent / FOLDER
            summary["balanced"] = keep(opened, kept, advance)
        failed += opened.failures
    sink.note(f"{summary['checkpoints']} checkpoints indexed in {summary['index']}")
    sink.answer(Answer(summary=summary, failed=failed))


def run_pickles(path: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, str]]:
    """What to index once the pickles at `path` have been run, and why some of them were stopped.

    Raises InputError for one file that was stopped.
    """
    from qemcli.formats._unpickling import stopped, twin
    from qemcli.zoos.scan import listing

    if not path.is_dir():
        return twin(path, warn), {}
    files = {path / entry.file: entry.file for entry in listing(path).entries}
    return path, {files[file]: why for file, why in stopped(files, warn).items()}


def met(report: dict[str, Any]) -> str:
    """One line on the table of labels: what met, what did not."""
    line = f"labels: {report['joined']} checkpoints joined by '{report['by']}' of {report['file']}"
    for key, what in (
        ("checkpoints_without_label", "without a label"),
        ("rows_without_checkpoint", "rows without a checkpoint"),
    ):
        if names := report.get(key):
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            count = report[key.replace("checkpoints_", "").replace("rows_", "")]
            line += f"; {count} {what} ({shown})"
    if not report["labels"]:
        shown = ", ".join(report["columns"][:8]) or "none"
        line += f"; no column is called test_accuracy, val_accuracy or label (they are: {shown})"
    return line


def folder_of(zoo: str | None) -> Path | None:
    """Where the index of a repository goes, where nobody says it: ./NAME-index, not the cache."""
    from qemcli.hub.reference import PREFIX, Reference

    if zoo is None or not zoo.startswith(PREFIX):
        return None
    return Path(f"{Reference.parse(zoo).name.split('/')[-1]}-index")


def refuse_with_headers(names: list[str]) -> None:
    """UsageError for options that --headers cannot keep."""
    if names:
        raise UsageError(
            f"--headers reads headers alone, of all files, and does not go with {', '.join(names)}",
            f"leave out --headers: what {names[0]} needs is then fetched",
        )


def by_headers(
    sink: Sink, zoo: str, out: Path | None, activation: str | None, dry_run: bool
) -> None:
    """The index of a repository, by its headers alone."""
    from qemcli.zoos.headers import Headers as Found

    found = Found.of(zoo)
    if dry_run or out is None:
        sink.answer(Answer(summary=found.summary()))
        return
    with sink.progress("reading headers", len(found.headed)) as advance:
        summary = found.index(out, activation, advance)
    failed = summary.pop("failed")
    sink.note(f"{summary['checkpoints']} checkpoints indexed in {summary['index']}")
    sink.answer(Answer(summary=summary, failed=failed))
