"""The TOML recipe of a zoo that is trained here: CNNs, or what its `family` says; every field has a
default and a unit or a range."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path

from qemcli import registry
from qemcli.errors import UsageError
from qemcli.zoos.build.mixed_recipe import MixedRecipe
from qemcli.zoos.build.siren_recipe import SirenRecipe
from qemcli.zoos.build.transformer_recipe import TransformerRecipe

Range = tuple[float, float]


@dataclass(frozen=True)
class Recipe:
    """A zoo of small CNNs.

    Attributes:
        name, licence, about: for the card.
        source: "digits" (scikit-learn), a train parquet in the Hub's schema, or hf://datasets/owner/name/file.
        test_source: the test parquet; digits and a lone parquet are cut instead.
        test_images: how many held-out images the accuracy is measured on.
        resize: side in pixels the images are averaged down to; 0: as they are.
        models: number of networks; checkpoints: steps at which one is kept, the last ends the
        training.
        batch: images a step. channels, kernel, stride, padding, junction: the architecture.
        lr, l2, init_std: drawn log-uniformly; dropout: uniformly; the lists: one is chosen.
    """

    family: str = "cnn"
    name: str = "cnn"
    licence: str = "unknown"
    about: str = ""
    source: str = "digits"
    test_source: str | None = None
    test_images: int = 1000
    resize: int = 0
    models: int = 100
    checkpoints: tuple[int, ...] = (100, 300, 500)
    batch: int = 32
    seed: int = 0
    channels: tuple[int, ...] = (16, 16, 16)
    kernel: int = 3
    stride: int = 2
    padding: int = 1
    junction: str = "pool"
    lr: Range = (5e-4, 5e-2)
    l2: Range = (1e-8, 1e-2)
    init_std: Range = (1e-3, 0.5)
    dropout: Range = (0.0, 0.7)
    init: tuple[str, ...] = (
        "he_normal",
        "glorot_normal",
        "orthogonal",
        "normal",
        "truncated_normal",
    )
    optimizer: tuple[str, ...] = ("adam", "rmsprop", "sgd")
    train_fraction: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    activation: tuple[str, ...] = ("relu",)
    block: int = 32

    @property
    def networks(self) -> int:
        return self.models

    def resized(self, networks: int) -> Recipe:
        """So many networks."""
        return dataclasses.replace(self, models=networks)

    def checked(self, path: Path) -> Recipe:
        """The recipe where its values can be drawn and trained; UsageError otherwise."""
        for name in ("lr", "l2", "init_std"):
            low_high = getattr(self, name)
            if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1]:
                raise UsageError(
                    f"{path}: '{name}' is {list(low_high)}; [low, high] above 0 is needed"
                )
        if len(self.dropout) != 2 or not 0 <= self.dropout[0] <= self.dropout[1] < 1:
            raise UsageError(f"{path}: 'dropout' is {list(self.dropout)}; 0 <= low <= high < 1")
        if min(self.checkpoints, default=-1) < 0 or min(self.models, self.batch, self.block) < 1:
            raise UsageError(
                f"{path}: checkpoints, models, batch and block must be there and positive"
            )
        return self


AnyRecipe = Recipe | MixedRecipe | SirenRecipe | TransformerRecipe
FAMILIES: dict[str, type[AnyRecipe]] = {
    "cnn": Recipe,
    "mixed": MixedRecipe,
    "siren": SirenRecipe,
    "transformer": TransformerRecipe,
}


def load(path: Path) -> AnyRecipe:
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
    kinds = {f.name: f for f in dataclasses.fields(FAMILIES[family])}
    for key, value in document.items():
        if key not in kinds:
            raise UsageError(f"{path}: no setting '{key}'", registry.suggest(key, list(kinds)))
        default = kinds[key].default
        if isinstance(value, list):
            document[key] = value = tuple(value)
        if not _like(value, default):
            raise UsageError(f"{path}: '{key}' is {value!r}; something like {default!r} is needed")
    return FAMILIES[family](**document).checked(path)


def _like(value: object, default: object) -> bool:
    """True where the value has the default's type; whole numbers pass for real ones."""
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(_like(v, default[0]) for v in value)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return isinstance(value, type(default)) or (default is None and isinstance(value, str))
