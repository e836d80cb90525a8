"""The torch reader that runs nothing: it agrees with torch.load(weights_only=True) or is stricter,
whatever the bytes, and never imports or calls what a pickle names."""

import contextlib
import io
import os
import pickle
import struct
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qemcli.checkpoints import open_checkpoint
from qemcli.errors import InputError, QemError
from qemcli.formats import _torch_pickles, torch_file
from qemcli.formats._pickle_machine import Bad, Foreign
from qemcli.formats._pickles import read

STATE = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([0.5, -0.5])}


def saved(value, zipped=True):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


WHOLE = {zipped: saved({**STATE, "epoch": 3}, zipped) for zipped in (True, False)}


def no_call(name, args):
    return Foreign(name, args)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_located_without_torch(tmp_path, zipped):
    (tmp_path / "a.pt").write_bytes(WHOLE[zipped])
    code = (
        "import sys; from qemcli.formats.torch_file import open; from pathlib import Path\n"
        f"found = open(Path({str(tmp_path / 'a.pt')!r})); t = found.tensors()\n"
        "assert t['w'].tolist() == [[0, 1, 2], [3, 4, 5]], t\n"
        "assert 'torch' not in sys.modules"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


@given(data=st.data(), zipped=st.booleans())
@settings(max_examples=60, deadline=None)
def test_mutated_file_is_read_as_torch_does_or_refused(tmp_path_factory, data, zipped):
    raw = bytearray(WHOLE[zipped])
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = bytes(raw[: data.draw(st.integers(len(raw) // 2, len(raw)))])
    file = tmp_path_factory.getbasetemp() / "mutated.pt"
    file.write_bytes(raw)
    try:
        mine = open_checkpoint(file).tensors()
    except QemError:
        return
    theirs = torch.load(io.BytesIO(raw), weights_only=True)
    for name, array in mine.items():
        np.testing.assert_array_equal(array, theirs[name].float().numpy())


@given(
    raw=st.one_of(
        st.binary(max_size=60),
        st.lists(st.sampled_from([bytes([c]) for c in b"(}]).ueosb\x85\x86q\x00K\x01NtR0a2"])).map(
            b"".join
        ),
    )
)
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_a_value_or_one_kind_of_error(raw):
    with contextlib.suppress(Bad):
        read(raw + b".", 0, no_call, lambda pid: pid)


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_subnormal=False),  # other tests flush them to zero
        st.text(max_size=8), st.binary(max_size=8),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4),
        st.tuples(inner, inner), st.sets(st.integers(0, 9)), st.frozensets(st.text(max_size=3)),
    ),
    max_leaves=6,
)  # fmt: skip


@given(value=VALUES, protocol=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_plain_pickle_is_what_pickle_loads(value, protocol):
    def call(name, args):  # protocols 0 to 2 have no opcode for these
        if name == "_codecs.encode":
            return args[0].encode("latin-1")
        return {"builtins.set": set, "builtins.frozenset": frozenset, "builtins.bytes": bytes}[
            name
        ](*args)

    found = read(pickle.dumps(value, protocol), 0, call, lambda pid: pid)
    assert found.value == value
    assert found.calls == ()


class Canary:
    """A pickle of it touches a file where it is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


CANARIES = {
    "reduce": lambda c: pickle.dumps({"a": Canary(c)}, 2),
    "global": lambda c: b"\x80\x02cposix\nsystem\n(X" + struct.pack("<I", len(c)) + c + b"tR.",
    "stack global": lambda c: pickle.dumps({"a": Canary(c)}, 5),
    "inst": lambda c: b"(S'touch " + c + b"'\niposix\nsystem\n.",
    "obj": lambda c: b"(cposix\nsystem\nS'touch " + c + b"'\no.",
    "nested": lambda c: pickle.dumps({"a": pickle.dumps(Canary(c))}, 2)[:-1] + b".",
    "getattr": lambda c: b"\x80\x02cbuiltins\ngetattr\ncos\npath\nX\x06\0\0\0system\x86R.",
    "extension": lambda c: b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("name", CANARIES)
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt"])
def test_canary_never_sings(tmp_path, name, suffix, run):
    canary = tmp_path / "canary"
    data = CANARIES[name](str(canary).encode())
    whole = WHOLE[True]
    with zipfile.ZipFile(io.BytesIO(whole)) as old:
        root = old.namelist()[0].split("/")[0]
        file = tmp_path / f"a{suffix}"
        with zipfile.ZipFile(file, "w") as new:
            new.writestr(f"{root}/data.pkl", data)
            for member in old.namelist()[1:]:
                new.writestr(member, old.read(member))
    result = run("inspect", file)
    assert (result.code, result.out) == (3, "")
    assert not canary.exists()
    assert "Traceback" not in result.err


def test_extra_data_pkl_and_flag_bits_are_refused(tmp_path):
    file = tmp_path / "a.pt"
    file.write_bytes(WHOLE[True])
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr(archive.namelist()[0], b"\x80\x02N.")
    with pytest.raises(InputError, match="stands twice"):
        open_checkpoint(file)
    raw = bytearray(WHOLE[True])
    raw[raw.rindex(b"PK\x01\x02") + 8] |= 1  # the flag says encrypted
    file.write_bytes(raw)
    with pytest.raises(InputError, match="torch"):
        open_checkpoint(file)


BOMBS = {
    "deep": b"]" * 50_000 + b"a" * 49_999,
    "deep tuple as a key": b"}" + b")" + b"\x85" * 50_000 + b"Ns",
    "long integer": b"\x8b" + struct.pack("<i", 1 << 20) + b"\1" * (1 << 20),
    "many names": b"(" + b"ca\nb\n" * 5000 + b"l",
    "memo at 2^32": b"Nr" + b"\xff" * 4,
    "length of 2^62": b"\x8e" + struct.pack("<Q", 1 << 62),
    "marks": b"(" * 100_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickle_bomb_is_over_soon(name):
    started = time.process_time()
    with contextlib.suppress(Bad):
        read(BOMBS[name] + b".", 0, no_call, lambda pid: pid)
    assert time.process_time() - started < 1


def test_dict_that_stands_everywhere_is_refused(tmp_path, monkeypatch):
    tree = {"w": torch.zeros(2)}
    for _ in range(10):
        tree = {str(i): tree for i in range(10)}
    torch.save(tree, tmp_path / "a.pt")
    monkeypatch.setattr(torch_file, "MAX_TENSORS", 20_000)
    with pytest.raises(InputError, match="more than 20000 entries"):
        open_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_views_strides_and_shared_storages_are_torch_s(tmp_path, zipped):
    base = torch.arange(24.0)
    state = {
        "turned": base.reshape(4, 6).T, "slice": base[3:11:2], "half": base.to(torch.float16)[4:9],
        "brain": base.to(torch.bfloat16).reshape(4, 6)[1:, ::2], "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0), "shared": base, "parameter": nn.Parameter(base[:3]),
        "wide": base.double()[::3],
    }  # fmt: skip
    (tmp_path / "a.pt").write_bytes(saved(state, zipped))
    found = open_checkpoint(tmp_path / "a.pt").tensors()
    assert set(found) == set(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name], tensor.detach().double().numpy())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16])
def test_newer_dtypes_are_read_or_named(tmp_path, dtype):
    codes = torch.arange(128, dtype=torch.uint8)
    tensor = codes.view(dtype) if dtype.itemsize == 1 else codes.to(dtype)
    torch.save({"w": tensor, "b": torch.zeros(1)}, tmp_path / "a.pt")
    found = open_checkpoint(tmp_path / "a.pt")
    assert found.shapes["w"] == (128,)
    if dtype.itemsize == 1:
        np.testing.assert_array_equal(found.tensors(["w"])["w"], tensor.float().numpy())
    else:
        assert "counter" in dict(found.others())["w"]


def test_kind_that_only_torch_knows_goes_to_weights_only(tmp_path, monkeypatch):
    sparse = torch.eye(3).to_sparse()
    torch.save({"w": sparse}, tmp_path / "a.pt")
    asked = []
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: asked.append(k) or real(*a, **k))
    with pytest.raises(InputError, match="not dense"):
        open_checkpoint(tmp_path / "a.pt")
    assert [k["weights_only"] for k in asked] == [True]


def test_large_file_is_mapped_and_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(_torch_pickles, "SMALL", 100)
    (tmp_path / "a.pt").write_bytes(WHOLE[True])
    found = open_checkpoint(tmp_path / "a.pt").tensors()["w"]
    with pytest.raises(ValueError, match="read-only"):
        found[:] = 0
    np.testing.assert_array_equal(found, STATE["w"].numpy())


def test_damaged_numbers_are_noticed(tmp_path):
    raw = bytearray(WHOLE[True])
    at = raw.index(struct.pack("<6f", *range(6)))
    raw[at] ^= 1
    (tmp_path / "a.pt").write_bytes(raw)
    with pytest.raises(InputError, match="checksum"):
        open_checkpoint(tmp_path / "a.pt").tensors()


def test_few_bytes_that_ask_for_the_same_value_again_and_again_are_refused():
    text = b"X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20)
    begin = b"\x80\x02" + text + b"q\x00" + b"0c_codecs\nencode\nq\x010"
    encode = b"h\x01h\x00\x85R0"
    assert read(begin + encode * 2 + b"N.", 0, no_call, no_call).value is None  # the control
    with pytest.raises(Bad, match="more than the file holds"):
        read(begin + encode * 100 + b"N.", 0, no_call, no_call)
    listed = b"\x80\x02](" + b"N" * 100_000 + b"eq\x000cm\nC\nq\x010"
    for make in (b"h\x01h\x00\x810", b"h\x01h\x00}\x920"):
        with pytest.raises(Bad, match="more than the file holds"):
            read(listed + make * 800 + b"N.", 0, no_call, no_call)


def test_settings_that_stand_in_each_other_come_to_an_end():
    nested = [1]
    for _ in range(10):
        nested = [nested] * 10
    began = time.monotonic()
    torch_file.plain({"a": nested})
    assert time.monotonic() - began < 5
    wide = [0] * 10_000
    with pytest.raises(InputError, match="entries"):
        list(torch_file._walk({"a": [wide] * 10_000}, ""))


def nested(levels, width, bottom=b"K\x01"):
    """A pickle of tuples in which one tuple stands `width` times in the next, used as a key."""
    memo = b"".join(
        b"0(" + b"h" + bytes([i]) + (b"h" + bytes([i])) * (width - 1) + b"tq" + bytes([i + 1])
        for i in range(levels)
    )
    return b"\x80\x02" + bottom + b"q\x00" + memo + b"}h" + bytes([levels]) + b"K\x00s."


@pytest.mark.parametrize(("levels", "width"), [(3, 2000), (40, 2), (4, 200)])
def test_key_that_holds_one_tuple_many_times_is_refused_at_once(levels, width):
    started = time.process_time()
    with pytest.raises(Bad, match="a key of nested tuples"):
        read(nested(levels, width), 0, no_call, lambda pid: None)
    assert time.process_time() - started < 0.5


def test_what_is_left_to_torch_is_vetted_to_its_end(tmp_path):
    """Behind a storage that only torch knows stands a key that would be hashed for ever."""
    beyond = b"\x80\x02(U\x07storagectorch\nQInt8Storage\nU\x010U\x03cpuK\x01tQ0"
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", beyond + nested(40, 2)[2:])
        archive.writestr("a/data/0", b"\0" * 4)
    started = time.process_time()
    with pytest.raises(InputError, match="a key of nested tuples"):
        open_checkpoint(tmp_path / "a.pt")
    assert time.process_time() - started < 2


def test_dict_that_stands_in_itself_ends(tmp_path):
    tree = {"net": {"w": torch.ones(2, 3)}}
    tree["model"] = tree
    torch.save(tree, tmp_path / "a.pt")
    shapes = open_checkpoint(tmp_path / "a.pt").shapes
    assert set(shapes.values()) == {(2, 3)}
    assert len(shapes) <= torch_file.MAX_DEPTH


def test_tree_of_shared_dicts_that_torch_has_loaded_is_looked_at_once(tmp_path):
    leaf = {"w": torch.ones(2)}
    for _ in range(torch_file.MAX_DEPTH):
        leaf = {str(i): leaf for i in range(50)}
    started = time.process_time()
    found = torch_file._leaves(tmp_path, leaf)
    assert time.process_time() - started < 1
    assert found["0"] is found["1"]
