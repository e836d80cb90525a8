"""The architectures of a mixed zoo: drawn by the recipe's seed, no two alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qemcli.errors import UsageError
from qemcli.spaces import Forward, Layered, cnn, residual
from qemcli.zoos.build import cnn as training
from qemcli.zoos.build.mixed_recipe import SHALLOWEST, MixedRecipe
from qemcli.zoos.build.sources import Images

STREAM = 2**33  # of the seed's generators, the one that draws architectures
TRIES = 1000  # draws without a new architecture after which there are taken to be no more
NONE = -1


@dataclass(frozen=True)
class Architecture:
    """What the networks of one block have in common; `added` as in spaces.Residual, without the
    dense layer."""

    widths: tuple[int, ...]
    kernel: int
    stride: int
    junction: str
    activation: str
    added: tuple[int, ...]

    @property
    def sums(self) -> bool:
        """True where earlier layers are added to later ones."""
        return any(earlier != NONE for earlier in self.added)

    @property
    def columns(self) -> dict[str, Any]:
        """What the index says of it."""
        return {
            "config.depth": np.int32(len(self.widths)),
            "config.widths": " ".join(map(str, self.widths)),
            "config.kernel": np.int32(self.kernel),
            "config.stride": np.int32(self.stride),
            "config.junction": self.junction,
            "config.residual": " ".join(map(str, self.added)),
            "config.sums": self.sums,
        }


def architectures(recipe: MixedRecipe) -> list[Architecture]:
    """One a block of networks, in the order of the blocks; of more networks the first are the same.

    UsageError where the recipe's lists do not hold so many.
    """
    rng = np.random.default_rng((recipe.seed, STREAM))
    wanted = -(-recipe.models // recipe.block)
    found: dict[Architecture, None] = {}
    tries = 0
    while len(found) < wanted:
        before = len(found)
        found.setdefault(_drawn(recipe, rng))
        tries = tries + 1 if len(found) == before else 0
        if tries > TRIES:
            raise UsageError(
                f"{wanted} architectures are asked for, and {len(found)} were found",
                "longer lists of depth, width, kernel or activation, or a larger block",
            )
    return list(found)


def _drawn(recipe: MixedRecipe, rng: np.random.Generator) -> Architecture:
    deep = [d for d in recipe.depth if d >= SHALLOWEST]
    sums = bool(rng.random() < recipe.residual)
    depth = int(rng.choice(deep if sums else recipe.depth))
    added = _sums(depth, rng) if sums else (NONE,) * depth
    widths: list[int] = []
    for earlier in added:
        drawn = int(rng.choice(recipe.width))
        widths.append(drawn if earlier == NONE else widths[earlier])
    kernel, stride = int(rng.choice(recipe.kernel)), int(rng.choice(recipe.stride))
    junction, activation = str(rng.choice(recipe.junction)), str(rng.choice(recipe.activation))
    return Architecture(tuple(widths), kernel, stride, junction, activation, added)


def _sums(depth: int, rng: np.random.Generator) -> tuple[int, ...]:
    """For every layer none, or one that is not the one before, as in the CNN Wild Park; at least
    one sum."""
    while True:
        added = tuple(int(rng.integers(NONE, max(i - 1, 0))) for i in range(depth))
        if any(earlier != NONE for earlier in added):
            return added


def space_of(arch: Architecture, images: Images) -> Layered:
    """The weight space of such networks on these images; UsageError where a layer has no output."""
    padding = arch.kernel // 2
    first = (arch.kernel, arch.stride, padding)
    later = (arch.kernel, 1 if arch.sums else arch.stride, padding)
    side = training.sides([first, *[later] * (len(arch.widths) - 1)], images)[-1]
    forward = Forward(
        stride=arch.stride,
        padding=padding,
        junction=arch.junction,
        image=images.shape,
        known=True,
    )
    positions = side * side if arch.junction == "flatten" else 1
    widths = (images.shape[0], *arch.widths)
    chain = cnn(widths, images.classes, arch.kernel, arch.activation, positions, forward)
    return residual(chain, (*arch.added, NONE)) if arch.sums else chain
