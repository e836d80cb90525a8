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
from qemcli.designs import Design
from qemcli.errors import InputError
from qemcli.predictors import Predictor
from qemcli.spaces import Chain, mlp, siren
from qemcli.tasks import classification as task
from qemcli.zoos.store import Store

SPACE = siren([2, 5, 4, 1], image=(1, 6, 6))
NAMES = ["dark", "grey", "light"]


def constants(count: int, seed: int = 0, space: Chain = SPACE) -> tuple[Tensor, np.ndarray]:
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
    space: Chain = SPACE,
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
        'task = "classification"\nseeds = [0]\nreference = "statnn none head=16"\n'
        f'group = "phase"\nranges = [[1, 10]]\n[schedule]\nepochs = 2\n{designs}'
    )
    call = ("compare", plan, "--zoo", zoo, "--out", tmp_path / "c", "--workers", 1, "--json")
    rows = run(*call).json["rows"]
    assert {"accuracy", "sd", "accuracy 1:10", "macro_f1"} <= set(rows[0])
    assert {"difference", "low", "high"} <= set(rows[0])
    assert (tmp_path / "c" / "tradeoff.png").is_file()


@pytest.fixture
def trained(run: Callable, zoo: Path, tmp_path: Path) -> Path:
    out = tmp_path / "p"
    call = ("train", recipe(tmp_path, "probegen", PROBES), "--zoo", zoo, "--out", out, "-q")
    assert run(*call).code == 0
    return out


PROBES = "{ probes = 4, head = [16] }"


def test_classify_answers_every_network(run: Callable, zoo: Path, trained: Path) -> None:
    ran = run("classify", zoo, "-p", trained, "--json")
    assert ran.code == 0, ran.err
    found = ran.json
    assert found["n"] == found["labelled"] == 120
    assert found["accuracy"] > 0.95
    assert found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"]
    row = found["rows"][4]
    assert row["checkpoint"] == "net-004"
    assert row["class"] == row["label"] == "grey"
    assert 0.3 < row["probability"] <= 1
    limited = run("classify", zoo, "-p", trained, "--limit", 7, "--where", "label == 2", "--json")
    assert {row["label"] for row in limited.json["rows"]} == {"light"}
    assert limited.json["n"] == 7


def test_classify_without_labels(run: Callable, trained: Path, tmp_path: Path) -> None:
    flat, _ = constants(6)
    plain = write(tmp_path / "plain", flat, None)
    ran = run("classify", plain, "-p", trained, "--out", tmp_path / "rows.csv")
    assert ran.code == 0
    assert "accuracy" not in ran.out
    assert "label" not in ran.out
    table = pandas.read_csv(tmp_path / "rows.csv")
    assert table["class"].tolist() == ["dark", "grey", "light"] * 2


def test_another_convention_is_read_for_what_it_shows(
    run: Callable, zoo: Path, trained: Path, tmp_path: Path
) -> None:
    from qemcli.conventions import express

    other = siren([2, 5, 4, 1], 20.0, "dws", (1, 6, 6))
    flat, label = constants(120)
    moved = write(tmp_path / "dws", express(SPACE, other, flat), label, space=other)
    wanted = run("classify", zoo, "-p", trained, "--json").json["rows"]
    ran = run("classify", moved, "-p", trained, "--json")
    assert "expressed" in ran.err
    found = ran.json["rows"]
    assert [row["class"] for row in found] == [row["class"] for row in wanted]
    gaps = [abs(a["probability"] - b["probability"]) for a, b in zip(found, wanted, strict=True)]
    assert max(gaps) < 1e-4


def test_what_is_no_such_siren_is_counted(run: Callable, trained: Path, tmp_path: Path) -> None:
    flat, label = constants(9)
    unknown = write(tmp_path / "u", flat, label, space=SPACE.running(known=False))
    ran = run("classify", unknown, "-p", trained)
    assert ran.code == 3
    assert "not known: w0" in ran.err
    stated = ("--w0", 30, "--convention", "nfn", "--json")
    assert run("classify", unknown, "-p", trained, *stated).json["accuracy"] > 0.9
    wider = siren([2, 6, 4, 1], image=(1, 6, 6))
    other = write(tmp_path / "o", torch.zeros(3, wider.size), [0, 1, 2], space=wider)
    ran = run("classify", other, "-p", trained)
    assert ran.code == 3
    assert "not what 'p' reads" in ran.err
    relu = write(tmp_path / "r", flat, label, space=mlp([2, 5, 4, 1]))
    assert run("classify", relu, "-p", trained).code == 3
    flat[2, 3] = torch.nan
    broken = write(tmp_path / "b", flat, label)
    ran = run("classify", broken, "-p", trained, "--json")
    assert ran.code == 4
    assert ran.json["n"] == 8
    assert [item["checkpoint"] for item in ran.json["failed"]] == ["net-002"]


def test_a_predictor_of_another_task_is_refused(run: Callable, zoo: Path, trained: Path) -> None:
    ran = run("predict", zoo, "-p", trained)
    assert ran.code == 2
    assert "answers classification, not generalization" in ran.err
    assert run("classify", zoo, "-p", "cnn-relu").code == 2


def test_built_zoo_names_its_classes(run: Callable, tmp_path: Path) -> None:
    from qemcli.zoos.zoo import Zoo

    text = (
        'family = "siren"\nname = "tiny"\ntrain = 6\nval = 1\ntest = 1\nwidths = [4]\nsteps = 2\n'
    )
    (tmp_path / "recipe.toml").write_text(text)
    ran = run("build", tmp_path / "recipe.toml", "--out", tmp_path / "z", "--workers", 1, "-q")
    assert ran.code == 0, ran.err
    zoo = Zoo.open(tmp_path / "z")
    assert zoo.record["classes"] == [str(i) for i in range(10)]


def test_classify_with_nothing_else_reads_the_embedded_digits(run: Callable) -> None:
    ran = run("classify", "--json")
    assert ran.code == 0, ran.err
    assert "siren-heldout" in ran.err
    assert "siren-mnist" in ran.err
    assert ran.json["n"] == ran.json["labelled"] == 120
    assert ran.json["accuracy"] > 0.9


def test_a_zoo_with_other_labels_is_told_its_task(run, tmp_path) -> None:
    found = run("train", "--zoo", "siren-heldout", "-a", "statnn", "--out", tmp_path / "p")
    assert found.code == 3
    assert "no finite checkpoint has a 'test_accuracy'" in found.err
    assert "there is 'label' (classification)" in found.err
