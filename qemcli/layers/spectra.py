"""Spectra of weight matrices: seven statistics of each, as WeightWatcher takes them, a batch of
networks at once.

Martin, Peng and Mahoney, arXiv:2002.06716 (alpha-hat); Martin and Mahoney, arXiv:1810.01075 (soft
and stable rank, entropy); Clauset, Shalizi and Newman, arXiv:0706.1062 (the power law). A matrix is
rows x columns, N = max and M = min of them; a convolution is one such matrix a tap, whose spectra
are pooled and halved, as WeightWatcher 0.7 does by default. l_1 <= ... <= l_n are the squared
singular values.

    norm        log10 sum l               (of the squared Frobenius norm)
    spectral    log10 l_n                 (of the squared spectral norm)
    stable      sum l / l_n
    alpha       1 + t / sum_{l >= x} log(l / x) over the t values from x on; x = the value whose
                tail is nearest to its power law (Kolmogorov-Smirnov)
    alpha_hat   alpha log10 l_n
    entropy     - sum p log p / log rank,   p = l / sum l
    soft        mean(l) (1 + sqrt(M / N))^2 / l_n   (the edge of Marchenko-Pastur at the variance of
                the entries; WeightWatcher fits that variance to a density estimate instead)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qemcli.spaces import WeightSpace

STATISTICS = ("norm", "spectral", "stable", "alpha", "alpha_hat", "entropy", "soft")
STEEPEST = 100.0  # of exponents: those of near ties are as large as rounding makes them
FLOOR = 1e-30  # the logarithm of a matrix of zeros is that of this
POOLED = 5 * len(STATISTICS) + 2
AT_ONCE = 1 << 17  # numbers of one table of the power law's fit
EPS = torch.finfo(torch.float32).eps  # what zoos are stored in, whatever they are computed in


class Spectrum(NamedTuple):
    """Eigenvalues (b, n) of W^T W in float64, ascending and 0 below the rank; the matrix's N and
    M."""

    values: Tensor
    large: int
    small: int


def matrices(space: WeightSpace) -> list[str]:
    """The tensors that are matrices or convolutions, in the order of the space."""
    return [t.name for t in space.tensors if len(_shape(t.shape)) >= 2]


def _shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without axes of one that are no kernel's: (1, positions, width) is a matrix."""
    return shape if len(shape) == 4 else tuple(n for n in shape if n > 1 or len(shape) == 2)


def spectrum(x: Tensor) -> Spectrum:
    """(b, rows, columns, *taps) -> the squared singular values of all taps.

    Those below (N eps32)^2 of the largest are 0: of a matrix in float32 they are rounding.
    """
    taps = x.double().flatten(3).movedim(3, 1) if x.ndim > 3 else x.double()[:, None]
    if taps.shape[-2] < taps.shape[-1]:
        taps = taps.mT
    large, small = int(taps.shape[-2]), int(taps.shape[-1])
    values = torch.linalg.svdvals(taps).square().flatten(1).sort(-1).values
    if x.ndim > 3:
        values = values / 2
    rank = values > values[:, -1:] * (large * EPS) ** 2
    return Spectrum(torch.where(rank, values, 0.0), large, small)


def statistics(x: Tensor) -> Tensor:
    """(b, rows, columns, *taps) -> (b, 7) in float64, in the order of STATISTICS."""
    found = spectrum(x)
    values, total = found.values, found.values.sum(-1)
    top = values[:, -1].clamp(min=FLOOR)
    spectral = top.log10()
    alpha = power_law(values)
    p = values / total.clamp(min=FLOOR)[:, None]
    rank = (values > 0).sum(-1)
    spread = -(p * p.clamp(min=FLOOR).log()).sum(-1) / rank.clamp(min=2).double().log()
    edge = values.mean(-1) * (1 + math.sqrt(found.small / found.large)) ** 2
    norm = total.clamp(min=FLOOR).log10()
    told = (norm, spectral, total / top, alpha, alpha * spectral, spread, edge / top)
    return torch.stack(told, dim=-1)


def power_law(values: Tensor) -> Tensor:
    """(b, n) ascending, zeros first -> (b,): the exponent of the density's tail, by maximum
    likelihood from the value on that makes the largest gap of the distributions smallest.

    The empirical distribution at the j-th of t values is (j - 1) / t, and a tail has two values at
    least, as in the packages powerlaw and weightwatcher. Values that are all but the same, whose
    exponent would be above STEEPEST, are no tail; 0 where there is none.
    """
    rows = max(1, AT_ONCE // values.shape[-1] ** 2)
    return torch.cat([_fitted(part) for part in values.split(rows)])


def _fitted(values: Tensor) -> Tensor:
    n = values.shape[-1]
    logs = values.clamp(min=FLOOR).log()
    tail = torch.arange(n, 0, -1, dtype=values.dtype, device=values.device)
    above = logs.flip(-1).cumsum(-1).flip(-1) - tail * logs  # sum of log(l / x) over l >= x
    usable = (values > 0) & (tail >= 2) & (above * (STEEPEST - 1) > tail)
    slope = torch.where(usable, tail / above, 1.0)  # alpha - 1
    place = torch.arange(n, dtype=values.dtype, device=values.device)
    survival = 1 - (place[None, :] - place[:, None]) / tail[:, None]  # (from, at)
    table = torch.addcmul((slope * logs)[:, :, None], slope[:, :, None], logs[:, None, :], value=-1)
    gap = table.clamp_(max=0).exp_().sub_(survival).abs_().triu_().amax(-1)
    best = torch.where(usable, gap, math.inf).argmin(-1, keepdim=True)
    return torch.where(usable.any(-1), 1 + slope.gather(-1, best)[:, 0], 0.0)


def spectral_statistics(space: WeightSpace, w: Mapping[str, Tensor]) -> Tensor:
    """dict of (b, *shape) -> (b, T, 7) in float64, the seven of each of the T matrices."""
    found = []
    for name in matrices(space):
        shape = _shape(space[name].shape)
        found.append(statistics(w[name].reshape(-1, *shape)))
    return torch.stack(found, dim=1)


def pooled(space: WeightSpace, w: Mapping[str, Tensor]) -> Tensor:
    """dict of (b, *shape) -> (b, POOLED) in float64, whatever the depth and the widths: the seven
    of the first matrix, of the last, their mean over all (WeightWatcher's summary), least and
    largest, and the logarithms of the numbers of matrices and of parameters."""
    found = spectral_statistics(space, w)
    parts = [found[:, 0], found[:, -1], found.mean(1), found.amin(1), found.amax(1)]
    told = [math.log(found.shape[1]), math.log(space.size)]
    return torch.cat([*parts, found.new_tensor(told).expand(len(found), -1)], dim=-1)
