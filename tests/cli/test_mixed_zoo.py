"""A zoo of chains and of networks with residual sums, through the commands that are for both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qemcli.spaces import Chain, Layered, Residual, cnn, residual
from qemcli.zoos.store import Store
from qemcli.zoos.zoo import Zoo

SUMS = residual(cnn([1, 4, 3, 4], 3), (-1, -1, 0, -1))
CHAINED = cnn([1, 5, 4], 3)


def flat_of(space: Layered, count: int) -> torch.Tensor:
    return 0.5 * torch.randn(count, space.size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = Store(tmp_path / "zoo")
    for block, space in enumerate((SUMS, CHAINED)):
        rows = [{"checkpoint": f"net-{block}-{i}", "test_accuracy": i / 4} for i in range(4)]
        store.write(block, space, flat_of(space, 4).numpy(), rows)
    store.finish(2, {"name": "both"})
    return tmp_path / "zoo"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "one.safetensors"
    w = {k: v[0].contiguous() for k, v in SUMS.unflatten(flat_of(SUMS, 1)).items()}
    save_file(w, path, metadata={"qem.space": SUMS.to_json()})
    return path


def test_inspect_names_the_sums(run: Callable, checkpoint: Path) -> None:
    record = run("inspect", checkpoint, "--json").json
    assert record["sums"] == "1 to 3"
    assert record["groups"] == ["monomial", "permutation", "scale"]
    assert record["tensors"]["conv3.weight"]["axes"] == "h1 h2* u v"
    assert record["coverage"] == 1


def test_function_is_kept_along_the_orbit(run: Callable, checkpoint: Path) -> None:
    ran = run("verify-invariance", checkpoint, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["verdict"] == "holds"


def test_copies_of_both_kinds_are_proven(run: Callable, folder: Path, tmp_path: Path) -> None:
    ran = run("augment", folder, "--group", "monomial", "--out", tmp_path / "copies")
    assert ran.code == 0, ran.err
    zoo = Zoo.open(tmp_path / "copies")
    assert {type(space) for space, _ in zoo.groups()} == {Chain, Residual}
    assert zoo.index["function_error_float64"].max() < 1e-13
    assert zoo.index["function_error"].max() < 1e-5


def test_index_keeps_both_spaces(run: Callable, folder: Path, tmp_path: Path) -> None:
    assert run("index", folder, "--out", tmp_path / "index").code == 0
    pair = [Zoo.open(path) for path in (folder, tmp_path / "index")]
    found = [{space.to_json(): positions.tolist() for space, positions in z.groups()} for z in pair]
    assert found[0] == found[1]
    for (_, mine, _), (_, theirs, _) in zip(*(z.load() for z in pair), strict=True):
        assert torch.equal(mine, theirs)


def test_canonical_forms_of_both_kinds_are_proven(
    run: Callable, folder: Path, tmp_path: Path
) -> None:
    ran = run("canonicalize", folder, "--out", tmp_path / "canonical")
    assert ran.code == 0, ran.err
    zoo = Zoo.open(tmp_path / "canonical")
    assert zoo.index["function_error_float64"].max() < 1e-13
    for space, flat, _ in zoo.load():
        first = space.unflatten(flat)["conv1.bias"]
        assert (first.diff(dim=1) > 0).all()  # in the order of their biases
