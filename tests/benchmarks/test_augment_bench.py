"""How many networks a second are moved by random group elements, beside a loop over state dicts.

The loop does what published code does to augment a zoo: for every network a state dict, for every
layer a random permutation and scale, rows indexed and multiplied, the next layer's columns indexed
and divided, and arrays again. It proves nothing and writes nothing, and neither does what it is
compared with.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch

from qemcli import groups
from qemcli.machine import steady
from qemcli.spaces import Chain, cnn, siren

ROUNDS, BATCH = 7, 2048


def state_dict_loop(space: Chain, arrays: list[np.ndarray]) -> list[np.ndarray]:
    moved = []
    for network in zip(*arrays, strict=True):
        state = OrderedDict(
            (name, torch.from_numpy(x)) for name, x in zip(space.names, network, strict=True)
        )
        new: OrderedDict[str, torch.Tensor] = OrderedDict()
        before = None
        for layer in space.layers:
            weight, bias = state[layer.weight], state[layer.bias or ""]
            if before is not None:
                weight = weight[:, before[0]]
                weight = (weight.transpose(1, -1) / before[1]).transpose(1, -1)
            if layer is not space.layers[-1]:
                order, scale = torch.randperm(layer.rows), 1 + 9 * torch.rand(layer.rows)
                weight = (weight[order].transpose(0, -1) * scale).transpose(0, -1)
                bias = bias[order] * scale
                before = order, scale
            new[layer.weight], new[layer.bias or ""] = weight, bias
        moved.append([x.numpy() for x in new.values()])
    return [np.stack(x) for x in zip(*moved, strict=True)]


@pytest.mark.bench
@pytest.mark.parametrize(
    "space", [cnn([1, 16, 16, 16], 10), siren([2, 32, 32, 1])], ids=["cnn", "siren"]
)
def test_augment_rate_beside_a_loop_over_state_dicts(
    space: Chain, record_property: Callable[[str, object], None]
) -> None:
    steady()
    generator = torch.Generator().manual_seed(0)
    w = space.unflatten(torch.randn(BATCH, space.size, generator=generator))
    arrays = [w[name][:256].numpy() for name in space.names]

    def ours() -> None:
        g = groups.sample("monomial", space, BATCH, generator, scale_range=(1.0, 10.0))
        groups.act(g, space, w)

    rates: dict[str, list[float]] = {"ours": [], "loop": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(ROUNDS):  # interleaved: a busy machine slows both
            for name, count, work in (
                ("ours", BATCH, ours),
                ("loop", 256, lambda: state_dict_loop(space, arrays)),
            ):
                start = time.process_time()
                work()
                rates[name].append(count / (time.process_time() - start))
    finally:
        torch.set_num_threads(threads)
    fast, slow = (float(np.median(rates[name])) for name in ("ours", "loop"))
    record_property("networks_a_second", round(fast))
    record_property("times", round(fast / slow, 1))
    assert fast > 10 * slow, f"{fast:,.0f} networks/s, the loop {slow:,.0f}"
