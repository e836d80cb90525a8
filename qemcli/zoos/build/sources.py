"""Images and texts to train zoos on: scikit-learn's digits, a parquet in the Hub's schema, or the
Hub itself."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qemcli.errors import EnvironmentFailure, InputError, UsageError
from qemcli.hub.fetching import one_file
from qemcli.hub.reference import PREFIX, Reference
from qemcli.hub.repository import resolve
from qemcli.zoos.build.drawn import DrawnRecipe
from qemcli.zoos.build.transformer_recipe import TransformerRecipe

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Images:
    """Training and test images (p, channels, height, width) in [-1, 1], and their labels (p,)."""

    train: Tensor
    train_label: Tensor
    test: Tensor
    test_label: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        return int(self.train_label.max()) + 1


def load(recipe: DrawnRecipe | TransformerRecipe) -> Images:
    """The recipe's images; the test images are the first `test_images` of a seeded order.

    Raises InputError for a file that holds no images, EnvironmentFailure where an extra is missing.
    """
    train = read(recipe.source)
    if recipe.test_source:
        test = _first(*read(recipe.test_source), recipe.test_images)
    else:
        train, test = _cut(*train, recipe.test_images)
    return Images(*tensors(*train, recipe.resize), *tensors(*test, recipe.resize))


def read(source: str) -> Labelled:
    """All images of a source, in its order: (p, channels, h, w) in [0, 1], and their labels."""
    return _digits() if source == "digits" else _parquet(source)


def class_names(source: str) -> list[str]:
    """What the source calls its classes; [] where it gives them numbers only."""
    if source == "digits":
        return [str(i) for i in range(10)]
    import pyarrow.parquet

    features = _features(pyarrow.parquet.read_schema(_fetched(source))).values()
    return next((f["names"] for f in features if f.get("names")), [])


def _features(schema: pyarrow.Schema) -> dict[str, dict[str, Any]]:
    """What the `huggingface` metadata says of the columns that there are; {} where it is no such
    record."""
    try:
        record = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        found = record.get("info", {}).get("features", {}).items()
    except (ValueError, AttributeError):
        return {}
    return {n: f for n, f in found if isinstance(f, dict) and n in schema.names}


Labelled = tuple[np.ndarray, np.ndarray]  # (p, channels, h, w) in [0, 1], (p,)


def _digits() -> Labelled:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise EnvironmentFailure(
            "the digits come with scikit-learn", "pip install 'qemcli[build]'"
        ) from None
    found = load_digits()
    return found.images[:, None].astype(np.float32) / 16, found.target


def _cut(image: np.ndarray, label: np.ndarray, test: int) -> tuple[Labelled, Labelled]:
    if not 0 < test < len(image):
        raise UsageError(f"test_images is {test}, and there are {len(image)} images in all")
    order = np.random.default_rng(0).permutation(len(image))
    held, rest = order[:test], order[test:]
    return (image[rest], label[rest]), (image[held], label[held])


def _first(image: np.ndarray, label: np.ndarray, count: int) -> Labelled:
    order = np.random.default_rng(0).permutation(len(image))[:count]
    return image[order], label[order]


def tensors(image: np.ndarray, label: np.ndarray, side: int) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1], averaged down to `side` pixels where it is not 0, and their labels."""
    x = torch.from_numpy(np.ascontiguousarray(image))
    if side and side != x.shape[-1]:
        x = torch.nn.functional.interpolate(x, size=(side, side), mode="area")
    return 2 * x - 1, torch.from_numpy(label.astype(np.int64))


def _parquet(source: str) -> Labelled:
    """Images and labels of one parquet file, columns found by feature type and not by name."""
    path, table = _table(source)
    image, label = _columns(path, table, "Image")
    pictures = [_picture(path, row) for row in table[image].to_pylist()]
    if len({p.shape for p in pictures}) != 1:
        raise InputError(f"{path}: its images have different sizes")
    return np.stack(pictures), _labels(path, table, label)


def _labels(path: Path, table: pyarrow.Table, column: str) -> np.ndarray:
    found = np.asarray(table[column].to_pylist())
    if found.dtype.kind not in "iu":
        raise InputError(f"{path}: column '{column}' has labels that are no whole numbers")
    return found


def read_texts(source: str) -> tuple[np.ndarray, np.ndarray]:
    """All texts of a parquet file, in its order, (p,) of str, and their labels (p,)."""
    path, table = _table(source)
    text, label = _columns(path, table, "Value")
    found = ["" if one is None else one for one in table[text].to_pylist()]
    return np.array(found, dtype=object), _labels(path, table, label)


def _table(source: str) -> tuple[Path, pyarrow.Table]:
    import pyarrow
    import pyarrow.parquet

    path = _fetched(source)
    if not path.is_file():
        raise InputError(f"{path}: no such file", "a parquet file, or hf://…")
    try:
        return path, pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: not a readable parquet file ({error})") from None


def _columns(path: Path, table: pyarrow.Table, wanted: str) -> tuple[str, str]:
    """(column of Image or of Value that is text, label column) from the `huggingface` schema
    metadata, else from the column types."""
    schema = table.schema
    kinds = {name: f.get("_type") for name, f in _features(schema).items()}
    for field in schema:
        if field.name not in kinds:
            kinds[field.name] = _kind(str(field.type))
        elif kinds[field.name] == "Value" and "string" not in str(field.type):
            kinds[field.name] = "number"
    found = [[n for n, kind in kinds.items() if kind == of] for of in (wanted, "ClassLabel")]
    if not all(found):
        what = "image" if wanted == "Image" else "text"
        raise InputError(f"{path}: no {what} and label columns among {', '.join(kinds)}")
    return found[0][0], found[1][0]


def _kind(arrow: str) -> str:
    """The feature type that a column of this arrow type is taken for."""
    if arrow.startswith("struct") and "bytes" in arrow:
        return "Image"
    if "string" in arrow:
        return "Value"
    return "ClassLabel" if "int" in arrow else ""


def _picture(path: Path, row: dict[str, bytes]) -> np.ndarray:
    """PNG or JPEG bytes -> (channels, height, width) in [0, 1]; transparency is a channel."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise EnvironmentFailure(
            "images are read by pillow", "pip install 'qemcli[build]'"
        ) from None
    try:
        image: Image.Image = Image.open(io.BytesIO(row["bytes"]))
        deep = image.mode.startswith("I")  # 16 bits
        if not deep and image.mode not in ("L", "LA", "RGB", "RGBA"):
            image = image.convert("L" if image.mode == "1" else "RGB")  # a palette's colours, ...
        pixels = np.asarray(image, dtype=np.float32) / (65535 if deep else 255)
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: a row that is no image of a zoo ({error})") from None
    except (UnidentifiedImageError, OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: a row that is no image ({error})") from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _fetched(source: str) -> Path:
    """A local path; hf://datasets/owner/name[@revision]/file is fetched, and checked by its
    hash."""
    return one_file(Reference.parse(source)) if source.startswith(PREFIX) else Path(source)


def pinned(source: str) -> str:
    """The source, a repository of the Hub at the commit that its revision means today."""
    if not source.startswith(PREFIX):
        return source
    ref = Reference.parse(source)
    return str(ref.at(resolve(ref)))
