"""Balance of networks with residual sums: one point of the orbit, up to the order of neurons.

Layers that are added to each other have one factor a neuron, so neurons are the nodes of a graph:
with u = 2 t the log squares of the factors, S, s and t the squared norms of what leads from neuron
to neuron, from inputs and biases, and to the outputs,

    u* = argmin_u  sum_jk S_jk e^{u_j - u_k} + sum_j s_j e^{u_j} + sum_k t_k e^{-u_k}

which is convex, as a chain's is (balance.py); a weight from a neuron to itself does not change and
has no part in it. Steps of half the way on all neurons at once never raise the sum, by convexity
of the exponential; near the minimum Newton's method ends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qemcli.balance import TOLERANCE, first_sign, keys_of_signs, log_squares
from qemcli.groups import Element, allowed, identity
from qemcli.spaces import Residual

FAR = 1.0  # largest |log(out / in)| with which Newton's method begins
SWEEPS, STEPS = 2000, 60  # at most so many of either
LONGEST = 2.0  # of one Newton step in u

Pairs = list[tuple[Tensor, Tensor]]  # W (b, j, k, f) and bias (b, j) of every layer, float64


def balance_residual(space: Residual, w: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Element]:
    """The balanced networks and the element that carries `w` there, as `balance.balance` gives them
    for chains; dtype of `w`, through float64.

    Dead neurons, which no input or bias reaches or (for scales) which reach no output, are set to
    zero. Networks with a weight that is not finite are left as they are. Raises InputError where
    `w` is not of this space.
    """
    space.check(w)
    pairs = [(weight.double(), bias.double()) for weight, bias in space.matrices(w)]
    element = identity(space, len(pairs[0][0]), pairs[0][0].device)
    scaled, signed = (allowed(group, space) is None for group in ("scale", "sign"))
    if not (scaled or signed) or not element.batch:
        return {t.name: w[t.name] for t in space.tensors}, element
    finite = torch.stack([x.flatten(1).isfinite().all(1) for pair in pairs for x in pair]).all(0)
    pairs = [(_where(finite, weight), _where(finite, bias)) for weight, bias in pairs]
    graph = _Graph.of(space, pairs)
    alive = graph.alive() if scaled else graph.reached()
    factors = torch.zeros_like(graph.source)
    if scaled:
        factors = (0.5 * minimise(graph.among(alive))).exp()
        pairs = _moved(space, pairs, graph.parts(factors), graph.parts(alive))
        element.factor.update(graph.parts(factors))
    else:
        ones = torch.ones_like(factors)
        pairs = _moved(space, pairs, graph.parts(ones), graph.parts(alive))
    if signed:
        pairs = _signed(space, pairs, element)
    moved = {}
    for layer, (weight, bias) in zip(space.layers, pairs, strict=True):
        moved[layer.weight] = weight.reshape(w[layer.weight].shape)
        if layer.bias:
            moved[layer.bias] = bias
    kept = {k: torch.where(_along(finite, v), v, w[k].double()) for k, v in moved.items()}
    return {k: v.to(w[k].dtype) for k, v in kept.items()}, element


def _along(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(-1, *([1] * (x.dim() - 1)))


def _where(finite: Tensor, x: Tensor) -> Tensor:
    return torch.where(_along(finite, x), x, torch.zeros_like(x))


@dataclass(frozen=True)
class _Graph:
    """Logs of squared norms: `edges` (b, N, N) into row from column, `source` and `sink` (b, N);
    -inf where nothing leads. `places` are the neurons of each axis among the N."""

    edges: Tensor
    source: Tensor
    sink: Tensor
    places: dict[str, slice]

    @classmethod
    def of(cls, space: Residual, pairs: Pairs) -> _Graph:
        places, count = {}, 0
        for axis, n in space.hidden.items():
            places[axis] = slice(count, count + n)
            count += n
        squares, biases = log_squares(pairs)
        edges = torch.full((len(biases[0]), count, count), -torch.inf).to(biases[0])
        source, sink = edges[:, :, 0].clone(), edges[:, :, 0].clone()
        written = zip(squares, biases, space.axes, ("x", *space.axes), strict=False)
        for square, bias, row, col in written:
            if row == "y" or col == "x":
                ends, place = (sink, places.get(col)) if row == "y" else (source, places[row])
                if place is not None:
                    total = square.logsumexp(dim=1 if row == "y" else 2)
                    ends[:, place] = torch.logaddexp(ends[:, place], total)
            else:
                at = (slice(None), places[row], places[col])
                edges[at] = torch.logaddexp(edges[at], square)
            if row != "y":
                source[:, places[row]] = torch.logaddexp(source[:, places[row]], bias)
        return cls(edges, source, sink, places)

    def parts(self, x: Tensor) -> dict[str, Tensor]:
        """(b, N) by axis."""
        return {axis: x[:, place] for axis, place in self.places.items()}

    def reached(self) -> Tensor:
        """(b, N): neurons to which an input or a bias leads."""
        return _spread(self.edges > -torch.inf, self.source > -torch.inf)

    def alive(self) -> Tensor:
        """(b, N): those of them that lead to an output."""
        back = (self.edges > -torch.inf).transpose(1, 2)
        return self.reached() & _spread(back, self.sink > -torch.inf)

    def among(self, alive: Tensor) -> _Graph:
        """The graph of these neurons alone, without what leads from a neuron to itself."""
        itself = torch.eye(alive.shape[1], dtype=torch.bool, device=alive.device)
        cut = ~(alive[:, :, None] & alive[:, None, :]) | itself
        return _Graph(
            self.edges.masked_fill(cut, -torch.inf),
            self.source.masked_fill(~alive, -torch.inf),
            self.sink.masked_fill(~alive, -torch.inf),
            self.places,
        )


def _spread(links: Tensor, seen: Tensor) -> Tensor:
    """What is seen, and all that links (row from column) lead to."""
    while True:
        more = seen | (links & seen[:, None, :]).any(dim=2)
        if torch.equal(more, seen):
            return seen
        seen = more


def minimise(graph: _Graph) -> Tensor:
    """u* (b, N); 0 for neurons that nothing leads to."""
    u = torch.zeros_like(graph.source)
    for _ in range(SWEEPS):
        into = torch.logaddexp((graph.edges - u[:, None, :]).logsumexp(2), graph.source) + u
        out = torch.logaddexp((graph.edges + u[:, :, None]).logsumexp(1), graph.sink) - u
        gap = torch.where(into.isneginf(), torch.zeros_like(u), out - into)
        if u.numel() == 0 or float(gap.abs().max()) < FAR:
            break
        u = u + gap / 4  # half of the way to where in = out
    calm = 0
    for _ in range(STEPS):
        step, left = _newton(graph, u)
        calm = calm + 1 if left < TOLERANCE else 0
        if calm > 1:
            break
        u = u + step
    return u


def _newton(graph: _Graph, u: Tensor) -> tuple[Tensor, float]:
    """Newton's step (b, N), shortened where it is long, and the largest |log(out / in)|."""
    level = torch.stack(
        [(graph.edges + u[:, :, None] - u[:, None, :]).amax((1, 2)), (graph.source + u).amax(1)]
    ).amax(0)
    level = torch.where(level.isfinite(), level, torch.zeros_like(level))[:, None]
    flow = (graph.edges + u[:, :, None] - u[:, None, :] - level[:, None]).exp()
    into = flow.sum(2) + (graph.source + u - level).exp()
    out = flow.sum(1) + (graph.sink - u - level).exp()
    live = (into > 0) & (out > 0)
    root = torch.where(live, (into + out).clamp_min(1e-300).rsqrt(), torch.zeros_like(into))
    # The Hessian, with ones on its diagonal: it stays well conditioned whatever the scales are.
    hessian = -root[:, :, None] * (flow + flow.transpose(1, 2)) * root[:, None, :]
    hessian.diagonal(dim1=1, dim2=2).add_(1.0)
    step = root * torch.linalg.solve(hessian, (root * (out - into))[..., None])[..., 0]
    longest = step.abs().amax(1, keepdim=True)
    step = step * (LONGEST / longest.clamp_min(LONGEST))
    gaps = torch.where(live, (out / into).log(), torch.zeros_like(into))
    return step, float(gaps.abs().max())


def _moved(
    space: Residual, pairs: Pairs, factors: Mapping[str, Tensor], alive: Mapping[str, Tensor]
) -> Pairs:
    """Rows times factors, columns divided by them; those of dead neurons become zeros."""
    moved = []
    for (weight, bias), row, col in zip(pairs, space.axes, ("x", *space.axes), strict=False):
        if row in factors:
            factor = factors[row] * alive[row]
            weight, bias = weight * factor[:, :, None, None], bias * factor
        if col in factors:
            weight = weight * (alive[col] / factors[col])[:, None, :, None]
        moved.append((weight, bias))
    return moved


def _signed(space: Residual, pairs: Pairs, element: Element) -> Pairs:
    """Canonical signs, axis after axis, by the first layer that writes it: what that layer reads
    has its own signs by then. Where its row is zero, the biases of the later ones decide."""
    for axis in space.hidden:
        own = [l for l, row in enumerate(space.axes) if row == axis]
        weight, bias = pairs[own[0]]
        last = space.axes[-2] == axis
        keys = keys_of_signs(weight, bias, pairs[-1][0], own[0] == 0, last)
        sign = first_sign([*keys, *(pairs[l][1][..., None] for l in own[1:])])
        element.factor[axis] = element.factor[axis] * sign
        pairs = _moved(space, pairs, {axis: sign}, {axis: torch.ones_like(sign)})
    return pairs
