"""Optimisers for many networks side by side, each with its own rate, kind and decay; torch's
constants."""

from __future__ import annotations

import torch
from torch import Tensor


class Optimizers:
    """The update of networks (n, D) that stand together by kind: `kinds` are sorted.

    L2 is added to the gradient, as torch's `weight_decay` does. A network whose gradient or weights
    are no longer finite stays where it was: `alive` is then False.
    """

    def __init__(self, kinds: list[str], l2: Tensor, flat: Tensor) -> None:
        self.l2 = l2[:, None]
        self.first, self.second = torch.zeros_like(flat), torch.zeros_like(flat)
        self.alive = torch.ones(len(flat), dtype=torch.bool)
        self.parts = {
            kind: slice(kinds.index(kind), kinds.index(kind) + kinds.count(kind))
            for kind in dict.fromkeys(kinds)
        }
        self.steps = 0

    @torch.no_grad()
    def step(self, flat: Tensor, gradient: Tensor, rate: Tensor) -> None:
        """Move `flat` (n, D) in place along (n, D) gradients, at rates (n,)."""
        self.steps += 1
        gradient = gradient.addcmul(self.l2, flat)
        move = torch.empty_like(flat)
        for kind, part in self.parts.items():
            move[part] = getattr(self, f"_{kind}")(part, gradient[part])
        moved = flat.addcmul(rate[:, None], move, value=-1)
        # A sum is not finite where one of its terms is not; the states then never are again.
        self.alive &= moved.sum(1).isfinite()
        flat.copy_(moved if self.alive.all() else torch.where(self.alive[:, None], moved, flat))

    def _adam(self, part: slice, g: Tensor) -> Tensor:
        m, v, t = self.first[part], self.second[part], self.steps
        m.lerp_(g, 0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        return m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt_() + 1e-8)

    def _rmsprop(self, part: slice, g: Tensor) -> Tensor:
        v = self.second[part]
        v.mul_(0.99).addcmul_(g, g, value=0.01)
        return g / (v.sqrt() + 1e-8)

    def _sgd(self, part: slice, g: Tensor) -> Tensor:
        return g

    def _momentum(self, part: slice, g: Tensor) -> Tensor:
        return self.first[part].mul_(0.9).add_(g)
