"""Edit a zoo of image INRs: every network that can be edited is written as an ordinary SIREN, with
its labels and what it was made from, block by block; the others are named with their reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qemcli import __version__, registry, report, signals
from qemcli.editors import Way
from qemcli.edits import Edit
from qemcli.errors import InputError, UsageError
from qemcli.expansion import widened
from qemcli.spaces import Chain
from qemcli.zoos.store import OWN_COLUMNS, Store
from qemcli.zoos.zoo import Zoo

if TYPE_CHECKING:
    import pandas

Truth = Callable[["pandas.DataFrame"], Tensor]  # rows of an index -> pictures (n, c, h, w)

CHUNK = 256  # networks of a block
MSE, UNEDITED = "edit.mse", "edit.mse_unedited"


@dataclass
class Edits:
    """One row a network, failures with their reason, and what holds of all."""

    rows: list[dict[str, Any]]
    failed: list[dict[str, Any]]
    summary: dict[str, Any]


def edit_zoo(
    zoo: Zoo,
    edit: Edit,
    way: Way,
    folder: Path,
    resume: bool = False,
    truth: Truth | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> Edits:
    """Write what the way makes of every network as a zoo in `folder`, block by block.

    The picture wanted is the edit of `truth`(rows of the index) (n, c, h, w) where that is given,
    else of what the network shows now. Errors are those of the networks as they are stored. Raises
    InputError before anything is written where none of the networks can be edited.
    """
    failed = _refused(zoo, way)
    store = Store(folder, resume, _recipe(zoo, edit, way, truth))
    with store.alone():
        blocks, bad = _written(store, zoo, edit, way, truth, advance)
        failed += [*bad, *zoo.failures]  # read last: files may break between opening and loading
        if not blocks:
            raise InputError(f"none of {len(zoo)} networks can be edited: {failed[0]['reason']}")
        return _finished(store, zoo, edit, way, truth, blocks, failed)


def _written(
    store: Store,
    zoo: Zoo,
    edit: Edit,
    way: Way,
    truth: Truth | None,
    advance: Callable[[int], None],
) -> tuple[int, list[dict[str, Any]]]:
    """Write the blocks that are not there yet; how many there are, and the networks left out."""
    failed: list[dict[str, Any]] = []
    block = 0
    for space, flat, positions in zoo.batches(CHUNK):
        if way.refusal(space):
            continue
        table = zoo.index.iloc[positions]
        good = flat.isfinite().all(dim=1).numpy()
        bad = table["checkpoint"].to_numpy()[~good]
        failed += [{"checkpoint": n, "reason": "weights that are not finite"} for n in bad]
        if good.any():
            if not store.done(block):
                job = way.running(space), flat[torch.from_numpy(good)], table[good]
                store.write(block, *_block(*job, edit, way, truth))
            block += 1
        advance(len(table))
    return block, failed


def _refused(zoo: Zoo, way: Way) -> list[dict[str, Any]]:
    """The networks that cannot be edited; InputError where that is all of them."""
    failed: list[dict[str, Any]] = []
    first: InputError | None = None
    for space, positions in zoo.groups():
        if reason := way.refusal(space):
            first = first or reason
            names = zoo.index["checkpoint"].iloc[positions]
            failed += [{"checkpoint": n, "reason": reason.message} for n in names]
    if first and len(failed) == len(zoo):
        raise InputError(f"none of {len(zoo)} networks can be edited: {first.message}", first.hint)
    return failed


def foreseen(zoo: Zoo, way: Way) -> dict[str, Any]:
    """What would be written: networks, and bytes of their weights."""
    kept = [(way.running(s), len(p)) for s, p in zoo.groups() if not way.refusal(s)]
    size = sum(4 * n * widened(space, way.branches).size for space, n in kept)
    return {"networks": sum(n for _, n in kept), "refused": len(_refused(zoo, way)), "bytes": size}


def _recipe(zoo: Zoo, edit: Edit, way: Way, truth: object) -> dict[str, Any]:
    source = {"source": str(zoo.path.resolve()), "networks": len(zoo)}
    return {**source, "edit": str(edit), "way": repr(way), "truth": truth is not None}


def _block(
    space: Chain,
    flat: Tensor,
    table: pandas.DataFrame,
    edit: Edit,
    way: Way,
    truth: Truth | None,
) -> tuple[Chain, np.ndarray, list[dict[str, Any]]]:
    """(space, networks (n, D'), index rows) of one block."""
    before = signals.render(space, space.unflatten(flat)).detach().flatten(1)
    wanted = edit.of(space, flat) if truth is None else _true(edit, truth(table), space)
    made = way(space, flat, wanted)
    wide = space if way.branches == 1 else widened(space, way.branches)
    after = signals.render(wide, wide.unflatten(made)).detach().flatten(1)
    known = np.ones(len(flat), bool) if truth else _shows_its_picture(table)
    errors = {
        name: np.where(known, (x - wanted).square().mean(1).double().numpy(), np.nan)
        for name, x in ((MSE, after), (UNEDITED, before))
    }
    return wide, made.numpy(), _rows(table, edit, way, errors)


def _true(edit: Edit, pictures: Tensor, space: Chain) -> Tensor:
    """(n, c h w)."""
    if tuple(pictures.shape[1:]) != signals.check(space):
        raise InputError(
            f"the source's images are {tuple(pictures.shape[1:])}, the networks show "
            f"{signals.check(space)}"
        )
    return edit(pictures).flatten(1)


def _shows_its_picture(table: pandas.DataFrame) -> np.ndarray:
    """(n,): whether what a network shows may stand for its picture."""
    return np.isfinite(registry.load("tasks", "editing").target(table))


def _rows(
    table: pandas.DataFrame, edit: Edit, way: Way, errors: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Index rows: labels and provenance carried over; `psnr` is now that of the edited picture."""
    kept = [c for c in table.columns if c not in OWN_COLUMNS and not c.startswith("stat.")]
    names = table["checkpoint"].astype(str)
    told = {"edit": str(edit), "edit.by": way.name, "edit.branches": np.int32(way.branches)}
    with np.errstate(divide="ignore"):
        psnr = -10 * np.log10(errors[MSE])
    made = {"checkpoint": names + f"/{edit.name}", "source": names, "psnr": psnr, **told, **errors}
    rows = table[kept].assign(**made)
    return [dict(zip(rows.columns, row, strict=True)) for row in rows.itertuples(index=False)]


def _finished(
    store: Store,
    zoo: Zoo,
    edit: Edit,
    way: Way,
    truth: object,
    blocks: int,
    failed: list[dict[str, Any]],
) -> Edits:
    provenance = {"qem": __version__, "source": zoo.name, "edit": str(edit), "by": repr(way)}
    about = {"name": f"{zoo.name}-{edit.name}", "licence": zoo.record.get("licence")}
    table = store.finish(blocks, {**about, "provenance": provenance})
    found = table[["checkpoint", MSE, UNEDITED]].rename(
        columns={MSE: "mse", UNEDITED: "mse_unedited"}
    )
    rows = found.to_dict("records")
    summary = {
        "edit": str(edit),
        "by": way.name,
        "branches": way.branches,
        "networks": len(rows),
        "target": "the edited picture" if truth else "the edit of what each network showed",
        **{name: float(found[name].mean()) for name in ("mse", "mse_unedited")},
    }
    return Edits(rows, failed, summary)


def preview(
    zoo: Zoo, folder: Path, edit: Edit, way: Way, truth: Truth | None, path: Path, count: int = 10
) -> None:
    """Before, after and wanted of the first networks of an edited zoo, as a contact sheet."""
    done = Zoo.open(folder).limit(count)
    columns: list[tuple[np.ndarray, ...]] = []
    said: list[str] = []
    for wide, flat, positions in done.load():
        after = signals.render(wide, wide.unflatten(flat))
        table = done.index.iloc[positions]
        said += [f"mse {error:.4f}" for error in table[MSE]]
        for name, picture in zip(table["source"], after, strict=True):
            at = np.flatnonzero(zoo.index["checkpoint"].to_numpy() == name)
            ((space, before, _),) = zoo.load(at)
            space = way.running(space)
            now = signals.render(space, space.unflatten(before))
            wanted = edit(truth(zoo.index.iloc[at]) if truth else now)
            columns.append(tuple(x.numpy() for x in (now[0], picture, wanted[0])))
    rows = list(zip(*columns, strict=True))
    report.sheet(rows, [[], said, []], path, ["before", f"edited\n{way.name}", f"{edit}"])


def true_pictures(source: str) -> Truth:
    """The pictures of the networks of an index, by its columns `image` and `split`, from a source
    or from SOURCE,TEST_SOURCE (qem build). InputError where the index does not say which."""
    from qemcli.zoos.build import sources

    parts = [torch.from_numpy(sources.read(part)[0]) for part in source.split(",")]
    if len(parts) > 2:
        raise UsageError(
            f"--source {source}: more than two sources", "SOURCE or SOURCE,TEST_SOURCE"
        )

    def of(table: pandas.DataFrame) -> Tensor:
        if "image" not in table:
            raise InputError("the index has no column 'image': which pictures the networks show")
        held = (table["split"] == "test").to_numpy() if "split" in table else np.zeros(len(table))
        rows = table["image"].to_numpy(dtype=np.int64)
        chosen = []
        for row, test in zip(rows, held, strict=True):
            images = parts[-1] if test else parts[0]
            if not 0 <= row < len(images):
                raise InputError(f"--source {source}: image {row} of {len(images)}")
            chosen.append(images[row])
        return torch.stack(chosen).float()

    return of
