"""qem augment: new checkpoints that compute the same functions, and the proof."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qemcli.cli import _options as options
from qemcli.cli._out import Answer, Sink

app = typer.Typer(add_completion=False)

Group = Annotated[
    str, typer.Option("--group", help="permutation, sign, scale, monomial, phase, all.")
]
Factor = Annotated[int, typer.Option("--factor", min=1, help="Copies of every network.")]
ScaleRange = Annotated[str, typer.Option("--scale-range", help="LO:HI of the scales.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the new zoo.")]


@app.command()
def augment(
    zoo: Annotated[str | None, typer.Argument(help="Directory, index, zoo name or hf://…")] = None,
    group: Group = "monomial",
    factor: Factor = 1,
    scale_range: ScaleRange = "0.1:10",
    out: Out = None,
    where: options.Where = None,
    limit: options.Limit = None,
    activation: options.Activation = None,
    seed: options.Seed = 0,
    resume: options.Resume = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Copy every network along its orbit; each copy's function is compared with the original's.

    Example: qem augment zoo/ --group monomial --factor 4 --scale-range 1:10000 --out copies
    """
    from qemcli import orbits
    from qemcli.evaluation import scales
    from qemcli.zoos.opening import open_zoo

    sink = Sink(json, quiet, verbose)
    plan = orbits.Augment(group, factor, scales(scale_range), seed)
    opened = open_zoo(zoo, sink.note, where=where, limit=limit, activation=activation)
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
