"""ScaleGMN: the published counts, equality with a loop over edges, every group that is claimed."""

import pytest
import torch
from layer_kit import SPACES, draw_weights, largest, randomise

from qemcli import groups
from qemcli.architectures import scalegmn as sg
from qemcli.errors import UnsupportedError, UsageError
from qemcli.layers.features import act_on_features
from qemcli.layers.scale_entry import reciprocals
from qemcli.spaces import cnn, mlp, siren

SIREN, RELU = siren([2, 5, 7, 3]), mlp([2, 5, 7, 3], "relu")
CNN = SPACES["flatten"]
FULL = {"invariants": "symmetrised", "ends": "modulated", "edge_codes": True, "inner_codes": True}
CASES = {
    "sign": (SIREN, {}),
    "sign-both": (SIREN, {"direction": "both", "ends_apart": True}),
    "sign-symmetrised": (SIREN, {"direction": "both", "readout": "ends", **FULL}),
    "scale": (RELU, {"readout": "ends", **FULL}),
    "scale-both": (RELU, {"direction": "both", "ends_apart": True}),
    "scale-cnn": (CNN, {"direction": "both", "readout": "ends"}),
    "tanh-cnn": (cnn([2, 5, 4, 6], 3, activation="tanh"), {"invariants": "symmetrised"}),
    "gmn": (SIREN, {"symmetry": "permutation", "direction": "both", "edge_codes": True}),
    "gmn-cnn": (CNN, {"symmetry": "permutation", "readout": "ends", "inner_codes": True}),
}
CLAIMS = {
    "sign": {"permutation", "sign", "monomial"},
    "scale": {"permutation", "scale", "monomial"},
    "tanh": {"permutation", "sign", "monomial"},
    "gmn": {"permutation"},
}


def build(space, made=sg.Model, **config):
    torch.manual_seed(0)
    small = {"channels": 6, "width": 6, "layers": 3}
    return randomise(made(space, sg.Config(**{**small, **config})).double()).eval()


def test_scalegmn_presets_hold_the_published_counts():
    """That they are met is tested with all others, in test_models.py."""
    counts = {p.published for p in [*sg.PRESETS.values(), *sg.EDITORS.values()]}
    assert counts >= {1_772_042, 3_089_162, 664_458, 1_011_338, 397_450, 492_298}
    assert counts >= {1_356_801, 2_263_809, 2_318_849, 3_441_665}
    assert counts >= {4_002_058, 4_821_385, 2_429_832, 2_392_180}


def change(found, expected):
    return ((found - expected).abs().max() / expected.std(0).mean()).item()


@pytest.mark.parametrize("case", CASES)
def test_scalegmn_is_invariant_to_what_it_claims_and_to_no_more(case, rng):
    space, config = CASES[case]
    model, w = build(space, **config), draw_weights(space, 8, rng)
    assert model.claims(space) == CLAIMS[case.split("-")[0]]
    y = model(w)
    assert y.std() > 1e-6
    for group in groups.applicable(space):
        moved = model(groups.act(groups.sample(group, space, 8, rng), space, w))
        claimed = group in model.claims(space)
        assert (change(moved, y) < 1e-10) if claimed else (change(moved, y) > 1e-6), group


@pytest.mark.parametrize("case", CASES)
def test_scalegmn_sees_uncoupled_permutations(case, rng):
    space, config = CASES[case]
    model, w = build(space, **config), draw_weights(space, 8, rng)
    name = space.layers[1].weight
    assert change(model({**w, name: w[name].flip(1)}), model(w)) > 1e-6


@pytest.mark.parametrize("case", CASES)
def test_scalegmn_steps_and_deltas_are_equivariant(case, rng):
    space, config = CASES[case]
    w = draw_weights(space, 3, rng)
    model = build(space, sg.Editor, expand=2, **config)
    top = "monomial" if "monomial" in model.claims(space) else "permutation"
    g = groups.sample(top, space, 3, rng)
    moved, plain = model.equivariant(groups.act(g, space, w)), model.equivariant(w)
    for (name, found), (_, features) in zip(moved, plain, strict=True):
        assert largest(found, act_on_features(space, g, features)) < 1e-10, name
        assert largest(found, features) > 1e-3, name
    deltas, after = model(w), model(groups.act(g, space, w))
    for k in range(2):
        branch = {n: x[:, k] for n, x in deltas.items()}
        for name, expected in groups.act(g, space, branch).items():
            error = (after[name][:, k] - expected).abs().max() / expected.abs().max()
            assert error < 1e-10, name
    space.check(branch)
    assert all((x[:, 0] - x[:, 1]).abs().max() > 1e-6 * x.abs().max() for x in deltas.values())


@pytest.mark.parametrize("case", ["sign-both", "scale-both", "gmn"])
def test_scalegmn_answers_do_not_leak_between_networks(case, rng):
    space, config = CASES[case]
    model, w = build(space, **config), draw_weights(space, 5, rng)
    alone = model({n: x[2:3] for n, x in w.items()})
    others = {n: torch.cat([5 * x[:2], x[2:3], 5 * x[3:]]) for n, x in w.items()}
    assert (model(others)[2] - alone[0]).abs().max() < 1e-10 * alone.abs().max()


def perceptron(p, x):
    return p.outer(torch.nn.functional.silu(p.norm(p.inner(x))))


def equivariant(block, place, x, inv):
    """ScaleEq of one neuron with plain ends, from its definition."""
    if place == "hidden":
        return block.linear(x) * perceptron(block.modulation.phi, inv(x))
    return perceptron(block.ends.first if place == "first" else block.ends.last, x)


def looped(backbone, space, w, inv):
    """Nodes and edges after all layers: messages edge by edge, all the edges read as they are."""
    entry, n, last = backbone.entry, space.widths[0], len(space.layers)
    place = {l: "first" if l == 0 else "last" if l == last else "hidden" for l in range(last + 1)}
    nodes, edges = {}, {}
    for l, width in enumerate(space.widths):
        for i in range(width):
            bias = 1.0 if l == 0 else w[space.layers[l - 1].bias][0, i].item()
            code = entry.codes[i if l == 0 else n + l - 1 + (i if l == last else 0)]
            x = entry.node.weight[:, 0] * bias
            nodes[l, i] = x * code if place[l] == "hidden" else x + code
            for j in range(space.widths[l - 1] if l else 0):
                value = w[space.layers[l - 1].weight][0, i, j].flatten()
                kind = j if l == 1 else n + l - 2 + (i if l == last else 0)
                taps = entry.weights[0][:, : len(value)] @ value  # a single tap is the first of 2x2
                edges[(l - 1, j), (l, i)] = taps * entry.edge_codes[kind]
    for layer, skip in zip(backbone.layers, backbone.skips, strict=True):
        sums = []
        for way, direction in enumerate(layer.directions):
            m = direction.message
            found = {i: torch.zeros_like(x) for i, x in nodes.items()}
            for pair, e in edges.items():
                source, target = pair if way == 0 else pair[::-1]
                message = m.edge(e) * m.node(nodes[source])
                found[target] = found[target] + equivariant(m.map, place[target[0]], message, inv)
            sums.append(found)
        if layer.edge is not None:
            edges = {
                (j, i): layer.edge.linear(e)
                * perceptron(layer.edge.phi, torch.cat([inv(nodes[j]), inv(nodes[i])]))
                for (j, i), e in edges.items()
            }
        nodes = {
            i: equivariant(
                layer.update, place[i[0]], torch.cat([x, *(found[i] for found in sums)]), inv
            )
            + skip(x)
            for i, x in nodes.items()
        }
    return nodes, edges


@pytest.mark.parametrize(
    ("space", "direction", "inv"),
    [
        (siren([2, 3, 4, 2]), "both", torch.abs),
        (mlp([2, 3, 4, 2], "relu"), "forward", lambda x: x / x.norm()),
        (cnn([2, 3, 4], 2, kernel=2), "forward", lambda x: x / x.norm()),
    ],
    ids=["sign", "scale", "cnn"],
)
def test_scalegmn_equals_a_loop_over_edges(space, direction, inv, rng):
    model = build(space, direction=direction, ends_apart=True, edge_codes=True, layers=2)
    w = draw_weights(space, 1, rng)
    nodes, edges = looped(model.backbone, space, w, inv)
    graph = model.backbone(w)[-1]
    for (l, i), x in nodes.items():
        assert (graph.nodes[l][0, i] - x).abs().max() < 1e-10 * x.abs().max()
    for ((_, j), (l, i)), e in edges.items():
        assert (graph.edges[l - 1][0, i, j] - e).abs().max() < 1e-10 * e.abs().max()


@pytest.mark.parametrize("direction", sg.DIRECTIONS)
@pytest.mark.parametrize("space", [SIREN, RELU], ids=["sign", "scale"])
def test_scalegmn_leaves_out_only_what_its_readout_does_not_need(space, direction, rng):
    model = build(space, readout="ends", direction=direction, layers=3, inner_codes=True)
    w = draw_weights(space, 3, rng)
    parameters = list(model.parameters())
    found, whole = model(w), model.readout(model.backbone(w)[-1].nodes)
    assert change(found, whole) < 1e-12
    pairs = [
        torch.autograd.grad(y.sum(), parameters, allow_unused=True, materialize_grads=True)
        for y in (found, whole)
    ]
    for a, b in zip(*pairs, strict=True):
        assert (a - b).abs().max() <= 1e-10 * max(1.0, b.abs().max())
    steps = model.backbone(w, model.readout.read)
    assert steps[-1].nodes[1] is steps[-2].nodes[1]


def test_reciprocals_carry_the_inverse_factors_and_zeros_stay(rng):
    w = draw_weights(RELU, 3, rng)
    name = RELU.layers[1].weight
    w[name][:, 2, 1] = 0.0
    g = groups.sample("scale", RELU, 3, rng)
    plain, moved = reciprocals(RELU, w), reciprocals(RELU, groups.act(g, RELU, w))
    q = [1.0, g.factor["h1"], g.factor["h2"], 1.0]
    for l, (x, y) in enumerate(zip(plain, moved, strict=True)):
        below = q[l] if l == 0 else q[l][:, None, :, None]
        above = q[l + 1] if l == 2 else q[l + 1][:, :, None, None]
        assert (y - x * below / above).abs().max() < 1e-10 * y.abs().max()
    assert (plain[1][:, 2, 1] == 0).all()
    dead = {n: torch.zeros_like(x) for n, x in w.items()}
    assert build(RELU, direction="both")(dead).isfinite().all()


def test_scalegmn_calibration_keeps_its_claims(rng):
    for case in ("sign", "scale-both"):
        space, config = CASES[case]
        model = build(space, **config)
        w = {n: 50 * x for n, x in draw_weights(space, 8, rng).items()}
        before = model(w)
        model.calibrate(w)
        assert change(model(w), before) > 1e-3
        moved = model(groups.act(groups.sample("monomial", space, 8, rng), space, w))
        assert change(moved, model(w)) < 1e-10


def test_scalegmn_gradients_are_alive_everywhere(rng):
    """Where both ends share a map and the readout is of all neurons; elsewhere the published
    modules have maps that nothing reads."""
    for space, symmetry in ((SIREN, "auto"), (RELU, "auto"), (SIREN, "permutation")):
        config = {"direction": "both", "symmetry": symmetry}
        for made in (sg.Model, sg.Editor):
            model = build(space, made, **{"layers": 4, **config})
            y = model(draw_weights(space, 3, rng))
            loss = sum(x.square().sum() for x in (y.values() if isinstance(y, dict) else [y]))
            loss.backward()
            dead = {n for n, p in model.named_parameters() if p.grad is None}
            # An editor does not read what its last layer sends to the inputs.
            ends = {n for n in dead if "layers.3.directions.1.message.map.ends" in n}
            assert dead == (ends if made is sg.Editor else set())


def test_scalegmn_refuses_what_has_no_factors():
    with pytest.raises(UnsupportedError) as caught:
        sg.Model(mlp([2, 3, 2], activation="gelu"))
    assert "permutation" in caught.value.hint
    with pytest.raises(UnsupportedError, match="carries scales"):
        sg.Model(SIREN, sg.Config(symmetry="scale"))
    assert sg.Model(mlp([2, 3, 2], None), sg.Config(symmetry="permutation")) is not None
    for wrong in ({"symmetry": "signs"}, {"direction": "up"}, {"ends": "no"}, {"readout": "all"}):
        with pytest.raises(UsageError):
            sg.Model(SIREN, sg.Config(**wrong))
