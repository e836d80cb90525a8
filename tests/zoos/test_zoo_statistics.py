"""Statistics of a batch against NumPy's, tensor by tensor."""

import hashlib

import numpy as np
import pytest
import torch

from qemcli import spaces
from qemcli.zoos.statistics import describe

SPACE = spaces.cnn([1, 3, 4], 5)
ROWS = np.random.default_rng(0).standard_normal((9, SPACE.size)).astype(np.float32)


def parts(rows):
    at = 0
    for tensor in SPACE.tensors:
        yield tensor.name, rows[:, at : at + tensor.size].astype(np.float64)
        at += tensor.size


def test_statistics_are_numpys():
    found = describe(SPACE, ROWS)
    for name, part in parts(ROWS):
        np.testing.assert_allclose(found[f"stat.{name}.mean"], part.mean(1), atol=1e-6)
        np.testing.assert_allclose(found[f"stat.{name}.var"], part.var(1), rtol=1e-5)
        for q in (0, 25, 50, 75, 100):
            np.testing.assert_allclose(
                found[f"stat.{name}.q{q}"], np.percentile(part, q, axis=1), atol=1e-6
            )
    assert found["finite"].all()
    assert found["sha256"][2] == hashlib.sha256(ROWS[2].tobytes()).hexdigest()


def test_a_row_does_not_change_with_its_neighbours():
    whole, alone = describe(SPACE, ROWS), describe(SPACE, ROWS[4:5])
    for name, values in alone.items():
        assert values[0] == whole[name][4]  # to the last bit: chunks and workers do not show


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_left_out_and_flagged(bad):
    rows = ROWS.copy()
    rows[3, [0, 5]] = bad
    found = describe(SPACE, rows)
    assert found["finite"].tolist() == [i != 3 for i in range(9)]
    name, part = next(parts(rows))
    kept = part[3][np.isfinite(part[3])]
    assert found[f"stat.{name}.mean"][3] == pytest.approx(kept.mean(), rel=1e-5)
    assert found[f"stat.{name}.q100"][3] == pytest.approx(kept.max(), rel=1e-6)
    rows[5] = bad
    assert np.isnan(describe(SPACE, rows)[f"stat.{name}.mean"][5])
    np.testing.assert_allclose(found[f"stat.{name}.var"][0], part[0].var(), rtol=1e-5)


def test_large_values_overflow_without_a_warning():
    found = describe(SPACE, np.full((2, SPACE.size), 3e38, np.float32))
    assert found["finite"].all()
    assert (found["stat.fc.bias.q50"] > 2.9e38).all()


def test_ties_count_hidden_biases_that_are_equal():
    rows = ROWS.copy()
    w = SPACE.unflatten(torch.from_numpy(rows))
    w["conv1.bias"][0, 1] = w["conv1.bias"][0, 0]
    w["conv2.bias"][1] = 0.0
    w["fc.bias"][2] = 0.0  # an output: its order is no matter of taste
    assert describe(SPACE, rows)["ties"].tolist() == [1, 3, 0, 0, 0, 0, 0, 0, 0]
