"""Training transformers: networks side by side against the loop that one would write, both on one
thread and interleaved.

Run: pytest tests/benchmarks/test_transformer_rate.py -m bench -s
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qemcli import attention
from qemcli.machine import steady
from qemcli.zoos.build import recipe, transformer, transformer_zoo
from qemcli.zoos.build.transformer_recipe import TransformerRecipe

GOAL = 2.0  # times the loop's rate; and seconds a network of 30 epochs, below
NETWORKS, STEPS, ROUNDS = 32, 4, 5


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries, self.keys, self.values, self.out_projection = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for f in (self.queries, self.keys, self.values)
        )
        weight = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        return self.out_projection((weight @ v).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.drop = Attention(width, heads), nn.Dropout(dropout)
        self.fc1, self.fc2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.attention(self.norm(x)))
        return self.drop(self.fc2(torch.relu(self.fc1(self.norm(x)))))


class Loop(nn.Module):
    """One network as an ordinary script trains it: modules, nn.Dropout, torch.optim."""

    def __init__(self, plan: TransformerRecipe, network: transformer.Network) -> None:
        super().__init__()
        width, hyper = plan.width, network.hyper
        self.conv = nn.Conv2d(1, width, plan.patch, plan.patch)
        self.place = attention.positions((8 // plan.patch) ** 2, width)
        self.drop = nn.Dropout(hyper["dropout"])
        made = [Encoder(width, plan.heads, plan.ffn, hyper["dropout"]) for _ in range(plan.depth)]
        self.blocks, self.norm = nn.Sequential(*made), nn.LayerNorm(width, elementwise_affine=False)
        self.classify = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
        more = {"momentum": 0.9} if hyper["optimizer"] == "momentum" else {}
        kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
            "adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop,
        }  # fmt: skip
        self.optimizer = kinds.get(hyper["optimizer"], torch.optim.SGD)(
            self.parameters(), lr=hyper["lr"], weight_decay=hyper["l2"], **more
        )

    def step(self, images: Tensor, label: Tensor) -> None:
        x = self.drop(self.conv(images).flatten(2).transpose(1, 2) + self.place)
        logits = self.classify(self.norm(self.blocks(x)).mean(1))
        loss = nn.functional.cross_entropy(logits, label)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def _seconds(steps: Callable[[], None]) -> float:
    """CPU seconds: other processes of the machine do not count."""
    start = time.process_time()
    steps()
    return time.process_time() - start


@pytest.mark.bench
def test_block_trains_at_twice_the_rate_of_the_loop(
    record_property: Callable[[str, object], None],
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steady()
    root = Path(__file__).parents[2] / "zoos" / "transformer-digits" / "recipe.toml"
    plan = recipe.load(root)
    assert isinstance(plan, TransformerRecipe)
    data = transformer_zoo.load(plan)
    networks = [transformer.draw(plan, i) for i in range(NETWORKS)]
    block = transformer.Block(data, networks, plan)
    loops = [Loop(plan, network) for network in networks]
    images, label = torch.rand(plan.batch, 1, 8, 8), torch.arange(plan.batch) % 10

    def together() -> None:
        for i in range(STEPS):
            block._step(block.subsets[:, i * plan.batch : (i + 1) * plan.batch], 0.1)

    def alone() -> None:
        for loop in loops:
            for _ in range(STEPS):
                loop.step(images, label)

    together(), alone()
    pairs = [(_seconds(alone), _seconds(together)) for _ in range(ROUNDS)]
    torch.set_num_threads(threads)
    ratio = sorted(a / b for a, b in pairs)[ROUNDS // 2]
    each = [sorted(p[i] for p in pairs)[ROUNDS // 2] / NETWORKS / STEPS for i in (0, 1)]
    whole = 30 * (len(data.train) // plan.batch) * each[1]
    record_property("ratio", round(ratio, 2))
    said = (
        f"loop {each[0] * 1e6:.0f}, block {each[1] * 1e6:.0f} us a step, ratio {ratio:.2f}; "
        f"{plan.batch / each[1]:.0f} samples a second, {whole:.2f} s a network of 30 epochs"
    )
    sys.stdout.write(f"\n{said}\n")
    assert ratio > GOAL, said
