"""Quasi modes and balance on networks that were trained, those whose neurons died above all: weight
decay has taken whole rows below 1e-12, where the published normalisation stops dividing."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from qemcli import groups
from qemcli.designs import Design
from qemcli.layers import quasi
from qemcli.predictors import Predictor
from qemcli.spaces import Chain
from qemcli.zoos.opening import open_zoo

FAINT = 1e-12
MONOMIAL = {"channels": [4, 4, 3], "head": 16}


@pytest.fixture(scope="module")
def trained() -> tuple[Chain, dict[str, Tensor]]:
    """The embedded networks with a neuron that reads, or is read, by less than 1e-12; float64."""
    ((space, flat, _),) = open_zoo("cnn-heldout", lambda text: None).load()
    w = space.unflatten(flat.double())
    pairs = space.matrices(w)
    faint = torch.zeros(len(flat), dtype=torch.bool)
    for (weight, bias), (following, _) in pairwise(pairs):
        read = torch.cat([weight.flatten(2), bias[..., None]], dim=-1).norm(dim=2)
        given = following.transpose(1, 2).flatten(2).norm(dim=2)
        faint |= ((read < FAINT) | (given < FAINT)).any(dim=1)
    assert faint.sum() > 8
    return space, {name: x[faint] for name, x in w.items()}


def predictor(space: Chain, architecture: str, mode: str, **config: object) -> Predictor:
    torch.manual_seed(0)
    design = Design(architecture, mode, dict(config))
    model = design.build(space).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return Predictor("p", space, design, "generalization", model)


def error(p: Predictor, space: Chain, w: dict[str, Tensor]) -> float:
    generator = torch.Generator().manual_seed(1)
    g = groups.sample("monomial", space, len(w[space.names[0]]), generator, (1e-4, 1e4))
    with torch.no_grad():
        before, after = p(w), p(groups.act(g, space, w))
    return float((after - before).abs().max() / before.std())


def test_paper_is_a_no_op_on_trained_networks(trained) -> None:
    space, w = trained
    p = predictor(space, "monomial_nfn", "paper", eps=0.5, **MONOMIAL)
    with torch.no_grad():
        assert quasi.leak(p.model, w).abs().max() < 1e-10 * p(w).std()
    assert error(p, space, w) < 1e-10


def test_exact_is_invariant_and_no_no_op_on_trained_networks(trained) -> None:
    space, w = trained
    p = predictor(space, "monomial_nfn", "exact", eps=0.5, **MONOMIAL)
    with torch.no_grad():
        assert quasi.leak(p.model, w).abs().max() > 1e-4 * p(w).std()
    assert error(p, space, w) < 1e-10


@pytest.mark.parametrize("architecture", ["statnn", "nfn"])
def test_balanced_is_invariant_and_no_no_op_on_trained_networks(trained, architecture: str) -> None:
    space, w = trained
    raw, balanced = (predictor(space, architecture, mode) for mode in ("none", "balanced"))
    assert error(balanced, space, w) < 1e-9
    assert error(raw, space, w) > 1e-3
    with torch.no_grad():
        assert (balanced(w) - raw(w)).abs().max() > 1e-3 * raw(w).std()


def test_control_the_published_floor_is_not_invariant_on_trained_networks(trained) -> None:
    space, w = trained
    p = predictor(space, "monomial_nfn", "none", pool="published", **MONOMIAL)
    assert error(p, space, w) > 1e-6
