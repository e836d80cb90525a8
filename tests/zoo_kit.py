"""A small labelled zoo on disk, for tests that need one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from qemcli.spaces import Chain
from qemcli.zoos.store import Store


def write_zoo(
    folder: Path, space: Chain, flat: Tensor, seed: int = 0, **columns: np.ndarray
) -> Path:
    """The networks as a zoo of our layout, with labels that the weights determine, split 60/20/20,
    and more columns."""
    rng = np.random.default_rng(seed)
    size = flat.abs().mean(1).numpy()
    rank = size.argsort().argsort() / max(1, len(size) - 1)
    label = np.clip(0.1 + 0.8 * rank + 0.02 * rng.normal(size=len(rank)), 0, 1)
    side = np.array(["train", "val", "test"])[
        np.digitize(rng.permutation(len(rank)) / len(rank), [0.6, 0.8])
    ]
    rows = [
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
        for i in range(len(flat))
    ]
    store = Store(folder)
    store.write(0, space, flat.numpy(), rows)
    store.finish(1, {"name": folder.name, "licence": "cc0-1.0"})
    return folder
