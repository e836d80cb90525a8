"""Repositories indexed by their headers: no weights are fetched, copies are found."""

import json

import pandas
import pytest
import torch
from safetensors.torch import save, save_file
from zoo_files import network, write_folder

from qemcli.errors import InputError, UsageError
from qemcli.zoos.headers import Headers
from qemcli.zoos.zoo import Zoo


def folder_bytes(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_index_of_headers_is_that_of_the_files(hub, tmp_path):
    from qemcli.zoos.layouts import folder

    root = write_folder(tmp_path / "z")
    (root / "labels.csv").write_text("checkpoint,lr\nn1,0.5\nn2,0.25\n")
    hub.add("owner/zoo", folder_bytes(root), "dataset")
    found = Headers.of("hf://datasets/owner/zoo").index(tmp_path / "i")
    assert (found["checkpoints"], found["failed"], found["identical"]) == (6, [], 0)
    ours = Zoo.open(tmp_path / "i" / "index.parquet")
    theirs = folder.open(root)
    shared = [c for c in theirs.index if c not in ("mtime", "uid")]
    pandas.testing.assert_frame_equal(ours.index[shared], theirs.index[shared], check_dtype=False)
    assert ours.spaces == theirs.spaces
    assert all(row.startswith("sha256:") for row in ours.index["hash"])


def test_only_headers_are_fetched_until_weights_are_asked_for(hub, tmp_path):
    big = {"0.weight": torch.randn(300, 200), "2.weight": torch.randn(10, 300)}
    files = {f"n{i}.safetensors": save({k: v + i for k, v in big.items()}) for i in range(4)}
    hub.add("owner/zoo", files)
    Headers.of("hf://owner/zoo").index(tmp_path / "i", "relu")
    ranges = [asked.headers["range"] for asked in hub.cdn.asked]
    assert ranges == ["bytes=0-99999"] * 4
    hub.cdn.asked.clear()
    zoo = Zoo.open(tmp_path / "i").where("checkpoint == 'n2.safetensors'")
    ((_, flat, _),) = zoo.load()
    assert torch.equal(flat[0, :60000].view(300, 200), big["0.weight"] + 2)
    assert len(hub.cdn.seen("GET")) == 1


def test_index_stays_with_its_commit(hub, tmp_path):
    data = save(network(0).state_dict())
    hub.add("owner/zoo", {"a.safetensors": data})
    Headers.of("hf://owner/zoo").index(tmp_path / "i", "relu")
    hub.add("owner/zoo", {"a.safetensors": save(network(1).state_dict())})
    ((_, flat, _),) = Zoo.open(tmp_path / "i").load()
    assert torch.equal(flat[0], torch.cat([p.flatten() for p in network(0).parameters()]))


def test_copies_are_found_by_hash_alone(hub, tmp_path):
    same, other = save(network(0).state_dict()), save(network(1).state_dict())
    files = {"step1/m.safetensors": same, "step2/m.safetensors": other, "step3/m.safetensors": same}
    hub.add("owner/zoo", {**files, "a.pt": b"torch", "b.pt": b"torch"})
    found = Headers.of("hf://owner/zoo").index(tmp_path / "i")
    assert found["identical"] == 2
    table = pandas.read_parquet(tmp_path / "i" / "index.parquet").set_index("checkpoint")
    assert table["copy_of"].dropna().to_dict() == {
        "b.pt": "a.pt",
        "step3/m.safetensors": "step1/m.safetensors",
    }


def test_long_header_takes_a_second_request_and_no_range_is_survived(hub, tmp_path):
    from fake_web import Fault

    data = save(network(0).state_dict(), {"note": "x" * 150_000})
    hub.add("owner/zoo", {"a.safetensors": data})
    hub.cdn.faults += [Fault("GET", no_range=True), Fault("GET", no_range=True)]
    for _ in range(2):
        assert Headers.of("hf://owner/zoo").index(tmp_path / "i")["failed"] == []
    assert len(hub.cdn.asked) == 4
    table = pandas.read_parquet(tmp_path / "i" / "index.parquet")
    assert table["checkpoint"].tolist() == ["a.safetensors"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\n",
        (1 << 62).to_bytes(8, "little") + b"{" * 200,
        save({"a": torch.zeros(9, 9)})[:-3],
        (2).to_bytes(8, "little") + b"{}" + b"x" * 99,
    ],
)
def test_hostile_header_fails_alone(hub, tmp_path, data):
    good = save(network(0).state_dict())
    hub.add("owner/zoo", {"bad.safetensors": data, "good.safetensors": good})
    found = Headers.of("hf://owner/zoo").index(tmp_path / "i")
    assert [item["checkpoint"] for item in found["failed"]] == ["bad.safetensors"]
    assert found["checkpoints"] == 1


def test_sharded_directory_is_one_checkpoint(hub, tmp_path):
    state = network(0).state_dict()
    names = list(state)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    files = {file: save({n: state[n] for n in held}) for file, held in shards.items()}
    where = {name: file for file, held in shards.items() for name in held}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": where}).encode()
    files["config.json"] = b'{"model_type": "mystery"}'
    hub.add("owner/zoo", {**files, "pytorch_model.bin": b"the same"})
    found = Headers.of("hf://owner/zoo").index(tmp_path / "i")
    assert (found["checkpoints"], found["failed"]) == (1, [])
    hub.add("owner/zoo", {k: v for k, v in files.items() if "2-of" not in k})
    with pytest.raises(InputError, match="2-of-00002"):
        Headers.of("hf://owner/zoo").index(tmp_path / "i")


def test_command_says_what_it_would_read_and_reads(hub, run, tmp_path):
    root = write_folder(tmp_path / "z")
    commit = hub.add("owner/zoo", folder_bytes(root))
    ran = run("index", "hf://owner/zoo", "--headers", "--dry-run", "--json")
    assert ran.json["headers_to_read"] == 6
    assert not hub.cdn.asked
    ran = run("index", "hf://owner/zoo", "--headers", "--out", tmp_path / "i", "--json")
    assert (ran.code, ran.json["source"]) == (0, f"hf://owner/zoo@{commit}")
    ran = run("index", root, "--headers")
    assert ran.code == 2
    with pytest.raises(UsageError, match="hf://owner/name"):
        Headers.of("zoo")
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    hub.add("owner/empty", {"README.md": b""})
    assert run("index", "hf://owner/empty", "--headers").code == 3
