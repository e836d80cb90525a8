"""The public symmetry tests, on models that are right, wrong on purpose, and constant."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import draw_networks, draw_space
from torch import Tensor, nn

from qemcli import groups, testing
from qemcli.balance import balance
from qemcli.errors import InconclusiveError
from qemcli.functions import probe_inputs
from qemcli.spaces import Chain, cnn, mlp, siren

BATCH = 16
Networks = dict[str, Tensor]

SPACES = {
    "mlp relu": mlp([3, 6, 5, 2]),
    "mlp tanh": mlp([3, 6, 5, 2], "tanh"),
    "cnn relu": cnn([1, 3, 5], 4),
    "siren": siren([2, 6, 5, 3]),
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moments(w: Networks) -> Tensor:
    """Invariant to any permutation, coupled or not: it reads every tensor as a bag of numbers."""
    return torch.stack([x.flatten(1).pow(p).mean(1) for x in w.values() for p in (2, 3)], dim=1)


def paths(space: Chain) -> Callable[[Networks], Tensor]:
    """Invariant to permutations, scales and signs: the product of the layers, squared."""

    def model(w: Networks) -> Tensor:
        product: Tensor | None = None
        for weight, _ in space.matrices(w):
            squares = weight.square().sum(3)
            product = squares if product is None else squares @ product
        assert product is not None
        return product.flatten(1)

    return model


def balanced(space: Chain, model: Callable[[Networks], Tensor]) -> Callable[[Networks], Tensor]:
    return lambda w: model(balance(space, w)[0])


def by_position(w: Networks) -> Tensor:
    """Wrong on purpose: every weight has a coefficient of its own."""
    flat = torch.cat([x.flatten(1) for x in w.values()], dim=1)
    return flat.square() @ torch.arange(1.0, flat.shape[1] + 1, dtype=flat.dtype)


def bound(space: Chain, model: Callable[[Networks], Tensor], w: Networks) -> float:
    found = testing.answers(model, w)
    return testing.tolerance(found.dtype, len(space.layers), testing.size(found))


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("kind", testing.KINDS)
def test_right_models_pass_and_wrong_ones_fail(name: str, kind: str) -> None:
    space = SPACES[name]
    w = draw_networks(space, BATCH)
    right = balanced(space, moments)
    for group in groups.applicable(space):
        g = testing.elements(group, space, BATCH, seeded(1))[kind]
        error = testing.invariance_error(right, space, w, g)
        assert error.shape == (BATCH,)
        assert error.max() < bound(space, right, w)
        wrong = moments if group in ("scale", "sign", "phase") else by_position
        assert testing.invariance_error(wrong, space, w, g).max() > 1e3 * bound(space, wrong, w)


@pytest.mark.parametrize("name", SPACES)
def test_controls_move_what_reads_the_networks(name: str) -> None:
    space = SPACES[name]
    w = draw_networks(space, BATCH)
    moved = testing.sensitivity(paths(space), space, w, seeded(2))
    assert set(moved) == {"uncoupled", "unmatched"}
    assert all(error.median() > 1e-2 for error in moved.values())
    bag = testing.sensitivity(moments, space, w, seeded(2))
    assert bag["uncoupled"].max() < 1e-12
    assert bag["unmatched"].median() > 1e-2


def test_controls_are_in_no_group() -> None:
    space = SPACES["mlp relu"]
    w = draw_networks(space, BATCH)
    x = probe_inputs(space, 5, seeded(1), torch.float64)
    for control in testing.CONTROLS.values():
        moved = control(space, w, seeded(3))
        assert {k: v.shape for k, v in moved.items()} == {k: v.shape for k, v in w.items()}
        assert testing.function_error(space, w, moved, x).median() > 1e-2
        assert torch.equal(moved["4.bias"], w["4.bias"])
    assert testing.sensitivity(moments, mlp([3, 2]), draw_networks(mlp([3, 2]), 4), seeded(1)) == {}


def test_uncoupled_permutes_each_tensor_on_its_own() -> None:
    space = SPACES["mlp relu"]
    w = draw_networks(space, BATCH)
    moved = testing.uncoupled(space, w, seeded(3))
    for name, x in w.items():
        assert torch.equal(moved[name].flatten(1).sort().values, x.flatten(1).sort().values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_constant_answers_are_inconclusive(dtype: torch.dtype) -> None:
    space = SPACES["mlp relu"]
    w = draw_networks(space, BATCH, dtype=dtype)
    g = groups.sample("permutation", space, BATCH, seeded(1))

    def constant(w: Networks) -> Tensor:
        return 3 + 1e-18 * moments(w)

    with pytest.raises(InconclusiveError, match="same to every network"):
        testing.invariance_error(constant, space, w, g)
    one = {k: v[:1] for k, v in w.items()}
    with pytest.raises(InconclusiveError, match="one network"):
        testing.invariance_error(moments, space, one, g.rows(slice(1)))
    with pytest.raises(InconclusiveError, match="not finite"):
        testing.invariance_error(lambda w: moments(w) / 0, space, w, g)


def test_answers_that_overflow_under_the_group_are_infinitely_wrong() -> None:
    space = SPACES["mlp relu"]
    w = draw_networks(space, BATCH)
    g = groups.sample("scale", space, BATCH, seeded(1), (1e3, 1e4))

    def fragile(w: Networks) -> Tensor:
        return torch.where(w["0.weight"].abs().amax((1, 2)) > 1e2, torch.inf, moments(w)[:, 0])

    assert torch.isinf(testing.invariance_error(fragile, space, w, g)).all()


def test_tolerance_grows_with_dtype_depth_and_size() -> None:
    base = testing.tolerance(torch.float64, 4)
    assert base == pytest.approx(8.9e-13, rel=0.01)
    assert testing.tolerance(torch.float32, 4) > 1e8 * base
    assert testing.tolerance(torch.float64, 8, 3.0) == pytest.approx(6 * base)
    assert testing.tolerance(torch.float64, 4, 0.1) == base


def test_near_elements_touch_one_neuron_a_layer() -> None:
    space = SPACES["siren"]
    g = testing.elements("all", space, BATCH, seeded(1))["near"]
    for axis, n in space.hidden.items():
        assert ((g.index[axis] != torch.arange(n)).sum(1) == 2).all()
        assert ((g.factor[axis] < 0).sum(1) == 1).all()
        assert (g.turns[axis].sum(1) == 1).all()
    scales = testing.elements("scale", SPACES["mlp relu"], BATCH, seeded(1))
    assert (scales["near"].factor["h1"] - 1).abs().max() <= 1e-3
    assert scales["extreme"].factor["h1"].max() > 1e3
    assert scales["ordinary"].factor["h1"].min() < 1


def mean_layer(features: testing.Features) -> testing.Features:
    """Permutation-equivariant: every tensor plus its mean."""
    return [(w + w.mean((1, 2), keepdim=True), b + b.mean(1, keepdim=True)) for w, b in features]


def broken_layer(features: testing.Features) -> testing.Features:
    return [(w + w[:, :1], b) for w, b in features]


def test_equivariance_error_tells_right_layers_from_wrong() -> None:
    space = SPACES["mlp relu"]
    w = draw_networks(space, BATCH)
    g = groups.sample("permutation", space, BATCH, seeded(1))

    def move(features: testing.Features) -> testing.Features:
        inside = space.from_matrices([(x, b[..., 0]) for x, b in features])
        return [(x, b[..., None]) for x, b in space.matrices(groups.act(g, space, inside))]

    features = [(x, b[..., None]) for x, b in space.matrices(w)]
    right = testing.equivariance_error(mean_layer, features, move)
    assert right.shape == (BATCH,)
    assert right.max() < 1e-12
    assert testing.equivariance_error(broken_layer, features, move).max() > 1e-2


@given(draw_space(least=1), st.integers(0, 1000))
def test_function_error_is_rounding_along_the_orbit(space: Chain, seed: int) -> None:
    w = draw_networks(space, 3, seed)
    g = groups.sample("all", space, 3, seeded(seed), (1.0, 1e4))
    x = probe_inputs(space, 4, seeded(seed))
    assert testing.function_error(space, w, groups.act(g, space, w), x).max() < 1e-10


def test_nfn_of_the_package_index_is_judged_rightly() -> None:
    """PyPI's nfn: invariant to permutations of hidden neurons, not to scales."""
    from nfn import layers
    from nfn.common import NetworkSpec, WeightSpaceFeatures
    from nfn.common.data import ArraySpec

    space = SPACES["mlp relu"]
    pairs = [(layer.rows, layer.cols) for layer in space.layers]
    spec = NetworkSpec([ArraySpec(p) for p in pairs], [ArraySpec(p[:1]) for p in pairs])
    torch.manual_seed(0)
    model = nn.Sequential(
        layers.HNPLinear(spec, 1, 4),
        layers.TupleOp(nn.ReLU()),
        layers.HNPPool(spec),
        nn.Flatten(),
        nn.Linear(4 * layers.HNPPool.get_num_outs(spec), 2),
    ).double()

    def read(w: Networks) -> Tensor:
        weights = [weight[:, None, :, :, 0] for weight, _ in space.matrices(w)]
        return model(WeightSpaceFeatures(weights, [b[:, None] for _, b in space.matrices(w)]))

    w = draw_networks(space, BATCH)
    for kind in testing.KINDS:
        g = testing.elements("permutation", space, BATCH, seeded(1))[kind]
        assert testing.invariance_error(read, space, w, g).max() < bound(space, read, w)
        g = testing.elements("scale", space, BATCH, seeded(1))[kind]
        assert testing.invariance_error(read, space, w, g).max() > 1e-6
    assert testing.sensitivity(read, space, w, seeded(1))["uncoupled"].median() > 1e-3
