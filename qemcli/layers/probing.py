"""Probes: learned inputs on which networks are run, and what their answers are worth.

An answer depends on a network as a function alone, so nothing made of answers can tell two points
of an orbit apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qemcli.errors import InputError, UnsupportedError
from qemcli.functions import image_shape
from qemcli.spaces import Layered

LATENT = 32  # numbers behind each probe of a generator
FASTER = 10  # so many times as fast as the rest move the probes that have no generator


class FreeProbes(nn.Module):
    """`count` learned coordinates, each on its own, drawn from [-1, 1]: "vanilla probing"."""

    def __init__(self, count: int, inputs: int) -> None:
        super().__init__()
        self.probes = nn.Parameter(2 * torch.rand(count, inputs) - 1)

    def forward(self) -> Tensor:
        return self.probes


class GeneratedProbes(nn.Module):
    """Coordinates x_p = G(z_p) with learned z_p and a deep linear G, all probes' in common."""

    def __init__(self, count: int, inputs: int) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.randn(count, LATENT))
        self.generator = nn.Sequential(nn.Linear(LATENT, LATENT), nn.Linear(LATENT, inputs))

    def forward(self) -> Tensor:
        return self.generator(self.latent)


class FreeImages(nn.Module):
    """`count` learned images (count, channels, height, width), kept in [-1, 1] by tanh."""

    def __init__(self, count: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.probes = nn.Parameter(torch.randn(count, *shape))

    def forward(self) -> Tensor:
        return self.probes.tanh()


class SmoothImages(nn.Module):
    """`count` learned images drawn on a coarse grid and brought to (channels, height, width), kept
    in [-2, 2] by tanh: what a generator is for, neighbouring pixels alike, at no cost.

    Parameters are kept at a tenth of their size, so that one learning rate moves the probes ten
    times as fast as the head: 64 images have few numbers and small gradients.
    """

    def __init__(self, count: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, *self.size = shape
        grid = [math.ceil(side / 2) for side in self.size]
        self.coarse = nn.Parameter(torch.randn(count, channels, *grid) / FASTER)

    def forward(self) -> Tensor:
        fine = F.interpolate(self.coarse, self.size, mode="bilinear", align_corners=False)
        return 2 * (FASTER * fine).tanh()


class GeneratedImages(nn.Module):
    """Images tanh(G(z_p)): six transposed convolutions without activations, 32 x 32, brought to
    the networks' own size."""

    def __init__(self, count: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.size = shape[1:]
        self.latent = nn.Parameter(torch.randn(count, LATENT, 1, 1))
        widths = (LATENT, 128, 64, 32, 32, 16, shape[0])
        kinds = ((4, 1, 0), (4, 2, 1), (4, 2, 1), (3, 1, 1), (4, 2, 1), (3, 1, 1))
        self.generator = nn.Sequential(
            *(
                nn.ConvTranspose2d(a, b, kernel, stride, padding)
                for a, b, (kernel, stride, padding) in zip(widths, widths[1:], kinds, strict=False)
            )
        )

    def forward(self) -> Tensor:
        images = self.generator(self.latent)
        return F.interpolate(images, self.size, mode="bilinear", align_corners=False).tanh()


class Jitter(nn.Module):
    """In training, every network sees the probes through a random affine map of its own.

    `size` s: turns by up to s radians, scales and shears by up to s, shifts by up to s / 2 (of the
    [-1, 1] range); 0 or evaluation: the identity.
    """

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    @contextmanager
    def still(self) -> Iterator[None]:
        """The identity for a while: constants of a training set are not drawn."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    def forward(self, batch: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(maps (b, inputs, inputs), shifts (b, 1, inputs)) in the dtype of `like` (p, inputs)."""
        n = like.shape[1]
        eye = torch.eye(n).to(like)
        if not self.training or not self.size:
            return eye.expand(batch, n, n), like.new_zeros(batch, 1, n)
        maps = eye + self.size * (2 * torch.rand(batch, n, n).to(like) - 1)
        return maps, self.size * (torch.rand(batch, 1, n).to(like) - 0.5)


def require_runnable(space: Layered) -> None:
    """InputError where the networks cannot be run: their activation or their w0 is not known."""
    if space.activation is None:
        raise InputError("the networks' activation is not known", "pass --activation NAME")


def most_sure(spaces: Sequence[Layered]) -> Layered:
    """One of them whose image is read off: stated, or told by a dense layer that reads its
    positions; the first where none is."""
    sure = [s for s in spaces if s.forward.image or s.forward.junction == "flatten"]
    return [*sure, *spaces][0]


def require_alike(asked: Layered, own: Layered) -> None:
    """UnsupportedError where networks cannot be asked what others are: they read other inputs, or
    give other answers. InputError where they cannot be run."""
    require_runnable(asked)
    given, read = _inputs(asked, own), _inputs(own, own)
    if given != read:
        raise UnsupportedError(
            f"networks that read {given[0]} and give {given[1]} answers cannot be asked what "
            f"others are that read {read[0]} and give {read[1]}",
            "pick those of one kind with --where",
        )


def _inputs(space: Layered, other: Layered) -> tuple[str, int]:
    """What it reads, in words, and how many answers it gives. One that reads images of any size
    reads those of the other."""
    outputs, channels = space.layers[-1].rows, space.layers[0].cols
    if not space.layers[0].conv:
        kind = "coordinates" if space.family == "siren" else "numbers"
        return f"{channels} {kind}", outputs
    free = space.forward.image is None and space.forward.junction != "flatten"
    try:
        height, width = image_shape(other if free and other.layers[0].conv else space)[1:]
    except InputError:
        return "images of unknown size", outputs
    return f"images of {channels} x {height} x {width}", outputs


def settled(space: Layered, answers: Tensor) -> Tensor:
    """Answers (b, p, outputs) on a scale that diverged networks do not leave.

    Fields of coordinates stay as they are; of classifiers' logits, log-probabilities compressed by
    sign(x) log(1 + |x|).
    """
    if space.family == "siren":
        return answers
    if space.layers[-1].rows > 1:
        answers = answers.log_softmax(dim=2)
    return answers.sign() * answers.abs().log1p()


def batch_of(w: Mapping[str, Tensor]) -> int:
    """How many networks."""
    return len(next(iter(w.values())))
