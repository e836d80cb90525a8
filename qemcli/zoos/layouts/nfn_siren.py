"""The SIREN zoos of NFN (Zhou et al. 2023, arXiv:2302.14040), byte for byte, from a folder or the
.tar itself.

siren_<images>_wts/randinit_smaller_<class>s/net<image>.pth, and augmented copies under
randinit_smaller_aug<k>_<class>s/. `image` counts the training images, then the test images. The
published parts: images below 45,000 train, below 50,000 val, the others test.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from qemcli.zoos.layouts._inr import Found, Network, claims, find, opened
from qemcli.zoos.zoo import Zoo

NAME = re.compile(r"(?:^|/)randinit_\w*?(?:_aug(\d{1,9}))?_(\d{1,9})s/net(\d{1,9})\.pth$")
VAL, TEST = 45_000, 50_000
COPY = "an augmented copy; asked for by a filter over 'augmented', e.g. --where 'augmented < 5'"
ABOUT = {"paper": "arXiv:2302.14040", "convention": "nfn", "splits": "by image, as published"}


def sniff(path: Path) -> bool:
    """A folder or an archive with networks of such names."""
    return claims(path, told)


def told(name: str) -> Network | None:
    """What a path says of its network; a copy belongs to no part but train."""
    found = NAME.search(name)
    if found is None:
        return None
    copy, label, image = found[1], int(found[2]), int(found[3])
    split = "train" if image < VAL else "val" if image < TEST else "test"
    if copy is not None and split != "train":
        return Network(label, image, None, int(copy))
    return Network(label, image, split, -1 if copy is None else int(copy))


def open(path: Path, activation: str | None = None, statistics: bool = False) -> Zoo:
    """The zoo, without the augmented copies where there are others; `Zoo.where` brings them in.

    Raises InputError where not one network can be read.
    """
    found = find(path, told)
    base = {name: row for name, row in found.networks.items() if row[1].augmented < 0}
    copies = [name for name in found.networks if name not in base]
    everything = dict(found.networks)
    if base and copies:
        found.leave_out(COPY, copies)
    _agree(found)
    zoo = opened(found, "nfn_siren", "nfn", ABOUT)
    if not base or not copies:
        return zoo

    def whole() -> Zoo:
        return _whole(Found(path, found.tree, everything))

    return replace(zoo, copies=whole)


def _whole(found: Found) -> Zoo:
    _agree(found)
    return opened(found, "nfn_siren", "nfn", ABOUT)


def _agree(found: Found) -> None:
    """An image that stands in two classes has no label that could be trusted."""
    classes: dict[tuple[int, int], set[int | None]] = defaultdict(set)
    for _, network in found.networks.values():
        classes[network.image, network.augmented].add(network.label)
    bad = {key for key, labels in classes.items() if len(labels) > 1}
    names = [n for n, (_, w) in found.networks.items() if bad and (w.image, w.augmented) in bad]
    if names:
        found.fail("its image stands in two classes", names)
