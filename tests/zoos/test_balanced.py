"""Balanced representatives beside an index: computed once, handed out for their networks only."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qemcli import balance as balancing
from qemcli.balance import balance
from qemcli.zoos.balanced import FOLDER, keep, read
from qemcli.zoos.indexing import index
from qemcli.zoos.zoo import Zoo

ZOO = Path(__file__).parents[2] / "zoos" / "cnn-heldout"


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    index(ZOO, out=folder)
    assert keep(Zoo.open(folder), folder / FOLDER) == 200
    return folder


def test_kept_representatives_are_those_that_are_computed(kept: Path) -> None:
    ((space, flat, positions),) = Zoo.open(kept).where("test_accuracy > 0.5").load()
    zoo = Zoo.open(kept).where("test_accuracy > 0.5")
    found = zoo.balanced(positions[::-1])
    wanted = space.flatten(balance(space, space.unflatten(flat))[0]).flip(0)
    assert 0 < len(wanted) < 200
    assert torch.equal(found, wanted)
    assert not torch.equal(found, flat.flip(0))


def test_nothing_is_computed_again(kept: Path, run, monkeypatch) -> None:
    first = run("predict", kept, "--limit", "20", "--json")

    def never(*args: object) -> None:
        raise AssertionError("balanced again")

    monkeypatch.setattr(balancing, "balance", never)
    assert run("predict", kept, "--limit", "20", "--json").json == first.json
    times = [file.stat().st_mtime_ns for file in kept.rglob("shard-*")]
    keep(Zoo.open(kept), kept / FOLDER)
    assert times == [file.stat().st_mtime_ns for file in kept.rglob("shard-*")]


def test_another_network_under_the_same_number_is_not_handed_out(kept: Path) -> None:
    zoo = Zoo.open(kept)
    table = zoo.index.iloc[:5]
    assert read(kept / FOLDER, table) is not None
    swapped = table.assign(sha256=table["sha256"].to_numpy()[[1, 0, 2, 3, 4]])
    assert read(kept / FOLDER, swapped) is None
    assert read(kept / FOLDER, table.assign(uid=table["uid"] + 10_000)) is None


def test_a_changed_zoo_is_balanced_again(kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "copy")
    zoo = Zoo.open(kept)
    changed = zoo.index.assign(uid=np.roll(zoo.index["uid"].to_numpy(), 3))
    again = replace(zoo, index=changed, path=tmp_path / "copy" / "index.parquet")
    assert again.balanced(np.arange(200)) is None
    keep(again, tmp_path / "copy" / FOLDER)
    assert again.balanced(np.arange(200)) is not None


def test_a_damaged_shard_is_computed_again(kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "copy")
    zoo = replace(Zoo.open(kept), path=tmp_path / "copy" / "index.parquet")
    wanted = zoo.balanced(np.arange(200))
    (shard,) = (tmp_path / "copy").rglob("shard-*")
    shard.write_bytes(shard.read_bytes()[:5000])
    assert zoo.balanced(np.arange(200)) is None
    keep(zoo, tmp_path / "copy" / FOLDER)
    assert torch.equal(zoo.balanced(np.arange(200)), wanted)


def test_command_keeps_them(run, tmp_path: Path) -> None:
    found = run("index", ZOO, "--out", tmp_path, "--balanced", "--json")
    assert found.json["balanced"] == 200
    assert Zoo.open(tmp_path).balanced(np.arange(3)).shape == (3, 4970)
