"""Writing a file: whole under its name, or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path


def beside(path: Path, write: Callable[[Path], object]) -> None:
    """Write next to the target, flush to disk, rename: the name never holds half a file.

    Raises OSError where the disk is full or read-only, whatever the writer raised.
    """
    from safetensors import SafetensorError

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask gives: safetensors' own is its owner's
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:
        stated = re.search(r"os error (\d+)", str(error))
        if stated is None:
            raise
        raise OSError(int(stated[1]), os.strerror(int(stated[1])), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
