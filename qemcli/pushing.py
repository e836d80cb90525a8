"""What of a predictor or a zoo goes to the Hub, and the card that it gets where it has none."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemcli import __version__
from qemcli.errors import InputError, UsageError
from qemcli.hub import pushing
from qemcli.hub.reference import PREFIX, Reference
from qemcli.predictor_files import FILE, is_predictor, locate
from qemcli.predictors import Predictor
from qemcli.zoos.layouts.indexed import INDEX, origin
from qemcli.zoos.receipt import NAME as RECEIPT
from qemcli.zoos.resolve import locate as locate_zoo
from qemcli.zoos.zoo import Zoo

CARD = "README.md"
KEPT = (CARD, "expected.json", "history.json")  # beside a predictor, with its recipes (.toml)
MANY = 20_000  # files of one commit; more are refused by the Hub's own advice


@dataclass
class Parcel:
    """What is pushed: paths in the repository -> files here, and the card's text where it is
    ours."""

    what: str
    kind: str  # predictor | zoo
    files: dict[str, Path]
    card: str | None

    def rows(self) -> list[dict[str, Any]]:
        """One row a file."""
        own = [] if self.card is None else [{"file": CARD, "size": len(self.card.encode())}]
        return own + [{"file": n, "size": f.stat().st_size} for n, f in self.files.items()]

    def push(self, ref: Reference, private: bool) -> Reference:
        """Send it; the reference with its commit."""
        message = f"qem {__version__}: {self.kind} {Path(self.what).name}"
        if self.card is None:
            return pushing.push(ref, self.files, private, message)
        with tempfile.TemporaryDirectory(prefix="qem-push-") as folder:
            card = Path(folder) / CARD
            card.write_text(self.card, encoding="utf-8")
            return pushing.push(ref, {CARD: card, **self.files}, private, message)


def target(text: str) -> Reference:
    """The repository that a push names; UsageError for anything else."""
    if not text.startswith(PREFIX):
        raise UsageError(f"{text}: a push goes to hf://owner/name or hf://datasets/owner/name")
    ref = Reference.parse(text)
    pushing.check(ref)
    return ref


def parcel(what: str, ref: Reference) -> Parcel:
    """What of a PREDICTOR or a ZOO is pushed.

    Raises InputError where it is neither, UsageError for a zoo whose weights lie elsewhere.
    """
    if is_predictor(what):
        return _predictor(what, ref)
    path = locate_zoo(what)
    files = dict(_below(path)) if path.is_dir() else {path.name: path}
    if len(files) > MANY:
        raise UsageError(
            f"{what}: {len(files)} files, more than a repository takes ({MANY})",
            "push its folders one by one, each to a repository of its own",
        )
    zoo = Zoo.open(path)
    if (path / INDEX).is_file():
        layout, root = origin(path)
        if layout == "hub":
            raise UsageError(f"{what}: an index of headers, without weights", "push what it lists")
        if root.resolve() != path.resolve():
            raise UsageError(f"{what}: an index of a zoo that lies in {root}", f"push {root}")
    card = None if CARD in files else zoo_card(zoo, ref)
    return Parcel(what, "zoo", files, card)


def _predictor(what: str, ref: Reference) -> Parcel:
    file = locate(what)
    predictor = Predictor.load(file)
    beside = [file.with_name(name) for name in KEPT] + sorted(file.parent.glob("*.toml"))
    files = {FILE: file, **{p.name: p for p in beside if p.is_file()}}
    card = None if CARD in files else predictor_card(predictor, ref)
    return Parcel(what, "predictor", files, card)


def _below(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file of a folder but hidden ones, what is half written and receipts; InputError for a
    link that leaves it."""
    inside = folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or not path.is_file() or path.suffix == ".tmp" or name.name == RECEIPT:
            continue
        if os.path.commonpath([path.resolve(), inside]) != str(inside):
            raise InputError(f"{path}: a link that leaves the folder is not pushed")
        yield name.as_posix(), path


def _head(pairs: dict[str, Any]) -> list[str]:
    stated = {"library_name": "qem", **{k: v for k, v in pairs.items() if v}}
    lines = [f"{k}: {v if isinstance(v, str) else json.dumps(v)}" for k, v in stated.items()]
    return ["---", *lines, "---"]


def predictor_card(predictor: Predictor, ref: Reference) -> str:
    """A card from the predictor's header: what it reads and answers, and its score."""
    space, test = predictor.space, predictor.provenance.get("test", {})
    score = [f"| {k} | {v:.4f} |" for k, v in test.items() if isinstance(v, float)]
    lines = [
        *_head({"tags": ["weight-space", predictor.task], "task": predictor.task}),
        f"# {predictor.name}",
        "",
        f"Answers '{predictor.task}' about {space.family} networks of widths {space.widths} "
        f"({space.activation}) from their weights: {predictor.design.architecture}, quasi mode "
        f"{predictor.design.quasi}, {predictor.parameters:,} parameters.",
        "",
        *(["| held-out | |", "|---|---|", *score, ""] if score else []),
        f"Read by `qem predict ZOO -p {ref}`.",
    ]
    return "\n".join(lines) + "\n"


def zoo_card(zoo: Zoo, ref: Reference) -> str:
    """A card from the index: how many networks, of which kinds, with which labels."""
    index, record = zoo.index, zoo.record
    kinds = sorted({f"{s.family} {list(s.widths)}" for s in zoo.spaces.values()})
    labels = [c for c in ("test_accuracy", "label") if c in index and index[c].notna().any()]
    lines = [
        *_head({"tags": ["model-zoo", "weight-space"], "license": record.get("licence")}),
        f"# {record.get('name') or ref.name.split('/')[-1]}",
        "",
        f"{len(zoo)} checkpoints: {'; '.join(kinds[:8])}{' ...' if len(kinds) > 8 else ''}.",
        f"Labels: {', '.join(labels) or 'none'}.",
        "",
        f"Read by `qem index {ref}` and every command that takes a zoo.",
    ]
    return "\n".join(lines) + "\n"
