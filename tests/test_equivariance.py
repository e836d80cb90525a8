"""Predictors of transformers before the judge: claims, steps, leak, controls and twins."""

from dataclasses import replace

import block_kit
import pytest
import torch

from qemcli import groups
from qemcli.designs import Design
from qemcli.equivariance import steps
from qemcli.layers.twin import Twin
from qemcli.predictors import Predictor
from qemcli.verification import Check, verify

SPACE = block_kit.space()
CHECK = Check(samples=3)


def judged(quasi, flat, twin=False, architecture="transformer_nfn", **config):
    torch.manual_seed(0)
    design = Design(architecture, quasi, config)
    model = design.build(SPACE).double()
    model.calibrate(SPACE.unflatten(flat))
    predictor = Predictor("mine", SPACE, design, "generalization", model.eval())
    if twin:
        predictor = replace(predictor, model=Twin(model, SPACE))
    return verify(predictor, flat, None, CHECK)


def networks(count=12):
    rng = torch.Generator().manual_seed(0)
    return SPACE.flatten(block_kit.draw(SPACE, count, rng))


@pytest.mark.parametrize("quasi", ["exact", "paper", "released"])
def test_transformer_nfn_holds_what_it_claims(quasi):
    report = judged(quasi, networks(), eps=0.3, channels=(3, 4))
    assert report.code == 0, report.broken
    kept = {"general-linear", "heads"} if quasi != "released" else set()
    assert set(report.claimed) == {"permutation"} | kept
    rows = [r for r in report.rows if r["kind"] == "equivariance"]
    assert {r["layer"] for r in rows} >= {"layer1", "layer2"}
    assert all(r["holds"] for r in rows if r["claimed"])
    leak = [r["max_error"] for r in report.rows if r["kind"] == "leak"]
    if quasi == "paper":
        assert leak[0] < 1e-11
    else:
        assert leak[0] > 1e-3


@pytest.mark.parametrize("architecture", ["statnn", "flat_mlp"])
def test_balance_passes_and_the_same_without_it_does_not_claim(architecture):
    balanced = judged("balanced", networks(), architecture=architecture, head=16)
    assert balanced.code == 0, balanced.broken
    assert "general-linear" in balanced.claimed
    plain = judged("none", networks(), architecture=architecture, head=16)
    assert "general-linear" not in plain.claimed
    errors = [r["max_error"] for r in plain.rows if r["group"] == "general-linear"]
    assert min(errors) > 1e-6


def test_a_twin_is_found():
    report = judged("none", networks(), twin=True)
    assert report.code == 1
    assert report.broken == ["general-linear", "heads", "permutation"]


def test_a_layer_that_acts_inside_heads_is_found(rng):
    """The control of the steps: one factor scaled number by number."""
    model = block_kit.model(SPACE, quasi="exact", eps=0.3)
    w = block_kit.draw(SPACE, 3, rng)
    g = groups.sample("general-linear", SPACE, 3, rng)
    assert max(e.max() for _, e, strict in steps(model, SPACE, w, g) if strict) < 1e-10

    class Broken(torch.nn.Module):
        strict = keeps_invariance = True

        def forward(self, blocks):
            return [{**b, "key": b["key"] * torch.arange(1.0, 4.0)} for b in blocks]

    model.quasi = Broken()
    found = {name: e.max().item() for name, e, _ in steps(model, SPACE, w, g)}
    assert found["layer1"] < 1e-10 < 1e-2 < found["quasi"]
