"""Which zoo an argument means, and which one is taken where none is given."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from qemcli.errors import InputError, UsageError
from qemcli.hub.fetching import fetch, look
from qemcli.hub.reference import PREFIX, Reference
from qemcli.registry import suggest
from qemcli.shipped import shipped
from qemcli.web import sources
from qemcli.zoos.published import published
from qemcli.zoos.receipt import content

# The same weights once more, for other libraries, where a repository has them as safetensors.
TWINS = (
    "*.msgpack", "*.ot", "*.tflite", "*.onnx", "*.onnx_data", "*.gguf", "*tf_model*.h5",
    "*pytorch_model*.bin",
)  # fmt: skip


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
    if text.startswith(PREFIX):
        return _fetched(Reference.parse(text))
    path = Path(given)
    if path.exists():
        return content(path)
    if (shipped("zoos") / text / "index.parquet").is_file() and "/" not in text:
        return shipped("zoos") / text
    if sources.is_address(text):
        raise UsageError(f"{text}: an address, which is fetched first", f"qem download {text}")
    if "://" in text:
        raise UsageError(f"{text}: no address that qem reads", sources.READS)
    if text in published():
        raise UsageError(f"{text}: a published zoo that is not here", f"qem download {text}")
    names = [folder.name for folder in embedded()]
    hint = suggest(text, names) if names else "give a folder, an index.parquet or a checkpoint"
    raise UsageError(f"{text}: no such file, folder or zoo", hint)


def _fetched(ref: Reference) -> Path:
    """What a reference names, fetched and checked."""
    copy = look(ref)
    named = any(file.path == ref.path for file in copy.tree.files)
    headed = any(file.path.endswith(".safetensors") for file in copy.tree.files)
    exclude = TWINS if headed and not named else ()
    return fetch(ref, exclude=exclude, copy=copy) / ref.path
