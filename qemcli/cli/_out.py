"""The sink: the one place that prints. stdout carries the answer, stderr everything else."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from qemcli.errors import UsageError
from qemcli.writing import beside


@dataclass
class Answer:
    """What a command found: `rows` for a table, `summary` beside them, `failed` items with their
    reason.

    `columns` picks and orders what a person sees; JSON and files always carry everything. `text`
    is printed instead of the table where it is given.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    failed: list[dict[str, Any]] = field(default_factory=list)
    columns: list[str] | None = None
    title: str | None = None
    text: str | None = None


def plain(value: Any) -> Any:
    """A value as strict JSON allows it: numpy scalars unwrapped, NaN and infinities as null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def printable(text: str) -> str:
    """Text from a file, with control and direction characters escaped: no file can drive the
    terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cell(value: Any) -> str:
    """One value as a person reads it: four digits, em dash where there is none."""
    value = plain(value)
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"
    return printable(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def complain(message: str, hint: str | None = None) -> None:
    """What went wrong and what to do next, on stderr."""
    print(f"error: {printable(message)}", file=sys.stderr)
    if hint:
        print(f"hint:  {printable(hint)}", file=sys.stderr)


class Sink:
    """Where a command's words go; the mode (human, JSON, quiet) is decided once."""

    def __init__(self, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        # Of the processes that torchrun starts only the first one speaks.
        self.first = os.environ.get("RANK", "0") == "0"
        self.json, self.quiet, self.verbose = json, quiet or not self.first, verbose

    def note(self, text: str) -> None:
        """Narration, on stderr; silent with --quiet."""
        if not self.quiet:
            print(printable(text), file=sys.stderr)

    def detail(self, text: str) -> None:
        """Narration for --verbose only."""
        if self.verbose:
            self.note(text)

    def warn(self, text: str) -> None:
        """Something the user should know, in every mode."""
        print(f"warning: {printable(text)}", file=sys.stderr)

    @contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """A bar with rate and time left, on a terminal's stderr only; yields `advance(n)`."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            ProgressColumn,
            Task,
            TextColumn,
        )
        from rich.text import Text

        class Rate(ProgressColumn):
            """Items a second."""

            def render(self, task: Task) -> Text:
                return Text(f"{task.speed:.4g}/s" if task.speed else "–/s")

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate())
        with self._bar(what, total, columns) as advance:
            yield advance

    @contextmanager
    def transfer(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """The same for bytes."""
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn

        told = (DownloadColumn(binary_units=True), TransferSpeedColumn())
        columns = (TextColumn("{task.description}"), BarColumn(), *told)
        with self._bar(what, total, columns) as advance:
            yield advance

    @contextmanager
    def _bar(
        self, what: str, total: int | None, columns: tuple[Any, ...]
    ) -> Iterator[Callable[[int], None]]:
        from rich.console import Console
        from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True)
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        hidden = self.quiet or not console.is_terminal
        with Progress(*columns, *times, console=console, transient=True, disable=hidden) as bar:
            task = bar.add_task(what, total=total)

            def advance(n: int = 1) -> None:
                bar.advance(task, n)

            yield advance

    def answer(self, answer: Answer, out: Path | None = None, code: int = 0) -> None:
        """Print the answer, write its rows to `out`, and leave with `code`, or 4 where items
        failed."""
        code = code or (4 if answer.failed else 0)
        if self.first:
            self._told(answer, out)
        if code:
            raise typer.Exit(code)

    def _told(self, answer: Answer, out: Path | None) -> None:
        if out:
            write_rows(answer, out)
            self.note(f"{len(answer.rows)} rows written to {out}")
        if self.json:
            document = {**answer.summary, "rows": answer.rows, "failed": answer.failed}
            print(json.dumps(plain(document), indent=1, allow_nan=False))
        else:
            self._show(answer)
        if answer.failed and not self.json:
            self._failures(answer.failed)
        sys.stdout.flush()

    def _show(self, answer: Answer) -> None:
        if answer.text is not None:
            print(answer.text, end="")
            return
        if answer.rows:
            self._table(answer)
        if answer.summary and not self.quiet:
            for key, value in answer.summary.items():
                if not isinstance(value, dict):
                    print(f"{key}: {cell(value)}")

    def _table(self, answer: Answer) -> None:
        columns = answer.columns or list(answer.rows[0])
        if self.quiet:
            for row in answer.rows:
                print(cell(row.get(columns[0])))
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=answer.title, box=box.SIMPLE_HEAD, title_justify="left")
        for name in columns:
            values = [row.get(name) for row in answer.rows[:50]]
            number = any(isinstance(plain(v), int | float) for v in values)
            table.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in answer.rows:
            table.add_row(*(Text(cell(row.get(name))) for name in columns))
        # A pipe gets whole lines: nothing is cut to a terminal's width that is not there.
        wide = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 200
        try:
            Console(width=wide, highlight=False).print(table)
        except SystemExit:  # rich's word for a reader that has gone
            raise BrokenPipeError from None

    def _failures(self, failed: list[dict[str, Any]]) -> None:
        shown = failed if self.verbose else failed[:10]
        print(f"{len(failed)} failed:", file=sys.stderr)
        for item in shown:
            print("  " + ": ".join(printable(str(v)) for v in item.values()), file=sys.stderr)
        if len(shown) < len(failed):
            print(f"  ... {len(failed) - len(shown)} more (--verbose)", file=sys.stderr)


def write_rows(answer: Answer, path: Path) -> None:
    """Write the rows by the file's suffix, beside the target and renamed; UsageError for another
    suffix."""
    writers = {".csv": _csv, ".parquet": _parquet, ".json": _json}
    if path.suffix not in writers:
        raise UsageError(
            f"--out {path}: unknown suffix '{path.suffix}'", "use .csv, .parquet or .json"
        )
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--out {path}: not a file in an existing directory")
    beside(path, lambda p: writers[path.suffix](answer, p))


def _csv(answer: Answer, path: Path) -> None:
    import pandas

    pandas.DataFrame(plain(answer.rows)).to_csv(path, index=False)


def _parquet(answer: Answer, path: Path) -> None:
    import pandas

    pandas.DataFrame(plain(answer.rows)).to_parquet(path, index=False)


def _json(answer: Answer, path: Path) -> None:
    document = {**answer.summary, "rows": answer.rows, "failed": answer.failed}
    path.write_text(json.dumps(plain(document), indent=1, allow_nan=False) + "\n")
