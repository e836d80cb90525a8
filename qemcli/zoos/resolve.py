"""Which zoo an argument means, and which one is taken where none is given."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from qemcli.errors import EnvironmentFailure, InputError, UsageError
from qemcli.registry import suggest
from qemcli.shipped import shipped

_HUB = re.compile(r"hf://(datasets/)?([\w.-]+/[\w.-]+?)(?:@([\w./-]+?))?(?:/(.+))?")


def resolve(
    given: str | Path | None,
    say: Callable[[str], None] = lambda text: None,
    ships: str | None = None,
) -> Path:
    """The path of a ZOO argument; without one $QEM_ZOO, ./zoo, ./index.parquet, then the embedded
    zoo `ships` (or the default one), and `say` is told which. Raises InputError where there is
    none at all."""
    if given is not None:
        return locate(given)
    stated = os.environ.get("QEM_ZOO")
    if stated:
        say(f"zoo: {stated} ($QEM_ZOO)")
        return locate(stated)
    for path in (Path("zoo"), Path("index.parquet")):
        if path.exists():
            say(f"zoo: ./{path}")
            return path
    found = [folder for folder in embedded() if ships in (None, folder.name)]
    if not found:
        raise InputError("no ZOO was given, and none ships", "name one, or set QEM_ZOO")
    say(f"zoo: {found[0].name} (embedded; name another, or set QEM_ZOO)")
    return found[0]


def embedded() -> list[Path]:
    """The folders of the zoos that ship with weights, the default one (`default` in its zoo.json)
    first."""
    found = [file.parent for file in shipped("zoos").glob("*/index.parquet")]
    return sorted(found, key=lambda folder: (not _default(folder), folder.name))


def _default(folder: Path) -> bool:
    import json

    try:
        return bool(json.loads((folder / "zoo.json").read_text()).get("default"))
    except (OSError, ValueError, AttributeError):
        return False


def locate(given: str | Path) -> Path:
    """The path of a path, of a zoo's name, or of hf://[datasets/]owner/name[@revision][/path]."""
    text = str(given)
    if text.startswith("hf://"):
        return _snapshot(text)
    path = Path(given)
    if path.exists():
        return path
    if (shipped("zoos") / text / "index.parquet").is_file() and "/" not in text:
        return shipped("zoos") / text
    names = [folder.name for folder in embedded()]
    hint = suggest(text, names) if names else "give a folder, an index.parquet or a checkpoint"
    raise UsageError(f"{text}: no such file, folder or zoo", hint)


def _snapshot(text: str) -> Path:
    found = _HUB.fullmatch(text)
    if not found:
        raise UsageError(f"{text}: not hf://[datasets/]owner/name[@revision][/path]")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    kind, name, revision, inner = found.groups()
    try:
        root = Path(
            snapshot_download(name, repo_type="dataset" if kind else "model", revision=revision)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        said = str(error).strip().splitlines()[0][:120]
        raise EnvironmentFailure(
            f"{text}: could not be fetched ({said})", "try again, or `hf auth login`"
        ) from None
    except HFValidationError as error:
        raise UsageError(f"{text}: {error}") from None
    path = root / inner if inner else root
    if not path.exists() or ".." in path.parts:
        raise UsageError(f"{text}: the repository holds no '{inner}'")
    return path
