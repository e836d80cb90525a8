"""Indexing against the loop a user would write: safetensors' load_file and torch's statistics.

CPU seconds of one thread, so that other work on the machine does not show.
"""

import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qemcli.zoos.indexing import index

FILES = 4000
SHAPES = {"conv1": (16, 1, 3, 3), "conv2": (16, 16, 3, 3), "conv3": (16, 16, 3, 3), "fc": (10, 16)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("zoo")
    generator = torch.Generator().manual_seed(0)
    for i in range(FILES):
        state = {}
        for name, shape in SHAPES.items():
            state[f"{name}.weight"] = torch.randn(shape, generator=generator)
            state[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
        (root / f"{i // 100:03d}").mkdir(exist_ok=True)
        save_file(state, root / f"{i // 100:03d}" / f"{i:05d}.safetensors")
    return root


def naive(root, limit):
    quantiles = torch.tensor([0, 0.25, 0.5, 0.75, 1])
    for file in sorted(root.rglob("*.safetensors"))[:limit]:
        for tensor in load_file(file).values():
            flat = tensor.flatten()
            yield flat.mean(), flat.var(correction=0), torch.quantile(flat, quantiles)


def rate(work, count):
    start = time.process_time()
    work()
    return count / (time.process_time() - start)


@pytest.mark.bench
def test_index_is_twenty_times_the_naive_loop(folder, tmp_path):
    loops, ours, headers = [], [], []
    index(folder, out=tmp_path / "warm")
    for turn in range(3):
        loops.append(rate(lambda: list(naive(folder, 400)), 400))
        out = tmp_path / str(turn)
        ours.append(rate(lambda out=out: index(folder, out=out), FILES))
        headers.append(rate(lambda out=out: index(folder, out=out, update=True), FILES))
    loop, own, again = np.median(loops), np.median(ours), np.median(headers)
    said = f"naive {loop:.0f}/s, index {own:.0f}/s ({own / loop:.1f}x), --update {again:.0f}/s"
    sys.stderr.write(f"\n{said}\n")
    assert own > 20 * loop, said
