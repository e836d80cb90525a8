"""Where what ships with the package lies: models/ and zoos/, in a wheel or in a checkout."""

from __future__ import annotations

from pathlib import Path


def shipped(kind: str) -> Path:
    """The folder of the shipped "models" or "zoos"; it need not exist."""
    package = Path(__file__).resolve().parent
    inside = package / "_shipped" / kind
    return inside if inside.is_dir() else package.parent / kind
