"""Opening zoos of every layout, filters, and what a bad checkpoint does to the rest."""

import numpy as np
import pandas
import pytest
import torch
from zoo_files import flat_of, network, write_broken, write_folder, write_index, write_own
from zoo_kit import write_zoo

from qemcli.errors import InputError, UsageError
from qemcli.spaces import mlp
from qemcli.zoos.opening import open_zoo
from qemcli.zoos.resolve import resolve
from qemcli.zoos.zoo import Zoo


def rows_of(zoo):
    """checkpoint -> weights, of all that can be loaded."""
    return {
        zoo.index["checkpoint"][i]: row
        for _, flat, positions in zoo.load()
        for i, row in zip(positions, flat, strict=True)
    }


def test_own_layout_loads_every_row_under_its_name(tmp_path):
    weights = write_own(tmp_path / "z")
    zoo = Zoo.open(tmp_path / "z")
    assert (zoo.name, zoo.layout, len(zoo)) == ("tiny", "indexed", 7)
    for i in range(7):
        assert torch.equal(rows_of(zoo)[f"run-{i:05d}/step-00100"], weights[i])
    assert {s.activation for s, _, _ in zoo.load()} == {"relu", "tanh"}
    assert "stat.fc.bias.mean" not in zoo.index
    assert "stat.fc.bias.mean" in Zoo.open(tmp_path / "z" / "index.parquet", statistics=True).index


def test_batches_are_the_load_in_pieces(tmp_path):
    write_own(tmp_path / "z")
    zoo = Zoo.open(tmp_path / "z")
    pieces = [(flat, at) for _, flat, at in zoo.batches(2)]
    assert max(len(flat) for flat, _ in pieces) == 2
    whole = [(flat, at) for _, flat, at in zoo.load()]
    assert torch.equal(torch.cat([f for f, _ in pieces]), torch.cat([f for f, _ in whole]))
    assert np.array_equal(
        np.concatenate([a for _, a in pieces]), np.concatenate([a for _, a in whole])
    )


def test_filters_keep_rows_and_weights_together(tmp_path):
    weights = write_own(tmp_path / "z")
    zoo = Zoo.open(tmp_path / "z").where("lr > 0.15 and activation == 'relu'").split("test")
    assert zoo.index["checkpoint"].tolist() == ["run-00005/step-00100"]
    [(space, flat, positions)] = list(zoo.load())
    assert torch.equal(flat, weights[5:6])
    assert (space.activation, positions.tolist()) == ("relu", [0])
    assert len(Zoo.open(tmp_path / "z").limit(3)) == 3
    with pytest.raises(UsageError, match="no split is called 'dev'"):
        zoo.split("dev")


def test_folder_of_checkpoints_is_a_zoo_and_bad_ones_are_counted(tmp_path):
    root = write_folder(tmp_path / "z")
    bad = write_broken(root)
    zoo = Zoo.open(root)
    assert zoo.layout == "folder"
    for i in range(6):
        assert torch.equal(rows_of(zoo)[f"run{i % 2}/n{i}.safetensors"], flat_of(network(i)))
    assert zoo.index.set_index("checkpoint")["test_accuracy"]["run1/n3.safetensors"] == 0.3
    reasons = {item["checkpoint"]: item["reason"] for item in zoo.failures}
    assert len(reasons) == bad
    assert reasons["pipe.pt"] == "not a regular file (a pipe, socket or device)"
    assert "leaves the folder" in reasons["outside.safetensors"]
    assert "needs" in reasons["cut.safetensors"]
    assert "predictor" in reasons["predictor.safetensors"]
    assert zoo.record["ignored"] == 1


def test_checkpoint_that_changes_after_opening_fails_alone(tmp_path):
    zoo = Zoo.open(write_folder(tmp_path / "z"))
    (tmp_path / "z" / "run0" / "n2.safetensors").write_bytes(b"x" * 30)
    (tmp_path / "z" / "run1" / "n1.safetensors").unlink()
    assert len(rows_of(zoo)) == 4
    assert {f["checkpoint"] for f in zoo.failures} == {"run0/n2.safetensors", "run1/n1.safetensors"}


def test_single_checkpoint_is_a_zoo_of_one_and_a_bad_one_raises(tmp_path):
    root = write_folder(tmp_path / "z")
    zoo = Zoo.open(root / "run0" / "n0.safetensors")
    assert (len(zoo), zoo.layout) == (1, "single")
    assert torch.equal(next(zoo.load())[1][0], flat_of(network(0)))
    (root / "bad.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"bad\.pt: empty"):
        Zoo.open(root / "bad.pt")


def test_nothing_usable_is_an_input_error_and_nothing_there_wrong_usage(tmp_path):
    with pytest.raises(InputError, match="no checkpoint in it"):
        Zoo.open(tmp_path)
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of its 1.*a\.pt: empty"):
        Zoo.open(tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        Zoo.open(tmp_path / "missing")


def test_stated_activation_fills_only_what_is_unknown(tmp_path):
    write_folder(tmp_path / "z", 2)
    torch.save(network(9).state_dict(), tmp_path / "z" / "mute.pt")
    zoo = Zoo.open(tmp_path / "z", activation="tanh")
    found = zoo.index.set_index("checkpoint")["activation"]
    assert found.to_dict() == {
        "mute.pt": "tanh", "run0/n0.safetensors": "tanh", "run1/n1.safetensors": "tanh"
    }  # fmt: skip
    mute = {s.activation for s, _, at in Zoo.open(tmp_path / "z").load() if 0 in at}
    assert mute == {None}  # what its neighbours say is not known of it


def test_index_that_is_foreign_cut_or_of_another_version_is_refused(tmp_path):
    write_own(tmp_path / "z")
    index = tmp_path / "z" / "index.parquet"
    whole = index.read_bytes()
    for data in (b"", whole[:100], whole[: len(whole) // 2], whole[:-1]):
        index.write_bytes(data)
        with pytest.raises(UsageError, match="no readable parquet"):
            Zoo.open(tmp_path / "z")
    pandas.DataFrame({"a": [1]}).to_parquet(index)
    with pytest.raises(UsageError, match="no index of a zoo"):
        Zoo.open(index)
    write_index(tmp_path / "z", pandas.DataFrame({"checkpoint": ["a"], "arch": ["b"]}), {}, 2)
    with pytest.raises(UsageError, match="has version 2"):
        Zoo.open(index)


@pytest.mark.parametrize("evil", ["../outside.safetensors", "/etc/hostname"])
def test_index_cannot_point_out_of_its_zoo(tmp_path, evil):
    write_own(tmp_path / "z")
    index = Zoo.open(tmp_path / "z")
    table = index.index.assign(shard=evil)
    write_index(tmp_path / "z", table, {a: s.to_json() for a, s in index.spaces.items()})
    with pytest.raises(InputError, match="points out of the zoo"):
        list(Zoo.open(tmp_path / "z").load())


def test_rows_of_a_missing_shard_or_beyond_its_end_are_failures(tmp_path):
    def reasons():
        zoo = Zoo.open(tmp_path / "z")
        assert sum(len(flat) for _, flat, _ in zoo.load()) == 0
        assert {f["checkpoint"] for f in zoo.failures} == set(zoo.index["checkpoint"])
        return {f["reason"] for f in zoo.failures}

    write_own(tmp_path / "z")
    zoo = Zoo.open(tmp_path / "z")
    wrong = zoo.index.assign(row=zoo.index["row"] + 90)
    write_index(tmp_path / "z", wrong, {a: s.to_json() for a, s in zoo.spaces.items()})
    shards = sorted(set(zoo.index["shard"]))
    assert all("not those of the index" in reason for reason in reasons())
    for name in shards:
        (tmp_path / "z" / name).unlink()
    assert reasons() == {f"{name}: the zoo's shard is missing" for name in shards}


def test_zoo_argument_is_found_in_the_stated_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QEM_ZOO", raising=False)
    monkeypatch.setattr("qemcli.zoos.resolve.shipped", lambda kind: tmp_path / "shipped" / kind)
    said = []
    with pytest.raises(InputError, match="no ZOO was given"):
        resolve(None)
    write_own(tmp_path / "shipped" / "zoos" / "tiny")
    assert resolve(None, said.append) == resolve("tiny") == tmp_path / "shipped/zoos/tiny"
    (tmp_path / "index.parquet").write_bytes(b"")
    assert str(resolve(None, said.append)) == "index.parquet"
    (tmp_path / "zoo").mkdir()
    assert str(resolve(None, said.append)) == "zoo"
    monkeypatch.setenv("QEM_ZOO", str(tmp_path / "shipped"))
    assert resolve(None, said.append) == tmp_path / "shipped"
    assert [line.split()[1] for line in said] == [
        "tiny", "./index.parquet", "./zoo", str(tmp_path / "shipped")
    ]  # fmt: skip
    with pytest.raises(UsageError, match="no such file") as caught:
        resolve("tiyn")
    assert caught.value.hint == "Did you mean 'tiny'?"
    with pytest.raises(UsageError, match="hf://"):
        resolve("hf://nothing")


def test_strict_stops_at_the_first_bad_checkpoint(tmp_path):
    root = write_folder(tmp_path / "z")
    assert len(open_zoo(root, strict=True)) == 6
    write_broken(root)
    assert len(open_zoo(root, where="test_accuracy < 0.25", limit=2)) == 2
    with pytest.raises(InputError, match="cut"):
        open_zoo(root, strict=True)
    with pytest.raises(InputError, match="no checkpoint is left"):
        open_zoo(root, where="test_accuracy > 7")


def test_same_tensors_run_in_another_way_are_another_architecture(tmp_path):
    from safetensors.torch import save_file

    for name, w0 in (("a", "30"), ("b", "10"), ("c", "30")):
        save_file(network(1).state_dict(), tmp_path / f"{name}.safetensors", {"w0": w0})
    zoo = Zoo.open(tmp_path)
    assert zoo.index["arch"].nunique() == 2
    assert sorted((s.forward.w0, at.tolist()) for s, _, at in zoo.load()) == [
        (10.0, [1]), (30.0, [0, 2])
    ]  # fmt: skip


def test_what_is_written_may_be_read_by_others(tmp_path):
    space = mlp([2, 3, 1])
    write_zoo(tmp_path / "z", space, torch.zeros(12, space.size))
    plain = tmp_path / "plain"
    plain.touch()
    shards = list((tmp_path / "z").rglob("*.safetensors"))
    assert shards
    assert {file.stat().st_mode for file in shards} == {plain.stat().st_mode}


@pytest.mark.parametrize(
    "columns",
    [{"row": 1.5}, {"row": "0"}, {"row": float("nan")}, {"shard": 5}],
    ids=str,
)
def test_columns_that_are_no_places_are_refused(tmp_path, columns):
    write_own(tmp_path / "z")
    zoo = Zoo.open(tmp_path / "z")
    table = zoo.index.assign(**columns)
    with pytest.raises(InputError, match="no shard and row"):
        zoo.source(next(zoo.groups())[0], table)


def test_what_is_read_twice_fails_once(tmp_path):
    write_own(tmp_path / "z")
    zoo = Zoo.open(tmp_path / "z")
    for name in set(zoo.index["shard"]):
        (tmp_path / "z" / name).unlink()
    for _ in range(2):
        assert list(zoo.load()) == []
    assert len(zoo.failures) == len(zoo)


def test_verifying_on_a_zoo_of_which_nothing_can_be_read_says_so(run, tmp_path):
    write_own(tmp_path / "z")
    for name in set(Zoo.open(tmp_path / "z").index["shard"]):
        (tmp_path / "z" / name).unlink()
    found = run("verify-invariance", tmp_path / "z")
    assert found.code == 3
    assert "none of 7 checkpoints can be read" in found.err
    assert "shard is missing" in found.err
