"""Tables as text: cells that are ready, the best of them marked, as Markdown or LaTeX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """Rows of texts under columns; `best` are the (row, column) numbers of cells to be marked."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()
    title: str = ""

    def markdown(self) -> str:
        """GitHub's Markdown; the best in bold."""

        def cell(i: int, j: int) -> str:
            text = self.rows[i][j].replace("|", r"\|")
            return f"**{text}**" if (i, j) in self.best else text

        lines = [f"**{self.title}**", ""] if self.title else []
        lines += [_line(name.replace("|", r"\|") for name in self.columns)]
        lines += ["|" + "---|" * len(self.columns)]
        lines += [_line(cell(i, j) for j in range(len(row))) for i, row in enumerate(self.rows)]
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """A LaTeX table with the rules of booktabs; the best in bold, everything escaped."""
        import pandas

        frame = pandas.DataFrame([list(row) for row in self.rows], columns=range(len(self.columns)))
        marks = [
            ["textbf:--rwrap;" if (i, j) in self.best else "" for j in range(len(self.columns))]
            for i in range(len(self.rows))
        ]
        style = frame.style.format(escape="latex").hide(axis="index")
        style = style.relabel_index([_escaped(name) for name in self.columns], axis=1)
        style = style.apply(lambda _: pandas.DataFrame(marks), axis=None)
        sides = "".join("l" if j == 0 else "r" for j in range(len(self.columns)))
        given = {"caption": _escaped(self.title), "position_float": "centering"}
        return style.to_latex(hrules=True, column_format=sides, **(given if self.title else {}))


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _escaped(text: str) -> str:
    marks = {"\\": r"\textbackslash ", "~": r"\textasciitilde ", "^": r"\textasciicircum "}
    return "".join(marks.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def cell(value: Any) -> str:
    """One value with three digits behind the point, or two of a number far from 1; – for what is
    not known."""
    if isinstance(value, list):
        return ", ".join(f"{v:.2f}" for v in value)
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.3f}" if 1e-3 <= abs(value) < 1e3 or value == 0 else f"{value:.1e}"
    unknown = value is None or isinstance(value, float)  # no number: some run was constant
    return NOTHING if unknown else f"{value:,}" if isinstance(value, int) else str(value)


def table(
    rows: Sequence[dict[str, Any]],
    columns: Sequence[str],
    highest: Sequence[str] = (),
    lowest: Sequence[str] = (),
    title: str = "",
) -> Table:
    """The table of these columns, as far as some row has them.

    The best of the columns that are `highest` or `lowest` when best are marked. A value may be
    (number, text): the number is compared and the text is shown.
    """
    shown = [name for name in columns if any(name in row for row in rows)]
    pairs = [[_pair(row.get(name)) for name in shown] for row in rows]
    best = set()
    for j, name in enumerate(shown):
        known = {i: row[j][0] for i, row in enumerate(pairs) if _finite(row[j][0])}
        if known and name in (*highest, *lowest):
            top = (max if name in highest else min)(known.values())
            best |= {(i, j) for i, value in known.items() if value == top}
    texts = tuple(tuple(text for _, text in row) for row in pairs)
    return Table(tuple(shown), texts, frozenset(best), title)


def _pair(value: Any) -> tuple[Any, str]:
    return value if isinstance(value, tuple) else (value, cell(value))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
