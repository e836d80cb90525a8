"""Balance: the group element that carries a network to one point of its orbit, up to order.

Positive scales: the point of smallest norm. With t_l the log factors of layer l, t_0 = t_L = 0,

    t*(w) = argmin_t  sum_l ( |e^{t_l} W_l e^{-t_{l-1}}|^2 + |e^{t_l} b_l|^2 ),   B(w) = e^{t*(w)} w

is convex in t (Kempf and Ness); at the minimum a neuron's squared norm coming in is that going out.
Signs and half turns: a choice, layer after layer. Either way B(g w) = pi B(w) for g = (pi, d).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from qemcli.groups import Element, allowed, identity
from qemcli.spaces import Chain

TOLERANCE = 1e-13  # largest |log(out / in)| of a neuron that is left, but for two more sweeps
FAR = 300.0  # |log squared norm| times depth below which no exponential can overflow
FAINT = 1e-300  # a squared norm that counts as nothing beside the network's largest, 1
ROUNDING = 1e-12  # a sum this small beside its terms counts as zero

Pairs = list[tuple[Tensor, Tensor]]  # W (b, j, k, f) and bias (b, j) of every layer, float64


def balance(
    space: Chain, w: Mapping[str, Tensor], sweeps: int | None = None
) -> tuple[dict[str, Tensor], Element]:
    """The balanced networks and the element that carries `w` there; dtype of `w`, through float64.

    Homogeneous activations: the representative of smallest norm, to rounding (`sweeps` caps the
    sweeps over the layers). Odd ones: canonical signs, for SIRENs after the phase form, in which
    0 <= w0 b <= pi/2. Others: the networks as they are. Dead neurons (nothing comes in or, for
    scales, nothing goes out) have row, bias and column set to zero, the limit of the minimum; the
    function is the same. Networks with a weight that is not finite are left as they are.
    Raises InputError where `w` is not of this space.
    """
    space.check(w)
    pairs = [(weight.double(), bias.double()) for weight, bias in space.matrices(w)]
    element = identity(space, len(pairs[0][0]), pairs[0][0].device)
    scaled = allowed("scale", space) is None
    signed = allowed("sign", space) is None
    if not (scaled or signed) or not element.batch:
        return {t.name: w[t.name] for t in space.tensors}, element
    finite = torch.stack([x.flatten(1).isfinite().all(1) for pair in pairs for x in pair]).all(0)
    whole = bool(finite.all())
    if not whole:
        pairs = [(_kept(weight, finite), _kept(bias, finite)) for weight, bias in pairs]
    if scaled:
        pairs = _smallest(pairs, element, sweeps)
    if signed:
        pairs = _signed(space, pairs, element, torch.finfo(w[space.tensors[0].name].dtype).eps)
    moved = {k: v.to(w[k].dtype) for k, v in space.from_matrices(pairs).items()}
    if not whole:
        moved = {k: torch.where(_along(finite, v), v, w[k]) for k, v in moved.items()}
    return moved, element


def _along(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(-1, *([1] * (x.dim() - 1)))


def _kept(x: Tensor, finite: Tensor) -> Tensor:
    return torch.where(_along(finite, x), x, torch.zeros_like(x))


def _smallest(pairs: Pairs, element: Element, sweeps: int | None) -> Pairs:
    """The minimum over positive scales; its factors are written into `element`."""
    edges, biases = log_squares(pairs)
    alive = _alive(edges, biases)
    for l, live in enumerate(alive):
        edges[l] = edges[l].masked_fill(~live[:, :, None], -math.inf)
        edges[l + 1] = edges[l + 1].masked_fill(~live[:, None, :], -math.inf)
        biases[l] = biases[l].masked_fill(~live, -math.inf)
    u = minimise(edges, biases, sweeps)
    factors = [(0.5 * x).exp() for x in u]
    for (axis, _), factor in zip(element.factor.items(), factors, strict=True):
        element.factor[axis] = factor
    return _rescaled(pairs, factors, alive)


def _rescaled(pairs: Pairs, factors: list[Tensor], alive: list[Tensor]) -> Pairs:
    """Rows times factors, columns divided by them; dead rows and columns become zeros."""
    up = [f * live for f, live in zip(factors, alive, strict=True)]
    down = [live / f for f, live in zip(factors, alive, strict=True)]
    moved = []
    for l, (weight, bias) in enumerate(pairs):
        ratio = None
        if l < len(up):
            ratio, bias = up[l][:, :, None], bias * up[l]
        if l > 0:
            ratio = down[l - 1][:, None, :] * (1.0 if ratio is None else ratio)
        moved.append((weight if ratio is None else weight * ratio[..., None], bias))
    return moved


def log_squares(pairs: Pairs) -> tuple[list[Tensor], list[Tensor]]:
    """log of the squared norm of edges (b, j, k), taps summed, and of biases (b, j)."""
    edges = []
    for weight, _ in pairs:
        largest = weight.abs().amax(dim=3, keepdim=True)
        safe = torch.where(largest > 0, largest, torch.ones_like(largest))
        squares = (weight / safe).square().sum(dim=3)
        edges.append(squares.log() + 2 * safe[..., 0].log())
    return edges, [2 * bias.abs().log() for _, bias in pairs]


def _alive(edges: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    """(b, n) a hidden layer: reached from the inputs or a bias, and reaching the outputs."""
    links = [edge > -math.inf for edge in edges]
    alive, reached = [], torch.ones_like(links[0][:, 0])
    for link, bias in zip(links[:-1], biases[:-1], strict=True):
        reached = (link & reached[:, None, :]).any(dim=2) | (bias > -math.inf)
        alive.append(reached)
    reaching = torch.ones_like(links[-1][:, :, 0])
    for l in reversed(range(len(alive))):
        reaching = (links[l + 1] & reaching[:, :, None]).any(dim=1)
        alive[l] = alive[l] & reaching
    return alive


def minimise(edges: list[Tensor], biases: list[Tensor], sweeps: int | None = None) -> list[Tensor]:
    """u_l = 2 t*_l, each (b, n): the minimum by over-relaxed cyclic descent, layer after layer.

    Given the other layers, a neuron's part of the norm is a cosh in u, centred where in = out; so
    any step of omega < 2 times the way there lowers it, and the descent is global. At the minimum
    in = out makes the linearised sweep a symmetric random walk over the layers, absorbed at both
    ends (and at biases): Jacobi's radius is at most cos(pi / L) whatever the weights. Hence Young's
    best omega below, and an error that falls by omega - 1 a sweep (L = 4: 0.17).
    """
    depth = len(edges)
    omega = 2 / (1 + math.sin(math.pi / depth))
    left = sweeps if sweeps is not None else 200 + 50 * depth
    u = [torch.zeros_like(bias) for bias in biases[:-1]]
    far = _spread(edges, biases) > FAR / depth
    while far and left:
        far = _log_sweep(edges, biases, u, omega) > 1
        left -= 1
    near, bias_near = _rebased(edges, biases, u)
    v = [torch.ones_like(x) for x in u]
    calm = 0
    while left and calm < 3:
        calm = calm + 1 if _sweep(near, bias_near, v, omega) < TOLERANCE else 0
        left -= 1
    return [a + b.log() for a, b in zip(u, v, strict=True)]


def _spread(edges: list[Tensor], biases: list[Tensor]) -> float:
    """The largest |log squared norm|: beyond FAR, exponentials are summed with care."""
    logs = (x[x > -math.inf].abs() for x in [*edges, *biases] if x.numel())
    return max((float(x.max()) for x in logs if x.numel()), default=0.0)


def _rebased(
    edges: list[Tensor], biases: list[Tensor], u: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The squared norms at the point u, the largest of each network being 1."""
    near, bias_near = [], []
    for l, (edge, bias) in enumerate(zip(edges, biases, strict=True)):
        if l < len(u):
            edge, bias = edge + u[l][:, :, None], bias + u[l]
        near.append(edge - u[l - 1][:, None, :] if l else edge)
        bias_near.append(bias)
    top = torch.stack([edge.flatten(1).amax(dim=1) for edge in near]).amax(dim=0)
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    near = [(edge - top[:, None, None]).exp() for edge in near]
    return near, [(bias - top[:, None]).exp() for bias in bias_near]


def _sweep(edges: list[Tensor], biases: list[Tensor], v: list[Tensor], omega: float) -> float:
    """One pass over the hidden layers with v = e^u; returns the largest |log(out / in)| met."""
    worst, last = 0.0, len(v) - 1
    for l in range(len(v)):
        below = torch.einsum("bjk,bk->bj", edges[l], 1 / v[l - 1]) if l else edges[0].sum(dim=2)
        if l < last:
            above = torch.einsum("bij,bi->bj", edges[l + 1], v[l + 1])
        else:
            above = edges[l + 1].sum(dim=1)
        gap = ((above / v[l] + FAINT) / ((below + biases[l]) * v[l] + FAINT)).log()
        worst = max(worst, float(gap.abs().max()))
        v[l] = v[l] * (0.5 * omega * gap).exp()
    return worst


def _log_sweep(edges: list[Tensor], biases: list[Tensor], u: list[Tensor], omega: float) -> float:
    """The same pass in logs, for scales whose squares no float holds."""
    worst, last = 0.0, len(u) - 1
    for l in range(len(u)):
        below = edges[l] - u[l - 1][:, None, :] if l else edges[l]
        above = edges[l + 1] + u[l + 1][:, :, None] if l < last else edges[l + 1]
        incoming = torch.logaddexp(below.logsumexp(dim=2), biases[l]) + u[l]
        outgoing = above.logsumexp(dim=1) - u[l]
        # Dead neurons have neither: -inf on both sides, and stay where they are.
        gap = torch.where(incoming.isneginf(), torch.zeros_like(u[l]), outgoing - incoming)
        worst = max(worst, float(gap.abs().max()))
        u[l] = u[l] + 0.5 * omega * gap
    return worst


def _signed(space: Chain, pairs: Pairs, element: Element, digits: float) -> Pairs:
    """Canonical signs, layer after layer; where half turns are a symmetry, the phase form first.

    The choice, written into `element`, is made once the layer below has its own, and so does not
    depend on the signs with which that layer came.
    """
    turning = allowed("phase", space) is None
    moved = list(pairs)
    for l, axis in enumerate(space.hidden):
        weight, bias = moved[l]
        above, above_bias = moved[l + 1]
        keys = keys_of_signs(weight, None if turning else bias, above, l == 0, l + 2 == len(pairs))
        sign = column = first_sign(keys)
        if turning:
            phase, sign, turns = _phase_form(space.forward.w0 * bias / math.pi, sign, digits)
            element.turns[axis] = turns.long()
            bias = phase * math.pi / space.forward.w0
            column = sign * (1 - 2 * (turns % 2).abs())
        else:
            bias = bias * sign
        element.factor[axis] = element.factor[axis] * sign
        weight = weight * sign[:, :, None, None]
        live = (weight != 0).any(dim=3).any(dim=2) | (bias != 0)
        moved[l] = weight, bias
        moved[l + 1] = above * (column * live)[:, None, :, None], above_bias
    return moved


def keys_of_signs(
    weight: Tensor, bias: Tensor | None, above: Tensor, first: bool, last: bool
) -> list[Tensor]:
    """Odd functions of a neuron, in order of precedence; each is (b, j, terms), to be summed.

    The sum of its incoming weights and bias; of their cubes; its bias; its weights times the
    number of their tap (of their input, in the first layer); in the last hidden layer, its outgoing
    weights times the number of their output. None of them depends on the order of hidden neurons.
    """
    row = weight.flatten(2) if bias is None else torch.cat([weight.flatten(2), bias[..., None]], 2)
    size = row.abs().amax(dim=2, keepdim=True)
    row = row / torch.where(size > 0, size, torch.ones_like(size))
    keys = [row, row**3] if bias is None else [row, row**3, bias[..., None]]
    numbered = weight.flatten(2) if first else weight.sum(dim=2)
    keys.append(numbered * _counting(numbered))
    if last:
        leaving = above.transpose(1, 2).flatten(2)
        keys.append(leaving * _counting(leaving))
    return keys


def _counting(x: Tensor) -> Tensor:
    return torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)


def first_sign(keys: list[Tensor]) -> Tensor:
    """(b, j): the sign of the first key that is not zero to rounding; 1 where all are."""
    sign = torch.zeros_like(keys[0][..., 0])
    for terms in keys:
        total, size = terms.sum(dim=2), terms.abs().sum(dim=2)
        own = total.sign() * (total.abs() > ROUNDING * size)
        sign = torch.where(sign == 0, own, sign)
    return torch.where(sign == 0, torch.ones_like(sign), sign)


def _phase_form(phase: Tensor, other: Tensor, digits: float) -> tuple[Tensor, Tensor, Tensor]:
    """(phase in [0, 1/2], sign, turns) with new phase = sign * phase + turns, all in half turns.

    At the ends 0 and 1/2, which a sign flip (and a turn) leaves alone, the sign is `other`.
    """
    slack = 64 * digits * (4 + phase.abs())
    rest = phase - phase.round()
    zero, half = rest.abs() <= slack, rest.abs() >= 0.5 - slack
    sign = torch.where(zero | half | (rest == 0), other, rest.sign())
    turns = torch.where(half, (0.5 - sign * phase).round(), -sign * phase.round())
    new = torch.where(zero, torch.zeros_like(rest), rest.abs())
    return torch.where(half, torch.full_like(rest, 0.5), new), sign, turns
