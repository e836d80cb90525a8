"""Checkpoints of any architecture and any format in a folder or an archive: opened one by one where
they lie, an archive's by way of one temporary file."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qemcli.checkpoints import FETCH, Checkpoint, open_checkpoint
from qemcli.errors import InputError, QemError
from qemcli.spaces import WeightSpace
from qemcli.zoos.members import Folder, Member, Tree, tree
from qemcli.zoos.sources import Source

if TYPE_CHECKING:
    import pandas

LARGEST = 8 << 30  # bytes of one checkpoint; below, an archive's directory decides
PLACE = ("file", "size", "begins", "packed")  # the columns that say where a checkpoint lies


@dataclass(eq=False)
class Networks:
    """Opens members of a tree; what was opened is good until the next one is."""

    tree: Tree
    _copy: Path | None = field(default=None, init=False)

    @classmethod
    def of(cls, root: Path) -> Networks:
        """The networks below a folder or in an archive; InputError for any other file."""
        found = tree(root, LARGEST)
        if found is None:
            raise InputError(f"{root}: neither a folder nor a tar nor a zip", FETCH)
        return cls(found)

    def open(self, member: Member) -> Checkpoint:
        """The checkpoint of a member; raises a QemError that does not repeat its path."""
        path = self.lying(member)
        try:
            return open_checkpoint(path)
        except QemError as error:
            raise type(error)(error.message.removeprefix(f"{path}: "), error.hint) from None

    def lying(self, member: Member) -> Path:
        """A file with the member's bytes: itself in a folder, else a temporary copy."""
        if isinstance(self.tree, Folder):
            return self.tree.path / member.name
        if self._copy is None:
            folder = tempfile.mkdtemp(prefix="qem-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._copy = Path(folder, "checkpoint")
        self._copy.unlink(missing_ok=True)  # what was opened before may still be mapped
        self._copy.write_bytes(self.tree.read(member))
        return self._copy

    def row(self, member: Member, space: WeightSpace) -> np.ndarray:
        """(D,) float32 in the order of the space; InputError where the tensors are others."""
        checkpoint = self.open(member)
        if not checkpoint.holds(space):
            raise InputError("its tensors are not those of the index", "index the zoo again")
        try:
            return checkpoint.row(space)
        except QemError as error:
            reason = error.message.removeprefix(f"{checkpoint.path}: ")
            raise type(error)(reason, error.hint) from None


def networks(root: Path) -> Source:
    """Rows that are checkpoints below a folder or in an archive, by the columns of PLACE; those
    that cannot be read any more are named."""
    opened: list[Networks] = []

    def read(space: WeightSpace, table: pandas.DataFrame) -> tuple[np.ndarray, dict[int, str]]:
        reader = opened[0] if opened else Networks.of(root)
        opened[:] = [reader]
        out = np.full((len(table), space.size), np.nan, np.float32)
        bad: dict[int, str] = {}
        columns = zip(*(table[c].tolist() for c in PLACE), strict=True)
        for i, (name, size, begins, packed) in enumerate(columns):
            try:
                out[i] = reader.row(Member(name, size, begins, packed), space)
            except QemError as error:
                bad[i] = error.message
        return out, bad

    return read
