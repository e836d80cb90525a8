"""The TOML recipe of a zoo of SIRENs: which images, what is fitted to them, and how well."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from qemcli.errors import UsageError
from qemcli.spaces import CONVENTIONS
from qemcli.zoos.build.zoo_recipe import ZooRecipe

INITS = ("nfn", "dws", "dws-first")


@dataclass(frozen=True)
class SirenRecipe(ZooRecipe):
    """A zoo of SIRENs, one an image (or several of a training image).

    Attributes, beside those of every zoo:
        train, val, test: images of each split; the first two are of `source`.
        views: networks of each training image, from different seeds.
        widths: neurons of the hidden layers. w0, first_w0: factors of the hidden and the first
        layer (a different first one is folded into the weights that are stored).
        convention: "nfn" or "dws", see spaces.CONVENTIONS.
        init: "nfn" (Sitzmann et al.'s: first layer U(±1/inputs), then U(±sqrt(6/inputs)/w0),
        biases as torch draws them), "dws" (all hidden layers U(±sqrt(6/inputs)/w0), biases 0, the
        last layer as torch draws it), "dws-first" (the same with a first layer of U(±1/inputs)).
        shared_init: every network begins at the same weights; a far easier zoo to read.
        lr: Adam's rate. psnr: in dB, a network that reaches it is done; 0: none. steps: at most.
    """

    family: str = "siren"
    name: str = "siren"
    train: int = 600
    val: int = 100
    test: int = 300
    views: int = 1
    widths: tuple[int, ...] = (32, 32)
    w0: float = 30.0
    first_w0: float = 30.0
    convention: str = "nfn"
    init: str = "nfn"
    shared_init: bool = False
    lr: float = 1e-3
    psnr: float = 40.0
    steps: int = 2000
    block: int = 400

    @property
    def networks(self) -> int:
        return self.train * self.views + self.val + self.test

    def resized(self, networks: int) -> SirenRecipe:
        """About so many networks, at least one an image of each split, in the same proportions."""
        images = max(3, round(networks / self.networks * (self.train + self.val + self.test)))
        share = images / (self.train + self.val + self.test)
        val, test = max(1, round(self.val * share)), max(1, round(self.test * share))
        train = max(1, round((networks - val - test) / self.views))
        return dataclasses.replace(self, train=train, val=val, test=test)

    def checked(self, path: Path) -> SirenRecipe:
        """The recipe where it can be fitted; UsageError otherwise."""
        self.check_choices(path, "convention", list(CONVENTIONS))
        self.check_choices(path, "init", INITS)
        counts = (self.train, self.val, self.test, self.views, self.block, *self.widths)
        if not self.widths or min(counts) < 1 or self.steps < 0:
            raise UsageError(
                f"{path}: train, val, test, views, widths and block must be there and positive"
            )
        if min(self.w0, self.first_w0, self.lr) <= 0 or self.psnr < 0:
            raise UsageError(f"{path}: w0, first_w0 and lr must be above 0, psnr not below")
        return self
