"""What the readers of published zoos of training runs share: the members of a tree sorted into
checkpoints, tables and what is left out; one row a checkpoint, one look at a checkpoint a kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qemcli.checkpoints import Checkpoint
from qemcli.errors import InputError, QemError
from qemcli.spaces import WeightSpace
from qemcli.zoos import sources
from qemcli.zoos.members import AFTER, LARGEST, Member
from qemcli.zoos.networks import Networks, networks
from qemcli.zoos.zoo import Zoo

MACOS = "what macOS puts into archives"
OTHER = "no checkpoint of a run"


@dataclass
class Runs:
    """The checkpoints of a tree by their names, its other files, what failed or was left out."""

    path: Path
    reader: Networks
    checkpoints: dict[str, Member] = field(default_factory=dict)
    texts: dict[str, Member] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def fail(self, name: str, reason: str) -> None:
        """Take a checkpoint out again."""
        self.failures.append({"checkpoint": name, "reason": reason})
        self.checkpoints.pop(name, None)

    def json(self, name: str) -> Any:
        """What a JSON file holds (NaN and Infinity allowed, as Python writes them); None where it
        is not there; InputError where it is damaged."""
        text = self.text(name)
        if text is None:
            return None
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise InputError(f"{self.path}: '{name}' is not JSON", "fetch it again") from None

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The objects of a file of JSON lines; a last line that is cut is left out."""
        text = self.text(name) or ""
        found = []
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                found.append(record)
        return found

    def text(self, name: str) -> str | None:
        """The text of a file; None where it is not there or cannot be read."""
        member = self.texts.get(name)
        if member is None or member.reason is not None or member.size > LARGEST:
            return None
        try:
            return self.reader.tree.read(member).decode("utf-8", "replace")
        except QemError:
            return None


def find(path: Path, chosen: Callable[[str], bool], read: Callable[[str], str | None]) -> Runs:
    """All checkpoints (`chosen` by name) of a tree; `read` says of another file why it is left out,
    or None for one that the reader may ask for. InputError where the archive cannot be listed."""
    runs = Runs(path, Networks.of(path))
    for member in runs.reader.tree.members():
        base = member.name.rpartition("/")[2]
        if "__MACOSX" in member.name or base.startswith("._") or base == ".DS_Store":
            runs.left_out.setdefault(MACOS, []).append(member.name)
        elif member.reason is not None and member.name.endswith(AFTER):
            runs.fail(member.name, member.reason)  # whatever it was
        elif chosen(member.name):
            runs.checkpoints[member.name] = member
            if member.reason is not None:
                runs.fail(member.name, member.reason)
        elif reason := read(member.name):
            runs.left_out.setdefault(reason, []).append(member.name)
        else:
            runs.texts[member.name] = member
    return runs


Look = Callable[[Checkpoint], WeightSpace]


def spaces(
    runs: Runs, kinds: Iterable[tuple[str, Hashable]], look: Look = Checkpoint.listed
) -> dict[str, WeightSpace]:
    """Checkpoint -> weight space, from (name, kind) pairs: the first one of each kind that can be
    read speaks for it; those of a kind of which none can be read fail."""
    known: dict[Hashable, WeightSpace] = {}
    reasons: dict[Hashable, str] = {}
    found: dict[str, WeightSpace] = {}
    waiting = list(kinds)
    for name, kind in waiting:
        if kind in known:
            continue
        try:
            known[kind] = look(runs.reader.open(runs.checkpoints[name]))
        except QemError as error:
            reasons[kind] = error.message
            if kind == name:
                runs.fail(name, error.message)
    for name, kind in waiting:
        if kind in known:
            found[name] = known[kind]
        elif name in runs.checkpoints:
            runs.fail(name, reasons[kind])
    return found


def opened(
    runs: Runs,
    layout: str,
    rows: dict[str, dict[str, Any]],
    known: dict[str, WeightSpace],
    about: dict[str, Any],
) -> Zoo:
    """The zoo of rows (checkpoint -> columns) with these spaces; InputError where there is none."""
    import pandas

    names = sorted(name for name in known if name in rows)
    if not names:
        first = f"; the first: {': '.join(runs.failures[0].values())}" if runs.failures else ""
        raise InputError(f"{runs.path}: none of its checkpoints can be read{first}")
    archs = {id(space): sources.arch_key(space) for space in known.values()}
    members = pandas.DataFrame([runs.checkpoints[n] for n in names], columns=Member._fields)
    index = pandas.DataFrame(
        {
            "uid": np.arange(len(names)),
            "checkpoint": names,
            "arch": [archs[id(known[n])] for n in names],
            "file": names,
        }
    )
    told = pandas.DataFrame([rows[n] for n in names])
    index = pandas.concat([index, told], axis=1)
    index["parameters"] = np.array([known[n].size for n in names], np.int32)
    if "activation" not in index:
        index["activation"] = [known[n].activation for n in names]
    index["size"], index["begins"] = members["size"], members["offset"]
    index["packed"] = members["packed"]
    runs.failures.sort(key=lambda item: item["checkpoint"])
    left_out = [
        {"name": found[0], "files": len(found), "reason": reason}
        for reason, found in runs.left_out.items()
    ]
    record = {"name": runs.path.resolve().stem, "left_out": left_out, **about}
    told_spaces = {archs[id(space)]: space.unstated() for space in known.values()}
    source = networks(runs.path)
    return Zoo(index, told_spaces, source, runs.path, layout, record, runs.failures)


def parted(runs: Iterable[str], seed: int, shares: tuple[float, float]) -> dict[str, str]:
    """Run -> train, val or test: sorted by name, shuffled by Random(seed), cut at the shares."""
    import random

    listed = sorted(set(runs))
    random.Random(seed).shuffle(listed)
    first, second = (round(share * len(listed)) for share in (shares[0], sum(shares)))
    return {
        run: "train" if i < first else "val" if i < second else "test"
        for i, run in enumerate(listed)
    }
