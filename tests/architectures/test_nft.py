"""NFT: attention against a slow reference, permutations with controls, editors."""

import math

import pytest
import torch
from layer_kit import SPACES, draw_weights, randomise

from qemcli import groups
from qemcli.architectures import nft
from qemcli.errors import UnsupportedError, UsageError
from qemcli.layers.features import act_on_features
from qemcli.layers.nft import NeighbourAttention, Sequence
from qemcli.spaces import mlp, siren

SMALL = {"channels": 8, "heads": 2, "depth": 2, "fourier": 3, "fourier_scale": 0.5, "head": 16}


def draw_sequence(space, channels, seed=0, batch=2):
    rng = torch.Generator().manual_seed(seed)
    entries = sum(Sequence(space).sizes)
    return torch.randn(batch, entries, channels, generator=rng, dtype=torch.float64)


def attend(module, tokens):
    """Tokens (n, C): a token, a head, a pair and a neuron at a time."""
    out = []
    for token in tokens:
        answer = torch.zeros_like(token)
        for h, back in enumerate(module.out):
            query, key, value = module.maps[3 * h : 3 * h + 3]
            scores, width = [], back.in_features
            for other in tokens:
                inner = sum(float(query(x) @ key(y)) for x, y in zip(token, other, strict=True))
                scores.append(math.exp(inner / math.sqrt(len(token) * width)))
            for score, other in zip(scores, tokens, strict=True):
                answer += score / sum(scores) * back(value(other))
        out.append(answer)
    return out


def reference(layer, space, x):
    """One network: everything that touches each neuron layer, one token at a time."""
    features = [(w[0], b[0]) for w, b in layer.sequence.split(x)]
    out = [(torch.zeros_like(w), torch.zeros_like(b)) for w, b in features]
    for i, module in enumerate(layer.neurons):
        tokens, places = [], []
        if i > 0:
            weight, bias = features[i - 1]
            tokens += [*weight.unbind(1), bias]
            places += [*out[i - 1][0].unbind(1), out[i - 1][1]]
        if i < len(features):
            tokens += features[i][0].unbind(0)
            places += out[i][0].unbind(0)
        for place, answer in zip(places, attend(module, tokens), strict=True):
            place += answer
    flat = [w.flatten(0, 1) for w, _ in features] + [b for _, b in features]
    answers = attend(layer.means, [part.mean(0, keepdim=True) for part in flat])
    ours = [w.flatten(0, 1) for w, _ in out] + [b for _, b in out]
    return torch.cat([a + b for a, b in zip(ours, answers, strict=True)])


@pytest.mark.parametrize("widths", [[2, 3, 4, 2], [2, 3, 2], [2, 4, 1, 3, 2]])
def test_attention_equals_the_slow_definition(widths):
    space = mlp(widths)
    layer = randomise(NeighbourAttention(space, 4, 2).double())
    x = draw_sequence(space, 4, batch=1)
    with torch.no_grad():
        expected = reference(layer, space, x)
        assert (layer(x)[0] - expected).abs().max() < 1e-12 * expected.abs().max()


def permuted(sequence, x, orders):
    """The neurons of every layer, inputs and outputs included, in other orders."""
    moved = [
        (w[:, orders[l]][:, :, orders[l - 1]], b[:, orders[l]])
        for l, (w, b) in enumerate(sequence.split(x), start=1)
    ]
    return sequence.join(moved)


def test_attention_commutes_with_permutations_of_all_neurons(rng):
    space = mlp([2, 5, 7, 3])
    layer, x = randomise(NeighbourAttention(space, 4, 2).double()), draw_sequence(space, 4)
    orders = [torch.randperm(n, generator=rng) for n in space.widths]
    with torch.no_grad():
        y = layer(x)
        moved = layer(permuted(layer.sequence, x, orders))
        assert (moved - permuted(layer.sequence, y, orders)).abs().max() < 1e-12
        # Rows of W_2 in an order that neither b_2 nor W_3 knows.
        (first, bias), (weight, second), end = layer.sequence.split(x)
        alone = layer.sequence.join([(first, bias), (weight.roll(1, 1), second), end])
        back = layer.sequence.split(layer(alone))[1][0].roll(-1, 1)
        assert (back - layer.sequence.split(y)[1][0]).abs().max() > 1e-3


def model_of(made, space, **config):
    torch.manual_seed(0)
    return randomise(made(space, nft.Config(**{**SMALL, **config})).double()).eval()


@pytest.mark.parametrize("name", ["mlp3", "mlp2", "mlp4", "pool", "flatten"])
def test_nft_is_invariant_to_hidden_permutations_only(name, rng):
    space = SPACES[name].running("tanh")
    model = model_of(nft.Model, space, standardised=True)
    model.calibrate(draw_weights(space, 32, rng))
    w = draw_weights(space, 8, rng)
    with torch.no_grad():
        y = model(w)
        for group, least, most in (("permutation", 0, 1e-10), ("sign", 1e-4, math.inf)):
            g = groups.sample(group, space, 8, rng)
            gap = (model(groups.act(g, space, w)) - y).abs().max() / y.std(0).mean()
            assert least <= gap < most
        last = space.layers[-1]
        swapped = {**w, **{n: w[n].flip(1) for n in (last.weight, last.bias)}}
        assert (model(swapped) - y).abs().max() > 1e-4 * y.std()


def test_every_step_of_nft_is_equivariant(rng):
    space = SPACES["flatten"]
    model = model_of(nft.Editor, space, expand=2)
    w = draw_weights(space, 3, rng)
    g = groups.sample("permutation", space, 3, rng)
    with torch.no_grad():
        steps = zip(model.equivariant(groups.act(g, space, w)), model.equivariant(w), strict=True)
        for (name, moved), (_, features) in steps:
            expected = act_on_features(space, g, features)
            for pair, other in zip(moved, expected, strict=True):
                for x, y in zip(pair, other, strict=True):
                    assert (x - y).abs().max() < 1e-10 * y.abs().max(), name


def test_every_branch_of_the_nft_editor_is_equivariant(rng):
    space = siren([2, 5, 7, 3])
    model = model_of(nft.Editor, space, expand=3)
    w = draw_weights(space, 4, rng)
    g = groups.sample("permutation", space, 4, rng)
    with torch.no_grad():
        deltas, moved = model(w), model(groups.act(g, space, w))
    for name, shape in space.shapes.items():
        assert deltas[name].shape == (4, 3, *shape)
    for j in range(3):
        delta = {n: d[:, j] for n, d in deltas.items()}
        for n, x in groups.act(g, space, delta).items():
            assert (moved[n][:, j] - x).abs().max() < 1e-10 * x.abs().max()
    assert (moved["2.weight"] - deltas["2.weight"]).abs().max() > 1e-3
    assert (deltas["2.weight"][:, 0] - deltas["2.weight"][:, 1]).abs().max() > 1e-3


def test_nft_dropout_is_silent_in_evaluation(rng):
    space = SPACES["mlp3"]
    model = model_of(nft.Model, space, dropout=0.5)
    w = draw_weights(space, 4, rng)
    assert torch.equal(model(w), model(w))
    model.train()
    assert not torch.equal(model(w), model(w))


def test_nft_refuses_what_it_cannot_do():
    with pytest.raises(UsageError, match="heads"):
        nft.Model(SPACES["mlp3"], nft.Config(channels=6))
    with pytest.raises(UnsupportedError, match="two layers"):
        nft.Model(mlp([2, 3]), nft.Config())
