"""Small zoos on disk, made by code."""

import json
import os
from itertools import pairwise

import numpy as np
import pandas
import pyarrow
import torch
from pyarrow import parquet
from safetensors.torch import save_file
from torch import nn

from qemcli import spaces
from qemcli.zoos.sources import arch_id


def network(seed, widths=(3, 5, 4)):
    torch.manual_seed(seed)
    pairs = pairwise(widths)
    layers = [layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def flat_of(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def write_folder(root, count=6, activation="relu"):
    """`count` MLPs as safetensors in two folders; network i has test_accuracy i / 10."""
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (root / f"run{i % 2}").mkdir(exist_ok=True)
        said = {"activation": activation, "test_accuracy": str(i / 10), "config.lr": "0.01"}
        save_file(network(i).state_dict(), root / f"run{i % 2}" / f"n{i}.safetensors", said)
    return root


def write_broken(root):
    """One of each kind of bad file; returns how many."""
    good = (root / "run0" / "n0.safetensors").read_bytes()
    (root / "cut.safetensors").write_bytes(good[:-3])
    (root / "page.pt").write_bytes(b"<!DOCTYPE html><html></html>" * 3)
    (root / "pointer.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (root / "empty.npz").write_bytes(b"")
    os.mkfifo(root / "pipe.pt")
    (root / "outside.safetensors").symlink_to("/etc/hostname")
    (root / "loop.safetensors").symlink_to("loop.safetensors")
    save_file({"a": torch.zeros(4, 4)}, root / "predictor.safetensors", {"qem.kind": "predictor"})
    (root / "README.md").write_text("no checkpoint")
    return 8


def write_own(root, count=7):
    """Our own layout: small CNNs in two shards, relu and tanh, two splits; returns the weights."""
    space = spaces.cnn([1, 3, 4], 5)
    arch = arch_id(space)
    weights = torch.randn(count, space.size, generator=torch.Generator().manual_seed(0))
    (root / "weights" / arch).mkdir(parents=True)
    shard = np.arange(count) // 4
    for i in range(2):
        file = root / "weights" / arch / f"shard-{i:05d}.safetensors"
        rows = weights[torch.from_numpy(shard == i)].clone()
        save_file({"weights": rows}, file, {"qem.space": space.to_json()})
    table = pandas.DataFrame(
        {
            "uid": range(count),
            "checkpoint": [f"run-{i:05d}/step-00100" for i in range(count)],
            "arch": arch,
            "shard": [f"weights/{arch}/shard-{s:05d}.safetensors" for s in shard],
            "row": np.arange(count) % 4,
            "activation": ["relu" if i % 3 else "tanh" for i in range(count)],
            "split": ["train" if i < 5 else "test" for i in range(count)],
            "config.lr": np.arange(count) / 10,
            "test_accuracy": np.linspace(0.1, 0.9, count),
            "stat.fc.bias.mean": 0.0,
        }
    )
    write_index(root, table, {arch: space.to_json()})
    (root / "zoo.json").write_text(json.dumps({"format": "qem-zoo", "version": 1, "name": "tiny"}))
    return weights


def write_index(root, table, spaces_, version=1):
    arrow = pyarrow.Table.from_pandas(table, preserve_index=False)
    stated = json.dumps({"version": version, "spaces": spaces_, "source": "test"})
    parquet.write_table(
        arrow.replace_schema_metadata({b"qem.index": stated}), root / "index.parquet"
    )
