"""A checkpoint directory's function along its orbit, run by the library that it comes from.

The same random inputs go through the model as it is and as it was moved; beside the groups stand
controls, moves that are no symmetry and must be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qemcli.controls import controls
from qemcli.directories import Directory
from qemcli.errors import EnvironmentFailure
from qemcli.groups import Element, act
from qemcli.library import Library, answers
from qemcli.testing import elements, relative_error, tolerance
from qemcli.verification import VISIBLE, Check, Report, finding


@dataclass(frozen=True)
class Probe:
    """A directory's tensors, and what its model answers to random inputs."""

    directory: Directory
    library: Library
    stored: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    before: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, directory: Directory, generator: torch.Generator, dtype: torch.dtype) -> Probe:
        """Run the directory's model; errors as Library.of and Library.model."""
        library = Library.of(directory.path)
        inputs = library.inputs(generator, dtype)
        stored = directory.read()
        before = answers(library.model(dtype, _cast(stored, dtype)), inputs)
        return cls(directory, library, stored, inputs, before, dtype)

    def error(self, moved: Mapping[str, Tensor]) -> Tensor:
        """(1,): the largest change of an answer over the largest answer, of tensors (1, *shape)."""
        state = {**self.stored, **{name: x[0] for name, x in moved.items()}}
        after = answers(self.library.model(self.dtype, _cast(state, self.dtype)), self.inputs)
        return _apart(self.before, after)

    def error_of(self, folder: Path) -> float:
        """The same for another directory, as it lies on the disk."""
        model = Library.of(folder).model(self.dtype)
        return float(_apart(self.before, answers(model, self.inputs)))


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in state.items()}


def _apart(before: Tensor, after: Tensor) -> Tensor:
    return relative_error(before.double()[None], after.double()[None])


def verify_directory(
    directory: Directory,
    groups: list[str],
    check: Check,
    advance: Callable[[int], None] = lambda n: None,
) -> Report:
    """One row a group and size of element, the worst over draws; then the controls.

    Raises EnvironmentFailure where transformers is not installed, InputError where it cannot run
    the checkpoint.
    """
    generator = torch.Generator().manual_seed(check.seed)
    space, w = directory.space, directory.exact()
    probe = Probe.of(directory, generator, check.dtype)
    limit = check.tolerance or tolerance(check.dtype, space.depth)
    known = controls(space)
    report = Report(claimed=sorted(groups), tolerance=limit, controls=len(known))
    for group in groups:
        found: dict[str, list[Tensor]] = {}
        for _ in range(check.draws):
            for kind, g in elements(group, space, 1, generator).items():
                found.setdefault(kind, []).append(probe.error(act(g, space, w)))
                advance(1)
        for kind, errors in found.items():
            error = torch.cat(errors)
            holds = bool(error.max() <= limit)
            report.rows.append(finding(group, "function", kind, error, limit, holds, True))
    for name, control in known.items():
        error = probe.error(control(space, w, generator))
        seen = float(error.max()) > VISIBLE * limit
        report.rows.append(finding(name, "control", "-", error, limit, seen, False))
    return report


def probed(
    directory: Directory, seed: int, warn: Callable[[str], None] = lambda text: None
) -> Probe | None:
    """What copies of the directory are held against, in float64; None, with a warning, where the
    library is not installed. InputError where it cannot run the checkpoint."""
    try:
        return Probe.of(directory, torch.Generator().manual_seed(seed), torch.float64)
    except EnvironmentFailure as error:
        warn(f"the copies are not proven: {error.message} ({error.hint})")
        return None


def told(directory: Directory, out: Path, g: Element, probe: Probe | None) -> dict[str, Any]:
    """How far the function of a directory that was written is from that of its source.

    `function_error` is of the weights as they are stored, `function_error_float64` of the same move
    before rounding, both run in float64; NaN without a probe.
    """
    names = ("function_error", "function_error_float64")
    if probe is None:
        return dict.fromkeys(names, float("nan")) | {"tolerance": rounding(directory)}
    exact = probe.error(act(g, directory.space, directory.exact()))
    errors = (probe.error_of(out), float(exact))
    return dict(zip(names, errors, strict=True)) | {"tolerance": rounding(directory)}


def rounding(directory: Directory) -> float:
    """What rounding explains of an error: that of float32 and float64 as elsewhere; of 16 bits, in
    which every weight is off by eps / 2, 4 eps sqrt(depth)."""
    eps, dtype = max((torch.finfo(dtype).eps, str(dtype)) for dtype in directory.dtypes())
    depth = directory.space.depth
    if eps > torch.finfo(torch.float32).eps:
        return 4 * eps * depth**0.5
    return tolerance(torch.float64 if dtype == "torch.float64" else torch.float32, depth)
