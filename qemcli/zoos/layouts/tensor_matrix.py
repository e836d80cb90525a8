"""weights2weights (Dravid et al. 2024, arXiv:2406.09413): one tensor [networks, parameters] in a
torch file, mapped and not read; at index level.

all_weights.pt, and beside it weight_dimensions.pt, a dict of name -> shape in the order of a row.
identity_df.pt is a pickled table and is never opened. The rows are LoRA adapters: they are listed
and not claimed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qemcli.errors import InputError, QemError
from qemcli.formats._torch_pickles import arrays as read_arrays
from qemcli.formats._torch_pickles import located
from qemcli.formats._torch_tensors import Beyond, Stored
from qemcli.spaces import Opaque, opaque
from qemcli.zoos import sources
from qemcli.zoos.zoo import Zoo

WEIGHTS, SHAPES = "all_weights.pt", "weight_dimensions.pt"
REASON = "a LoRA adapter"


def sniff(path: Path) -> bool:
    """all_weights.pt, or a folder that holds it, perhaps under weights_datasets/identities."""
    return _file(path) is not None


def _file(path: Path) -> Path | None:
    if path.name == WEIGHTS and path.is_file():
        return path
    below = ("", "identities", "weights_datasets/identities") if path.is_dir() else ()
    return next((path / b / WEIGHTS for b in below if (path / b / WEIGHTS).is_file()), None)


def open(path: Path, activation: str | None = None, statistics: bool = False) -> Zoo:
    """The zoo, one row a row of the tensor; InputError where the file holds no matrix, or where its
    columns are not those of weight_dimensions.pt."""
    import pandas

    file = _file(path)
    if file is None:
        raise InputError(f"{path}: no {WEIGHTS}")
    tensor = _matrix(file)
    space = _space(file, tensor.shape[1])
    rows = tensor.shape[0]
    weights = read_arrays(file, {"weights": tensor})["weights"]
    arch = sources.arch_key(space)
    index = pandas.DataFrame(
        {
            "uid": np.arange(rows),
            "checkpoint": [f"row-{i:06d}" for i in range(rows)],
            "arch": arch,
            "row": np.arange(rows),
            "parameters": np.int32(space.size),
        }
    )
    source = sources.matrix(weights, np.arange(space.size))
    record = {"name": file.parent.name, "paper": "arXiv:2406.09413"}
    return Zoo(index, {arch: space}, source, path, "tensor_matrix", record)


def _matrix(file: Path) -> Stored:
    try:
        tree = located(file).tree
    except Beyond as why:
        raise InputError(f"{file}: not a plain tensor ({why})") from None
    if not isinstance(tree, Stored) or len(tree.shape) != 2 or 0 in tree.shape:
        raise InputError(f"{file}: not one tensor [networks, parameters]")
    return tree


def _space(file: Path, columns: int) -> Opaque:
    """The tensors of a row, where a file of shapes lies beside or near; else one."""
    for near in (file.parent, *list(file.resolve().parents)[1:3]):
        for name in (SHAPES, f"files/{SHAPES}"):
            if (near / name).is_file():
                return _shaped(near / name, columns)
    return opaque({"weights": (columns,)}, REASON)


def _shaped(file: Path, columns: int) -> Opaque:
    try:
        tree: Any = located(file).tree
        shapes = {str(k): tuple(map(int, v)) for k, v in tree.items()}
    except (Beyond, QemError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{file}: not a dict of shapes ({error})") from None
    space = opaque(shapes, REASON)
    if not isinstance(tree, Mapping) or space.size != columns:
        raise InputError(f"{file}: its shapes have {space.size} numbers, a row has {columns}")
    return space
