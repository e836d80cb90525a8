"""Keras: .h5, .hdf5, .weights.h5 and .keras, by h5py (the extra `qemcli[keras]`).

Old files (Keras 1, 2): groups named by layers, in the order of the attribute `layer_names`, each
with its `weight_names` (dense/kernel:0). New ones (Keras 3): layers/<layer>/vars/<n>, nameless
numbers that the layer's kind explains. Kernels stay as stored, input first; their names say so and
`recognition.turned` carries them to torch's order. Nothing is followed out of the file.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qemcli.checkpoints import FLOATS, Checkpoint, peek
from qemcli.errors import EnvironmentFailure, InputError

MAGIC = b"\x89HDF\r\n\x1a\n"
MAX_RATIO, MAX_FREE = 100, 1 << 28  # a tensor may be larger than this only if it packs less well
MAX_TENSORS, MAX_DEPTH = 100_000, 16
WEIGHTS = "model.weights.h5"  # inside a .keras file
OPTIMISER = "state of the optimiser or the run, not of the network"
# What the numbers under vars/ are: by the layer's name as Keras makes it, without its counter.
VARS = {
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "layer_normalization": ("gamma", "beta"),
    "embedding": ("embeddings",),
    "depthwise_conv2d": ("depthwise_kernel", "bias"),
}
_NUMBERED = re.compile(r"^(?P<layer>.*)/vars/(?P<n>\d+)$")
_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError)


def sniff(path: Path) -> bool:
    """HDF5's magic, or a zip whose first member is one of those that Keras writes."""
    head = peek(path)
    if head.startswith(MAGIC):
        return True
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    return head.startswith(b"PK\x03\x04") and name in (
        b"metadata.json", b"config.json", WEIGHTS.encode()
    )  # fmt: skip


def open(path: Path) -> Checkpoint:
    """The checkpoint, names and shapes only.

    Raises EnvironmentFailure without h5py, InputError for a damaged file and for one whose tensors
    lie in other files.
    """
    try:
        with _file(path) as (file, settings):
            places = dict(_places(file, path))
            order = [n for n in places if not _skipped(n)]
            shapes = {n: tuple(places[n].shape) for n in order}
            dtypes = {n: places[n].dtype.name for n in order}
            stored = {n: places[n].name for n in order}
            metadata = {**_settings(file), **settings}
    except _ERRORS as error:
        raise _refusal(path, error) from None
    if not order:
        raise InputError(f"{path}: an HDF5 file without a tensor", "give the weights of a model")
    return Checkpoint(
        path,
        "keras_h5",
        shapes,
        dtypes,
        metadata,
        lambda names: _read(path, stored, names),
        ordered=not any(_NUMBERED.match(name) for name in stored.values()),
        skipped=tuple((n, OPTIMISER) for n in places if _skipped(n)),
    )


@contextmanager
def _file(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(the open HDF5 file, what a .keras file's config.json says)."""
    try:
        import h5py
    except ImportError:
        raise EnvironmentFailure(
            f"{path}: a Keras file, which needs h5py", 'pip install "qemcli[keras]"'
        ) from None
    if peek(path, 8) == MAGIC:
        with h5py.File(path, "r") as file:
            yield file, {}
        return
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(WEIGHTS)
        if info.file_size > MAX_FREE and info.file_size > MAX_RATIO * max(info.compress_size, 1):
            raise InputError(f"{path}: '{WEIGHTS}' unpacks to {info.file_size} bytes: a zip bomb")
        config = archive.getinfo("config.json") if "config.json" in archive.namelist() else None
        small = config is not None and config.file_size < MAX_FREE
        settings = _activation(archive.read("config.json")) if small else {}
        # Stored by Keras, so that it can be sought in where it lies.
        with archive.open(info) as inside, h5py.File(inside, "r") as file:
            yield file, settings


def _refusal(path: Path, error: BaseException) -> InputError:
    said = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
    return InputError(
        f"{path}: an HDF5 file that is cut short or damaged ({said})", "download or write it again"
    )


def _places(file: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """(our name, data set) of every tensor, in the order of the network where the file says it."""
    root = file.get("model_weights", file)
    if "layer_names" in root.attrs:
        yield from _old(root, path)
    else:
        found = list(_walk(root, path, ""))
        count: dict[str, int] = {}
        for name, _ in found:
            layer = name.rpartition("/")[0]
            count[layer] = count.get(layer, 0) + 1
        for name, data in found:
            yield _named(name, count[name.rpartition("/")[0]], data.ndim), data
    for name in ("optimizer", "optimizer_weights"):
        if root is not file and name in file:
            yield from _walk(file[name], path, name)


def _old(root: Any, path: Path) -> Iterator[tuple[str, Any]]:
    for layer in _texts(root.attrs["layer_names"]):
        for name in _texts(root[layer].attrs.get("weight_names", ())):
            yield name, _checked(root[layer][name], path)


def _texts(values: Any) -> list[str]:
    return [v.decode("utf-8") if isinstance(v, bytes) else str(v) for v in values]


def _walk(group: Any, path: Path, below: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every data set below a group; links to other files, and to what was met, are refused."""
    import h5py

    if depth > MAX_DEPTH:
        raise ValueError("groups nested too deeply")
    for key in sorted(group, key=_natural):
        link = group.get(key, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"'{key}' is a link, which is not followed")
        name = f"{below}/{key}" if below else key
        item = group[key]
        if isinstance(item, h5py.Dataset):
            yield name, _checked(item, path)
        else:
            yield from _walk(item, path, name, depth + 1)


def _checked(data: Any, path: Path) -> Any:
    """The data set; ValueError where it lies in other files or claims to unpack to too much."""
    import h5py

    if not isinstance(data, h5py.Dataset) or data.is_virtual or data.external:
        raise ValueError(f"'{getattr(data, 'name', data)}' is no tensor of this file")
    size = math.prod(data.shape or ()) * data.dtype.itemsize
    stored = data.id.get_storage_size()
    if size > MAX_FREE and size > MAX_RATIO * max(stored, 1):
        raise ValueError(f"'{data.name}' unpacks to {size} bytes from {stored}")
    return data


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p]


def _named(name: str, count: int, dims: int) -> str:
    """`layers/dense/vars/0` -> `layers/dense/kernel`; a name that says what it is stays."""
    found = _NUMBERED.match(name)
    if not found or name.startswith("optimizer"):
        return name
    layer, n = found["layer"], int(found["n"])
    kind = re.sub(r"_\d+$", "", layer.rpartition("/")[2])
    usual = ("kernel", "bias") if count <= 2 and (n == 1 or dims in (2, 4)) else ()
    said = VARS.get(kind, usual)
    return f"{layer}/{said[n]}" if n < len(said) else name


def _skipped(name: str) -> bool:
    return name.startswith(("optimizer", "seed_generator")) or "/seed_generator" in name


def _settings(file: Any) -> dict[str, Any]:
    raw = file.attrs.get("model_config")
    return _activation(raw) if isinstance(raw, str | bytes) else {}


def _activation(raw: str | bytes) -> dict[str, Any]:
    """{"activation": name} where all layers but the last have the same one."""
    try:
        layers = json.loads(raw)["config"]["layers"]
        each = [layer["config"] for layer in layers]
        acts = [c["activation"] for c in each if isinstance(c.get("activation"), str)]
        own = [layer["class_name"] for layer in layers]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    pooled = any("MaxPooling" in str(name) for name in own)  # max(-x) is not -max(x)
    inner = {a for a in acts[:-1] if a != "linear"}
    if len(inner) != 1 or (pooled and inner & {"tanh", "sin"}):
        return {}
    return {"activation": inner.pop()}


def _read(path: Path, stored: dict[str, str], names: Iterable[str]) -> dict[str, np.ndarray]:
    try:
        with _file(path) as (file, _):
            return {name: _float(file[stored[name]]) for name in names}
    except _ERRORS as error:
        raise _refusal(path, error) from None


def _float(data: Any) -> np.ndarray:
    if data.dtype.name not in FLOATS:
        raise ValueError(f"unsupported dtype {data.dtype}")
    array = data[()]
    return array if array.dtype.name == "float64" else array.astype(np.float32)
