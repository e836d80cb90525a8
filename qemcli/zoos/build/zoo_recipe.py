"""What every recipe of a zoo says: its card, the data its networks are trained on, its size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from qemcli import registry
from qemcli.errors import UsageError


@dataclass(frozen=True)
class ZooRecipe(ABC):
    """Networks that are trained here.

    Attributes:
        family: what is trained; a module `FAMILY_zoo` makes it.
        name, licence, about: for the card.
        source: "digits" (scikit-learn), a train parquet in the Hub's schema, or
        hf://datasets/owner/name/file.
        test_source: the test parquet; digits and a lone parquet are cut instead.
        resize: side in pixels the images are averaged down to; 0: as they are.
        seed: everything that is drawn follows from it. block: networks that are trained together
        and written at a time.
    """

    family: str = ""
    name: str = ""
    licence: str = "unknown"
    about: str = ""
    source: str = "digits"
    test_source: str | None = None
    resize: int = 0
    seed: int = 0
    block: int = 64

    @property
    @abstractmethod
    def networks(self) -> int:
        """How many networks are trained."""

    @abstractmethod
    def resized(self, networks: int) -> Self:
        """The same zoo of so many networks, or as near as its parts allow."""

    @abstractmethod
    def checked(self, path: Path) -> Self:
        """The recipe where its networks can be drawn and trained; UsageError that names `path`
        where they cannot."""

    def check_choices(self, path: Path, name: str, known: Sequence[str]) -> None:
        """UsageError where a setting has no value, or one that is not known."""
        value = getattr(self, name)
        values = (value,) if isinstance(value, str) else value
        if not values:
            raise UsageError(f"{path}: '{name}' is empty", f"of {', '.join(known)}")
        for one in values:
            if one not in known:
                hint = registry.suggest(one, list(known))
                raise UsageError(f"{path}: '{name}' has {one!r}", hint)
