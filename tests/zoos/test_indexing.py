"""The index: what it holds, what a second run reads again, and that a run that was cut off ends
as one that was not."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file
from zoo_files import flat_of, network, write_broken, write_folder, write_own

from qemcli.errors import EnvironmentFailure, InputError, UsageError
from qemcli.zoos import chunks, indexing
from qemcli.zoos.indexing import index, planned
from qemcli.zoos.statistics import describe, digests
from qemcli.zoos.zoo import Zoo


def content(folder):
    table = Zoo.open(folder, statistics=True)
    return table.index.drop(columns=["mtime"], errors="ignore")


def test_index_holds_what_the_files_hold(tmp_path):
    root = write_folder(tmp_path / "z", 7)
    summary = index(root, out=tmp_path / "out")
    assert (summary["checkpoints"], summary["finite"], summary["labelled"]) == (7, 7, 7)
    zoo = Zoo.open(tmp_path / "out", statistics=True)
    space = next(iter(zoo.spaces.values()))
    for i, name in enumerate(zoo.index["checkpoint"]):
        number = int(name[-len("0.safetensors")])
        flat = flat_of(network(number)).numpy()[None]
        row = zoo.index.iloc[i]
        assert row["sha256"] == digests(flat)[0]
        assert (row["uid"], row["activation"], row["coverage"]) == (i, "relu", 1.0)
        assert (row["test_accuracy"], row["config.lr"]) == (number / 10, 0.01)
        for column, values in describe(space, flat).items():
            if column.startswith("stat."):
                assert row[column] == np.float32(values[0])
    for _, flat, positions in zoo.load():
        assert torch.equal(flat[2], flat_of(network(int(zoo.index["file"][positions[2]][-13]))))
    stated = json.loads(parquet.read_schema(tmp_path / "out/index.parquet").metadata[b"qem.index"])
    assert stated["version"] == 1
    assert sorted(os.listdir(tmp_path / "out")) == ["index.parquet"]


def test_bad_files_are_named_and_the_rest_is_indexed(tmp_path):
    root = write_folder(tmp_path / "z")
    bad = write_broken(root)
    summary = index(root)
    assert (summary["checkpoints"], len(summary["failed"])) == (6, bad)
    assert [f["checkpoint"] for f in summary["failed"]] == sorted(
        f["checkpoint"] for f in summary["failed"]
    )
    with pytest.raises(InputError, match=r"not follow|no file"):
        index(root, strict=True)
    again = index(root)  # its own index in the folder is no checkpoint and no zoo to copy
    assert again["checkpoints"] == 6


def test_values_that_are_not_finite_are_flagged(tmp_path):
    state = network(0).state_dict()
    state["0.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "a.safetensors")
    torch.save(network(1).state_dict(), tmp_path / "b.pt")
    summary = index(tmp_path, out=tmp_path / "out")
    assert (summary["checkpoints"], summary["finite"]) == (2, 1)
    assert Zoo.open(tmp_path / "out").index["finite"].tolist() == [False, True]


def test_formats_and_dtypes_of_the_same_network_give_the_same_row(tmp_path):
    state = {n: t.to(torch.bfloat16) for n, t in network(0).state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    save_file({n: t.float() for n, t in state.items()}, tmp_path / "b.safetensors")
    torch.save({n: t.double() for n, t in state.items()}, tmp_path / "c.pt")
    np.savez(tmp_path / "d.npz", **{n: t.float().numpy() for n, t in state.items()})
    found = content(index(tmp_path)["index"])
    assert found["sha256"].nunique() == 1
    assert found["format"].tolist() == ["safetensors", "safetensors", "torch_file", "npy"]


def test_update_reads_only_what_has_changed(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "z", 8)
    index(root, out=tmp_path / "out")
    save_file(network(50).state_dict(), root / "run0" / "n0.safetensors", {"activation": "relu"})
    save_file(network(51).state_dict(), root / "a_new.safetensors", {"activation": "tanh"})
    (root / "run1" / "n1.safetensors").unlink()
    read = []
    original = chunks._bytes
    monkeypatch.setattr(chunks, "_bytes", lambda p, e: read.append(e.file) or original(p, e))
    index(root, out=tmp_path / "out", update=True)
    assert read == ["a_new.safetensors", "run0/n0.safetensors"]
    index(root, out=tmp_path / "fresh")
    assert content(tmp_path / "out").equals(content(tmp_path / "fresh"))
    read.clear()
    index(root, out=tmp_path / "out", update=True)
    assert read == []
    index(root, out=tmp_path / "out", update=True, activation="gelu")  # another question: all again
    assert len(read) == 8


def test_chunks_and_workers_do_not_show(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "z", 9)
    write_broken(root)
    for i in range(4):  # other widths, and the same ones with more beside them
        save_file(network(i, (3, 4 + i % 2, 4)).state_dict(), root / f"o{i}.safetensors")
        more = {**network(i).state_dict(), "steps": torch.tensor([i])}
        save_file(more, root / f"run{i % 2}" / f"more{i}.safetensors")
    one = index(root, out=tmp_path / "one")
    monkeypatch.setattr(indexing, "CHUNK_ROWS", 2)
    many = index(root, out=tmp_path / "many")
    spread = index(root, out=tmp_path / "spread", workers=2)
    assert content(tmp_path / "one").equals(content(tmp_path / "many"))
    files = [tmp_path / name / "index.parquet" for name in ("many", "spread")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert one["failed"] == many["failed"] == spread["failed"]


def test_run_that_was_cut_off_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "z", 9)
    write_broken(root)
    monkeypatch.setattr(indexing, "CHUNK_ROWS", 3)
    index(root, out=tmp_path / "whole")
    original = os.replace
    for stop in range(1, 7):  # at the n-th file that gets its final name
        out, count, calls = tmp_path / f"cut{stop}", [0], []

        def replace(a, b, count=count, stop=stop):
            count[0] += 1
            if count[0] == stop:
                raise KeyboardInterrupt
            original(a, b)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            index(root, out=out)
        monkeypatch.setattr(os, "replace", original)
        assert not (out / "index.parquet").exists()
        save = chunks._save
        monkeypatch.setattr(chunks, "_save", lambda f, *a, s=save, c=calls: c.append(f) or s(f, *a))
        index(root, out=out)
        monkeypatch.setattr(chunks, "_save", save)
        assert len(calls) == 6 - stop  # of five chunks, those that were not done
        assert content(out).equals(content(tmp_path / "whole"))
        assert os.listdir(out) == ["index.parquet"]


def test_failing_disk_leaves_the_old_index_whole(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "z")
    index(root, out=tmp_path / "out")
    before = (tmp_path / "out" / "index.parquet").read_bytes()
    save_file(network(60).state_dict(), root / "more.safetensors")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        index(root, out=tmp_path / "out")
    assert (tmp_path / "out" / "index.parquet").read_bytes() == before
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_two_writers_do_not_mix(tmp_path):
    root = write_folder(tmp_path / "z")
    with indexing._alone(tmp_path / "out"), pytest.raises(EnvironmentFailure, match="another qem"):
        index(root, out=tmp_path / "out")
    assert index(root, out=tmp_path / "out")["checkpoints"] == 6


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_table_of_labels_is_joined_by_path(tmp_path, suffix):
    import pandas

    root = tmp_path / "z"
    for i in range(4):
        (root / f"r{i}").mkdir(parents=True)
        torch.save(network(i).state_dict(), root / f"r{i}" / "model.pt")
    paths = ["./r0/model.pt", "r1/model", "r3/model.pt", "gone/model.pt"]
    table = pandas.DataFrame({"path": paths, "test_accuracy": [0.1, 0.2, 0.4, 0.9], "lr": 0.5})
    writers = {
        "csv": lambda f: table.to_csv(f, index=False), "parquet": table.to_parquet,
        "jsonl": lambda f: table.to_json(f, orient="records", lines=True),
    }  # fmt: skip
    writers[suffix](root / f"labels.{suffix}")
    summary = index(root, out=tmp_path / "out")
    assert summary["labels"] == {
        "file": f"labels.{suffix}", "by": "path", "joined": 3, "without_label": 1,
        "without_checkpoint": 1, "checkpoints_without_label": ["r2/model.pt"],
        "rows_without_checkpoint": ["gone/model.pt"],
        "labels": ["test_accuracy"], "columns": ["test_accuracy", "lr"],
    }  # fmt: skip
    for found in (Zoo.open(tmp_path / "out").index, Zoo.open(root).index):
        labels = found.set_index("checkpoint")["test_accuracy"]
        assert labels["r3/model.pt"] == 0.4
        assert np.isnan(labels["r2/model.pt"])
        assert found["config.lr"].notna().sum() == 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("path,x\nmodel.pt,1\n", "fits two"), ("width,x\na,1\n", "no column of paths"),
        ("path,x\na/model.pt,1\na/model,2\n", "stands twice"), ("", "not a readable table"),
    ],
)  # fmt: skip
def test_table_that_cannot_be_joined_is_wrong_usage(tmp_path, text, reason):
    for name in "ab":
        (tmp_path / name).mkdir()
        torch.save(network(1).state_dict(), tmp_path / name / "model.pt")
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UsageError, match=reason):
        index(tmp_path, out=tmp_path / "out")


def test_our_own_layout_can_be_indexed_again_elsewhere(tmp_path):
    weights = write_own(tmp_path / "z")
    summary = index(tmp_path / "z", out=tmp_path / "out")
    assert (summary["checkpoints"], summary["labelled"]) == (7, 7)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    zoo = Zoo.open(tmp_path / "moved")
    for _, flat, positions in zoo.load():
        assert torch.equal(flat, weights[positions])
    assert zoo.index["sha256"].tolist() == digests(weights.numpy()).tolist()


def test_plan_says_what_would_be_read_and_writes_nothing(tmp_path):
    root = write_folder(tmp_path / "z")
    index(root, out=tmp_path / "out")
    save_file(network(61).state_dict(), root / "more.safetensors")
    before = sorted(os.listdir(tmp_path / "out"))
    plan = planned(root, tmp_path / "out", update=True)
    assert (plan.summary()["checkpoints"], plan.summary()["to_read"]) == (7, 1)
    assert sorted(os.listdir(tmp_path / "out")) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not a folder"):
        planned(root, tmp_path / "file")


def test_mixed_kinds_of_a_setting_become_words(tmp_path):
    for i, value in enumerate(["1", "0.5", "adam"]):
        save_file(network(i).state_dict(), tmp_path / f"{i}.safetensors", {"config.x": value})
    assert Zoo.open(index(tmp_path)["index"]).index["config.x"].tolist() == ["1", "0.5", "adam"]
