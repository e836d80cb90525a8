"""SIRENs fitted many at a time: a hand-written gradient and Adam on one flat buffer, no autograd.

A SIREN is sin(w0 (W x + b)) in every layer but the last (Sitzmann et al., arXiv:2006.09661). Three
things make a step an order of magnitude cheaper than autograd's, network by network:

* On a grid the first layer is a product, sin(a row + b column) = sin cos + cos sin: its waves are
  computed on one row and one column, and its gradient is one small product of matrices.
* Every layer is [W | b], and its input ends in a row of ones: no separate bias, forward or
  backward. It is kept transposed, (in + 1, out), which is how its gradient is computed fastest.
* One wave gives the sine and what the gradient needs of the cosine, cos = 1 - dip / 2.

Activations are (n, neurons, pixels).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qemcli.spaces import Chain

BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's, as torch has them
TURN = 2 * math.pi
CACHE = 600_000  # numbers of one layer that stay in cache: 23 networks of 32 neurons at 28 x 28
CUDA = 1 << 28  # numbers of one layer on a CUDA device: 1 GB
# sin(TURN t) = S C and cos(TURN t) = 1 - S S / 2, where S = 2 sin(pi t), C = cos(pi t), |t| <= 1/2,
# as polynomials in t t (S without its factor t): Chebyshev interpolation, errors 1.3e-8, 4.7e-8.
HALF_SINE = (6.283185280154403, -10.33542015333633, 5.100154773052372, -1.1965808225334407,
             0.15531182448662934)  # fmt: skip
HALF_COSINE = (0.999999953027512, -4.934792802489427, 4.058410790762133, -1.3318729727851486,
               0.21968242357146)  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """How SIRENs are fitted: `first_w0` and Adam's rate; a network is done when its mean squared
    error (on the space's own levels) is at most `goal`, or after `steps` steps."""

    first_w0: float = 30.0
    lr: float = 1e-3
    goal: float = 0.0
    steps: int = 1000


@dataclass(frozen=True)
class Fitted:
    """One network that is done: its number, its parameters in the order of the space, its error
    as the engine saw it, and the steps it took."""

    number: int
    flat: Tensor
    mse: float
    steps: int


def slots(space: Chain, device: str) -> int:
    """How many networks are fitted at a time: what stays in cache, or fills a CUDA device."""
    assert space.forward.image is not None
    _, height, width = space.forward.image
    numbers = max(space.widths) * height * width
    return max(4, min(64, CACHE // numbers)) if device == "cpu" else max(64, CUDA // numbers)


class Batch:
    """n SIRENs of one space, each fitted to its own image; row i of every buffer is network i.

    `space.forward.image` is the image. Numbers are `dtype`: float32, or float64 to be exact.
    """

    def __init__(
        self,
        space: Chain,
        fit: Fit,
        count: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        assert space.forward.image is not None
        self.space, self.fit, self.count = space, fit, count
        channels, *self.size = space.forward.image
        pixels, widths = math.prod(self.size), space.widths
        self.shapes = [(cols + 1, rows) for cols, rows in pairwise(widths)]  # of [W | b]^T
        sizes = [rows * cols for rows, cols in self.shapes]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.kind: dict[str, Any] = {"dtype": dtype, "device": device}
        hidden = len(sizes) - 1
        w0 = torch.tensor([fit.first_w0] + [space.forward.w0] * (hidden - 1) + [1.0], **self.kind)
        self.scale = w0.repeat_interleave(torch.tensor(sizes, device=device))
        self.turns = self.scale.clone()  # the same, where phases are counted in turns
        self.turns[self.starts[1] : self.starts[-1]] /= TURN
        self.flat, self.first, self.second, self.gradient = (
            torch.zeros(count, sum(sizes), **self.kind) for _ in range(4)
        )
        self.steps = torch.zeros(count, 1, dtype=torch.int64, device=device)
        self.target = torch.zeros(count, channels, pixels, **self.kind)
        # One row of ones below each layer's outputs is what its successor's biases multiply.
        self.outputs = [torch.ones(count, rows + 1, pixels, **self.kind) for rows in widths[1:-1]]
        self.dips = [torch.empty(count, rows, pixels, **self.kind) for rows in widths[2:-1]]
        self.scratch = torch.empty(2, count * max(widths[1:]) * pixels, **self.kind)
        row, column = (torch.linspace(-1, 1, side, **self.kind) for side in self.size)
        self.row, self.column = row, column
        self.exact = dtype == torch.float64 or device != "cpu"

    def load(self, rows: Tensor, flat: Tensor, target: Tensor) -> None:
        """Begin networks at these rows: flat (k, D) in the order of the space, target (k, c, h, w)
        on the space's levels."""
        at = rows.to(self.flat.device)
        pairs = self.space.matrices(self.space.unflatten(flat.to(**self.kind)))
        parts = [torch.cat([w[..., 0].mT, b[:, None]], dim=1).flatten(1) for w, b in pairs]
        self.flat[at] = torch.cat(parts, dim=1)
        self.first[at], self.second[at], self.steps[at] = 0.0, 0.0, 0
        self.target[at] = target.to(**self.kind).flatten(2) - self.space.forward.offset

    def parameters(self, rows: Tensor) -> Tensor:
        """(k, D) of these rows in the order of the space; a first layer of another w0 is
        rescaled, so that the space's one w0 holds for all."""
        chosen = self.flat[rows.to(self.flat.device)].cpu()
        chosen[:, : self.starts[1]] *= self.fit.first_w0 / self.space.forward.w0
        layers = [self._layer(chosen, i) for i in range(len(self.shapes))]
        pairs = [(layer[:, :-1].mT[..., None], layer[:, -1]) for layer in layers]
        return self.space.flatten(self.space.from_matrices(pairs))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone; the buffers of the others are no longer touched."""
        at = rows.to(self.flat.device)
        for name in ("flat", "first", "second", "steps", "target"):
            setattr(self, name, getattr(self, name)[at])
        self.gradient = self.gradient[: len(at)]
        self.count = len(at)

    def _layer(self, flat: Tensor, i: int) -> Tensor:
        """(n, in + 1, out), the transposed [W | b] of layer i, a view."""
        size = math.prod(self.shapes[i])
        return flat[:, self.starts[i] : self.starts[i] + size].unflatten(1, self.shapes[i])

    def _scratch(self, which: int, rows: int) -> Tensor:
        pixels = math.prod(self.size)
        return self.scratch[which][: self.count * rows * pixels].view(self.count, rows, pixels)

    def measure(self) -> Tensor:
        """Run all networks and leave their gradients in `gradient`: the mean squared errors (n,),
        of which it is the gradient."""
        n, last = self.count, len(self.shapes) - 1
        turns, weights = self.flat * self.turns, self.flat * self.scale
        fold = self._first_forward(self._layer(weights, 0))
        for i in range(1, last):
            phase = self._scratch(0, self.shapes[i][1])
            torch.bmm(self._layer(turns, i).mT, self.outputs[i - 1][:n], out=phase)
            self._waves(phase, self.outputs[i][:n, :-1], self.dips[i - 1][:n])
        error = torch.bmm(self._layer(weights, last).mT, self.outputs[last - 1][:n]) - self.target
        mse = error.square().mean((1, 2))
        self._backward(error.mul_(2 / error[0].numel()), weights, fold)
        self.gradient *= self.scale
        return mse

    def _backward(self, above: Tensor, weights: Tensor, fold: tuple[Tensor, ...]) -> None:
        """`above`: the gradient of the last layer's outputs (n, rows, pixels)."""
        for i in reversed(range(1, len(self.shapes))):
            inputs = self.outputs[i - 1][: self.count]
            torch.bmm(inputs, above.mT, out=self._layer(self.gradient, i))
            below = self._scratch(i % 2, self.shapes[i - 1][1])
            torch.bmm(self._layer(weights, i)[:, :-1], above, out=below)
            if i > 1:  # times the cosine
                below.addcmul_(below, self.dips[i - 2][: self.count], value=-0.5)
            above = below
        self._first_backward(above, fold)

    def _first_forward(self, layer: Tensor) -> tuple[Tensor, ...]:
        """The first layer's outputs, from waves along one column and one row of pixels; returns
        the waves, sine and cosine (n, neurons, height) and (n, neurons, width)."""
        down, across = (0, 1) if self.space.forward.axes == "ij" else (1, 0)
        row = layer[:, down, :, None] * self.row + layer[:, 2, :, None]
        column = layer[:, across, :, None] * self.column
        fold = row.sin(), row.cos(), column.sin(), column.cos()
        sine_r, cosine_r, sine_c, cosine_c = fold
        out = self.outputs[0][: self.count, :-1].unflatten(2, self.size)
        torch.mul(sine_r[..., None], cosine_c[..., None, :], out=out)
        out.addcmul_(cosine_r[..., None], sine_c[..., None, :])
        return fold

    def _first_backward(self, above: Tensor, fold: tuple[Tensor, ...]) -> None:
        """The gradient of the first layer: sums over pixels of above * cos(row + column) times
        row, column and 1, columns of pixels first."""
        sine_r, cosine_r, sine_c, cosine_c = fold
        lines = torch.stack([cosine_r, sine_r, cosine_r * self.row, sine_r * self.row], dim=2)
        pixels = above.view(-1, *self.size)
        sums = torch.bmm(lines.flatten(0, 1), pixels).view(*sine_c.shape[:2], 4, -1)
        plain = sums[:, :, 0] * cosine_c - sums[:, :, 1] * sine_c
        down, across = (0, 1) if self.space.forward.axes == "ij" else (1, 0)
        gradient = self._layer(self.gradient, 0)
        gradient[:, 2] = plain.sum(2)
        gradient[:, across] = plain @ self.column
        gradient[:, down] = (sums[:, :, 2] * cosine_c - sums[:, :, 3] * sine_c).sum(2)

    def _waves(self, turns: Tensor, sine: Tensor, dip: Tensor) -> None:
        """sin(TURN turns) and dip = 2 - 2 cos(TURN turns); `turns` is used up."""
        if self.exact:
            torch.sin(turns.mul_(TURN), out=sine)
            torch.cos(turns, out=dip)
            dip.mul_(-2).add_(2)
            return
        half = self._scratch(1, turns.shape[1])
        torch.round(turns, out=half)
        turns.sub_(half)
        torch.mul(turns, turns, out=dip)
        _polynomial(HALF_COSINE, dip, half)
        _polynomial(HALF_SINE, dip, sine)
        sine.mul_(turns)
        torch.mul(sine, sine, out=dip)
        sine.mul_(half)

    def step(self) -> None:
        """One step of Adam along `gradient`, each network at its own step."""
        self.steps += 1
        steps, gradient, (slow, slower) = self.steps.double(), self.gradient, BETAS
        self.first.lerp_(gradient, 1 - slow)
        self.second.mul_(slower).addcmul_(gradient, gradient, value=1 - slower)
        root = (1 - slower**steps).sqrt()
        rate = (-self.fit.lr * root / (1 - slow**steps)).to(self.flat.dtype)
        size = self.second.sqrt().add_((EPSILON * root).to(self.flat.dtype))
        self.flat.addcmul_(torch.div(self.first, size, out=size), rate)


def _polynomial(coefficients: tuple[float, ...], x: Tensor, out: Tensor) -> None:
    """Horner's rule, one pass over the numbers a coefficient."""
    *low, second, first = coefficients
    torch.add(torch.tensor(second), x, alpha=first, out=out)
    for c in reversed(low):
        torch.addcmul(torch.tensor(c), out, x, out=out)


def fitted(batch: Batch, starts: Iterable[tuple[int, Tensor, Tensor]]) -> Iterator[Fitted]:
    """Fit every (number, flat (D), target (c, h, w)); yields networks as they are done.

    A network that is done leaves at once, as it was when its error was measured, and the next one
    takes its row; once there is no next one the batch shrinks.
    """
    waiting = iter(starts)
    numbers = _refill(batch, list(range(batch.count)), [-1] * batch.count, waiting)
    while numbers:
        mse = batch.measure()
        done = ((mse <= batch.fit.goal) | (batch.steps[:, 0] >= batch.fit.steps)).cpu()
        rows = done.nonzero()[:, 0]
        if len(rows):
            values, steps = mse.cpu(), batch.steps[:, 0].cpu()
            for i, flat in zip(rows.tolist(), batch.parameters(rows), strict=True):
                yield Fitted(numbers[i], flat, float(values[i]), int(steps[i]))
        batch.step()
        if len(rows):
            numbers = _refill(batch, rows.tolist(), numbers, waiting)


def _refill(
    batch: Batch,
    free: list[int],
    numbers: list[int],
    waiting: Iterator[tuple[int, Tensor, Tensor]],
) -> list[int]:
    """Put the next networks into the free rows, drop the rows that stay free; the numbers of all
    rows."""
    new = [start for _, start in zip(free, waiting, strict=False)]
    taken, left = free[: len(new)], set(free[len(new) :])
    if new:
        entering, flats, targets = zip(*new, strict=True)
        batch.load(torch.tensor(taken), torch.stack(flats), torch.stack(targets))
        now = dict(zip(taken, entering, strict=True))
        numbers = [now.get(i, number) for i, number in enumerate(numbers)]
    if left:
        kept = [i for i in range(batch.count) if i not in left]
        batch.keep(torch.tensor(kept, dtype=torch.int64))
        numbers = [numbers[i] for i in kept]
    return numbers
