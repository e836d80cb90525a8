"""Designs: what is trained, before it is. An architecture, its configuration, its quasi layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qemcli import registry
from qemcli.errors import UnsupportedError, UsageError
from qemcli.layers.metanetwork import Metanetwork, Mixed
from qemcli.settings import fields
from qemcli.spaces import Chain, Residual, Transformer, WeightSpace, chain_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import ModuleType

    from torch import Tensor

    from qemcli.points import Points

EDITING = ("edit", "pixels", "expand")  # settings of an editor, whatever its architecture
QUASI = ("none", "balanced", "exact", "paper", "released")
SPACES: dict[type[WeightSpace], str] = {
    Chain: "MLPs, CNNs and SIRENs",
    Residual: "networks with residual sums",
    Transformer: "transformers",
}


@dataclass(frozen=True)
class Design:
    """What is trained: an architecture, its configuration, and the mode of its quasi layer.

    `balanced` stands in front of any architecture; the other modes are layers inside it (quasi.py).
    Where `config` names an `edit`, it is the architecture's Editor that is trained, on `pixels`
    places a batch (layers/shown.py).
    """

    architecture: str
    quasi: str = "none"
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def balanced(self) -> bool:
        return self.quasi == "balanced"

    @property
    def edit(self) -> str | None:
        """What an editor is trained to do (qemcli.edits), None for everything else."""
        return self.config.get("edit")

    def build(self, space: WeightSpace, outputs: int = 1) -> Metanetwork:
        """A fresh module for this weight space; UsageError for what the architecture does not
        have."""
        module = self._module()
        self._require(module, (space,))
        if self.edit is None:
            return module.Model(space, self._configured(module.Config, {"outputs": outputs}))
        if not hasattr(module, "Editor"):
            raise UsageError(
                f"'{self.architecture}' has no editor: it answers about weights, not with weights",
                f"these have one: {', '.join(editors())}",
            )
        from qemcli.layers.shown import Shown

        branches = {"expand": self.config.get("expand", 1)}
        editor = module.Editor(space, self._configured(module.Config, branches))
        return Shown(chain_of(space, "an editor"), editor, self.config.get("pixels", 0))

    def build_mixed(self, spaces: Sequence[WeightSpace], outputs: int = 1) -> Metanetwork | Mixed:
        """A fresh module for networks of all these weight spaces; as `build` where it is one.

        Raises UnsupportedError where the architecture reads one weight space only.
        """
        if len(spaces) == 1:
            return self.build(spaces[0], outputs)
        module = self._module()
        if self.edit is not None or not hasattr(module, "Mixture"):
            raise UnsupportedError(
                f"'{self.architecture}' reads networks of one architecture, and these are "
                f"{len(spaces)}: {_shown(spaces)}",
                f"{', '.join(mixers())} read many: -a {mixers()[0]}; or pick one with --where, "
                "e.g. --where \"arch == '...'\"",
            )
        self._require(module, spaces)
        return module.Mixture(spaces, self._configured(module.Config, {"outputs": outputs}))

    def _require(self, module: ModuleType, spaces: Sequence[WeightSpace]) -> None:
        """UnsupportedError where the architecture does not read networks of one of these kinds,
        UsageError for settings of an editor where there is none."""
        for space in spaces:
            if not isinstance(space, kinds(module)):
                words = [what for kind, what in SPACES.items() if issubclass(kind, kinds(module))]
                others = [name for name in readers(space) if name != self.architecture]
                raise UnsupportedError(
                    f"'{self.architecture}' is for {' and '.join(words)}; these networks are "
                    f"{space.title}",
                    f"these architectures read them: {', '.join(others)}" if others else None,
                )
        given = [name for name in EDITING if self.config.get(name) is not None]
        if self.edit is None and given:
            raise UsageError(
                f"'{given[0]}' is a setting of editors, and this design answers about weights",
                f"leave it out; with an edit, these have an editor: {', '.join(editors())}",
            )
        if self.config.get("expand", 1) < 1:
            raise UsageError("an editor has at least one branch", "choose expand >= 1")

    def _module(self) -> ModuleType:
        if self.quasi not in QUASI:
            raise UsageError(
                f"no quasi mode is called '{self.quasi}'", registry.suggest(self.quasi, list(QUASI))
            )
        return registry.load("architectures", self.architecture)

    def _configured(self, config: type, given: dict[str, int]) -> Any:
        inside = self.quasi not in ("none", "balanced")
        if inside and "quasi" not in (f.name for f in dataclasses.fields(config)):
            raise UsageError(
                f"'{self.architecture}' has no equivariant layer to put '{self.quasi}' on",
                "use --quasi balanced: it stands in front of any architecture",
            )
        about = {k: v for k, v in self.config.items() if self.edit is None or k not in EDITING}
        chosen = {**about, **given, **({"quasi": self.quasi} if inside else {})}
        told = fields(config, chosen, f"'{self.architecture}'")
        return config(**{n: tuple(v) if isinstance(v, list) else v for n, v in told.items()})


def kinds(module: ModuleType) -> tuple[type[WeightSpace], ...]:
    """The kinds of weight spaces that an architecture reads: its READS, else chains."""
    return getattr(module, "READS", (Chain,))


def readers(space: WeightSpace) -> list[str]:
    """The architectures that read networks of this kind."""
    names = registry.names("architectures")
    return [n for n in names if isinstance(space, kinds(registry.load("architectures", n)))]


def editors() -> list[str]:
    """The architectures that edit."""
    names = registry.names("architectures")
    return [n for n in names if hasattr(registry.load("architectures", n), "Editor")]


def mixers() -> list[str]:
    """The architectures of which one predictor reads networks of many."""
    names = registry.names("architectures")
    return [n for n in names if hasattr(registry.load("architectures", n), "Mixture")]


def _shown(spaces: Sequence[WeightSpace], most: int = 3) -> str:
    """The first few, in words."""
    more = [f"and {len(spaces) - most} more"] if len(spaces) > most else []
    return "; ".join([*(space.title for space in spaces[:most]), *more])


def calibrate(model: Metanetwork | Mixed, points: Points) -> None:
    """Set the model's constants from the networks that it is trained on."""
    parts = [(space, space.unflatten(flat)) for space, flat, _ in points.parts()]
    if isinstance(model, Mixed):
        model.calibrate(parts)
    elif parts:
        model.calibrate(parts[0][1])


def prepared(design: Design, space: WeightSpace, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights as the metanetwork takes them: carried to their balanced representative, or as
    they are."""
    if not design.balanced:
        return dict(w)
    from qemcli.attention_balance import representative

    return representative(space, w)
