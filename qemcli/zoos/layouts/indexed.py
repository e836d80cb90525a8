"""Zoos with an index: our own layout (zoo.json, index.parquet, shards), or an index.parquet alone
that says where its rows lie."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemcli import registry
from qemcli.errors import InputError, UsageError
from qemcli.spaces import WeightSpace
from qemcli.zoos import sources
from qemcli.zoos.networks import networks
from qemcli.zoos.zoo import Zoo

if TYPE_CHECKING:
    import pandas
    import pyarrow
    from pyarrow import parquet

INDEX, RECORD = "index.parquet", "zoo.json"
KEY = b"qem.index"
VERSION = 1
NEEDED = ("checkpoint", "arch")


def sniff(path: Path) -> bool:
    """A folder with index.parquet or zoo.json, or a parquet file."""
    if path.is_dir():
        return (path / INDEX).is_file() or (path / RECORD).is_file()
    return path.suffix == ".parquet"


def open(path: Path, activation: str | None = None, statistics: bool = False) -> Zoo:
    """The zoo of an index; UsageError for an index that is cut short, foreign or from another
    version."""
    file = path / INDEX if path.is_dir() else path
    table, meta = read_index(file, statistics)
    spaces = {arch: WeightSpace.from_json(_text(s)) for arch, s in meta["spaces"].items()}
    unknown = set(table["arch"].unique()) - set(spaces)
    if unknown:
        raise InputError(f"{file}: it does not say what architecture '{min(unknown)}' is")
    return Zoo(table, spaces, _source(file, table, meta), file, "indexed", _record(file.parent))


def _text(space: Any) -> str:
    return space if isinstance(space, str) else json.dumps(space)


def read_index(file: Path, statistics: bool = True) -> tuple[pandas.DataFrame, dict[str, Any]]:
    """(table, what its schema says under `qem.index`)."""
    with _opened(file) as index:
        schema = index.schema_arrow
        meta = _meta(file, schema)
        names = [n for n in schema.names if statistics or not n.startswith("stat.")]
        table = index.read(columns=names).to_pandas()
    return table.reset_index(drop=True), meta


def read_meta(file: Path) -> dict[str, Any]:
    """What the schema of an index says under `qem.index`; no row is read."""
    with _opened(file) as index:
        return _meta(file, index.schema_arrow)


@contextmanager
def _opened(file: Path) -> Iterator[parquet.ParquetFile]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            yield opened
    except FileNotFoundError:
        raise UsageError(f"{file}: the zoo has no index", "make one: qem index") from None
    except (pyarrow.ArrowException, OSError) as error:
        said = str(error).splitlines()[0][:100]
        raise UsageError(
            f"{file}: no readable parquet file ({said})", "rebuild it: qem index ZOO"
        ) from None


def _meta(file: Path, schema: pyarrow.Schema) -> dict[str, Any]:
    try:
        meta = json.loads((schema.metadata or {})[KEY])
        version, spaces = meta["version"], meta["spaces"]
    except (KeyError, ValueError, TypeError):
        raise UsageError(
            f"{file}: a parquet file, but no index of a zoo", "make one: qem index ZOO"
        ) from None
    lacking = [name for name in NEEDED if name not in schema.names]
    if version != VERSION or lacking or not isinstance(spaces, dict):
        reason = f"lacks the column '{lacking[0]}'" if lacking else f"has version {version}"
        raise UsageError(
            f"{file}: the index {reason}; this qem reads version {VERSION}",
            "rebuild it: qem index ZOO",
        )
    return meta


def origin(path: Path) -> tuple[str, Path]:
    """(layout, path) of what an index was made from: its own folder where it says nothing."""
    file = path / INDEX if path.is_dir() else path
    return _origin(file, read_meta(file))


def _origin(file: Path, meta: dict[str, Any]) -> tuple[str, Path]:
    stated = meta.get("source")
    stated = stated if isinstance(stated, dict) else {"layout": "indexed"}
    root = Path(os.path.normpath(file.parent / str(stated.get("path", "."))))
    return str(stated.get("layout", "folder")), root


def _source(file: Path, table: pandas.DataFrame, meta: dict[str, Any]) -> sources.Source:
    """By its columns: shards beside the index, members of an archive or files below a root, or
    another layout's rows."""
    layout, root = _origin(file, meta)
    if layout == "hub":
        return sources.hub(str(meta["source"].get("ref")))
    if "shard" in table and table["shard"].notna().any():
        return sources.shards(root)
    if "offset" in table:
        return sources.members(root)
    if "begins" in table:
        return getattr(registry.load("zoos.layouts", layout), "source", networks)(root)
    if layout in ("folder", "single", "indexed"):
        return sources.files(root)
    return registry.load("zoos.layouts", layout).open(root).source


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text())
    except FileNotFoundError:
        return {"name": folder.name}
    except (ValueError, OSError) as error:
        raise InputError(f"{folder / RECORD}: {error}") from None
    if not isinstance(record, dict) or record.get("format") != "qem-zoo":
        raise InputError(f"{folder / RECORD}: not a zoo's record", "it needs format: qem-zoo")
    return record
