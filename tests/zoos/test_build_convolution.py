"""The convolution of many networks is each one's own, in both directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qemcli.zoos.build.convolution import Convolution


def _apart(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """Network by network, by torch."""
    each = [
        F.conv2d(x[i].movedim(-1, 1), weight[i], bias[i], stride, padding).movedim(1, -1)
        for i in range(len(x))
    ]
    return torch.stack(each)


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "padding"),
    [(14, 3, 2, 1), (7, 3, 2, 1), (4, 3, 2, 1), (2, 3, 2, 1), (1, 3, 2, 1), (9, 3, 1, 0),
     (9, 3, 1, 1), (11, 5, 3, 2), (10, 2, 2, 0), (6, 1, 2, 0), (14, 3, 2, 2)],
)  # fmt: skip
def test_convolution_and_its_gradients_equal_torch(
    side: int, kernel: int, stride: int, padding: int, rng: torch.Generator
) -> None:
    shapes = [(3, 2, side, side, 4), (3, 5, 4, kernel, kernel), (3, 5)]
    given = [torch.randn(s, generator=rng, dtype=torch.float64).requires_grad_() for s in shapes]
    ours, theirs = (f(*given, stride, padding) for f in (Convolution.apply, _apart))
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    g = torch.randn(ours.shape, generator=rng, dtype=torch.float64)
    pairs = zip(
        torch.autograd.grad(ours, given, g), torch.autograd.grad(theirs, given, g), strict=True
    )
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_networks_do_not_see_each_other(rng: torch.Generator) -> None:
    x = torch.randn(2, 3, 6, 6, 4, generator=rng, dtype=torch.float64)
    weight = torch.randn(2, 5, 4, 3, 3, generator=rng, dtype=torch.float64)
    bias = torch.zeros(2, 5, dtype=torch.float64)
    before = Convolution.apply(x, weight, bias, 2, 1)
    weight[1] += 1
    after = Convolution.apply(x, weight, bias, 2, 1)
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])
