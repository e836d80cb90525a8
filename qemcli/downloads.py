"""Downloads: what an argument of `qem download` means, how large it is, and the fetching of all of
it or a failure.

Beside files that are put into a folder stands a receipt (zoos/receipt.py); repositories go to the
Hub's own cache where no folder is named.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from qemcli.errors import EnvironmentFailure, InputError, UsageError
from qemcli.hub import fetching, repository
from qemcli.hub.reference import PREFIX, Reference
from qemcli.registry import suggest
from qemcli.shipped import shipped
from qemcli.web import sources, transfer
from qemcli.web.transfer import Remote
from qemcli.zoos.published import published
from qemcli.zoos.receipt import Receipt

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Patterns:
    """Which files are meant: shell patterns on their names; without `include` all are."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def take(self, name: str) -> bool:
        """True where a file of this name is meant."""
        wanted = not self.include or any(fnmatchcase(name, p) for p in self.include)
        return wanted and not any(fnmatchcase(name, p) for p in self.exclude)


class Part(ABC):
    """Files that come from one place."""

    @property
    @abstractmethod
    def pinned(self) -> str:
        """From where, with the revision."""

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """One row a file: `file`, `size` in bytes (None where nobody says), its `checksum`."""

    @abstractmethod
    def fetch(self, receipt: Receipt | None, advance: Advance) -> Path:
        """Fetch and check all of them, into the receipt's folder where there is one; the folder
        where they lie."""


@dataclass
class HubPart(Part):
    """Files of one commit of a repository of the Hub."""

    ref: Reference
    patterns: Patterns

    @cached_property
    def copy(self) -> fetching.Copy:
        """What the repository holds at the commit."""
        return fetching.look(self.ref)

    @cached_property
    def files(self) -> tuple[repository.File, ...]:
        """Those that are meant."""
        return self.copy.tree.select(self.patterns.include, self.patterns.exclude)

    @property
    def pinned(self) -> str:
        """The reference with its commit."""
        return str(self.ref.at(self.copy.tree.commit))

    def rows(self) -> list[dict[str, Any]]:
        """As Part says; `checksum` is git's id for small files."""
        return [
            {
                "file": file.path,
                "size": file.size,
                "checksum": f"sha256:{file.sha256}" if file.sha256 else f"git:{file.blob}",
                "cached": self.copy.sound(file),
            }
            for file in self.files
        ]

    def fetch(self, receipt: Receipt | None, advance: Advance) -> Path:
        """As Part says; without a receipt into the Hub's own cache."""
        dest = receipt.folder if receipt else None
        asked = self.patterns.include, self.patterns.exclude
        folder = fetching.fetch(self.ref, *asked, dest, advance, self.copy)
        if receipt:
            for row in self.rows():
                known = {"size": row["size"], "checksum": row["checksum"]}
                receipt.files[row["file"]] = known
        return folder


@dataclass
class WebPart(Part):
    """Files of one Zenodo record, bucket or server."""

    address: str
    patterns: Patterns
    checksums: dict[str, str] = field(default_factory=dict)

    @cached_property
    def files(self) -> list[Remote]:
        """Those that are meant, with sizes and checksums where somebody says them.

        Raises EnvironmentFailure for a share that only a browser can fetch.
        """
        if repository.offline():
            raise EnvironmentFailure(f"{self.address}: HF_HUB_OFFLINE forbids the network")
        with transfer.client() as http:
            found = sources.expand(http, self.address)
            if isinstance(found, sources.Share):
                raise by_hand([found])
            kept = [remote for remote in found if self.patterns.take(remote.name)]
            stated = [self._stated(remote) for remote in kept]
            return [r if r.size is not None else transfer.probe(http, r) for r in stated]

    def _stated(self, remote: Remote) -> Remote:
        return Remote(
            remote.url,
            remote.name,
            remote.size,
            remote.checksum or self.checksums.get(remote.name),
        )

    @property
    def pinned(self) -> str:
        """The address."""
        return transfer.shown(self.address)

    def rows(self) -> list[dict[str, Any]]:
        """As Part says."""
        return [{"file": r.name, "size": r.size, "checksum": r.checksum} for r in self.files]

    def fetch(self, receipt: Receipt | None, advance: Advance) -> Path:
        """As Part says; files that are there and sound are not fetched again."""
        if receipt is None:
            raise UsageError(f"{self.pinned}: it needs a folder", "give --dest")
        with transfer.client() as http:
            for remote in self.files:
                path, had = receipt.folder / remote.name, receipt.files.get(remote.name)
                if _sound(path, had, remote):
                    advance(path.stat().st_size)
                    continue
                found = transfer.download(http, remote, receipt.folder, advance)
                url = transfer.shown(remote.url)
                receipt.files[remote.name] = {"url": url, "checksum": remote.checksum, **found}
                receipt.save()
        return receipt.folder


def _sound(path: Path, had: Any, remote: Remote) -> bool:
    """True where an earlier run has fetched the file and it has not changed since."""
    if not isinstance(had, dict) or not path.is_file():
        return False
    if had.get("checksum") != remote.checksum or remote.size not in (None, path.stat().st_size):
        return False
    return transfer.digests(path)["sha256"] == had.get("sha256")


def by_hand(shares: Sequence[sources.Share]) -> EnvironmentFailure:
    """What the user has to fetch in a browser, and what comes then."""
    places = "; ".join(f"{share.url} ({share.host})" for share in shares)
    return EnvironmentFailure(
        f"it can only be fetched in a browser: {places}",
        "save the archive, leave it packed, and give its path: qem index ARCHIVE",
    )


@dataclass
class Plan:
    """All that one argument of `qem download` means."""

    name: str
    parts: list[Part]
    dest: Path | None  # None: the Hub's own cache

    def rows(self) -> list[dict[str, Any]]:
        """One row a file; InputError where no file is meant."""
        rows = [row for part in self.parts for row in part.rows()]
        if not rows:
            raise InputError(f"{self.name}: no file is meant", "loosen --include")
        names = [row["file"] for row in rows]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice and len(self.parts) > 1:
            raise InputError(f"{self.name}: two of its files are called '{twice}'")
        return rows

    def fetch(self, advance: Advance = lambda n: None) -> dict[str, Any]:
        """Fetch everything; returns the summary. Nothing that is there is overwritten, unless an
        earlier run has put it there."""
        rows = self.rows()
        receipt = Receipt.begin(self.dest, self.name) if self.dest else None
        folders = [part.fetch(receipt, advance) for part in self.parts]
        if receipt:
            receipt.pinned = [part.pinned for part in self.parts]
            receipt.complete = True
            receipt.save()
        return {**self.summary(rows), "path": str(folders[0])}

    def summary(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Files, bytes, and how many of them nobody publishes a checksum of; unknown sizes count as
        none."""
        return {
            "source": [part.pinned for part in self.parts],
            "files": len(rows),
            "bytes": sum(row["size"] or 0 for row in rows),
            "unchecked": sum(row["checksum"] is None for row in rows),
        }


def planned(
    given: str, include: Sequence[str] = (), exclude: Sequence[str] = (), dest: Path | None = None
) -> Plan:
    """What an argument means: hf://..., an address, or the name of a zoo whose card says from
    where it comes.

    Without `dest` a repository goes to the Hub's cache, everything else to ./NAME.
    Raises UsageError for an unknown name; EnvironmentFailure where the user has to fetch it.
    """
    patterns = Patterns(include, exclude)
    if given.startswith(PREFIX):
        return Plan(given, [HubPart(Reference.parse(given), patterns)], dest)
    if sources.is_address(given):
        return Plan(given, [WebPart(given, patterns)], dest or Path(_folder(given)))
    if "://" in given:
        raise UsageError(f"{given}: no address that qem reads", sources.READS)
    cards = published()
    if given not in cards:
        raise UsageError(
            f"{given}: no published zoo is called so",
            suggest(given, sorted(cards)) if cards else "give hf://owner/name or an address",
        )
    card = cards[given]
    parts: list[Part] = []
    for address in card.addresses:
        if address.startswith(PREFIX):
            parts.append(HubPart(Reference.parse(address), patterns))
        else:
            parts.append(WebPart(address, patterns, card.checksums))
    return Plan(given, parts, dest or Path(given))


def embedded(given: str) -> Path | None:
    """The folder of a zoo that ships, which needs no download."""
    folder = shipped("zoos") / given
    return folder if "/" not in given and (folder / "index.parquet").is_file() else None


def _folder(address: str) -> str:
    """A folder's name for what an address holds: zenodo-6632086, or the file's without suffix."""
    last = re.sub(r"^https?://(www\.)?zenodo\.org/records?/", "zenodo:", address).split("?")[0]
    last = last.rstrip("/").rsplit("/", 1)[-1].replace(":", "-")
    return re.sub(r"[^\w.-]", "_", last).split(".", 1)[0].lstrip("-") or "download"
