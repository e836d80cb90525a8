"""The table of bad input names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = ROOT / ".github" / "BAD_INPUT.md"
ROWS = [line for line in TABLE.read_text().splitlines() if re.match(r"\| \d", line)]


def functions(file: Path) -> set[str]:
    return {n.name for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=[str(i) for i in range(len(ROWS))])
def test_row_has_an_answer_a_code_and_a_test_that_exists(row):
    number, event, answer, code, test = re.split(r"(?<!\\)\|", row)[1:6]
    assert number.strip()
    assert event.strip()
    assert answer.strip()
    assert re.fullmatch(r" (-|\d+(, \d+)*) ", code)
    file, name = test.strip().split("::")
    assert name in functions(ROOT / file)


def test_table_has_all_rows_of_reading_and_writing():
    found = {int(n) for row in ROWS for n in re.findall(r"\d+", row.split("|")[1])}
    wanted = {*range(1, 27), 29, 30, *range(31, 42), 45} - {13, 20}  # these are about symmetry
    assert wanted <= found
