"""What the readers of published INR zoos share: one row a network, told from its path alone, in a
folder or straight from the archive; weights are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qemcli.errors import InputError, QemError
from qemcli.formats._alike import Alike
from qemcli.recognition import stated
from qemcli.spaces import Chain, chain_of
from qemcli.zoos import sources
from qemcli.zoos.layouts._usual import usual
from qemcli.zoos.members import Member, Tree, first_names, tree
from qemcli.zoos.zoo import Zoo

if TYPE_CHECKING:
    import pandas

W0 = 30.0
SIDES = {"cifar": 32, "mnist": 28, "fashion": 28}  # pixels, by what the names say
OTHER = (".json", ".md", ".txt", ".csv", ".yaml", ".yml", ".log", ".png", ".parquet")
MACOS = "what macOS puts into archives"


class Network(NamedTuple):
    """What a path says: class of the image, row of the image in its data set (test images after
    the training images), part, number of the augmented copy (-1: none), name of the image set."""

    label: int | None
    image: int
    split: str | None
    augmented: int = -1
    images: str = ""


@dataclass
class Found:
    """The networks of a tree, what failed, what was left out (reason -> names), and the files of
    text among them."""

    path: Path
    tree: Tree
    networks: dict[str, tuple[Member, Network]] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    texts: dict[str, Member] = field(default_factory=dict)

    def leave_out(self, reason: str, names: Iterable[str]) -> None:
        """Take networks out again, and say why."""
        listed = list(names)
        self.left_out.setdefault(reason, []).extend(listed)
        for name in listed:
            self.networks.pop(name, None)

    def fail(self, reason: str, names: Iterable[str]) -> None:
        """Take networks out again as failures."""
        for name in list(names):
            self.failures.append({"checkpoint": name, "reason": reason})
            self.networks.pop(name, None)


def named(path: Path, name: str) -> str:
    """A member's name below the name of the tree itself: a folder may be given without its
    parents."""
    return f"{path.resolve().name if path.is_dir() else path.stem}/{name}"


def claims(path: Path, told: Callable[[str], Network | None]) -> bool:
    """True where one of the first names is that of a network."""
    return any(told(named(path, name)) is not None for name in first_names(path))


def find(path: Path, told: Callable[[str], Network | None]) -> Found:
    """All networks of a folder or an archive; InputError where the archive cannot be listed."""
    lies = tree(path)
    if lies is None:
        raise InputError(f"{path}: neither a folder nor a tar nor a zip")
    found = Found(path, lies)
    for member in lies.members():
        network = told(named(path, member.name))
        base = member.name.rpartition("/")[2]
        if "__MACOSX" in member.name or base.startswith("."):
            found.left_out.setdefault(MACOS, []).append(member.name)
        elif member.reason is not None:
            found.fail(member.reason, [member.name])
        elif network is not None:
            found.networks[member.name] = (member, network)
        elif base.lower().endswith(OTHER):
            found.texts[member.name] = member
        else:
            reason = "statistics of the zoo" if base == "statistics.pth" else "no network's name"
            found.left_out.setdefault(reason, []).append(member.name)
    return found


def opened(found: Found, layout: str, convention: str, about: dict[str, Any]) -> Zoo:
    """The zoo of what was found; InputError where not one network can be read."""
    reader = Alike()
    if found.networks and all(network.label is None for _, network in found.networks.values()):
        _labelled(found, reader)
    space = _space(found, reader, convention)
    index = _index(found)
    arch = sources.arch_key(space)
    index.insert(2, "arch", arch)
    index["activation"], index["parameters"] = "sin", np.int32(space.size)
    found.failures.sort(key=lambda item: item["checkpoint"])
    left_out = [
        {"name": names[0], "files": len(names), "reason": reason}
        for reason, names in found.left_out.items()
    ]
    record = {"name": found.path.resolve().stem, "left_out": left_out, **about}
    source = sources.members(found.path)
    return Zoo(index, {arch: space}, source, found.path, layout, record, found.failures)


def _index(found: Found) -> pandas.DataFrame:
    import pandas

    names = sorted(found.networks)
    rows = [found.networks[name] for name in names]
    members = pandas.DataFrame([m for m, _ in rows], columns=Member._fields)
    networks = pandas.DataFrame([n for _, n in rows], columns=Network._fields)
    columns: dict[str, Any] = {"uid": np.arange(len(rows)), "checkpoint": names, "file": names}
    for name in ("label", "image", "split", "augmented"):
        if networks[name].notna().any():
            columns[name] = networks[name]
    columns |= {name: members[name] for name in ("size", "offset", "packed")}
    return pandas.DataFrame(columns)


def _labelled(found: Found, reader: Alike) -> None:
    """Where no path says the class, the files do: all of them are read."""
    for name, (member, network) in list(found.networks.items()):
        try:
            label = reader.read(found.tree.read(member))[0].metadata.get("label")
        except QemError as error:
            found.fail(error.message, [name])
            continue
        if isinstance(label, int):
            found.networks[name] = (member, network._replace(label=label))


def _space(found: Found, reader: Alike, convention: str) -> Chain:
    """The space that most of the first networks have, as a SIREN."""
    one = usual(
        "INRs",
        found.path,
        found.networks,
        lambda name: reader.read(found.tree.read(found.networks[name][0]))[0].space,
        found.failures,
    )
    siren = chain_of(stated(one, W0, convention), "a zoo of INRs")
    return siren.running(image=_image(found, siren))


def _image(found: Found, space: Chain) -> tuple[int, int, int] | None:
    """(channels, height, width), by the names and the outputs; None for an INR of no image."""
    inputs, channels = space.layers[0].cols, space.layers[-1].rows
    if inputs != 2 or channels not in (1, 3):
        return None
    name, (_, network) = next(iter(found.networks.items()))
    said = f"{network.images} {named(found.path, name)}".lower()
    side = next((s for word, s in SIDES.items() if word in said), 28 if channels == 1 else 32)
    return channels, side, side
