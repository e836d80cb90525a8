"""Training steps of Transformer-NFN beside a plain transcription of its formulas: one einsum a
term, heads and channels explicit, as a published code would have it.

`python -m pytest tests/benchmarks/test_transformer_nfn_bench.py -m bench -s`: batch 16, one
thread, one process, both sides under the same allocator and with equal counts of parameters.
Rounds are interleaved A B B A, medians of processor time, so that a busy machine slows both.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qemcli.architectures import transformer_nfn
from qemcli.layers.presets import SPACES
from qemcli.machine import steady

pytestmark = pytest.mark.bench
GOAL, ROUNDS, BATCH, CHANNELS = 3.0, 12, 16, 10
D, A = 32, 64
# target -> term -> (equation, trailing shape of the coefficient); S, R keep their heads
TERMS: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {
    "up": [
        ("S", "bdhpq,edpq->be..", (D, D)), ("R", "bdhpq,edp->be..", (D,)),
        ("R", "bdhpj,edp->bej.", (D,)), ("up", "bdpq,ed->be..", ()), ("up", "bdjq,ed->bej.", ()),
        ("up", "bdpk,ed->be.k", ()), ("up", "bdjk,ed->bejk", ()), ("down", "bdpq,edq->be..", (D,)),
        ("down", "bdkq,edq->be.k", (D,)), ("up_bias", "bdq,ed->be..", ()),
        ("up_bias", "bdk,ed->be.k", ()), ("down_bias", "bdq,edq->be..", (D,)),
    ],
    "up_bias": [
        ("S", "bdhpq,edpq->be.", (D, D)), ("R", "bdhpq,edp->be.", (D,)), ("up", "bdpq,ed->be.", ()),
        ("up", "bdpk,ed->bek", ()), ("down", "bdpq,edq->be.", (D,)),
        ("down", "bdkq,edq->bek", (D,)), ("up_bias", "bdq,ed->be.", ()),
        ("up_bias", "bdk,ed->bek", ()), ("down_bias", "bdq,edq->be.", (D,)),
    ],
    "down": [
        ("S", "bdhpq,edkpq->be.k", (D, D, D)), ("R", "bdhpq,edkp->be.k", (D, D)),
        ("up", "bdpq,edk->be.k", (D,)), ("up", "bdpj,edk->bejk", (D,)),
        ("down", "bdpq,edkq->be.k", (D, D)), ("down", "bdjq,edkq->bejk", (D, D)),
        ("up_bias", "bdq,edk->be.k", (D,)), ("up_bias", "bdj,edk->bejk", (D,)),
        ("down_bias", "bdq,edkq->be.k", (D, D)),
    ],
    "down_bias": [
        ("S", "bdhpq,edkpq->bek", (D, D, D)), ("R", "bdhpq,edkp->bek", (D, D)),
        ("up", "bdpq,edk->bek", (D,)), ("down", "bdpq,edkq->bek", (D, D)),
        ("up_bias", "bdq,edk->bek", (D,)), ("down_bias", "bdq,edkq->bek", (D, D)),
    ],
}  # fmt: skip
CONSTANTS = {"up": (1, 1), "up_bias": (1,), "down": (1, D), "down_bias": (D,)}
INVARIANT = [
    ("S", "bdhpq,edpq->be", (D, D)), ("R", "bdhpq,edp->be", (D,)), ("up", "bdpq,ed->be", ()),
    ("down", "bdpq,edq->be", (D,)), ("up_bias", "bdq,ed->be", ()),
    ("down_bias", "bdq,edq->be", (D,)),
]  # fmt: skip


class Term(nn.Module):
    """One einsum with its own coefficient; `.` in the answer is an axis of one."""

    def __init__(self, equation: str, shape: tuple[int, ...], c_in: int) -> None:
        super().__init__()
        self.equation = equation.replace(".", "")
        self.ones = [i for i, x in enumerate(equation.split("->")[1]) if x == "."]
        self.weight = nn.Parameter(torch.randn(CHANNELS, c_in, *shape) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum(self.equation, x, self.weight)
        for at in self.ones:
            y = y.unsqueeze(at)
        return y


def with_products(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """S and R of every head and channel."""
    S = torch.einsum("bdhpk,bdhqk->bdhpq", x["query"], x["key"])
    return x | {"S": S, "R": torch.einsum("bdhpk,bdhkq->bdhpq", x["value"], x["out"])}


class Block(nn.Module):
    """One block: equivariant layer, ReLU on the feed-forward, invariant layer, layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(Term("bdhpk,edjp->behjk", (D, D), 1) for _ in range(3))
        self.out = nn.ModuleList([Term("bdhjk,ed->behj.", (), 1), Term("bdhjk,ed->behjk", (), 1)])
        self.terms = nn.ModuleDict(
            {t: nn.ModuleList(Term(eq, s, 1) for _, eq, s in all_) for t, all_ in TERMS.items()}
        )
        self.constants = nn.ParameterDict(
            {t: torch.zeros(CHANNELS, *shape) for t, shape in CONSTANTS.items()}
        )
        self.invariant = nn.ModuleList(Term(eq, s, CHANNELS) for _, eq, s in INVARIANT)
        self.constant = nn.Parameter(torch.zeros(CHANNELS))
        self.norm = nn.LayerNorm(CHANNELS)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        x = with_products(x)
        new = {r: m(x[r]) for r, m in zip(("query", "key", "value"), self.maps, strict=True)}
        new["out"] = sum(term(x["out"]) for term in self.out)
        for target, terms in self.terms.items():
            read = zip(terms, TERMS[target], strict=True)
            new[target] = torch.relu(sum(t(x[s[0]]) for t, s in read) + self.constants[target])
        new = with_products(new)
        read = zip(self.invariant, INVARIANT, strict=True)
        return self.norm(sum(term(new[s[0]]) for term, s in read) + self.constant)


class Plain(nn.Module):
    """The whole network: two blocks, classifier and embedding branches, as in the presets."""

    def __init__(self) -> None:
        super().__init__()
        space = SPACES["transformer-mnist"]()
        ours = transformer_nfn.Model(space, transformer_nfn.PRESETS["transformer-nfn-mnist"].config)
        self.space, self.head, self.branches, self.last = space, ours.head, ours.branches, ours.last
        self.blocks = nn.ModuleList(Block() for _ in space.blocks)

    def forward(self, w: dict[str, Tensor]) -> Tensor:
        found = []
        for block, roles in zip(self.blocks, self.space.read(w), strict=True):
            roles = roles | {r: roles[r][:, :, 0] for r in ("query", "out")}
            found.append(block({role: x[:, None] for role, x in roles.items()}))
        z = self.head(torch.cat(found, dim=1))
        return self.last(torch.cat([z, *(b(w) for b in self.branches)], dim=1))


def step(model: nn.Module, w: dict[str, Tensor], fused: bool) -> Callable[[], None]:
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused or None)
    target = torch.rand(BATCH, 1, generator=torch.Generator().manual_seed(0))

    def run() -> None:
        optimiser.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(w), target).backward()
        optimiser.step()

    return run


def held(model: nn.Module, w: dict[str, Tensor]) -> float:
    """MB that one answer keeps for the gradient, parameters not counted."""
    found = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        found.setdefault(storage.data_ptr(), storage.nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        answer = model(w)
    assert answer.requires_grad
    return sum(found.values()) / 2**20


def test_training_step_beside_one_einsum_a_term(
    record_property: Callable[[str, object], None],
) -> None:
    steady()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        plain = Plain()
        preset = transformer_nfn.PRESETS["transformer-nfn-mnist"]
        ours = transformer_nfn.Model(plain.space, preset.config)
        counts = [sum(p.numel() for p in m.parameters()) for m in (ours, plain)]
        assert counts == [preset.published] * 2
        w = plain.space.unflatten(torch.randn(BATCH, plain.space.size) * 0.2)
        runs = step(ours, w, True), step(plain, w, False)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for side in (0, 1, 1, 0):
                start = time.process_time()
                runs[side]()
                times[side].append(time.process_time() - start)
        mine, other = (1e3 * statistics.median(t) for t in times)
        memory = [held(model, w) for model in (ours, plain)]
    finally:
        torch.set_num_threads(threads)
    record_property("times", round(other / mine, 2))
    sys.stdout.write(
        f"\nours {mine:.1f} ms  plain {other:.1f} ms  {other / mine:.2f}x   "
        f"held for the gradient {memory[0]:.1f} MB  plain {memory[1]:.1f} MB\n"
    )
    assert memory[0] < memory[1]
    assert other > GOAL * mine
