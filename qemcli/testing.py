"""Symmetry tests for anybody's metanetwork: what `qem verify-invariance` runs, and our own suite.

A model is any callable from a batch of networks, dict of (b, *shape), to answers (b, outputs).
Errors are measured against the spread of the answers over the networks, not against their size: a
model that answers nearly the same to everything is not thereby invariant. Run it in eval mode and
in float64.

    element = elements("monomial", space, batch, generator)["ordinary"]
    error = invariance_error(model, space, w, element)      # (b,), to be below tolerance(...)
    control = sensitivity(model, space, w, generator)       # must not be
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qemcli import controls
from qemcli.errors import InconclusiveError
from qemcli.functions import respond
from qemcli.groups import Element, act, identity, sample
from qemcli.spaces import Transformer, WeightSpace, layered_of

Networks = Mapping[str, Tensor]
Model = Callable[[dict[str, Tensor]], Tensor]
Features = Sequence[tuple[Tensor, Tensor]]  # W (b, j, k, c*f) and bias (b, j, c) of every layer

ROUNDINGS = 1000  # rounding errors that may pile up in a layer's sums
NEAR = (0.999, 1.001)
ORDINARY = (0.1, 10.0)
EXTREME = (1.0, 1e4)  # uniform, the widest range of the papers
NUDGE = 1e-3  # how far a near element is from the identity, in heads
KINDS = ("near", "ordinary", "extreme")


def elements(
    name: str, space: WeightSpace, batch: int, generator: torch.Generator
) -> dict[str, Element]:
    """Elements of the group by KINDS: near the identity, of ordinary size, extreme.

    Near: scales in [0.999, 1.001] and, in every layer, two neurons that change places, one sign or
    one half turn, as far as the group has them; matrices in heads within 1e-3 of the identity.
    The scales of the others lie in [0.1, 10] (log-uniform) and U[1, 1e4]. Raises UnsupportedError
    where the group is no symmetry of these networks.
    """
    drawn = {
        kind: sample(name, space, batch, generator, scales)
        for kind, scales in zip(KINDS, (NEAR, ORDINARY, EXTREME), strict=True)
    }
    trial = sample(name, space, 64, torch.Generator().manual_seed(0))  # what the group has
    drawn["near"] = _nearest(drawn["near"], trial, space, generator)
    return drawn


def _nearest(g: Element, trial: Element, space: WeightSpace, generator: torch.Generator) -> Element:
    """The scales of `g` and, of the discrete parts that `trial` has, one neuron's a layer."""
    index, factor, turns = {}, {}, {}
    plain = identity(space, g.batch, generator.device)
    for axis, n in space.hidden.items():
        shape = (g.batch, 1)
        here = torch.randint(n, shape, generator=generator, device=generator.device)
        there = (here + 1) % n
        swapped = plain.index[axis].scatter(1, here, there).scatter(1, there, here)
        permutes = bool((trial.index[axis] != torch.arange(n)).any())
        index[axis] = swapped if permutes else plain.index[axis]
        one = torch.zeros_like(g.factor[axis], dtype=torch.bool).scatter(1, here, True)
        flips = bool((trial.factor[axis] < 0).any())
        factor[axis] = torch.where(one & flips, -g.factor[axis].abs(), g.factor[axis].abs())
        if axis in g.turns:
            turns[axis] = one.long()
    heads, matrix = _heads_nearest(g)
    shift = {axis: NUDGE * c for axis, c in g.shift.items()}
    return Element(heads | index, factor, turns, matrix, shift)


def _heads_nearest(g: Element) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(index, matrix) on the axes of heads and the stream: the last two change places; I + small.

    A group that holds A holds I + small A, whether matrices are free or commute with rotations. On
    the stream exp(S), S the skew part of R without what moves the vector of ones.
    """
    index, matrix = {}, {}
    for axis, p in g.index.items():
        if axis[0] in "kqrm":
            plain = torch.arange(p.shape[-1], device=p.device).expand_as(p).clone()
            index[axis] = torch.cat([plain[..., :-2], plain[..., -2:].flip(-1)], dim=-1)
    for axis, m in g.matrix.items():
        size = torch.linalg.matrix_norm(m, keepdim=True).clamp_min(torch.finfo(m.dtype).tiny)
        eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
        if axis[0] in "de":
            matrix[axis] = eye + NUDGE * m / size
        else:
            inner = eye - 1 / m.shape[-1]
            matrix[axis] = torch.linalg.matrix_exp(NUDGE * inner @ (m - m.mT) @ inner)
    return index, matrix


def answers(model: Model, w: Networks) -> Tensor:
    """The model's answers as (b, outputs), without gradients."""
    with torch.no_grad():
        found = model(dict(w))
    return found.reshape(len(found), -1)


def spread(found: Tensor) -> float:
    """How far answers (b, outputs) lie apart: the root mean square over outputs of their deviation.

    Raises InconclusiveError where there is nothing to measure against: fewer than two networks,
    answers that are not finite, or the same answer, to rounding, for every network.
    """
    if len(found) < 2:
        raise InconclusiveError(
            "one network has no spread of answers to compare with", "use --samples 2 or more"
        )
    if not found.isfinite().all():
        raise InconclusiveError("the model's answers are not finite numbers on these networks")
    apart = float(found.double().var(dim=0).mean().sqrt())
    if apart <= ROUNDINGS * torch.finfo(found.dtype).eps * float(found.abs().max()):
        raise InconclusiveError(
            "the model answers the same to every network: a constant proves nothing",
            "train it, or choose networks that differ",
        )
    return apart


def size(found: Tensor) -> float:
    """The largest answer over the spread: how many times its rounding weighs in an error."""
    return float(found.abs().max()) / spread(found)


def tolerance(dtype: torch.dtype, depth: int, size: float = 1.0) -> float:
    """The error that rounding explains: 1000 eps * depth * max(1, size).

    eps is the dtype's, depth the number of layers of the networks that are read (it stands for the
    model's, which is alike), size the largest answer over the spread of the answers. Depth 4 and
    size 2: 1.8e-12 in float64, 9.5e-4 in float32.
    """
    return ROUNDINGS * torch.finfo(dtype).eps * depth * max(1.0, size)


def invariance_error(model: Model, space: WeightSpace, w: Networks, element: Element) -> Tensor:
    """(b,): the largest change of each answer under the element, over the spread of the answers.

    An answer that is not finite after the move has an infinite error. Raises InconclusiveError as
    `spread` does.
    """
    return change(answers(model, w), answers(model, act(element, space, w)))


def change(before: Tensor, after: Tensor) -> Tensor:
    """(b,): the largest change of answers (b, outputs) over the spread of those before."""
    error = (after.double() - before.double()).abs().amax(dim=1) / spread(before)
    return torch.where(error.isfinite(), error, torch.full_like(error, torch.inf))


def equivariance_error(
    layer: Callable[[Features], Features],
    features: Features,
    move: Callable[[Features], Features],
    move_out: Callable[[Features], Features] | None = None,
) -> Tensor:
    """(b,): |layer(g x) - g layer(x)| over the size of g layer(x), the worst of all tensors.

    `move` is the element's action on features (layers.features.act_on_features with space and
    element bound), `move_out` that on the layer's output where it is another; size is the root mean
    square of a network's tensor, or where that is zero of the batch's.
    """
    with torch.no_grad():
        moved = layer(move(features))
        expected = (move_out or move)(layer(features))
    worst = []
    pairs = zip(moved, expected, strict=True)
    for found, wanted in (both for pair in pairs for both in zip(*pair, strict=True)):
        apart = (found - wanted).flatten(1).abs().amax(dim=1)
        own = wanted.flatten(1).square().mean(dim=1).sqrt()
        own = torch.where(own > 0, own, wanted.square().mean().sqrt())
        error = torch.where(apart == 0, torch.zeros_like(apart), apart / own)
        worst.append(torch.where(error.isnan(), torch.full_like(error, torch.inf), error))
    return torch.stack(worst).amax(dim=0)


def function_error(space: WeightSpace, w: Networks, moved: Networks, x: Tensor) -> Tensor:
    """(b,): how far the functions of `moved` are from those of `w` on inputs x: `relative_error` of
    their answers, run in float64 whatever the dtype in which they are stored."""
    return relative_error(*(_answers(space, each, x) for each in (w, moved)))


def relative_error(before: Tensor, after: Tensor) -> Tensor:
    """(b, p, outputs) twice -> (b,): the largest difference over the largest answer of each.

    0 where both answer zero throughout, inf where the difference is no number.
    """
    apart = (after - before).flatten(1).abs().amax(dim=1)
    error = torch.where(apart == 0, apart, apart / before.flatten(1).abs().amax(dim=1))
    return torch.where(error.isnan(), torch.full_like(error, torch.inf), error)


def _answers(space: WeightSpace, w: Networks, x: Tensor) -> Tensor:
    return respond(space, {k: v.double() for k, v in w.items()}, x.double())


def uncoupled(space: WeightSpace, w: Networks, generator: torch.Generator) -> dict[str, Tensor]:
    """A control in no symmetry group: every tensor's hidden axes are permuted on their own.

    A model that reads each tensor as a bag of numbers does not see it; see `unmatched`.
    """
    if isinstance(space, Transformer):
        return controls.uncoupled(space, w, generator)
    batch = len(w[space.tensors[0].name])
    moved = {}
    for t in space.tensors:
        if not any(axis.hidden for axis in t.axes):
            moved[t.name] = w[t.name]
            continue
        alone = replace(space, tensors=(t,))
        moved |= act(sample("permutation", space, batch, generator), alone, {t.name: w[t.name]})
    return moved


def unmatched(
    space: WeightSpace,
    w: Networks,
    generator: torch.Generator,
    scale_range: tuple[float, float] = ORDINARY,
) -> dict[str, Tensor]:
    """A control in no symmetry group: incoming weights scaled, outgoing ones left alone."""
    if isinstance(space, Transformer):
        return controls.unmatched(space, w, generator)
    batch, space = len(w[space.tensors[0].name]), layered_of(space, "this control")
    g = sample("scale", space.running("relu"), batch, generator, scale_range)
    moved = act(g, space, w)  # in which biases are as they should be
    for layer in space.layers:
        weight = w[layer.weight]
        factor = g.factor.get(space[layer.weight].axes[0].name)
        if factor is not None:
            row = factor.to(weight.device).reshape(batch, -1, *([1] * (weight.dim() - 2)))
            weight = (weight * row).to(weight.dtype)
        moved[layer.weight] = weight
    return moved


CONTROLS: dict[str, Callable[[WeightSpace, Networks, torch.Generator], dict[str, Tensor]]] = {
    "uncoupled": uncoupled,
    "unmatched": unmatched,
}


def sensitivity(
    model: Model, space: WeightSpace, w: Networks, generator: torch.Generator
) -> dict[str, Tensor]:
    """The change of each answer under each control, (b,), over the spread; one must be large.

    A network without hidden neurons has no controls: the dict is empty.
    """
    if not space.hidden:
        return {}
    before = answers(model, w)
    return {
        name: change(before, answers(model, control(space, w, generator)))
        for name, control in CONTROLS.items()
    }
