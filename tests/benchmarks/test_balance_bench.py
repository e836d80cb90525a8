"""Balance, networks a minute on one core: the Small CNN Zoo's architecture, 4,970 parameters."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from qemcli import groups
from qemcli.balance import balance
from qemcli.spaces import cnn

NETWORKS = 1024
GOAL = 20_000  # networks a minute


@pytest.mark.bench
@pytest.mark.parametrize("scaled", [False, True], ids=["as trained", "after U[1,1e4]"])
def test_balance_rate_is_above_the_goal(
    rng: torch.Generator, scaled: bool, record_property: Callable[[str, object], None]
) -> None:
    space = cnn([1, 16, 16, 16], 10)
    w = {
        name: torch.randn(NETWORKS, *shape, generator=rng) / shape[-1] ** 0.5
        for name, shape in space.shapes.items()
    }
    if scaled:
        w = groups.act(groups.sample("scale", space, NETWORKS, rng, (1.0, 1e4)), space, w)
    balance(space, w)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        balance(space, w)
        seconds.append(time.perf_counter() - start)
    rate = 60 * NETWORKS / sorted(seconds)[2]
    record_property("networks_a_minute", round(rate))
    assert rate > GOAL, f"{rate:,.0f} networks a minute on one core"
