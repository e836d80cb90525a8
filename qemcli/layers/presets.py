"""Presets: the configurations that papers published, and ours, with their exact parameter
counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qemcli import registry
from qemcli.spaces import WeightSpace, cnn, siren, small_transformer

SPACES = {
    "cnn-zoo": lambda: cnn([1, 16, 16, 16], 10),
    "cnn-zoo-tanh": lambda: cnn([1, 16, 16, 16], 10, activation="tanh"),
    "siren-mnist": lambda: siren([2, 32, 32, 1], image=(1, 28, 28)),
    "siren-fashion": lambda: siren([2, 32, 32, 1], image=(1, 28, 28)),
    "siren-cifar": lambda: siren([2, 32, 32, 3], image=(3, 32, 32)),
    "transformer-mnist": lambda: small_transformer(32, 2, 64, 2, 10, (1, 4)),
    "transformer-ag-news": lambda: small_transformer(32, 2, 64, 2, 4),
}


@dataclass(frozen=True)
class Preset:
    """One configuration of an architecture.

    Attributes:
        config: the architecture's Config.
        published: the published code's parameter count on `space`, None where the preset is ours.
        source: where it comes from, in words.
        space: the weight space the count is for, a name of SPACES.
    """

    config: Any
    published: int | None
    source: str
    space: str = "cnn-zoo"

    def weight_space(self) -> WeightSpace:
        return SPACES[self.space]()


def table() -> list[dict[str, Any]]:
    """Every preset of every architecture, with its published and its own count (`qem models
    --presets`): of its Model in PRESETS, of its Editor in EDITORS.
    """
    rows = []
    for architecture in registry.names("architectures"):
        module = registry.load("architectures", architecture)
        for name, preset in getattr(module, "PRESETS", {}).items():
            rows.append(_row(architecture, module.Model, name, preset))
        for name, preset in getattr(module, "EDITORS", {}).items():
            rows.append(_row(architecture, module.Editor, name, preset))
    return rows


def _row(architecture: str, made: type, name: str, preset: Preset) -> dict[str, Any]:
    with torch.device("meta"):  # shapes are all that is counted
        model = made(preset.weight_space(), preset.config)
    return {
        "preset": name,
        "architecture": architecture,
        "space": preset.space,
        "quasi": getattr(preset.config, "quasi", "none"),
        "published": preset.published,
        "parameters": sum(p.numel() for p in model.parameters()),
        "source": preset.source,
    }
