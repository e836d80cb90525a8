"""Layers and models beside PyPI's nfn 0.1.2: time and peak memory, copied parameters, one process.

`python -m pytest tests/benchmarks/test_layers_bench.py -m bench -s`, 1 thread, both sides under an
allocator that keeps its pages. Rounds are interleaved A B B A, the least CPU time of each; a ratio
above 1 says that ours is faster. Memory is the peak of a pass both ways beyond what was held
before, less the parameters' gradients; its ratio is ours to theirs.
"""

import sys
import time
from collections.abc import Callable

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
from qemcli.machine import steady
from qemcli.memory import watched
from qemcli.spaces import cnn, siren

pytestmark = pytest.mark.bench
CNN, SIREN = cnn([1, 16, 16, 16], 10), siren([2, 32, 32, 1])
Run = Callable[[], object]


@pytest.fixture(autouse=True)
def steadied():
    steady()


def interleaved(ours: Run, other: Run, rounds: int) -> tuple[float, float]:
    """Least CPU seconds of each, A B B A."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side in (0, 1, 1, 0):
            start = time.process_time()
            (ours, other)[side]()
            times[side].append(time.process_time() - start)
    return min(times[0]), min(times[1])


def peak(run: Run, net: torch.nn.Module, leaves: list[torch.Tensor]) -> float | None:
    """Extra peak resident MB of one call; None where the system does not tell."""
    run()
    for x in (*net.parameters(), *leaves):
        x.grad = None
    with watched() as seen:
        run()
    if seen.megabytes is None:
        return None
    return seen.megabytes - sum(p.nbytes for p in net.parameters()) / 2**20


def report(name: str, kinds: dict[str, tuple[Run, Run]], rounds: int) -> dict[str, float]:
    """Write one line a kind of run; returns the ratios of time."""
    ratios = {}
    for kind, (ours, other) in kinds.items():
        a, b = interleaved(ours, other, rounds)
        ratios[kind] = b / a
        line = f"{name:<28} {kind:<9} {1e3 * a:9.2f} ms  nfn {1e3 * b:9.2f} ms  {b / a:5.2f}x"
        sys.stdout.write(f"\n{line}")
    sys.stdout.flush()
    return ratios


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_()


CASES = {
    "cnn-c1-B8": (CNN, 1, 8, 15),
    "cnn-c16-B8": (CNN, 16, 8, 8),
    "cnn-c16-B256": (CNN, 16, 256, 2),
    "cnn-c64-B8": (CNN, 64, 8, 3),
    "siren-c16-B256": (SIREN, 16, 256, 3),
    "siren-c64-B32": (SIREN, 64, 32, 5),
    "siren-c64-B256": (SIREN, 64, 256, 2),
    "siren-c256-B8": (SIREN, 256, 8, 4),
    "siren-c256-B32": (SIREN, 256, 32, 2),
}
# Where products are not all there is to do, and where the layer is large beside its parameters.
QUICK, LARGE = ("c16-B256", "c64-B32", "c64-B256"), ("c16-B256", "c64-B256")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["hnp", "np"])
def test_layer_beside_nfn(kind, case):
    space, channels, batch, rounds = CASES[case]
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

    def both(layer: torch.nn.Module, x: object, leaves: list[torch.Tensor]) -> Run:
        with torch.no_grad():
            gradients = [torch.ones_like(t) for pair in layer(x) for t in pair]

        def run() -> None:
            for t in leaves:
                t.grad = None
            layer.zero_grad()
            out = [t for pair in layer(x) for t in pair]
            torch.autograd.backward(out, gradients)

        return run

    mine, nfns = ([t for pair in x for t in pair] for x in (features, [*same]))
    pair = both(ours, features, mine), both(other, same, nfns)
    kinds = {"forward": (forward(ours, features), forward(other, same)), "+backward": pair}
    ratios = report(f"{kind} {case}", kinds, rounds)
    # Never slower; the goals where the rate of products is not the limit.
    assert min(ratios.values()) > 1.0
    if case.endswith(QUICK):
        assert min(ratios.values()) > 1.4
    held = peak(pair[0], ours, mine), peak(pair[1], other, nfns)
    if held[0] is not None and held[1] is not None and held[1] > 4:
        sys.stdout.write(f"   peak {held[0]:.0f} MB  nfn {held[1]:.0f} MB  {held[0] / held[1]:.2f}")
        assert not case.endswith(LARGE) or held[0] < 0.6 * held[1]


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
    assert ratios["+backward"] > 1.0
