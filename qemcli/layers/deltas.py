"""The way out of a weight-to-weight metanetwork: features -> what is added to the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qemcli.layers.features import Features
from qemcli.spaces import Chain


class Deltas(nn.Module):
    """Features of k channels -> dict of (b, k, *shape), times one learned scalar a tensor.

    The scalars start at `scale`, so that an untrained editor changes next to nothing, and are
    shared by the branches. Whatever the features are equivariant to, every branch is. Source:
    arXiv:2302.14040 (k = 1, scale .01); arXiv:2602.01083 (branches).
    """

    def __init__(self, space: Chain, scale: float = 0.01) -> None:
        super().__init__()
        self.space = space
        self.scales = nn.Parameter(torch.full((len(space.tensors),), scale))

    def forward(self, features: Features) -> dict[str, Tensor]:
        k = features[0][1].shape[-1]
        pairs = [
            (w.unflatten(-1, (k, -1)).movedim(3, 1).flatten(0, 1), b.movedim(2, 1).flatten(0, 1))
            for w, b in features
        ]
        return self.scaled(self.space.from_matrices(pairs), k)

    def scaled(self, w: dict[str, Tensor], k: int) -> dict[str, Tensor]:
        """dict of (b k, *shape), branches fastest -> the same as (b, k, *shape), scaled."""
        scales = zip(self.space.names, self.scales, strict=True)
        return {name: s * w[name].unflatten(0, (-1, k)) for name, s in scales}
