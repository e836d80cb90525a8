"""The same picture from a SIREN that is run in another way."""

from __future__ import annotations

import pytest
import torch

from qemcli.conventions import express, same
from qemcli.errors import InputError
from qemcli.signals import render
from qemcli.spaces import mlp, siren

SPACES = {
    "nfn": siren([2, 5, 4, 3], 30.0, "nfn", (3, 6, 9)),
    "dws": siren([2, 5, 4, 3], 20.0, "dws", (3, 6, 9)),
}


@pytest.mark.parametrize(("a", "b"), [("nfn", "dws"), ("dws", "nfn")])
def test_expressed_networks_show_the_same(a, b, rng):
    space, own = SPACES[a], SPACES[b]
    flat = 0.2 * torch.randn(4, space.size, generator=rng, dtype=torch.float64)
    picture = render(space, space.unflatten(flat))
    moved = express(space, own, flat)
    assert torch.allclose(render(own, own.unflatten(moved)), picture, atol=1e-12)
    assert not torch.allclose(render(own, own.unflatten(flat)), picture, atol=1e-2)
    assert torch.allclose(express(own, space, moved), flat, atol=1e-12)


def test_the_same_convention_changes_nothing(rng):
    flat = torch.randn(2, SPACES["nfn"].size, generator=rng)
    larger = siren([2, 5, 4, 3], 30.0, "nfn", (3, 20, 20))
    assert same(SPACES["nfn"], larger)
    assert express(SPACES["nfn"], larger, flat) is flat
    assert not same(*SPACES.values())


def test_what_is_not_known_is_refused(rng):
    unknown = SPACES["dws"].running(known=False)
    flat = torch.randn(2, unknown.size, generator=rng)
    for space in (unknown, SPACES["dws"].running(axes=""), mlp([2, 5, 4, 3], "sin")):
        with pytest.raises(InputError, match="not known"):
            express(space, SPACES["nfn"], flat)
