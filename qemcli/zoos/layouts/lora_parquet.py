"""LoRA-WiSE (Salama et al. 2024, arXiv:2406.19395), at index level: parquet files whose rows are
adapters, one column of nested lists a tensor.

Columns `name` and `label` (how many images the adapter was trained on) stand beside the tensors.
A column is read when it is asked for; the rows are listed and not claimed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qemcli.errors import InputError
from qemcli.spaces import WeightSpace, opaque
from qemcli.zoos import sources
from qemcli.zoos.members import first_names
from qemcli.zoos.zoo import Zoo

if TYPE_CHECKING:
    import pandas
    from pyarrow import parquet

TENSOR = re.compile(r"lora[._](down|up|A|B)(\.|_|$)")
REASON = "a LoRA adapter"
FIRST = 16  # files looked into
PART = re.compile(r"(?:^|/|_)(train|val|validation|test)[-_.]")


def sniff(path: Path) -> bool:
    """A folder with a parquet file whose columns are such tensors, among the first ones."""
    names = first_names(path) if path.is_dir() else []
    return any(_held(path / n) for n in [n for n in names if n.endswith(".parquet")][:FIRST])


def _held(file: Path) -> bool:
    from pyarrow import ArrowException
    from pyarrow import parquet as reader

    try:
        return any(TENSOR.search(name) for name in reader.read_schema(file).names)
    except (ArrowException, OSError):
        return False


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("**/*.parquet"))[:1000] if path.is_dir() else []


def open(path: Path, activation: str | None = None, statistics: bool = False) -> Zoo:
    """The zoo of all files, one row an adapter; InputError where a file is damaged or its first
    adapter cannot be read."""
    import pandas

    rows: list[pandas.DataFrame] = []
    spaces: dict[str, WeightSpace] = {}
    for file in _files(path):
        with _opened(file) as table:
            names = [n for n in table.schema_arrow.names if TENSOR.search(n)]
            beside = [n for n in ("name", "label") if n in table.schema_arrow.names]
            count = table.metadata.num_rows
            if not names or not count:
                continue
            first = next(table.iter_batches(1, columns=names)).to_pydict()
            space = opaque({n: np.shape(first[n][0]) for n in names}, REASON)
            told = table.read(columns=beside).to_pandas()
        relative = str(file.relative_to(path))
        arch = sources.arch_key(space)
        spaces[arch] = space
        part = PART.search(relative)
        named = (
            told["name"].astype(str) if "name" in told else pandas.Series(map(str, range(count)))
        )
        columns: dict[str, Any] = {
            "checkpoint": f"{relative}:" + named,
            "arch": arch,
            "file": relative,
            "row": np.arange(count),
            "split": "val" if part and part[1] == "validation" else part[1] if part else None,
            "parameters": np.int32(space.size),
        }
        if "label" in told:
            columns["label"] = told["label"]
        rows.append(pandas.DataFrame(columns))
    if not rows:
        raise InputError(f"{path}: no adapter in its parquet files")
    index = pandas.concat(rows, ignore_index=True)
    index.insert(0, "uid", np.arange(len(index)))
    record = {"name": path.resolve().name, "paper": "arXiv:2406.19395"}
    return Zoo(index, spaces, _source(path), path, "lora_parquet", record)


def _opened(file: Path) -> parquet.ParquetFile:
    from pyarrow import ArrowException
    from pyarrow import parquet as reader

    try:
        return reader.ParquetFile(file)
    except (ArrowException, OSError) as error:
        said = str(error).splitlines()[0][:100]
        raise InputError(f"{file}: no readable parquet file ({said})", "fetch it again") from None


def _source(root: Path) -> sources.Source:
    def read(space: WeightSpace, table: pandas.DataFrame) -> tuple[np.ndarray, dict[int, str]]:
        out = np.full((len(table), space.size), np.nan, np.float32)
        bad: dict[int, str] = {}
        files, rows = table["file"].tolist(), table["row"].tolist()
        for name in dict.fromkeys(files):
            at = [i for i, file in enumerate(files) if file == name]
            with _opened(sources.inside(root, name)) as opened:
                found = opened.read(columns=list(space.names)).take([rows[i] for i in at])
            for i, row in zip(at, found.to_pylist(), strict=True):
                try:
                    out[i] = np.concatenate(
                        [np.asarray(row[n], np.float32).reshape(-1) for n in space.names]
                    )
                except (ValueError, TypeError):
                    bad[i] = "its tensors are not those of the first adapter"
        return out, bad

    return read
