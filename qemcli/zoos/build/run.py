"""Build a zoo: the recipe's networks in blocks, one single-threaded process a core, resumable.

Each family of networks is a module that can `load` the images of its recipe, make one `block`, and
say the `summary` and the `card` of the zoo; some also `about` what else its record has, or
`accompany` the networks with a file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from qemcli import __version__
from qemcli.processes import spread
from qemcli.writing import beside
from qemcli.zoos.build.zoo_recipe import ZooRecipe
from qemcli.zoos.store import Store


def family(recipe: ZooRecipe) -> ModuleType:
    """The module that makes such networks."""
    return import_module(f"qemcli.zoos.build.{recipe.family}_zoo")


def blocks(recipe: ZooRecipe) -> list[list[int]]:
    """Network numbers of every block."""
    numbers = range(recipe.networks)
    return [list(numbers[i : i + recipe.block]) for i in range(0, len(numbers), recipe.block)]


def build(
    recipe: ZooRecipe,
    images: Any,
    folder: Path,
    workers: int,
    resume: bool = False,
    advance: Callable[[int], None] = lambda n: None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train every block that is not there yet, then write index, zoo.json and card; returns the
    summary.

    `images` are what the recipe's family loads. On a CUDA device one process does all. Raises
    UsageError where `folder` holds something else, or the start of another recipe's zoo,
    EnvironmentFailure where another process writes there.
    """
    store = Store(folder, resume, dataclasses.asdict(recipe))
    with store.alone():
        store.begin()  # here, since blocks are written by other processes
        _blocks(recipe, images, store, workers, advance, device)
        return _finished(recipe, store, len(blocks(recipe)))


def _blocks(
    recipe: ZooRecipe,
    images: Any,
    store: Store,
    workers: int,
    advance: Callable[[int], None],
    device: str,
) -> None:
    made = family(recipe)
    if hasattr(made, "accompany"):
        made.accompany(images, store.folder)
    work = blocks(recipe)
    todo = [b for b in range(len(work)) if not store.done(b)]
    advance(recipe.networks - sum(len(work[b]) for b in todo))
    if workers > 1 and len(todo) > 1 and device == "cpu":
        jobs = [(b, work[b], store.folder) for b in todo]
        for i in spread(_block, jobs, workers, _start, (recipe, images, device)):
            advance(len(work[todo[i]]))
    else:
        _start(recipe, images, device)
        for block in todo:
            _block(block, work[block], store.folder)
            advance(len(work[block]))


_RECIPE: ZooRecipe
_IMAGES: Any
_DEVICE: str


def _start(recipe: ZooRecipe, images: Any, device: str = "cpu") -> None:
    global _RECIPE, _IMAGES, _DEVICE  # a worker's arguments that are too large for every block
    import torch

    from qemcli.machine import steady

    torch.set_num_threads(1)
    steady()
    _RECIPE, _IMAGES, _DEVICE = recipe, images, device


def _block(block: int, numbers: list[int], folder: Path) -> None:
    """Train one block and write it whole."""
    made = family(_RECIPE).block(_RECIPE, _IMAGES, numbers, _DEVICE)
    Store(folder, resume=True).write(block, *made)


def _finished(recipe: ZooRecipe, store: Store, count: int) -> dict[str, Any]:
    record = {"recipe": dataclasses.asdict(recipe), "licence": recipe.licence, "name": recipe.name}
    made = family(recipe)
    about = made.about(recipe) if hasattr(made, "about") else {}
    provenance = {"command": "qem build", "qem": __version__}
    table = store.finish(count, {**record, **about, "provenance": provenance})
    summary = {"zoo": str(store.folder), **made.summary(recipe, table)}
    text = card(recipe, made.card(recipe, summary))
    beside(store.folder / "README.md", lambda p: p.write_text(text))
    return summary


def card(recipe: ZooRecipe, body: list[str]) -> str:
    """The zoo's card: data, licence, what was made, how it is built again."""
    head = [
        "---",
        "library_name: qem",
        f"license: {recipe.licence}",
        "tags: [model-zoo, weight-space]",
        "---",
        f"# {recipe.name}",
        "",
    ]
    again = (
        f"Built again by `qem build {recipe.name} --models {recipe.networks} --seed {recipe.seed} "
        "--out DIR`; recipe.json holds every setting."
    )
    return "\n".join([*head, *body, "", again, ""])
