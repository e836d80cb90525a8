"""The filter language: what it finds, and that it runs no code."""

import numpy as np
import pandas
import pytest

from qemcli.errors import UsageError
from qemcli.zoos.where import rows

TABLE = pandas.DataFrame(
    {
        "config.lr": [0.1, 0.01, np.nan, 0.5],
        "step": [1, 2, 3, 4],
        "final": [True, False, True, False],
        "activation": ["relu", "tanh", None, "relu"],
        "config.a.b": [1, 2, 3, 4],
    }
)
FOUND = {
    "lr < 0.2": [0, 1],
    "config.lr < 0.2": [0, 1],
    "lr < 0.2 and activation == 'relu'": [0],
    "lr < 0.02 or step == 4": [1, 3],
    "final": [0, 2],
    "not final": [1, 3],
    "1 < step <= 3": [1, 2],
    "step in (1, 4)": [0, 3],
    "activation not in ['relu']": [1, 2],
    "activation != 'relu'": [1],
    "step % 2 == 0 and -step < -2": [3],
    "config.a.b * 2 + 1 > 6": [2, 3],
    "lr == lr": [0, 1, 3],
}


@pytest.mark.parametrize("expression", FOUND)
def test_filter_finds_its_rows(expression):
    assert np.flatnonzero(rows(TABLE, expression)).tolist() == FOUND[expression]


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')", "step.__class__ == 1", "@step > 1", "step > 1; final",
        "[x for x in step]", "(lambda: 1)() == 1", "step.map(print)", "f'{step}' == '1'",
        "step[0] == 1", "lr < 'a'", "lr", "step + 1", "'a' * 10**9 == 1", "step is 1", "", "1 <",
        "step == " + "9" * 3000, "(" * 500 + "step" + ")" * 500 + " > 1", "step in 3",
        "step == (1, 2)", "lr ** 9 ** 9 > 1",
    ],
)  # fmt: skip
def test_anything_but_comparisons_of_columns_is_refused(expression):
    with pytest.raises(UsageError, match="--where"):
        rows(TABLE, expression)


def test_unknown_column_is_met_with_the_nearest():
    with pytest.raises(UsageError, match="no column is called 'stpe'") as caught:
        rows(TABLE, "stpe > 1")
    assert caught.value.hint == "Did you mean 'step'?"
