"""PyPI's nfn 0.1.2 beside our layers: same weight space, same parameters, same features."""

import torch
from nfn.common import ArraySpec, NetworkSpec, WeightSpaceFeatures
from torch import Tensor

from qemcli.layers.equivariant import HNPLinear, NPLinear
from qemcli.layers.features import Features
from qemcli.spaces import Chain


def network_spec(space: Chain) -> NetworkSpec:
    """Their description; taps of any kind are a kernel of height 1."""
    weights = [
        ArraySpec((la.rows, la.cols, 1, la.taps) if la.taps > 1 else (la.rows, la.cols))
        for la in space.layers
    ]
    return NetworkSpec(weights, [ArraySpec((la.rows,)) for la in space.layers])


def theirs(space: Chain, features: Features) -> WeightSpaceFeatures:
    """Our features in their layout: (b, c, j, k[, 1, f]) and (b, c, j)."""
    weights, biases = [], []
    for la, (w, b) in zip(space.layers, features, strict=True):
        entries = w.unflatten(-1, (b.shape[-1], -1)).permute(0, 3, 1, 2, 4)
        weights.append(entries.unsqueeze(4) if la.taps > 1 else entries[..., 0])
        biases.append(b.transpose(1, 2))
    return WeightSpaceFeatures(weights, biases)


def ours(features: WeightSpaceFeatures) -> Features:
    """The inverse of `theirs`."""
    pairs = []
    for w, b in features:
        entries = w.flatten(4) if w.dim() > 4 else w[..., None]
        pairs.append((entries.permute(0, 2, 3, 1, 4).flatten(3), b.transpose(1, 2)))
    return pairs


def swap(x: Tensor, dim: int, outer: int) -> Tensor:
    """One dimension that counts (outer, inner), counted as (inner, outer)."""
    y = x.unflatten(dim, (outer, -1))
    return y.transpose(dim, dim + 1).flatten(dim, dim + 1)


def blocks(x: Tensor, sizes: list[int], order: list[int]) -> Tensor:
    """Columns taken apart into blocks and joined in another order."""
    parts = x.split(sizes, dim=1)
    return torch.cat([parts[i] for i in order], dim=1)


def weight(module: torch.nn.Module) -> Tensor:
    return module.weight.detach().flatten(1)


@torch.no_grad()
def copy_np(layer: NPLinear, other: torch.nn.Module) -> None:
    """Their NPLinear's parameters into ours."""
    taps, c = layer.taps, other.c_in
    last = len(taps) - 1
    constants, bias, redundant = [], [], []
    for i in range(len(taps)):
        part = {n: getattr(other, f"{n}") for n in (f"layer_{i}", f"bias_{i}")}
        point, local = part[f"layer_{i}"], part[f"bias_{i}"]
        layer.pointwise[i].copy_(weight(point))
        reads = [taps[i] * c, c] + ([taps[i + 1] * c] if i < last else [])
        order = [1, 0, 2][: len(reads)]
        m, fm = layer.c_out, taps[i] * layer.c_out
        rows = layer.neurons[i + 1].weight
        rows[:m].copy_(blocks(weight(local), reads, order))
        rows[m : m + fm].copy_(blocks(weight(getattr(other, f"layer_{i}_c")), reads, order))
        reads = [taps[i] * c] + ([taps[i - 1] * c, c] if i else [])
        order = [2, 1, 0] if i else [0]
        rows = layer.neurons[i].weight
        rows[len(rows) - fm :].copy_(blocks(weight(getattr(other, f"layer_{i}_r")), reads, order))
        for name in (f"bias_{i}_rc", f"layer_{i}_rc"):
            constants.append(getattr(other, name).weight)
            bias.append(getattr(other, name).bias)
        redundant.append(local.bias)
        redundant += [getattr(other, f"layer_{i}{end}").bias for end in ("", "_r", "_c")]
    layer.everything.weight.copy_(torch.cat(constants))
    layer.everything.bias.copy_(torch.cat(bias))
    layer.everything.redundant.copy_(torch.cat(redundant))
    if layer.io_embedding:
        layer.inputs.copy_(other.in_embed[0, :, 0].T)
        layer.outputs.copy_(other.out_embed[0].permute(1, 2, 0))
        layer.output_bias.copy_(other.out_bias_embed[0].T)


class _HNPCopy:
    """Where the free axes stand: theirs count (channel, axis), ours (axis, channel)."""

    def __init__(self, space: Chain, layer: HNPLinear) -> None:
        self.taps = [la.taps for la in space.layers]
        self.layer, self.c, self.m = layer, layer.c_in, layer.c_out
        self.n0, self.n_out = layer.n0, layer.n_out
        self.last = len(self.taps) - 1

    def first(self, x: Tensor, dim: int, channels: int) -> Tensor:
        return swap(x, dim, self.taps[0] * channels)

    def end(self, x: Tensor, dim: int, channels: int) -> Tensor:
        return swap(x, dim, self.taps[-1] * channels)

    def constants(self, module: torch.nn.Module) -> Tensor:
        """Columns of a map from the global vector."""
        f, c = self.taps, self.c
        sizes = [
            sum(f) * c + len(f) * c,
            self.n0 * f[0] * c,
            self.n_out * f[-1] * c,
            self.n_out * c,
        ]
        means, r, q, b = weight(module).split(sizes, dim=1)
        return torch.cat([means, self.first(r, 1, c), self.end(q, 1, c), swap(b, 1, c)], dim=1)

    def left_columns(self, x: Tensor) -> Tensor:
        return self.first(x, 1, self.c)

    def right_columns(self, x: Tensor) -> Tensor:
        return self.end(x, 1, self.c)


@torch.no_grad()
def copy_hnp(space: Chain, layer: HNPLinear, other: torch.nn.Module) -> None:
    """Their HNPLinear's parameters into ours."""
    k = _HNPCopy(space, layer)
    c, m, f, last = k.c, k.m, k.taps, k.last
    full_first, full_last = k.n0 * f[0] * c, k.n_out * f[-1] * c
    constants, bias, redundant = [], [], []
    for i in range(last + 1):
        if i == 0:
            point, local = weight(other.w0_rpt), weight(other.bias_0)
            sizes = [full_first, f[1] * c, c] + ([full_last] if last == 1 else [])
            own = [x.split(sizes, dim=1) for x in (local, k.first(point, 0, m))]
            rows = torch.cat([_hidden(k, x, True, last == 1) for x in own])
            layer.neurons[0].weight[: len(rows)].copy_(rows)
            if last == 1:
                layer.last_mean.copy_(torch.cat([x[1] for x in own]))
            constants += [k.constants(other.bias_0_rc), k.first(k.constants(other.w0_rbdcst), 0, m)]
            bias += [other.bias_0_rc.bias, k.first(other.w0_rbdcst.bias, 0, m)]
            redundant += [other.bias_0.bias, k.first(other.w0_rpt.bias, 0, m)]
        elif i == last:
            sizes = [full_last, f[i - 1] * c] + ([full_first] if i == 1 else [])
            parts = k.end(weight(other.wfin_cpt), 0, m).split(sizes, dim=1)
            left = k.left_columns(parts[2]) if i == 1 else parts[1]
            layer.final.copy_(torch.cat([left, k.right_columns(parts[0])], dim=1))
            if i == 1:
                layer.first_mean.copy_(parts[1])
            constants += [
                k.end(k.constants(other.wfin_cbdcst), 0, m),
                swap(k.constants(other.bias_fin_rc), 0, m),
            ]
            bias += [k.end(other.wfin_cbdcst.bias, 0, m), swap(other.bias_fin_rc.bias, 0, m)]
            redundant.append(k.end(other.wfin_cpt.bias, 0, m))
        else:
            _copy_middle(k, layer, other, i)
            constants += [k.constants(getattr(other, f"{n}_{i}_rc")) for n in ("bias", "layer")]
            bias += [getattr(other, f"{n}_{i}_rc").bias for n in ("bias", "layer")]
            redundant.append(getattr(other, f"bias_{i}").bias)
            redundant += [getattr(other, f"layer_{i}{end}").bias for end in ("", "_r", "_c")]
    layer.everything.weight.copy_(torch.cat(constants))
    layer.everything.bias.copy_(torch.cat(bias))
    layer.everything.redundant.copy_(torch.cat(redundant))


def _hidden(k: _HNPCopy, parts: tuple[Tensor, ...], first: bool, last: bool) -> Tensor:
    """[left, right mean, bias(, W_L)] of the first layer -> our [bias | left | right]."""
    left = k.left_columns(parts[0]) if first else parts[0]
    right = k.right_columns(parts[3]) if last else parts[1]
    return torch.cat([parts[2], left, right], dim=1)


def _copy_middle(k: _HNPCopy, layer: HNPLinear, other: torch.nn.Module, i: int) -> None:
    f, c, m = k.taps, k.c, k.m
    layer.pointwise[i - 1].copy_(weight(getattr(other, f"layer_{i}")))
    last = i == k.last - 1
    sizes = [f[i] * c, c, f[i + 1] * c] + ([k.n_out * f[-1] * c] if last else [])
    own = [weight(getattr(other, n)).split(sizes, dim=1) for n in (f"bias_{i}", f"layer_{i}_c")]
    rows = [torch.cat([b, q, k.right_columns(x[0]) if last else r], dim=1) for q, b, r, *x in own]
    layer.neurons[i].weight[: (1 + f[i]) * m].copy_(torch.cat(rows))
    if last:
        layer.last_mean.copy_(torch.cat([x[2] for x in own]))
    sizes = [f[i] * c, f[i - 1] * c, c] + ([k.n0 * f[0] * c] if i == 1 else [])
    r, q, b, *x = weight(getattr(other, f"layer_{i}_r")).split(sizes, dim=1)
    if i == 1:
        layer.first_mean.copy_(q)
    left = k.left_columns(x[0]) if i == 1 else q
    rows = layer.neurons[i - 1].weight
    rows[len(rows) - f[i] * m :].copy_(torch.cat([b, left, r], dim=1))
