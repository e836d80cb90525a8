"""Ask a zoo a question: every checkpoint through the predictor that fits it, failures counted and
named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qemcli import conventions, registry
from qemcli.errors import InputError, UsageError
from qemcli.predictors import Predictor, choose
from qemcli.spaces import WeightSpace

if TYPE_CHECKING:
    from qemcli.zoos.zoo import Zoo

CHUNK = 4096  # networks in memory at a time


@dataclass
class Answers:
    """One row a checkpoint that could be answered, `failed` for the others, and the predictors
    used."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[np.ndarray] = field(default_factory=list)  # of the rows, as they came
    labels: list[float] = field(default_factory=list)  # NaN where none is known
    failed: list[dict[str, Any]] = field(default_factory=list)
    predictors: list[str] = field(default_factory=list)


class _Fitting:
    """The predictor of each weight space: the one given, or the shipped one that fits; found
    once."""

    def __init__(
        self, task: str, given: Predictor | None, classes: Any, say: Callable[[str], None]
    ) -> None:
        self.task, self.given, self.say = task, given, say
        self.classes = tuple(map(str, classes or ()))  # what the zoo says of itself
        self.found: dict[WeightSpace, Predictor | InputError] = {}

    def __call__(self, space: WeightSpace) -> Predictor | InputError:
        """The predictor, or why there is none."""
        if space not in self.found:
            self.found[space] = self._checked(space, self._find(space))
        return self.found[space]

    def _checked(
        self, space: WeightSpace, chosen: Predictor | InputError
    ) -> Predictor | InputError:
        """SIRENs of another convention are expressed in the predictor's, where both are known."""
        if isinstance(chosen, InputError) or chosen.space.family != "siren":
            return chosen
        try:
            conventions.express(space, chosen.space, torch.zeros(1, space.size))
        except InputError as error:
            return error
        if not conventions.same(space, chosen.space):
            own = conventions.text(chosen.space)
            self.say(f"note: SIRENs of {conventions.text(space)} are expressed as {own}, exactly")
        return chosen

    def _find(self, space: WeightSpace) -> Predictor | InputError:
        if self.given is None:
            try:
                return choose(self.task, space, self.say, self.classes).on(space)
            except InputError as error:
                return error
        if self.given.fits(space):
            if not self.given.met(space):
                self.say(f"note: {self.given.name} has met no {space.title} in training")
            return self.given.on(space)
        reason = f"{space.title}: not what '{self.given.name}' reads"
        more = f", and {len(self.given.others)} others" if self.given.others else ""
        return InputError(reason, f"it reads {self.given.space.title}{more}")


def answer(
    zoo: Zoo,
    task: str,
    predictor: Predictor | None = None,
    batch_size: int = 256,
    device: str = "cpu",
    say: Callable[[str], None] = lambda text: None,
    advance: Callable[[int], None] = lambda n: None,
    strict: bool = False,
) -> Answers:
    """Predict every checkpoint of the zoo; raises InputError where not one of them can be
    answered, or, `strict`, where one cannot."""
    module = registry.load("tasks", task)
    if predictor is not None and predictor.task != task:
        raise UsageError(
            f"'{predictor.name}' answers {predictor.task}, not {task}",
            "`qem models` says what each predictor answers",
        )
    found = Answers()
    error: InputError | None = None
    fitting = _Fitting(task, predictor, zoo.record.get("classes"), say)
    for space, flat, positions in zoo.batches(CHUNK):
        _stop(strict, [*found.failed, *zoo.failures])
        chosen = fitting(space)
        table = zoo.index.iloc[positions]
        names = table["checkpoint"].tolist()
        if isinstance(chosen, InputError):
            error = chosen
            found.failed += [{"checkpoint": n, "reason": chosen.message} for n in names]
            continue
        if chosen.name not in found.predictors:
            found.predictors.append(chosen.name)
        kept = zoo.balanced(positions) if chosen.design.balanced else None
        if chosen.space.family == "siren" and not conventions.same(space, chosen.space):
            flat, kept = conventions.express(space, chosen.space, flat), None
        rows = flat if kept is None else kept
        values = chosen.predict(rows, batch_size, device, carried=kept is not None).numpy()
        _collect(found, module, chosen.classes, table, values)
        advance(len(names))
    found.failed += zoo.failures  # read last: files may break between opening and loading
    _stop(strict, found.failed)
    if not found.rows:
        if error:
            raise error
        reason = (
            f": {found.failed[0]['checkpoint']}: {found.failed[0]['reason']}"
            if found.failed
            else ""
        )
        raise InputError(f"none of {len(found.failed)} checkpoints can be answered{reason}")
    if module.ORDERED:
        found.rows.sort(key=lambda row: -row["prediction"])
    return found


def _stop(strict: bool, failed: list[dict[str, Any]]) -> None:
    if strict and failed:
        raise InputError(f"{failed[0]['checkpoint']}: {failed[0]['reason']}")


def _collect(
    found: Answers, module: ModuleType, classes: tuple[str, ...], table: Any, values: np.ndarray
) -> None:
    labels = module.target(table)
    for name, value, label in zip(table["checkpoint"].tolist(), values, labels, strict=True):
        if not np.isfinite(value).all():
            found.failed.append({"checkpoint": name, "reason": "weights that are not finite"})
            continue
        row = {"checkpoint": name, **module.row(value, classes)}
        if np.isfinite(label):
            row["label"] = module.named(label, classes)
        found.rows.append(row)
        found.predictions.append(value)
        found.labels.append(float(label))


def labelled(found: Answers) -> tuple[np.ndarray, np.ndarray]:
    """(predictions (n,) or (n, classes), labels (n,)) of the rows whose label is known.

    Where several predictors answered, rows of fewer classes are filled with zeros.
    """
    label = np.array(found.labels)
    if found.predictions[0].ndim == 0:
        prediction = np.array(found.predictions)
    else:
        widest = max(map(len, found.predictions))
        rows = [np.pad(p, (0, widest - len(p))) for p in found.predictions]
        prediction = np.stack(rows)
    known = np.isfinite(label)
    return prediction[known].astype(np.float64), label[known]


def scores(module: ModuleType, found: Answers) -> dict[str, Any]:
    """{n, tau, r2, mae, ...} over the rows whose label is known."""
    return {"n": len(found.rows), **module.score(*labelled(found))}
