"""Open the zoo that a command's arguments mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qemcli.errors import InputError, UsageError
from qemcli.recognition import stated
from qemcli.zoos.resolve import resolve
from qemcli.zoos.zoo import Zoo


def open_zoo(
    given: str | Path | None,
    say: Callable[[str], None] = lambda text: None,
    where: str | None = None,
    limit: int | None = None,
    activation: str | None = None,
    strict: bool = False,
    ships: str | None = None,
    splits: str | None = None,
) -> Zoo:
    """The zoo, filtered; `ships` names the embedded one that is taken where nothing else is there,
    `splits` the column of the index that says the parts, and which rows are of any.

    Raises InputError where nothing usable is left, or, `strict`, at the first failure.
    """
    path = resolve(given, say, ships)
    zoo = Zoo.open(path, activation=activation).understood()
    if strict and zoo.failures:
        first = zoo.failures[0]
        raise InputError(f"{first['checkpoint']}: {first['reason']}")
    if splits is not None:
        zoo = _split_by(zoo, splits)
    if where:
        zoo = zoo.where(where)
        if not len(zoo):
            raise InputError(f"--where '{where}': no checkpoint is left")
    if limit:
        zoo = zoo.limit(limit)
    if not len(zoo):
        raise InputError(f"{path}: no usable checkpoint{_why(zoo)}")
    return zoo


def _split_by(zoo: Zoo, column: str) -> Zoo:
    """The zoo with another column as its `split`; rows of no part are left out."""
    index = zoo.index
    parts = set(index[column].dropna()) if column in index else set()
    if not parts or not parts <= {"train", "val", "test"}:
        raise UsageError(
            f"{zoo.path}: no column '{column}' of train, val and test",
            f"its columns: {', '.join(c for c in index if not c.startswith('stat.'))}",
        )
    return replace(zoo, index=index.assign(split=index[column])).take(index[column].notna())


def as_sirens(zoo: Zoo, w0: float | None = None, convention: str | None = None) -> Zoo:
    """The zoo with what the caller says of how its SIRENs are run; networks of another activation
    stay what they are. UsageError for an unknown convention."""
    spaces = {arch: stated(space, w0, convention) for arch, space in zoo.spaces.items()}
    changed = [arch for arch, space in spaces.items() if space is not zoo.spaces[arch]]
    index = zoo.index
    if changed and "activation" in index:
        unknown = index["activation"].isna() & index["arch"].isin(changed)
        index = index.assign(activation=index["activation"].mask(unknown, "sin"))
    return replace(zoo, spaces=spaces, index=index)


def _why(zoo: Zoo) -> str:
    if zoo.failures:
        first = zoo.failures[0]
        return f" ({len(zoo.failures)} failed; {first['checkpoint']}: {first['reason']})"
    return ""
