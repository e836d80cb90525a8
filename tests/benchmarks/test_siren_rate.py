"""Fitting SIRENs: networks fitted side by side against the loop that one would write, both on one
thread and interleaved.

Run: pytest tests/benchmarks/test_siren_rate.py -m bench -s
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qemcli.machine import steady
from qemcli.signals import coordinates
from qemcli.spaces import WeightSpace, siren
from qemcli.zoos.build.siren import Batch, Fit, slots

GOAL = 10.0  # times the loop's rate
STEPS, ROUNDS = 10, 15


class Sine(nn.Module):
    """sin(30 z)."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.sin(30 * z)


class Loop:
    """One SIREN as an ordinary script fits it: nn.Module, autograd, torch.optim.Adam."""

    def __init__(self, space: WeightSpace, image: Tensor) -> None:
        layers: list[nn.Module] = []
        for la in space.layers:
            layers += [nn.Linear(la.cols, la.rows), Sine()]
        self.module = nn.Sequential(*layers[:-1])
        self.x = coordinates(space, *image.shape[1:])
        self.y = image.flatten(1).T.contiguous()
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=1e-3)

    def step(self) -> None:
        loss = (self.module(self.x) - self.y).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def _seconds(steps: Callable[[], None]) -> float:
    """CPU seconds: other processes of the machine do not count."""
    start = time.process_time()
    steps()
    return time.process_time() - start


@pytest.mark.bench
@pytest.mark.parametrize(
    ("widths", "image"),
    [((2, 32, 32, 1), (1, 28, 28)), ((2, 32, 32, 3), (3, 32, 32))],
    ids=["mnist", "cifar"],
)
def test_batch_fits_at_ten_times_the_rate_of_the_loop(
    widths: tuple[int, ...],
    image: tuple[int, int, int],
    record_property: Callable[[str, object], None],
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steady()
    space = siren(widths, 30.0, "nfn", image)
    count = slots(space, "cpu")
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(count, *image, generator=generator)
    batch = Batch(space, Fit(), count)
    flat = torch.randn(count, space.size, generator=generator) * 0.1
    batch.load(torch.arange(count), flat, pictures)
    loops = [Loop(space, picture) for picture in pictures]

    def together() -> None:
        for _ in range(STEPS):
            batch.measure()
            batch.step()

    def alone() -> None:
        for loop in loops[:4]:
            for _ in range(STEPS):
                loop.step()

    together(), alone()
    pairs = [(_seconds(alone) / 4, _seconds(together) / count) for _ in range(ROUNDS)]
    torch.set_num_threads(threads)
    ratio = sorted(a / b for a, b in pairs)[ROUNDS // 2]
    each = [sorted(p[i] for p in pairs)[ROUNDS // 2] / STEPS * 1e6 for i in (0, 1)]
    record_property("ratio", round(ratio, 2))
    said = f"loop {each[0]:.0f}, batch {each[1]:.0f} us a step of one network, ratio {ratio:.2f}"
    sys.stdout.write(f"\n{widths} on {image}: {said}\n")
    assert ratio > GOAL, said
