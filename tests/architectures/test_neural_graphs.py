"""Neural graphs: the published counts, equality with a loop over edges, symmetry with controls."""

import math

import pytest
import torch
from layer_kit import SPACES, draw_weights, largest, randomise
from torch.nn import functional as F

from qemcli import groups
from qemcli.architectures import neural_graphs as ng
from qemcli.errors import UnsupportedError, UsageError
from qemcli.layers.features import act_on_features
from qemcli.layers.pna import aggregate, mapped
from qemcli.spaces import cnn, mlp, residual, siren

SIREN = siren([2, 5, 7, 3])
SUMS = residual(cnn([2, 4, 3, 4, 4], 5), [-1, -1, 0, 2, -1])
LOOPED = {
    "chain": siren([2, 3, 4, 1]),
    "sums": residual(mlp([2, 3, 2, 3, 3, 1]), [-1, -1, 0, 0, -1]),
}
SMALL = {"channels": 8, "layers": 3}
CASES = {
    "gnn": (SIREN, {}),
    "gnn-fourier": (SIREN, {"fourier": 3, "fourier_scale": 0.5}),
    "gnn-probes": (SIREN, {"probes": 3}),
    "gnn-pool": (SPACES["pool"], {}),
    "gnn-flatten": (SPACES["flatten"], {"fourier": 3, "fourier_scale": 0.5}),
    "transformer": (SIREN, {"backbone": "transformer", "channels": 16, "probes": 2}),
    "transformer-fourier": (SIREN, {"backbone": "transformer", "fourier": 3, "fourier_scale": 0.5}),
    "transformer-flatten": (SPACES["flatten"], {"backbone": "transformer"}),
    "gnn-sums": (SUMS, {}),
    "gnn-sums-fourier": (SUMS, {"fourier": 3, "fourier_scale": 0.5}),
    "transformer-sums": (SUMS, {"backbone": "transformer"}),
}


def build(space, made=ng.Model, **config):
    torch.manual_seed(0)
    return randomise(made(space, ng.Config(**{**SMALL, **config})).double()).eval()


def test_neural_graph_presets_hold_the_published_counts():
    """That they are met is tested with all others, in test_models.py."""
    counts = {p.published for p in [*ng.PRESETS.values(), *ng.EDITORS.values()]}
    assert counts >= {92_010, 100_714, 376_586, 393_866, 1_186_696, 391_112}


@pytest.mark.parametrize("case", CASES)
def test_neural_graph_is_invariant_to_permutations_only(case, rng):
    space, config = CASES[case]
    model, w = build(space, **config), draw_weights(space, 8, rng)
    assert model.claims(space) == {"permutation"}
    y = model(w)
    assert y.std() > 1e-6
    for group in groups.applicable(space):
        moved = model(groups.act(groups.sample(group, space, 8, rng), space, w))
        change = ((moved - y).abs().max() / y.std()).item()
        assert (change < 1e-10) if group == "permutation" else (change > 1e-6), group


@pytest.mark.parametrize("case", CASES)
def test_neural_graph_steps_are_equivariant(case, rng):
    space, config = CASES[case]
    model, w = build(space, **config), draw_weights(space, 3, rng)
    g = groups.sample("permutation", space, 3, rng)
    moved, plain = model.equivariant(groups.act(g, space, w)), model.equivariant(w)
    assert len(plain) >= 2
    for (name, found), (_, features) in zip(moved, plain, strict=True):
        assert largest(found, act_on_features(space, g, features)) < 1e-10, name
        assert largest(found, features) > 1e-3, name


@pytest.mark.parametrize("case", ["gnn", "gnn-pool", "gnn-flatten", "transformer"])
def test_neural_graph_deltas_are_equivariant_in_every_branch(case, rng):
    """In every tensor, relative to its own size: the published NG-GNN fails in the biases."""
    space, config = CASES[case]
    model, w = build(space, ng.Editor, expand=2, **config), draw_weights(space, 3, rng)
    g = groups.sample("permutation", space, 3, rng)
    deltas, after = model(w), model(groups.act(g, space, w))
    for k in range(2):
        branch = {n: x[:, k] for n, x in deltas.items()}
        space.check(branch)
        for name, expected in groups.act(g, space, branch).items():
            found, size = after[name][:, k], expected.abs().max()
            assert (found - expected).abs().max() < 1e-10 * size, name
            if name != space.layers[-1].bias:
                assert (found - branch[name]).abs().max() > 1e-3 * size, name
    assert all((x[:, 0] - x[:, 1]).abs().max() > 1e-6 * x.abs().max() for x in deltas.values())
    assert model.out.scales.numel() == len(space.tensors)


@pytest.mark.parametrize("case", CASES)
def test_neural_graph_answers_do_not_leak_between_networks(case, rng):
    space, config = CASES[case]
    model, w = build(space, **config), draw_weights(space, 5, rng)
    alone = model({n: x[2:3] for n, x in w.items()})
    others = {n: torch.cat([5 * x[:2], x[2:3], 5 * x[3:]]) for n, x in w.items()}
    assert (model(others)[2] - alone[0]).abs().max() < 1e-12 * alone.abs().max()


def entries(space, w):
    """Graph of one network: places (layer, index), biases and the scalar of every weight."""
    nodes = [(l, i) for l, n in enumerate(space.widths) for i in range(n)]
    bias, weight = {(0, i): 0.0 for i in range(space.widths[0])}, {}
    for l, (matrix, b) in enumerate(space.matrices(w), start=1):
        for i in range(matrix.shape[1]):
            bias[l, i] = b[0, i].item()
            for j in range(matrix.shape[2]):
                weight[(l - 1, j), (l, i)] = matrix[0, i, j, 0].item()
    return nodes, bias, weight


def embedded(entry, space, w):
    """Nodes and directed edges of the first layer, from the raw channels (w, 0, w), (0, w, w)."""
    nodes, bias, weight = entries(space, w)
    n, *hidden, _ = space.widths
    x, e = {}, {}
    for l, i in nodes:
        kind = i if l == 0 else n + l - 1 if l <= len(hidden) else n + len(hidden) + i
        value = torch.tensor([bias[l, i]], dtype=torch.float64)
        x[l, i] = entry.node_in(entry.bias_map(value)) + entry.codes[kind]
    for (j, i), value in weight.items():
        for pair, raw in (((j, i), [value, 0, value]), ((i, j), [0, value, value])):
            raw = torch.tensor(raw, dtype=torch.float64)
            own = entry.weight_map.weights[0][..., 0] @ raw + entry.weight_map.bias
            e[pair] = entry.edge_in(own)
    for here, there in sums(space):
        for pair, raw in (((there, here), [1, 0, 1]), ((here, there), [0, 1, 1])):
            raw = torch.tensor(raw, dtype=torch.float64)
            own = entry.weight_map.weights[0][..., 0] @ raw + entry.weight_map.bias
            e[pair] = entry.edge_in(own)
    return x, e


def sums(space):
    """Pairs of a neuron and the earlier one that is added to it."""
    added = getattr(space, "added", [-1] * len(space.layers))
    return [
        ((l, i), (earlier + 1, i))
        for l, earlier in enumerate(added, start=1)
        if earlier >= 0
        for i in range(space.widths[l])
    ]


def convolved(layer, x, e, average):
    """One PNA convolution, edge by edge, from its definition."""
    found = {}
    for i in x:
        messages = []
        for j, target in e:
            if target == i:
                s, t = layer.encoder(e[j, i]).chunk(2)
                messages.append(s * layer.pre(torch.cat([x[i], x[j]])) + t)
        m = torch.stack(messages)
        std = (m.square().mean(0) - m.mean(0).square()).clamp_min(1e-5).sqrt()
        parts = torch.cat([m.mean(0), m.amin(0), m.amax(0), std])
        parts = torch.cat([x[i], parts, math.log(len(messages) + 1) / average * parts])
        found[i] = layer.out(layer.post(parts))
    return found


def normed(norm, x):
    """Every node by the mean and variance of all nodes and channels."""
    nodes = torch.cat(list(x.values()))
    mean, std = nodes.mean(), (nodes.var(unbiased=False) + 1e-5).sqrt()
    return {i: (v - mean) / std * norm.weight + norm.bias for i, v in x.items()}


@pytest.mark.parametrize("name", LOOPED)
def test_gnn_equals_a_loop_over_edges(name, rng):
    space = LOOPED[name]
    model, w = build(space), draw_weights(space, 1, rng)
    backbone = model.backbone
    x, e = embedded(backbone.entry, space, w)
    degrees = [sum(target == i for _, target in e) for i in x]
    average = sum(math.log(d + 1) for d in degrees) / len(degrees)
    for k, layer in enumerate(backbone.convolutions):
        x = convolved(layer, x, e, average)
        if k < len(backbone.updates):
            update = backbone.updates[k]
            x = {i: F.silu(v) for i, v in normed(backbone.norms[k], x).items()}
            e = {
                (j, i): update.outer(
                    F.silu(update.edge(v) + update.source(x[j]) + update.target(x[i]))
                )
                for (j, i), v in e.items()
            }
    found = backbone(w)[0][0]
    assert (found - torch.stack(list(x.values()))).abs().max() < 1e-10 * found.abs().max()
    last, end = backbone(w)[1][-1], len(space.layers)
    assert (last[0, 0, 2] - e[(end - 1, 2), (end, 0)]).abs().max() < 1e-10 * last.abs().max()
    outputs = backbone.outputs(w)
    assert (outputs - backbone(w)[0][:, -1:]).abs().max() < 1e-12 * outputs.abs().max()


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
@pytest.mark.parametrize("name", ["pool", "flatten"])
def test_outputs_are_those_of_the_whole_graph(name, layers, rng):
    """What they do not depend on is left out, and every gradient is the same."""
    space = SPACES[name]
    model, w = build(space, layers=layers, fourier=3), draw_weights(space, 3, rng)
    backbone, n = model.backbone, space.widths[-1]
    parameters = list(backbone.parameters())
    found, whole = backbone.outputs(w), backbone(w)[0][:, -n:]
    assert (found - whole).abs().max() < 1e-12 * whole.abs().max()
    draw = torch.randn(whole.shape, generator=rng, dtype=whole.dtype)
    pairs = [
        torch.autograd.grad((x * draw).sum(), parameters, allow_unused=True, materialize_grads=True)
        for x in (found, whole)
    ]
    for a, b in zip(*pairs, strict=True):
        assert (a - b).abs().max() <= 1e-10 * max(1.0, b.abs().max())


def attended(layer, x, e):
    """One attention, pair by pair, from its definition."""
    attention, found = layer.attention, {}
    width, heads = attention.width, attention.heads
    for i in x:
        q = attention.node(x[i])[:width]
        scores, values = [], []
        for j in x:
            _, k, v = attention.node(x[j]).chunk(3)
            by_q, by_k, by_v, gate = attention.edge(e[i, j]).chunk(4)
            product = ((q + by_q) * (k + by_k)).view(heads, -1).sum(1)
            scores.append(product / width**0.5)
            values.append((v * gate + by_v).view(heads, -1))
        a = torch.stack(scores).softmax(0)
        y = attention.out((a[..., None] * torch.stack(values)).sum(0).flatten())
        y = layer.norms[0](x[i] + layer.after(y))
        found[i] = layer.norms[1](y + layer.mlp(y))
    return found


@pytest.mark.parametrize("name", LOOPED)
def test_transformer_equals_a_loop_over_pairs(name, rng):
    space = LOOPED[name]
    model = build(space, backbone="transformer", heads=4, layers=2)
    w, backbone = draw_weights(space, 1, rng), model.backbone
    x, edges = embedded(backbone.entry, space, w)
    absent = backbone.entry.edge_in(backbone.entry.weight_map.bias)
    e = {(i, j): edges.get((i, j), absent) for i in x for j in x}
    for k, layer in enumerate(backbone.layers):
        x = attended(layer, x, e)
        for u in list(backbone.updates)[k : k + 1]:
            new = {}
            for i, j in e:
                z = u.pair(torch.cat([e[i, j], e[j, i]])) + u.source(x[i]) + u.target(x[j])
                y = u.norms[0](e[i, j] + u.outer(F.gelu(z)))
                new[i, j] = u.norms[1](y + u.mlp(y))
            e = new
    found = backbone(w)[0][0]
    assert (found - torch.stack(list(x.values()))).abs().max() < 1e-10 * found.abs().max()
    last, end = backbone(w)[1][-1], len(space.layers)
    assert (last[0, 0, 1] - e[(end - 1, 1), (end, 0)]).abs().max() < 1e-10 * last.abs().max()


def test_sum_of_neighbours_is_an_identity_on_the_kernel_of_attention(rng):
    """z = W o + o is z = (W + 1) o: pairs hold both, the edge of messages stands beside."""
    chain = mlp([2, 3, 3, 1])
    near = residual(chain, [-1, 0, -1])
    w = draw_weights(near, 2, rng)
    more = {**w, "2.weight": w["2.weight"] + torch.eye(3, dtype=torch.float64)}
    config = {"backbone": "transformer", "heads": 4, "layers": 2}
    found, wanted = build(near, **config)(w), build(chain, **config)(more)
    assert (found - wanted).abs().max() < 1e-12
    assert (found - build(chain, **config)(w)).abs().max() > 1e-6
    messages = [build(s, layers=4, outputs=8)(w) for s in (near, chain)]
    assert (messages[0] - messages[1]).abs().max() > 1e-6


@pytest.mark.parametrize("backbone", ["gnn", "transformer"])
def test_neurons_that_are_added_move_together(backbone, rng):
    """Alone, those of one of the two layers are told apart by the sum; in the chain they are
    not."""
    chain = cnn([2, 4, 3, 4, 4], 5)
    w = draw_weights(SUMS, 4, rng)
    order = torch.tensor([2, 0, 3, 1])
    moved = {
        **w,
        "conv3.weight": w["conv3.weight"][:, order],
        "conv3.bias": w["conv3.bias"][:, order],
        "conv4.weight": w["conv4.weight"][:, :, order],
    }
    found = [build(s, backbone=backbone, layers=4) for s in (chain, SUMS)]
    change = [(model(moved) - model(w)).abs().max() / model(w).std() for model in found]
    assert change[0] < 1e-10
    assert change[1] > 1e-6


def test_probes_are_refused_where_layers_are_added():
    with pytest.raises(UnsupportedError, match="without sums"):
        build(LOOPED["sums"], probes=3)


def test_aggregate_has_the_gradient_of_its_formula(rng):
    def plain(modulation, p, q):
        s, t = modulation.chunk(2, dim=-1)
        m = s * (p[:, :, None] + q[:, None]) + t
        std = (m.square().mean(2) - m.mean(2).square()).clamp_min(1e-5).sqrt()
        return torch.cat([m.mean(2), m.amin(2), m.amax(2), std], dim=-1)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()

    for sources in (1, 4):  # of one source alone the variance is below its floor
        inputs = draw(2, 3, sources, 6), draw(2, 3, 3), draw(2, sources, 3)
        upstream = torch.randn(2, 3, 12, generator=rng, dtype=torch.float64)
        assert torch.allclose(aggregate(*inputs), plain(*inputs), atol=1e-12)
        wanted = torch.autograd.grad(plain(*inputs), inputs, upstream)
        for found, want in zip(
            torch.autograd.grad(aggregate(*inputs), inputs, upstream), wanted, strict=True
        ):
            assert torch.allclose(found, want, rtol=1e-9, atol=1e-9)


def test_joined_maps_have_the_gradients_of_two_linears(rng):
    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()

    inputs = draw(2, 3, 4, 5), draw(6, 5), draw(6), draw(3, 5)
    x, a, bias, b = inputs
    upstream = [draw(2, 3, 4, n).detach() for n in (6, 3)]
    found = [y[0] for y in mapped([x], [a, b], bias, 1)]
    wanted = [F.linear(x, a, bias), F.linear(x, b)]
    pairs = [*zip(found, wanted, strict=True)]
    grads = [torch.autograd.grad(y, inputs, upstream) for y in (found, wanted)]
    pairs += zip(*grads, strict=True)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in pairs)


def test_equal_extremes_share_their_gradient():
    modulation = torch.zeros(1, 1, 4, 2, dtype=torch.float64, requires_grad=True)
    p = torch.zeros(1, 1, 1, dtype=torch.float64)
    aggregate(modulation, p, torch.zeros(1, 4, 1, dtype=torch.float64))[..., 1].sum().backward()
    assert torch.equal(modulation.grad[..., 1], torch.full((1, 1, 4), 0.25, dtype=torch.float64))


def test_probes_are_the_values_of_the_networks(rng):
    from qemcli.functions import respond

    model, w = build(SIREN, probes=3), draw_weights(SIREN, 4, rng)
    probes = model.backbone.entry.probes
    values = probes.values(w)
    assert [v.shape[1] for v in values] == list(SIREN.widths)
    expected = respond(SIREN, w, probes.points)
    assert (values[-1].transpose(1, 2) - expected).abs().max() < 1e-12
    model(w).sum().backward()
    assert probes.points.grad.abs().max() > 0


def test_calibration_is_by_tensor_and_keeps_the_symmetry(rng):
    model = build(SIREN)
    w = {n: 50 * x + 7 for n, x in draw_weights(SIREN, 8, rng).items()}
    before = model(w)
    model.calibrate(w)
    after = model(w)
    assert (before - after).abs().max() > 1e-3
    moved = model(groups.act(groups.sample("permutation", SIREN, 8, rng), SIREN, w))
    assert (moved - after).abs().max() < 1e-10 * after.std()


def test_neural_graph_refuses_what_it_cannot_read():
    with pytest.raises(UnsupportedError, match="at least two layers"):
        ng.Model(siren([2, 3]))
    with pytest.raises(UnsupportedError, match="dense networks"):
        ng.Model(SPACES["pool"], ng.Config(probes=2))
    with pytest.raises(UsageError) as caught:
        ng.Model(SIREN, ng.Config(backbone="gmm"))
    assert "gnn" in caught.value.hint


MIXED = [SIREN.running("tanh"), SPACES["pool"], SPACES["flatten"], SPACES["mlp3"], SPACES["mlp4"]]


@pytest.mark.parametrize("backbone", ng.BACKBONES)
def test_neural_graph_of_many_architectures_is_invariant_and_tells_places_apart(backbone, rng):
    config = ng.Config(backbone, channels=8, layers=4, heads=4)
    spaces = [space for space in MIXED if space.widths[-1] == 3]
    model = ng.Mixture(spaces, config)
    parts = [(space, draw_weights(space, 8, rng)) for space in spaces]
    randomise(model.double()).eval()
    model.calibrate(parts)
    for space, w in parts:
        read = model.on(space)
        y = read(w)
        for group in groups.applicable(space):
            moved = read(groups.act(groups.sample(group, space, 8, rng), space, w))
            change = ((moved - y).abs().max() / y.std()).item()
            assert (change < 1e-10) if group == "permutation" else (change > 1e-6), group
        first, last = space.layers[0].weight, space.layers[-1].bias
        turned = [{**w, first: w[first].roll(1, 2)}, {**w, last: w[last].roll(1, 1)}]
        for other in turned[space.widths[0] == 1 :]:
            assert (read(other) - y).abs().max() > 1e-8 * y.std()
    with pytest.raises(UnsupportedError, match="3 outputs exactly does not hold it"):
        model.on(SPACES["mlp4"])
    with pytest.raises(UnsupportedError, match="probe features have maps"):
        ng.Mixture(spaces, ng.Config(backbone, probes=2))


def test_neural_graph_of_many_architectures_equals_one_whose_codes_are_sums(rng):
    """With the codes of places and the constants set alike, it is the published graph."""
    space = SPACES["pool"]
    mixture = ng.Mixture([space, SPACES["mlp3"]], ng.Config(**SMALL)).double().eval()
    alone = build(space)
    own, shared = alone.backbone.entry, mixture.core.backbone.entry
    state = {k: v for k, v in mixture.core.state_dict().items() if "standard" not in k}
    places = torch.tensor(mixture.layout.places(space))
    kinds = torch.tensor([kind for (kind,) in own.kinds])
    with torch.no_grad():
        codes = torch.zeros_like(own.codes)
        codes[kinds] = shared.codes[places].sum(1)
    alone.load_state_dict({**state, "backbone.entry.codes": codes}, strict=False)
    w = draw_weights(space, 4, rng)
    assert largest([(alone(w), alone(w))], [(mixture.on(space)(w),) * 2]) < 1e-12
