"""GMN: equal to message passing by scatter, invariant to what it claims, on every kind of space."""

from __future__ import annotations

import graph_reference as slow
import pytest
import torch
from family_kit import families
from layer_kit import draw_weights, randomise
from zoo_kit import mixed_spaces

from qemcli import groups
from qemcli.architectures import gmn
from qemcli.errors import UnsupportedError
from qemcli.layers.message_passing import incoming_mean, joined
from qemcli.layers.typed_graph import typed_graph
from qemcli.spaces import Transformer, cnn, mlp, opaque, residual, small_transformer
from qemcli.testing import answers, invariance_error, sensitivity, size, tolerance

CONFIG = gmn.Config(channels=7, layers=3, outputs=2)
FAMILIES = families()
SPACES = {
    "cnn": mixed_spaces()[0],
    "flattened": cnn([2, 5, 4], 3, kernel=2, activation="tanh", positions=6),
    "mlp": mlp([4, 6, 5, 3], activation=None, bias=False),
    "sums": residual(cnn([2, 4, 3, 4, 4], 5), [-1, -1, 0, 2, -1]),
    "transformer": small_transformer(6, 2, 5, 2, 4, (3, 2)),
    "text": small_transformer(6, 3, 5, 1, 4),
    **FAMILIES,
}
SUMMED = {  # edges of value 1: two sums a block of the stream's width, groups of query heads
    "sums": 4 + 4, "gpt2": 2 * 12, "bert": 2 * 6, "vit": 2 * 2 * 6, "gpt_neox": 2 * 8,
    "llama": 2 * 12 + 24, "qwen2": 2 * 12 + 24,
}  # fmt: skip


def model_of(space, config=CONFIG, seed=0):
    torch.manual_seed(seed)
    model = gmn.Model(space, config).double().eval()
    return randomise(model)


@pytest.mark.parametrize("name", SPACES)
def test_dense_blocks_equal_scatter(name, rng):
    space = SPACES[name]
    model = model_of(space)
    w = draw_weights(space, 3, rng)
    model.calibrate(w)
    found = model(w)
    wanted = [slow.answer(model.shared, space, {k: v[i] for k, v in w.items()}) for i in range(3)]
    assert found.std() > 1e-4
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["cnn", "sums", "transformer"])
def test_gradients_equal_those_of_scatter(name, rng):
    space = SPACES[name]
    model = model_of(space)
    w = {k: v.requires_grad_() for k, v in draw_weights(space, 1, rng).items()}
    wanted = slow.answer(model.shared, space, {k: v[0] for k, v in w.items()}).square().sum()
    every = [*model.parameters(), *w.values()]
    theirs = torch.autograd.grad(wanted, every, allow_unused=True)
    ours = torch.autograd.grad(model(w).square().sum(), every, allow_unused=True)
    assert sum(g is not None and bool(g.any()) for g in ours) > len(w) + 20
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_every_parameter_of_a_network_is_an_edge():
    for name, space in SPACES.items():
        graph = typed_graph(space)
        sums = sum(n for block, n in zip(graph.edges, graph.counts, strict=True) if block.paired)
        assert sum(graph.counts) - sums == space.size
        assert sums == SUMMED.get(name, 0)


@pytest.mark.parametrize("name", SPACES)
def test_claims_hold_and_controls_fail(name, rng):
    space = SPACES[name]
    model = model_of(space)
    w = draw_weights(space, 8, rng)
    claims = model.claims(space)
    more = {"heads"} if isinstance(space, Transformer) else set()
    more |= {"stream"} if name == "bert" else set()  # an order without signs
    assert claims == {"permutation"} | more
    limit = tolerance(torch.float64, space.depth, size(answers(model, w)))
    for group in groups.applicable(space):
        drawn = [groups.sample(group, space, 8, rng) for _ in range(2)]  # one may be the identity
        error = max(float(invariance_error(model, space, w, g).max()) for g in drawn)
        assert (error < limit) == (group in claims), group
    moved = sensitivity(model, space, w, rng)
    assert min(float(change.max()) for change in moved.values()) > 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_order_of_the_stream_does_not_matter(name, rng):
    """All that reads or writes it moves at once; one norm alone is told from the others."""
    space = FAMILIES[name]
    model, w = model_of(space), draw_weights(space, 2, rng)
    element = groups.sample("stream", space, 2, rng)
    assert element.index
    moved = groups.act(groups.Element(element.index, {}), space, w)
    assert (model(moved) - model(w)).abs().max() < 1e-11
    norms = [t.name for t in space.tensors if len(t.axes) == 1 and t.name.endswith("weight")]
    assert len(norms) > 2
    for one in norms:
        turned = {**w, one: w[one].roll(1, 1)}
        assert (model(turned) - model(w)).abs().max() > 1e-9, one


@pytest.mark.parametrize("name", FAMILIES)
def test_the_norms_of_a_block_are_told_apart(name, rng):
    space = FAMILIES[name]
    model, w = model_of(space), draw_weights(space, 2, rng)
    first, second = (space.blocks[0].roles[role].tensor for role in ("norm1", "norm2"))
    changed = {**w, first: w[second], second: w[first]}
    assert (model(changed) - model(w)).abs().max() > 1e-9


def test_rotated_numbers_have_a_place_in_their_head_and_others_have_none(rng):
    order = [1, 0, 2, 3]
    for name, told in (("llama", True), ("gpt2", False)):
        space = FAMILIES[name]
        model, w = model_of(space), draw_weights(space, 2, rng)
        (roles, *rest), d = space.read(w), 4
        axes = {"query": -1, "key": -1, "value": -1, "out": -2, "query_bias": -1, "key_bias": -1,
                "value_bias": -1}  # fmt: skip
        moved = {r: x.index_select(axes[r], torch.tensor(order)) if r in axes else x
                 for r, x in roles.items()}  # fmt: skip
        assert roles["query"].shape[-1] == d
        change = (model(space.write(w, [moved, *rest])) - model(w)).abs().max()
        assert (change > 1e-9) == told, name


def test_a_predictor_saved_before_there_were_more_types_is_read(rng):
    space = SPACES["cnn"]
    model = model_of(space)
    old = {k: v.clone() for k, v in model.state_dict().items()}
    for name, rows in (("node_type.weight", 19), ("edge_type.weight", 10), ("scale", 10)):
        key = f"shared.entry.{name}"
        assert len(old[key]) > rows
        old[key] = old[key][:rows]
    other = model_of(space, seed=1)
    other.load_state_dict(old)
    w = draw_weights(space, 2, rng)
    assert torch.equal(other(w), model(w))


def test_inputs_and_outputs_are_told_apart(rng):
    space = SPACES["mlp"]
    model, w = model_of(space), draw_weights(space, 4, rng)
    for name, axis in (("0.weight", 2), ("4.weight", 1)):
        turned = {**w, name: w[name].roll(1, axis)}
        assert (model(turned) - model(w)).abs().min() > 1e-8


def test_one_set_of_parameters_reads_every_space(rng):
    model = gmn.Mixture(list(SPACES.values()), CONFIG).double().eval()
    alone = gmn.Mixture([SPACES["cnn"]], CONFIG)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    assert shapes == {k: v.shape for k, v in alone.state_dict().items()}
    for space in SPACES.values():
        read = model.on(space)
        assert read is model.on(space)
        assert not any(
            p is not q for p, q in zip(read.parameters(), model.parameters(), strict=True)
        )
        assert read(draw_weights(space, 2, rng)).shape == (2, 2)


def test_what_has_no_graph_is_refused():
    with pytest.raises(UnsupportedError, match="no typed graph"):
        gmn.Mixture([opaque({"a": (3, 4)}, "it is a test")])


def test_sums_over_blocks_equal_their_gradients_in_numbers(rng):
    graph = typed_graph(SPACES["sums"])
    edges, nodes = sum(graph.counts), graph.starts[-1]

    def drawn(n):
        return torch.randn(2, n, 2, generator=rng, dtype=torch.float64).requires_grad_()

    parts = drawn(edges), drawn(nodes), drawn(nodes)
    assert torch.autograd.gradcheck(lambda z, s, t: joined(graph, z * 1, s, t), parts)
    assert torch.autograd.gradcheck(lambda z, s: joined(graph, z * 1, s), parts[:2])
    assert torch.autograd.gradcheck(lambda z: incoming_mean(graph, z), parts[:1])
