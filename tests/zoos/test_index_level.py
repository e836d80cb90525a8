"""Zoos that are read at index level: NWS, weights2weights, LoRA-WiSE, and archives of anything."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import save
from zoo_files import flat_of, network

from qemcli.errors import InputError
from qemcli.spaces import Chain, Opaque
from qemcli.zoos.indexing import index
from qemcli.zoos.zoo import Zoo


def rows_of(zoo):
    """checkpoint -> flat weights."""
    found = {}
    for _, flat, positions in zoo.load():
        for row, name in zip(flat, zoo.index["checkpoint"].iloc[positions], strict=True):
            found[name] = row
    return found


def assert_index_agrees(path, out):
    """The index of a zoo reads the same weights; returns its table."""
    summary = index(path, out=out)
    own, again = rows_of(Zoo.open(path)), rows_of(Zoo.open(out))
    assert own.keys() == again.keys()
    assert all(torch.equal(own[name], again[name]) for name in own)
    return summary


def nws(root):
    """Two runs of two snapshots; the first run's test errors are 90, 80, ..., 0 percent."""
    steps = np.arange(10.0)
    errors = np.stack([steps, 50 - steps, 60 - steps, 90 - 10 * steps, steps], axis=1)
    for k in range(2):
        run = root / "nws_main" / f"run{k}"
        (run / "weights").mkdir(parents=True)
        for m in (1, 20):
            (np.arange(30.0 + k) + m).astype("<f8").tofile(run / "weights" / f"{m:03d}.bin")
        errors.astype("<f8").tofile(run / "error.bin")
        np.zeros(4).tofile(run / "stat.bin")
    (root / "nws_main" / "run1" / "weights" / "007.bin").write_bytes(b"seven b")
    head = "dataset, lrate, optimizer, activation, path, weightn_conv, weightn_fc\n"
    (root / "nws_main_train.csv").write_text(head + "mnist, 0.1, 2, 3, main/run0, 20, 10\n")
    (root / "nws_main_test.csv").write_text(head + "svhn, 0.2, 0, 0, main/run1, 20, 11\n")
    return root


def test_nws_snapshots_are_listed_with_their_errors(tmp_path):
    root = nws(tmp_path / "nws")
    zoo = Zoo.open(root)
    assert (zoo.layout, len(zoo)) == ("nws", 4)
    assert [f["reason"] for f in zoo.failures] == ["7 bytes are no float64 numbers"]
    table = zoo.index
    np.testing.assert_allclose(table["test_accuracy"], [0.1, 1.0, 0.1, 1.0])
    np.testing.assert_allclose(table["train_accuracy"], [0.5, 0.59, 0.5, 0.59])
    assert table["split"].tolist() == ["train", "train", "test", "test"]
    assert table["config.activation"].tolist()[::2] == ["tanh", "relu"]
    assert table["config.optimizer"].tolist()[::2] == ["momentum", "adam"]
    assert all(isinstance(space, Opaque) for space in zoo.spaces.values())
    found = rows_of(zoo)
    assert torch.equal(found["nws_main/run1/weights/020.bin"], torch.arange(31.0) + 20)
    assert assert_index_agrees(root, tmp_path / "out")["checkpoints"] == 4


def test_nws_snapshot_of_another_size_than_the_table_says_is_named(tmp_path):
    root = nws(tmp_path / "nws")
    (root / "nws_main" / "run0" / "weights" / "001.bin").write_bytes(bytes(8 * 29))
    zoo = Zoo.open(root)
    assert len(zoo) == 3
    assert any("29 numbers, the table says 30" in f["reason"] for f in zoo.failures)


def test_weights2weights_is_mapped_row_by_row(tmp_path):
    folder = tmp_path / "weights_datasets" / "identities"
    folder.mkdir(parents=True)
    weights = torch.arange(5 * 12.0).reshape(5, 12)
    torch.save(weights, folder / "all_weights.pt")
    (folder / "identity_df.pt").write_bytes(pickle.dumps({"never": "opened"}))
    shapes = {"unet.to_q.lora_down": torch.Size([2, 4]), "unet.to_q.lora_up": torch.Size([4, 1])}
    torch.save(shapes, folder / "weight_dimensions.pt")
    for given in (tmp_path, folder, folder / "all_weights.pt"):
        zoo = Zoo.open(given)
        assert (zoo.layout, len(zoo)) == ("tensor_matrix", 5)
        (space,) = zoo.spaces.values()
        assert space.shapes == {n: tuple(s) for n, s in shapes.items()}
        assert torch.equal(rows_of(zoo)["row-000003"], weights[3])
    assert assert_index_agrees(tmp_path, tmp_path / "out")["checkpoints"] == 5
    torch.save({**shapes, "more": torch.Size([3])}, folder / "weight_dimensions.pt")
    with pytest.raises(InputError, match="15 numbers, a row has 12"):
        Zoo.open(tmp_path)


def test_lora_wise_is_read_by_columns(tmp_path):
    rng = np.random.default_rng(0)
    down, up = "unet.to_q.lora.down.weight", "unet.to_q.lora.up.weight"
    tensors = [(rng.normal(size=(2, 4)).astype("f4"), rng.normal(size=(4, 2)).astype("f4"))
               for _ in range(4)]  # fmt: skip
    for part, chosen in (("train", tensors[:3]), ("test", tensors[3:])):
        pandas.DataFrame(
            {
                "name": [f"m{i}" for i in range(len(chosen))], "label": [1, 10, 100][: len(chosen)],
                down: [a.tolist() for a, _ in chosen], up: [b.tolist() for _, b in chosen],
            }
        ).to_parquet(tmp_path / f"{part}-00000-of-00001.parquet")  # fmt: skip
    zoo = Zoo.open(tmp_path)
    assert (zoo.layout, len(zoo)) == ("lora_parquet", 4)
    assert zoo.index["split"].tolist() == ["test", "train", "train", "train"]
    assert zoo.index["label"].tolist() == [1, 1, 10, 100]
    (space,) = zoo.spaces.values()
    assert space.shapes == {down: (2, 4), up: (4, 2)}
    found = rows_of(zoo)["train-00000-of-00001.parquet:m2"]
    expected = np.concatenate([t.ravel() for t in tensors[2]])
    np.testing.assert_array_equal(found.numpy(), expected)
    assert assert_index_agrees(tmp_path, tmp_path / "out")["checkpoints"] == 4


def test_sane_samples_are_tokens_and_claim_nothing(tmp_path):
    tokens = torch.arange(6 * 4.0).reshape(6, 4)
    for part, i in (("train", 0), ("train", 1), ("test", 0)):
        folder = tmp_path / f"dataset_torch.{part}"
        folder.mkdir(exist_ok=True)
        sample = {"w": tokens + i, "m": torch.ones(6, 4, dtype=torch.bool),
                  "p": torch.zeros(6, 3, dtype=torch.int16), "test_acc": 0.5}  # fmt: skip
        torch.save(sample, folder / f"sample_{i}.pt")
    (tmp_path / "dataset.pt").write_bytes(pickle.dumps({"never": "opened"}))
    zoo = Zoo.open(tmp_path)
    assert (zoo.layout, len(zoo), zoo.failures) == ("sane", 3, [])
    assert zoo.index["split"].tolist() == ["test", "train", "train"]
    assert zoo.index["test_accuracy"].tolist() == [0.5] * 3
    assert isinstance(next(iter(zoo.spaces.values())), Opaque)
    assert "never opened" in zoo.record["left_out"][0]["reason"]
    found = rows_of(zoo)["dataset_torch.train/sample_1.pt"]
    assert torch.equal(found, tokens.flatten() + 1)
    assert len(Zoo.open(tmp_path / "dataset_torch.train")) == 2
    assert assert_index_agrees(tmp_path, tmp_path / "out")["checkpoints"] == 3


def test_archive_of_anything_is_a_zoo(tmp_path, monkeypatch):
    monkeypatch.setenv("QEM_CACHE", str(tmp_path / "cache"))
    out = io.BytesIO()
    torch.save(network(1).state_dict(), out)
    files = {
        "sweep/a.safetensors": save(network(0).state_dict(), {"test_accuracy": "0.5"}),
        "sweep/b.pt": out.getvalue(),
        "sweep/adapter.safetensors": save({"to_q.lora.down.weight": torch.ones(2, 3)}),
        "sweep/bad.pt": b"nothing",
        "sweep/readme.md": b"text",
        "../outside.pt": out.getvalue(),
    }
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    for kind in ("tar", "tar.gz"):
        mode = "w:" + kind.partition(".")[2]
        with tarfile.open(tmp_path / f"z.{kind}", mode) as archive:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    for name in ("z.zip", "z.tar", "z.tar.gz"):
        zoo = Zoo.open(tmp_path / name)
        assert (zoo.layout, len(zoo)) == ("archive", 3)
        assert [f["checkpoint"] for f in zoo.failures] == ["../outside.pt", "sweep/bad.pt"]
        assert zoo.index["test_accuracy"].max() == 0.5
        assert {type(space) for space in zoo.spaces.values()} == {Chain, Opaque}
        assert torch.equal(rows_of(zoo)["sweep/b.pt"], flat_of(network(1)))
        assert_index_agrees(tmp_path / name, tmp_path / f"out-{name}")


def test_one_checkpoint_is_no_archive(tmp_path):
    torch.save(network(0).state_dict(), tmp_path / "a.pt")
    np.savez(tmp_path / "b.npz", **{"0.weight": np.ones((2, 2))})
    assert Zoo.open(tmp_path / "a.pt").layout == "single"
    assert Zoo.open(tmp_path / "b.npz").layout == "single"
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("notes.txt", json.dumps({}))
    with pytest.raises(InputError, match="holds no checkpoint"):
        Zoo.open(tmp_path / "c.zip")
