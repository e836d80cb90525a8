"""The INRs of DWSNets (Navon et al. 2023, arXiv:2301.12780), byte for byte, from a folder or the
.zip itself.

mnist-inrs/mnist_png_<training|testing>_<class>_<index>/checkpoints/model_final.pth and
fmnist_inrs/<train|test>/model_<index>.pth, whose class stands inside the file; INRs of sine waves
(ssl-inrs, sine-regression-inrs) are model_<seed>.pth. `image` counts the training images, then
the test images. A splits file inside or beside the zoo says the parts; without one, 5,000 of the
training images, drawn with seed 0, are val: the published choice was not written down.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qemcli.errors import InputError, QemError
from qemcli.zoos.layouts._inr import Found, Network, claims, find, opened
from qemcli.zoos.members import LARGEST
from qemcli.zoos.zoo import Zoo

PNG = re.compile(
    r"(?:^|/)([a-z0-9]+)_png_(train|test)(?:ing)?_([A-Za-z0-9]+)_(\d{1,9})"
    r"/checkpoints/model_final\.pth$"
)
NUMBERED = re.compile(r"(?:^|/)([\w-]*inrs)/(?:[\w-]+/)??(?:(train|test)/)?model_(\d{1,9})\.pth$")
TRAINING = {"cifar10": 50_000}  # images of the training file; 60,000 elsewhere
VAL = 5_000
CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
SPLITS = re.compile(r"(^|/)([a-z]+_)?splits\.json$")


def sniff(path: Path) -> bool:
    """A folder or an archive with networks of such names."""
    return claims(path, told)


def told(name: str) -> Network | None:
    """What a path says of its network, its part as far as the path says it."""
    png = PNG.search(name)
    if png is not None:
        label = int(png[3]) if png[3].isdecimal() else _class(png[3])
        return None if label is None else _network(png[1], png[2], label, int(png[4]))
    numbered = NUMBERED.search(name)
    if numbered is None:
        return None
    images = numbered[1].replace("-", "_").removesuffix("_inrs")
    return _network(images, numbered[2], None, int(numbered[3]))


def _class(word: str) -> int | None:
    return CIFAR10.index(word) if word in CIFAR10 else None


def _network(images: str, part: str | None, label: int | None, index: int) -> Network:
    image = index + (TRAINING.get(images, 60_000) if part == "test" else 0)
    return Network(label, image, part, images=images)


def open(path: Path, activation: str | None = None, statistics: bool = False) -> Zoo:
    """The zoo of one set of images; what else the archive holds is left out and named.

    Raises InputError where not one network can be read, or for a splits file that is damaged.
    """
    found = find(path, told)
    counted = Counter(network.images for _, network in found.networks.values())
    images = "mnist" if "mnist" in counted else next(iter(counted.most_common(1)), ("", 0))[0]
    others = [n for n, (_, network) in found.networks.items() if network.images != images]
    if others:
        found.leave_out(f"networks of other images than {images}", others)
    about = {"paper": "arXiv:2301.12780", "convention": "dws", "images": images}
    about["splits"] = _divide(found, images)
    return opened(found, "dws_inr", "dws", about)


def _divide(found: Found, images: str) -> str:
    """Say every network's part; returns by what."""
    stated = _stated(found, images)
    if stated is not None:
        name, parts = stated
        for key, (member, network) in found.networks.items():
            found.networks[key] = (member, network._replace(split=parts.get(_tail(key))))
        return name
    training = [w.image for _, w in found.networks.values() if w.split == "train"]
    if not training:
        return "none"
    total = TRAINING.get(images, 60_000)
    drawn = np.random.default_rng(0).permutation(max(total, max(training) + 1))
    val = set(drawn[: len(drawn) * VAL // total].tolist())
    for key, (member, network) in found.networks.items():
        if network.split == "train" and network.image in val:
            found.networks[key] = (member, network._replace(split="val"))
    return "training and test images as published; val drawn with seed 0"


def _tail(name: str) -> tuple[str, ...]:
    """The end of a path that names a network, whatever machine it was written on."""
    parts = tuple(name.replace("\\", "/").split("/"))
    return parts[-3:] if parts[-1] == "model_final.pth" else parts[-2:]


def _stated(found: Found, images: str) -> tuple[str, dict[tuple[str, ...], str]] | None:
    """(name, end of path -> part) of the splits file in the tree, else of one beside it."""
    for name, member in found.texts.items():
        if SPLITS.search(name):
            try:
                return name, _parts(name, found.tree.read(member))
            except QemError as error:
                raise InputError(f"{found.path}: {error.message}", error.hint) from None
    beside = found.path.resolve().parent / f"{images}_splits.json"
    if not images or not beside.is_file() or beside.stat().st_size > LARGEST:
        return None
    return beside.name, _parts(str(beside), beside.read_bytes())


def _parts(name: str, data: bytes) -> dict[tuple[str, ...], str]:
    """{"train": [paths] or {"path": [paths]}, ...} turned round."""
    try:
        return {_tail(path): part for part, path in _paths(json.loads(data))}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(
            f"{name}: not a splits file", 'it is {"train": [paths], "val": ..., "test": ...}'
        ) from None


def _paths(record: Any) -> Iterator[tuple[str, str]]:
    for part in ("train", "val", "test"):
        listed = record.get(part, [])
        for path in listed["path"] if isinstance(listed, dict) else listed:
            yield part, path
