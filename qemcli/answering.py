"""Ask a zoo a question: every checkpoint through the predictor that fits it, failures counted and
named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from qemcli import registry
from qemcli.errors import InputError
from qemcli.predictors import Predictor, choose

if TYPE_CHECKING:
    from qemcli.zoos.zoo import Zoo


@dataclass
class Answers:
    """One row a checkpoint that could be answered, `failed` for the others, and the predictors
    used."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    predictors: list[str] = field(default_factory=list)


def _pick(
    zoo: Zoo, task: str, given: Predictor | None, say: Callable[[str], None]
) -> Iterator[tuple]:
    """(space, flat, positions, predictor or the reason that there is none) for each
    architecture."""
    for space, flat, positions in zoo.load():
        if given is None:
            try:
                yield space, flat, positions, choose(task, space, say)
            except InputError as error:
                yield space, flat, positions, error
        elif not given.reads(space):
            reason = (
                f"{space.family} {space.widths} {space.activation}: not what '{given.name}' reads"
            )
            theirs = f"it reads {given.space.family} {given.space.widths} {given.space.activation}"
            yield space, flat, positions, InputError(reason, theirs)
        else:
            yield space, flat, positions, given


def answer(
    zoo: Zoo,
    task: str,
    predictor: Predictor | None = None,
    batch_size: int = 256,
    device: str = "cpu",
    say: Callable[[str], None] = lambda text: None,
    advance: Callable[[int], None] = lambda n: None,
) -> Answers:
    """Predict every checkpoint of the zoo; raises InputError where not one of them can be
    answered."""
    module = registry.load("tasks", task)
    found = Answers()
    error: InputError | None = None
    for _, flat, positions, chosen in _pick(zoo, task, predictor, say):
        table = zoo.index.iloc[positions]
        names = table["checkpoint"].tolist()
        if isinstance(chosen, InputError):
            error = chosen
            found.failed += [{"checkpoint": n, "reason": chosen.message} for n in names]
            continue
        found.predictors.append(chosen.name)
        values = chosen.predict(flat, batch_size, device).numpy()
        _collect(found, module, table, names, values)
        advance(len(names))
    found.failed += zoo.failures  # read last: files may break between opening and loading
    if not found.rows:
        if error:
            raise error
        reason = (
            f": {found.failed[0]['checkpoint']}: {found.failed[0]['reason']}"
            if found.failed
            else ""
        )
        raise InputError(f"none of {len(found.failed)} checkpoints can be answered{reason}")
    found.rows.sort(key=lambda row: -row["prediction"])
    return found


def _collect(
    found: Answers, module: ModuleType, table: Any, names: list[str], values: np.ndarray
) -> None:
    labels = module.target(table)
    for name, value, label in zip(names, values, labels, strict=True):
        if not np.isfinite(value):
            found.failed.append({"checkpoint": name, "reason": "weights that are not finite"})
            continue
        row = {"checkpoint": name, "prediction": float(value)}
        if np.isfinite(label):
            row["label"] = float(label)
        found.rows.append(row)


def scores(module: ModuleType, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """{n, tau, r2, mae, ...} over the rows whose label is known."""
    prediction = np.array([row["prediction"] for row in rows])
    label = np.array([row.get("label", np.nan) for row in rows])
    return {"n": len(rows), **module.score(prediction, label)}
