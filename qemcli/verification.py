"""Is it really invariant? A predictor under random group elements, or a network's own function
along its orbit.

Beside every answer stand the controls, moves that are in no symmetry group: a check that they
pass too proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qemcli.equivariance import steps
from qemcli.errors import InconclusiveError, InputError, UsageError
from qemcli.functions import probe_inputs
from qemcli.groups import act, allowed, applicable
from qemcli.layers.metanetwork import Metanetwork
from qemcli.layers.quasi import switched_off
from qemcli.layers.shown import Shown
from qemcli.predictors import Predictor
from qemcli.spaces import WeightSpace
from qemcli.testing import (
    CONTROLS,
    KINDS,
    answers,
    change,
    elements,
    function_error,
    size,
    tolerance,
)

if TYPE_CHECKING:
    from qemcli.zoos.zoo import Zoo

Networks = Mapping[str, Tensor]
Model = Callable[[dict[str, Tensor]], Tensor]
PLACES = (8, 8)  # where pictures are compared: two functions that differ, differ on every one
MOST = 12  # architectures that a predictor of many is tried on
VISIBLE = 100.0  # a control must move the answer by so many tolerances to count


@dataclass(frozen=True)
class Check:
    """samples: elements a group, shared out over near, ordinary and extreme; tolerance: None
    computes it."""

    samples: int = 32
    seed: int = 0
    dtype: torch.dtype = torch.float64
    tolerance: float | None = None

    @property
    def draws(self) -> int:
        return max(1, round(self.samples / len(KINDS)))


@dataclass
class Report:
    """Rows (group, kind, errors, tolerance, holds), the claims that were tested, and the verdict.

    `holds` is None on rows that are told and not judged (the leak of a quasi layer).
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    claimed: list[str] = field(default_factory=list)
    tolerance: float = 0.0
    controls: int = 1  # so many must be seen for a verdict

    @property
    def broken(self) -> list[str]:
        """Claimed groups that do not hold."""
        bad = {r["group"] for r in self.rows if r.get("claimed") and r["holds"] is False}
        return sorted(bad)

    @property
    def sensitive(self) -> bool:
        """True where controls moved the answer, so that the test could have failed."""
        return sum(r["kind"] == "control" and r["holds"] for r in self.rows) >= self.controls

    @property
    def code(self) -> int:
        """0 invariant as claimed, 1 not, 6 where nothing can be told."""
        return 1 if self.broken else 0 if self.sensitive and self.claimed else 6


def verify_predictor(
    model: Model,
    space: WeightSpace,
    w: Networks,
    claims: list[str],
    groups: list[str],
    check: Check,
) -> Report:
    """Invariance of `model(w)` under each group, with controls; `claims` are the groups that must
    hold.

    Raises InconclusiveError where the answers are constant over the networks: nothing can be told.
    """
    before = answers(model, w)
    limit = check.tolerance or tolerance(check.dtype, space.depth, size(before))
    report = Report(claimed=sorted(claims), tolerance=limit)
    for group in groups:
        report.rows += _orbit(model, space, w, before, group, group in claims, check, limit)
    for name, control in CONTROLS.items():
        generator = torch.Generator().manual_seed(check.seed)
        moved = change(before, answers(model, control(space, w, generator)))
        seen = float(moved.max()) > VISIBLE * limit
        report.rows.append(finding(name, "control", "-", moved, limit, seen, False))
    return report


def _orbit(
    model: Model,
    space: WeightSpace,
    w: Networks,
    before: Tensor,
    group: str,
    claimed: bool,
    check: Check,
    limit: float,
) -> Iterator[dict[str, Any]]:
    """One row for each size of element: the worst and the mean error over draws and networks."""
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for seed in range(check.seed, check.seed + check.draws):
        generator = torch.Generator().manual_seed(seed)
        for kind, g in elements(group, space, len(before), generator).items():
            found[kind].append(change(before, answers(model, act(g, space, w))))
    for kind, errors in found.items():
        stacked = torch.stack(errors)
        holds = bool(stacked.max() <= limit)
        row = finding(group, "invariance", kind, stacked, limit, holds, claimed)
        worst = int(stacked.amax(dim=1).argmax()) + check.seed
        yield row | {
            "worst_seed": worst,
            "reproduce": f"--group {group} --samples 1 --seed {worst}",
        }


def finding(
    group: str, kind: str, what: str, error: Tensor, limit: float, holds: bool, claimed: bool
) -> dict[str, Any]:
    return {
        "group": group,
        "kind": kind,
        "elements": what,
        "max_error": float(error.max()),
        "mean_error": float(error.mean()),
        "tolerance": limit,
        "holds": holds,
        "claimed": claimed,
    }


def layers(
    module: Metanetwork, space: WeightSpace, w: Networks, check: Check
) -> list[dict[str, Any]]:
    """Equivariance after every step of an architecture that shows its steps; [] for the others."""
    rows: list[dict[str, Any]] = []
    limit = tolerance(check.dtype, space.depth) * space.depth
    for group in sorted(module.claims(space)):
        generator = torch.Generator().manual_seed(check.seed)
        g = elements(group, space, len(next(iter(w.values()))), generator)["ordinary"]
        for name, error, strict in steps(module, space, w, g):
            holds = bool(error.max() <= limit)
            row = finding(group, "equivariance", "ordinary", error, limit, holds, True)
            # A quasi layer may move along the orbit by an element of its own: told, not judged.
            told = {} if strict else {"holds": None, "claimed": False}
            rows.append(row | {"layer": name} | told)
    return rows


def quasi_leak(predictor: Predictor, w: Networks) -> list[dict[str, Any]]:
    """The change that the quasi layer makes to the answers, over their spread; [] where there is
    none."""
    if getattr(predictor.metanetwork, "quasi", None) is None:
        return []
    with torch.no_grad(), switched_off(predictor.metanetwork):
        without = answers(predictor, w)
    moved = change(without, answers(predictor, w))
    row = finding(predictor.design.quasi, "leak", "-", moved, 0.0, False, False)
    return [row | {"tolerance": None, "holds": None}]


def verify_network(space: WeightSpace, w: Networks, groups: list[str], check: Check) -> Report:
    """A network's own function along its orbit, on probe inputs: one report row a group and size.

    Raises InputError where the network cannot be run (its activation is not known).
    """
    generator = torch.Generator().manual_seed(check.seed)
    x = probe_inputs(space, 32, generator, check.dtype)
    limit = check.tolerance or tolerance(check.dtype, space.depth)
    report = Report(claimed=sorted(groups), tolerance=limit)
    copies = {k: v.repeat(check.draws, *[1] * (v.dim() - 1)) for k, v in w.items()}
    for group in groups:
        drawn = elements(group, space, len(next(iter(copies.values()))), generator)
        for kind, g in drawn.items():
            error = function_error(space, copies, act(g, space, copies), x)
            holds = bool(error.max() <= limit)
            report.rows.append(finding(group, "function", kind, error, limit, holds, True))
    for name, control in CONTROLS.items():
        error = function_error(space, w, control(space, w, generator), x)
        seen = float(error.max()) > VISIBLE * limit
        report.rows.append(finding(name, "control", "-", error, limit, seen, False))
    return report


def verify(predictor: Predictor, flat: Tensor, group: str | None, check: Check) -> Report:
    """Everything about one of our predictors: orbits, layers, leak and controls.

    `flat` (n, D) are the networks it is tried on; `group` asks for one group, and then that is
    the claim.
    """
    space = predictor.space
    predictor.model.to(check.dtype).eval()
    w = space.unflatten(flat.to(check.dtype))
    claims = [group] if group else sorted(predictor.claims)
    tried = [group] if group else applicable(space)
    small = (
        predictor.model.drawn_at(*PLACES) if isinstance(predictor.model, Shown) else nullcontext()
    )
    with small:
        report = verify_predictor(predictor, space, w, claims, tried, check)
    report.rows += layers(predictor.metanetwork, space, w, check)
    report.rows += quasi_leak(predictor, w)
    return report


def verify_mixed(
    predictor: Predictor,
    zoos: list[Zoo],
    count: int,
    group: str | None,
    check: Check,
    seen: Callable[[Predictor], Predictor] = lambda one: one,
) -> tuple[Report, dict[str, int]]:
    """A predictor of many architectures on each of those in the zoos, MOST at most: the report of
    all of them, and how many networks of each it was tried on. What is verified is `seen` of it.

    Raises InconclusiveError where the zoos hold fewer than two networks of every architecture.
    """
    report = Report(controls=0)
    tried: dict[str, int] = {}
    having = ((s, f) for s, f in _met(predictor, zoos, count) if not group or not allowed(group, s))
    for space, flat in islice(having, MOST):
        one = verify(seen(predictor.on(space)), flat, group, check)
        report.rows += [row | {"architecture": space.title} for row in one.rows]
        report.claimed = sorted({*report.claimed, *one.claimed})
        report.tolerance = max(report.tolerance, one.tolerance)
        report.controls += one.controls
        tried[space.title] = tried.get(space.title, 0) + len(flat)
    if not tried:
        raise InconclusiveError(
            f"no architecture of '{predictor.name}' has two finite networks to try it on"
            f"{f' and the group {group}' if group else ''}",
            "give a --zoo that holds some",
        )
    return report, tried


def _met(predictor: Predictor, zoos: list[Zoo], count: int) -> Iterator[tuple[WeightSpace, Tensor]]:
    """The architectures that it was trained on, as far as the zoos hold two networks of each: at
    most `count` of them."""
    for zoo in zoos:
        for space, positions in zoo.groups():
            if not predictor.met(space):
                continue
            for theirs, flat, _ in zoo.load(positions[:count]):
                finite = flat[flat.isfinite().all(dim=1)]
                if len(finite) > 1:
                    yield theirs, finite


def networks(space: WeightSpace, zoos: list[Zoo], count: int, activation: str | None) -> Tensor:
    """(n, D): the first `count` finite networks of this weight space in the zoos.

    Raises InconclusiveError where fewer than two are there: one answer has no spread.
    """
    found: list[Tensor] = []
    for zoo in zoos:
        for theirs, flat, _ in zoo.batches(4 * count):
            if space.fits(theirs) and (activation or theirs.activation) in (None, space.activation):
                found.append(flat[flat.isfinite().all(dim=1)])
            if sum(map(len, found)) >= count:
                return torch.cat(found)[:count]
    have = sum(map(len, found))
    if have < 2:
        wanted = f"{space.family} {space.widths} {space.activation}"
        raise InconclusiveError(
            f"{have} finite networks of {wanted} to try it on", "give a --zoo that holds some"
        )
    return torch.cat(found)


def module(name: str, weights: Path | None) -> nn.Module:
    """A stranger's metanetwork: `package.module:factory` called without arguments, then its
    weights loaded.

    Raises UsageError where there is no such factory, InputError where the weights are not its own.
    """
    package, _, factory = name.partition(":")
    try:
        made = getattr(import_module(package), factory)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"--module {name}: {error}", "give package.module:factory") from None
    if weights is not None:
        from qemcli.checkpoints import open_checkpoint

        state = {k: torch.tensor(v) for k, v in open_checkpoint(weights).tensors().items()}
        try:
            made.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(f"{weights}: not the weights of {name}: {reason}") from None
    return made.eval()
