"""What people mistype or mistake, and the line that helps them on."""

from __future__ import annotations

import pytest
import torch
from hub_kit import GPT2, draw, gpt2, write
from safetensors.torch import save
from zoo_files import network, write_folder

from qemcli.spaces import siren


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        (("index", "ftp://example.org/x.zip"), "no address that qem reads", "https://"),
        (("index", "https://example.org/x.zip"), "fetched first", "qem download https://"),
        (("download", "ftp://example.org/x.zip"), "no address that qem reads", "https://"),
        (("download", "small-cnn-mnis"), "no published zoo", "small-cnn-mnist"),
        (("build", "cnn-digit"), "no zoo recipe 'cnn-digit'", "cnn-digits"),
        (("train", "cnn-smal"), "no training recipe 'cnn-smal'", "cnn-small"),
        (("augment", "z", "--group", "general-liner"), "no group is called", "general-linear"),
        (("index", "hf://a/b", "--headers", "--update"), "does not go with --update", "leave out"),
        (("index", "hf://a/b", "--headers", "--heads", "3"), "does not go with --heads", "leave"),
        (("inspect", "z"), "a directory, not a checkpoint", "it may be a zoo: qem index z"),
        (("inspect", "bare"), "a directory, not a checkpoint", "without the config.json"),
    ],
)
def test_mistake_is_one_line_and_what_to_do(tmp_path, run, words, said, hint):
    write_folder(tmp_path / "z", 2)
    write(tmp_path / "bare", draw({"a.weight": (2, 3)}))
    found = run(*words)
    assert (found.code, found.out) == (2, "")
    first, second = found.err.splitlines()
    assert first.startswith("error: ")
    assert said in first
    assert hint in second


@pytest.mark.parametrize("column", ["accuracy", "acc", "test/acc", "eval_acc", "valid.top1_acc"])
def test_usual_names_of_a_score_are_labels(tmp_path, run, column):
    for i in range(2):
        torch.save(network(i).state_dict(), tmp_path / f"{i}.pt")
    (tmp_path / "labels.csv").write_text(f"path,{column},lr\n0.pt,0.5,0.1\n1.pt,0.6,0.1\n")
    found = run("index", tmp_path, "--out", tmp_path / "out", "--json")
    wanted = "val_accuracy" if column[0] in "ev" else "test_accuracy"
    assert found.json["labels"]["labels"] == [wanted]
    assert found.json["labelled"] == (2 if wanted == "test_accuracy" else 0)


def test_accuracy_beside_test_accuracy_is_none_of_it(tmp_path, run):
    torch.save(network(0).state_dict(), tmp_path / "0.pt")
    (tmp_path / "labels.csv").write_text("path,accuracy,test_acc\n0.pt,0.5,0.25\n")
    run("index", tmp_path, "--out", tmp_path / "out")
    import pandas

    row = pandas.read_parquet(tmp_path / "out" / "index.parquet").iloc[0]
    assert (row["test_accuracy"], row["config.accuracy"]) == (0.25, 0.5)


def test_table_without_a_label_says_which_columns_it_has(tmp_path, run):
    torch.save(network(0).state_dict(), tmp_path / "0.pt")
    (tmp_path / "labels.csv").write_text("path,points\n0.pt,5\n")
    found = run("index", tmp_path, "--out", tmp_path / "out")
    assert (
        "no column is called test_accuracy, val_accuracy or label (they are: points)" in found.err
    )


def test_zoo_too_small_to_train_on_leaves_no_folder(tmp_path, run):
    for i in range(3):
        torch.save(network(i).state_dict(), tmp_path / f"{i}.pt")
    (tmp_path / "labels.csv").write_text("path,accuracy\n0.pt,0.5\n1.pt,0.6\n2.pt,0.7\n")
    found = run("train", "--zoo", tmp_path, "--activation", "relu", "--out", "pred")
    assert found.code == 3
    assert found.err.splitlines()[-2].startswith("error: ")
    assert not (tmp_path / "pred").exists()


def test_folder_of_two_model_directories_is_copied_without_more_words(tmp_path, run):
    write(tmp_path / "two" / "a", gpt2(), GPT2)
    write(tmp_path / "two" / "b", gpt2(seed=1), GPT2)
    found = run("augment", "two", "--out", "copies", "--json")
    assert (found.code, found.json["rows"][0]["networks"]) == (0, 2), found.err


def test_checkpoint_of_the_hub_is_rendered(tmp_path, run, hub):
    space = siren([2, 6, 4, 1], image=(1, 4, 4))
    rng = torch.Generator().manual_seed(0)
    weights = {t.name: torch.randn(t.shape, generator=rng) for t in space.tensors}
    hub.add("owner/sirens", {"a.safetensors": save(weights, {"qem.space": space.to_json()})})
    for name in ("hf://owner/sirens", "hf://owner/sirens/a.safetensors"):
        found = run("render", name, "--out", "sheet.png", "--json")
        assert (found.code, found.json["n"]) == (0, 1), found.err
