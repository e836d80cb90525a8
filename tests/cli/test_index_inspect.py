"""qem inspect, index, zoos: answers, exit codes, and that no file can drive the terminal."""

import os

import pytest
import torch
from safetensors.torch import save_file
from zoo_files import network, write_broken, write_folder, write_own

KEYS = {
    "checkpoint", "space", "groups", "activation", "parameters", "finite", "coverage", "dtype",
    "skipped", "ties", "tensors", "sha256", "family", "widths",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "z")


def test_inspect_says_what_a_checkpoint_is(run, folder):
    result = run("inspect", str(folder / "run0" / "n0.safetensors"), "--json")
    found = result.json
    assert result.code == 0
    assert set(found) >= KEYS
    assert found["widths"] == [3, 5, 4]
    assert (found["activation"], found["parameters"], found["finite"]) == ("relu", 44, True)
    assert set(found["groups"]) == {"permutation", "scale", "monomial"}
    assert found["coverage"] == 1.0
    assert found["tensors"]["2.weight"]["axes"] == "y h1*"
    assert found["space"]["family"] == "mlp"
    assert found["rows"][0]["parameters"] == 44
    human = run("inspect", str(folder / "run0" / "n0.safetensors"))
    assert "y h1*" in human.out
    assert "\x1b" not in human.out


def test_inspect_claims_only_permutation_where_the_activation_is_unknown(run, tmp_path):
    file = tmp_path / "a.pt"
    torch.save(network(0).state_dict(), file)
    unknown = run("inspect", str(file), "--json").json
    assert (unknown["activation"], unknown["groups"]) == (None, ["permutation"])
    stated = run("inspect", str(file), "--json", "--activation", "tanh").json
    assert "sign" in stated["groups"]
    wrong = run("inspect", str(file), "--activation", "tnah")
    assert wrong.code == 2
    assert "Did you mean 'tanh'?" in wrong.err


def test_inspect_flags_nan_and_counts_ties(run, tmp_path):
    state = network(0).state_dict()
    state["0.bias"][:] = 0
    state["0.weight"][0, 0] = float("nan")
    save_file({**state, "steps": torch.tensor(3)}, tmp_path / "a.safetensors")
    result = run("inspect", str(tmp_path / "a.safetensors"), "--json")
    found = result.json
    assert (found["finite"], found["ties"]) == (False, 4)
    assert found["skipped"][0]["tensor"] == "steps"
    assert "NaN" not in result.out


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("cut.safetensors", 3), ("page.pt", 3), ("pointer.safetensors", 3), ("empty.npz", 3),
        ("pipe.pt", 3), ("attention.safetensors", 3), ("outside.safetensors", 3), ("none.pt", 2),
        ("", 2),
    ],
)  # fmt: skip
def test_one_bad_checkpoint_is_one_line_and_its_exit_code(run, folder, name, code):
    write_broken(folder)
    save_file({"attn.q_proj.weight": torch.zeros(4, 4)}, folder / "attention.safetensors")
    result = run("inspect", str(folder / name))
    assert result.code == code
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err
    assert len(result.err.splitlines()) <= 2


def test_some_bad_checkpoints_are_partial(run, folder):
    write_broken(folder)
    files = [folder / "run0" / "n0.safetensors", folder / "cut.safetensors"]
    result = run("inspect", *map(str, files), str(files[0]), "--json")
    found = result.json
    assert result.code == 4
    assert (len(found["rows"]), len(found["failed"])) == (1, 1)  # given twice, counted once
    assert run("inspect", *map(str, files), "--strict").code == 3


def test_names_from_a_file_cannot_drive_the_terminal(run, tmp_path):
    state = {f"\x1b[31m\n\u202e{n}": t for n, t in network(0).state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    save_file({"\x1b[2Jattn.q_proj.weight": torch.zeros(2, 2)}, tmp_path / "b.safetensors")
    for mode in ([], ["--json"]):
        good = run("inspect", str(tmp_path / "a.safetensors"), *mode)
        bad = run("inspect", str(tmp_path / "b.safetensors"), *mode)
        assert (good.code, bad.code) == (0, 3)
        for text in (good.out, good.err, bad.out, bad.err):
            assert "\x1b" not in text
            assert "\u202e" not in text


def test_index_answers_partial_and_names_what_failed(run, folder, tmp_path):
    clean = run("index", str(folder), "--out", str(tmp_path / "out"))
    assert clean.code == 0
    assert "6 checkpoints indexed" in clean.err
    bad = write_broken(folder)
    result = run("index", str(folder), "--out", str(tmp_path / "out"), "--update", "--json")
    found = result.json
    assert result.code == 4
    assert (found["checkpoints"], len(found["failed"])) == (6, bad)
    assert all(item["reason"] for item in found["failed"])
    assert run("index", str(folder), "--strict").code == 3
    assert not (folder / "index.parquet").exists()


def test_index_of_nothing_and_of_nowhere(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert run("index", str(tmp_path / "empty")).code == 3
    assert run("index", str(tmp_path / "nowhere")).code == 2
    (tmp_path / "empty" / "notes.txt").write_text("hello")
    result = run("index", str(tmp_path / "empty"))
    assert result.code == 3
    assert "no checkpoint in it (1 other files)" in result.err
    assert os.listdir(tmp_path / "empty") == ["notes.txt"]


def test_dry_run_writes_nothing(run, folder):
    result = run("index", str(folder), "--dry-run", "--json")
    assert result.json["to_read"] == 6
    assert not (folder / "index.parquet").exists()


def test_zoos_lists_what_is_embedded(run, tmp_path, monkeypatch):
    write_own(tmp_path / "zoos" / "tiny")
    (tmp_path / "zoos" / "card").mkdir()
    card = "---\nlicence: mit\ncheckpoints: 270000\n---\n# Card\n"
    (tmp_path / "zoos" / "card" / "README.md").write_text(card)
    for module in ("known", "resolve"):
        monkeypatch.setattr(f"qemcli.zoos.{module}.shipped", lambda kind: tmp_path / kind)
    result = run("zoos", "--json")
    rows = {row["name"]: row for row in result.json["rows"]}
    assert rows["card"]["licence"] == "mit"
    assert (rows["card"]["embedded"], rows["card"]["checkpoints"]) == (False, 270000)
    assert (rows["tiny"]["embedded"], rows["tiny"]["checkpoints"]) == (True, 7)
    assert rows["tiny"]["splits"] == {"train": 5, "test": 2}
    assert rows["tiny"]["activations"] == ["relu", "tanh"]
    assert "small_cnn" in result.json["layouts"]
