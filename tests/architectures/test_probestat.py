"""ProbeStat: what it keeps and what it sees, part by part."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from layer_kit import SPACES as OTHERS
from layer_kit import draw_weights, randomise

from qemcli import groups, registry
from qemcli.architectures import probestat
from qemcli.balance import balance
from qemcli.errors import InputError, UnsupportedError, UsageError
from qemcli.layers.statistics import neuron_statistics
from qemcli.spaces import Forward, cnn, mlp, opaque
from qemcli.testing import CONTROLS

SPACES = {
    "mlp": OTHERS["mlp3"].running("relu"),
    "tanh": OTHERS["mlp4"].running("tanh"),
    "cnn": OTHERS["pool"],
    "cnn-flat": replace(OTHERS["flatten"], forward=Forward(junction="flatten", image=(1, 3, 5))),
}
IMAGE = Forward(padding=1, junction="pool", image=(1, 6, 6), known=True)
PARTS = {
    "both": probestat.Config(probes=5, head=8),
    "probes": probestat.Config(probes=5, statistics=False, head=8),
    "statistics": probestat.Config(probes=0, head=8),
}


def build(part: str, space):
    torch.manual_seed(0)
    model = probestat.Model(space, replace(PARTS[part], outputs=3))
    return randomise(model.double()).eval()


def moved(model, w, other) -> float:
    with torch.no_grad():
        y, z = model(w), model(other)
    assert y.std(0).min() > 1e-6
    return float((z - y).abs().max() / y.std(0).mean())


def one_entry(space, w, rng):
    """What statistics see too: they are blind to neurons moved in one layer only."""
    name = space.names[0]
    changed = w[name].clone()
    changed.flatten(1)[:, 0] += 1
    return {**w, name: changed}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", SPACES)
def test_what_is_claimed_is_kept_and_other_networks_are_told_apart(part, name, rng):
    space = SPACES[name]
    model = build(part, space)
    w = draw_weights(space, 6, rng)
    model.calibrate(w)
    for group in model.claims(space):
        g = groups.sample(group, space, 6, rng)
        assert moved(model, w, groups.act(g, space, w)) < 1e-10, group
    controls = CONTROLS.values() if part != "statistics" else [one_entry]
    for control in controls:
        assert moved(model, w, control(space, w, rng)) > 1e-4


@pytest.mark.parametrize("name", ["mlp", "tanh", "cnn"])
def test_behind_balance_scales_and_signs_are_kept_which_statistics_alone_do_not(name, rng):
    space = SPACES[name]
    model = build("both", space)
    w = draw_weights(space, 6, rng)
    g = groups.sample("monomial", space, 6, rng)
    other = groups.act(g, space, w)
    model.calibrate(balance(space, w)[0])
    assert moved(model, balance(space, w)[0], balance(space, other)[0]) < 1e-9
    statistics = build("statistics", space)
    statistics.calibrate(w)
    assert moved(statistics, w, other) > 1e-4


def test_statistics_of_neurons_are_those_of_a_loop(rng):
    space = SPACES["cnn"]
    w = draw_weights(space, 1, rng)
    wanted: list[float] = []
    for i, (weight, bias) in enumerate(space.matrices(w)):
        m, b = weight[0].numpy(), bias[0].numpy()
        rows = [float(np.sqrt((m[r] ** 2).sum())) for r in range(len(m))]
        cols = [float(np.sqrt((m[:, c] ** 2).sum())) for c in range(m.shape[1])]
        last, first = i == space.depth - 1, i == 0
        wanted += rows if last else sorted(rows)
        wanted += list(b) if last else sorted(b)
        wanted += cols if first else sorted(cols)
        wanted.append(float(np.abs(m).mean()))
        wanted += list(np.linalg.svd(m.reshape(len(m), -1), compute_uv=False))
    assert np.allclose(neuron_statistics(space, w)[0].numpy(), wanted)


def test_one_diverged_network_does_not_lead_the_others(rng):
    space = SPACES["cnn"]
    w = draw_weights(space, 6, rng)
    model = build("statistics", space)
    model.calibrate(w)
    far, farther = ({k: v * size for k, v in w.items()} for size in (1e9, 1e12))
    with torch.no_grad():
        assert torch.equal(model(far), model(farther))


def test_probes_are_learned_ten_times_as_fast(rng):
    model = build("both", SPACES["cnn"]).float()
    w = {k: v.float() for k, v in draw_weights(SPACES["cnn"], 6, rng).items()}
    before, head = (
        model.head.probes.coarse.detach().clone(),
        model.head.mlp[2].linear.weight.detach().clone(),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(w).sum().backward()
    optimizer.step()
    probes = (model.head.probes.coarse - before).abs().max() * 10
    assert 5 < probes / (model.head.mlp[2].linear.weight - head).abs().max() < 20
    assert model.head.probes().abs().max() <= 2


def test_members_answer_apart_in_training_and_their_mean_afterwards(rng):
    space = SPACES["cnn"]
    torch.manual_seed(0)
    config = replace(PARTS["both"], members=3, outputs=2, dropout=0.0, missed=0.0)
    model = randomise(probestat.Model(space, config).double())
    w = draw_weights(space, 6, rng)
    model.calibrate(w)
    with torch.no_grad():
        apart, mean = model.train()(w), model.eval()(w)
    assert apart.shape == (6 * model.members, 2)
    assert mean.shape == (6, 2)
    assert torch.allclose(apart.unflatten(0, (6, 3)).mean(1), mean, rtol=1e-12)
    assert apart.unflatten(0, (6, 3)).std(1).min() > 1e-6


def test_every_member_learns_alone(rng):
    """The gradient of one member's own maps does not know what the others answered."""
    space, task = SPACES["cnn"], registry.load("tasks", "generalization")
    model = build("both", space).train()
    model.config = replace(model.config, dropout=0.0, missed=0.0)
    w, target = draw_weights(space, 6, rng), torch.rand(6, dtype=torch.float64)
    found = []
    for far in (0.0, 5.0):
        torch.manual_seed(0)
        model.zero_grad()
        with torch.no_grad():
            model.head.mlp[5].bias[1:] += far
        answers = model(w)[:, :1]
        task.loss(answers, target.repeat_interleave(model.members)).backward()
        found.append(model.head.mlp[5].weight.grad.clone())
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.allclose(found[0][1], found[1][1])


def test_whole_probes_are_left_out_in_training_only():
    torch.manual_seed(0)
    config = probestat.Config(probes=40, head=8, missed=0.5)
    reading = probestat.Reading(40 * 3, config, 5.0, groups=40, missed=0.5)
    seen: list[torch.Tensor] = []
    reading.linear.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    reading(torch.ones(6, 120)), reading.eval()(torch.ones(6, 120))
    dropped = seen[0].unflatten(1, (40, 3)) == 0
    assert torch.equal(dropped.any(2), dropped.all(2))
    assert 0.3 < dropped.float().mean() < 0.7
    assert (seen[1] == 1).all()


def test_what_cannot_be_read_is_said():
    with pytest.raises(InputError, match="activation"):
        build("both", mlp([2, 5, 3]).unstated())
    assert build("statistics", mlp([2, 5, 3]).unstated())
    with pytest.raises(UsageError, match="reads nothing"):
        probestat.Model(SPACES["mlp"], probestat.Config(probes=0, statistics=False))
    with pytest.raises(UnsupportedError):
        probestat.Model(opaque({"a": (2, 3)}, "a test"), probestat.Config())


def test_one_set_of_probes_asks_networks_of_many_architectures(rng):
    spaces = [
        cnn([1, 5, 4], 3, forward=IMAGE),
        cnn([1, 4, 6], 3, kernel=5, forward=replace(IMAGE, padding=2)),
    ]
    torch.manual_seed(0)
    mixture = randomise(probestat.Mixture(spaces, probestat.Config(probes=5, head=8)).double())
    points = [(space, draw_weights(space, 6, rng)) for space in spaces]
    mixture.eval().calibrate(points)
    for space, w in points:
        model = mixture.on(space)
        g = groups.sample("permutation", space, 6, rng)
        assert moved(model, w, groups.act(g, space, w)) < 1e-10
        for control in CONTROLS.values():
            assert moved(model, w, control(space, w, rng)) > 1e-4
    with pytest.raises(UnsupportedError, match="images of 2"):
        mixture.on(cnn([2, 5, 4], 3, forward=replace(IMAGE, image=(2, 6, 6))))
