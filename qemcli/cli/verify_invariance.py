"""qem verify-invariance: is this predictor, or this network's function, really unchanged along
the orbit?"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qemcli.cli import _options as options
from qemcli.cli._out import Answer, Sink

if TYPE_CHECKING:
    from torch import Tensor

    from qemcli.spaces import WeightSpace
    from qemcli.verification import Check, Report
    from qemcli.zoos.zoo import Zoo

app = typer.Typer(add_completion=False)


class Precision(StrEnum):
    """The arithmetic that the check is run in."""

    float64 = "float64"
    float32 = "float32"


Group = Annotated[str | None, typer.Option("--group", help="Only this group; it must hold.")]
ZooOption = Annotated[str | None, typer.Option("--zoo", help="Networks to try a predictor on.")]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples", min=1, help="Elements a group.  [default: 32; 3 of a checkpoint directory]"
    ),
]
Networks = Annotated[
    int, typer.Option("--networks", min=2, help="Networks a predictor is tried on.")
]
Dtype = Annotated[Precision, typer.Option("--dtype", help="Arithmetic.")]
Tolerance = Annotated[
    float | None,
    typer.Option("--tolerance", help="Largest error that passes; else from the dtype."),
]
Module = Annotated[
    str | None, typer.Option("--module", help="A stranger's predictor: package.module:factory.")
]
TwinOption = Annotated[
    bool, typer.Option("--twin", help="Judge the predictor's bad twin instead: it must not hold.")
]
Picture = Annotated[Path | None, typer.Option("--picture", help="Errors by group and layer, .png.")]


@app.command()
def verify_invariance(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A predictor, a checkpoint, or a checkpoint directory of the transformers library."
        ),
    ],
    group: Group = None,
    zoo: ZooOption = None,
    samples: Samples = None,
    networks: Networks = 64,
    dtype: Dtype = Precision.float64,
    tolerance: Tolerance = None,
    module: Module = None,
    twin: TwinOption = False,
    activation: options.Activation = None,
    heads: options.Heads = None,
    seed: options.Seed = 0,
    picture: Picture = None,
    json: options.Json = False,
    out: options.OutFile = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Try random group elements, near, ordinary and extreme, with controls that must fail.

    Exit 0: it holds; 1: a claimed group does not; 6: nothing can be told (constant answers).
    --twin shows that it would be found: the same predictor made to tell neurons apart, exit 1.
    Example: qem verify-invariance cnn-relu --json
    """
    import torch

    from qemcli import report as pictures
    from qemcli import verification
    from qemcli.directories import is_directory

    sink = Sink(json, quiet, verbose)
    folder = None if module or twin or not is_directory(Path(checkpoint)) else Path(checkpoint)
    drawn = samples or (3 if folder else 32)
    check = verification.Check(drawn, seed, getattr(torch, dtype.value), tolerance)
    if folder:
        found, about = _directory(folder, group, activation, heads, check, sink)
    else:
        found, about = _verified(
            checkpoint, group, zoo, networks, module, twin, activation, check, sink
        )
    if picture:
        pictures.errors(found.rows, picture)
        sink.note(f"picture: {picture}")
    verdict = {0: "holds", 1: f"does not hold: {', '.join(found.broken)}", 6: "cannot be told"}
    summary = {
        **about,
        "verdict": verdict[found.code],
        "claims": found.claimed,
        "tolerance": found.tolerance,
        "tolerance_rule": "1000 x eps(dtype) x depth x max(1, largest answer / spread)",
        "seed": seed,
        "dtype": dtype.value,
    }
    mixed = ["architecture"] if any("architecture" in row for row in found.rows) else []
    columns = [
        *mixed,
        "kind",
        "group",
        "elements",
        "layer",
        "max_error",
        "mean_error",
        "holds",
        "claimed",
    ]
    sink.answer(Answer(found.rows, summary, [], mixed + columns), out, found.code)


def _verified(
    checkpoint: str,
    group: str | None,
    zoo: str | None,
    networks: int,
    module: str | None,
    twin: bool,
    activation: str | None,
    check: Check,
    sink: Sink,
) -> tuple[Report, dict[str, object]]:
    """(report, what was checked): a stranger's module, one of our predictors, or an ordinary
    checkpoint."""
    from dataclasses import replace

    from qemcli import verification
    from qemcli.errors import UsageError
    from qemcli.groups import applicable
    from qemcli.layers.twin import Twin
    from qemcli.predictor_files import is_predictor
    from qemcli.predictors import Predictor
    from qemcli.zoos.opening import open_zoo
    from qemcli.zoos.zoo import Zoo

    if twin and (module or not is_predictor(checkpoint)):
        raise UsageError(
            "--twin is of a predictor of ours", "leave out --twin, or see `qem models`"
        )
    if module:
        opened = open_zoo(zoo, sink.note, activation=activation)
        space, _ = next(opened.groups())
        flat = verification.networks(space, [opened], networks, activation)
        model = verification.module(module, Path(checkpoint)).to(check.dtype)
        groups = [group] if group else applicable(space)
        w = space.unflatten(flat.to(check.dtype))
        report = verification.verify_predictor(model, space, w, groups, groups, check)
        return report, {"module": module, "networks": len(flat)}
    if is_predictor(checkpoint):

        def seen(one: Predictor) -> Predictor:
            named = f"bad twin of {one.name}"
            made = replace(one, name=named, model=Twin(one.reader, one.space, check.seed))
            return made if twin else one

        predictor = Predictor.load(checkpoint)
        if predictor.others:
            zoos = _zoos(zoo, sink)
            report, tried = verification.verify_mixed(predictor, zoos, networks, group, check, seen)
            named = f"bad twin of {predictor.name}" if twin else predictor.name
            return report, {"predictor": named, "networks": sum(tried.values()), "tried": tried}
        predictor = seen(predictor)
        flat = verification.networks(predictor.space, _zoos(zoo, sink), networks, activation)
        report = verification.verify(predictor, flat, group, check)
        return report, {"predictor": predictor.name, "networks": len(flat)}
    space, flat = _one(Zoo.open(checkpoint, activation=activation))
    groups = [group] if group else applicable(space)
    w = space.unflatten(flat.to(check.dtype))
    return verification.verify_network(space, w, groups, check), {"checkpoint": checkpoint}


def _one(zoo: Zoo) -> tuple[WeightSpace, Tensor]:
    """(space, (n, D)) of the first networks that can be read; InputError where none can."""
    from qemcli.errors import InputError

    for space, flat, _ in zoo.load():
        return space, flat
    reasons = [f"{item['checkpoint']}: {item['reason']}" for item in zoo.failures[:1]]
    raise InputError(
        ": ".join([f"{zoo.path}: none of {len(zoo)} checkpoints can be read", *reasons])
    )


def _directory(
    folder: Path,
    group: str | None,
    activation: str | None,
    heads: int | None,
    check: Check,
    sink: Sink,
) -> tuple[Report, dict[str, object]]:
    """A checkpoint directory, run by the library it comes from; `--group` must hold."""
    from qemcli import proof
    from qemcli.directories import Directory
    from qemcli.errors import UnsupportedError
    from qemcli.groups import ALL, allowed, applicable
    from qemcli.testing import KINDS

    opened = Directory.open(folder, activation, heads)
    if group and (reason := allowed(group, opened.space)):
        raise UnsupportedError(f"group '{group}': {reason}", "`qem inspect` names those that hold")
    tried = [group] if group else [*applicable(opened.space), ALL]
    with sink.progress("running", len(tried) * check.draws * len(KINDS)) as advance:
        report = proof.verify_directory(opened, tried, check, advance)
    about = {"checkpoint": str(folder), "space": opened.space.title}
    return report, about | {"skipped": len(opened.space.skipped)}


def _zoos(given: str | None, sink: Sink) -> list:
    from qemcli.zoos.opening import open_zoo
    from qemcli.zoos.resolve import embedded

    if given:
        return [open_zoo(given, sink.note)]
    return [open_zoo(str(folder), sink.note) for folder in embedded()]
