"""Models that read INRs: exact counts, what they are invariant to, and that Fourier matters."""

from dataclasses import replace

import pytest
import torch
from layer_kit import draw_weights, randomise

from qemcli import groups
from qemcli.architectures import flat_mlp, monomial_nfn, nfn
from qemcli.errors import UsageError
from qemcli.spaces import mlp, siren

SPACE = siren([2, 5, 7, 3])
SMALL = {"channels": (4, 3), "head": 8, "outputs": 4}
READ = {"pool": "means", "reader_channels": (5, 4), "fourier": 3, "fourier_scale": 0.5, **SMALL}
MODELS = {
    "hnp": (nfn, {"fourier": 3, "fourier_scale": 0.5, **SMALL}, {"permutation"}),
    "hnp-exact": (
        nfn,
        {"fourier": 3, "fourier_scale": 0.5, "quasi": "exact", "eps": 0.5, **SMALL},
        {"permutation"},
    ),
    "hnp-paper": (
        nfn,
        {"fourier": 3, "fourier_scale": 0.5, "quasi": "paper", "eps": 0.5, **SMALL},
        set(),
    ),
    "np-io": (
        nfn,
        {"linear": "np", "fourier": 3, "fourier_scale": 0.5, "io_code": (3, 2), **SMALL},
        {"permutation"},
    ),
    "monomial-hnp": (
        monomial_nfn,
        {"reader": "hnp", "odd": "sin", **READ},
        {"permutation", "sign"},
    ),
    "monomial-np": (
        monomial_nfn,
        {"reader": "np", "io_code": (3, 2), **READ},
        {"permutation", "sign"},
    ),
    "monomial-products": (
        monomial_nfn,
        {"reader": "hnp-full", "even": "products", **READ},
        {"permutation", "sign"},
    ),
    "monomial-exact": (
        monomial_nfn,
        {"reader": "hnp", "even": "products", "quasi": "exact", "eps": 0.5, **READ},
        {"permutation", "sign"},
    ),
    "monomial-paper": (
        monomial_nfn,
        {"reader": "hnp", "quasi": "paper", "eps": 0.5, **READ},
        set(),
    ),
    "monomial-released": (
        monomial_nfn,
        {"reader": "hnp", "quasi": "released", "eps": 0.5, **READ},
        set(),
    ),
}  # fmt: skip


def build(name, **more):
    module, config, _ = MODELS[name]
    torch.manual_seed(0)
    model = module.Model(SPACE, module.Config(**config, **more))
    return randomise(model.double()).eval()


def error(model, group, rng, space=SPACE):
    w = draw_weights(space, 16, rng)
    g = groups.sample(group, space, 16, rng)
    with torch.no_grad():
        y, moved = model(w), model(groups.act(g, space, w))
    return ((moved - y).abs().max() / y.std(0).mean()).item()


@pytest.mark.parametrize("name", MODELS)
def test_inr_model_is_invariant_to_what_it_claims_and_to_no_more(name, rng):
    model, claims = build(name), MODELS[name][2]
    assert model.claims(SPACE) - {"monomial"} == claims
    for group in ("permutation", "sign"):
        gap = error(model, group, rng)
        assert gap < 1e-10 if group in claims else gap > 1e-6


def test_np_with_codes_tells_outputs_apart_and_without_does_not(rng):
    w = draw_weights(SPACE, 8, rng)
    last = SPACE.layers[-1]
    swapped = {**w, **{n: w[n].flip(1) for n in (last.weight, last.bias)}}
    coded = build("np-io")
    assert (coded(w) - coded(swapped)).abs().max() > 1e-3
    plain = nfn.Model(SPACE, replace(coded.config, io_code=()))
    randomise(plain.double()).eval()
    assert (plain(w) - plain(swapped)).abs().max() < 1e-10


def seen(model, rng):
    """How far the answer moves when one layer's entries get signs of no neuron."""
    w = draw_weights(SPACE, 8, rng)
    name = SPACE.layers[1].weight
    signs = torch.where(torch.rand(w[name].shape, generator=rng) < 0.5, -1.0, 1.0).double()
    with torch.no_grad():
        return (model(w) - model({**w, name: w[name] * signs})).abs().max().item()


def test_absolute_values_are_blind_to_how_signs_hang_together_and_products_are_not(rng):
    assert seen(build("monomial-hnp"), rng) < 1e-10
    assert seen(build("monomial-products"), rng) > 1e-4


def test_scaled_models_see_small_tensors_and_keep_signs(rng):
    model = build("monomial-products", scaled=True)
    w = draw_weights(SPACE, 64, rng)
    tiny = {n: x * 1e-3 for n, x in w.items()}
    model.calibrate(w)
    expected = model(w)
    model.calibrate(tiny)
    assert torch.allclose(model(tiny), expected)
    for group in ("permutation", "sign"):
        assert error(model, group, rng) < 1e-10


def test_a_reader_needs_signs():
    with pytest.raises(UsageError, match="scales"):
        monomial_nfn.Model(mlp([2, 3, 2]), monomial_nfn.Config(reader="hnp"))
    with pytest.raises(UsageError, match="even map"):
        monomial_nfn.Model(SPACE, monomial_nfn.Config(even="cube"))
    with pytest.raises(UsageError, match="odd function"):
        monomial_nfn.Model(SPACE, monomial_nfn.Config(odd="cos"))


def test_the_published_inr_configurations_are_there():
    """That each has as many parameters as it says is tested with all presets (test_models.py)."""
    modules = (nfn, monomial_nfn, flat_mlp)
    models = {p.published for m in modules for p in m.PRESETS.values() if "siren" in p.space}
    editors = {p.published for m in modules for p in m.EDITORS.values()}
    plain = {16_237_866, 15_118_634, 15_213_866, 42_379_306, 22_083_114, 2_263_010, 2_197_010}
    monomial = {16_248_045, 22_146_603, 20_494_603, 16_386_093, 22_332_971, 20_680_971}
    assert models - {None} == plain | monomial
    edit = {12_878_235, 6_440_853, 4_133_656, 4_134_827, 4_134_153, 4_506_257, 4_374_191}
    assert editors - {None} == edit


def test_frequencies_travel_with_the_weights(rng):
    first, second = build("hnp"), nfn.Model(SPACE, build("hnp").config).double().eval()
    w = draw_weights(SPACE, 2, rng)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(w), second(w))


RELU = mlp([2, 5, 7, 3])
CODED = {"reader_channels": (5, 4), "fourier": 3, "fourier_scale": 0.5, "expand": 2}
EDITORS = {
    "plain": (monomial_nfn, SPACE, {"channels": (4, 3), "expand": 2}, {"permutation", "sign"}),
    "relu": (monomial_nfn, RELU, {"channels": (4, 3), "expand": 2}, {"permutation", "scale"}),
    "products": (
        monomial_nfn,
        SPACE,
        {"channels": (4, 3), "even": "products", "reader": "hnp-full", **CODED},
        {"permutation", "sign"},
    ),
    "absolute": (
        monomial_nfn,
        SPACE,
        {"channels": (4, 3), "reader": "np", "io_code": (3, 2), **CODED},
        {"permutation", "sign"},
    ),
    "published": (
        monomial_nfn,
        SPACE,
        {"channels": (4, 1), "odd": "identity", "even": "none", "reader": "hnp", **CODED},
        {"permutation"},
    ),
    "flat": (flat_mlp, SPACE, {"head": 8, "expand": 2}, set()),
    "hnp": (nfn, SPACE, {"channels": (4, 3), "fourier": 3, "expand": 2}, {"permutation"}),
}


@pytest.mark.parametrize("name", EDITORS)
def test_every_branch_of_an_editor_keeps_what_it_claims_and_no_more(name, rng):
    module, space, config, claims = EDITORS[name]
    torch.manual_seed(0)
    model = randomise(module.Editor(space, module.Config(**config)).double()).eval()
    assert model.claims(space) - {"monomial"} == claims
    w = draw_weights(space, 4, rng)
    for group in ("permutation", "scale" if space is RELU else "sign"):
        g = groups.sample(group, space, 4, rng)
        with torch.no_grad():
            deltas, moved = model(w), model(groups.act(g, space, w))
        gaps = []
        for j in range(2):
            expected = groups.act(g, space, {n: d[:, j] for n, d in deltas.items()})
            for n, x in expected.items():
                assert deltas[n].shape == (4, 2, *space.shapes[n])
                gaps.append((moved[n][:, j] - x).abs().max() / x.abs().max())
        assert max(gaps) < 1e-10 if group in claims else max(gaps) > 1e-4
    assert (deltas["2.weight"][:, 0] - deltas["2.weight"][:, 1]).abs().max() > 1e-6
