"""Networks that qem does not understand are listed in an index, and refused where they are used."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from zoo_files import write_folder

from qemcli.checkpoints import open_checkpoint
from qemcli.errors import InputError, UnsupportedError
from qemcli.spaces import Opaque, WeightSpace, opaque
from qemcli.zoos.indexing import index
from qemcli.zoos.opening import open_zoo
from qemcli.zoos.statistics import describe, digests
from qemcli.zoos.zoo import Zoo

ATTENTION = {
    "attn.q_proj.weight": torch.arange(16.0).reshape(4, 4),
    "norm.running_mean": torch.ones(3, dtype=torch.bfloat16),
    "steps": torch.tensor(7),
}


def test_opaque_space_is_read_back_and_claims_nothing():
    space = opaque({"b": (3,), "a": (2, 2)}, "attention")
    again = WeightSpace.from_json(space.to_json())
    assert again == space
    assert (again.names, again.size, again.hidden, again.activation) == (("b", "a"), 7, {}, None)
    assert "attention" in space.title
    assert not space.fits(opaque({"b": (3,)}, "attention"))


def test_sound_file_without_a_weight_space_is_listed_and_a_bad_one_is_not(tmp_path):
    root = write_folder(tmp_path / "z", 2)
    save_file(ATTENTION, root / "attention.safetensors")
    save_file({"steps": torch.tensor(7)}, root / "empty.safetensors")
    save_file({"a": torch.ones(2, 2)}, root / "wrong.safetensors", {"qem.space": "{}"})
    summary = index(root, out=tmp_path / "out")
    assert summary["checkpoints"] == 3
    assert list(summary["only_listed"].values()) == [1]
    assert "attention" in next(iter(summary["only_listed"]))
    assert [f["checkpoint"] for f in summary["failed"]] == [
        "empty.safetensors", "wrong.safetensors"
    ]  # fmt: skip
    zoo = Zoo.open(tmp_path / "out", statistics=True)
    row = zoo.index.set_index("checkpoint").loc["attention.safetensors"]
    flat = torch.cat([ATTENTION["attn.q_proj.weight"].flatten(), torch.ones(3)]).numpy()[None]
    assert (row["parameters"], row["coverage"], row["finite"]) == (19, 0.0, True)
    assert row["sha256"] == digests(flat)[0]
    assert row["stat.all.mean"] == np.float32(flat.mean())
    assert set(describe(zoo.spaces[row["arch"]], flat)) >= {"stat.all.q50", "ties"}


def test_what_is_only_listed_is_a_failure_where_a_zoo_is_used(tmp_path, run):
    root = write_folder(tmp_path / "z", 2)
    save_file(ATTENTION, root / "attention.safetensors")
    index(root, out=tmp_path / "out")
    for given in (root, tmp_path / "out"):
        assert any(isinstance(space, Opaque) for space in Zoo.open(given).spaces.values())
        zoo = open_zoo(given)
        assert len(zoo) == 2
        assert [f["checkpoint"] for f in zoo.failures] == ["attention.safetensors"]
        with pytest.raises(InputError, match="without understanding it"):
            open_zoo(given, strict=True)
    found = run("index", root, "--out", tmp_path / "again", "--json")
    assert (found.code, json.loads(found.out)["checkpoints"]) == (0, 3)
    with pytest.raises(UnsupportedError):
        open_checkpoint(root / "attention.safetensors").space()  # inspect still says why
