"""Predictors as files: where one lies, and what its header says before it is built.

On disk a predictor is a folder: `predictor.safetensors` (tensors; weight space and design in the
header), `README.md` (the card) and, for those that ship, `expected.json` (answers that must come
out again).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemcli import registry
from qemcli.errors import InputError
from qemcli.hub.fetching import fetch
from qemcli.hub.reference import PREFIX, Reference
from qemcli.shipped import shipped
from qemcli.spaces import WeightSpace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FILE = "predictor.safetensors"
FIELDS: dict[str, type] = {"architecture": str, "quasi": str, "config": dict, "task": str}


def read_header(path: Path, header: Mapping[str, str]) -> tuple[WeightSpace, dict[str, Any]]:
    """(weight space, design record) of a predictor's header; InputError where it is something
    else."""
    if header.get("qem.kind") != "predictor":
        raise InputError(f"{path}: a safetensors file, but not a qem predictor", "see `qem models`")
    try:
        record = json.loads(header["qem.config"])
        json.loads(header.get("qem.provenance", "{}"))
    except (KeyError, ValueError):
        record = None
    if not isinstance(record, dict):
        raise InputError(f"{path}: the predictor's header lacks qem.config")
    missing = FIELDS.keys() - record.keys()
    if missing:
        raise InputError(f"{path}: the predictor's header lacks {', '.join(sorted(missing))}")
    for name, kind in {**FIELDS, "others": list, "classes": list}.items():
        if not isinstance(record.get(name, kind()), kind):
            raise InputError(f"{path}: '{name}' of the predictor's header is {record[name]!r}")
    return WeightSpace.from_json(header.get("qem.space", "")), record


def others_of(record: Mapping[str, Any]) -> tuple[WeightSpace, ...]:
    """The weight spaces, besides the first, that a design record names."""
    found = record.get("others", ())
    return tuple(WeightSpace.from_json(json.dumps(other)) for other in found)


def locate(where: str | Path) -> Path:
    """The predictor.safetensors that a PREDICTOR argument means; InputError where there is none."""
    text = str(where)
    if text.startswith(PREFIX):
        ref = Reference.parse(text)
        if not ref.path.endswith(".safetensors"):
            ref = replace(ref, path=f"{ref.path}/{FILE}".lstrip("/"))
        return fetch(ref) / ref.path
    for path in (Path(text), shipped("models") / text):
        if path.is_file():
            return path
        if (path / FILE).is_file():
            return path / FILE
    known = [folder.name for folder in installed()]
    hint = registry.suggest(text, known) if known else "train one with `qem train`"
    raise InputError(f"no predictor is called '{text}', and no file or folder is", hint)


def is_predictor(where: str | Path) -> bool:
    """True where a name, file or folder is a predictor's, and not an ordinary checkpoint's."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(locate(where), framework="np") as file:
            return (file.metadata() or {}).get("qem.kind") == "predictor"
    except (SafetensorError, OSError, InputError):
        return False


def installed() -> list[Path]:
    """The folders of the predictors that ship with the package, by name."""
    return sorted(path.parent for path in shipped("models").glob(f"*/{FILE}"))


def headers() -> Iterator[tuple[Path, WeightSpace, dict[str, Any]]]:
    """(folder, weight space, design record) of every shipped predictor, without building it."""
    from safetensors import safe_open

    for folder in installed():
        with safe_open(folder / FILE, framework="np") as file:
            space, record = read_header(folder / FILE, file.metadata() or {})
        yield folder, space, record


def in_order(written: bytes) -> bytes:
    """The bytes of a safetensors file with its metadata in order: the library writes them in
    another one every time."""
    end = 8 + int.from_bytes(written[:8], "little")
    head = json.loads(written[8:end])
    head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + written[end:]
