"""Residual sums in dense graphs: an edge each way between a neuron and the one it is added to.

In a block of edges (graph.py) those of a node layer stand behind its weights, a column a partner
layer: column p of row i is the edge between neuron i here and neuron i there. Their value is 1 in
the middle of the window, the kernel that changes nothing. Source: arXiv:2403.12143, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qemcli.spaces import Layered, Residual
from qemcli.spaces.residual import NONE

Partners = tuple[tuple[int, ...], ...]  # of every node layer, inputs first


def partners(space: Layered) -> Partners:
    """The node layers that each is added to or that are added to it, in their order."""
    found: list[list[int]] = [[] for _ in space.widths]
    added = space.added if isinstance(space, Residual) else ()
    for l, earlier in enumerate(added, start=1):
        if earlier != NONE:
            found[l].append(earlier + 1)
            found[earlier + 1].append(l)
    return tuple(tuple(sorted(own)) for own in found)


def across(layers: Sequence[Tensor], own: Sequence[int]) -> Tensor:
    """The features (b, n_l, c) of the partners of one node layer, side by side: (b, n, s, c)."""
    return torch.stack([layers[l] for l in own], dim=2)


def modulated(modulation: Tensor, sent: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """[s, t] (b, n, m + s, 2D) and q (b, m, D) of a block with links that are sent (b, n, s, D), as
    `pna.aggregate` takes them: t of a link holds s times what is sent, and its q is 0."""
    dense, links = modulation.split([q.shape[1], sent.shape[2]], dim=2)
    s, t = links.chunk(2, dim=-1)
    moved = torch.cat([s, torch.addcmul(t, s, sent)], dim=-1)
    still = q.new_zeros(len(q), sent.shape[2], q.shape[2])
    return torch.cat([dense, moved], dim=2), torch.cat([q, still], dim=1)
