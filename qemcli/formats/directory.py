"""A checkpoint directory of the transformers library: config.json beside model.safetensors or
pytorch_model.bin, in one file or in shards that an index names.

    config.json   model.safetensors
    config.json   model.safetensors.index.json {"weight_map": {tensor: shard}}   model-00001-of-...
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qemcli.checkpoints import Checkpoint
from qemcli.errors import InputError, QemError
from qemcli.families._config import CONFIG
from qemcli.formats import safetensors, torch_file

FILE = "config.json"
SINGLE = ("model.safetensors", "pytorch_model.bin")
SHARDED = tuple(f"{name}.index.json" for name in SINGLE)
MARKS = frozenset({FILE, *SINGLE, *SHARDED})
LARGEST = 64 << 20  # bytes of config.json and of an index of shards
AGAIN = "fetch it again"


def sniff(path: Path) -> bool:
    """A folder with an index of shards, or with config.json and weights, or whose config.json
    states a kind of model."""
    if not path.is_dir():
        return False
    if any((path / name).is_file() for name in SHARDED):
        return True
    if not (path / FILE).is_file():
        return False
    return any((path / name).is_file() for name in SINGLE) or _stated(path)


def _stated(path: Path) -> bool:
    try:
        return "model_type" in _object(path / FILE)
    except InputError:
        return False


def open(path: Path) -> Checkpoint:
    """The checkpoint, headers only; InputError for a shard that is missing, cut short or not the
    index's, and for a config.json that is no JSON."""
    parts = shards(path)
    config = _object(path / FILE) if (path / FILE).is_file() else None
    opened = {file: _open(path, file) for file in dict.fromkeys(parts.values())}
    if not parts:  # a single file
        file = next(name for name in SINGLE if (path / name).is_file())
        opened = {file: _open(path, file)}
        parts = dict.fromkeys(opened[file].shapes, file)
    lacking = [name for name, file in parts.items() if name not in opened[file].shapes]
    if lacking:
        raise InputError(
            f"{path}: '{parts[lacking[0]]}' has no tensor '{lacking[0]}', which its index names",
            AGAIN,
        )
    first = next(iter(opened.values()))
    said: dict[str, Any] = dict(first.metadata)
    if config is not None:
        said[CONFIG] = json.dumps(config)
    skipped = [pair for checkpoint in opened.values() for pair in checkpoint.skipped]
    return Checkpoint(
        path,
        "directory",
        {name: opened[file].shapes[name] for name, file in parts.items()},
        {name: opened[file].dtypes[name] for name, file in parts.items()},
        said,
        _Reader(path, parts, opened),
        ordered=False,
        skipped=tuple(skipped),
        refusal=first.refusal,
    )


def shards(path: Path) -> dict[str, str]:
    """Tensor -> the file below `path` that an index says it lies in; empty for a single file.

    Raises InputError where there are no weights, or the index is damaged or points elsewhere.
    """
    if any((path / name).is_file() for name in SINGLE[:1]):
        return {}
    index = next((path / name for name in SHARDED if (path / name).is_file()), None)
    if index is None:
        if (path / SINGLE[1]).is_file():
            return {}
        raise InputError(
            f"{path}: config.json without weights ({' or '.join(SINGLE)}, or an index of shards)",
            "fetch the whole checkpoint, or convert it to safetensors",
        )
    found = _object(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise InputError(f"{path}: {index.name} has no weight_map", AGAIN)
    for name, file in found.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"{path}: {index.name} says that '{name}' lies in {file!r}", AGAIN)
    missing = sorted({file for file in found.values() if not (path / file).is_file()})
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{path}: the shard '{missing[0]}'{more} is missing", "fetch it")
    return found


def files(path: Path) -> list[Path]:
    """What the checkpoint consists of: its weights and config.json, as far as they are there."""
    names = [FILE, *SHARDED, *SINGLE]
    with suppress(InputError):  # opening it says what is wrong
        names += dict.fromkeys(shards(path).values())
    return [path / name for name in names if (path / name).exists()]


def _open(path: Path, name: str) -> Checkpoint:
    """One file of weights; a message names the file below the directory."""
    module = safetensors if safetensors.sniff(path / name) else torch_file
    try:
        return module.open(path / name)
    except QemError as error:
        reason = error.message.removeprefix(f"{path / name}: ")
        raise type(error)(f"{path}: '{name}': {reason}", error.hint) from None


def _object(file: Path) -> dict[str, Any]:
    """A JSON object; InputError where it is none."""
    where = f"{file.parent}: {file.name}"
    try:
        if file.stat().st_size > LARGEST:
            raise InputError(f"{where} has {file.stat().st_size} bytes: too large", AGAIN)
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error})", AGAIN) from None
    if not isinstance(found, dict):
        raise InputError(f"{where} is not a JSON object", AGAIN)
    return found


@dataclass(frozen=True)
class _Reader:
    """Reads tensors, each from the file that it lies in."""

    path: Path
    parts: dict[str, str]
    opened: dict[str, Checkpoint]

    def __call__(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        wanted: dict[str, list[str]] = {}
        for name in names:
            wanted.setdefault(self.parts[name], []).append(name)
        found: dict[str, np.ndarray] = {}
        for file, held in wanted.items():
            try:
                found |= self.opened[file].reader(held)
            except QemError as error:
                reason = error.message.removeprefix(f"{self.path / file}: ")
                raise type(error)(f"{self.path}: '{file}': {reason}", error.hint) from None
        return found
