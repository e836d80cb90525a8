"""Tables of labels: what trackers export, joined by paths, run ids and steps; nothing is lost
silently."""

from __future__ import annotations

import json

import pandas
import pytest
import torch
from zoo_files import network

from qemcli.errors import UsageError
from qemcli.zoos import tables
from qemcli.zoos.exports import flat, renamed
from qemcli.zoos.zoo import Zoo

RUNS = ["2x8k1abc", "9qz77def", "mm0000ff"]
NAMES = [f"wandb/run-20250102_030405-{run}/files/model.pt" for run in RUNS]


@pytest.fixture
def sweep(tmp_path):
    root = tmp_path / "sweep"
    for i, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True)
        torch.save(network(i).state_dict(), root / name)
    return root


def joined(folder, column):
    return Zoo.open(folder).index.set_index("checkpoint")[column].to_dict()


def test_wandb_page_export_is_joined_by_run_id(sweep, tmp_path, run):
    pandas.DataFrame(
        {
            "Name": ["happy-1", "sad-2", "gone-3"], "State": "finished", "ID": [*RUNS[:2], "zzz"],
            "lr": [0.1, 0.2, 0.3], "activation": "relu", "test_acc": [0.5, 0.6, 0.7],
        }
    ).to_csv(tmp_path / "export.csv", index=False)  # fmt: skip
    found = run("index", sweep, "--labels", "export.csv", "--out", "out", "--json")
    report = found.json["labels"]
    assert (found.code, report["by"], report["joined"]) == (0, "ID", 2)
    assert report["checkpoints_without_label"] == [NAMES[2]]
    assert report["rows_without_checkpoint"] == ["zzz"]
    assert "1 rows without a checkpoint (zzz)" in found.err
    assert joined("out", "test_accuracy")[NAMES[1]] == 0.6
    assert joined("out", "config.lr")[NAMES[0]] == 0.1
    assert joined("out", "run.Name")[NAMES[0]] == "happy-1"
    assert joined("out", "activation")[NAMES[0]] == "relu"


def test_wandb_documentation_frame_holds_dicts(sweep, tmp_path, run):
    rows = [
        {"summary": {"test/acc": 0.1 * i, "_step": 9, "f1": 0.5}, "config": {"lr": 0.1, "d": [1]},
         "name": run_id}
        for i, run_id in enumerate(RUNS)
    ]  # fmt: skip
    pandas.DataFrame(rows).to_csv(tmp_path / "project.csv", index=False)  # dicts as Python's text
    (tmp_path / "project.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("project.csv", "project.jsonl"):
        report = run("index", sweep, "--labels", name, "--out", "out", "--json").json["labels"]
        assert (report["by"], report["joined"]) == ("name", 3)
        assert joined("out", "test_accuracy")[NAMES[2]] == pytest.approx(0.2)
        assert set(joined("out", "metrics.f1").values()) == {0.5}
        assert set(joined("out", "config.d").values()) == {"[1]"}


def test_mlflow_runs_are_joined_by_run_id(tmp_path, run):
    ids = ["0123456789abcdef0123456789abcdef", "fedcba9876543210fedcba9876543210"]
    for i, run_id in enumerate(ids):
        file = tmp_path / "mlruns" / "0" / run_id / "artifacts" / "model.pt"
        file.parent.mkdir(parents=True)
        torch.save(network(i).state_dict(), file)
    table = pandas.DataFrame(
        {
            "run_id": ids, "experiment_id": "0", "status": "FINISHED",
            "metrics.test_accuracy": [0.3, 0.4], "metrics.loss_aux": 1.0, "params.lr": ["0.1", "x"],
            "tags.mlflow.runName": ["a", "b"], "artifact_uri": "file:///x",
        }
    )  # fmt: skip
    table.to_parquet(tmp_path / "runs.parquet")
    found = run("index", "mlruns", "--labels", "runs.parquet", "--out", "out", "--json").json
    assert (found["labels"]["joined"], found["labelled"]) == (2, 2)
    accuracy = joined("out", "test_accuracy")
    assert accuracy[f"0/{ids[1]}/artifacts/model.pt"] == 0.4
    assert set(joined("out", "run.status").values()) == {"FINISHED"}


def test_history_is_joined_by_run_and_step(tmp_path, run):
    root = tmp_path / "z"
    for name in ("a/step-10.pt", "a/step-20.pt", "b/checkpoint_000010/model.pt", "b/last.pt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(network(1).state_dict(), root / name)
    table = pandas.DataFrame({"run": list("aab"), "step": [10, 20, 10], "val_acc": [0.1, 0.2, 0.3]})
    table.to_csv(tmp_path / "t.csv", index=False)
    run("index", root, "--labels", "t.csv", "--out", "out")
    found = joined("out", "val_accuracy")
    assert [found[f"a/step-{n}.pt"] for n in (10, 20)] == [0.1, 0.2]
    assert found["b/checkpoint_000010/model.pt"] == 0.3
    assert pandas.isna(found["b/last.pt"])
    table.drop(columns="step").to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(UsageError, match="the run 'a' stands twice"):
        tables.read(root, ["a/step-10.pt"], tmp_path / "t.csv")


@pytest.mark.parametrize("prefix", ["", "./", "sweep/", "/home/somebody/sweep/"])
def test_paths_are_met_below_the_zoos_own_name(sweep, tmp_path, prefix):
    table = pandas.DataFrame({"path": [prefix + name for name in NAMES], "test_accuracy": 0.5})
    table.to_csv(tmp_path / "t.csv", index=False)
    found = tables.read(sweep, NAMES, tmp_path / "t.csv")
    assert found.report["joined"] == 3
    table["path"] = ["other/" + name for name in NAMES]  # the control: another sweep's
    table.to_csv(tmp_path / "t.csv", index=False)
    assert tables.read(sweep, NAMES, tmp_path / "t.csv").report["joined"] == 0


def test_table_goes_with_a_published_layout_too(tmp_path, run):
    import test_small_cnn

    test_small_cnn.write(tmp_path / "mnist", 2)
    table = pandas.DataFrame({"run": ["900", "901"], "colour": ["red", "blue"]})
    table.to_csv(tmp_path / "t.csv", index=False)
    found = run("index", "mnist", "--labels", "t.csv", "--out", "out", "--json").json
    assert (found["labels"]["joined"], found["checkpoints"]) == (18, 18)
    assert joined("out", "config.colour")["901/step-00086"] == "blue"


def test_missing_or_foreign_table_is_a_usage_error(sweep, tmp_path, run):
    assert run("index", sweep, "--labels", "nowhere.csv").code == 2
    (tmp_path / "t.csv").write_text("width,depth\n1,2\n")
    assert run("index", sweep, "--labels", "t.csv").code == 2
    (tmp_path / "t.parquet").write_text("no parquet")
    assert run("index", sweep, "--labels", "t.parquet").code == 2


def test_names_of_columns():
    given = ["test_acc", "test/accuracy", "params.lr", "metrics.val.loss", "dropout", "seed",
             "test_top1_accuracy", "State", "config.activation", "summary/x"]  # fmt: skip
    assert renamed(given) == [
        "test_accuracy", "config.test/accuracy", "config.lr", "val_loss", "config.dropout", "seed",
        "config.test_top1_accuracy", "run.State", "activation", "metrics.x",
    ]  # fmt: skip
    assert flat(pandas.DataFrame({"config": ["{'a': __import__('os')}"]})).columns.tolist() == [
        "config"
    ]


def test_labels_go_with_the_table_that_they_came_from(sweep, tmp_path, run):
    table = pandas.DataFrame({"path": NAMES, "test_accuracy": [0.1, 0.2, 0.3]})
    own = sweep / "labels.csv"
    table.to_csv(own, index=False)
    assert run("index", sweep, "--out", "out", "--json").json["labelled"] == 3
    again = run("index", sweep, "--out", "out", "--update", "--json").json
    assert (again["labelled"], joined("out", "test_accuracy")[NAMES[2]]) == (3, 0.3)
    table[:2].to_csv(own, index=False)  # a row less
    run("index", sweep, "--out", "out", "--update")
    assert joined("out", "test_accuracy")[NAMES[0]] == 0.1
    assert pandas.isna(joined("out", "test_accuracy")[NAMES[2]])
    own.unlink()
    gone = run("index", sweep, "--out", "out", "--update", "--json").json
    assert (gone["labelled"], gone["checkpoints"]) == (0, 3)
    assert "test_accuracy" not in Zoo.open("out").index
    run("index", sweep, "--out", "fresh")
    pandas.testing.assert_frame_equal(Zoo.open("out").index, Zoo.open("fresh").index)


def test_update_takes_the_table_that_was_given_before(sweep, tmp_path, run):
    table = pandas.DataFrame({"path": NAMES, "test_accuracy": [0.1, 0.2, 0.3]})
    table.to_csv(tmp_path / "t.csv", index=False)
    run("index", sweep, "--labels", "t.csv", "--out", "out")
    (sweep / NAMES[1]).unlink()
    torch.save(network(8).state_dict(), sweep / NAMES[1])  # read again, and labelled again
    run("index", sweep, "--out", "out", "--update")
    assert joined("out", "test_accuracy")[NAMES[1]] == 0.2
    (tmp_path / "t.csv").unlink()
    run("index", sweep, "--out", "out", "--update")
    assert "test_accuracy" not in Zoo.open("out").index


def test_what_a_table_said_instead_of_the_files_goes_with_it(sweep, tmp_path, run):
    table = pandas.DataFrame({"path": NAMES, "activation": "tanh"})
    table.to_csv(sweep / "labels.csv", index=False)
    run("index", sweep, "--out", "out", "--activation", "relu")
    assert set(joined("out", "activation").values()) == {"tanh"}
    (sweep / "labels.csv").unlink()
    run("index", sweep, "--out", "out", "--activation", "relu", "--update")
    assert set(joined("out", "activation").values()) == {"relu"}
