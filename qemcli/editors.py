"""Ways to make image INRs show an edit: a trained editor, or fitting them anew.

What an editor adds is known on the representative that it reads; `edited` carries it back to the
network as it came. k branches are merged into one network of k times the width (expansion.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from qemcli import conventions, signals
from qemcli.balance import balance
from qemcli.edits import Edit, find
from qemcli.errors import InputError, UsageError
from qemcli.expansion import folded, merge, widened
from qemcli.groups import act, inverse
from qemcli.layers.shown import Shown
from qemcli.predictor_files import headers
from qemcli.predictors import Predictor
from qemcli.spaces import Chain, WeightSpace, chain_of


def edited(predictor: Predictor, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The networks after the edit, one for each branch: dict of (b, k, *shape).

    Where the editor reads a representative w0 = g w, branch j is g^-1 (w0 + delta_j(w0)): exactly
    equivariant to all that the balance removes, and near w where delta is small.
    """
    space, model = predictor.space, predictor.model
    if not isinstance(model, Shown):
        raise UsageError(f"'{predictor.name}' edits nothing", "see `qem models`")
    if not predictor.design.balanced:
        return model.branches(w)
    moved, g = balance(chain_of(space, "an editor"), w)
    branches = model.branches(moved)
    k = branches[space.names[0]].shape[1]
    each = torch.arange(g.batch).repeat_interleave(k)
    back = act(inverse(g).rows(each.to(g.index["h1"].device)), space, folded(branches))
    return {name: x.unflatten(0, (-1, k)) for name, x in back.items()}


class Way(Protocol):
    """How networks come to show an edit."""

    @property
    def name(self) -> str:
        """What made them."""

    @property
    def branches(self) -> int:
        """k: how many times wider they become."""

    def refusal(self, space: WeightSpace) -> InputError | None:
        """Why networks of this space cannot be edited, or None."""

    def running(self, space: WeightSpace) -> Chain:
        """The space with the image that its networks show."""

    def __call__(self, space: Chain, flat: Tensor, wanted: Tensor) -> Tensor:
        """(n, D) networks and the (n, c h w) pictures wanted of them -> (n, D') of
        `widened(space, branches)`."""


@dataclass(frozen=True)
class ByEditor:
    """A trained editor; it never sees the pictures that are wanted.

    SIRENs of another convention are expressed in the editor's, edited, and expressed in their own
    again: both ways are exact.
    """

    predictor: Predictor
    batch_size: int = 64
    device: str = "cpu"

    @property
    def name(self) -> str:
        return self.predictor.name

    @property
    def branches(self) -> int:
        return int(self.predictor.design.config.get("expand", 1))

    def __repr__(self) -> str:
        digest = hashlib.sha256()
        for key, x in sorted(self.predictor.model.state_dict().items()):
            digest.update(key.encode() + x.cpu().contiguous().numpy().tobytes())
        return f"{self.name}@{digest.hexdigest()[:16]}"

    def refusal(self, space: WeightSpace) -> InputError | None:
        if reason := _no_picture(space) if not isinstance(space, Chain) else None:
            return reason
        mine, theirs = self._own, self.running(space)
        if reason := _no_picture(theirs):
            return reason
        if list(mine.shapes.values()) != list(theirs.shapes.values()):
            return self._other(f"widths {theirs.widths}", f"{mine.widths}")
        if theirs.forward.image != mine.forward.image:
            return self._other(_told(theirs), _told(mine))
        try:  # SIRENs that are run in another way are edited in the editor's, and carried back
            conventions.express(theirs, mine, torch.zeros(1, mine.size))
        except InputError as error:
            return error
        return None

    def _other(self, theirs: str, mine: str) -> InputError:
        return InputError(
            f"{theirs}: '{self.name}' edits {mine}",
            "train an editor on such networks (qem train), or fit anew: --refit",
        )

    def running(self, space: WeightSpace) -> Chain:
        chain = chain_of(space, "an edit")
        return chain.running(image=chain.forward.image or self._own.forward.image)

    @property
    def _own(self) -> Chain:
        return chain_of(self.predictor.space, "an edit")

    def __call__(self, space: Chain, flat: Tensor, wanted: Tensor) -> Tensor:
        mine, parts = self._own, []
        goal = widened(space, self.branches)
        self.predictor.model.to(self.device).eval()
        with torch.no_grad():
            for rows in flat.split(self.batch_size):
                w = mine.unflatten(conventions.express(space, mine, rows).to(self.device))
                wide, merged = merge(mine, edited(self.predictor, w))
                parts.append(conventions.express(wide, goal, wide.flatten(merged).cpu()))
        return torch.cat(parts)


@dataclass(frozen=True)
class ByFit:
    """What one would do without an editor: render, edit the picture, go on fitting the SIREN."""

    psnr: float = 40.0
    steps: int = 500
    lr: float = 1e-3
    device: str = "cpu"
    name: str = field(default="fit", init=False)
    branches: int = field(default=1, init=False)

    def refusal(self, space: WeightSpace) -> InputError | None:
        if not isinstance(space, Chain):
            return _no_picture(space)
        if len(space.layers) < 2 or not all(layer.bias for layer in space.layers):
            return InputError(f"widths {space.widths}: hidden layers and biases are needed to fit")
        return _no_picture(space)

    def running(self, space: WeightSpace) -> Chain:
        return chain_of(space, "an edit")

    def __call__(self, space: Chain, flat: Tensor, wanted: Tensor) -> Tensor:
        from qemcli.zoos.build import siren

        black, white = space.forward.levels
        target = (black + (white - black) * wanted).unflatten(1, signals.check(space))
        goal = (white - black) ** 2 * 10 ** (-self.psnr / 10)
        how = siren.Fit(space.forward.w0, self.lr, goal, self.steps)
        count = min(len(flat), siren.slots(space, self.device))
        batch = siren.Batch(space, how, count, device=self.device)
        out = torch.empty_like(flat)
        for done in siren.fitted(batch, zip(range(len(flat)), flat, target, strict=True)):
            out[done.number] = done.flat
        return out


def _no_picture(space: WeightSpace) -> InputError | None:
    try:
        signals.check(space)
    except InputError as error:
        return error
    return None


def _told(space: Chain) -> str:
    run = space.forward
    size = "x".join(map(str, run.image or ()))
    return (
        f"SIRENs of w0 {run.w0:g}, axes {run.axes}, black and white at {run.levels}, "
        f"offset {run.offset:g}, images of {size or 'unknown size'}"
    )


def choose(
    edit: Edit, spaces: list[WeightSpace], expand: int | None, say: Callable[[str], None]
) -> Predictor:
    """The shipped editor of this edit and number of branches that reads one of the spaces, the most
    branches first; InputError that says which there are."""
    seen, found = [], []
    for folder, space, record in headers():
        if record["task"] != "editing":
            continue
        config = record["config"]
        k = config.get("expand", 1)
        seen.append(f"{folder.name} ({config['edit']}, k = {k}, widths {space.widths})")
        fits = any(space.fits(s) for s in spaces)
        if config["edit"] == str(edit) and expand in (None, k) and fits:
            found.append((k, folder))
    if found:
        predictor = Predictor.load(max(found)[1])
        say(f"editor: {predictor.name} ({edit}, k = {max(found)[0]})")
        return predictor
    wanted = f"'{edit}'" + (f" with {expand} branches" if expand else "")
    raise InputError(
        f"no shipped editor of {wanted} reads these networks",
        f"shipped: {'; '.join(seen) or 'none'}. Train one (qem train), or fit anew: --refit",
    )


def given(name: str, edit: str | None, expand: int | None) -> Predictor:
    """The editor that --predictor names; UsageError where it is none, or another than asked for."""
    predictor = Predictor.load(name)
    own = predictor.design.edit
    if own is None:
        raise UsageError(
            f"'{predictor.name}' answers '{predictor.task}' and edits nothing", "see `qem models`"
        )
    if edit is not None and str(find(edit)) != own:
        raise UsageError(f"'{predictor.name}' was trained for '{own}', not for '{find(edit)}'")
    k = ByEditor(predictor).branches
    if expand not in (None, k):
        raise UsageError(
            f"'{predictor.name}' has {k} branches, --expand {expand} asks for others",
            f"train one: qem train with expand = {expand} in its [config]",
        )
    return predictor
