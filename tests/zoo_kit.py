"""A small labelled zoo on disk, for tests that need one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qemcli.spaces import Chain, WeightSpace, cnn, mlp, residual
from qemcli.zoos.store import Store


def write_zoo(
    folder: Path, space: Chain, flat: Tensor, seed: int = 0, **columns: np.ndarray
) -> Path:
    """The networks as a zoo of our layout, with labels that the weights determine, split 60/20/20,
    and more columns."""
    rows = _rows(flat.abs().mean(1).numpy(), seed, columns)
    store = Store(folder)
    store.write(0, space, flat.numpy(), rows)
    store.finish(1, {"name": folder.name, "licence": "cc0-1.0"})
    return folder


def mixed_spaces() -> list[WeightSpace]:
    """Networks of distinct depths, widths, kernels, activations, one of them with a sum."""
    return [
        cnn([1, 3, 4], 3),
        cnn([1, 5, 4, 3], 3, kernel=2, activation="tanh"),
        cnn([1, 4], 3, positions=64),
        residual(cnn([1, 4, 3, 4], 3), [-1, -1, 0, -1]),
        mlp([4, 6, 5, 3]),
    ]


def mixed_flats(spaces: Sequence[WeightSpace], count: int, seed: int = 1) -> list[Tensor]:
    """`count` networks of each, of sizes drawn from one range."""
    rng = torch.Generator().manual_seed(seed)
    sizes = [0.1 + torch.rand(count, 1, generator=rng) for _ in spaces]
    pairs = zip(sizes, spaces, strict=True)
    return [size * torch.randn(count, space.size, generator=rng) for size, space in pairs]


def write_mixed(
    folder: Path, spaces: Sequence[WeightSpace] = (), count: int = 16, seed: int = 0
) -> Path:
    """As `write_zoo`, of networks of many architectures, `count` of each."""
    spaces = list(spaces) or mixed_spaces()
    flats = mixed_flats(spaces, count)
    rows = _rows(np.concatenate([f.abs().mean(1).numpy() for f in flats]), seed, {})
    store = Store(folder)
    for i, (space, flat) in enumerate(zip(spaces, flats, strict=True)):
        store.write(i, space, flat.numpy(), rows[i * count : (i + 1) * count])
    store.finish(len(spaces), {"name": folder.name, "licence": "cc0-1.0"})
    return folder


def _rows(size: np.ndarray, seed: int, columns: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rank = size.argsort().argsort() / max(1, len(size) - 1)
    label = np.clip(0.1 + 0.8 * rank + 0.02 * rng.normal(size=len(rank)), 0, 1)
    side = np.array(["train", "val", "test"])[
        np.digitize(rng.permutation(len(rank)) / len(rank), [0.6, 0.8])
    ]
    return [
        {
            "checkpoint": f"run-{i:03d}/step-00001",
            "run": f"run-{i:03d}",
            "step": 1,
            "final": True,
            "split": str(side[i]),
            "test_accuracy": float(label[i]),
            "config.lr": 0.01 * (i + 1),
            **{name: values[i] for name, values in columns.items()},
        }
        for i in range(len(size))
    ]
