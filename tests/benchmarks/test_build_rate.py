"""Training a zoo: networks trained side by side against the loop that one would write, both on one
thread and interleaved.

Run: pytest tests/benchmarks/test_build_rate.py -m bench -s
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from qemcli.machine import steady
from qemcli.zoos.build import cnn
from qemcli.zoos.build.recipe import Recipe
from qemcli.zoos.build.sources import Images

GOAL = 3.0  # times the loop's rate
NETWORKS, STEPS, ROUNDS = 32, 8, 5


def _images(side: int) -> Images:
    generator = torch.Generator().manual_seed(0)
    train = 2 * torch.rand(2000, 1, side, side, generator=generator) - 1
    label = torch.arange(2000) % 10
    return Images(train, label, train[:100], label[:100])


class Loop:
    """One network as an ordinary script trains it: nn.Module, nn.Dropout, torch.optim."""

    def __init__(self, network: cnn.Network, recipe: Recipe, images: Images) -> None:
        self.recipe, self.images = recipe, images
        layers: list[nn.Module] = []
        for cols, rows in ((1, 16), (16, 16), (16, 16)):
            conv = nn.Conv2d(cols, rows, recipe.kernel, recipe.stride, recipe.padding)
            layers += [conv, nn.ReLU(), nn.Dropout(network.hyper["dropout"])]
        self.module = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
        )
        kind = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop, "sgd": torch.optim.SGD}
        self.optimizer = kind[network.hyper["optimizer"]](
            self.module.parameters(), lr=network.hyper["lr"], weight_decay=network.hyper["l2"]
        )

    def step(self) -> None:
        rows = torch.randint(len(self.images.train), (self.recipe.batch,))
        logits = self.module(self.images.train[rows])
        loss = nn.functional.cross_entropy(logits, self.images.train_label[rows])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def _seconds(steps: Callable[[], None]) -> float:
    """CPU seconds: other processes of the machine do not count."""
    start = time.process_time()
    steps()
    return time.process_time() - start


@pytest.mark.bench
@pytest.mark.parametrize("side", [8, 14])
def test_block_trains_at_three_times_the_rate_of_the_loop(
    side: int, record_property: Callable[[str, object], None]
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steady()
    recipe, images = Recipe(models=NETWORKS), _images(side)
    networks = [cnn.draw(recipe, i) for i in range(NETWORKS)]
    block = cnn.Block(cnn.space_of(recipe, "relu", images), networks, recipe.batch, images)
    loops = [Loop(network, recipe, images) for network in networks]

    def together() -> None:
        for _ in range(STEPS):
            block.step()

    def alone() -> None:
        for loop in loops:
            for _ in range(STEPS):
                loop.step()

    together(), alone()
    pairs = [(_seconds(alone), _seconds(together)) for _ in range(ROUNDS)]
    torch.set_num_threads(threads)
    ratio = sorted(a / b for a, b in pairs)[ROUNDS // 2]
    steps = NETWORKS * STEPS
    each = [sorted(p[i] for p in pairs)[ROUNDS // 2] / steps * 1e6 for i in (0, 1)]
    record_property("ratio", round(ratio, 2))
    said = f"loop {each[0]:.0f}, block {each[1]:.0f} us a step, ratio {ratio:.2f}"
    sys.stdout.write(f"\n{side}x{side}: {said}\n")
    assert ratio > GOAL, said
