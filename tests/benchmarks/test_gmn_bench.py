"""One training step of GMN: dense blocks beside gather and scatter with the same parameters.

`pytest -m bench -s tests/benchmarks/test_gmn_bench.py`
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest
import torch
from graph_reference import graph_of, scattered
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from qemcli.architectures import gmn
from qemcli.machine import steady
from qemcli.spaces import cnn

BATCH, ROUNDS = 32, 7


@pytest.mark.bench
def test_dense_blocks_are_faster_than_scatter() -> None:
    steady()
    space = cnn([1, 16, 16, 16], 10)
    torch.manual_seed(0)
    model = gmn.Model(space, gmn.PRESETS["gmn-small"].config)
    w = space.unflatten(0.1 * torch.randn(BATCH, space.size))
    target = torch.rand(BATCH)
    graph = graph_of(space, {k: v[0] for k, v in w.items()})
    values = torch.stack([_values(graph_of, space, w, i) for i in range(BATCH)])
    ways = {
        "dense": lambda: model(w),
        "scatter": lambda: scattered(model.shared, graph, values),
    }
    torch.testing.assert_close(ways["dense"](), ways["scatter"](), rtol=1e-4, atol=1e-5)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            found[name].append(_step(model, way, target))
    best = {name: min(times) for name, times in found.items()}
    told = "  ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in best.items())
    sys.stderr.write(f"\ngmn-small, batch {BATCH}, processor time of a step: {told}\n")
    assert best["dense"] < best["scatter"]


def _values(graph_of: Callable, space: object, w: dict[str, Tensor], i: int) -> Tensor:
    return torch.stack([e[2] for e in graph_of(space, {k: v[i] for k, v in w.items()}).edges])


def _step(model: torch.nn.Module, way: Callable[[], Tensor], target: Tensor) -> float:
    start = time.process_time()
    model.zero_grad(set_to_none=True)
    binary_cross_entropy_with_logits(way()[:, 0], target).backward()
    return time.process_time() - start
