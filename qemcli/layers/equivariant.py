"""Linear maps of weight spaces that commute with neuron permutations: NP and HNP.

Zhou et al., Permutation Equivariant Neural Functionals, arXiv:2302.14040. With r_l[k] = mean_j
W_l[j,k], q_l[j] = mean_k W_l[j,k], and s the vector of all means,

    W~_l[j,k] = A_l W_l[j,k] + S_l s + R_l U_l(k) + K_l V_l(j)          b~_l[j] = T_l V_l(j) + Z_l s

Everything that neuron i of a hidden layer sees, [b | left: W_l or q_l | right: r_{l+1} or W_{l+1}],
goes through ONE matrix to everything that is written along that neuron; everything global through
one matrix more.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from qemcli.errors import UsageError
from qemcli.layers.features import Features, require_hidden
from qemcli.layers.neurons import Global, Neurons, mean, mix, seen, uniform
from qemcli.registry import suggest
from qemcli.spaces import Chain

LINEAR = ("hnp", "hnp-full", "np-posemb", "np")


class NPLinear(nn.Module):
    """The linear maps that commute with permutations of ALL neurons, inputs and outputs included
    (NP).

    `io_embedding` adds learned codes of inputs and outputs first (NP-PosEmb): then only
    permutations of the hidden neurons commute. Features of c_in channels -> features of c_out
    channels. Source: arXiv:2302.14040, section 3 and appendix.
    """

    def __init__(self, space: Chain, c_in: int, c_out: int, io_embedding: bool = False) -> None:
        super().__init__()
        require_hidden(space, "an NP layer")
        taps = [la.taps for la in space.layers]
        self.taps, self.c_out, self.io_embedding = taps, c_out, io_embedding
        f = [0, *taps, 0]
        n = len(taps)
        along = [1 if i else 0 for i in range(n + 1)]  # the inputs have no bias
        self.neurons = nn.ModuleList(
            Neurons(
                (along[i] * c_in, f[i] * c_in, f[i + 1] * c_in),
                (along[i] * c_out, f[i] * c_out, f[i + 1] * c_out),
            )
            for i in range(n + 1)
        )
        self.pointwise = nn.ParameterList(torch.empty(t * c_out, t * c_in) for t in taps)
        widths = [width for t in taps for width in (c_out, t * c_out)]
        self.everything = Global((n + sum(taps)) * c_in, widths, [1, 3] * n)
        if io_embedding:
            first, last = space.layers[0], space.layers[-1]
            self.inputs = nn.Parameter(torch.randn(first.cols, first.taps * c_in))
            self.outputs = nn.Parameter(torch.randn(last.rows, 1, last.taps * c_in))
            self.output_bias = nn.Parameter(torch.randn(last.rows, c_in))
        self._init(c_in)

    def _init(self, c_in: int) -> None:
        every = self.everything.weight.shape[1]
        read = [sum(neurons.reads) for neurons in self._sets()]
        bias_fans, weight_fans = [0], [0]
        for l, t in enumerate(self.taps, start=1):
            bias_fans.append(read[l] + every)
            weight_fans.append(t * c_in + every + read[l - 1] + read[l])
            uniform(self.pointwise[l - 1], weight_fans[l])
        self.everything.init(
            [x for pair in zip(bias_fans, weight_fans, strict=True) for x in pair][2:]
        )
        for i, neurons in enumerate(self._sets()):
            right = weight_fans[i + 1] if i < len(self.taps) else 0
            neurons.init((bias_fans[i], weight_fans[i], right))

    def forward(self, features: Features) -> Features:
        if self.io_embedding:
            features = self._embedded(features)
        entries, q, r = zip(*(seen(w) for w, _ in features), strict=True)
        s = torch.cat([mean(x, 1) for x in q] + [mean(b, 1) for _, b in features], dim=-1)
        constant = self.everything(s)
        bias_in: list[list[Tensor]] = [[], *([b] for _, b in features)]
        left_in: list[list[Tensor]] = [[], *([x] for x in q)]
        right_in: list[list[Tensor]] = [*([x] for x in r), []]
        written = [
            neurons(torch.cat(b + left + right, dim=-1))
            for neurons, b, left, right in zip(
                self._sets(), bias_in, left_in, right_in, strict=True
            )
        ]
        out = []
        for l, (x, theta) in enumerate(zip(entries, self.pointwise, strict=True), start=1):
            bias, left, _ = written[l]
            left = left + constant[2 * l - 1][:, None]
            y = mix(x, theta, left, written[l - 1][2])
            out.append((y, bias + constant[2 * l - 2][:, None]))
        return out

    def _sets(self) -> list[Neurons]:
        return [n for n in self.neurons if isinstance(n, Neurons)]

    def _embedded(self, features: Features) -> Features:
        (first, bias), *middle, (last, last_bias) = features
        head = (first + self.inputs, bias)
        return [head, *middle, (last + self.outputs, last_bias + self.output_bias)]


class HNPLinear(nn.Module):
    """The linear maps that commute with permutations of the hidden neurons (HNP).

    Inputs and outputs of the network are ordinary feature axes, folded into the channels of the
    first and the last weight. `full_basis` adds the map from b_{L-1} to W_L that the published
    layer lacks (its span is n_L short of the commutant). Needs L >= 2. Source: arXiv:2302.14040,
    appendix; counts as in PyPI's nfn 0.1.2.
    """

    def __init__(self, space: Chain, c_in: int, c_out: int, full_basis: bool = False) -> None:
        super().__init__()
        require_hidden(space, "an HNP layer")
        layers, self.full_basis = space.layers, full_basis
        self.n0, self.n_out, self.c_in, self.c_out = layers[0].cols, layers[-1].rows, c_in, c_out
        size = [la.taps for la in layers]  # features of an entry that a neuron sees, per channel
        size[0], size[-1] = size[0] * self.n0, size[-1] * self.n_out
        self.depth, self.width = len(layers), size
        m = c_out
        self.neurons = nn.ModuleList(
            Neurons((c_in, a * c_in, b * c_in), (m, a * m, b * m)) for a, b in pairwise(size[:-1])
        )
        a, b = size[-2:]
        self.neurons.append(Neurons((c_in, a * c_in, b * c_in), (m, a * m, 0)))
        skipped = 0 if full_basis else c_in
        self.final = nn.Parameter(torch.empty(b * m, (a + b) * c_in + c_in - skipped))
        self.pointwise = nn.ParameterList(torch.empty(t * m, t * c_in) for t in size[1:-1])
        # Redundant: means of what is read in full anyway.
        self.first_mean = nn.Parameter(torch.empty(size[1] * m, layers[0].taps * c_in))
        self.last_mean = nn.Parameter(torch.empty((1 + a) * m, layers[-1].taps * c_in))
        reads = sum(la.taps for la in layers) + len(layers) + size[0] + size[-1] + self.n_out
        widths = [x for t in size[:-1] for x in (m, t * m)] + [size[-1] * m, self.n_out * m]
        copies = [1, 1, *([1, 3] * (len(layers) - 2)), 1, 0]
        self.everything = Global(reads * c_in, widths, copies)
        self._init()

    def _init(self) -> None:
        every, c = self.everything.weight.shape[1], self.c_in
        last = len(self.neurons) - 1
        # What V_l(j) and U_{l+1}(k) of each hidden layer read, redundant means included.
        rows = [sum(n.reads) for n in self._sets()]
        cols = list(rows)
        rows[last] += self.last_mean.shape[1]
        cols[0] += self.first_mean.shape[1]
        cols[last] -= 0 if self.full_basis else c
        bias_fans = [fan + every for fan in rows]
        weight_fans = [rows[0]]  # the first pair is left at torch's default by the published code
        for l, theta in enumerate(self.pointwise, start=1):
            weight_fans.append(theta.shape[1] + every + rows[l] + cols[l - 1])
            uniform(theta, weight_fans[l])
        weight_fans.append(cols[last] + every)
        fans = [x for pair in zip(bias_fans, weight_fans, strict=False) for x in pair]
        fans += [weight_fans[-1], every]
        own = list(fans)
        own[1] = every
        self.everything.init(fans, own)
        for i, neurons in enumerate(self._sets()):
            neurons.init((bias_fans[i], weight_fans[i], weight_fans[i + 1]))
        uniform(self.final, weight_fans[-1])
        uniform(self.first_mean, weight_fans[1])
        m = self.c_out
        uniform(self.last_mean[:m], bias_fans[last])
        uniform(self.last_mean[m:], weight_fans[last])

    def _sets(self) -> list[Neurons]:
        return [n for n in self.neurons if isinstance(n, Neurons)]

    def forward(self, features: Features) -> Features:
        first, last = features[0][0], features[-1][0]
        middle = [seen(w) for w, _ in features[1:-1]]
        q = [first.flatten(2), *(x[1] for x in middle), mean(last, 2)]
        r = [mean(first, 1), *(x[2] for x in middle), last.transpose(1, 2).flatten(2)]
        constant = self.everything(self._means(features, q, r))
        rows = [
            torch.cat([bias, *sides], dim=-1)
            for (_, bias), *sides in zip(features[:-1], q[:-1], r[1:], strict=True)
        ]
        written = [neurons(x) for neurons, x in zip(self._sets(), rows, strict=True)]
        written[-1][2] = linear(rows[-1][..., -self.final.shape[1] :], self.final)
        redundant = linear(mean(last, 1), self.last_mean).split(self._sets()[-1].writes[:2], -1)
        written[0][2] = written[0][2] + linear(mean(first, 2), self.first_mean)
        written[-1][:2] = [x + y for x, y in zip(written[-1], redundant, strict=False)]
        return self._written([x for x, _, _ in middle], written, constant)

    def _means(self, features: Features, q: list[Tensor], r: list[Tensor]) -> Tensor:
        """The global vector s (b, reads): means of every tensor, and what the free axes keep
        apart.
        """
        means = [mean(r[0], 1), *(mean(x, 1) for x in q[1:])]
        means += [mean(b, 1) for _, b in features]
        return torch.cat(
            [*means, r[0].flatten(1), q[-1].flatten(1), features[-1][1].flatten(1)], dim=-1
        )

    def _written(
        self, middle: list[Tensor], written: list[list[Tensor]], constant: list[Tensor]
    ) -> Features:
        out = []
        for l, (bias, left, _) in enumerate(written):
            bias = bias + constant[2 * l][:, None]
            left = left + constant[2 * l + 1][:, None]
            if l == 0:
                out.append((left.unflatten(-1, (self.n0, -1)), bias))
            else:
                theta = self.pointwise[l - 1]
                out.append((mix(middle[l - 1], theta, left, written[l - 1][2]), bias))
        right = written[-1][2] + constant[-2][:, None]
        weight = right.unflatten(-1, (self.n_out, -1)).transpose(1, 2)
        out.append((weight, constant[-1].unflatten(-1, (self.n_out, -1))))
        return out


def equivariant_linear(space: Chain, name: str, c_in: int, c_out: int) -> nn.Module:
    """The layer that a configuration calls by a name of LINEAR; UsageError for another."""
    if name in ("hnp", "hnp-full"):
        return HNPLinear(space, c_in, c_out, full_basis=name == "hnp-full")
    if name in ("np", "np-posemb"):
        return NPLinear(space, c_in, c_out, io_embedding=name == "np-posemb")
    raise UsageError(f"there is no linear layer '{name}'", suggest(name, list(LINEAR)))
