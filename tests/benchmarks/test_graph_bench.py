"""Dense blocks of edges beside gather and scatter: NG-GNN's messages, both ways, in one process.

`python -m pytest tests/benchmarks/test_graph_bench.py -m bench -s`: 1 thread, the same parameters
on both sides, rounds A B B A, processor time, the best of each.
"""

import sys
import time
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qemcli.layers.pna import PNA
from qemcli.spaces import cnn, siren

pytestmark = pytest.mark.bench
SPACES = {"cnn": cnn([1, 16, 16, 16], 10), "siren": siren([2, 32, 32, 1])}


def links(widths: list[int]) -> tuple[Tensor, Tensor]:
    """(sources, targets) of every edge, in the order of the blocks."""
    ends = torch.tensor([0, *widths]).cumsum(0).tolist()
    nodes = [torch.arange(a, b) for a, b in pairwise(ends)]
    pairs = []
    for l, targets in enumerate(nodes):
        near = torch.cat([*nodes[max(l - 1, 0) : l], *nodes[l + 1 : l + 2]])
        pairs.append(torch.cartesian_prod(targets, near))
    targets, sources = torch.cat(pairs).T
    return sources, targets


def scattered(layer: PNA, x: Tensor, st: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """The same layer edge by edge: st (b, E, 2 D)."""
    s, t = st.chunk(2, dim=-1)
    m = s * layer.pre(torch.cat([x[:, targets], x[:, sources]], dim=-1)) + t
    index = targets[None, :, None].expand_as(m)
    degree = torch.bincount(targets)[:, None]

    def reduced(values: Tensor, how: str) -> Tensor:
        return torch.zeros_like(x).scatter_reduce(1, index, values, how, include_self=False)

    mean = reduced(m, "sum") / degree
    variance = reduced(m * m, "sum") / degree - mean.square()
    extremes = [reduced(m, how) for how in ("amin", "amax")]
    found = torch.cat([mean, *extremes, variance.clamp_min(1e-5).sqrt()], dim=-1)
    factor = torch.tensor(layer.amplification)[:, None]
    return layer.out(layer.post(torch.cat([x, found, factor * found], dim=-1)))


@pytest.mark.parametrize("batch", [8, 32])
@pytest.mark.parametrize("name", SPACES)
def test_blocks_beside_gather_and_scatter(name, batch):
    torch.manual_seed(0)
    widths, d = list(SPACES[name].widths), 32
    layer, (sources, targets) = PNA(widths, d), links(widths)
    x = torch.randn(batch, sum(widths), d, requires_grad=True)
    edges = torch.randn(batch, len(sources), d, requires_grad=True)
    near = [a + b for a, b in zip([0, *widths[:-1]], [*widths[1:], 0], strict=True)]
    sizes = [n * m for n, m in zip(widths, near, strict=True)]

    def blocks() -> Tensor:
        st = F.linear(edges, layer.encoder.weight, layer.encoder.bias).split(sizes, dim=1)
        parts = zip(st, widths, near, strict=True)
        return layer(x, [e.unflatten(1, (n, m)) for e, n, m in parts])

    def scatter() -> Tensor:
        return scattered(layer, x, layer.encoder(edges), sources, targets)

    assert (blocks() - scatter()).abs().max() < 1e-3 * scatter().abs().max()
    times: dict[str, list[float]] = {"blocks": [], "scatter": []}
    for side in ("blocks", "scatter", "scatter", "blocks") * 4:
        start = time.process_time()
        (blocks if side == "blocks" else scatter)().square().mean().backward()
        times[side].append(time.process_time() - start)
    a, b = 1e3 * min(times["blocks"]), 1e3 * min(times["scatter"])
    sys.stdout.write(
        f"\n{name} B{batch}: blocks {a:.1f} ms, gather and scatter {b:.1f}: {b / a:.1f}x"
    )
    sys.stdout.flush()
    assert b > a
