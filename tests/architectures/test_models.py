"""Architectures: published counts, equality with nfn, invariance with controls, layer by layer."""

import pytest
import torch
from layer_kit import SPACES, draw_weights, largest, randomise
from nfn.layers import HNPLinear as TheirHNP
from nfn.layers import HNPPool as TheirPool
from nfn.layers import NPLinear as TheirNP
from nfn_bridge import copy_hnp, copy_np, network_spec, theirs

from qemcli import groups, registry
from qemcli.architectures import flat_mlp, monomial_nfn, nfn, statnn
from qemcli.designs import Design
from qemcli.errors import UnsupportedError, UsageError
from qemcli.layers.equivariant import LINEAR
from qemcli.layers.features import act_on_features, door
from qemcli.layers.presets import table
from qemcli.spaces import cnn, mlp, small_transformer

SMALL = {"channels": (4, 4, 3), "head": 16}


def build(architecture, space, **config):
    torch.manual_seed(0)
    known = {"head": 16} if architecture in (statnn, flat_mlp) else SMALL
    model = architecture.Model(space, architecture.Config(**{**known, **config}))
    return randomise(model.double()).eval()


def error(model, space, group, rng, scales=(0.1, 10.0)):
    w = draw_weights(space, 16, rng)
    g = groups.sample(group, space, 16, rng, scales)
    with torch.no_grad():
        y, moved = model(w), model(groups.act(g, space, w))
    assert y.std() > 1e-6
    return ((moved - y).abs().max() / y.std(0).mean()).item()


def test_every_published_count_is_met():
    rows = table()
    assert {r["architecture"] for r in rows} >= {"statnn", "flat_mlp", "nfn", "monomial_nfn"}
    for row in rows:
        assert row["published"] in (None, row["parameters"]), row
    counts = {r["published"] for r in rows}
    assert counts >= {1_059_001, 2_031_390, 2_811_743, 254_619, 429_421, 264_525}


CASES = {
    "hnp": (nfn, {"linear": "hnp"}, "relu", {"permutation"}),
    "hnp-full": (nfn, {"linear": "hnp-full"}, "gelu", {"permutation"}),
    "np": (nfn, {"linear": "np"}, None, {"permutation"}),
    "np-posemb": (nfn, {"linear": "np-posemb"}, "tanh", {"permutation"}),
    "statnn": (statnn, {}, "relu", {"permutation"}),
    "flat": (flat_mlp, {}, "relu", set()),
    "monomial-relu": (monomial_nfn, {}, "relu", {"permutation", "scale", "monomial"}),
    "monomial-tanh": (monomial_nfn, {}, "tanh", {"permutation", "sign", "monomial"}),
    "monomial-tanh-published": (
        monomial_nfn, {"signs": "published"}, "tanh", {"permutation", "sign", "monomial"},
    ),
    "monomial-means": (
        monomial_nfn, {"pool": "means"}, "tanh", {"permutation", "sign", "monomial"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["mlp3", "mlp4", "pool", "flatten"])
@pytest.mark.parametrize("case", CASES)
def test_model_is_invariant_to_what_it_claims_and_to_no_more(case, name, rng):
    architecture, config, activation, claims = CASES[case]
    space = SPACES[name].running(activation)
    model = build(architecture, space, **config)
    assert model.claims(space) == claims
    for group in groups.applicable(space):
        if group in claims:
            assert error(model, space, group, rng) < 1e-10
        else:
            assert error(model, space, group, rng) > 1e-7


def seen(model, space, rng):
    """How far the answer moves when the rows of one layer move alone: another function."""
    w = draw_weights(space, 16, rng)
    name = space.layers[1].weight
    with torch.no_grad():
        y, moved = model(w), model({**w, name: w[name].flip(1)})
    return ((moved - y).abs().max() / y.std()).item()


@pytest.mark.parametrize("linear", LINEAR)
def test_nfn_sees_uncoupled_permutations(linear, rng):
    assert seen(build(nfn, SPACES["pool"], linear=linear), SPACES["pool"], rng) > 1e-6


def test_monomial_is_blind_to_uncoupled_permutations_and_exact_is_not(rng):
    """Its layers have no cross terms: a middle tensor is a set of entries to it."""
    space = SPACES["pool"]
    assert seen(build(monomial_nfn, space), space, rng) < 1e-10
    assert seen(build(monomial_nfn, space, quasi="exact", eps=0.5), space, rng) > 1e-4


@pytest.mark.parametrize(
    ("case", "group"),
    [("hnp", "permutation"), ("np-posemb", "permutation"), ("monomial-relu", "monomial"),
     ("monomial-tanh", "monomial")],
)  # fmt: skip
def test_every_step_is_equivariant(case, group, rng):
    architecture, config, activation, _ = CASES[case]
    space = SPACES["flatten"].running(activation)
    model = build(architecture, space, **config)
    w = draw_weights(space, 3, rng)
    g = groups.sample(group, space, 3, rng)
    steps = zip(model.equivariant(groups.act(g, space, w)), model.equivariant(w), strict=True)
    for (name, moved), (_, features) in steps:
        assert largest(moved, act_on_features(space, g, features)) < 1e-9, name


@pytest.mark.parametrize("kind", ["hnp", "np-posemb"])
@pytest.mark.parametrize("name", ["pool", "mlp3", "mlp2"])
def test_whole_model_equals_nfn(kind, name, rng):
    space = SPACES[name]
    model = build(nfn, space, linear=kind)
    spec = network_spec(space)
    w = draw_weights(space, 5, rng)
    h = theirs(space, door(space, w))
    for layer in model.linears:
        if kind == "hnp":
            other = TheirHNP(spec, layer.c_in, layer.c_out).double()
            copy_hnp(space, layer, other)
        else:
            other = TheirNP(spec, layer.neurons[1].reads[0], layer.c_out, io_embed=True).double()
            copy_np(layer, other)
        h = other(h).map(torch.relu)
    pooled = TheirPool(spec)(h)
    sizes = [la.taps for la in space.layers]
    # Theirs counts (channel, place), ours place by place: one permutation of the head's columns.
    counts = [space.widths[0] * sizes[0], 1]
    for taps in sizes[1:-1]:
        counts += [taps, 1]
    counts += [space.widths[-1] * sizes[-1], space.widths[-1]]
    parts = pooled.split(counts, dim=2)
    first = parts[0].unflatten(2, (space.widths[0], sizes[0])).transpose(1, 2).flatten(1)
    end = parts[-2].unflatten(2, (space.widths[-1], sizes[-1])).transpose(1, 2).flatten(1)
    last = parts[-1].transpose(1, 2).flatten(1)
    flat = torch.cat([first, *(p.flatten(1) for p in parts[1:-2]), end, last], dim=1)
    expected = model.head(flat)
    assert (model(w) - expected).abs().max() < 1e-10 * (1 + expected.abs().max())


def test_gradients_equal_nfn(rng):
    space = SPACES["pool"]
    model = build(nfn, space)
    layer = model.linears[0]
    other = TheirHNP(network_spec(space), 1, layer.c_out).double()
    copy_hnp(space, layer, other)
    mine, same = (
        {n: x.clone().requires_grad_() for n, x in w.items()}
        for w in [draw_weights(space, 2, rng)] * 2
    )
    sum(w.pow(3).sum() + b.pow(3).sum() for w, b in layer(door(space, mine))).backward()
    sum(
        w.pow(3).sum() + b.pow(3).sum() for w, b in other(theirs(space, door(space, same)))
    ).backward()
    for n in mine:
        assert torch.allclose(mine[n].grad, same[n].grad, rtol=1e-10)


def test_dead_networks_have_an_answer():
    space = SPACES["pool"]
    w = {n: torch.zeros(2, *s, dtype=torch.float64) for n, s in space.shapes.items()}
    for case in CASES.values():
        model = build(case[0], space.running(case[2]) if case[2] else space, **case[1])
        assert model(w).isfinite().all()


def test_monomial_refuses_an_unknown_activation():
    with pytest.raises(UnsupportedError) as caught:
        monomial_nfn.Model(mlp([2, 3, 2], activation=None))
    assert "--activation" in caught.value.hint
    with pytest.raises(UnsupportedError, match="gelu"):
        monomial_nfn.Model(mlp([2, 3, 2], activation="gelu"))


def test_means_under_scales_are_refused():
    with pytest.raises(UsageError, match="not invariant to scales"):
        monomial_nfn.Model(mlp([2, 3, 2]), monomial_nfn.Config(pool="means"))


@pytest.mark.parametrize("mode", ["paper", "released", "exact"])
def test_architectures_without_an_equivariant_layer_refuse_quasi_modes(mode):
    with pytest.raises(UsageError) as caught:
        Design("flat_mlp", mode).build(mlp([2, 3, 2]))
    assert "balanced" in caught.value.hint


@pytest.mark.parametrize("mode", ["paper", "released", "exact"])
def test_statnn_reads_what_a_quasi_layer_makes(mode, rng):
    space = SPACES["pool"]
    plain, changed = (
        randomise(statnn.Model(space, statnn.Config(head=16, quasi=m, eps=0.5)).double())
        for m in ("none", mode)
    )
    changed.head.load_state_dict(plain.head.state_dict())
    with torch.no_grad():
        changed.quasi.eps.rho.fill_(0.5)
    w = draw_weights(space, 16, rng)
    assert (changed(w) - plain(w)).abs().max() > 1e-4 * plain(w).std()
    g = groups.sample("permutation", space, 16, rng)
    error = (changed(groups.act(g, space, w)) - changed(w)).abs().max() / changed(w).std()
    assert (error < 1e-10) == (mode == "exact")
    assert changed.claims(space) == ({"permutation"} if mode == "exact" else set())


@pytest.mark.parametrize("module", [statnn, flat_mlp, nfn])
def test_standardised_models_keep_their_symmetry(module, rng):
    space = SPACES["pool"]
    model = build(module, space, standardised=True)
    w = {n: 1e4 * x + 3e3 for n, x in draw_weights(space, 16, rng).items()}
    raw = model(w)
    model.calibrate(w)
    assert model(w).abs().max() < raw.abs().max()
    claimed = "permutation" in model.claims(space)
    assert (error(model, space, "permutation", rng) < 1e-10) == claimed


def test_missing_biases_read_as_zeros(rng):
    space = mlp([2, 5, 3], bias=False)
    for architecture in (statnn, flat_mlp, nfn, monomial_nfn):
        assert build(architecture, space)(draw_weights(space, 2, rng)).shape == (2, 1)


def test_outputs_and_float32():
    spaces = [cnn([1, 4, 4], 3), small_transformer(8, 2, 6, 2, 3, (1, 2))]
    for name in registry.names("architectures"):
        module = registry.load("architectures", name)
        if hasattr(module, "PRESETS") and name != "rendered_cnn":  # it draws INRs
            kinds = {preset.space.split("-")[0] for preset in module.PRESETS.values()}
            space = spaces["transformer" in kinds]
            rng = torch.Generator().manual_seed(0)
            w = space.unflatten(torch.randn(2, space.size, generator=rng))
            model = module.Model(space, module.Config(outputs=7)).eval()
            assert model(w).shape == (2, 7)


def test_channel_dropout_is_alive_in_training_only(rng):
    space = SPACES["pool"]
    model = build(monomial_nfn, space, dropout=0.5)
    w = draw_weights(space, 4, rng)
    assert torch.equal(model(w), model(w))
    model.train()
    assert not torch.equal(model(w), model(w))
