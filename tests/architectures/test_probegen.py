"""Networks read as functions: exactly invariant to every symmetry, sensitive to everything else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layer_kit import SPACES as OTHERS
from layer_kit import draw_weights, randomise

from qemcli import groups
from qemcli.architectures import probegen, rendered_cnn
from qemcli.errors import InputError, UsageError
from qemcli.functions import differentiate, respond
from qemcli.spaces import Forward, mlp, siren
from qemcli.testing import CONTROLS

SIREN = siren([2, 5, 7, 4, 1], image=(1, 7, 6))
SPACES = {
    "siren": SIREN,
    "siren-dws": siren([2, 6, 3], convention="dws", w0=20.0, image=(3, 5, 8)),
    "relu": OTHERS["mlp3"].running("relu"),
    "gelu": OTHERS["mlp4"].running("gelu"),
    "cnn": OTHERS["pool"],
    "cnn-flat": replace(OTHERS["flatten"], forward=Forward(junction="flatten", image=(1, 3, 5))),
}
CASES = {
    "generated": (probegen, {"probes": 5, "head": (8, 8)}),
    "free": (probegen, {"probes": 5, "head": (8, 8), "maker": "free"}),
    "slopes": (probegen, {"probes": 5, "head": (8,), "slopes": True, "jitter": 0.2}),
    "rendered": (rendered_cnn, {"channels": (3, 4), "head": 8, "jitter": 0.2}),
}
PAIRS = [
    (case, name)
    for case in CASES
    for name, space in SPACES.items()
    if name.startswith("siren") or case in ("generated", "free")
]


def build(case: str, space, **more):
    torch.manual_seed(0)
    module, config = CASES[case]
    model = module.Model(space, module.Config(**{**config, **more, "outputs": 3}))
    return randomise(model.double()).eval()


def moved(model, w, other) -> float:
    with torch.no_grad():
        y, z = model(w), model(other)
    assert y.std(0).min() > 1e-6
    return float((z - y).abs().max() / y.std(0).mean())


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_answers_are_invariant_to_every_symmetry_and_to_no_more(case, name, rng):
    space = SPACES[name]
    model = build(case, space)
    w = draw_weights(space, 6, rng)
    if name.startswith("siren"):
        w = {k: v / 5 for k, v in w.items()}
    model.calibrate(w)
    assert model.claims(space) == set(groups.applicable(space))
    for group in model.claims(space):
        g = groups.sample(group, space, 6, rng)
        assert moved(model, w, groups.act(g, space, w)) < 1e-10, group
    for control in CONTROLS.values():
        assert moved(model, w, control(space, w, rng)) > 1e-4


def test_slopes_are_the_derivatives(rng):
    for name in ("siren", "siren-dws"):
        space = SPACES[name]
        w = draw_weights(space, 4, rng)
        x = torch.rand(4, 3, space.layers[0].cols, generator=rng, dtype=torch.float64)
        values, slopes = differentiate(space, w, x)
        assert torch.allclose(values, respond(space, w, x))
        whole = torch.autograd.functional.jacobian(lambda z, s=space, v=w: respond(s, v, z), x)
        own = torch.stack([whole[i, p, :, i, p] for i in range(4) for p in range(3)])
        assert torch.allclose(slopes.flatten(0, 1), own, atol=1e-9)
        shared = torch.stack([respond(space, w, x[i])[i] for i in range(4)])
        assert torch.allclose(values, shared)
    with pytest.raises(InputError, match="SIREN"):
        differentiate(SPACES["relu"], draw_weights(SPACES["relu"], 2, rng), torch.zeros(2, 2))


def test_slopes_are_of_what_is_seen_through_the_jitter(rng):
    model = build("slopes", SIREN).train()
    w = draw_weights(SIREN, 4, rng)
    torch.manual_seed(3)
    answers = model.answers(model.space, w)
    torch.manual_seed(3)
    x = model.probes()
    maps, shifts = model.jitter(4, x)
    y = x.detach().clone().requires_grad_()
    values = respond(SIREN, w, y @ maps + shifts)[..., 0]
    for i in range(4):
        (slope,) = torch.autograd.grad(values[i].sum(), y, retain_graph=True)
        assert torch.allclose(answers[i, :5], values[i])
        assert torch.allclose(answers[i, 5:].view(5, 2), slope)


def test_jitter_is_alive_in_training_only(rng):
    w = draw_weights(SIREN, 4, rng)
    for case in ("slopes", "rendered"):
        model = build(case, SIREN)
        assert torch.equal(model(w), model(w))
        model.train()
        assert not torch.equal(model(w), model(w))
        constants = []
        for _ in range(2):  # are not drawn, and leave training as it was
            model.calibrate(w)
            constants.append(model.scale.mean.clone())
        assert torch.equal(*constants)
        assert model.jitter.training


def test_gradients_reach_the_probes(rng):
    for name, kept in (("siren", "latent"), ("cnn", "latent")):
        model = probegen.Model(SPACES[name], probegen.Config(probes=3)).double()
        model(draw_weights(SPACES[name], 3, rng)).sum().backward()
        assert getattr(model.probes, kept).grad.abs().sum() > 0


def test_probes_of_images_have_the_networks_size():
    for case in ("generated", "free"):
        images = build(case, SPACES["cnn-flat"]).probes()
        assert images.shape == (5, 1, 3, 5)
        assert images.abs().max() <= 1


def test_diverged_classifiers_have_an_answer():
    space = SPACES["cnn"]
    w = {n: torch.full((2, *s), 1e12, dtype=torch.float64) for n, s in space.shapes.items()}
    assert build("generated", space)(w).isfinite().all()


def test_rendered_cnn_reads_the_picture(rng):
    from qemcli.signals import render

    model = build("rendered", SPACES["siren-dws"], jitter=0.0)
    w = draw_weights(SPACES["siren-dws"], 3, rng)
    picture = model._values(w).transpose(1, 2).unflatten(2, (5, 8))
    assert torch.allclose(picture, render(SPACES["siren-dws"], w))


def test_what_cannot_be_probed_is_refused():
    with pytest.raises(InputError, match="activation"):
        probegen.Model(mlp([2, 3, 2], activation=None))
    with pytest.raises(UsageError, match="no probes 'frei'"):
        probegen.Model(SIREN, probegen.Config(maker="frei"))
    with pytest.raises(UsageError, match="slopes"):
        probegen.Model(SPACES["cnn"], probegen.Config(slopes=True))
    with pytest.raises(InputError, match="shows no image"):
        rendered_cnn.Model(mlp([3, 4, 2]))
