"""What can be plugged in: a module in a folder of the package, or an entry point; found by name
only.

`names("architectures")` lists the folder without importing anything in it; `load("architectures",
"nfn")` imports that one module. An installed package adds its own by the entry-point group
`qemcli.architectures`.
"""

from __future__ import annotations

import difflib
import pkgutil
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from types import ModuleType

from qemcli.errors import UsageError

KINDS = (
    "groups", "formats", "architectures", "families", "zoos.layouts", "zoos.build", "tasks",
    "edits",
)  # fmt: skip


@cache
def _points(kind: str) -> tuple[EntryPoint, ...]:
    """The plug-ins of one kind: looked for once, in all that is installed."""
    return tuple(entry_points(group=f"qemcli.{kind}"))


def _folder(kind: str) -> list[str]:
    spec = find_spec(f"qemcli.{kind}")
    paths = list(spec.submodule_search_locations or []) if spec else []
    found = (m.name for m in pkgutil.iter_modules(paths) if not m.ispkg)
    return sorted(name for name in found if not name.startswith("_"))


def names(kind: str) -> list[str]:
    """The names of one kind, those of installed plug-ins included: `names("groups")`."""
    plugins = {point.name for point in _points(kind)}
    return sorted(set(_folder(kind)) | plugins)


def suggest(name: str, known: list[str]) -> str:
    """`Did you mean 'nfn'?` where a known name is near, else the list of known names."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(known)}."


def load(kind: str, name: str) -> ModuleType:
    """The module that implements `name`; raises UsageError with the nearest known name."""
    if name in _folder(kind):
        return import_module(f"qemcli.{kind}.{name}")
    for point in _points(kind):
        if point.name == name:
            return point.load()
    raise UsageError(f"no {kind.rstrip('s')} is called '{name}'", suggest(name, names(kind)))
