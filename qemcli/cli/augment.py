"""qem augment: new checkpoints that compute the same functions, and the proof."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qemcli.cli import _options as options
from qemcli.cli._out import Answer, Sink

if TYPE_CHECKING:
    from qemcli.directories import Directory

app = typer.Typer(add_completion=False)

Group = Annotated[
    str | None,
    typer.Option(
        "--group",
        help="A group that `qem inspect` names.  [default: monomial; of transformers all]",
    ),
]
Factor = Annotated[int, typer.Option("--factor", min=1, help="Copies of every network.")]
ScaleRange = Annotated[
    str | None,
    typer.Option(
        "--scale-range",
        help="LO:HI of scales, and of the singular values of matrices.  [default: 0.1:10]",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the new zoo.")]
WIDE = "0.1:10"


@app.command()
def augment(
    zoo: Annotated[str | None, typer.Argument(help="Directory, index, zoo name or hf://…")] = None,
    group: Group = None,
    factor: Factor = 1,
    scale_range: ScaleRange = None,
    out: Out = None,
    where: options.Where = None,
    limit: options.Limit = None,
    activation: options.Activation = None,
    heads: options.Heads = None,
    seed: options.Seed = 0,
    resume: options.Resume = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Copy every network along its orbit; each copy's function is compared with the original's.

    ZOO may be a checkpoint directory of the transformers library: the copy is one as well.
    Example: qem augment zoo/ --group monomial --factor 4 --scale-range 1:10000 --out copies
    """
    from qemcli import directories, orbits
    from qemcli.errors import UsageError
    from qemcli.evaluation import scales
    from qemcli.spaces import Transformer
    from qemcli.zoos.opening import open_zoo

    sink = Sink(json, quiet, verbose)
    if zoo and directories.is_directory(Path(zoo)):
        if where or limit:  # --resume is nothing here: all copies are written, or none
            raise UsageError(f"{zoo}: one checkpoint takes no --where and no --limit")
        source = directories.Directory.open(Path(zoo), activation, heads)
        range_ = scales(scale_range) if scale_range else source.scales()
        _directory(source, group or "all", factor, range_, seed, out, dry_run, sink)
        return
    opened = open_zoo(zoo, sink.note, where=where, limit=limit, activation=activation)
    attentive = all(isinstance(space, Transformer) for space in opened.spaces.values())
    group = group or ("all" if attentive else "monomial")
    plan = orbits.Augment(group, factor, scales(scale_range or WIDE), seed)
    folder = out or Path(f"{opened.name}-{group}")
    total = len(opened) * factor
    if dry_run:
        size = total * int(opened.index["parameters"].mean()) * 4
        sink.answer(Answer([], {"zoo": str(folder), "copies": total, "bytes": size}))
        return
    with sink.progress("augmenting", total) as advance:
        rows, failed = orbits.rewrite(opened, plan, folder, resume, advance)
    sink.note(f"{sum(row['networks'] for row in rows)} copies written to {folder}")
    worst = orbits.worst(rows)
    summary = {"zoo": str(folder), "function_error_max": worst, "seed": seed, "scales": plan.scales}
    sink.answer(Answer(rows, summary, failed))


def _directory(
    opened: Directory,
    group: str,
    factor: int,
    range_: tuple[float, float],
    seed: int,
    out: Path | None,
    dry_run: bool,
    sink: Sink,
) -> None:
    """Copies of one checkpoint directory, each proven by the library where it is installed."""
    from qemcli import directories, proof

    folder = out or Path(f"{opened.path.resolve().name}-{group}")
    folders = [folder] if factor == 1 else [folder / f"{group}-{i}" for i in range(factor)]
    about = {"scales": range_, "group": group, "seed": seed, "parameters": opened.space.size}
    if dry_run:
        sink.answer(Answer([], {"directories": [str(f) for f in folders], **about}))
        return
    for where in folders:
        directories.free(where)
    probe = proof.probed(opened, seed, sink.warn)  # first: what cannot be run is not copied
    rows = []
    for i, where in enumerate(folders):
        moved = directories.augment(opened, group, range_, seed + i, where)
        errors = proof.told(opened, where, moved, probe)
        rows.append({"checkpoint": str(where), "group": group, "seed": seed + i, **errors})
    for name in directories.left_out(opened.path):
        sink.note(f"not copied: {name}")
    sink.note(f"{len(rows)} copies written to {folder}")
    sink.answer(Answer(rows, about))
