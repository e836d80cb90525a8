"""The published zoos: their cards in zoos/ say where they are had.

download: ["hf://datasets/owner/name", "zenodo:6632086", "gs://bucket/file.tar.xz", ...]
checksums: {"file.zip": "md5:..."}        # where the service itself publishes none
"""

from __future__ import annotations

from dataclasses import dataclass

from qemcli.shipped import shipped
from qemcli.zoos.known import front_matter


@dataclass(frozen=True)
class Card:
    """Where a zoo is had, and the checksums that its publishers give."""

    addresses: tuple[str, ...]
    checksums: dict[str, str]


def published() -> dict[str, Card]:
    """Name -> card, for every folder of zoos/ whose card has a `download:`."""
    found = {}
    for folder in sorted(shipped("zoos").glob("*")):
        head = front_matter(folder) if folder.is_dir() else {}
        stated = head.get("download")
        addresses = [stated] if isinstance(stated, str) else stated or []
        checksums = head.get("checksums")
        if addresses:
            sums = checksums if isinstance(checksums, dict) else {}
            found[folder.name] = Card(tuple(map(str, addresses)), sums)
    return found
