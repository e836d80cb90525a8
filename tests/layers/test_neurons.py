"""Sums that are added in place: the same as their formula, however the inputs lie in memory."""

import torch

from qemcli.layers.neurons import mix


def test_mix_is_its_formula_whatever_the_layout(rng):
    def drawn(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    weight = drawn(5, 4)
    plain = drawn(2, 3, 6, 4), drawn(2, 3, 5), drawn(2, 6, 5)
    turned = tuple(x.transpose(0, -1).contiguous().transpose(0, -1) for x in plain)
    for x, left, right in (plain, turned):
        inputs = [t.detach().requires_grad_() for t in (x, weight, left, right)]
        wanted = x @ weight.T + left[:, :, None] + right[:, None]
        assert torch.allclose(mix(*inputs), wanted, atol=1e-12)
        assert torch.autograd.gradcheck(mix, inputs)
