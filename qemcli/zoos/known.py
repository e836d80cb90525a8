"""The zoos of zoos/: what lies embedded, and what only has a card, as rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from qemcli import registry
from qemcli.shipped import shipped


def layouts() -> dict[str, str]:
    """Layout name -> what its docstring says first."""
    names = registry.names("zoos.layouts")
    docs = {name: registry.load("zoos.layouts", name).__doc__ or "" for name in names}
    heads = {name: re.split(r":\s|\.\n|, byte for byte", doc)[0] for name, doc in docs.items()}
    return {name: " ".join(head.split()) for name, head in heads.items()}


def rows() -> list[dict[str, Any]]:
    """One row a folder of zoos/ that has a card or an index."""
    folders = [folder for folder in sorted(shipped("zoos").glob("*")) if folder.is_dir()]
    return [_row(folder) for folder in folders]


def _row(folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"name": folder.name, "embedded": False, **front_matter(folder)}
    if (folder / "recipe.toml").is_file():
        row["recipe"] = f"qem build {folder.name}"
    if "download" in row:
        row.setdefault("recipe", f"qem download {folder.name}")
    row["size"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if (folder / "index.parquet").is_file():
        row |= {"embedded": True, **_counted(folder)}
    return row


def _counted(folder: Path) -> dict[str, Any]:
    from qemcli.zoos.zoo import Zoo

    zoo = Zoo.open(folder)
    index = zoo.index
    splits = index["split"].value_counts().to_dict() if "split" in index else {}
    labelled = [c for c in ("test_accuracy", "label") if c in index and index[c].notna().any()]
    return {
        "checkpoints": len(zoo),
        "family": sorted({space.family for space in zoo.spaces.values()}),
        "widths": sorted({str(list(space.widths)) for space in zoo.spaces.values()}),
        "activations": sorted(index["activation"].dropna().unique().tolist()),
        "splits": splits,
        "labels": labelled,
        **{k: zoo.record[k] for k in ("licence", "description") if k in zoo.record},
    }


def front_matter(folder: Path) -> dict[str, Any]:
    """The `key: value` lines between the `---` of a card's head; JSON values are read."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    lines = card.read_text(encoding="utf-8").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return {}
    head = lines[1 : lines.index("---", 1)]
    pairs = (line.split(":", 1) for line in head if ":" in line and line[:1] not in " -#")
    return {key.strip(): _value(value.strip()) for key, value in pairs if value.strip()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.strip("'\"")
