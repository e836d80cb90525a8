"""qem edit: change what image INRs show, in weight space."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qemcli.cli import _options as options
from qemcli.cli._out import Answer, Sink

if TYPE_CHECKING:
    from qemcli.editors import Way
    from qemcli.edits import Edit
    from qemcli.zoos.zoo import Zoo

app = typer.Typer(add_completion=False)

EMBEDDED, EDIT = "siren-heldout", "dilate"
Wanted = Annotated[
    str | None,
    typer.Option("--edit", help="dilate, erode, contrast, clahe, invert, rotate; or NAME:AMOUNT."),
]
Name = Annotated[str | None, typer.Option("--predictor", "-p", help="Name, file, folder or hf://…")]
Expand = Annotated[
    int | None, typer.Option("--expand", min=1, help="The shipped editor of so many branches.")
]
Refit = Annotated[
    bool, typer.Option("--refit", help="No editor: render, edit the picture, fit the SIREN anew.")
]
Source = Annotated[
    str | None,
    typer.Option("--source", help="The true pictures, SOURCE[,TEST_SOURCE] as for qem build."),
]
Preview = Annotated[
    Path | None, typer.Option("--preview", help="Picture of before, after and wanted.")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the edited zoo.")]


@app.command()
def edit(
    zoo: Annotated[str | None, typer.Argument(help="Directory, index, zoo name or hf://…")] = None,
    edit: Wanted = None,
    predictor: Name = None,
    expand: Expand = None,
    refit: Refit = False,
    source: Source = None,
    out: Out = None,
    preview: Preview = None,
    where: options.Where = None,
    limit: options.Limit = None,
    w0: options.W0 = None,
    convention: options.Convention = None,
    resume: options.Resume = False,
    batch_size: options.BatchSize = 64,
    device: options.DeviceOption = options.Device.auto,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Edit what SIRENs show; writes ordinary SIRENs, merged into one where the editor has branches.

    `mse` is measured on the [0, 1] scale against the edit of what each network showed before, or
    of its true picture (--source). Example: qem edit sirens/ --edit dilate --out dilated
    """
    from qemcli import editing, report
    from qemcli.machine import steady
    from qemcli.zoos.opening import as_sirens, open_zoo

    sink = Sink(json, quiet, verbose)
    steady()
    if preview:
        report.check(preview)
    opened = open_zoo(zoo, sink.note, where=where, limit=limit, ships=EMBEDDED)
    opened = as_sirens(opened, w0, convention)
    where_ = options.device(device)
    wanted, way = _plan(opened, edit, predictor, expand, refit, batch_size, where_, sink)
    folder = out or Path(f"{opened.name}-{wanted.name}")
    if dry_run:
        sink.answer(Answer([], {"zoo": str(folder), **editing.foreseen(opened, way)}))
        return
    truth = editing.true_pictures(source) if source else None
    with sink.progress("editing", len(opened)) as advance:
        made = editing.edit_zoo(opened, wanted, way, folder, resume, truth, advance)
    sink.note(f"{len(made.rows)} edited networks written to {folder}")
    if preview:
        editing.preview(opened, folder, wanted, way, truth, preview)
        sink.note(f"picture: {preview}")
    sink.answer(Answer(made.rows, {"zoo": str(folder), **made.summary}, made.failed))


def _plan(
    opened: Zoo,
    edit: str | None,
    name: str | None,
    expand: int | None,
    refit: bool,
    batch_size: int,
    device: str,
    sink: Sink,
) -> tuple[Edit, Way]:
    """The edit and how it is made: by fitting anew, by the editor given, or by the shipped one."""
    from qemcli import editors, edits
    from qemcli.errors import UsageError

    if refit and (name or expand):
        raise UsageError("--refit does without an editor: leave --predictor and --expand out")
    if refit:
        return edits.find(edit or EDIT), editors.ByFit(device=device)
    if name:
        predictor = editors.given(name, edit, expand)
    else:
        spaces = [space for space, _ in opened.groups()]
        predictor = editors.choose(edits.find(edit or EDIT), spaces, expand, sink.note)
    wanted = edits.find(predictor.design.edit or EDIT)
    return wanted, editors.ByEditor(predictor, batch_size, device)
