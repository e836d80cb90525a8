"""Settings that come from outside (a recipe, a header), against the dataclass that they are for."""

from __future__ import annotations

import dataclasses
from typing import Any

from qemcli import registry
from qemcli.errors import UsageError


def fields(cls: type, given: object, where: str) -> dict[str, Any]:
    """`given` where every key is a field of the dataclass and has a value of its kind; UsageError,
    with the nearest name, otherwise."""
    if not isinstance(given, dict):
        raise UsageError(f"{where}: {given!r} stands where settings belong")
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in given.items():
        if key not in known:
            hint = registry.suggest(key, sorted(known))
            raise UsageError(f"{where}: no setting is called '{key}'", hint)
        if not _like(value, known[key]):
            default = known[key].default
            raise UsageError(f"{where}: '{key}' is {value!r}; something like {default!r} is needed")
    return given


def _like(value: object, field: dataclasses.Field[Any]) -> bool:
    """True where the value has the kind of the field's default, or of one of those that its
    annotation joins; whole numbers pass for real ones, lists for tuples."""
    kinds = str(field.type)
    if "|" in kinds:
        names = {"list": "tuple", "int": "float"}
        name = type(value).__name__
        return value is None or name in kinds or names.get(name, "?") in kinds
    return field.default is dataclasses.MISSING or _same(value, field.default)


def _same(value: object, default: object) -> bool:
    if isinstance(default, tuple):
        items = value if isinstance(value, tuple | list) else None
        return items is not None and all(not default or _same(item, default[0]) for item in items)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return default is None or isinstance(value, type(default))
