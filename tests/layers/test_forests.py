"""Forests: the libraries' own answers from our tensors, thresholds, and files that lie."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from qemcli.layers.forests import Examples, Forest, Tree, below, strictly_below
from qemcli.layers.growing import Lightgbm, Xgboost

DEPTH, ROUNDS = 4, 7
XGBOOST = {"max_depth": DEPTH, "eta": 0.3, "nthread": 1, "seed": 1, "subsample": 0.8}
LIGHTGBM = {"max_depth": DEPTH, "num_threads": 1, "seed": 1, "min_data_in_leaf": 5, "num_leaves": 9}
BAGGED = LIGHTGBM | {"boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.8}


def examples(outputs: int) -> tuple[Examples, Examples]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 6)).astype(np.float32)
    x[:90, 2] = 0  # dead neurons: values that many networks share exactly
    x[90:120, 1] = x[0, 1]
    y = x[:, 0] + np.maximum(x[:, 2], 0)
    y = np.digitize(y, [-0.5, 0.7]).astype(np.float32) if outputs > 1 else y
    return Examples(x[:200], y[:200]), Examples(x[200:], y[200:])


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize(
    ("grower", "settings"), [(Xgboost, XGBOOST), (Lightgbm, LIGHTGBM), (Lightgbm, BAGGED)]
)
def test_tensors_answer_what_the_library_answers(grower, settings, outputs: int) -> None:
    train, val = examples(outputs)
    grown = grower(train, val, outputs, settings)
    losses = [grown.step(i) for i in range(ROUNDS)]
    forest = Forest(6, DEPTH, outputs)
    forest.plant(grown.trees(ROUNDS - 2), grown.bias)
    for x in (train.x, val.x):
        if grower is Xgboost:
            theirs = grown.booster.inplace_predict(x, iteration_range=(0, ROUNDS - 2))
        else:
            theirs = grown.booster.predict(x, num_iteration=ROUNDS - 2)
        found = forest(torch.from_numpy(x))
        ours = (found.softmax(1) if outputs > 1 else found).numpy()
        assert ours.std() > 0.05
        np.testing.assert_allclose(ours, theirs.reshape(ours.shape), atol=1e-6)
    if outputs == 1:
        loss = np.square(ours[:, 0] - val.y).mean()
        loss = np.sqrt(loss) if grower is Xgboost else loss
    else:
        loss = -np.log(ours[np.arange(len(val.y)), val.y.astype(int)]).mean()
    assert losses[ROUNDS - 3] == pytest.approx(loss, abs=1e-5)
    assert sum(p.numel() for p in forest.parameters()) == sum(
        len(t.feature) for t in grown.trees(5)
    )


@pytest.fixture(params=[False, True], ids=["as they are", "flushed"])
def denormals(request) -> Iterator[None]:
    """Training reads denormal numbers as zero: what is asked must not depend on it."""
    before = float(torch.tensor(1e-39, dtype=torch.float32) * 1) == 0
    torch.set_flush_denormal(request.param)
    yield
    torch.set_flush_denormal(before)


@pytest.mark.usefixtures("denormals")
def test_thresholds_say_the_same_of_every_float32() -> None:
    tiny = np.finfo(np.float32).tiny
    x = np.array([-1, -tiny, 0, tiny, 0.1, 0.3, 1], dtype=np.float32)
    halves = (x[1:].astype(np.float64) + x[:-1]) / 2
    thresholds = np.concatenate([x, halves, np.nextafter(x.astype(np.float64), -2)])
    for threshold, kept in zip(thresholds, below(thresholds), strict=True):
        assert kept == 0 or abs(kept) >= tiny  # no denormal: it would be read as zero
        assert np.array_equal(x <= threshold, x <= kept), threshold
    for threshold, kept in zip(x, strictly_below(x), strict=True):
        assert kept == 0 or abs(kept) >= tiny
        assert np.array_equal(x < threshold, x <= kept), threshold


def stump() -> Forest:
    """x[1] <= 0.5 ? 2 : 3, plus 10."""
    forest = Forest(2, 1, 1)
    leaf = np.array([0, 1, 2])
    forest.plant([Tree(np.array([1, 0, 0]), np.array([0.5, 2, 3]), leaf * 0 + [1, 1, 2],
                       np.array([2, 1, 2]))], 10.0)  # fmt: skip
    return forest


def test_forest_by_hand_and_through_its_state() -> None:
    x = torch.tensor([[9.0, 0.5], [9.0, 0.6]])
    assert stump()(x).tolist() == [[12], [13]]
    empty = Forest(2, 1, 1)
    assert empty(x).tolist() == [[0], [0]]
    empty.load_state_dict(stump().state_dict())
    assert empty(x).tolist() == [[12], [13]]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("feature", torch.tensor([2, 0, 0]), "'feature' points outside 0 to 1"),
        ("left", torch.tensor([-1, 1, 2]), "'left' points outside"),
        ("right", torch.tensor([7, 1, 2]), "'right' points outside"),
        ("root", torch.tensor([3]), "'root' points outside"),
        ("left", torch.tensor([1.5, 1, 2]), "not of whole numbers"),
        ("number", torch.zeros(2), "a forest of nodes"),
        ("root", torch.zeros(1, 1), "a forest of nodes"),
    ],
)
def test_file_that_points_elsewhere_is_refused(name: str, value: torch.Tensor, said: str) -> None:
    state = {**stump().state_dict(), name: value}
    with pytest.raises(RuntimeError, match=said):
        Forest(2, 1, 1).load_state_dict(state)


def test_circles_end() -> None:
    state = {
        **stump().state_dict(),
        "left": torch.tensor([0, 1, 2]),
        "right": torch.tensor([0, 1, 2]),
    }
    forest = Forest(2, 1, 1)
    forest.load_state_dict(state)
    assert forest(torch.zeros(1, 2)).shape == (1, 1)
