"""The TOML recipe of a zoo that is trained here: CNNs, or what its `family` says; every field has a
default and a unit or a range."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemcli import registry
from qemcli.errors import UsageError
from qemcli.settings import fields
from qemcli.zoos.build.drawn import JUNCTIONS, DrawnRecipe
from qemcli.zoos.build.mixed_recipe import MixedRecipe
from qemcli.zoos.build.siren_recipe import SirenRecipe
from qemcli.zoos.build.transformer_recipe import TransformerRecipe
from qemcli.zoos.build.zoo_recipe import ZooRecipe


@dataclass(frozen=True)
class Recipe(DrawnRecipe):
    """A zoo of small CNNs of one architecture.

    Attributes, beside those of every zoo that is drawn:
        channels, kernel, stride, padding, junction: the architecture.
    """

    family: str = "cnn"
    channels: tuple[int, ...] = (16, 16, 16)
    kernel: int = 3
    stride: int = 2
    padding: int = 1
    junction: str = "pool"

    def check_architecture(self, path: Path) -> None:
        """Convolutions of positive sizes."""
        self.check_choices(path, "junction", JUNCTIONS)
        if (
            not self.channels
            or min(*self.channels, self.kernel, self.stride) < 1
            or self.padding < 0
        ):
            raise UsageError(f"{path}: channels, kernel and stride must be positive")


FAMILIES: dict[str, type[ZooRecipe]] = {
    "cnn": Recipe,
    "mixed": MixedRecipe,
    "siren": SirenRecipe,
    "transformer": TransformerRecipe,
}


def load(path: Path) -> ZooRecipe:
    """Read a recipe; UsageError names the setting that is wrong and what was probably meant."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not TOML ({error})") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    family = str(document.get("family", "cnn"))
    if family not in FAMILIES:
        known = list(FAMILIES)
        raise UsageError(f"{path}: no family '{family}'", registry.suggest(family, known))
    given = fields(FAMILIES[family], document, str(path))
    told: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    return FAMILIES[family](**told).checked(path)
