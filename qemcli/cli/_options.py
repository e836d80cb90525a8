"""Options that mean the same on every command."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Device(StrEnum):
    """Where tensors are computed."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
OutFile = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Also write the rows here: .csv, .parquet or .json."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but the answer.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same bytes.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to compute.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Networks at a time.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes; 0: one a core.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most so many checkpoints.")]
Where = Annotated[
    str | None,
    typer.Option(
        "--where", help="Filter over the index, e.g. \"lr < 0.1 and activation == 'relu'\"."
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first bad checkpoint.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an earlier run was cut off.")]
Activation = Annotated[
    str | None,
    typer.Option("--activation", help="The networks' activation, where no file says it."),
]
Heads = Annotated[
    int | None,
    typer.Option("--heads", min=1, help="Transformers: attention heads, where no config says it."),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="DANGER: run pickles, each once in a confined process; keeps FILE.safetensors beside.",
    ),
]
W0 = Annotated[
    float | None, typer.Option("--w0", help="SIRENs: w0 of sin(w0 z), where no file says it.")
]
Convention = Annotated[
    str | None,
    typer.Option("--convention", help="SIRENs: nfn or dws (axes, levels), where no file says it."),
]


def device(choice: Device) -> str:
    """`auto` is CUDA where torch sees it, else the CPU."""
    import torch

    if choice is Device.auto:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if choice is Device.cuda and not torch.cuda.is_available():
        from qemcli.errors import EnvironmentFailure

        raise EnvironmentFailure("--device cuda: torch sees no CUDA device", "use --device cpu")
    return choice.value
