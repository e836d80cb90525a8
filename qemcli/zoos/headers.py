"""The index of a Hub repository by its headers alone: no weights are fetched.

A safetensors file is asked for its header over HTTP ranges; what comes is laid into a folder of
files that are as long as the real ones and empty behind their headers, and that folder is read like
any other. Byte-identical files are found by the hashes that the repository states.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qemcli.errors import InputError, UsageError
from qemcli.formats._safetensors_header import header_of
from qemcli.hub import fetching
from qemcli.hub.fetching import PAUSES, THREADS, Copy
from qemcli.hub.ranges import reader
from qemcli.hub.reference import PREFIX, Reference
from qemcli.hub.repository import File, Passing, quiet
from qemcli.spaces import WeightSpace, opaque
from qemcli.writing import beside
from qemcli.zoos import tables
from qemcli.zoos.layouts import folder as folders
from qemcli.zoos.layouts.indexed import INDEX, KEY, VERSION
from qemcli.zoos.scan import SUFFIXES
from qemcli.zoos.sources import arch_key

if TYPE_CHECKING:
    import pandas

HEADED = ".safetensors"
FIRST = 100_000  # bytes of the first request: most headers are shorter
SMALL = 8 << 20  # bytes of what is fetched whole: config.json, an index of shards, labels
UNREAD = "only its size and hash are known: its header is not read over the network"
Advance = Callable[[int], None]


@dataclass
class Headers:
    """What is to be read of a repository: its files with headers, and the small ones that explain
    them."""

    copy: Copy
    headed: tuple[File, ...]
    small: tuple[File, ...]
    unread: tuple[File, ...]
    failures: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, text: str) -> Headers:
        """Look at a repository; UsageError for anything else, InputError where it has no
        checkpoint."""
        if not text.startswith(PREFIX):
            raise UsageError(f"{text}: --headers is for hf://owner/name", "leave it out")
        copy = fetching.look(Reference.parse(text))
        files = copy.tree.select()
        headed = tuple(f for f in files if f.path.endswith(HEADED))
        folders_of = {PurePosixPath(f.path).parent for f in headed}
        small = tuple(f for f in files if _explains(f, folders_of))
        others = tuple(f for f in files if f not in headed and f.path.endswith(SUFFIXES))
        if not headed and not others:
            raise InputError(f"{text}: no checkpoint among its {len(files)} files")
        return cls(copy, headed, small, others)

    @property
    def pinned(self) -> Reference:
        """The repository at its commit."""
        return replace(self.copy.tree.ref.at(self.copy.tree.commit), path="")

    def summary(self) -> dict[str, Any]:
        """What a dry run says."""
        return {
            "source": str(self.pinned),
            "files": len(self.headed) + len(self.unread),
            "bytes": sum(file.size for file in self.headed + self.unread),
            "headers_to_read": len(self.headed),
        }

    def index(
        self, out: Path, activation: str | None = None, advance: Advance = lambda n: None
    ) -> dict[str, Any]:
        """Write OUT/index.parquet, beside and renamed; returns the summary with its `failed`."""
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out}: a file is in the way")
        with TemporaryDirectory(prefix="qem-headers-") as mirror:
            root = Path(mirror)
            self._mirror(root, advance)
            table, spaces = self._rows(root, activation)
        target = out / INDEX
        stated = {"version": VERSION, "spaces": spaces, "source": self._source()}
        beside(target, lambda path: _write(table, stated, path))
        copies = table["copy_of"].notna()
        return {
            "index": str(target),
            "source": str(self.pinned),
            "checkpoints": len(table),
            "architectures": table["arch"].value_counts().to_dict(),
            "identical": int(copies.sum()),
            "bytes": int(table["size"].sum()),
            "failed": sorted(self.failures, key=lambda item: item["checkpoint"]),
        }

    def _source(self) -> dict[str, str]:
        return {"layout": "hub", "ref": str(self.pinned)}

    def _mirror(self, root: Path, advance: Advance) -> None:
        """Lay the headers and the small files into a folder."""
        small = fetching.fetch_files(self.copy, self.small) if self.small else root
        for file in self.small:
            target = root / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((small / file.path).read_bytes())
        with quiet(), ThreadPoolExecutor(THREADS) as pool:
            tasks = {pool.submit(self._lay, root, file): file for file in self.headed}
            try:
                for task in as_completed(tasks):
                    self._laid(tasks[task], task.result)
                    advance(1)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _laid(self, file: File, result: Callable[[], None]) -> None:
        try:
            result()
        except InputError as error:
            reason = error.message.removeprefix(f"{file.path}: ")
            self.failures.append({"checkpoint": file.path, "reason": reason})

    def _lay(self, root: Path, file: File) -> None:
        raw = self._header(file)
        target = root / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as stream:
            stream.write(raw)
            stream.truncate(file.size)  # a hole: it takes no room

    def _header(self, file: File) -> bytes:
        """The header's bytes, checked; InputError where it is none."""
        asked: dict[int, bytes] = {}
        ask = reader(self.pinned, self.copy.tree.commit, file.path)

        def read(start: int, count: int) -> bytes:
            asked[start] = _patiently(lambda: ask(start, count))
            return asked[start]

        header_of(read, file.size, file.path, FIRST)
        raw = b"".join(asked[start] for start in sorted(asked))
        return raw[: 8 + int.from_bytes(raw[:8], "little")]

    def _rows(self, root: Path, activation: str | None) -> tuple[pandas.DataFrame, dict[str, str]]:
        import pandas

        found: list[dict[str, Any]] = []
        spaces: dict[str, WeightSpace] = {}
        try:
            zoo = folders.open(root, activation)
        except InputError as error:
            if not self.unread:
                raise InputError(
                    error.message.replace(str(root), str(self.pinned)), error.hint
                ) from None
        else:
            self.failures += zoo.failures
            spaces |= zoo.spaces
            found = zoo.index.drop(columns=["uid", "mtime"], errors="ignore").to_dict("records")
        nothing = opaque({}, UNREAD)
        known = {str(row["file"]) for row in found}
        for file in self.unread:
            if not any(str(parent) in known for parent in PurePosixPath(file.path).parents):
                found.append(_unread(file, arch_key(nothing)))
                spaces[arch_key(nothing)] = nothing
        hashes = self._hashes()
        for row in found:
            row["hash"] = _hash_of(str(row["file"]), hashes)
        table = pandas.DataFrame(found).sort_values("checkpoint", ignore_index=True)
        table.insert(0, "uid", range(len(table)))
        first = table.groupby("hash")["checkpoint"].transform("first")
        table["copy_of"] = first.where(first != table["checkpoint"], None)
        return table, {arch: space.to_json() for arch, space in spaces.items()}

    def _hashes(self) -> dict[str, str]:
        files = self.headed + self.unread
        return {f.path: f"sha256:{f.sha256}" if f.sha256 else f"git:{f.blob}" for f in files}


def _explains(file: File, near: set[PurePosixPath]) -> bool:
    """True for what says something of the checkpoints: their configuration, shards, labels."""
    path = PurePosixPath(file.path)
    told = path.name == "config.json" or path.name.endswith(f"{HEADED}.index.json")
    return file.size <= SMALL and ((told and path.parent in near) or path.name in tables.NAMES)


def _patiently(what: Callable[[], bytes]) -> bytes:
    for pause in PAUSES:
        try:
            return what()
        except Passing:
            time.sleep(pause)
    return what()


def _unread(file: File, arch: str) -> dict[str, Any]:
    suffix = PurePosixPath(file.path).suffix.lstrip(".")
    row = {"checkpoint": file.path, "file": file.path, "arch": arch, "parameters": 0}
    return {**row, "coverage": 0.0, "format": suffix, "size": file.size}


def _hash_of(path: str, hashes: dict[str, str]) -> str:
    """A file's hash; of a checkpoint in several files that of their names and hashes."""
    if path in hashes:
        return hashes[path]
    prefix = "" if path == "." else f"{path}/"
    parts = [
        f"{name.removeprefix(prefix)} {value}"
        for name, value in sorted(hashes.items())
        if name.startswith(prefix)
        and "/" not in name.removeprefix(prefix)
        and name.endswith(HEADED)
    ]
    if len(parts) == 1:
        return parts[0].split(" ")[-1]
    return f"parts:{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()}"


def _write(table: pandas.DataFrame, stated: dict[str, Any], path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    mixed = [c for c in table if table[c].dtype == object]
    plain = {c: table[c].map(lambda v: v if v is None or v != v else str(v)) for c in mixed}
    arrow = pyarrow.Table.from_pandas(table.assign(**plain), preserve_index=False)
    arrow = arrow.replace_schema_metadata({KEY: json.dumps(stated)})
    parquet.write_table(arrow, path, compression="zstd")
