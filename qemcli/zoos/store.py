"""The writer of our own zoo layout: blocks are written whole or not at all, and finishing makes
the index.

weights/<arch>/shard-00000.safetensors     one tensor "weights" [n, D], the weight space in the
header
parts/part-00000.parquet                   the rows of that block; gone once the index is there
index.parquet, zoo.json                    written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from qemcli.errors import InputError, UsageError
from qemcli.spaces import WeightSpace
from qemcli.writing import beside
from qemcli.zoos.alone import LOCK, alone, refuse_busy, sweep
from qemcli.zoos.statistics import describe

VERSION = 1
# What a store writes itself; everything else in an index may be carried over to another zoo.
OWN_COLUMNS = frozenset(
    {
        "uid", "arch", "shard", "row", "file", "finite", "parameters", "sha256", "ties", "size",
        "offset", "packed",
    }
)  # fmt: skip


def arch_id(space: WeightSpace) -> str:
    """12 hexadecimal digits that name an architecture: its ordered tensor names and shapes."""
    record = json.dumps([[name, list(shape)] for name, shape in space.shapes.items()])
    return hashlib.sha256(record.encode()).hexdigest()[:12]


class Store:
    """A zoo in the making. Blocks may be written in any order and by several processes."""

    def __init__(
        self, folder: Path, resume: bool = False, recipe: dict[str, Any] | None = None
    ) -> None:
        """A zoo in `folder`, new or gone on with; `recipe` is all that its blocks depend on.

        Nothing is written before `begin`, so what is refused leaves nothing behind.

        Raises UsageError where the folder holds something else, or a zoo begun by another recipe,
        EnvironmentFailure where another process writes there.
        """
        self.folder, self._resume = folder, resume
        self._text = None if recipe is None else json.dumps(recipe, indent=1) + "\n"
        if recipe is not None:
            refuse_busy(folder)
        self._refuse()

    def _refuse(self) -> None:
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--out {folder}: a file is in the way")
        held = folder.is_dir() and any(name != LOCK for name in os.listdir(folder))
        if held and not self._resume:
            raise UsageError(
                f"--out {folder}: it is not empty", "give another --out, or --resume to go on"
            )
        begun = folder / "recipe.json"
        if self._text is not None and begun.is_file() and begun.read_text() != self._text:
            raise UsageError(f"{folder}: begun by another recipe or seed", "give another --out")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Write as the only process that does, its workers aside; EnvironmentFailure where another
        writes there. What a writer that was killed left half done is removed."""
        with alone(self.folder):
            self._refuse()  # another may have begun it since
            sweep(self.folder)
            yield

    def begin(self) -> None:
        """Make the folder and say in it what its blocks depend on; `write` does so too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, text = self.folder / "recipe.json", self._text
        if text is not None and not path.is_file():
            beside(path, lambda p: p.write_text(text))

    def _part(self, block: int) -> Path:
        return self.folder / "parts" / f"part-{block:05d}.parquet"

    def done(self, block: int) -> bool:
        """True where the block's rows are on disk; its shard was written before them."""
        return self._index.is_file() or self._part(block).is_file()

    @property
    def _index(self) -> Path:
        return self.folder / "index.parquet"

    def write(
        self, block: int, space: WeightSpace, flat: np.ndarray, rows: list[dict[str, Any]]
    ) -> None:
        """One block: flat (n, D) float32 in the order of the space, one row a network.

        A row's own `activation` goes before the space's, which is None where networks differ.

        Raises OSError where the disk is full or read-only; nothing is then left under a final name.
        """
        from safetensors.numpy import save_file

        self.begin()
        flat = np.ascontiguousarray(flat, dtype="<f4")
        arch = arch_id(space)
        shard = Path("weights") / arch / f"shard-{block:05d}.safetensors"
        header = {"qem.space": space.to_json()}
        beside(self.folder / shard, lambda p: save_file({"weights": flat}, p, metadata=header))
        table = pandas.DataFrame(rows)
        table["arch"], table["shard"], table["row"] = arch, str(shard), np.arange(len(flat))
        table["file"] = None
        table["parameters"] = np.int32(space.size)
        if "activation" not in table:  # a block may hold networks of several activations
            table["activation"] = space.activation
        table = pandas.concat([table, pandas.DataFrame(describe(space, flat))], axis=1)
        table.attrs = {"space": space.to_json()}
        beside(self._part(block), lambda p: table.to_parquet(p, index=False))

    def finish(self, blocks: int, about: dict[str, Any]) -> pandas.DataFrame:
        """Write zoo.json, then join the parts into index.parquet, with which the zoo is whole; a
        zoo that is whole is read. InputError where a block is missing."""
        if self._index.is_file():
            shutil.rmtree(self.folder / "parts", ignore_errors=True)  # of a run that was killed
            return pandas.read_parquet(self._index)
        missing = [b for b in range(blocks) if not self.done(b)]
        if missing:
            raise InputError(
                f"{self.folder}: block {missing[0]} of {blocks} is not there", "--resume"
            )
        parts = [pandas.read_parquet(self._part(b)) for b in range(blocks)]
        spaces: dict[str, str] = {}
        for part in parts:
            arch, text = part["arch"].iloc[0], part.attrs.pop("space")
            if spaces.setdefault(arch, text) != text:  # the same tensors, run in another way
                arch = f"{arch}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"
                spaces[arch], part["arch"] = text, arch
        table = pandas.concat(parts, ignore_index=True)
        table = table.sort_values("checkpoint", kind="stable", ignore_index=True)
        table.insert(0, "uid", np.arange(len(table), dtype=np.int64))
        record = {"format": "qem-zoo", "version": VERSION, "checkpoints": len(table), **about}
        text = json.dumps(record, indent=1) + "\n"
        beside(self.folder / "zoo.json", lambda p: p.write_text(text))
        beside(self._index, lambda p: write_index(table, spaces, p))
        shutil.rmtree(self.folder / "parts")
        return table


def write_index(table: pandas.DataFrame, spaces: dict[str, str], path: Path) -> None:
    """The table as parquet, with the weight spaces (JSON each, by arch id) in the schema's
    metadata."""
    import pyarrow
    import pyarrow.parquet

    arrow = pyarrow.Table.from_pandas(table, preserve_index=False)
    record = json.dumps({"version": VERSION, "spaces": spaces})
    metadata = {**(arrow.schema.metadata or {}), b"qem.index": record.encode()}
    pyarrow.parquet.write_table(
        arrow.replace_schema_metadata(metadata), path, compression="zstd", row_group_size=65_536
    )
