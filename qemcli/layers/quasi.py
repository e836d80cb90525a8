"""Quasi layers: Q(x) = alpha(x) . E(x), a group element (or a scale a channel) put on the last
equivariant layer.

The theorem to keep in view. For E equivariant and ANY alpha: U -> G, Q is quasi-equivariant, Q(gx)
= [alpha(gx) g alpha(x)^-1] Q(x). If what follows is exactly G-invariant, then I(alpha(x) E(x)) =
I(E(x)): the layer changes no prediction and alpha gets no gradient. It can matter only where alpha
is not ONE element of G shared by all channels, or where the head is not exact. Each mode is a
class, and says what it keeps.

    scale of neuron j, channel c:   g_l[j, c] = 1 + eps sin(h_l[j, c]),      g_0 = g_L = 1
    W~_l[j,k] <- g_l[j] / g_{l-1}[k] W~_l[j,k]        b~_l[j] <- g_l[j] b~_l[j]

eps = BOUND tanh(rho), |eps| < BOUND < 1, so every g is positive and the layer invertible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qemcli.balance import balance
from qemcli.errors import UnsupportedError, UsageError
from qemcli.layers.features import Features, door, exit_door
from qemcli.layers.heads import Gated
from qemcli.layers.statistics import compressed, seven, tensor_statistics
from qemcli.registry import suggest
from qemcli.spaces import HOMOGENEOUS, ODD, Chain, WeightSpace, chain_of

BOUND = 0.999
MODES = ("none", "paper", "released", "exact")


class Strength(nn.Module):
    """One eps a hidden layer, kept below BOUND in size; a parameter where `learned`, else a
    buffer.
    """

    rho: Tensor

    def __init__(self, eps: float, layers: int, learned: bool) -> None:
        super().__init__()
        if not abs(eps) < BOUND:
            raise UsageError(
                f"the quasi layer's eps is {eps}", f"choose |eps| < {BOUND}: g must be positive"
            )
        rho = torch.full((layers,), math.atanh(eps / BOUND))
        if learned:
            self.rho = nn.Parameter(rho)
        else:
            self.register_buffer("rho", rho)

    def forward(self) -> Tensor:
        return BOUND * torch.tanh(self.rho)


def scaled(features: Features, scales: list[Tensor]) -> Features:
    """Put g_l (b, n_l, 1 or channels), one a hidden layer, on features of these channels."""
    out: Features = []
    for l, (weight, bias) in enumerate(features):
        channels = bias.shape[-1]
        entries = weight.unflatten(-1, (channels, -1))
        if l < len(scales):
            entries = entries * scales[l][:, :, None, :, None]
            bias = bias * scales[l]
        if l > 0:
            entries = entries / scales[l - 1][:, None, :, :, None]
        out.append((entries.flatten(-2), bias))
    return out


class Paper(nn.Module):
    """The paper's text (B.1): one group element shared by all channels, from 7 statistics of each
    tensor.

    alpha(x) lies in G, so under an exactly invariant head (Monomial-NFN, ReLU) this layer is a
    NO-OP: predictions are those without it and its parameters get no gradient; a test asserts it.
    Under a head that is permutation-invariant only (HNP, NP) it changes predictions and loses even
    permutation invariance, because g_l[j] is tied to the neuron's index; for tanh and sine g > 0 is
    not in G at all. Parameters: 4 (14 L + 1) 16 + 33 n_l a hidden layer, and one eps.
    """

    keeps_invariance = False  # without an exact head

    def __init__(self, space: Chain, eps: float, learned: bool) -> None:
        super().__init__()
        self.space = space
        hidden = list(space.hidden.values())
        self.maps = nn.ModuleList(Gated(7 * len(space.tensors), n) for n in hidden)
        self.eps = Strength(eps, len(hidden), learned)

    def scales(self, w: Mapping[str, Tensor]) -> list[Tensor]:
        """alpha(x): one (b, n_l, 1) a hidden layer."""
        phi = tensor_statistics(self.space, w)
        return [
            (1 + e * torch.sin(h(phi)))[..., None]
            for e, h in zip(self.eps(), self.maps, strict=True)
        ]

    def forward(self, w: Mapping[str, Tensor], before: Features, after: Features) -> Features:
        return scaled(after, self.scales(w))


class _ReleasedMap(nn.Module):
    """Linear, layer norm, GELU, times sigmoid(Linear), Linear: statistics (b, c, p) -> (b, c,
    n).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.value, self.norm = nn.Linear(inputs, 32), nn.LayerNorm(32)
        self.gate, self.out = nn.Linear(32, 32), nn.Linear(32, outputs)

    def forward(self, p: Tensor) -> Tensor:
        u = nn.functional.gelu(self.norm(self.value(p)))
        return self.out(u * torch.sigmoid(self.gate(u)))


class Released(nn.Module):
    """What the paper's released code does (reconstructed from its description): a scale for every
    CHANNEL.

    The features that enter the last equivariant layer are mixed to its output channels; 7
    statistics of the weights, 7 of the biases, mean and median absolute deviation of all,
    layer-normalised, 16 (L-1) in all. The channel-normalising head does not cancel it, so it
    changes predictions; and since the statistics are not invariant and the scale is tied to the
    neuron's index, permutation AND scale invariance are lost, by an error that grows with eps. Adds
    9,906 parameters on the CNN zoo (16 -> 5 channels): 254,619 -> 264,525.
    """

    keeps_invariance = False

    def __init__(self, space: Chain, c_in: int, c_out: int, eps: float, learned: bool) -> None:
        super().__init__()
        hidden = list(space.hidden.values())
        self.mixing = nn.ModuleList(nn.Linear(c_in, c_out) for _ in hidden)
        self.maps = nn.ModuleList(_ReleasedMap(16 * len(hidden), n) for n in hidden)
        self.eps = Strength(eps, len(hidden), learned)

    def _statistics(self, mixing: nn.Module, weight: Tensor, bias: Tensor) -> Tensor:
        """(b, c_out, 16) of one layer."""
        b, channels = len(bias), bias.shape[-1]
        entries = weight.unflatten(-1, (channels, -1)).transpose(-1, -2)
        weights = mixing(entries).reshape(b, -1, self.mixing[0].out_features).transpose(1, 2)
        biases = mixing(bias).transpose(1, 2)
        both = torch.cat([weights, biases], dim=-1)
        middle = both.median(-1, keepdim=True).values
        spread = (both - middle).abs().median(-1).values
        parts = [seven(weights), seven(biases), both.mean(-1, keepdim=True), spread[..., None]]
        joined = torch.cat(parts, dim=-1)
        return nn.functional.layer_norm(joined, joined.shape[-1:])

    def forward(self, w: Mapping[str, Tensor], before: Features, after: Features) -> Features:
        pairs = zip(self.mixing, before[:-1], strict=True)
        phi = torch.cat([self._statistics(mix, *pair) for mix, pair in pairs], dim=-1)
        scales = [
            (1 + e * torch.sin(h(phi))).transpose(1, 2)
            for e, h in zip(self.eps(), self.maps, strict=True)
        ]
        return scaled(after, scales)


class Exact(nn.Module):
    """Ours: a scale for every neuron and channel, from features that are themselves invariant.

    u(x) is the input carried to its balanced representative (homogeneous activations: u(gx) = pi
    u(x)), its absolute values (odd ones), or the input itself (no diagonal group is known).
    alpha[j, c] is one map, shared by the neurons of a layer, of what neuron j reads and writes in u
    and of 7 statistics of each tensor of u: so alpha(gx) = pi alpha(x), and Q(gx) = g Q(x)
    strictly. Keeps every invariance that the architecture has without it, and changes predictions:
    through the channels the magnitudes of the balanced network reach a head that normalises them
    away.
    """

    keeps_invariance = True

    def __init__(self, space: Chain, c_out: int, eps: float, learned: bool) -> None:
        super().__init__()
        self.space = space
        reads = 9 + 7 * len(space.tensors)
        self.maps = nn.ModuleList(Gated(reads, c_out) for _ in space.hidden)
        self.eps = Strength(eps, len(self.maps), learned)

    def scales(self, w: Mapping[str, Tensor]) -> list[Tensor]:
        """One (b, n_l, c_out) a hidden layer."""
        u = invariant(self.space, w)
        phi = tensor_statistics(self.space, u)[:, None]
        pairs = self.space.matrices(u)
        scales = []
        for l, (e, h) in enumerate(zip(self.eps(), self.maps, strict=True)):
            (weight, bias), (following, _) = pairs[l], pairs[l + 1]
            own = torch.cat(
                [bias[..., None], _moments(weight.flatten(2)), _outgoing(following)], dim=-1
            )
            p = torch.cat([own, phi.expand(-1, own.shape[1], -1)], dim=-1)
            scales.append(1 + e * torch.sin(h(compressed(p))))
        return scales

    def forward(self, w: Mapping[str, Tensor], before: Features, after: Features) -> Features:
        return scaled(after, self.scales(w))


def _moments(rows: Tensor) -> Tensor:
    """(b, n, entries) -> (b, n, 4): mean, root mean square, least and largest."""
    # The gradient of a vector norm is 0 at 0, that of a square root is not finite.
    size = torch.linalg.vector_norm(rows, dim=-1) / rows.shape[-1] ** 0.5
    return torch.stack([rows.mean(-1), size, rows.amin(-1), rows.amax(-1)], dim=-1)


def _outgoing(weight: Tensor) -> Tensor:
    """`_moments` of the columns of W (b, j, k, f): (b, k, 4)."""
    return _moments(weight.transpose(1, 2).flatten(2))


def invariant(space: Chain, w: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """u(x), on which the diagonal group no longer acts: only a permutation is left."""
    if space.activation in HOMOGENEOUS:
        w = balance(space, w)[0]
    if space.activation in ODD:
        w = {name: x.abs() for name, x in w.items()}
    return w


Layer = Paper | Released | Exact


def keeps(layer: Layer | None) -> bool:
    """True where a permutation-equivariant map stays one with the layer behind it."""
    return layer is None or layer.keeps_invariance


def refuse_many(mode: str) -> None:
    """UnsupportedError for a quasi layer over many architectures."""
    if mode != "none":
        raise UnsupportedError(
            "a quasi layer belongs to one architecture, and these are many",
            "use --quasi balanced or none",
        )


def entered(
    layer: Layer | None, space: WeightSpace, w: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """alpha(w) . w: the layer behind the identity map, on the networks' own weights."""
    if layer is None:
        return w
    chain = chain_of(space, "this quasi layer")
    h = door(chain, w)
    return exit_door(chain, layer(w, h, h))


def make(
    mode: str, space: WeightSpace, c_in: int, c_out: int, eps: float, learned: bool
) -> Layer | None:
    """The quasi layer of a mode, for a last equivariant layer of c_in -> c_out channels; None for
    `none`.

    Raises UnsupportedError for networks that are no chains, UsageError for an unknown mode.
    """
    if mode in MODES[1:] and not isinstance(space, Chain):
        raise UnsupportedError(
            f"the quasi layer '{mode}' is for MLPs, CNNs and SIRENs; these networks are "
            f"{space.title}",
            "use --quasi balanced, which stands in front of any architecture, or none",
        )
    if mode == "none":
        return None
    if mode == "paper":
        return Paper(chain_of(space, mode), eps, learned)
    if mode == "released":
        return Released(chain_of(space, mode), c_in, c_out, eps, learned)
    if mode == "exact":
        return Exact(chain_of(space, mode), c_out, eps, learned)
    hint = "'balanced' stands in front of a predictor, not inside an architecture"
    raise UsageError(
        f"no quasi layer is called '{mode}'",
        hint if mode == "balanced" else suggest(mode, list(MODES)),
    )


@contextmanager
def switched_off(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its quasi layer taken out (eps = 0), for the length of a `with` block."""
    layer = model.quasi
    model.quasi = None  # type: ignore[assignment]  # a module or nothing
    try:
        yield model
    finally:
        model.quasi = layer


def leak(model: nn.Module, w: Mapping[str, Tensor]) -> Tensor:
    """(b, outputs): how far the quasi layer moves the answers, with minus without."""
    answer = model(w)
    with switched_off(model):
        return answer - model(w)
