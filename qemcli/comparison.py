"""Several designs on one zoo or more: same split, same schedule, several seeds.

A comparison is a TOML file:

    title = "How well CNNs generalise"           # of its tables
    zoo = "cnn-fashion"                          # name or path, or zoos = [...]; `where` filters it
    seeds = [0, 1, 2]
    reference = "monomial_nfn none"              # paired differences are against this design
    group = "monomial"                           # the orbits that trained predictors are tried on
    ranges = [[1, 10], [1, 10000]]               # scales of those tries, U[lo, hi]; of matrices in
                                                 # heads (group = "general-linear") the singular
                                                 # values, so that hi / lo bounds the condition
    thresholds = [0, 0.2, 0.4]                   # also scored on networks of such accuracy or more
    augment = [[1, 10]]                          # also train on zoos doubled by such copies
    augmented = ["monomial_nfn none"]            # these designs only (all where not said)
    apart = "config.architecture"                # split by this column: none of its values is on
                                                 # two sides, whatever split the zoo has
    (optional) [schedule]
    epochs = 30
    (optional) [config]                          # of every design, before its own
    edit = "dilate"
    [[design]]
    architecture = "statnn"
    quasi = "balanced"
    (optional) name = "StatNN"                   # in tables; else architecture, mode, settings
    (optional) preset = "statnn-standardised"    # of `qem models --presets`, before `config`
    (optional) schedule = { lr = 4e-3 }          # where this design's own differs
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qemcli import registry
from qemcli.designs import Design
from qemcli.errors import UsageError
from qemcli.recipes import read_toml
from qemcli.settings import fields
from qemcli.training import Schedule

Range = tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """What is compared; see the module's example. `names` are those of the designs, in their order;
    () where they are called by what they are."""

    title: str = ""
    zoos: tuple[str, ...] = ()
    where: str | None = None
    splits: str | None = None
    apart: str | None = None
    task: str = "generalization"
    seeds: tuple[int, ...] = (0, 1, 2)
    reference: str = ""
    group: str = "monomial"
    ranges: tuple[Range, ...] = ()
    augment: tuple[Range, ...] = ()
    augmented: tuple[str, ...] = ()
    thresholds: tuple[float, ...] = ()
    schedule: Schedule = Schedule()
    designs: tuple[Design, ...] = ()
    names: tuple[str, ...] = ()
    schedules: tuple[dict[str, Any], ...] = ()  # what differs in a design's schedule

    @property
    def edit(self) -> str | None:
        """The edit of the designs, which must have the same; None where they do not edit."""
        found = {design.edit for design in self.designs}
        if len(found) > 1:
            raise UsageError(
                f"the designs are trained for different edits: {sorted(map(str, found))}"
            )
        return found.pop() if found else None

    @property
    def entries(self) -> dict[str, Design]:
        """The designs by the name they have in tables."""
        names = self.names or tuple(map(label, self.designs))
        return dict(zip(names, self.designs, strict=True))

    @property
    def own(self) -> dict[str, dict[str, Any]]:
        """What differs in a design's schedule from the others', by its name."""
        given = self.schedules or ({},) * len(self.designs)
        return dict(zip(self.entries, given, strict=True))

    def scheduled(self, name: str) -> Schedule:
        """The schedule of a design."""
        return dataclasses.replace(self.schedule, **self.own[name])

    def only(self, names: Iterator[str] | list[str]) -> Comparison:
        """The same with these designs."""
        kept = {name: self.entries[name] for name in names}
        own = tuple(self.own[name] for name in kept)
        designs, called = tuple(kept.values()), tuple(kept)
        return dataclasses.replace(self, designs=designs, names=called, schedules=own)


@dataclass(frozen=True)
class Trial:
    """One run: a design, a seed, and the scales its training zoo was augmented by (None: as it
    is); `called` in tables, where `settings` say where its schedule differs from the comparison's,
    and what was found by search."""

    design: Design
    seed: int
    augment: Range | None
    schedule: Schedule
    called: str = ""
    settings: str = ""

    @property
    def name(self) -> str:
        return self.called or label(self.design)

    def key(self, plan: Comparison, data: str) -> str:
        """All that the run and its row depend on, as a file name; not what it is called."""
        tried = [plan.task, plan.group, plan.ranges]
        own = dataclasses.asdict(self)
        del own["called"], own["settings"]
        record = json.dumps([own, tried, data], sort_keys=True)
        return hashlib.sha256(record.encode()).hexdigest()[:16]


def label(design: Design, schedule: Mapping[str, Any] = MappingProxyType({})) -> str:
    """`monomial_nfn exact eps=0.5`: how a design is called in tables."""
    settings = [f"{k}={v}" for k, v in sorted({**design.config, **schedule}.items())]
    return " ".join([design.architecture, design.quasi, *settings])


def load(path: Path) -> Comparison:
    """Read a comparison; UsageError names what is wrong."""
    try:
        found = _read(path)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: {error}") from None
    _check(found, path)
    return found


def _read(path: Path) -> Comparison:
    document = read_toml(path)
    shared = document.pop("config", {})
    given = [_design(d, shared, f"{path} [[design]]") for d in document.pop("design", [])]
    schedule = Schedule(**fields(Schedule, document.pop("schedule", {}), f"{path} [schedule]"))
    zoos = tuple(document.pop("zoos", [document.pop("zoo")] if "zoo" in document else []))
    fields(Comparison, document, str(path))
    for name in ("ranges", "augment"):
        document[name] = tuple((float(low), float(high)) for low, high in document.get(name, ()))
    document["seeds"] = tuple(document.get("seeds", (0, 1, 2)))
    document["augmented"] = tuple(document.get("augmented", ()))
    document["thresholds"] = tuple(map(float, document.get("thresholds", ())))
    designs, names, own = zip(*given, strict=True) if given else ((), (), ())
    kept: dict[str, Any] = {"designs": designs, "names": names, "schedules": own}
    return Comparison(schedule=schedule, zoos=zoos, **kept, **document)


def _check(plan: Comparison, path: Path) -> None:
    if not plan.designs:
        raise UsageError(f"{path}: no [[design]] to compare")
    if plan.thresholds and not registry.load("tasks", plan.task).ORDERED:
        raise UsageError(f"{path}: thresholds are for accuracies, and the task is {plan.task}")
    twice = {name for name in plan.names if plan.names.count(name) > 1}
    if twice:
        raise UsageError(f"{path}: two designs are called '{twice.pop()}'", "give each a name")
    for name in (*filter(None, [plan.reference]), *plan.augmented):
        if name not in plan.entries:
            raise UsageError(f"{path}: '{name}' is not among the designs", "; ".join(plan.entries))


def _design(
    given: dict[str, Any], shared: dict[str, Any], where: str
) -> tuple[Design, str, dict[str, Any]]:
    """(the design, its name, what differs in its schedule) of one [[design]]."""
    preset, name = given.pop("preset", None), given.pop("name", None)
    own = fields(Schedule, given.pop("schedule", {}), f"{where} schedule")
    fields(Design, given, where)
    if "architecture" not in given:
        raise UsageError(f"{where}: no architecture is named", "see `qem models`")
    chosen = {} if preset is None else _preset(given["architecture"], preset, where)
    quasi = given.get("quasi", chosen.pop("quasi", "none"))
    config = {**shared, **chosen, **given.get("config", {})}
    design = Design(given["architecture"], quasi, config)
    return design, name or label(design, own), own


def _preset(architecture: str, name: str, where: str) -> dict[str, Any]:
    """What the preset sets, as a recipe would write it; the task says how many outputs."""
    module = registry.load("architectures", architecture)
    known = {**getattr(module, "PRESETS", {}), **getattr(module, "EDITORS", {})}
    if name not in known:
        raise UsageError(
            f"{where}: '{architecture}' has no preset '{name}'",
            registry.suggest(name, sorted(known)),
        )
    config = known[name].config
    own = {f.name: (getattr(config, f.name), f.default) for f in dataclasses.fields(config)}
    told = {k: list(v) if isinstance(v, tuple) else v for k, (v, d) in own.items() if v != d}
    told.pop("outputs", None)
    return told


def trials(plan: Comparison) -> Iterator[Trial]:
    """Every run of the comparison, seeds outermost, so that an early stop leaves whole seeds."""
    for seed in plan.seeds:
        for augment in (None, *plan.augment):
            for name, design in plan.entries.items():
                if augment is None or not plan.augmented or name in plan.augmented:
                    schedule = _schedule(plan.scheduled(name), augment)
                    told = " ".join(f"{k}={v}" for k, v in plan.own[name].items())
                    yield Trial(design, seed, augment, schedule, name, told)


def _schedule(whole: Schedule, augment: Range | None) -> Schedule:
    """Half the epochs over a doubled zoo: every run of a comparison takes as many steps."""
    return whole if augment is None else dataclasses.replace(whole, epochs=-(-whole.epochs // 2))


def named(scales: Range | None) -> str:
    """A range of scales in tables; `none` for networks as they are."""
    return "none" if scales is None else f"{scales[0]:g}:{scales[1]:g}"
