"""qem render: what INRs show."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qemcli.cli import _options as options
from qemcli.cli._out import Answer, Sink
from qemcli.errors import InputError, QemError, UsageError

if TYPE_CHECKING:
    from qemcli.rendering import Shown
    from qemcli.zoos.zoo import Zoo

app = typer.Typer(add_completion=False)

EMBEDDED = "siren-heldout"
SHEET = 64  # networks of a zoo that a sheet shows, where nobody says how many
LARGEST = 2048  # pixels a side
Zoos = Annotated[
    list[str] | None,
    typer.Argument(help="Checkpoints, folders, archives, zoo names.", metavar="[CHECKPOINT]..."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The picture: .png, .svg or .pdf.")]
Size = Annotated[
    str | None, typer.Option("--size", help="HEIGHTxWIDTH in pixels; left out: each its own.")
]


@app.command()
def render(
    checkpoints: Zoos = None,
    out: Out = Path("render.png"),
    size: Size = None,
    w0: options.W0 = None,
    convention: options.Convention = None,
    where: options.Where = None,
    limit: options.Limit = None,
    strict: options.Strict = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Render SIRENs, each by its own convention, into one contact sheet.

    Pixels are clipped for display only; min and max are those of the network.
    Example: qem render sirens/ --limit 25 --out sheet.png
    """
    from qemcli import report
    from qemcli.machine import steady
    from qemcli.rendering import Shown, captions

    sink = Sink(json, quiet, verbose)
    steady()
    report.check(out)
    pixels = sides(size)
    found = Shown()
    given: list[str | None] = list(dict.fromkeys(checkpoints)) if checkpoints else [None]
    for each in given:
        try:
            left = None if limit is None else limit - len(found.rows)
            if left == 0:
                break
            zoo = _opened(each, sink, where, left, w0, convention, strict)
            _add(found, zoo, pixels, sink, strict)
        except QemError as error:
            if strict or len(given) == 1:
                raise
            reason = error.message.removeprefix(f"{each}: ")
            found.failed.append({"checkpoint": str(each), "reason": reason})
    if not found.rows:
        raise InputError(f"none of {len(given)} can be rendered: {found.failed[0]['reason']}")
    columns = math.ceil(math.sqrt(len(found.rows)))
    cuts = range(0, len(found.rows), columns)
    said = captions(found.rows)
    images = [found.images[i : i + columns] for i in cuts]
    report.sheet(images, [said[i : i + columns] for i in cuts], out)
    sink.note(f"{len(found.rows)} images written to {out}")
    sink.answer(Answer(found.rows, {"n": len(found.rows), "picture": str(out)}, found.failed))


def sides(text: str | None) -> tuple[int, int] | None:
    """(height, width) of `28x28`; UsageError for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text)
    if not found or not all(1 <= int(side) <= LARGEST for side in found.groups()):
        raise UsageError(
            f"--size {text}: not HEIGHTxWIDTH with sides of 1 to {LARGEST}", "e.g. --size 56x56"
        )
    return int(found[1]), int(found[2])


def _opened(
    given: str | None,
    sink: Sink,
    where: str | None,
    limit: int | None,
    w0: float | None,
    convention: str | None,
    strict: bool,
) -> Zoo:
    """The zoo, at most SHEET of its networks where no limit was set."""
    from qemcli.rendering import spread
    from qemcli.zoos.opening import as_sirens, open_zoo

    zoo = open_zoo(given, sink.note, where=where, limit=limit, strict=strict, ships=EMBEDDED)
    if limit is None and len(zoo) > SHEET:
        sink.note(f"{SHEET} of {len(zoo)} networks, evenly over the zoo; --limit N: the first N")
        zoo = spread(zoo, SHEET)
    return as_sirens(zoo, w0, convention)


def _add(found: Shown, zoo: Zoo, size: tuple[int, int] | None, sink: Sink, strict: bool) -> None:
    """Render the zoo into what was found so far; with `strict` the first failure ends it."""
    from qemcli.rendering import show

    with sink.progress("rendering", len(zoo)) as advance:
        more = show(zoo, size, advance)
    if strict and more.failed:
        raise InputError(": ".join(more.failed[0].values()))
    found.rows += more.rows
    found.images += more.images
    found.failed += more.failed
