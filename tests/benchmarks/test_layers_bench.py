"""Layers and models beside PyPI's nfn 0.1.2: time and peak memory, copied parameters, one process.

`python -m pytest tests/benchmarks/test_layers_bench.py -m bench -s`, 1 thread, both sides under the
same allocator (set MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ for the one that keeps its
pages). Rounds are interleaved A B B A, medians; a ratio above 1 says that ours is faster, or
smaller.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layer_kit import draw_features
from nfn.common import WeightSpaceFeatures
from nfn.layers import HNPLinear as TheirHNP
from nfn.layers import HNPPool as TheirPool
from nfn.layers import NPLinear as TheirNP
from nfn.layers import TupleOp
from nfn_bridge import copy_hnp, copy_np, network_spec, theirs

from qemcli.architectures import nfn
from qemcli.layers.equivariant import HNPLinear, NPLinear
from qemcli.layers.features import door
from qemcli.spaces import cnn, siren

pytestmark = pytest.mark.bench
CNN, SIREN = cnn([1, 16, 16, 16], 10), siren([2, 32, 32, 1])
Run = Callable[[], object]


def interleaved(ours: Run, other: Run, rounds: int) -> tuple[float, float]:
    """Median seconds of each, A B B A."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side in (0, 1, 1, 0):
            start = time.perf_counter()
            (ours, other)[side]()
            times[side].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def peak(run: Run) -> float | None:
    """Extra peak resident MB of one call; None where the system does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    run()
    try:
        reset.write_text("5")
        lines = dict(x.split(":", 1) for x in status.read_text().splitlines())
        before = int(lines["VmRSS"].split()[0])
        run()
        lines = dict(x.split(":", 1) for x in status.read_text().splitlines())
    except OSError:
        return None
    return (int(lines["VmHWM"].split()[0]) - before) / 1024


def report(name: str, kinds: dict[str, tuple[Run, Run]], rounds: int) -> dict[str, float]:
    """Write one line a kind of run; returns the ratios of time."""
    ratios = {}
    for kind, (ours, other) in kinds.items():
        a, b = interleaved(ours, other, rounds)
        ratios[kind] = b / a
        line = f"{name:<28} {kind:<9} {1e3 * a:9.2f} ms  nfn {1e3 * b:9.2f} ms  {b / a:5.2f}x"
        mine, same = peak(ours), peak(other)
        if mine is not None and same is not None and mine > 4:
            line += f"   peak {mine:6.0f} MB  nfn {same:6.0f} MB  {same / mine:5.2f}x"
        sys.stdout.write(f"\n{line}")
    sys.stdout.flush()
    return ratios


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_()


@pytest.mark.parametrize(
    ("space", "channels", "batch", "rounds"),
    [(CNN, 16, 8, 15), (CNN, 16, 256, 2), (SIREN, 64, 32, 6), (SIREN, 64, 256, 2), (CNN, 1, 8, 15)],
    ids=["cnn-c16-B8", "cnn-c16-B256", "siren-c64-B32", "siren-c64-B256", "cnn-c1-B8"],
)
@pytest.mark.parametrize("kind", ["hnp", "np"])
def test_layer_beside_nfn(kind, space, channels, batch, rounds, request):
    if kind == "hnp":
        ours = HNPLinear(space, channels, channels)
        other = TheirHNP(network_spec(space), channels, channels)
        copy_hnp(space, ours, other)
    else:
        ours = NPLinear(space, channels, channels)
        other = TheirNP(network_spec(space), channels, channels)
        copy_np(ours, other)
    drawn = [(w.float(), b.float()) for w, b in draw_features(space, channels, batch)]
    same = theirs(space, drawn).map(lambda x: leaf(x.contiguous()))
    last, bias = drawn[-1]
    drawn[-1] = (last.transpose(1, 2).contiguous().transpose(1, 2), bias)
    features = [(leaf(w), leaf(b)) for w, b in drawn]

    def forward(layer: torch.nn.Module, x: object) -> Run:
        def run() -> None:
            with torch.no_grad():
                layer(x)

        return run

    def both(layer: torch.nn.Module, x: object) -> Run:
        def run() -> None:
            out = [t for pair in layer(x) for t in pair]
            torch.autograd.backward(out, [t.detach() for t in out])

        return run

    kinds = {
        "forward": (forward(ours, features), forward(other, same)),
        "+backward": (both(ours, features), both(other, same)),
    }
    ratios = report(f"{kind} {request.node.callspec.id}", kinds, rounds)
    assert min(ratios.values()) > 0.8  # a gross loss only: this machine may be busy


@pytest.mark.parametrize(("batch", "rounds"), [(8, 12), (256, 2)])
@pytest.mark.parametrize("kind", ["hnp", "np-posemb"])
def test_model_beside_nfn(kind, batch, rounds):
    model = nfn.Model(CNN, nfn.Config(linear=kind))
    spec = network_spec(CNN)
    w = CNN.unflatten(torch.randn(batch, CNN.size, generator=torch.Generator().manual_seed(0)))
    x = theirs(CNN, door(CNN, w)).map(lambda t: t.contiguous())
    layers: list[torch.nn.Module] = []
    for a, b in ((1, 16), (16, 16), (16, 5)):
        linear = TheirHNP(spec, a, b) if kind == "hnp" else TheirNP(spec, a, b, io_embed=True)
        layers += [linear, TupleOp(torch.nn.ReLU())]
    other = torch.nn.Sequential(*layers, TheirPool(spec), torch.nn.Flatten(), model.head)

    def step(net: torch.nn.Module, given: dict[str, torch.Tensor] | WeightSpaceFeatures) -> Run:
        def run() -> None:
            net(given).square().mean().backward()

        return run

    ratios = report(
        f"model {kind} B{batch}", {"+backward": (step(model, w), step(other, x))}, rounds
    )
    assert ratios["+backward"] > 0.8
