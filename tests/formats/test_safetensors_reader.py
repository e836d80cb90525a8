"""The strict header reader: it agrees with the library or is stricter, and never breaks."""

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load, save
from safetensors.torch import save_file

from qemcli.checkpoints import open_checkpoint
from qemcli.errors import InputError
from qemcli.formats import _safetensors_header

RNG = np.random.default_rng(0)
STATE = {
    "0.weight": RNG.standard_normal((4, 3), dtype=np.float32),
    "0.bias": RNG.standard_normal(4, dtype=np.float32),
    "count": np.array(7),
}
WHOLE = save(STATE, {"activation": "relu"})


def build(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(shape=(2,), begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_reader_agrees_with_the_library(tmp_path):
    (tmp_path / "a").write_bytes(WHOLE)  # by its bytes: the suffix says nothing
    found = open_checkpoint(tmp_path / "a")
    assert found.format == "safetensors"
    assert found.metadata == {"activation": "relu"}
    assert {n: np.dtype(d) for n, d in found.dtypes.items()} == {
        n: a.dtype for n, a in STATE.items()
    }
    for name, array in found.tensors().items():
        np.testing.assert_array_equal(array, STATE[name])
    assert dict(found.others()) == {"count": "int64: a counter or a mask, not weights"}


def test_truncation_at_every_byte_is_one_clear_error(tmp_path):
    file = tmp_path / "cut.safetensors"
    for count in range(len(WHOLE)):
        file.write_bytes(WHOLE[:count])
        with pytest.raises(InputError, match=r"cut short|JSON|header|no format"):
            open_checkpoint(file)
    file.write_bytes(WHOLE[:-1])
    with pytest.raises(InputError, match=f"needs {len(WHOLE)} bytes, has {len(WHOLE) - 1}"):
        open_checkpoint(file)


PAIR = b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}"
HOSTILE = {
    "trailing": (WHOLE + b"PK", "too many"),
    "twice": (build(PAIR, b"\0" * 8), "stands twice"),
    "metadata twice": (build(b'{"__metadata__":{"a":"1","a":"2"}}'), "stands twice"),
    "overlap": (build({"a": entry(), "b": entry((2,), 4, 12)}, b"\0" * 12), "overlaps"),
    "hole": (build({"a": entry(), "b": entry((2,), 12, 20)}, b"\0" * 20), "hole"),
    "hole at the start": (build({"a": entry((2,), 4, 12)}, b"\0" * 12), "hole"),
    "reversed": (build({"a": entry((2,), 8, 0)}, b"\0" * 8), "offsets say -8"),
    "wrong size": (build({"a": entry((3,))}, b"\0" * 8), "needs 12 bytes"),
    "overflow": (build({"a": entry((2**40, 2**40))}, b"\0" * 8), "too large"),
    "negative": (build({"a": entry((-2,))}, b"\0" * 8), "no counts"),
    "true as a size": (build({"a": entry((True,), 0, 4)}, b"\0" * 4), "no counts"),
    "float size": (build({"a": entry((2.0,))}, b"\0" * 8), "no counts"),
    "dtype": (build({"a": entry(dtype="F31")}, b"\0" * 8), "unknown dtype"),
    "extra field": (build({"a": {**entry(), "x": 1}}, b"\0" * 8), "nothing else"),
    "no object": (build({"a": 3}), "needs dtype"),
    "metadata numbers": (build({"__metadata__": {"a": 1}}), "not strings"),
    "NUL": (build({"a\0b": entry()}, b"\0" * 8), "NUL"),
    "not UTF-8": (build(b'{"\xff":{}}'), "UTF-8"),
    "NaN": (build(b'{"a":NaN}'), "NaN"),
    "nested": (build(b'{"a":' + b"[" * 100_000), "JSON"),
    "huge number": (build(b'{"a":' + b"9" * 5000 + b"}"), "JSON|needs dtype"),
    "length 2^62": (struct.pack("<Q", 2**62) + b"{" * 9, "over the limit"),
    "length over the cap": (struct.pack("<Q", 100_000_001) + b"{" * 9, "over the limit"),
    "length over the file": (struct.pack("<Q", 5000) + b"{}", "needs 5008 bytes, has 10"),
    "empty": (b"", "empty or cut short"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header_is_refused_with_its_reason(name, tmp_path):
    data, reason = HOSTILE[name]
    file = tmp_path / "x.safetensors"
    file.write_bytes(data)
    with pytest.raises(InputError, match=reason) as caught:
        open_checkpoint(file)
    assert caught.value.message.startswith(str(file))
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400
    assert caught.value.hint


def test_many_tensors_are_read_and_too_many_refused(tmp_path, monkeypatch):
    header = {f"t{i}": entry((0,), 0, 0) for i in range(3000)}
    file = tmp_path / "many.safetensors"
    file.write_bytes(build(header))
    assert len(open_checkpoint(file).shapes) == 3000
    monkeypatch.setattr(_safetensors_header, "MAX_TENSORS", 2999)
    with pytest.raises(InputError, match="3000 tensors"):
        open_checkpoint(file)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_float_is_decoded_as_torch_does(dtype, tmp_path):
    bits = {2: torch.int16, 1: torch.uint8}.get(dtype.itemsize)
    codes = torch.arange(2**16 if dtype.itemsize == 2 else 256)
    tensor = codes.to(bits).view(dtype) if bits else torch.randn(9, dtype=dtype)
    save_file({"a": tensor}, tmp_path / "a")
    found = open_checkpoint(tmp_path / "a").tensors()["a"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    np.testing.assert_array_equal(found, tensor.to(wide).numpy())
    assert found.dtype == (np.float64 if dtype == torch.float64 else np.float32)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_mutated_bytes_are_read_as_the_library_does_or_refused(tmp_path_factory, data):
    raw = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, 250))] = data.draw(st.integers(0, 255))
    raw = bytes(raw[: data.draw(st.integers(0, len(raw) + 20))])
    file = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    file.write_bytes(raw)
    try:
        found = open_checkpoint(file)
        mine = found.tensors()
    except InputError:
        return
    theirs = load(raw)
    assert set(theirs) == set(found.shapes)
    for name, array in mine.items():
        np.testing.assert_array_equal(array, theirs[name].astype(array.dtype))


def test_library_accepts_what_we_refuse_only_where_we_are_stricter():
    accepted = set()
    for name, (data, _) in HOSTILE.items():
        try:
            load(data)
            accepted.add(name)
        except (SafetensorError, ValueError, KeyError, TypeError, OverflowError):
            continue
    assert {"twice"} <= accepted
    assert accepted <= {"twice", "metadata twice", "extra field", "NUL", "no object"}


def test_file_that_shrinks_after_opening_is_noticed(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(WHOLE)
    opened = open_checkpoint(file)
    file.write_bytes(WHOLE[:-40])
    with pytest.raises(InputError, match="changed while it was read"):
        opened.tensors()
