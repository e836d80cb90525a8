"""torch files and npz: what is loaded, what is unwrapped, and that nothing is ever run."""

import argparse
import collections
import io
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qemcli.checkpoints import open_checkpoint
from qemcli.errors import InputError
from qemcli.formats import npy

MODULE = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
STATE = MODULE.state_dict()


class Canary:
    """A pickle of it touches a file where it is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def save(value, path, zipped=True):
    with path.open("wb") as file:
        torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return path


def assert_holds_the_state(checkpoint, prefix=""):
    arrays = checkpoint.tensors()
    assert list(arrays) == [prefix + name for name in STATE]
    for name, tensor in STATE.items():
        np.testing.assert_array_equal(arrays[prefix + name], tensor.numpy())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.ckpt", "checkpoints"])
def test_state_dict_is_read_whatever_its_suffix(tmp_path, name, zipped):
    found = open_checkpoint(save(STATE, tmp_path / name, zipped))
    assert found.format == "torch_file"
    assert_holds_the_state(found)


@pytest.mark.parametrize(
    "key", ["state_dict", "model", "model_state_dict", "net", "weights", "params"]
)
def test_wrapped_state_dict_is_found_and_the_rest_becomes_metadata(tmp_path, key):
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": t} for i, t in enumerate(STATE.values())}
    wrapped = {
        key: {f"module.{n}": t for n, t in STATE.items()},
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1, 2, 3]}]},
        "epoch": 3,
        "test_accuracy": 0.5,
        "hyper_parameters": {"lr": 0.1, "activation": "tanh"},
    }
    found = open_checkpoint(save(wrapped, tmp_path / "a.pt"))
    assert list(found.shapes) == list(STATE)
    assert found.metadata["test_accuracy"] == 0.5
    assert found.metadata["config.lr"] == 0.1
    space = found.space()
    assert space.activation == "tanh"
    assert ("optimizer.state.0.exp_avg", f"outside '{key}'") in space.skipped
    assert found.coverage(space) == 1.0


def test_buffers_and_other_dtypes_are_named(tmp_path):
    state = {**STATE, "steps": torch.tensor(4), "table": torch.zeros(9, dtype=torch.int8)}
    found = open_checkpoint(save(state, tmp_path / "a.pt"))
    space = found.space()
    assert dict(space.skipped) == {
        "steps": "int64: a counter or a mask, not weights",
        "table": "unsupported dtype int8",
    }
    assert found.coverage(space) == 32 / 41


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_never_run(tmp_path, zipped):
    canary = tmp_path / "canary"
    file = save({**STATE, "x": Canary(canary)}, tmp_path / "a.pt", zipped)
    with pytest.raises(InputError, match="Python objects besides tensors") as caught:
        open_checkpoint(file)
    assert not zipped or "system" in caught.value.message
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))  # the control: it is a canary
    assert canary.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.bin", "a.pkl"])
def test_plain_pickle_is_refused_and_not_run(tmp_path, protocol, name):
    canary = tmp_path / "canary"
    (tmp_path / name).write_bytes(pickle.dumps({"a": Canary(canary)}, protocol))
    with pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path / name)
    assert "pickle" in caught.value.message or protocol < 2
    assert not canary.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_what_holds_no_tensor_by_name_is_refused(tmp_path, zipped):
    for value in ([torch.zeros(3)], 3, {"a": 3}, argparse.Namespace(a=torch.zeros(3))):
        with pytest.raises(InputError, match=r"not a dict of tensors|holds no tensor"):
            open_checkpoint(save(value, tmp_path / "a.pt", zipped))
    ordered = collections.OrderedDict(STATE)  # the control: what torch itself writes
    assert_holds_the_state(open_checkpoint(save(ordered, tmp_path / "a.pt", zipped)))


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("zipped", [True, False])
def test_module_saved_whole_is_read_without_its_class(tmp_path, zipped):
    found = open_checkpoint(save({"model": MODULE, "best": np.float64(3)}, tmp_path / "a", zipped))
    assert_holds_the_state(found)
    assert found.metadata["best"] == 3.0


@pytest.mark.parametrize("zipped", [True, False])
def test_settings_in_objects_are_read_and_nothing_is_imported(tmp_path, zipped, monkeypatch):
    module = types.ModuleType("gone_tomorrow")
    exec("class Config:\n    pass", module.__dict__)
    module.Config.__module__ = "gone_tomorrow"
    monkeypatch.setitem(sys.modules, "gone_tomorrow", module)
    config = module.Config()
    config.__dict__.update(lr=0.1, activation="tanh", path=Path("/a/b"), widths=[3, 5])
    value = {"model": STATE, "config": config, "rng": np.arange(3), "when": object}
    file = save(value, tmp_path / "a.pt", zipped)
    monkeypatch.delitem(sys.modules, "gone_tomorrow")
    found = open_checkpoint(file)
    assert_holds_the_state(found)
    assert found.metadata["config.lr"] == 0.1
    assert found.metadata["config.path"] == "/a/b"
    assert "never made" in dict(found.others())["rng"]
    assert "gone_tomorrow" not in sys.modules


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 11])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file_cut_anywhere_is_one_clear_error(tmp_path, zipped, step):
    whole = save({"a": torch.zeros(2, 2)}, tmp_path / "whole.pt", zipped).read_bytes()
    file = tmp_path / "cut.pt"
    for count in [*range(0, len(whole), step), len(whole) - 1]:
        file.write_bytes(whole[:count])
        with pytest.raises(InputError) as caught:
            open_checkpoint(file)
        assert "\n" not in caught.value.message


def test_compressed_torch_zip_is_refused(tmp_path):
    whole = save(STATE, tmp_path / "a.pt")
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(tmp_path / "b.pt", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(InputError, match="compressed members"):
        open_checkpoint(tmp_path / "b.pt")


def test_tensors_of_many_kinds_are_read_or_named(tmp_path):
    state = {
        "0.weight": torch.randn(4, 3).T.contiguous().T,
        "0.bias": torch.randn(8, dtype=torch.float64)[::2],
        "half": torch.randn(2, 2).to(torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "complex": torch.zeros(2, dtype=torch.complex64),
    }
    found = open_checkpoint(save(state, tmp_path / "a.pt"))
    arrays = found.tensors()
    np.testing.assert_array_equal(arrays["0.weight"], state["0.weight"].numpy())
    np.testing.assert_array_equal(arrays["0.bias"], state["0.bias"].numpy())
    np.testing.assert_array_equal(arrays["half"], state["half"].float().numpy())
    assert dict(found.others()) == {"complex": "unsupported dtype complex64"}


@pytest.mark.parametrize("packed", [False, True])
def test_npz_is_read_lazily(tmp_path, packed):
    writer = np.savez_compressed if packed else np.savez
    writer(tmp_path / "a.npz", **{name: t.numpy() for name, t in STATE.items()})
    found = open_checkpoint(tmp_path / "a.npz")
    assert_holds_the_state(found)
    assert found.space().widths == (3, 5, 2)


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_object_arrays_are_never_unpickled(tmp_path, name):
    canary = tmp_path / "canary"
    array = np.array([Canary(canary)], dtype=object)
    if name == "a.npy":
        np.save(tmp_path / name, array, allow_pickle=True)
    else:
        np.savez(tmp_path / name, array)
    with pytest.raises(InputError, match="pickled Python objects"):
        open_checkpoint(tmp_path / name)
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_npy_cut_anywhere_is_one_clear_error(tmp_path, kind):
    buffer = io.BytesIO()
    array = np.ones((3, 4), np.float32)
    np.save(buffer, array) if kind == "npy" else np.savez(buffer, a=array)
    whole = buffer.getvalue()
    file = tmp_path / f"cut.{kind}"
    for count in range(len(whole)):
        file.write_bytes(whole[:count])
        with pytest.raises(InputError) as caught:
            open_checkpoint(file)
        assert "\n" not in caught.value.message


def test_zip_bomb_is_refused_before_it_unpacks(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros((1000, 1000), np.float32))
    assert open_checkpoint(tmp_path / "a.npz").shapes == {"a": (1000, 1000)}  # small enough
    monkeypatch.setattr(npy, "MAX_FREE", 1 << 20)
    with pytest.raises(InputError, match="zip bomb"):
        open_checkpoint(tmp_path / "a.npz")


def test_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    state = nn.Linear(3, 4).state_dict()
    torch.save({**state, "bias": torch.zeros(1).expand(2**40)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="claims more numbers"):
        open_checkpoint(tmp_path / "a.pt")
