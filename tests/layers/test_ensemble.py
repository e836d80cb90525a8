"""Members that share their linear maps: what each of them computes, and that each learns alone."""

from __future__ import annotations

import torch

from qemcli.layers.ensemble import OwnLinear, SharedLinear

M, B, N, K = 3, 5, 4, 2


def test_shared_maps_are_those_of_a_loop_over_members():
    torch.manual_seed(0)
    layer = SharedLinear(M, N, K, apart=True).double()
    with torch.no_grad():
        layer.s.normal_()
    x = torch.randn(B, N, dtype=torch.float64)
    each = torch.randn(M, B, N, dtype=torch.float64)
    for given in (x, each):
        for m, found in enumerate(layer(given)):
            own = given if given.dim() == 2 else given[m]
            wanted = (own * layer.r[m]) @ layer.linear.weight.T * layer.s[m] + layer.c[m]
            assert torch.allclose(found, wanted, rtol=1e-13, atol=1e-13)


def test_members_read_the_same_numbers_differently_only_where_they_are_apart():
    torch.manual_seed(0)
    apart, alike = SharedLinear(8, 16, K, apart=True), SharedLinear(8, 16, K)
    assert set(apart.r.unique().tolist()) == {-1.0, 1.0}
    assert set(alike.r.unique().tolist()) == {1.0}
    x = torch.randn(B, 16)
    assert (apart(x) - apart.c).std(0).min() > 1e-3
    assert (alike(x) - alike.c).std(0).max() < 1e-6


def test_maps_of_their_own_are_those_of_a_loop_over_members():
    torch.manual_seed(0)
    layer = OwnLinear(M, N, K).double()
    x = torch.randn(M, B, N, dtype=torch.float64)
    for m, found in enumerate(layer(x)):
        assert torch.allclose(found, x[m] @ layer.weight[m] + layer.bias[m], rtol=1e-13)


def test_sharing_costs_a_vector_a_member():
    def count(members: int) -> int:
        return sum(p.numel() for p in SharedLinear(members, 100, 50).parameters())

    assert count(8) - count(7) == 100 + 2 * 50
