"""Checkpoint directories of the transformers library: single, sharded, damaged; alone and in a
zoo."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_kit import GPT2, LLAMA, gpt2, llama, write

from qemcli.checkpoints import open_checkpoint
from qemcli.errors import InputError, UsageError
from qemcli.spaces import Transformer
from qemcli.zoos.indexing import index
from qemcli.zoos.zoo import Zoo

FORMS = ("model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_read_from_its_file(form: str, shards: int, tmp_path: Path) -> None:
    tensors = gpt2()
    checkpoint = open_checkpoint(write(tmp_path, tensors, GPT2, shards, form))
    space = checkpoint.space()
    assert isinstance(space, Transformer)
    found = checkpoint.tensors()
    assert set(found) == set(tensors) == set(space.names)
    assert all(np.array_equal(found[n], x.numpy()) for n, x in tensors.items())
    flat = torch.cat([tensors[n].flatten() for n in space.names])
    assert np.array_equal(checkpoint.row(space), flat.numpy())
    assert checkpoint.coverage(space) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_and_double_precision_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {n: x.to(dtype) for n, x in llama().items()}
    checkpoint = open_checkpoint(write(tmp_path, tensors, LLAMA))
    found = checkpoint.tensors(checkpoint.space().names)
    assert all(np.array_equal(found[n], x.double().numpy()) for n, x in tensors.items())


def missing(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def cut(folder: Path) -> None:
    file = folder / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def foreign(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    record = json.loads(file.read_text())
    record["weight_map"]["wte"] = "../outside.safetensors"
    file.write_text(json.dumps(record))


def unnamed(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    record = json.loads(file.read_text())
    record["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    file.write_text(json.dumps(record))


def page(folder: Path) -> None:
    (folder / "config.json").write_text("<html>")


def weightless(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


DAMAGES = {
    missing: "the shard 'model-00002-of-00003.safetensors' is missing",
    cut: "'model-00003-of-00003.safetensors': cut short: needs",
    foreign: "says that 'wte' lies in '../outside.safetensors'",
    unnamed: "has no tensor 'ghost', which its index names",
    page: "config.json is not JSON",
    weightless: "config.json without weights",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_directory_is_one_clear_line(damage, tmp_path: Path) -> None:
    folder = write(tmp_path / "bad", gpt2(), GPT2, 3)
    damage(folder)
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder).space()
    assert DAMAGES[damage] in caught.value.message
    assert caught.value.message.startswith(f"{folder}: ")
    assert "\n" not in caught.value.message


def test_a_zoo_of_directories_counts_the_bad_ones(tmp_path: Path) -> None:
    for i in range(2):
        write(tmp_path / f"good-{i}", gpt2(seed=i), GPT2, 1 + 2 * i)
    for damage in DAMAGES:
        damage(write(tmp_path / f"bad-{damage.__name__}", gpt2(), GPT2, 3))
    contradiction = write(tmp_path / "liar", gpt2(), {**GPT2, "n_layer": 7})
    summary = index(tmp_path)
    assert summary["checkpoints"] == 3
    assert {f["checkpoint"] for f in summary["failed"]} == {f"bad-{d.__name__}" for d in DAMAGES}
    assert summary["only_listed"] == {"config.json says 7 blocks, the tensors have 2": 1}
    shutil.rmtree(contradiction)
    zoo = Zoo.open(tmp_path).where("checkpoint != 'liar'")
    (space, flat, _), *rest = zoo.load()
    assert not rest
    assert isinstance(space, Transformer)
    tensors = gpt2(seed=1)
    assert torch.equal(flat[1], torch.cat([tensors[n].flatten() for n in space.names]))


def test_a_run_with_checkpoints_inside_is_one_checkpoint_each(tmp_path: Path) -> None:
    run = write(tmp_path / "run", gpt2(seed=0), GPT2)
    write(run / "checkpoint-50", gpt2(seed=1), GPT2, 2)
    torch.save({"state": 1}, run / "checkpoint-50" / "optimizer.pt")
    (run / "onnx").mkdir()
    torch.save({"w": torch.ones(2, 2)}, run / "onnx" / "other.pt")
    found = Zoo.open(tmp_path)
    assert found.index["checkpoint"].tolist() == ["run", "run/checkpoint-50"]
    assert not found.failures
    alone = Zoo.open(run)
    assert alone.index["checkpoint"].tolist() == [".", "checkpoint-50"]


def test_update_reads_only_directories_that_changed(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"m-{i}", gpt2(seed=i), GPT2, 2)
    first = index(tmp_path)
    write(tmp_path / "m-1", gpt2(seed=9), GPT2, 2)
    from qemcli.zoos.indexing import planned

    assert planned(tmp_path, update=True).summary()["to_read"] == 1
    assert index(tmp_path, update=True)["checkpoints"] == first["checkpoints"] == 3


def test_a_link_that_leaves_the_zoo_is_not_followed(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", gpt2(), GPT2)
    zoo = tmp_path / "zoo"
    write(zoo / "good", gpt2(), GPT2)
    (zoo / "bad").mkdir()
    for name in ("config.json", "model.safetensors"):
        (zoo / "bad" / name).symlink_to(outside / name)
    found = Zoo.open(zoo)
    assert found.index["checkpoint"].tolist() == ["good"]
    assert found.failures == [
        {"checkpoint": "bad", "reason": "a link that leaves the folder is not followed"}
    ]


def test_an_ordinary_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"lr": 0.1}')
    torch.save({"0.weight": torch.ones(3, 2), "0.bias": torch.ones(3)}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match="a directory, not a checkpoint"):
        open_checkpoint(tmp_path)
    assert Zoo.open(tmp_path).index["checkpoint"].tolist() == ["a.pt"]


def test_inspect_and_index_take_the_heads(run, tmp_path: Path) -> None:
    folder = write(tmp_path / "zoo" / "bare", gpt2())
    refused = run("inspect", folder / "model.safetensors")
    assert (refused.code, refused.out) == (3, "")
    assert "--heads" in refused.err
    told = run("inspect", folder / "model.safetensors", "--heads", 3, "--json")
    assert told.json["family"] == "gpt2"
    assert told.json["tensors"]["transformer.wpe.weight"]["axes"] == "t r"
    assert run("index", tmp_path / "zoo", "--heads", 3, "--json").code == 0
    (space, _, _), *_ = Zoo.open(tmp_path / "zoo").load()
    assert isinstance(space, Transformer)
    assert space.heads[0] == (3, 1, 4, 4)
