"""Settings that come from outside (a recipe, a header), against the dataclass that they are for."""

from __future__ import annotations

import dataclasses
from typing import Any


def like(value: object, field: dataclasses.Field[Any]) -> bool:
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
