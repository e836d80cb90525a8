"""Transformer-NFN, its quasi modes and its baselines: what each keeps, and what each must not."""

import block_kit
import pytest
import torch
from block_kit import draw

from qemcli import groups
from qemcli.architectures import branched_mlp, branched_statnn, flat_mlp, statnn, transformer_nfn
from qemcli.designs import Design
from qemcli.errors import UnsupportedError, UsageError
from qemcli.layers import attention_quasi
from qemcli.predictors import Predictor
from qemcli.spaces import Rotary, mlp, small_transformer

SPACE = block_kit.space()
GL = {"general-linear", "heads"}
ALL = GL | {"permutation"}
MODELS = {
    "published": ({"classifier": "flat"}, GL),
    "set": ({}, ALL),
    "deep": ({"channels": (3, 4)}, ALL),
    "unit": ({"init": "unit"}, ALL),
    "low rank": ({"rank": 5, "channels": (3, 4)}, ALL),
    "paper": ({"quasi": "paper", "eps": 0.2}, ALL),
    "exact": ({"quasi": "exact", "eps": 0.5}, ALL),
    "exact low rank": ({"quasi": "exact", "rank": 5}, ALL),
    "released": ({"quasi": "released", "eps": 0.2, "bound": "raw"}, {"permutation"}),
}


def gap(model, space, group, rng, batch=8, kind=(0.2, 5.0)):
    w = draw(space, batch, rng)
    g = groups.sample(group, space, batch, rng, kind)
    with torch.no_grad():
        y, moved = model(w), model(groups.act(g, space, w))
    return ((moved - y).abs().max() / y.std(0).mean()).item()


@pytest.mark.parametrize("name", MODELS)
def test_model_keeps_what_it_claims_and_no_more(name, rng):
    config, claims = MODELS[name]
    model = block_kit.model(SPACE, **config)
    if config.get("init") == "unit":
        model.calibrate(draw(SPACE, 32, rng))
    assert model.claims(SPACE) == claims
    for group in groups.applicable(SPACE):
        error = gap(model, SPACE, group, rng)
        assert error < 1e-11 if group in claims else error > 1e-6, group


OTHERS = {
    "grouped with biases": block_kit.space(queries=3, biases=True),
    "rotated": block_kit.space(queries=3, rotary=Rotary("half", 4), keys=6),
    "blocks alone": block_kit.space(family="gpt2"),
    "text": small_transformer(6, 2, 5, 2, 4),
    "images": small_transformer(6, 2, 5, 2, 4, (1, 2)),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("quasi", ["none", "exact"])
def test_other_transformers_are_read(name, quasi, rng):
    space = OTHERS[name]
    model = block_kit.model(space, quasi=quasi, eps=0.5)
    claims = model.claims(space)
    assert claims >= ALL
    assert ("shift" in claims) == ("shift" in groups.applicable(space))
    for group in claims:
        assert gap(model, space, group, rng) < 1e-11, group
    assert gap(model, space, "scale", rng) > 1e-6


@pytest.mark.parametrize("size", [1e-22, 0.0])
def test_heads_that_weight_decay_has_emptied_are_finite(size, rng):
    model = block_kit.model(SPACE, quasi="exact", eps=0.5).float()
    w = draw(SPACE, 8, rng)

    def answers(size):
        blocks = SPACE.read(w)
        blocks[0]["query"], blocks[1]["out"] = size * blocks[0]["query"], size * blocks[1]["out"]
        return model({name: x.float() for name, x in SPACE.write(w, blocks).items()})

    y = answers(size)
    y.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert size == 0 or torch.allclose(y, answers(1e-12), rtol=1e-4)  # C / |S| has no size


@pytest.mark.parametrize("role", ["query", "key", "value", "out"])
def test_every_factor_is_seen(role, rng):
    """The control of the symmetries: one factor alone turned inside its heads."""
    model = block_kit.model(SPACE)
    w = draw(SPACE, 8, rng)
    name = f"1.{role}"
    moved = {**w, name: w[name].flip(2 if role == "out" else 1)}
    with torch.no_grad():
        assert (model(w) - model(moved)).abs().max() > 1e-3 * model(w).std()


@pytest.mark.parametrize("name", ["set", "deep", "low rank", "exact", "paper"])
def test_every_step_is_equivariant(name, rng):
    config, _ = MODELS[name]
    model = block_kit.model(SPACE, **config)
    w = draw(SPACE, 3, rng)
    for group in ALL:
        g = groups.sample(group, SPACE, 3, rng)
        pairs = zip(model.roles(w), model.roles(groups.act(g, SPACE, w)), strict=True)
        for (step, plain), (_, moved) in pairs:
            error = apart(acted(g, w, plain), moved)
            strict = step != "quasi" or model.quasi.strict
            assert error < 1e-10 if strict or group == "permutation" else error > 1e-4, step


def acted(g, w, blocks):
    """The element on features: on every channel as on weights."""
    channels = blocks[0]["up"].shape[1]
    copies = {k: x.repeat_interleave(channels, 0) for k, x in w.items()}
    flat = [{role: x.flatten(0, 1) for role, x in roles.items()} for roles in blocks]
    rows = g.rows(torch.arange(g.batch).repeat_interleave(channels))
    return SPACE.read(groups.act(rows, SPACE, SPACE.write(copies, flat)))


def apart(expected, found):
    gaps = []
    for want, have in zip(expected, found, strict=True):
        for role, x in want.items():
            gaps.append((have[role].flatten(0, 1) - x).abs().max() / x.abs().max())
    return max(gaps).item()


def test_paper_is_a_no_op_and_its_alpha_gets_no_gradient(rng):
    plain = block_kit.model(SPACE)
    w = draw(SPACE, 8, rng)
    for eps in (0.01, 0.2, 1.0):
        model = block_kit.model(SPACE, quasi="paper", eps=eps)
        y = model(w)
        assert (y - plain(w)).abs().max() < 1e-12 * plain(w).abs().max()
        own, rest = [], []
        y.square().sum().backward()
        for name, p in model.named_parameters():
            (own if name.startswith("quasi") else rest).append(p.grad.abs().max().item())
        assert max(own) < 1e-10 < 1e-3 < max(rest)
        turned = model.quasi(SPACE.read(w))[0]["query"]
        assert (turned - SPACE.read(w)[0]["query"]).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["released", "exact"])
def test_modes_that_are_no_no_op(mode, rng):
    plain = block_kit.model(SPACE)
    model = block_kit.model(SPACE, quasi=mode, eps=0.5)
    w = draw(SPACE, 8, rng)
    y = model(w)
    assert (y - plain(w)).abs().max() > 1e-3 * plain(w).std()
    y.square().sum().backward()
    moving = [p.grad.abs().max() for n, p in model.named_parameters() if n.startswith("quasi")]
    assert max(moving) > 1e-4
    assert (gap(model, SPACE, "general-linear", rng) > 1e-4) == (mode == "released")


def test_released_loses_more_the_larger_its_eps(rng):
    errors = []
    for eps in (0.01, 0.1, 0.4):
        model = block_kit.model(SPACE, quasi="released", eps=eps, bound="raw")
        errors.append(gap(model, SPACE, "general-linear", torch.Generator().manual_seed(0)))
    assert errors == sorted(errors)
    assert errors[-1] > 1e-3


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("n", [1, 3, 16])
def test_bounded_matrices_are_invertible_whatever_the_network_says(sign, n):
    """The worst there is, sin(.) = -1 everywhere, at an eps without bound."""
    matrices = attention_quasi.Matrices(1, 4, 2, n, sign * 50.0, True, raw=False).double()
    with torch.no_grad():
        matrices.last.weight.zero_()
        matrices.last.bias.fill_(-torch.pi / 2)
    m = matrices(torch.zeros(1, 4, dtype=torch.float64))
    assert torch.linalg.cond(m).max() < 20
    assert (torch.linalg.det(m) > 0).all()


def test_raw_matrices_that_are_singular_are_refused():
    matrices = attention_quasi.Matrices(1, 4, 2, 4, 0.25, True, raw=True).double()
    with torch.no_grad():
        matrices.last.weight.zero_()
        matrices.last.bias.fill_(-torch.pi / 2)
    with pytest.raises(UsageError, match="singular") as caught:
        matrices(torch.zeros(1, 4, dtype=torch.float64))
    assert "bound safe" in caught.value.hint


BALANCED = {
    "statnn": (statnn, {}, ALL | {"scale", "monomial"}),
    "branched_statnn": (branched_statnn, {}, ALL | {"scale", "monomial"}),
    "flat_mlp": (flat_mlp, {"head": 16}, {"general-linear", "scale"}),
    "branched_mlp": (branched_mlp, {}, {"general-linear", "scale"}),
    "transformer_nfn": (transformer_nfn, {}, ALL | {"scale", "monomial"}),
}


@pytest.mark.parametrize("name", BALANCED)
def test_balance_makes_any_architecture_invariant_to_gl(name, rng):
    module, config, claims = BALANCED[name]
    torch.manual_seed(0)
    model = module.Model(SPACE, module.Config(**config)).double().eval()
    balanced = Predictor("b", SPACE, Design(name, "balanced", config), "generalization", model)
    assert balanced.claims == claims
    for group in groups.applicable(SPACE):
        error = gap(balanced, SPACE, group, rng)
        assert error < 1e-9 if group in claims else error > 1e-6, group
    plain = Predictor("p", SPACE, Design(name, "none", config), "generalization", model)
    if name != "transformer_nfn":
        assert gap(plain, SPACE, "general-linear", rng) > 1e-3


def test_the_published_configurations_are_there():
    """That each has as many parameters as it says is tested with all presets (test_models.py)."""
    modules = (transformer_nfn, branched_mlp, branched_statnn)
    counts = {p.published for m in modules for p in m.PRESETS.values()} - {None}
    plain = {1_812_181, 1_804_741, 933_251, 896_051, 203_393, 168_449, 2_876_651, 2_869_211}
    assert counts == plain | {1_894_489, 1_887_049}


def test_what_cannot_be_read_is_refused():
    for module in (transformer_nfn, branched_mlp, branched_statnn):
        with pytest.raises(UnsupportedError, match="transformers"):
            module.Model(mlp([2, 3, 2]))
    for wrong in ({"init": "xavier"}, {"quasi": "papre"}, {"classifier": "bag"}, {"bound": "none"}):
        with pytest.raises(UsageError):
            transformer_nfn.Model(SPACE, transformer_nfn.Config(**wrong))
    with pytest.raises(UsageError) as caught:
        transformer_nfn.Model(SPACE, transformer_nfn.Config(quasi="balanced"))
    assert "in front" in caught.value.hint


def test_baselines_standardise_and_answer(rng):
    space = OTHERS["images"]
    w = {k: 100 * x + 7 for k, x in draw(space, 16, rng).items()}
    for module in (branched_mlp, branched_statnn):
        model = module.Model(space, module.Config(standardised=True, outputs=3)).double()
        raw = model(w)
        model.calibrate(w)
        assert raw.shape == (16, 3)
        assert model(w).abs().max() < raw.abs().max()


@pytest.mark.parametrize("mode", ["paper", "released", "exact"])
def test_width_of_the_quasi_layers_maps(mode):
    space = small_transformer(8, 2, 12, 2, 5, (1, 2))

    def size(width):
        config = transformer_nfn.Config((3,), 4, quasi=mode, quasi_width=width)
        return sum(p.numel() for p in transformer_nfn.Model(space, config).quasi.parameters())

    assert size(8) < size(32) < size(64)
    default = transformer_nfn.Model(space, transformer_nfn.Config((3,), 4, quasi=mode))
    assert sum(p.numel() for p in default.quasi.parameters()) == size(32)
