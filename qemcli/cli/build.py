"""qem build: a zoo trained here by a recipe, many networks at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qemcli.cli import _options as options
from qemcli.cli._out import Answer, Sink

app = typer.Typer(add_completion=False)

Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the new zoo.")]
Models = Annotated[int | None, typer.Option("--models", min=1, help="So many networks.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Same seed, same networks.")]
Source = Annotated[
    str | None,
    typer.Option("--source", help="Images or texts: TRAIN.parquet[,TEST.parquet] or hf://…"),
]


@app.command()
def build(
    recipe: Annotated[str, typer.Argument(help="TOML file, or a zoo's name.")],
    out: Out = None,
    models: Models = None,
    source: Source = None,
    workers: options.Workers = 0,
    seed: SeedOption = None,
    device: options.DeviceOption = options.Device.auto,
    resume: options.Resume = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train a zoo of small CNNs, SIRENs or transformers by a recipe; --resume goes on with one.

    Example: qem build cnn-digits --models 200 --out zoo
    """
    import dataclasses
    import os

    from qemcli import recipes
    from qemcli.zoos.build import recipe as zoo_recipe
    from qemcli.zoos.build import run, sources

    sink = Sink(json, quiet, verbose)
    plan = zoo_recipe.load(recipes.find(recipe, "zoo", "recipe.toml"))
    plan = plan.resized(models) if models else plan
    plan = plan if seed is None else dataclasses.replace(plan, seed=seed)
    if source:  # both files, or one of which the test images are cut
        first, _, second = source.partition(",")
        plan = dataclasses.replace(plan, source=first, test_source=second or None)
    folder = out or Path(plan.name)
    if dry_run:
        count = plan.networks * len(getattr(plan, "checkpoints", [0]))
        record = {"zoo": str(folder), "networks": plan.networks, "checkpoints": count}
        sink.answer(Answer([], record))
        return
    held_out = sources.pinned(plan.test_source) if plan.test_source else None
    plan = dataclasses.replace(plan, source=sources.pinned(plan.source), test_source=held_out)
    place = options.device(device) if plan.family == "siren" else "cpu"
    images = run.family(plan).load(plan)
    with sink.progress("training networks", plan.networks) as advance:
        summary = run.build(
            plan, images, folder, workers or os.cpu_count() or 1, resume, advance, place
        )
    sink.note(f"{summary['networks']} networks written to {folder}")
    sink.answer(Answer([], summary))
