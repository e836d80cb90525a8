"""Walking a folder of checkpoints: which files are checkpoints, and each one's weight space, once
for all files with the same header."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from qemcli.checkpoints import Checkpoint, identify, open_checkpoint, peek
from qemcli.errors import QemError
from qemcli.formats import directory
from qemcli.formats._unpickling import TWIN
from qemcli.spaces import WeightSpace
from qemcli.zoos.members import DEEPEST, TOO_DEEP, repository
from qemcli.zoos.sources import arch_key

# A file with one of these is a checkpoint, or a failure: it is never passed over.
SUFFIXES = (
    ".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".npy", ".h5", ".hdf5", ".keras",
    ".pkl", ".pickle", ".gguf", ".onnx",
)  # fmt: skip
OTHERS = (
    ".md", ".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".yaml", ".yml", ".toml", ".log",
    ".png", ".jpg", ".svg", ".pdf", ".html", ".py", ".sh", ".ipynb", ".gz", ".lock", ".tmp", ".rst",
    ".cfg", ".ini", ".sqlite", ".db",
)  # fmt: skip
_RUN_STATE = re.compile(
    r"^(optimizer|scheduler|scaler|trainer_state|training_args|rng_state)[\w.-]*$"
)
STATED = (  # what a checkpoint's weight space depends on, beside its tensors
    "qem.kind", "qem.space", "activation", "config.activation", "w0", "omega_0", "offset",
    "convention", "config.convention", directory.CONFIG,
)  # fmt: skip
_PART = re.compile(r"-\d{5}-of-\d{5}\.")
LABELS = (
    "test_accuracy", "test_loss", "train_accuracy", "train_loss", "val_accuracy", "val_loss",
    "seed", "step", "epoch", "run", "split", "final", "label", "image", "psnr", "steps",
    "imagenet_class_id", "dataset_chosen_targets",  # of Model-J, in the headers of its networks
)  # fmt: skip


class Entry(NamedTuple):
    """One checkpoint of a folder: its path below the root, size and modification time (ns)."""

    file: str
    size: int
    mtime: int


@dataclass
class Listing:
    """What lies below a root, in the order of the names."""

    entries: list[Entry] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    ignored: int = 0


def listing(root: Path) -> Listing:
    """Every checkpoint below `root`, itself included ("."): regular files only, and no link that
    leaves the tree. A directory of the transformers library is one checkpoint; what else lies in
    it, other such directories apart, is ignored."""
    found = Listing()
    inside = os.path.realpath(repository(root))
    _walk(found, str(root), "", inside)
    found.entries.sort()
    return found


def _walk(found: Listing, folder: str, below: str, inside: str, within: bool = False) -> None:
    with os.scandir(folder) as listed:
        items = sorted(listed, key=lambda item: item.name)
    names = {item.name for item in items}
    if names & directory.MARKS and directory.sniff(Path(folder)):
        within = True
        _note(found, below[:-1] or ".", _take_directory(found, Path(folder), below, inside))
    for item in items:
        relative = below + item.name
        if item.is_dir(follow_symlinks=False):
            if relative.count("/") == DEEPEST:
                _note(found, relative, TOO_DEEP)
            elif not item.name.startswith(".") and item.name != "__MACOSX":
                _walk(found, item.path, f"{relative}/", inside, within)
        elif within:
            found.ignored += item.name not in directory.MARKS and not _PART.search(item.name)
        elif item.name + TWIN in names:
            found.ignored += 1  # a pickle whose tensors lie beside it
        elif reason := _take(found, item, relative, inside):
            _note(found, relative, reason)


def _note(found: Listing, relative: str, reason: str | None) -> None:
    if reason:
        shown = os.fsencode(relative).decode("utf-8", "backslashreplace")
        found.failures.append({"checkpoint": shown, "reason": reason})


def _take_directory(found: Listing, folder: Path, below: str, inside: str) -> str | None:
    """List a checkpoint that is a directory, or say why it is none."""
    files = directory.files(folder)
    if any(os.path.commonpath([os.path.realpath(f), inside]) != inside for f in files):
        return "a link that leaves the folder is not followed"
    if not _unicode(below):
        return "its name is not UTF-8: rename it"
    found_at = [file.stat() for file in files]
    size, mtime = sum(s.st_size for s in found_at), max(s.st_mtime_ns for s in found_at)
    found.entries.append(Entry(below[:-1] or ".", size, mtime))
    return None


def _take(found: Listing, item: os.DirEntry[str], relative: str, inside: str) -> str | None:
    """List the file, or count it as ignored, or say why it is neither."""
    name = item.name
    suffix = name[name.rfind(".") :].lower() if "." in name else ""
    known = suffix in SUFFIXES
    other = not known and suffix in OTHERS
    if name[0] == "." or other or (name[0] in "osrt" and _RUN_STATE.match(name)):
        found.ignored += 1
        return None
    if item.is_symlink():
        target = os.path.realpath(item.path)
        if os.path.commonpath([target, inside]) != inside:
            return "a link that leaves the folder is not followed"
        if not os.path.isfile(target):
            return "a link to no file"
    status = item.stat()
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file (a pipe, socket or device)"
    if not known and not _looks_like_one(Path(item.path)):
        found.ignored += 1
        return None
    if "-of-" in name and _PART.search(name):
        return "one part of a checkpoint whose index (model.safetensors.index.json) is not there"
    if not relative.isascii() and not _unicode(relative):
        return "its name is not UTF-8: rename it"
    found.entries.append(Entry(relative, status.st_size, status.st_mtime_ns))
    return None


def _unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _looks_like_one(path: Path) -> bool:
    try:
        head = peek(path)
    except (QemError, OSError):
        return True  # the reader will say what is wrong with it
    return head[8:9] == b"{" or b"/data.pkl" in head or identify(head)[0].startswith("a pickle")


@dataclass
class Reader:
    """Opens checkpoints and remembers the weight space of every header it has met."""

    root: Path
    activation: str | None = None
    heads: int | None = None
    known: dict[Any, WeightSpace | QemError] = field(default_factory=dict)
    archs: dict[int, str] = field(default_factory=dict)

    def open(self, entry: Entry) -> tuple[Checkpoint, WeightSpace]:
        """The checkpoint and its space; raises a QemError that does not repeat the path."""
        path = self.root / entry.file
        try:
            checkpoint = open_checkpoint(path)
            return checkpoint, self.space(checkpoint)
        except QemError as error:
            raise type(error)(error.message.removeprefix(f"{path}: "), error.hint) from None

    def space(self, checkpoint: Checkpoint) -> WeightSpace:
        """The weight space, worked out once for equal tensors and equal statements about them."""
        said = checkpoint.metadata
        stated = tuple(str(said.get(k)) for k in STATED)
        key = (
            tuple(checkpoint.shapes.items()), tuple(checkpoint.dtypes.values()), stated,
            checkpoint.refusal,
        )  # fmt: skip
        if key not in self.known:
            try:
                self.known[key] = checkpoint.listed(self.activation, self.heads)
            except QemError as error:
                reason = error.message.removeprefix(f"{checkpoint.path}: ")
                self.known[key] = type(error)(reason, error.hint)
        found = self.known[key]
        if isinstance(found, QemError):
            raise type(found)(found.message, found.hint)
        return found

    def spaces(self) -> dict[str, WeightSpace]:
        """Arch id -> weight space of all that was met, without activation: rows say their own."""
        met = [space for space in self.known.values() if isinstance(space, WeightSpace)]
        return {self.arch(space): space.unstated() for space in met}

    def arch(self, space: WeightSpace) -> str:
        """The space's arch id, hashed once."""
        if id(space) not in self.archs:
            self.archs[id(space)] = arch_key(space)
        return self.archs[id(space)]


def labels(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The index columns that a checkpoint's own metadata fill: labels and `config.`
    hyper-parameters."""
    kept = {k: v for k, v in metadata.items() if k in LABELS or k.startswith("config.")}
    return {name: _value(value) for name, value in kept.items()}


def _value(value: Any) -> Any:
    """Metadata are strings in safetensors: a number is read as one."""
    if not isinstance(value, str):
        return value
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return read if isinstance(read, bool | int | float) else value


def scan(entries: list[Entry], reader: Reader) -> Iterator[dict[str, Any]]:
    """One index row a checkpoint, headers only; a row with `reason` for one that cannot be read."""
    for entry in entries:
        try:
            checkpoint, space = reader.open(entry)
        except QemError as error:
            yield {"checkpoint": entry.file, "reason": error.message}
            continue
        yield {
            "checkpoint": entry.file,
            "file": entry.file,
            **described(entry.size, checkpoint, space, reader),
            "mtime": entry.mtime,
            **labels(checkpoint.metadata),
        }


def described(
    size: int, checkpoint: Checkpoint, space: WeightSpace, reader: Reader
) -> dict[str, Any]:
    """The index columns that files with the same header share."""
    return {
        "arch": reader.arch(space),
        "parameters": space.size,
        "activation": space.activation,
        "coverage": checkpoint.coverage(space),
        "format": checkpoint.format,
        "size": size,
    }
