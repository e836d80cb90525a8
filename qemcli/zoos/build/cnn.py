"""Small CNNs trained many at a time: one grouped convolution a layer for a whole block of networks.

The architecture is the Small CNN Zoo's (Unterthiner et al., arXiv:2002.11448): convolutions of
stride 2, activation, dropout after each, global average pooling (or flattening), one dense layer;
or what a Residual space says. Everything random is drawn from the network's own generators, so
network i is the same, to rounding, however the zoo is cut into blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qemcli.errors import UsageError
from qemcli.functions import FUNCTIONS, respond
from qemcli.spaces import Chain, Forward, Layered, Residual, cnn
from qemcli.zoos.build.convolution import Convolution, matrix, side_after, windows
from qemcli.zoos.build.drawn import OPTIMIZERS, DrawnRecipe
from qemcli.zoos.build.recipe import Recipe
from qemcli.zoos.build.sources import Images

BANK = 2**26  # numbers: the windows of up to so many are kept (256 MB), of more made at each step


Steps = list[tuple[int, int, int]]  # kernel, stride and padding of every convolution


def space_of(recipe: Recipe, activation: str, images: Images) -> Chain:
    """The weight space of the recipe's networks on these images; checks that every layer has an
    output."""
    steps = [(recipe.kernel, recipe.stride, recipe.padding)] * len(recipe.channels)
    side = sides(steps, images)[-1]
    forward = Forward(
        stride=recipe.stride,
        padding=recipe.padding,
        junction=recipe.junction,
        image=images.shape,
        known=True,
    )
    positions = side * side if recipe.junction == "flatten" else 1
    widths = (images.shape[0], *recipe.channels)
    return cnn(widths, images.classes, recipe.kernel, activation, positions, forward)


def sides(steps: Steps, images: Images) -> list[int]:
    """The image's side after each convolution; UsageError where nothing is left."""
    _, height, side = images.shape
    if height != side:
        raise UsageError(f"images of {height} x {side} pixels", "set `resize` to make them square")
    found = []
    for i, step in enumerate(steps, start=1):
        side = side_after(side, *step)
        if side < 1:
            raise UsageError(
                f"nothing is left of the image after convolution {i}",
                "fewer channels entries, a smaller stride, more padding, or larger images",
            )
        found.append(side)
    return found


def steps_of(space: Layered) -> Steps:
    """Kernel, stride and padding of every convolution of a space of square kernels."""
    found = []
    for i, layer in enumerate(space.layers[:-1]):
        kernel = space[layer.weight].unfolded[2]
        stride, padding = space.forward.stride, space.forward.padding
        if isinstance(space, Residual):
            stride, (padding, _) = space.step(i)
        found.append((kernel, stride, padding))
    return found


@dataclass(frozen=True)
class Network:
    """One network to train: its number, what was drawn for it, and its generators' seeds."""

    number: int
    hyper: dict[str, Any]
    seed: int


def draw(recipe: DrawnRecipe, number: int) -> Network:
    """The hyper-parameters of network `number`, from (recipe.seed, number) alone."""
    rng = np.random.default_rng((recipe.seed, number))

    def log_uniform(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    hyper = {
        "lr": log_uniform(*recipe.lr),
        "l2": log_uniform(*recipe.l2),
        "init": str(rng.choice(recipe.init)),
        "init_std": log_uniform(*recipe.init_std),
        "dropout": float(rng.uniform(*recipe.dropout)),
        "optimizer": str(rng.choice(recipe.optimizer)),
        "train_fraction": float(rng.choice(recipe.train_fraction)),
        "activation": str(rng.choice(recipe.activation)),
    }
    return Network(number, hyper, int(rng.integers(2**62)))


def initial(space: Layered, network: Network) -> Tensor:
    """(D,) initial weights; biases start at zero, as in the published zoo."""
    generator = torch.Generator().manual_seed(network.seed)
    w = {}
    for la in space.layers:
        shape = (la.rows, la.cols, la.taps)
        w[la.weight] = _kernel(network, shape, generator).reshape(1, *space[la.weight].shape)
        if la.bias:
            w[la.bias] = torch.zeros(1, la.rows)
    return space.flatten(w)[0]


def _kernel(network: Network, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    rows, cols, taps = shape
    z = torch.randn(shape, generator=generator)
    kind = network.hyper["init"]
    if kind == "orthogonal":
        tall = z.reshape(rows, -1).T if rows < cols * taps else z.reshape(rows, -1)
        q, r = torch.linalg.qr(tall)
        q = q * r.diagonal().sign()
        return (q.T if rows < cols * taps else q).reshape(shape)
    std = {
        "he_normal": math.sqrt(2 / (cols * taps)),
        "glorot_normal": math.sqrt(2 / ((cols + rows) * taps)),
    }.get(kind, network.hyper["init_std"])
    if kind == "normal":
        return z * std
    while (far := z.abs() > 2).any():  # truncated at two deviations, as Keras does
        z = torch.where(far, torch.randn(shape, generator=generator), z)
    return z * std


class Block:
    """Networks of one architecture and activation trained side by side: parameters (n, D), one
    optimiser state. `batch` images a step."""

    def __init__(self, space: Layered, networks: list[Network], batch: int, images: Images):
        self.space, self.batch, self.images = space, batch, images
        self.convolutions = steps_of(space)
        at = sides(self.convolutions, images)
        # (channels, height, width) after each convolution.
        self.shapes = [(la.rows, side, side) for la, side in zip(space.layers, at, strict=False)]
        self.added = space.added if isinstance(space, Residual) else (-1,) * len(space.layers)
        # The optimisers are applied to slices, so networks of one optimiser stand together.
        self.networks = sorted(networks, key=lambda n: (n.hyper["optimizer"], n.number))
        self.flat = torch.stack([initial(space, n) for n in self.networks]).requires_grad_()
        self.first = torch.zeros_like(self.flat.detach())
        self.second = torch.zeros_like(self.first)
        self.lr = self._column("lr")
        kernels = {la.weight for la in space.layers}
        decays = [torch.full((t.size,), float(t.name in kernels)) for t in space.tensors]
        self.l2 = self._column("l2") * torch.cat(decays)
        self.generators = [torch.Generator().manual_seed(n.seed ^ 1) for n in self.networks]
        self.subsets = [self._subset(n) for n in self.networks]
        self.steps = 0
        self.bank = self._columns(images.train) if self._small() else None

    def _column(self, name: str) -> Tensor:
        return torch.tensor([n.hyper[name] for n in self.networks])[:, None]

    def _subset(self, network: Network) -> Tensor:
        rng = np.random.default_rng((network.seed, 2))
        total = len(self.images.train_label)
        size = max(self.batch, round(total * network.hyper["train_fraction"]))
        return torch.from_numpy(rng.permutation(total)[:size].copy())

    def _small(self) -> bool:
        """True where the windows of all training images may be kept."""
        _, height, width = self.shapes[0]
        window = self.convolutions[0][0] ** 2 * self.images.shape[0]
        return len(self.images.train) * height * width * window <= BANK

    def _columns(self, images: Tensor) -> Tensor:
        """(p, channels, h, v) -> (p, positions, taps): what the first convolution reads."""
        _, side, _ = self.shapes[0]
        flat = windows(images.movedim(1, -1)[None], *self.convolutions[0], side)
        return flat.view(len(images), side * side, -1)

    def _read(self, rows: Tensor) -> Tensor:
        """The windows of the training images rows (n, p), as (n, p positions, taps)."""
        if self.bank is not None:
            return self.bank[rows].flatten(1, 2)
        return (
            self._columns(self.images.train[rows.flatten()]).unflatten(0, rows.shape).flatten(1, 2)
        )

    def step(self) -> None:
        """One step of every network on its own batch, with its own optimiser."""
        chosen = [
            subset[torch.randint(len(subset), (self.batch,), generator=g)]
            for subset, g in zip(self.subsets, self.generators, strict=True)
        ]
        rows = torch.stack(chosen)
        logits = self.forward(self.flat, self._read(rows), self._masks())
        labels = self.images.train_label[rows]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss / self.batch, self.flat)
        self.steps += 1
        with torch.no_grad():
            self._update(gradient + 2 * self.l2 * self.flat)

    def forward(self, flat: Tensor, columns: Tensor, masks: list[Tensor] | None = None) -> Tensor:
        """Logits (n, p, classes) of network i on the images whose windows are columns[i]."""
        w = self.space.unflatten(flat)
        act = FUNCTIONS[self.space.activation or "relu"]
        *convolutions, last = self.space.layers
        x, outputs = columns, list[Tensor]()
        for i, la in enumerate(convolutions):
            bias, (_, stride, padding) = w[la.bias or ""], self.convolutions[i]
            if i:
                x = Convolution.apply(x, w[la.weight], bias, stride, padding)
            else:
                x = torch.baddbmm(bias[:, None], x, matrix(w[la.weight]))
                x = x.view(len(flat), -1, *self.shapes[0][1:], la.rows)
            x = act(x if self.added[i] < 0 else x + outputs[self.added[i]])
            x = x if masks is None else x * masks[i]
            outputs.append(x)
        # Flattening is by channel first, as in torch.
        pooled = self.space.forward.junction == "pool"
        z = x.mean((2, 3)) if pooled else x.movedim(-1, 2).flatten(2)
        return torch.baddbmm(w[last.bias or ""][:, None], z, w[last.weight].transpose(1, 2))

    def _masks(self) -> list[Tensor] | None:
        """Dropout factors after each convolution, (n, p, h, v, c), from networks' own generators.

        Each 64-bit draw serves eight units, so a rate is rounded to 1/256.
        """
        rates = torch.tensor([n.hyper["dropout"] for n in self.networks])
        if not rates.any():
            return None
        shapes = [(self.batch, *shape) for shape in self.shapes]
        sizes = [math.prod(shape) for shape in shapes]
        words = torch.empty(len(self.networks), -(-sum(sizes) // 8), dtype=torch.int64)
        for row, generator in zip(words, self.generators, strict=True):
            row.random_(-(2**63), None, generator=generator)
        levels = (rates * 256).round()[:, None]
        keep = words.view(torch.uint8)[:, : sum(sizes)] >= levels.to(torch.uint8)
        factors = (256 / (256 - levels)).unflatten(1, (1, 1, 1, 1))
        parts = zip(keep.split(sizes, dim=1), shapes, strict=True)
        kept = (part.unflatten(1, shape).movedim(2, -1).contiguous() for part, shape in parts)
        return [k.float().mul_(factors) for k in kept]

    def _update(self, gradient: Tensor) -> None:
        """Adam, RMSprop and SGD with Keras' constants, each on its slice of the block."""
        names = [n.hyper["optimizer"] for n in self.networks]
        for name in OPTIMIZERS:
            if name in names:
                low = names.index(name)
                part = slice(low, low + names.count(name))
                getattr(self, f"_{name}")(part, gradient[part])

    def _adam(self, part: slice, gradient: Tensor) -> None:
        m, v, t = self.first[part], self.second[part], self.steps
        m.lerp_(gradient, 0.1)
        v.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        size = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt_() + 1e-7)
        self.flat[part] -= self.lr[part] * size

    def _rmsprop(self, part: slice, gradient: Tensor) -> None:
        v = self.second[part]
        v.mul_(0.9).addcmul_(gradient, gradient, value=0.1)
        self.flat[part] -= self.lr[part] * gradient / (v.sqrt() + 1e-7)

    def _sgd(self, part: slice, gradient: Tensor) -> None:
        self.flat[part] -= self.lr[part] * gradient

    @torch.no_grad()
    def measure(self) -> list[dict[str, float]]:
        """Accuracy and loss of every network on the test images and on (up to 512 of) its own
        training images."""
        size = min(512, max(len(s) for s in self.subsets))
        rows = torch.stack([s[torch.arange(size) % len(s)] for s in self.subsets])
        # A subset of fewer images is read again from its start; those repetitions do not count.
        count = torch.tensor([min(size, len(s)) for s in self.subsets])[:, None]
        counts = torch.arange(size) < count
        train = self._scores(
            self.forward(self.flat, self._read(rows)), self.images.train_label[rows], counts
        )
        label = self.images.test_label.expand(len(rows), -1)
        test = self._scores(self._test_logits(), label, torch.ones_like(label, dtype=torch.bool))
        names = ("accuracy", "loss")
        return [
            {f"{side}_{n}": float(v[i]) for side, vs in (("test", test), ("train", train))
             for n, v in zip(names, vs, strict=True)}
            for i in range(len(rows))
        ]  # fmt: skip

    def _test_logits(self) -> Tensor:
        w = self.space.unflatten(self.flat.detach())
        return torch.cat([respond(self.space, w, x) for x in self.images.test.split(256)], dim=1)

    def _scores(self, logits: Tensor, label: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Accuracy and loss (n,) over the images that count, from logits (n, p, classes)."""
        total = counts.sum(1).double()
        right = (logits.argmax(-1) == label) & counts
        loss = F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none")
        return right.sum(1) / total, (loss.view(label.shape).double() * counts).sum(1) / total


def train(
    block: Block, checkpoints: tuple[int, ...]
) -> Iterator[tuple[int, np.ndarray, list[dict[str, float]]]]:
    """Train the block; at every checkpoint step yields (step, weights (n, D), one score dict a
    network)."""
    last = max(checkpoints)
    for step in range(last + 1):
        if step in checkpoints:
            yield step, block.flat.detach().numpy().copy(), block.measure()
        if step < last:
            block.step()
