"""The command tree: every module of this folder without a leading underscore is a command,
imported on use."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

# The order of a first day with the tool; a command that is not named here comes last.
ORDER = (
    "predict", "evaluate", "classify", "edit", "render", "train", "compare", "verify-invariance",
    "augment", "canonicalize", "align", "equal", "duplicates", "inspect", "index", "download",
    "push", "build", "zoos", "models", "report",
)  # fmt: skip


def modules() -> dict[str, str]:
    """Command name -> module name: `inspect_.py` is `inspect`, `verify_invariance.py`
    `verify-invariance`."""
    found = pkgutil.iter_modules(import_module("qemcli.cli").__path__)
    names = (m.name for m in found if not m.name.startswith("_"))
    table = {name.strip("_").replace("_", "-"): f"qemcli.cli.{name}" for name in names}
    rank = {name: i for i, name in enumerate(ORDER)}
    return dict(sorted(table.items(), key=lambda item: (rank.get(item[0], len(ORDER)), item[0])))


class Cut(Exception):
    """A closed pipe or Ctrl-C on its way to `main`: Typer would end both with codes of its own."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Tree(TyperGroup):
    """A group that imports a command's module when the command is asked for."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (BrokenPipeError, KeyboardInterrupt) as cause:
            raise Cut(cause) from None

    def list_commands(self, ctx: Any) -> list[str]:
        return list(modules())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        module = modules().get(cmd_name)
        if module is None:
            return None
        command = typer.main.get_command(import_module(module).app)
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=Tree,
    name="qem",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Read neural networks by their weights: rank, verify, classify and edit whole zoos.",
)


def _version(value: bool) -> None:
    if value:
        from qemcli import __version__

        typer.echo(f"qem {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and leave."
    ),
) -> None:
    """Read neural networks by their weights: rank, verify, classify and edit whole zoos."""
