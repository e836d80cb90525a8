"""DWSNets: a slow reference map by map, permutations with a control, completeness, counts."""

import math
from itertools import product

import pytest
import torch
from layer_kit import SPACES, draw_features, draw_weights, largest, randomise, span

from qemcli import groups
from qemcli.architectures import dws
from qemcli.errors import UnsupportedError, UsageError
from qemcli.layers.dws import DWSLayer, FoldedPool, TensorBatchNorm, fold, tensor_axes, unfold
from qemcli.layers.features import ChannelDropout, act_on_features
from qemcli.layers.pooling import HNPPool
from qemcli.spaces import mlp, siren

SMALL = {"hidden": 4, "depth": 2, "heads": 2}
KINDS = [("attention", "max"), ("attention", "mean"), ("sets", "max"), ("sets", "mean")]


def layer_of(space, c_in, c_out, *kind):
    torch.manual_seed(0)
    return randomise(DWSLayer(space, c_in, c_out, *kind, heads=2).double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp3", "mlp2", "mlp4", "pool", "flatten"])
def test_dws_layer_commutes_with_coupled_permutations_only(name, kind, rng):
    space = SPACES[name]
    layer, h = layer_of(space, 2, 4, *kind), draw_features(space, 2)
    g = groups.sample("permutation", space, 3, rng)
    with torch.no_grad():
        y, moved = layer(h), layer(act_on_features(space, g, h))
        assert largest(moved, act_on_features(space, g, y)) < 1e-12
        # The rows of the first weight alone: no symmetry.
        weight, bias = h[0]
        alone = layer([(weight.roll(1, 1), bias), *h[1:]])
        rolled = [(y[0][0].roll(1, 1), y[0][1]), *y[1:]]
        assert largest(alone, rolled) > 1e-3


def reduced(x, axes, kept, reduction):
    """x (hidden axes..., f) over all axes but those kept, entry by entry."""
    out = {}
    for index in product(*map(range, x.shape[:-1])):
        key = tuple(i for i, a in zip(index, axes, strict=True) if a in kept)
        out.setdefault(key, []).append(x[index])
    join = (
        (lambda v: torch.stack(v).amax(0))
        if reduction == "max"
        else (lambda v: torch.stack(v).mean(0))
    )
    return {key: join(values) for key, values in out.items()}


def attention(module, xs):
    """Self-attention of a list of vectors, a head and a pair at a time."""
    q, k, v = ([part(x) for x in xs] for part in (module.query, module.key, module.value))
    width = len(q[0]) // module.heads
    out = []
    for i in range(len(xs)):
        heads = []
        for h in range(module.heads):
            here = slice(h * width, (h + 1) * width)
            scores = [
                (q[i][here] @ k[j][here] / math.sqrt(len(q[0]))).exp() for j in range(len(xs))
            ]
            mixed = sum(s * v[j][here] for j, s in enumerate(scores)) / sum(scores)
            heads.append(q[i][here] + mixed)
        o = torch.cat(heads)
        out.append(o + torch.relu(module.out(o)))
    return out


def reference(layer, space, features, sets, reduction):
    """The definition, one network, one source, one target and one entry at a time."""
    axes, xs = tensor_axes(space), [x[0] for x in fold(features)]
    out = []
    for t, theirs in enumerate(axes):
        shape = [space.hidden[f"h{a}"] for a in theirs]
        written = {place: 0.0 for place in product(*map(range, shape))}
        for s, ours in enumerate(axes):
            module, shared = layer.maps[f"{s}_{t}"], [a for a in theirs if a in ours]
            x = reduced(xs[s], ours, shared, reduction)
            for place in written:
                if s == t and len(ours) == 2:
                    row = reduced(xs[s], ours, ours[:1], reduction)[place[:1]]
                    column = reduced(xs[s], ours, ours[1:], reduction)[place[1:]]
                    whole = reduced(xs[s], ours, (), reduction)[()]
                    parts = zip(module.maps, (xs[s][place], row, column, whole), strict=True)
                    written[place] = written[place] + sum(m(part) for m, part in parts) / 4
                    continue
                key = tuple(i for i, a in zip(place, theirs, strict=True) if a in shared)
                if not shared:
                    y = module(x[()])
                elif sets == "sets":
                    values = list(x.values())
                    join = torch.stack(values)
                    pooled = join.amax(0) if reduction == "max" else join.mean(0)
                    y = module.each(x[key]) - module.all(pooled)
                else:
                    y = dict(zip(x, attention(module, list(x.values())), strict=True))[key]
                written[place] = written[place] + y
        stacked = torch.stack(list(written.values())).view(*shape, -1)
        out.append(stacked[None] / len(axes))
    return unfold(space, out)


@pytest.mark.parametrize("kind", KINDS)
def test_dws_layer_equals_the_slow_definition(kind):
    space = mlp([2, 3, 4, 2])
    layer, h = layer_of(space, 2, 4, *kind), draw_features(space, 2, batch=1)
    with torch.no_grad():
        assert largest(layer(h), reference(layer, space, h, *kind)) < 1e-12


@pytest.mark.parametrize(("widths", "dimension"), [((2, 3, 2, 3), 163), ((2, 4, 3), 117)])
def test_means_and_sets_span_every_equivariant_map(widths, dimension):
    space = mlp(widths)
    assert span(lambda s: DWSLayer(s, 1, 1, "sets", "mean"), space, 170) == dimension


def test_pool_of_means_is_the_hnp_pool_reordered():
    space = SPACES["pool"]
    h = draw_features(space, 2)
    mine, theirs = FoldedPool(space, "mean")(h), HNPPool(space)(h)
    assert torch.allclose(mine.sort(dim=1).values, theirs.sort(dim=1).values)


def test_batch_norm_is_a_tensor_and_a_channel():
    space = SPACES["pool"]
    h = draw_features(space, 2, batch=6)
    y = TensorBatchNorm(space, 2).double()(h)
    for w, b in y:
        for x in (w, b):
            flat = x.flatten(0, -2)
            assert flat.mean(0).abs().max() < 1e-12
            assert (flat.std(0, unbiased=False) - 1).abs().max() < 1e-3
    assert y[-1][0].transpose(1, 2).is_contiguous()


def model_of(made, space, **config):
    torch.manual_seed(0)
    model = made(space, dws.Config(**{**SMALL, **config}))
    model.calibrate(draw_weights(space, 32, torch.Generator().manual_seed(3)))
    return randomise(model.double()).eval()


@pytest.mark.parametrize("kind", [*KINDS, ("basis", "mean")])
@pytest.mark.parametrize("name", ["mlp3", "pool"])
def test_dws_model_is_invariant_to_permutations_only(name, kind, rng):
    space = SPACES[name].running("tanh")
    model = model_of(dws.Model, space, maps=kind[0], reduction=kind[1])
    w = draw_weights(space, 8, rng)
    with torch.no_grad():
        y = model(w)
        for group, least, most in (("permutation", 0, 1e-10), ("sign", 1e-4, math.inf)):
            g = groups.sample(group, space, 8, rng)
            gap = (model(groups.act(g, space, w)) - y).abs().max() / y.std(0).mean()
            assert least <= gap < most


@pytest.mark.parametrize("kind", [*KINDS, ("basis", "mean")])
def test_every_branch_of_the_editor_is_equivariant(kind, rng):
    space = siren([2, 5, 7, 3])
    model = model_of(dws.Editor, space, maps=kind[0], reduction=kind[1], expand=3)
    w = draw_weights(space, 4, rng)
    g = groups.sample("permutation", space, 4, rng)
    with torch.no_grad():
        deltas, moved = model(w), model(groups.act(g, space, w))
    assert {n: d.shape[1:] for n, d in deltas.items()} == {
        n: (3, *s) for n, s in space.shapes.items()
    }
    for j in range(3):
        expected = groups.act(g, space, {n: d[:, j] for n, d in deltas.items()})
        for n, x in expected.items():
            assert (moved[n][:, j] - x).abs().max() < 1e-10 * x.abs().max()
            assert (moved[n][:, j] - deltas[n][:, j]).abs().max() > 1e-3 * x.abs().max() or (
                n == "4.bias"
            )
    assert (deltas["2.weight"][:, 0] - deltas["2.weight"][:, 1]).abs().max() > 1e-6


def test_dropout_is_silent_in_evaluation(rng):
    space = SPACES["mlp3"]
    model = model_of(dws.Model, space, dropout=0.5)
    w = draw_weights(space, 4, rng)
    assert torch.equal(model(w), model(w))
    model.train()
    assert not torch.equal(model(w), model(w))
    assert isinstance(model.dropout, ChannelDropout)


def test_published_counts_of_dws_are_met():
    counts = {"dws": 552_650, "dws-edit": 424_447 + 6, "dws-oce-1": 374_287 + 6}
    counts |= {"dws-oce-2": 377_404 + 6, "dws-oce-4": 383_788 + 6, "dws-oce-8": 397_156 + 6}
    presets = {**dws.PRESETS, **dws.EDITORS}
    assert {n: presets[n].published for n in counts} == counts  # built in test_models.py
    space = siren([2, 6, 5, 1])
    # The maps a layer has do not depend on the widths of hidden layers, so neither do the counts.
    small = dws.Model(space, dws.PRESETS["dws"].config)
    assert sum(p.numel() for p in small.parameters()) == 552_650


def test_dws_starts_as_published():
    layer = DWSLayer(siren([2, 32, 32, 1]), 16, 32, "sets")
    layer.init(0.1)
    weight = layer.maps["2_2"].maps[0].weight  # 32 x 16
    assert abs(weight.std() / (0.1 * math.sqrt(4 * 16 / (32 * 48))) - 1) < 0.15
    assert layer.maps["2_2"].maps[0].bias.abs().max() <= 1e-4


def test_dws_refuses_what_it_does_not_have():
    for maps in ("sets", "basis"):
        with pytest.raises(UsageError, match="reduction 'sum'"):
            dws.Model(SPACES["mlp3"], dws.Config(maps=maps, reduction="sum"))
    with pytest.raises(UsageError, match="maps 'set'"):
        dws.Model(SPACES["mlp3"], dws.Config(maps="set"))
    with pytest.raises(UnsupportedError, match="two layers"):
        dws.Model(mlp([2, 3]), dws.Config())
