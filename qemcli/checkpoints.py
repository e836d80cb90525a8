"""Checkpoints: one file of trained weights, or a directory of the transformers library, opened
lazily, whatever its format.

A format is a module of formats/ with `sniff(path) -> bool` (by the first bytes, never by the suffix
alone) and `open(path) -> Checkpoint`.
"""

from __future__ import annotations

import functools
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from qemcli import recognition, registry
from qemcli.batch_norm import FOLDED, BatchNorm, batch_norms, without
from qemcli.errors import EnvironmentFailure, InputError, UnsupportedError, UsageError
from qemcli.spaces import Opaque, WeightSpace, opaque


class RunsCode(InputError):
    """A pickle, whose content is had only by running it: see formats/_unpickling.py (exit 3)."""


FLOATS = frozenset(
    {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"}
)  # what we decode to float32 or float64
COUNTERS = frozenset({"bool", "int16", "int32", "int64", "uint16", "uint32", "uint64"})


@dataclass(frozen=True)
class Checkpoint:
    """What a file says of itself before a single weight is read.

    Attributes:
        path: the file.
        format: the name of the module in formats/ that read it.
        shapes: tensor name -> shape as stored, in the order of the file.
        dtypes: tensor name -> dtype under torch's name.
        metadata: strings and numbers that stand beside the tensors.
        reader: names -> arrays as stored, float32 or float64; raises InputError.
        ordered: whether the order of `shapes` is the network's (safetensors sorts by name).
        skipped: (name, reason) of what the file holds besides.
        refusal: why the network is none that qem acts on, where the file itself says so.
    """

    path: Path
    format: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, Any]
    reader: Callable[[Iterable[str]], dict[str, np.ndarray]]
    ordered: bool = True
    skipped: tuple[tuple[str, str], ...] = field(default=())
    refusal: str | None = None

    def floats(self) -> dict[str, tuple[int, ...]]:
        """The tensors of floats that the file holds, in torch's layout."""
        floats = {n: s for n, s in self.shapes.items() if self.dtypes[n] in FLOATS}
        return recognition.turned(floats)

    @cached_property
    def norms(self) -> tuple[BatchNorm, ...]:
        """The batch normalisations that are folded into their layers: none where the file states
        its weight space."""
        return () if "qem.space" in self.metadata else batch_norms(self.floats())

    def weights(self) -> dict[str, tuple[int, ...]]:
        """The tensors that can be weights: floats, in torch's layout, without `norms`."""
        return without(self.floats(), self.norms)

    def others(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of every tensor whose dtype makes it no weight."""
        reasons = {n: _reason(d) for n, d in self.dtypes.items() if d not in FLOATS}
        return (*self.skipped, *reasons.items())

    def folds(self, space: WeightSpace) -> tuple[BatchNorm, ...]:
        """The norms that are folded into the tensors of this space: none where it is only
        listed."""
        return () if isinstance(space, Opaque) else self.norms

    def holds(self, space: WeightSpace) -> bool:
        """Whether the file has every tensor of the space, in its shape."""
        found = without(self.floats(), self.folds(space))
        return all(found.get(name) == shape for name, shape in space.shapes.items())

    def dtype(self, name: str) -> str:
        """The dtype of one of `weights`; of a bias that a norm makes that of its weight."""
        made = {norm.bias: norm.weight for norm in self.norms if norm.made}
        return self.dtypes[made.get(name, name)]

    def space(self, activation: str | None = None, heads: int | None = None) -> WeightSpace:
        """The weight space; raises InputError or UnsupportedError where there is none."""
        if self.metadata.get("qem.kind") == "predictor":
            raise InputError(
                f"{self.path}: a qem predictor, which reads networks and is none itself",
                "see `qem models`, or qem verify-invariance FILE",
            )
        if self.refusal is not None:
            raise UnsupportedError(
                f"{self.path}: {self.refusal}", "qem index lists it all the same"
            )
        self._refuse_packed()
        try:
            space = recognition.infer(
                self.weights(), self.metadata, activation, self.ordered, heads
            )
        except InputError as error:
            raise type(error)(f"{self.path}: {error.message}", error.hint) from None
        folded = [(name, norm.reason) for norm in self.norms for name in norm.own]
        return recognition.with_skipped(space, (*self.others(), *folded))

    def _refuse_packed(self) -> None:
        """UnsupportedError where most numbers are whole: what floats there are then scale them."""
        sizes = {n: math.prod(s) for n, s in self.shapes.items()}
        whole = [n for n, d in self.dtypes.items() if "int" in d and len(self.shapes[n]) > 1]
        if sum(sizes[n] for n in whole) > sum(sizes[n] for n in sizes if self.dtypes[n] in FLOATS):
            raise UnsupportedError(
                f"{self.path}: its weights are whole numbers ('{whole[0]}'): it is quantised",
                "give the original, which was not",
            )

    def listed(self, activation: str | None = None, heads: int | None = None) -> WeightSpace:
        """The weight space; `Opaque`, with the reason, where the file is sound but no space fits.

        Raises InputError for a predictor, a damaged `qem.space`, and a file without weights.
        """
        try:
            return self.space(activation, heads)
        except InputError as error:
            left, skipped = recognition.weights(self.floats())
            if not left or {"qem.kind", "qem.space"} & set(self.metadata):
                raise
            reason = error.message.removeprefix(f"{self.path}: ").partition("; qem acts on")[0]
        found = opaque(left, reason)
        return recognition.with_skipped(found, (*skipped.items(), *self.others()))

    def coverage(self, space: WeightSpace) -> float:
        """The share of the file's parameters whose place in the weight space is known."""
        if isinstance(space, Opaque):
            return 0.0
        foreign = sum(
            math.prod(self.shapes[n])
            for n, reason in space.skipped
            if n in self.shapes and self.dtypes[n] not in COUNTERS and not _no_weights(reason)
        )
        return space.size / max(space.size + foreign, 1)

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """name -> float32 or float64 array as the file holds it, torch's layout; raises InputError
        for a broken file."""
        wanted = list(self.floats() if names is None else names)
        turns = recognition.turns(self.shapes)
        arrays = self.reader(wanted)
        return {n: a.transpose(turns[n]) if n in turns else a for n, a in arrays.items()}

    def folded(self, space: WeightSpace) -> dict[str, np.ndarray]:
        """name -> array of every tensor of the space: `norms` are folded in where it is
        understood."""
        norms = self.folds(space)
        made = {norm.bias for norm in norms if norm.made}
        own = [name for norm in norms for name in norm.own]
        arrays = self.tensors([*(n for n in space.names if n not in made), *own])
        for norm in norms:
            arrays |= norm.folded(arrays)
        return {name: arrays[name] for name in space.names}

    def row(self, space: WeightSpace) -> np.ndarray:
        """(D,) float32: the parameters in the order of the space, with `norms` folded in."""
        arrays = self.folded(space)
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf: flagged, not fatal
            return np.concatenate([arrays[n].astype(np.float32).ravel() for n in space.names])


def _no_weights(reason: str) -> bool:
    return reason == recognition.OPTIMISER or reason.endswith("not weights") or FOLDED in reason


def _reason(dtype: str) -> str:
    if dtype in COUNTERS:
        return f"{dtype}: a counter or a mask, not weights"
    return f"unsupported dtype {dtype}"


# The format that a file of this suffix usually has is asked first; its bytes still decide.
USUAL = {".safetensors": "safetensors", ".npy": "npy", ".npz": "npy"} | dict.fromkeys(
    (".pt", ".pth", ".bin", ".ckpt"), "torch_file"
)


@functools.cache
def _formats(suffix: str) -> tuple[ModuleType, ...]:
    first = ("directory", USUAL.get(suffix))  # a folder is no file of any other format
    names = sorted(registry.names("formats"), key=lambda n: first.index(n) if n in first else 2)
    return tuple(registry.load("formats", name) for name in names)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open one checkpoint lazily.

    Raises:
        UsageError: nothing is there, or it is not a file.
        EnvironmentFailure: the file may not be read.
        InputError: it is no checkpoint; the message says what it is and what to do.
    """
    path = Path(path)
    for module in _formats(path.suffix):
        if module.sniff(path):
            return module.open(path)
    head = peek(path)
    what, hint = identify(head)
    raise (RunsCode if hint == PICKLE_HINT else InputError)(f"{path}: {what}", hint)


def peek(path: Path, count: int = 512) -> bytes:
    """The first bytes of a regular file; never blocks on a FIFO or a device."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    if stat.S_ISDIR(mode):
        held = any(Path(path, name).is_file() for name in WHOLE)
        what = "weights without the config.json that says how they are run" if held else "a zoo"
        raise UsageError(
            f"{path}: a directory, not a checkpoint", f"it may be {what}: qem index {path}"
        )
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: not a regular file (a pipe, socket or device)")
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except PermissionError:
        raise EnvironmentFailure(f"{path}: permission denied") from None


WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
FETCH = "download the file itself: `qem download`, or `git lfs pull`"
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer, not the weights", FETCH),
    (b"\x1f\x8b", "gzip data", "decompress it first (gunzip, tar xzf)"),
    (b"\xfd7zXZ", "xz data", "decompress it first (unxz, tar xJf)"),
    (b"BZh", "bzip2 data", "decompress it first (bunzip2)"),
    (b"7z\xbc\xaf", "a 7z archive", "extract it first"),
    (b"PK\x03\x04", "a zip archive that holds no checkpoint", "extract it and name the folder"),
    (b"PK\x05\x06", "an empty zip archive", "download it again"),
    (b"\x89HDF\r\n", "an HDF5 file (Keras .h5)", "convert it to safetensors or npz"),
    (b"GGUF", "a quantised GGUF file", "its weights are packed integers: give the original"),
    (b"\x93NUMPY", "a damaged npy file", "download it again"),
    (b"\x89PNG", "a PNG image", "give a checkpoint"),
    (b"%PDF", "a PDF document", "give a checkpoint"),
    (b"\x7fELF", "a program", "give a checkpoint"),
)
TRUST = "or, of a source you trust, qem index (or inspect) --allow-pickle"
PICKLE_HINT = f"a pickle can run code and is not opened: save a state_dict with torch.save; {TRUST}"


def identify(head: bytes) -> tuple[str, str]:
    """(what the file really is, what to do) from its first bytes."""
    for magic, what, hint in _MAGIC:
        if head.startswith(magic):
            return what, hint
    text = head.lstrip().lower() if b"\0" not in head[:8] else b""
    if head[257:262] == b"ustar":
        return "a tar archive that holds no zoo qem knows", "extract it and name the folder"
    if len(head) < 8:
        return f"empty or cut short ({len(head)} bytes)", "download or write it again"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, not a checkpoint", "the download answered with a page: fetch it again"
    if text.startswith((b"{", b"[")):
        return "JSON text, not a checkpoint", "if it is an error message, fetch the file again"
    if is_pickle(head):
        return "a pickle, not a torch checkpoint", PICKLE_HINT
    return "no format that qem reads", f"it reads {', '.join(registry.names('formats'))}"


def is_pickle(head: bytes) -> bool:
    """A binary pickle (protocol 2 and up), or one of the text protocol's usual beginnings."""
    binary = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return binary or head.startswith((b"(dp", b"(lp", b"cposix\n", b"cos\n", b"c__builtin__\n"))
