"""Predictors: a trained metanetwork with its weight space, its design and its card."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemcli import registry
from qemcli.designs import Design, prepared
from qemcli.errors import InputError
from qemcli.layers.metanetwork import Metanetwork, Mixed
from qemcli.predictor_files import (
    FILE,
    headers,
    in_order,
    locate,
    others_of,
    read_header,
)
from qemcli.spaces import Chain, Transformer, WeightSpace
from qemcli.writing import beside

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from qemcli.points import Points

REMOVED = ("scale", "sign", "monomial", "phase")  # the groups that balance takes away
OF_HEADS = ("general-linear", "shift", "scale", "sign")  # of transformers, whatever reads them


@dataclass
class Predictor:
    """A trained metanetwork: `predictor(w)` is its raw answer, `predictor.predict(...)` the
    task's.

    One that was trained on `others` too reads networks of all these weight spaces:
    `predictor.on(space)` is the predictor of one of them.
    """

    name: str
    space: WeightSpace  # of most of the networks that it was trained on
    design: Design
    task: str
    model: Metanetwork | Mixed
    provenance: dict[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()  # their names, where the task has classes
    others: tuple[WeightSpace, ...] = ()

    def __call__(self, w: Mapping[str, Tensor]) -> Tensor:
        """w of (b, *shape) -> raw outputs (b, outputs), the balance included."""
        return self.reader(prepared(self.design, self.space, w))

    @property
    def spaces(self) -> tuple[WeightSpace, ...]:
        """The weight spaces of the networks that it was trained on."""
        return (self.space, *self.others)

    @property
    def reader(self) -> Metanetwork:
        """What reads networks of `space`."""
        return self.model.on(self.space)

    def on(self, space: WeightSpace) -> Predictor:
        """The predictor of networks of this weight space, with the same parameters; itself where
        it reads one only. UnsupportedError where the design cannot read them."""
        if not isinstance(self.model, Mixed):
            return self
        known = space if space in self._known else self._match(space)
        seen = space.running(known.activation) if known else space
        return replace(self, space=seen, model=self.model.on(seen), others=())

    def met(self, space: WeightSpace) -> bool:
        """True where networks of this weight space were among those that it was trained on."""
        return space in self._known or self._match(space) is not None

    @cached_property
    def _known(self) -> frozenset[WeightSpace]:
        return frozenset(self.spaces)

    def _match(self, space: WeightSpace) -> WeightSpace | None:
        """The weight space that it was trained on whose layers are these."""
        return next((s for s in self.spaces if _alike(s, space)), None)

    @property
    def metanetwork(self) -> Metanetwork:
        """What reads the weights: the editor behind the pictures of an editor, else the model."""
        return getattr(self.reader, "editor", self.reader)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def claims(self) -> set[str]:
        """The groups under which the answer is exactly invariant by design, of whatever weight
        space that has them."""
        if self.others:
            each = [self.on(space) for space in self.spaces]
            return set.union(*(one.claims for one in each))
        own = set(self.reader.claims(self.space))
        if self.design.balanced:
            from qemcli.groups import applicable

            # Balance removes scales, signs and half turns: what is left is a permutation. Of
            # transformers it leaves the order of neurons alone, so nothing is left of the others.
            removed = set(REMOVED) if "permutation" in own else set()
            if isinstance(self.space, Transformer):
                removed |= set(OF_HEADS)
            own |= {g for g in applicable(self.space) if g in removed}
        return own

    def predict(
        self, flat: Tensor, batch_size: int = 256, device: str = "cpu", carried: bool = False
    ) -> Tensor:
        """(n, D) rows in the order of the space -> the task's answers, (n,) or (n, classes).

        `carried` says that the rows are the design's representatives already. A network with a
        weight that is not finite gets NaN: it has no generalisation to predict.
        """
        import torch

        answer = registry.load("tasks", self.task).answer
        self.model.to(device).eval()
        parts = []
        with torch.no_grad():
            for rows in flat.split(batch_size):
                finite = rows.isfinite().all(dim=1)
                clean = torch.where(finite[:, None], rows, torch.zeros_like(rows)).to(device)
                ask = self.reader if carried else self
                part = answer(ask(self.space.unflatten(clean))).cpu()
                part[~finite] = float("nan")
                parts.append(part)
        return torch.cat(parts) if parts else torch.empty(0)

    def predict_all(self, points: Points, batch_size: int = 256, device: str = "cpu") -> Tensor:
        """As `predict`, of networks of many weight spaces, in their order."""
        import torch

        found = [
            (places, self.on(space).predict(flat, batch_size, device))
            for space, flat, places in points.parts()
        ]
        return points.restored(found) if found else torch.empty(0)

    def reads(self, space: WeightSpace) -> bool:
        """True where networks of this weight space are what the predictor was trained on."""
        return space in self._known or any(
            _alike(s, space) and run_alike(s, space) for s in self.spaces
        )

    def fits(self, space: WeightSpace) -> bool:
        """True where it can read them: the layers and the activation are its own, in whatever way
        SIRENs are run, or its design reads networks that it has not met, of a family that it
        has."""
        if self.met(space):
            return True
        if not isinstance(self.model, Mixed) or space.family not in {s.family for s in self.spaces}:
            return False
        try:
            self.model.on(space)
        except InputError:
            return False
        return True

    def save(self, folder: Path) -> Path:
        """Write predictor.safetensors into `folder`, beside and renamed; returns the file."""
        from safetensors.torch import save

        record = {**dataclasses.asdict(self.design), "task": self.task, "name": self.name}
        if self.others:
            record["others"] = [space.record() for space in self.others]
        if self.classes:
            record["classes"] = list(self.classes)
        header = {
            "qem.kind": "predictor",
            "qem.space": self.space.to_json(),
            "qem.config": json.dumps(record),
            "qem.provenance": json.dumps(self.provenance),
        }
        state = {k: v.detach().cpu().contiguous() for k, v in self.model.state_dict().items()}
        written = in_order(save(state, metadata=header))
        beside(folder / FILE, lambda path: path.write_bytes(written))
        return folder / FILE

    @classmethod
    def load(cls, where: str | Path) -> Predictor:
        """Read a predictor by its name in models/, its file, its folder, or `hf://owner/name`."""
        path = locate(where)
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a readable safetensors file ({error})") from None
        return cls._from(path, header, state)

    @classmethod
    def _from(cls, path: Path, header: dict[str, str], state: dict[str, Tensor]) -> Predictor:
        space, record = read_header(path, header)
        others = others_of(record)
        design = Design(record["architecture"], record["quasi"], record["config"])
        task, classes = record["task"], tuple(map(str, record.get("classes", ())))
        outputs = registry.load("tasks", task).outputs(classes)
        try:
            model = design.build_mixed((space, *others), outputs)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(
                f"{path}: no '{design.architecture}' has such settings: {error}"
            ) from None
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            first = str(error).splitlines()[-1].strip()
            raise InputError(
                f"{path}: its tensors are not those of '{design.architecture}': {first}"
            ) from None
        provenance = json.loads(header.get("qem.provenance", "{}"))
        name = record.get("name", path.parent.name)
        return cls(name, space, design, task, model.eval(), provenance, classes, others)


def _alike(own: WeightSpace, space: WeightSpace) -> bool:
    """The same layers, and the same activation where it is known."""
    return own.fits(space) and space.activation in (None, own.activation)


def run_alike(space: WeightSpace, other: WeightSpace) -> bool:
    """False where both are SIRENs that are known to be run differently: by w0, axes or levels."""
    if not (isinstance(space, Chain) and isinstance(other, Chain)):
        return True
    a, b = space.forward, other.forward
    if space.family != "siren" or not (a.known and b.known):
        return True
    return (a.w0, a.axes, a.levels, a.offset) == (b.w0, b.axes, b.levels, b.offset)


def choose(
    task: str, space: WeightSpace, say: Callable[[str], None], classes: tuple[str, ...] = ()
) -> Predictor:
    """The shipped predictor whose task, weight space and, where the zoo names some, classes fit.

    Raises InputError that says what would, or where several do.
    """
    seen, fitting = [], []
    for folder, theirs, record in headers():
        reads = f"{theirs.family} {theirs.widths}, {theirs.activation}"
        seen.append(f"{folder.name} ({record['task']}, {reads})")
        fits = any(_alike(own, space) for own in (theirs, *others_of(record)))
        told = not classes or tuple(record.get("classes", classes)) == classes
        if record["task"] == task and fits and told:
            fitting.append((folder, theirs, reads))
    fitting = [found for found in fitting if run_alike(found[1], space)] or fitting
    trained = {theirs.activation for _, theirs, _ in fitting}
    if space.activation is None and len(trained) > 1:
        raise InputError(
            "the networks' activation is not known, and it decides which of "
            f"{len(fitting)} shipped predictors reads them",
            f"pass --activation {' or '.join(sorted(map(str, trained)))}",
        )
    if len(fitting) > 1:
        names = " or ".join(folder.name for folder, _, _ in fitting)
        raise InputError(
            f"{len(fitting)} shipped predictors read {space.family} networks of widths "
            f"{space.widths}, and the zoo does not say what its networks show",
            f"pass --predictor {names}",
        )
    for folder, theirs, reads in fitting:
        say(f"predictor: {folder.name} (its weight space fits: {reads})")
        if space.activation is None:
            say(f"note: the networks' activation is not known; {theirs.activation} is assumed")
        return Predictor.load(folder)
    raise InputError(
        f"no shipped predictor of '{task}' reads {space.family} networks of widths {space.widths} "
        f"with activation {space.activation or 'unknown'}",
        f"shipped: {'; '.join(seen) or 'none'}. Train one: qem train --zoo ZOO",
    )
