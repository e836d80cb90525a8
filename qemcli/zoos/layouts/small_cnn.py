"""The Small CNN Zoo (Unterthiner et al. 2020, arXiv:2002.11448), byte for byte: weights.npy,
metrics.csv(.gz), layout.csv, in a folder or in the .tar.xz itself.

Rows of weights.npy hold each layer's bias before its kernel, kernels as (height, width, in, out)
and (in, out); `order` carries them to torch's. Convolutions have stride 2 and no padding.
"""

from __future__ import annotations

import ast
import random
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from tokenize import TokenError
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy_format

from qemcli.errors import InputError, UsageError
from qemcli.recognition import infer, turned, turns
from qemcli.spaces import Chain, chain_of
from qemcli.zoos import sources
from qemcli.zoos.members import Folder, first_names, tree
from qemcli.zoos.zoo import Zoo

if TYPE_CHECKING:
    import pandas

WEIGHTS = ("weights.npy", "all_weights.npy")
METRICS = ("metrics.csv.gz", "metrics.csv", "all_metrics.csv.gz", "all_metrics.csv")
LAYOUT = "layout.csv"
CONVENTIONS = ("nfn", "monomial-nfn", "scalegmn")
README = "README.md"
LARGEST, TABLE = 64 << 30, 1 << 30  # bytes of the weights and of a table in an archive
LABELS = ("test_accuracy", "test_loss", "train_accuracy", "train_loss")


def sniff(path: Path) -> bool:
    """A folder where weights.npy and layout.csv lie side by side, or one folder further down, or an
    archive with one of them among its first files."""
    if path.is_dir():
        return _root(path) is not None
    names = {name.rpartition("/")[2] for name in first_names(path)}
    return bool(names & set(WEIGHTS)) and names <= {*WEIGHTS, *METRICS, LAYOUT, README}


def _root(path: Path) -> Path | None:
    for folder in (path, *(p for p in sorted(path.iterdir()) if p.is_dir())):
        if (folder / LAYOUT).is_file() and any((folder / name).is_file() for name in WEIGHTS):
            return folder
    return None


def open(path: Path, activation: str | None = None, statistics: bool = False) -> Zoo:
    """The zoo, its weights memory-mapped; `split` by a *split*.csv of nfn's that lies beside it.

    Raises InputError where the three files do not belong together.
    """
    if not path.is_dir():
        with TemporaryDirectory(prefix="qem-") as folder:
            return _of(path, Path(folder, path.name.partition(".")[0]), _archived(path, folder))
    root = _root(path)
    if root is None:
        raise InputError(f"{path}: no weights.npy with its layout.csv")
    weights = _weights(next(root / name for name in WEIGHTS if (root / name).is_file()))
    return _of(path, root, weights)


def _archived(path: Path, folder: str) -> np.ndarray:
    """The weights, mapped where they lie in the archive; its tables are written to the folder."""
    found = tree(path, LARGEST)
    if found is None or isinstance(found, Folder):
        raise InputError(f"{path}: no archive")
    root = Path(folder, path.name.partition(".")[0])
    root.mkdir()
    weights: np.ndarray | None = None
    for member in found.members():
        base = member.name.rpartition("/")[2]
        if member.reason is not None:
            raise InputError(f"{path}: '{member.name}': {member.reason}", "fetch it again")
        if base in WEIGHTS:
            weights = _mapped(found.path, found.begin(member), member.size)
        elif (base in METRICS or base == LAYOUT or "split" in base) and member.size < TABLE:
            (root / base).write_bytes(found.read(member))
    if weights is None or not (root / LAYOUT).is_file():
        raise InputError(f"{path}: no weights.npy with its layout.csv", "fetch it again")
    return weights


def _mapped(archive: Path, begin: int, size: int) -> np.ndarray:
    """The array of an npy file that lies uncompressed in an archive."""
    try:
        with archive.open("rb") as file:
            file.seek(begin)
            if npy_format.read_magic(file) != (1, 0):
                raise ValueError("not npy version 1.0")
            shape, turned, dtype = npy_format.read_array_header_1_0(file)
            at = file.tell()
        needed = at - begin + dtype.itemsize * int(np.prod(shape, dtype=object))
        if turned or dtype.kind != "f" or len(shape) != 2 or needed != size:
            raise ValueError(f"{shape} {dtype} in {size} bytes")
    except (ValueError, OSError, SyntaxError, TokenError) as error:
        raise InputError(f"{archive}: weights.npy is cut short or damaged ({error})") from None
    return np.memmap(archive, dtype, "r", at, shape)


def _of(path: Path, root: Path, weights: np.ndarray) -> Zoo:
    """The zoo of these weights and the tables in `root`."""
    space, order = read_layout(root / LAYOUT)
    if len(order) != weights.shape[1]:
        raise InputError(
            f"{root}: layout.csv names {len(order)} parameters, a row has {weights.shape[1]}"
        )
    index = _index(root, len(weights))
    arch = sources.arch_id(space)
    index.insert(2, "arch", arch)
    index["parameters"] = np.int32(space.size)
    record = {"name": root.resolve().name, "licence": "CC-BY-4.0", "paper": "arXiv:2002.11448"}
    zoo = Zoo(index, {arch: space}, sources.matrix(weights, order), path, "small_cnn", record)
    beside = sorted(root.glob("*split*.csv"))
    return _with_splits(zoo, beside[0]) if len(beside) == 1 else zoo


def _weights(file: Path) -> np.ndarray:
    try:
        weights = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{file}: cut short or damaged ({error})", "fetch it again") from None
    if weights.ndim != 2 or weights.dtype.kind != "f":
        raise InputError(f"{file}: {weights.shape} {weights.dtype}, not a matrix of floats")
    return weights


def read_layout(file: Path) -> tuple[Chain, np.ndarray]:
    """(weight space in torch's layout, order (D,)): row[order] is the row of the space."""
    import pandas

    try:
        table = pandas.read_csv(file)
        starts, ends = table["start_idx"].tolist(), table["end_idx"].tolist()
        shapes = {
            str(name): tuple(int(n) for n in ast.literal_eval(str(shape)))
            for name, shape in zip(table["varname"], table["shape"], strict=True)
        }
    except (ValueError, KeyError, TypeError, SyntaxError, OSError) as error:
        raise InputError(f"{file}: not the layout of a Small CNN Zoo ({error})") from None
    tiled = starts[:1] == [0] and starts[1:] == ends[:-1]
    sizes = [e - s for s, e in zip(starts, ends, strict=True)]
    if not tiled or sizes != [int(np.prod(s)) for s in shapes.values()]:
        raise InputError(f"{file}: its positions do not tile a row")
    found = chain_of(infer(turned(shapes)), "a Small CNN Zoo")
    space = found.running(stride=2, padding=0, known=True)
    spans, by = dict(zip(shapes, zip(starts, ends, strict=True), strict=True)), turns(shapes)
    parts = []
    for name in space.names:
        block = np.arange(*spans[name]).reshape(shapes[name])
        parts.append((block.transpose(by[name]) if name in by else block).ravel())
    return space, np.concatenate(parts)


def _index(root: Path, rows: int) -> pandas.DataFrame:
    import pandas

    file = next((root / name for name in METRICS if (root / name).is_file()), None)
    if file is None:
        raise InputError(f"{root}: no metrics.csv.gz", "fetch the whole zoo")
    try:
        table = pandas.read_csv(file)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{file}: not a readable table ({error})", "fetch it again") from None
    lacking = [c for c in ("step", "config.activation", *LABELS[:1]) if c not in table]
    if lacking or len(table) != rows:
        reason = f"no column '{lacking[0]}'" if lacking else f"{len(table)} rows, weights {rows}"
        raise InputError(f"{file}: {reason}", "fetch the whole zoo")
    run, step = _runs(table), table["step"].astype("int32")
    last = step.groupby(run).transform("max")
    columns: dict[str, Any] = {
        "uid": np.arange(rows),
        "checkpoint": run + "/step-" + step.astype(str).str.zfill(5),
        "row": np.arange(rows),
        "run": run,
        "step": step,
        "final": step == last,
        "activation": table["config.activation"],
        **{name: table[name].astype("float64") for name in LABELS if name in table},
        **{c: table[c] for c in table if c.startswith("config.")},
    }
    return pandas.DataFrame(columns)


def _runs(table: pandas.DataFrame) -> pandas.Series:
    """The run of each row: the folder in the checkpoint's path, else `modeldir`, else blocks of
    rows between which the step, sorted as text, starts again."""
    first = table.iloc[:, 0].astype(str)
    if first.str.contains("/").all():
        return first.str.split("/").str[-2]
    if "modeldir" in table:
        return table["modeldir"].astype(str).str.rstrip("/").str.split("/").str[-1]
    text = table["step"].astype(str)
    return "run-" + (text <= text.shift()).cumsum().astype(str).str.zfill(5)


def permutation(file: Path) -> np.ndarray:
    """nfn's committed order of all rows: a column of integers under the header `0`, which nfn reads
    as one more row; without it every row stands once."""
    try:
        values = [int(line) for line in file.read_text().split()]
    except (ValueError, OSError) as error:
        raise UsageError(f"{file}: not a column of row numbers ({error})") from None
    if len(values) > 1 and values[0] == 0 and 0 in values[1:]:
        values = values[1:]
    if sorted(values) != list(range(len(values))):
        raise UsageError(f"{file}: not a permutation of row numbers")
    return np.array(values)


def splits(
    index: pandas.DataFrame,
    order: np.ndarray,
    convention: str = "nfn",
    activation: str | None = None,
) -> dict[str, np.ndarray]:
    """{"train", "val", "test"} -> rows of the index, in the order in which the papers' code reads
    them.

    Final checkpoints in the committed order; the second half is the test set, 80 % of the first
    (shuffled by Random(0)) the training set. With an `activation`, `monomial-nfn` keeps its
    networks before splitting and `scalegmn` after: two different sets.
    """
    if convention not in CONVENTIONS:
        raise UsageError(f"no convention '{convention}'", f"known: {', '.join(CONVENTIONS)}")
    if len(order) != len(index):
        raise UsageError(f"the split has {len(order)} rows, the zoo {len(index)}")
    finals = order[index["final"].to_numpy()[order]]
    wanted = np.ones(len(index), dtype=bool)
    if activation is not None:
        wanted = (index["activation"] == activation).to_numpy()
    if convention == "monomial-nfn":
        finals = finals[wanted[finals]]
    half = len(finals) // 2
    first = list(range(half))
    random.Random(0).shuffle(first)
    cut = int(0.8 * half)
    found = {
        "train": finals[np.array(first[:cut], dtype=int)],
        "val": finals[np.array(first[cut:], dtype=int)],
        "test": finals[half:],
    }
    return {name: rows[wanted[rows]] for name, rows in found.items()}


def _with_splits(zoo: Zoo, file: Path) -> Zoo:
    column = np.full(len(zoo.index), None, dtype=object)
    for name, rows in splits(zoo.index, permutation(file)).items():
        column[rows] = name
    return replace(zoo, index=zoo.index.assign(split=column))
