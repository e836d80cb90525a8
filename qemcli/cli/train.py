"""qem train: a metanetwork from a zoo, scored on what was held out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qemcli.cli import _options as options
from qemcli.cli._out import Answer, Sink

if TYPE_CHECKING:
    from qemcli.recipes import Recipe

app = typer.Typer(add_completion=False)

Zoos = Annotated[
    list[str] | None, typer.Option("--zoo", help="Zoo to learn from; may be given twice.")
]
Task = Annotated[str | None, typer.Option("--task", help="What is asked of each network.")]
Architecture = Annotated[str | None, typer.Option("--architecture", "-a", help="See `qem models`.")]
Quasi = Annotated[
    str | None, typer.Option("--quasi", help="none, balanced, exact, paper or released.")
]
Edit = Annotated[str | None, typer.Option("--edit", help="Editors: another edit, NAME[:AMOUNT].")]
Expand = Annotated[int | None, typer.Option("--expand", min=1, help="Editors: branches, k.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the new predictor.")]
Epochs = Annotated[int | None, typer.Option("--epochs", min=1, help="Passes over the networks.")]
Rate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Same seed, same bytes.")]


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="TOML file, or a shipped name.")] = None,
    zoo: Zoos = None,
    task: Task = None,
    architecture: Architecture = None,
    quasi: Quasi = None,
    edit: Edit = None,
    expand: Expand = None,
    where: options.Where = None,
    activation: options.Activation = None,
    epochs: Epochs = None,
    lr: Rate = None,
    seed: Seed = None,
    out: Out = None,
    resume: options.Resume = False,
    device: options.DeviceOption = options.Device.auto,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train a metanetwork; without arguments, the default recipe on the embedded zoo.

    Example: qem train --zoo sweep/ --architecture monomial_nfn --quasi exact --out my-predictor
    """
    from qemcli import fitting, recipes
    from qemcli.machine import steady

    sink = Sink(json, quiet, verbose)
    steady()
    plan = recipes.load(recipes.find(recipe or recipes.DEFAULT, "training", "train.toml"))
    plan = recipes.editing(plan, edit, expand)
    plan = _changed(plan, zoo, task, where, seed, architecture, quasi, epochs, lr)
    folder = out or Path(f"{plan.design.architecture}-{plan.design.quasi}-seed{plan.seed}")
    fitting.fresh(folder, resume)
    sample = fitting.collect(plan, zoo or [], activation, sink.note)
    with sink.progress("training", plan.schedule.epochs) as advance:

        def on_epoch(row: dict[str, float]) -> None:
            advance(1)
            sink.detail("  ".join(f"{k} {v:.4g}" for k, v in row.items()))

        made = fitting.fit(plan, sample, folder, resume, options.device(device), on_epoch)
    sink.note(f"predictor written to {folder}")
    design = dataclasses.asdict(plan.design)
    summary = {"predictor": str(folder), **design, "parameters": made.predictor.parameters}
    summary |= {"seed": plan.seed, "epochs": len(made.history)}
    sink.answer(Answer([made.test], summary, list(sample.failed)))


def _changed(
    plan: Recipe,
    zoo: list[str] | None,
    task: str | None,
    where: str | None,
    seed: int | None,
    architecture: str | None,
    quasi: str | None,
    epochs: int | None,
    lr: float | None,
) -> Recipe:
    """The recipe with what the command line says instead."""
    from qemcli.designs import EDITING

    design = plan.design
    if architecture and architecture != design.architecture:
        kept = {k: v for k, v in design.config.items() if k in EDITING}
        design = dataclasses.replace(design, architecture=architecture, config=kept)
    design = dataclasses.replace(design, quasi=quasi or design.quasi)
    schedule = dataclasses.replace(
        plan.schedule,
        lr=plan.schedule.lr if lr is None else lr,
        epochs=plan.schedule.epochs if epochs is None else epochs,
    )
    given: dict[str, Any] = {
        "task": task,
        "where": where,
        "seed": seed,
        "zoos": tuple(zoo) if zoo else None,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(plan, design=design, schedule=schedule, **changes)
