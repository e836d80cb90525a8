"""How heads share the rows of queries, keys and values: no tensor says it, config.json does."""

from __future__ import annotations

import re
from collections.abc import Mapping

from qemcli.errors import InputError
from qemcli.families._config import Config
from qemcli.families._family import Family

Shape = tuple[int, ...]
PATCH = ("x", "u", "w")


def words(axes: str) -> list[str]:
    """One word a dimension: `r* (c k d)` is `r*`, `(c k d)`."""
    return re.findall(r"\([^)]*\)\*?|\S+", axes)


def unread(axes: str) -> str:
    """The axes of a map's bias: those that the map writes, without the patch."""
    return " ".join(word for word in words(axes) if word[-1] != "*" and word not in PATCH)


def sizes(
    family: Family, config: Config, at: str, held: Mapping[str, tuple[str, Shape]]
) -> dict[str, int]:
    """k, q, d, e of one block; `held`: map -> (tensor, shape) of its weights.

    Raises InputError where the heads are not known or do not share the rows.
    """
    rows: dict[str, int] = {}
    for stem, (axes, roles) in family.maps.items():
        if stem in held and set(roles.split()) <= {"query", "key", "value"}:
            rows |= dict.fromkeys(roles.split(), _rows(*held[stem], axes))
    lacking = [role for role in ("query", "key", "value") if role not in rows]
    if lacking:
        raise InputError(f"no {lacking[0]} among the tensors '{at}...'")
    heads = _heads(family, config)
    stated = config.number(family.key("head"))
    per, rest = divmod(rows["query"], heads)
    if rest or stated not in (None, per):
        each = f" of {stated}" if stated else ""
        raise InputError(
            f"{heads} heads{each} do not share the {rows['query']} query rows of '{at}...'"
        )
    groups = _groups(family, config, rows, per, heads, at)
    return {"k": groups, "q": heads // groups, "d": per, "e": rows["value"] // groups}


def _groups(
    family: Family, config: Config, rows: Mapping[str, int], per: int, heads: int, at: str
) -> int:
    """Key and value groups; one a head where the family has no grouped queries."""
    grouped = any("q" in axes for axes, _ in family.maps.values())
    stated = config.number(family.key("groups")) if grouped else heads
    found, rest = divmod(rows["key"], per)
    groups = stated or found
    if rest or found != groups or heads % groups or rows["value"] % groups:
        raise InputError(
            f"{heads} heads in {groups} groups do not share the {rows['key']} key and "
            f"{rows['value']} value rows of '{at}...'"
        )
    return groups


def _heads(family: Family, config: Config) -> int:
    stated = config.number(family.key("heads"))
    heads = stated if stated is not None else config.heads
    if heads is None:
        raise InputError(
            f"a {family.name} network: no tensor says how many heads its attention has; its "
            "config.json would, or qem index --heads N",
            "pass --heads N, or give the directory with its config.json",
        )
    return heads


def _rows(name: str, shape: Shape, axes: str) -> int:
    """The size of the side of a map that belongs to heads, one part of it where fused."""
    dims = words(axes)
    if len(dims) != len(shape):
        raise InputError(f"tensor '{name}' has shape {shape}, not {len(dims)} dimensions")
    at = next(i for i, word in enumerate(dims) if "k" in word)
    return shape[at] // (3 if "c" in dims[at] else 1)
