"""Balance of transformers: the smallest norm, one point of an orbit, and what leaves it open."""

import block_kit
import pytest
import torch

from qemcli import groups
from qemcli.attention_balance import balance_transformer
from qemcli.spaces import Rotary, small_transformer

HALF = Rotary("half", 4)
SPACES = {
    "published": small_transformer(6, 2, 5, 2, 4, (1, 2)),
    "widths": block_kit.space(),
    "grouped with biases": block_kit.space(queries=3, biases=True),
    "rotated": block_kit.space(queries=3, biases=True, rotary=HALF, keys=4),
    "rotated in part": block_kit.space(biases=True, rotary=Rotary("interleaved", 4), keys=7),
    "more numbers than width": small_transformer(6, 1, 5, 1, 4),
    "odd": block_kit.space(activation="tanh"),
    "gelu": block_kit.space(activation="gelu"),
}
REMOVED = ("general-linear", "shift", "scale", "sign")


def apart(one, other):
    return max(((other[k] - x).abs().max() / x.abs().max()).item() for k, x in one.items())


@pytest.mark.parametrize("name", SPACES)
def test_balance_is_one_point_of_an_orbit(name, rng):
    space = SPACES[name]
    w = block_kit.draw(space, 6, rng)
    balanced = balance_transformer(space, w)
    for group in groups.applicable(space):
        moved = groups.act(groups.sample(group, space, 6, rng), space, w)
        gap = apart(balanced, balance_transformer(space, moved))
        if group in REMOVED:
            assert gap < 1e-9, group
        else:
            assert gap > 1e-3, group


@pytest.mark.parametrize("name", SPACES)
def test_balance_stays_in_the_orbit_and_is_idempotent(name, rng):
    """S, R and what else the function depends on, head by head."""
    space = SPACES[name]
    w = block_kit.draw(space, 3, rng)
    balanced = balance_transformer(space, w)
    assert apart(balanced, balance_transformer(space, balanced)) < 1e-9
    for one, other in zip(space.read(w), space.read(balanced), strict=True):
        for a, b in (
            pair for pair in zip(functions(space, one), functions(space, other), strict=True)
        ):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


def functions(space, roles):
    """What no element of the groups moves: scores of rotated tokens, outputs, neurons."""
    query, key, value, out = (roles[r] for r in ("query", "key", "value", "out"))
    turn = turned(space, query.shape[-1])
    yield torch.einsum("bkqid,de,bkje->bkqij", query, turn, key)
    if "query_bias" in roles:
        yield torch.einsum("bkqd,de,bkje->bkqj", roles["query_bias"], turn, key)
        yield roles["out_bias"] + torch.einsum("bke,bkqer->br", roles["value_bias"], out)
    yield torch.einsum("bkie,bkqer->bkqir", value, out)
    x = torch.randn(3, query.shape[3], generator=torch.Generator().manual_seed(0)).double()
    hidden = torch.einsum("ti,bif->btf", x, roles["up"]) + roles["up_bias"][:, None]
    act = {"relu": torch.relu, "tanh": torch.tanh, "gelu": torch.nn.functional.gelu}
    yield act[space.activation](hidden) @ roles["down"]


def turned(space, n):
    """(d, d) the rotation by one position."""
    matrix, rotary = torch.eye(n, dtype=torch.float64), space.rotary
    for j in range(rotary.dims // 2):
        a, b = (j, j + rotary.dims // 2) if rotary.pairing == "half" else (2 * j, 2 * j + 1)
        angle = torch.tensor(0.3 + 0.5 * j).double()
        matrix[a, a] = matrix[b, b] = angle.cos()
        matrix[a, b], matrix[b, a] = angle.sin(), -angle.sin()
    return matrix


def norm(space, w):
    return sum(x.flatten(1).square().sum(1) for roles in space.read(w) for x in roles.values())


@pytest.mark.parametrize("name", ["widths", "rotated in part", "grouped with biases"])
def test_no_element_near_the_balanced_point_has_a_smaller_norm(name, rng):
    space = SPACES[name]
    w = block_kit.draw(space, 1, rng)
    balanced = balance_transformer(space, w)
    copies = {k: x.expand(16, *x.shape[1:]) for k, x in balanced.items()}
    for group in ("general-linear", "scale"):
        moved = groups.act(groups.sample(group, space, 16, rng, (0.9, 1.1)), space, copies)
        assert norm(space, moved).min() >= norm(space, balanced).item() - 1e-9
    assert norm(space, balanced) < norm(space, w)


def heads_of(space, w, singular, rng):
    """`w` with first-block queries and keys whose product has the given singular values."""
    blocks = space.read(w)
    shape = blocks[0]["key"].shape

    def frame():
        return torch.linalg.qr(torch.randn(shape, generator=rng, dtype=torch.float64))[0]

    root = torch.tensor(singular, dtype=torch.float64).sqrt()
    blocks[0] = {**blocks[0], "query": (frame() * root)[:, :, None], "key": frame() * root}
    return space.write(w, blocks)


def test_zero_singular_values_become_zeros(rng):
    space = block_kit.space()
    w = heads_of(space, block_kit.draw(space, 4, rng), [2.0, 0.5, 0.0], rng)
    balanced = balance_transformer(space, w)
    roles = space.read(balanced)[0]
    assert (roles["query"][..., 2] == 0).all()
    assert (roles["key"][..., 2] == 0).all()
    moved = groups.act(groups.sample("general-linear", space, 4, rng), space, w)
    assert apart(balanced, balance_transformer(space, moved)) < 1e-9


def test_repeated_singular_values_leave_the_basis_open_and_the_function_alone(rng):
    """Stated, not mended: S and the norm are those of the balanced point, the factors need not
    be."""
    space = block_kit.space()
    w = heads_of(space, block_kit.draw(space, 4, rng), [2.0, 2.0, 0.5], rng)
    moved = groups.act(groups.sample("general-linear", space, 4, rng), space, w)
    one, other = balance_transformer(space, w), balance_transformer(space, moved)
    assert apart(one, other) > 1e-3
    a, b = (space.read(x)[0] for x in (one, other))
    for left, right in ((a, b), (a, space.read(w)[0])):
        S = [torch.einsum("bkqid,bkjd->bkqij", x["query"], x["key"]) for x in (left, right)]
        assert torch.allclose(*S, rtol=1e-9, atol=1e-10)
    assert torch.allclose(norm(space, one), norm(space, other), rtol=1e-9)


def test_dead_neurons_and_broken_networks(rng):
    space = block_kit.space()
    w = block_kit.draw(space, 3, rng)
    w["1.up"][0, 2], w["1.up_bias"][0, 2] = 0, 0
    w["2.down"][1, :, 4] = 0
    w["1.query"][2, 0, 0] = float("nan")
    balanced = balance_transformer(space, w)
    assert (balanced["1.down"][0, :, 2] == 0).all()
    assert (balanced["2.up"][1, 4] == 0).all()
    for name, x in w.items():
        assert torch.equal(balanced[name][2].nan_to_num(), x[2].nan_to_num())
        assert balanced[name][:2].isfinite().all()


def test_balance_keeps_float32(rng):
    space = block_kit.space()
    w = {k: x.float() for k, x in block_kit.draw(space, 2, rng).items()}
    assert all(x.dtype == torch.float32 for x in balance_transformer(space, w).values())
