"""The table of .github/TRANSFORMERS.md, made anew: `pytest -m slow -s tests/test_families_table.py`
writes it on stdout and fails where a bound does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers_kit as kit

from qemcli import groups
from qemcli.controls import controls
from qemcli.directories import Directory, augment
from qemcli.library import Library
from qemcli.proof import Probe

DOCUMENT = Path(__file__).parents[1] / ".github" / "TRANSFORMERS.md"
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4}
SEEN = 1e-2
WIDE = (0.1, 10.0)
HEAD = ["| family | what | float64 | float32 | |", "|---|---|---|---|---|"]


def errors(folder: Path, family: str, dtype: torch.dtype) -> dict[str, float]:
    """Group, or control, -> the largest change of a logit over the largest logit; groups are
    written to disk and loaded again by from_pretrained."""
    source = Directory.open(kit.saved(folder / "source", family, dtype))
    generator = torch.Generator().manual_seed(0)
    probe = Probe.of(source, generator, dtype)
    found = {}
    for group in [*groups.applicable(source.space), groups.ALL]:
        augment(source, group, WIDE, 0, folder / group)
        found[group] = probe.error_of(folder / group)
    for name, control in controls(source.space).items():
        found[name] = float(probe.error(control(source.space, source.exact(), generator)))
    return found


def lines(folder: Path, family: str) -> tuple[list[str], list[str]]:
    """(rows of the table, what breaks a bound) of one family."""
    by = {dtype: errors(folder / str(dtype), family, dtype) for dtype in BOUNDS}
    space = Directory.open(folder / str(torch.float64) / "source").space
    rows, broken = [], []
    for name in by[torch.float64]:
        must = name in controls(space)
        right = all((by[t][name] > SEEN) if must else (by[t][name] < BOUNDS[t]) for t in BOUNDS)
        numbers = " | ".join(f"{by[t][name]:.1e}" for t in BOUNDS)
        said = "control: seen" if must else "holds"
        rows.append(f"| {family} | {name} | {numbers} | {said if right else 'WRONG'} |")
        broken += [] if right else [rows[-1]]
    assert len(rows) > len(controls(space))
    return rows, broken


@pytest.mark.slow
def test_every_family_keeps_its_function(tmp_path: Path) -> None:
    Library.of(kit.saved(tmp_path / "first", "gpt2"))
    found = [lines(tmp_path / family, family) for family in kit.FAMILIES]
    table = [*HEAD, *(row for rows, _ in found for row in rows)]
    sys.stdout.write("\n" + "\n".join(table) + "\n")
    assert not [row for _, broken in found for row in broken]


def test_the_document_has_every_family_and_no_wrong_row() -> None:
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    assert {row.split(" | ")[0].strip("| ") for row in rows} >= set(kit.FAMILIES)
    assert not [row for row in rows if "WRONG" in row]
