"""What `qem download` leaves beside the files it fetched: from where, which revision, every file's
size and checksum, and whether all of them are there."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemcli.errors import InputError, UsageError
from qemcli.writing import beside

NAME = "qem-download.json"


@dataclass
class Receipt:
    """The receipt of a folder; `complete` once every file is there and checked."""

    folder: Path
    source: str
    pinned: list[str] = field(default_factory=list)
    files: dict[str, Any] = field(default_factory=dict)
    complete: bool = False

    @classmethod
    def begin(cls, folder: Path, source: str) -> Receipt:
        """That of a folder which is new, or in which an earlier run of the same download has left
        one.

        Raises UsageError where the folder holds something else: nothing is overwritten.
        """
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--dest {folder}: a file is in the way")
        known = read(folder)
        if known is None and folder.is_dir() and any(folder.iterdir()):
            raise UsageError(
                f"--dest {folder}: it is not empty, and holds no download", "give another --dest"
            )
        if known is not None and known.source != source:
            raise UsageError(
                f"--dest {folder}: it holds a download of {known.source}", "give another --dest"
            )
        folder.mkdir(parents=True, exist_ok=True)
        begun = cls(folder, source, files=known.files if known else {})
        begun.save()
        return begun

    def save(self) -> None:
        """Write it, beside and renamed."""
        record = {
            "format": "qem-download",
            "source": self.source,
            "pinned": self.pinned,
            "complete": self.complete,
            "files": self.files,
        }
        text = json.dumps(record, indent=1) + "\n"
        beside(self.folder / NAME, lambda path: path.write_text(text))


def read(folder: Path) -> Receipt | None:
    """The receipt of a folder, None where there is none that we wrote."""
    try:
        record = json.loads((folder / NAME).read_text())
        if record["format"] != "qem-download" or not isinstance(record["files"], dict):
            return None
        source, pinned, complete = record["source"], record["pinned"], record["complete"]
        return Receipt(folder, str(source), list(pinned), record["files"], complete is True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def content(path: Path) -> Path:
    """What a folder holds that `qem download` has made: its one file, an archive, or itself; any
    other path is itself.

    InputError for a download that was cut off: half a zoo never looks whole.
    """
    found = read(path) if path.is_dir() else None
    if found is None:
        return path
    if not found.complete:
        raise InputError(
            f"{path}: a download that was cut off",
            f"go on with: qem download {found.source} --dest {path}",
        )
    beside = [p for p in path.iterdir() if p.name != NAME and not p.name.startswith(".")]
    alone = len(beside) == 1 and beside[0].is_file() and list(found.files) == [beside[0].name]
    return beside[0] if alone else path
