"""Classes: what a task without order changes in training, scoring and answering."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from torch import Tensor

from qemcli import registry
from qemcli.errors import InputError
from qemcli.predictors import Design, Predictor
from qemcli.spaces import WeightSpace, siren
from qemcli.tasks import classification as task
from qemcli.zoos.store import Store

SPACE = siren([2, 5, 4, 1], image=(1, 6, 6))
NAMES = ["dark", "grey", "light"]


def constants(count: int, seed: int = 0, space: WeightSpace = SPACE) -> tuple[Tensor, np.ndarray]:
    """(flat, label): SIRENs whose pictures are all but plain, and how light they are."""
    rng = torch.Generator().manual_seed(seed)
    flat = 0.05 * torch.randn(count, space.size, generator=rng)
    label = np.arange(count) % 3
    flat[:, -1] += torch.from_numpy(label - 1.0)
    return flat, label


def write(
    folder: Path,
    flat: Tensor,
    label: list | np.ndarray | None,
    classes: list[str] | None = None,
    space: WeightSpace = SPACE,
) -> Path:
    sides = np.array(["train", "train", "train", "val", "test"])
    rows = [
        {"checkpoint": f"net-{i:03d}", "split": str(sides[i // 3 % 5])} for i in range(len(flat))
    ]
    for row, value in zip(rows, label if label is not None else [], strict=False):
        row["label"] = value
    store = Store(folder)
    store.write(0, space, flat.numpy(), rows)
    store.finish(1, {"name": folder.name, **({"classes": classes} if classes else {})})
    return folder


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return write(tmp_path / "zoo", *constants(120), NAMES)


def recipe(folder: Path, architecture: str = "flat_mlp", config: str = "{ head = 16 }") -> Path:
    path = folder / "train.toml"
    path.write_text(
        f'task = "classification"\narchitecture = "{architecture}"\nconfig = {config}\n'
        "[schedule]\nepochs = 8\nbatch_size = 8\nlr = 1e-2\n"
    )
    return path


def test_every_task_answers_the_same_questions() -> None:
    for name in registry.names("tasks"):
        module = registry.load("tasks", name)
        for wanted in ("TARGET", "METRIC", "classes", "outputs", "loss", "answer", "score"):
            assert hasattr(module, wanted), (name, wanted)


def test_labels_that_are_no_class_numbers_are_refused() -> None:
    for wrong in ([0, -1], [0.5, 1.0], ["cat", "dog"]):
        with pytest.raises(InputError, match="no class number"):
            task.target(pandas.DataFrame({"label": wrong}))
    with pytest.raises(InputError, match="123456"):
        task.classes(np.array([0.0, 123456.0]), [])
    assert np.isnan(task.target(pandas.DataFrame({"x": [1, 2]}))).all()


def test_classes_have_the_names_of_the_zoo_or_their_numbers() -> None:
    label = np.array([0.0, 2.0])
    assert task.classes(label, [{}]) == ("0", "1", "2")
    assert task.classes(label, [{"classes": ["a"]}, {"classes": NAMES}]) == tuple(NAMES)


def test_scores_of_a_table_done_by_hand() -> None:
    label = np.array([0.0, 0.0, 1.0, 1.0, 2.0, np.nan])
    found = np.eye(3)[[0, 1, 1, 1, 0, 2]]
    scores = task.score(found, label)
    assert scores["accuracy"] == pytest.approx(3 / 5)
    # F1 by class: 2 * 1 / (2 + 2), 2 * 2 / (3 + 2), 0
    assert scores["macro_f1"] == pytest.approx((0.5 + 0.8 + 0) / 3)
    assert task.score(np.eye(3)[[0]], np.array([np.nan])) == {}


def test_a_class_beyond_the_predictors_counts_as_wrong() -> None:
    scores = task.score(np.eye(2)[[0, 1]], np.array([0.0, 5.0]))
    assert scores["accuracy"] == 0.5


def test_trained_classifier_keeps_its_classes_and_is_scored(
    run: Callable, zoo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p"
    trained = run("train", recipe(tmp_path), "--zoo", zoo, "--out", out, "--json")
    assert trained.code == 0, trained.err
    (row,) = trained.json["rows"]
    assert row["accuracy"] > 0.9
    assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    assert Predictor.load(out).classes == tuple(NAMES)
    assert "| accuracy |" in (out / "README.md").read_text()
    scored = run("evaluate", out, zoo, "--json").json["rows"][0]
    assert scored["accuracy"] == row["accuracy"]
    refused = run("evaluate", out, zoo, "--thresholds", ".5")
    assert refused.code == 2
    assert "--thresholds" in refused.err


def test_balanced_designs_claim_half_turns_and_hold_it() -> None:
    from qemcli import verification
    from qemcli.verification import Check

    design = Design("statnn", "balanced", {"head": 8})
    torch.manual_seed(0)
    predictor = Predictor(
        "p", SPACE, design, "classification", design.build(SPACE, 3), classes=tuple(NAMES)
    )
    assert predictor.claims == {"permutation", "sign", "monomial", "phase"}
    flat, _ = constants(12)
    report = verification.verify(predictor, flat, None, Check(samples=3))
    assert report.code == 0, report.rows
    raw = Predictor("p", SPACE, Design("statnn"), "classification", Design("statnn").build(SPACE))
    assert verification.verify(raw, flat, "phase", Check(samples=3)).code == 1


def test_comparison_of_classifiers(run: Callable, zoo: Path, tmp_path: Path) -> None:
    plan = tmp_path / "compare.toml"
    designs = "".join(
        f'[[design]]\narchitecture = "{a}"\nconfig = {{ head = 16 }}\n'
        for a in ("flat_mlp", "statnn")
    )
    plan.write_text(
        'task = "classification"\nseeds = [0, 1]\nreference = "statnn none head=16"\n'
        f'group = "phase"\nranges = [[1, 10]]\n[schedule]\nepochs = 2\n{designs}'
    )
    call = ("compare", plan, "--zoo", zoo, "--out", tmp_path / "c", "--workers", 1, "--json")
    rows = run(*call).json["rows"]
    assert {"accuracy", "sd", "accuracy 1:10", "macro_f1"} <= set(rows[0])
    assert {"difference", "low", "high"} <= set(rows[0])
    assert (tmp_path / "c" / "tradeoff.png").is_file()
