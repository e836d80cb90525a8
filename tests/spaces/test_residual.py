"""Residual networks: tied axes, how they are run, and the groups that act once on a tied axis."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qemcli import groups
from qemcli.errors import InputError, UnsupportedError
from qemcli.functions import probe_inputs, respond
from qemcli.spaces import (
    Chain,
    Forward,
    Residual,
    WeightSpace,
    chain,
    chain_of,
    cnn,
    layered_of,
    mlp,
    residual,
)
from qemcli.testing import CONTROLS, elements, function_error

# Widths are all different but where layers are added: 6 twice and 7 twice.
ADDED = (-1, -1, 0, 1, -1)
POOLED = residual(cnn([2, 6, 7, 6, 7], 3, kernel=5), ADDED)
FLAT = residual(
    cnn([2, 6, 7, 6, 7], 3, 3, "tanh", 16, Forward(stride=2, junction="flatten")), ADDED
)
# The second layer reads what it is added to: one axis twice in one tensor.
LOOP = residual(cnn([2, 5, 5, 4], 3), (-1, 0, -1, -1))
DENSE = residual(mlp([4, 6, 7, 6, 3], "relu"), (-1, -1, 0, -1))
BARE = residual(mlp([4, 6, 7, 6, 3], "identity", bias=False), (-1, -1, 0, -1))
SPACES = {"pooled": POOLED, "flat": FLAT, "loop": LOOP, "dense": DENSE, "bare": BARE}


def networks(space: WeightSpace, batch: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(batch, space.size, generator=generator, dtype=torch.float64)
    return space.unflatten(0.5 * flat)


class Slow(nn.Module):
    """One network, layer after layer, as its equations say."""

    def __init__(self, space: Residual, w: dict[str, Tensor]) -> None:
        super().__init__()
        self.space, self.w = space, w

    def forward(self, x: Tensor) -> Tensor:
        space, outputs = self.space, []
        act = {"relu": torch.relu, "tanh": torch.tanh, "identity": lambda z: z}[space.activation]
        for i, layer in enumerate(space.layers):
            weight, bias = self.w[layer.weight], self.w[layer.bias] if layer.bias else None
            if layer.conv:
                stride = space.forward.stride if i == 0 else 1
                x = F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)
            else:
                if x.dim() == 4:
                    x = x.mean((2, 3)) if space.forward.junction == "pool" else x.flatten(1)
                x = F.linear(x, weight, bias)
            if space.added[i] != -1:
                x = x + outputs[space.added[i]]
            if i < len(space.layers) - 1:
                x = act(x)
            outputs.append(x)
        return x


def test_axis_of_a_sum_has_one_name() -> None:
    assert POOLED.axes == ("h1", "h2", "h1", "h2", "y")
    assert POOLED.hidden == {"h1": 6, "h2": 7}
    assert [str(t) for t in POOLED.tensors if len(t.dims) > 1] == [
        "h1 x* u v", "h2 h1* u v", "h1 h2* u v", "h2 h1* u v", "y h2*",
    ]  # fmt: skip
    assert str(LOOP["conv2.weight"]) == "h1 h1* u v"
    assert POOLED.title == "cnn (2, 6, 7, 6, 7, 3) relu with sums (1 to 3, 2 to 4)"


@pytest.mark.parametrize("name", SPACES)
def test_record_is_read_back(name: str) -> None:
    space = SPACES[name]
    assert WeightSpace.from_json(space.to_json()) == space
    assert layered_of(space, "this") is space
    assert not space.fits(replace(space, added=(-1,) * len(space.layers)))


@pytest.mark.parametrize("name", SPACES)
def test_batch_answers_as_one_network_after_another(name: str) -> None:
    space, w = SPACES[name], networks(SPACES[name], 4)
    x = probe_inputs(space, 5, torch.Generator().manual_seed(1), torch.float64)
    found = respond(space, w, x)
    for i in range(4):
        slow = Slow(space, {k: v[i] for k, v in w.items()})
        torch.testing.assert_close(found[i], slow(x), rtol=1e-12, atol=1e-12)
    plain = Slow(replace(space, added=(-1,) * len(space.layers)), {k: v[0] for k, v in w.items()})
    assert (plain(x) - found[0]).abs().max() > 1e-2  # the sums count


def test_published_sampler_s_network_is_run_alike() -> None:
    """What a network of the CNN Wild Park computes: added before the activation, having passed its
    own; the image keeps its size; a mean over positions; one dense layer."""
    w = {k: v[0] for k, v in networks(POOLED, 1).items()}
    x = torch.randn(3, 2, 9, 9, dtype=torch.float64)
    one = F.conv2d(x, w["conv1.weight"], w["conv1.bias"], padding=2).relu()
    two = F.conv2d(one, w["conv2.weight"], w["conv2.bias"], padding=2).relu()
    three = (F.conv2d(two, w["conv3.weight"], w["conv3.bias"], padding=2) + one).relu()
    four = (F.conv2d(three, w["conv4.weight"], w["conv4.bias"], padding=2) + two).relu()
    wanted = F.linear(four.mean((2, 3)), w["fc.weight"], w["fc.bias"])
    found = respond(POOLED, {k: v[None] for k, v in w.items()}, x)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


GROUPS = {
    "relu": {"permutation", "scale", "monomial"},
    "tanh": {"permutation", "sign", "monomial"},
    "identity": {"permutation", "scale", "sign", "monomial"},
    None: {"permutation"},
}


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("group", ["permutation", "scale", "sign", "monomial", "all"])
def test_group_keeps_the_function(name: str, group: str) -> None:
    space = SPACES[name]
    assert set(groups.applicable(space)) == GROUPS[space.activation]
    if groups.allowed(group, space):
        with pytest.raises(UnsupportedError, match=group):
            groups.sample(group, space, 2, torch.Generator())
        return
    w, generator = networks(space, 4), torch.Generator().manual_seed(3)
    x = probe_inputs(space, 5, generator, torch.float64)
    for g in elements(group, space, 4, generator).values():
        assert set(g.index) == set(space.hidden)
        moved = groups.act(g, space, w)
        assert max(float((moved[k] - w[k]).abs().max()) for k in w) > 1e-6
        assert function_error(space, w, moved, x).max() < 1e-12
        back = groups.act(groups.inverse(g), space, moved)
        for k in w:
            torch.testing.assert_close(back[k], w[k], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group", ["permutation", "scale"])
def test_group_on_one_layer_of_a_sum_is_seen(group: str) -> None:
    """The control: the same chain without ties lets a layer move alone, and the function breaks."""
    chained = cnn([2, 6, 7, 6, 7], 3, kernel=5)
    w, generator = networks(POOLED, 4), torch.Generator().manual_seed(3)
    g = groups.sample(group, chained, 4, generator)
    alone = groups.identity(chained, 4)
    alone.index["h3"], alone.factor["h3"] = g.index["h3"], g.factor["h3"]
    moved = groups.act(alone, chained, w)
    x = probe_inputs(POOLED, 5, generator, torch.float64)
    assert function_error(POOLED, w, moved, x).max() > 1e-2
    assert function_error(chained.running(padding=2), w, moved, x).max() < 1e-12  # a chain's own


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("name", SPACES)
def test_controls_move_the_function(name: str, control: str) -> None:
    space, w = SPACES[name], networks(SPACES[name], 4)
    generator = torch.Generator().manual_seed(3)
    x = probe_inputs(space, 5, generator, torch.float64)
    moved = CONTROLS[control](space, w, generator)
    assert function_error(space, w, moved, x).max() > 1e-3


def test_unknown_activation_leaves_permutations() -> None:
    assert set(groups.applicable(POOLED.unstated())) == GROUPS[None]
    with pytest.raises(InputError, match="activation"):
        respond(POOLED.unstated(), networks(POOLED, 1), torch.zeros(1, 2, 8, 8))


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ((-1, 0, -1, -1, -1), "of 6 neurons cannot be added to layer 1 of 7"),
        ((-1, -1, 2, -1, -1), "layer 2 cannot be added to layer 2"),
        ((-1, -1, -2, -1, -1), "layer -2 cannot"),
        ((-1, -1, -1, -1, 0), "layer 0 cannot be added to layer 4"),
        ((-1, -1, 0), "5 layers, and sums are stated of 3"),
    ],
)
def test_sum_that_cannot_be_is_named(added: tuple[int, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        residual(cnn([2, 6, 7, 6, 7], 3), added)
    record = POOLED.record() | {"added": added}
    with pytest.raises(InputError, match=said):
        Residual.of_record(record)


def test_even_kernel_is_refused_where_images_must_keep_their_size() -> None:
    with pytest.raises(InputError, match=r"conv2.weight.*even kernel"):
        residual(cnn([2, 6, 7, 6], 3, kernel=4), (-1, -1, 0, -1))
    mixed = cnn([2, 6, 7, 6], 3)
    kernels = {la.weight: (k, k) for la, k in zip(mixed.layers, (4, 3, 7), strict=False)}
    layers = [replace(la, taps=k * k) for la, k in zip(mixed.layers, (4, 3, 7, 1), strict=True)]
    space = residual(
        chain(layers, "cnn", kernels, "relu", Forward(junction="pool")), (-1, -1, 0, -1)
    )
    w = networks(space, 2)
    x = probe_inputs(space, 3, torch.Generator().manual_seed(0), torch.float64)
    slow = Slow(space, {k: v[1] for k, v in w.items()})
    torch.testing.assert_close(respond(space, w, x)[1], slow(x), rtol=1e-12, atol=1e-12)


def test_what_is_for_chains_says_so() -> None:
    with pytest.raises(UnsupportedError, match="with sums"):
        chain_of(POOLED, "balance")
    assert not isinstance(POOLED, Chain)
