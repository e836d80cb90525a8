"""Quasi layers: the theorem (paper is a no-op), the price (released), and the exact one."""

import pytest
import torch
from layer_kit import SPACES, draw_weights, randomise

from qemcli import groups
from qemcli.architectures import monomial_nfn, nfn
from qemcli.errors import UsageError
from qemcli.layers import quasi
from qemcli.layers.features import act_on_features


def model(mode, space, architecture=monomial_nfn, eps=0.5, **more):
    """A network with random parameters and |eps| = .5, float64; its answers spread by about 1."""
    config = architecture.Config(channels=(4, 4, 3), head=16, quasi=mode, eps=eps, **more)
    torch.manual_seed(0)
    made = randomise(architecture.Model(space, config).double()).eval()
    with torch.no_grad():
        made.quasi.eps.rho.fill_(torch.atanh(torch.tensor(eps / quasi.BOUND)))
    return made


def spread(y):
    return y.std(0).mean()


def invariance_error(made, space, group, rng, scales=(0.1, 10.0)):
    w = draw_weights(space, 16, rng)
    g = groups.sample(group, space, 16, rng, scales)
    with torch.no_grad():
        y, moved = made(w), made(groups.act(g, space, w))
    return ((moved - y).abs().max() / spread(y)).item()


def leak(made, space, rng):
    w = draw_weights(space, 16, rng)
    with torch.no_grad():
        return (quasi.leak(made, w).abs().max() / spread(made(w))).item()


@pytest.mark.parametrize("name", SPACES)
def test_paper_is_a_no_op_under_the_exact_head(name, rng):
    space = SPACES[name]
    made = model("paper", space)
    assert leak(made, space, rng) < 1e-10
    assert invariance_error(made, space, "monomial", rng) < 1e-10
    made(draw_weights(space, 16, rng)).sum().backward()
    alpha = max(p.grad.abs().max() for p in made.quasi.parameters())
    others = max(p.grad.abs().max() for p in made.linears.parameters())
    assert alpha < 1e-10 * others


def test_paper_loses_permutations_under_a_head_of_means(rng):
    made = model("paper", SPACES["pool"], nfn)
    assert leak(made, SPACES["pool"], rng) > 1e-4
    assert invariance_error(made, SPACES["pool"], "permutation", rng) > 1e-6
    assert made.claims(SPACES["pool"]) == set()


def test_the_bracket_of_the_theorem_is_an_identity(rng):
    """alpha(gx) E(gx) = [alpha(gx) g alpha(x)^-1] alpha(x) E(x), for an alpha not invariant."""
    space = SPACES["mlp3"]
    made = model("paper", space)
    w = draw_weights(space, 4, rng)
    g = groups.sample("monomial", space, 4, rng)
    moved = groups.act(g, space, w)

    def alpha(x):
        diagonals = made.quasi.scales(x)
        factor = {h: d[..., 0] for h, d in zip(space.hidden, diagonals, strict=True)}
        index = {h: torch.arange(n).expand(4, n) for h, n in space.hidden.items()}
        return groups.Element(index, factor)

    bracket = groups.compose(alpha(moved), groups.compose(g, groups.inverse(alpha(w))))
    left = made.equivariant(moved)[-1][1]
    right = act_on_features(space, bracket, made.equivariant(w)[-1][1])
    for pair, other in zip(left, right, strict=True):
        for x, y in zip(pair, other, strict=True):
            assert torch.allclose(x, y, rtol=1e-10)


@pytest.mark.parametrize("group", ["permutation", "scale"])
def test_released_is_not_invariant(group, rng):
    made = model("released", SPACES["pool"])
    assert leak(made, SPACES["pool"], rng) > 1e-4
    assert invariance_error(made, SPACES["pool"], group, rng) > 1e-6
    assert made.claims(SPACES["pool"]) == set()


def test_released_error_grows_with_eps(rng):
    space = SPACES["pool"]
    errors = [
        invariance_error(model("released", space, eps=e), space, "monomial", rng.manual_seed(0))
        for e in (0.001, 0.03, 0.9)
    ]
    assert errors[0] < errors[1] / 3 < errors[2] / 9


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("name", SPACES)
def test_exact_is_invariant_and_no_no_op(name, activation, rng):
    space = SPACES[name].running(activation)
    made = model("exact", space)
    assert "monomial" in made.claims(space)
    assert invariance_error(made, space, "monomial", rng, (1e-3, 1e3)) < 1e-10
    assert leak(made, space, rng) > 1e-4


@pytest.mark.parametrize("mode", ["paper", "exact"])
def test_dead_neurons_keep_invariance_exact(mode, rng):
    """Zero rows, zero columns, and rows far below the published floor of 1e-12."""
    space = SPACES["pool"]
    made = model(mode, space)
    w = draw_weights(space, 16, rng)
    w["conv1.weight"][:, 0], w["conv1.bias"][:, 0] = 0, 0
    w["conv2.weight"][:, 1] *= 1e-15
    w["conv2.bias"][:, 1] *= 1e-15
    w["fc.weight"][:, :, 2] = 0
    g = groups.sample("monomial", space, 16, rng, (1e-4, 1e4))
    with torch.no_grad():
        y, moved = made(w), made(groups.act(g, space, w))
    assert (moved - y).abs().max() < 1e-10 * spread(y)


def test_exact_keeps_permutations_under_a_head_of_means(rng):
    space = SPACES["flatten"]
    made = model("exact", space, nfn)
    assert made.claims(space) == {"permutation"}
    assert invariance_error(made, space, "permutation", rng) < 1e-10
    assert invariance_error(made, space, "scale", rng) > 1e-6
    assert leak(made, space, rng) > 1e-4


def test_exact_layer_is_strictly_equivariant(rng):
    space = SPACES["pool"]
    made = model("exact", space)
    w = draw_weights(space, 3, rng)
    g = groups.sample("monomial", space, 3, rng)
    left = made.equivariant(groups.act(g, space, w))[-1][1]
    right = act_on_features(space, g, made.equivariant(w)[-1][1])
    for pair, other in zip(left, right, strict=True):
        for x, y in zip(pair, other, strict=True):
            assert torch.allclose(x, y, rtol=1e-9)


def test_exact_trains(rng):
    made = model("exact", SPACES["pool"])
    made(draw_weights(SPACES["pool"], 8, rng)).square().sum().backward()
    for name, p in made.quasi.named_parameters():
        assert p.grad.abs().max() > 0, name


def test_eps_is_bounded_and_may_be_fixed():
    space = SPACES["mlp3"]
    made = quasi.make("paper", space, 2, 3, 0.5, learned=False)
    assert "eps.rho" not in dict(made.named_parameters())
    assert torch.allclose(made.eps(), torch.full((2,), 0.5))
    made.eps.rho.fill_(100.0)
    assert made.eps().max() < 1
    with pytest.raises(UsageError, match="eps is 1"):
        quasi.make("paper", space, 2, 3, 1.0, learned=True)


def test_unknown_modes_are_named():
    with pytest.raises(UsageError) as caught:
        quasi.make("relased", SPACES["mlp3"], 2, 3, 0.1, learned=True)
    assert "released" in caught.value.hint
    with pytest.raises(UsageError) as caught:
        quasi.make("balanced", SPACES["mlp3"], 2, 3, 0.1, learned=True)
    assert "in front" in caught.value.hint


def test_switched_off_puts_the_layer_back(rng):
    made = model("released", SPACES["mlp3"])
    layer = made.quasi
    with quasi.switched_off(made) as without:
        assert without.quasi is None
    assert made.quasi is layer
