"""--allow-pickle: a pickle is run in a process that can do little else, and without the
flag it is not."""

from __future__ import annotations

import functools
import os
import pickle
from importlib import metadata

import numpy as np
import pytest
import torch
from torch import nn

from qemcli.checkpoints import RunsCode, open_checkpoint
from qemcli.errors import EnvironmentFailure, InputError
from qemcli.formats import _unpickling
from qemcli.formats._unpickling import twin
from qemcli.zoos.scan import listing


class Wants:
    """A pickle of it calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Tanh(nn.Module):
    """A class that the process which reads it does not know."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)


GROW = "x = []\nwhile True: x.append(bytearray(1 << 24))"
CONNECT = "import socket; socket.create_connection(('127.0.0.1', 9))"


def kept(path, value):
    path.write_bytes(pickle.dumps(value))
    return path


def test_whole_module_is_read_and_kept_as_plain_tensors_beside(tmp_path, run):
    torch.manual_seed(0)
    net = Tanh()
    file = kept(tmp_path / "net.pkl", {"model": net, "lr": 0.1, "note": Wants(dict)})
    assert run("inspect", file).code == 3
    assert not list(tmp_path.glob("*.safetensors"))
    found = run("inspect", file, "--allow-pickle", "--json")
    assert (found.code, found.json["widths"]) == (0, [4, 5, 3]), found.err
    assert "which is run, confined (--allow-pickle)" in found.err
    beside = open_checkpoint(tmp_path / "net.pkl.safetensors")
    for name, tensor in net.state_dict().items():
        np.testing.assert_array_equal(beside.tensors()[name], tensor.numpy())
    assert beside.metadata["lr"] == "0.1"
    assert [e.file for e in listing(tmp_path).entries] == ["net.pkl.safetensors"]
    assert run("index", tmp_path, "--out", tmp_path / "out").code == 0


def test_canary_is_touched_neither_without_nor_with_the_flag(tmp_path, run):
    canary, folder = tmp_path / "canary", tmp_path / "z"
    folder.mkdir()
    kept(folder / "evil.pkl", Wants(os.system, f"touch {canary}"))
    torch.save(nn.Linear(2, 3).state_dict(), folder / "good.pt")
    for flag in ((), ("--allow-pickle",)):
        found = run("index", folder, "--out", tmp_path / "out", *flag, "--json")
        assert (found.code, found.json["checkpoints"]) == (4, 1), found.err
        assert not canary.exists()
        assert len(found.json["failed"]) == 1
    assert "it wanted os.system" in found.json["failed"][0]["reason"]
    assert sorted(os.listdir(folder)) == ["evil.pkl", "good.pt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wants", "said"),
    [
        (Wants(open, "CANARY", "w"), "it wanted open"),
        (Wants(os.mkfifo, "CANARY"), "Permission denied"),  # audited by nobody: by the kernel
        (Wants(os.mkdir, "CANARY"), "it wanted os.mkdir"),
        (Wants(os.fork), "it wanted os.fork"),
        (Wants(os._exit, 0), "left before it was read"),
        (Wants(os.kill, os.getpid(), 9), "it wanted os.kill"),
        (Wants(exec, CONNECT), "it wanted socket"),
        (Wants(exec, GROW), "more memory"),
        (Wants(bytearray, 1 << 45), "more memory"),
        (Wants(exec, "while True: pass"), "2 s of processor time"),
        (Wants(exec, "import time; time.sleep(99)"), "ran for 30 s"),
        (Wants(exec, "import ctypes; ctypes.CDLL(None)"), "it wanted ctypes.dlopen"),
        (Wants(str, "no tensor"), "holds a str, not a dict of tensors"),
    ],
)
def test_what_a_pickle_may_not_is_one_line(tmp_path, monkeypatch, wants, said):
    monkeypatch.setattr(_unpickling, "SECONDS", 2)
    monkeypatch.setattr(_unpickling, "MEGABYTES", 256)
    monkeypatch.setattr(_unpickling, "WAIT", 30)
    canary = tmp_path / "canary"
    function, args = wants.call
    wants.call = function, tuple(str(canary) if a == "CANARY" else a for a in args)
    file = kept(tmp_path / "evil.pkl", wants)
    with pytest.raises(InputError) as error:
        twin(file, lambda text: None)
    assert error.value.message.startswith(f"{file}: ")
    assert said in error.value.message
    assert "\n" not in error.value.message
    assert os.listdir(tmp_path) == ["evil.pkl"]


@pytest.mark.slow
def test_torch_file_with_a_call_in_it_is_read(tmp_path):
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": np.ones(2, np.float32)}
    torch.save({"state_dict": state, "make": functools.partial(int, 1)}, tmp_path / "a.pt")
    with pytest.raises(RunsCode):
        open_checkpoint(tmp_path / "a.pt")
    found = open_checkpoint(twin(tmp_path / "a.pt", lambda text: None)).tensors()
    assert found["a.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["b"].tolist() == [1, 1]


def test_torch_that_is_too_old_runs_nothing(tmp_path, monkeypatch):
    file = kept(tmp_path / "a.pkl", {"w": 1})
    monkeypatch.setattr(metadata, "version", lambda name: "2.9.1")
    with pytest.raises(EnvironmentFailure, match=r"this is 2\.9\.1"):
        twin(file, pytest.fail)
    assert os.listdir(tmp_path) == ["a.pkl"]


def test_file_that_is_data_is_itself(tmp_path):
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "a.pt")
    assert twin(tmp_path / "a.pt", pytest.fail) == tmp_path / "a.pt"
