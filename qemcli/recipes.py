"""Training recipes: TOML that says which zoo, which design and which schedule; every field has a
default."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemcli import edits, registry
from qemcli.designs import Design
from qemcli.errors import InputError, UsageError
from qemcli.settings import fields
from qemcli.shipped import shipped
from qemcli.training import Schedule

MARKS = {"comparison": "design", "training": "architecture"}  # what every recipe of a kind says
DEFAULT = "cnn-small"  # the zoo whose train.toml is what `qem train` does with nothing else


@dataclass(frozen=True)
class Recipe:
    """What `qem train` does.

    Attributes:
        zoos: names or paths of the zoos whose networks are learned from.
        where: a filter over their indexes, on every split.
        splits: the column of their indexes that says the parts, where it is not `split`.
        test_where: one more for the networks that the test score speaks of.
        task, design, schedule, seed: see Design and Schedule.
    """

    zoos: tuple[str, ...] = ()
    where: str | None = None
    test_where: str | None = None
    splits: str | None = None
    task: str = "generalization"
    design: Design = Design("statnn", "balanced")
    schedule: Schedule = Schedule()
    seed: int = 0
    source: dict[str, Any] = field(default_factory=dict)


def read_toml(path: Path) -> dict[str, Any]:
    """The document; InputError where it is not TOML, is too large, or is not there."""
    try:
        if path.stat().st_size > 1 << 20:
            raise InputError(f"{path}: larger than a recipe can be (1 MB)")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not TOML ({error})") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


def find(name: str, kind: str, file: str) -> Path:
    """The recipe that an argument means: a path, the `file` of a shipped model or zoo of that
    name, or NAME/OTHER for the other.toml beside it."""
    places = [shipped(kept) for kept in ("models", "zoos")]
    beside = [place / f"{name}.toml" for place in places if "/" in name]
    for path in (Path(name), *(place / name / file for place in places), *beside):
        if path.is_file():
            return path
    names = {found.parent.name for place in places for found in place.glob(f"*/{file}")}
    if "/" in name:
        names |= _beside(places, kind)
    known = sorted(names)
    raise UsageError(
        f"no {kind} recipe '{name}': neither a file nor a shipped name with a {file}",
        registry.suggest(name, known) if known else None,
    )


def _beside(places: list[Path], kind: str) -> set[str]:
    """The names NAME/OTHER of the shipped recipes of one kind."""
    if kind not in MARKS:
        return set()
    found = (path for place in places for path in place.glob("*/*.toml"))
    return {f"{p.parent.name}/{p.stem}" for p in found if MARKS[kind] in read_toml(p)}


def load(path: Path) -> Recipe:
    """Read a training recipe; UsageError names what is wrong and what was probably meant."""
    document = read_toml(path)
    plain = {"where", "test_where", "splits", "task", "seed"}
    known = plain | {"zoo", "zoos", "edit", "architecture", "quasi"}
    for key in document:
        if key not in known | {"config", "schedule"}:
            raise UsageError(
                f"{path}: no setting is called '{key}'", registry.suggest(key, sorted(known))
            )
    zoos = document.get("zoos", [document["zoo"]] if "zoo" in document else [])
    design = Design(
        document.get("architecture", "statnn"),
        document.get("quasi", "none"),
        _config(document, path),
    )
    try:
        schedule = Schedule(**fields(Schedule, document.get("schedule", {}), f"{path} [schedule]"))
        given = {key: document[key] for key in plain & set(document)}
        return Recipe(zoos=tuple(zoos), design=design, schedule=schedule, source=document, **given)
    except TypeError as error:
        raise UsageError(f"{path}: {error}") from None


def editing(recipe: Recipe, edit: str | None, expand: int | None) -> Recipe:
    """The recipe of an editor for another edit, or with other branches."""
    if edit is None and expand is None:
        return recipe
    if recipe.task != "editing":
        raise UsageError(
            f"--edit and --expand are for editors, and the recipe's task is '{recipe.task}'",
            "start from one that edits: qem train dilate-mnist --edit rotate:10",
        )
    given = {"edit": edit and str(edits.find(edit)), "expand": expand}
    config = recipe.design.config | {k: v for k, v in given.items() if v is not None}
    return dataclasses.replace(recipe, design=dataclasses.replace(recipe.design, config=config))


def _config(document: dict[str, Any], path: Path) -> dict[str, Any]:
    """The configuration of the design, with the edit that it is trained for."""
    config = dict(document.get("config", {}))
    if "edit" in document:
        config["edit"] = str(edits.find(str(document["edit"])))
    if (document.get("task") == "editing") != ("edit" in config):
        raise UsageError(
            f'{path}: task = "editing" and an edit go together',
            f'for example edit = "dilate"; known: {", ".join(edits.names())}',
        )
    return config
