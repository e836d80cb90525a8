"""Columns moved in blocks are the columns gathered one by one."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qemcli.zoos.columns import blocks, taken


@given(st.permutations(range(12)), st.integers(0, 5))
def test_any_order_is_gathered(order, rows):
    array = np.arange(12.0 * rows, dtype=np.float32).reshape(rows, 12)
    np.testing.assert_array_equal(taken(array, blocks(np.array(order))), array[:, order])


@given(st.sampled_from(["f2", "<f4", "f8"]), st.integers(1, 4), st.integers(1, 4))
def test_transposed_kernel_is_few_blocks(dtype, inputs, outputs):
    kernel = np.arange(9 * inputs * outputs).reshape(3, 3, inputs, outputs)
    order = np.concatenate([kernel.transpose(3, 2, 0, 1).ravel(), [kernel.size, kernel.size + 1]])
    found = blocks(order)
    assert len(found) <= 4
    array = np.random.default_rng(0).standard_normal((300, kernel.size + 2)).astype(dtype)
    np.testing.assert_array_equal(taken(array, found), array[:, order].astype(np.float32))
