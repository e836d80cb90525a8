"""From a zoo to a predictor and back: train, save, load, predict, evaluate, compare; seeds and
resuming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from zoo_kit import write_mixed, write_zoo

from qemcli import registry
from qemcli.designs import Design
from qemcli.errors import InputError, UsageError
from qemcli.points import Points
from qemcli.predictor_files import FILE
from qemcli.predictors import Predictor
from qemcli.samples import gather
from qemcli.spaces import Chain, chain, cnn
from qemcli.training import Rows, Run, Schedule
from qemcli.zoos.zoo import Zoo

SPACE = cnn([1, 3, 4], 3)
TASK = registry.load("tasks", "generalization")


def _networks(space: Chain = SPACE, count: int = 60) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = 0.1 + torch.rand(count, 1, generator=generator)
    return size * torch.randn(count, space.size, generator=generator)


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return write_zoo(tmp_path / "zoo", SPACE, _networks())


def _recipe(folder: Path, text: str = "") -> Path:
    path = folder / "train.toml"
    path.write_text(
        'architecture = "statnn"\nquasi = "balanced"\nconfig = { head = 16 }\n'
        f"{text}\n[schedule]\nepochs = 3\nbatch_size = 8\n"
    )
    return path


def test_train_predict_evaluate_from_the_command_line(run, zoo: Path, tmp_path: Path) -> None:
    trained = run("train", _recipe(tmp_path), "--zoo", zoo, "--out", tmp_path / "p", "--json")
    assert trained.code == 0, trained.err
    assert {"tau", "tau_low", "tau_high", "n"} <= set(trained.json["rows"][0])
    assert (tmp_path / "p" / "README.md").read_text().startswith("---\nlibrary_name: qem")
    ranked = run("predict", zoo, "--predictor", tmp_path / "p", "--json")
    assert ranked.code == 0
    values = [row["prediction"] for row in ranked.json["rows"]]
    assert values == sorted(values, reverse=True)
    assert len(values) == ranked.json["n"] == 60
    scored = run("evaluate", tmp_path / "p", zoo, "--augment", "monomial", "--json")
    plain, moved = scored.json["rows"]
    assert plain["tau"] == pytest.approx(moved["tau"], abs=1e-3)
    assert plain["n"] == 12


def test_same_seed_gives_the_same_bytes(run, zoo: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        call = ["train", _recipe(tmp_path), "--zoo", zoo, "--seed", seed, "--out", tmp_path / name]
        assert run(*call, "-q").code == 0
    tensors = {n: Predictor.load(tmp_path / n).model.state_dict() for n in "abc"}
    assert all(torch.equal(tensors["a"][k], v) for k, v in tensors["b"].items())
    assert any(not torch.equal(tensors["a"][k], v) for k, v in tensors["c"].items())


def test_resumed_training_equals_the_uninterrupted(tmp_path: Path) -> None:
    flat, target = _networks(), torch.linspace(0.1, 0.9, 60)
    train, val = (
        Rows(Points.of(SPACE, flat[at]), target[at]) for at in (slice(40), slice(40, None))
    )
    schedule = Schedule(epochs=4, batch_size=8)

    def fresh(state: Path | None) -> Run:
        torch.manual_seed(0)
        model = Design("statnn", config={"head": 8, "dropout": 0.2}).build(SPACE)
        return Run(model, TASK, schedule, 0, state=state)

    class Killed(Exception):
        pass

    def kill(row: dict[str, float]) -> None:
        if row["epoch"] == 2:
            raise Killed

    whole = fresh(None)
    whole.fit(train, val)
    state = tmp_path / "state.pt"
    with pytest.raises(Killed):
        fresh(state).fit(train, val, on_epoch=kill)
    resumed = fresh(state)
    resumed.fit(train, val, resume=True)
    assert resumed.history == whole.history
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])


def test_resume_refuses_the_state_of_another_run_and_a_damaged_one(tmp_path: Path) -> None:
    rows = Rows(Points.of(SPACE, _networks()), torch.linspace(0.1, 0.9, 60))
    state = tmp_path / "state.pt"

    def resumed(seed: int = 0, head: int = 8, learn: Rows = rows, **schedule: float) -> list:
        model = Design("statnn", config={"head": head}).build(SPACE)
        run = Run(model, TASK, Schedule(**{"epochs": 2, **schedule}), seed, state=state)
        return run.fit(learn, rows, resume=True)

    assert len(resumed()) == len(resumed()) == 2
    moved = Rows(Points.of(SPACE, 2 * _networks()), rows.target)
    relabelled = Rows(rows.networks, rows.target.flip(0))
    for other, what in (
        ({"seed": 1}, "seed"), ({"head": 9}, "design"), ({"lr": 0.1}, "schedule"),
        ({"learn": moved}, "networks"), ({"learn": relabelled}, "networks"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=f"another {what}"):
            resumed(**other)
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(UsageError, match="no state of a training run"):
        resumed()


def test_without_any_score_the_last_epoch_is_kept() -> None:
    """All validation networks have the same accuracy: there is no order to find."""
    learn = Rows(Points.of(SPACE, _networks()), torch.linspace(0.1, 0.9, 60))
    hold = Rows(Points.of(SPACE, _networks(count=6)), torch.full((6,), 0.5))
    torch.manual_seed(0)
    model = Design("statnn", config={"head": 8}).build(SPACE)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    history = Run(model, TASK, Schedule(epochs=2), 0).fit(learn, hold)
    assert np.isnan(history[-1]["val_tau"])
    assert any(not torch.equal(start[name], v) for name, v in model.state_dict().items())


def test_training_refuses_what_cannot_be_learned() -> None:
    def fit(target: Tensor) -> None:
        rows = Rows(Points.of(SPACE, _networks()[: len(target)]), target)
        model = Design("statnn", config={"head": 8}).build(SPACE)
        Run(model, TASK, Schedule(epochs=1), 0).fit(rows, rows)

    with pytest.raises(InputError, match="the same for all"):
        fit(torch.full((20,), 0.5))
    with pytest.raises(InputError, match="networks to train on"):
        fit(torch.rand(3))
    with pytest.raises(UsageError, match="not finite"):
        fit(torch.full((20,), torch.nan).index_fill(0, torch.arange(9), 0.5) * torch.rand(20))


def test_network_that_is_not_finite_gets_no_prediction(run, tmp_path: Path) -> None:
    flat = _networks()
    flat[3, 5] = torch.nan
    zoo = write_zoo(tmp_path / "zoo", SPACE, flat)
    Predictor("p", SPACE, Design("statnn"), "generalization", Design("statnn").build(SPACE)).save(
        tmp_path / "p"
    )
    ran = run("predict", zoo, "-p", tmp_path / "p", "--json")
    assert ran.code == 4
    assert len(ran.json["rows"]) == 59
    assert "not finite" in ran.json["failed"][0]["reason"]
    assert "NaN" not in ran.out


def test_predictor_survives_saving(tmp_path: Path) -> None:
    design = Design("monomial_nfn", "exact", {"channels": [4, 2], "head": 8})
    made = Predictor("p", SPACE, design, "generalization", design.build(SPACE).eval())
    made.save(tmp_path)
    flat = _networks(count=5)
    assert torch.equal(made.predict(flat), Predictor.load(tmp_path).predict(flat))
    assert made.claims == Predictor.load(tmp_path / FILE).claims


def _rewritten(path: Path, **changes: object) -> None:
    """The predictor's file with other words in its header."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    head = json.loads(data[8:end])
    stated = head["__metadata__"]
    if "provenance" in changes:
        stated["qem.provenance"] = changes.pop("provenance")
    stated["qem.config"] = json.dumps({**json.loads(stated["qem.config"]), **changes})
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


@pytest.mark.parametrize(
    "changes",
    [
        {"others": 5}, {"classes": 5}, {"architecture": 5}, {"task": 5}, {"config": []},
        {"config": None}, {"config": {"head": "x"}}, {"config": {"head": 8.0}},
        {"config": {"head": -1}}, {"config": {"dropout": 7}}, {"provenance": "{"},
        {"task": "../generalization"}, {"architecture": "../statnn"}, {"quasi": "no such"},
        {"config": {"head": 5}},
    ],
    ids=str,
)  # fmt: skip
def test_a_strangers_header_is_one_line(changes, run, zoo: Path, tmp_path: Path) -> None:
    design = Design("statnn", config={"head": 4})
    Predictor("p", SPACE, design, "generalization", design.build(SPACE)).save(tmp_path / "p")
    assert run("predict", zoo, "-p", tmp_path / "p").code == 0
    _rewritten(tmp_path / "p" / FILE, **changes)
    ran = run("predict", zoo, "-p", tmp_path / "p")
    assert ran.code in (2, 3)
    assert "a bug in qem" not in ran.err
    assert ran.err.count("\n") <= 2


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:100]), "not a readable safetensors"),
        (lambda p: p.write_bytes(b""), "not a readable safetensors"),
        (lambda p: p.unlink(), "no predictor is called"),
    ],
)
def test_broken_predictor_is_one_line(spoil, said: str, run, zoo: Path, tmp_path: Path) -> None:
    design = Design("statnn", config={"head": 4})
    Predictor("p", SPACE, design, "generalization", design.build(SPACE)).save(tmp_path / "p")
    spoil(tmp_path / "p" / FILE)
    ran = run("predict", zoo, "-p", tmp_path / "p")
    assert ran.code == 3
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_networks_of_another_architecture_are_named(run, tmp_path: Path) -> None:
    design = Design("statnn", config={"head": 4})
    Predictor("p", SPACE, design, "generalization", design.build(SPACE)).save(tmp_path / "p")
    other = cnn([1, 2, 4], 3)
    zoo = write_zoo(tmp_path / "other", other, _networks(other, 4))
    ran = run("predict", zoo, "-p", tmp_path / "p")
    assert ran.code == 3
    assert "not what 'p' reads" in ran.err
    assert run("predict", zoo).code == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epoch = 3", "no setting"),
        ("architecture = 'nfnn'", "Did you mean 'nfn'"),
        ("[schedule]\nepoch = 3", "Did you mean 'epochs'"),
        ("architecture = 'flat_mlp'\nquasi = 'exact'", "balanced"),
        ("[config]\nhed = 3", "Did you mean 'head'"),
        ("[config]\nhead = 'x'", "'head' is 'x'"),
        ("[schedule]\nlr = 'a'", "'lr' is 'a'"),
        ("schedule = 5", "stands where settings belong"),
        ("seed = ", "not TOML"),
    ],
)
def test_recipe_says_what_is_wrong(text: str, said: str, run, zoo: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    ran = run("train", path, "--zoo", zoo, "--out", tmp_path / "x")
    assert ran.code == 2
    assert said in ran.err


def test_output_that_is_in_use_is_refused(run, zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine.txt").write_text("precious")
    ran = run("train", _recipe(tmp_path), "--zoo", zoo, "--out", tmp_path / "p")
    assert ran.code == 2
    assert (tmp_path / "p" / "mine.txt").read_text() == "precious"


def test_compare_runs_once_and_resumes(run, zoo: Path, tmp_path: Path) -> None:
    path = tmp_path / "compare.toml"
    path.write_text(
        'reference = "statnn none head=8"\nseeds = [0, 1]\n'
        "ranges = [[1, 100]]\naugment = [[1, 10]]\n"
        "[schedule]\nepochs = 2\nbatch_size = 8\n"
        '[[design]]\narchitecture = "statnn"\nconfig = { head = 8 }\n'
        '[[design]]\narchitecture = "statnn"\nquasi = "balanced"\nconfig = { head = 8 }\n'
    )
    out = tmp_path / "out"
    first = run("compare", path, "--zoo", zoo, "--out", out, "--workers", 1, "--json")
    assert first.code == 0, first.err
    stamps = {p: p.stat().st_mtime_ns for p in (out / "runs").iterdir()}
    assert len(stamps) == 8
    again = run("compare", path, "--zoo", zoo, "--out", out, "--workers", 1, "--json")
    assert again.json["rows"] == first.json["rows"]
    assert {p: p.stat().st_mtime_ns for p in (out / "runs").iterdir()} == stamps
    balanced = [
        r for r in first.json["rows"] if "balanced" in r["design"] and r["augment"] == "none"
    ]
    assert balanced[0]["tau"] == pytest.approx(balanced[0]["tau 1:100"], abs=1e-3)
    assert balanced[0]["invariance_error"] < 1e-10
    raw = [r for r in first.json["rows"] if "none head" in r["design"] and r["augment"] == "none"]
    assert raw[0]["invariance_error"] > 1e-3
    assert (out / "table.md").read_text().count("|") > 20
    assert (out / "tradeoff.png").stat().st_size > 1000


def test_two_processes_of_torchrun_learn_together(zoo: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "together.toml"
    recipe.write_text(
        f'zoos = ["{zoo}"]\narchitecture = "statnn"\nconfig = {{ head = 8 }}\n'
        "[schedule]\nepochs = 2\nbatch_size = 7\n"  # 36 networks: shares of 4 and 3, and one alone
    )
    program = [str(Path(sys.executable).with_name("qem")), "train", str(recipe), "--json", "-q"]
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    scores = []
    for name, start in (("one", []), ("two", [sys.executable, *together])):
        command = [*start, *program, "--out", str(tmp_path / name)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        scores.append(json.loads(done.stdout)["rows"][0]["mae"])  # one answer, not two
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)
    one, two = (Predictor.load(tmp_path / name).model.state_dict() for name in ("one", "two"))
    assert all(torch.allclose(two[name], v, atol=1e-6) for name, v in one.items())


def test_models_lists_presets_with_exact_counts(run) -> None:
    rows = run("models", "--presets", "--json").json["rows"]
    published = {row["published"] for row in rows if row["published"]}
    assert {1_059_001, 2_031_390, 2_811_743, 254_619, 429_421, 264_525} <= published
    assert all(row["parameters"] == row["published"] for row in rows if row["published"])


def test_history_and_provenance_are_kept(run, zoo: Path, tmp_path: Path) -> None:
    run("train", _recipe(tmp_path, "seed = 5"), "--zoo", zoo, "--out", tmp_path / "p", "-q")
    history = json.loads((tmp_path / "p" / "history.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2, 3]
    kept = Predictor.load(tmp_path / "p").provenance
    assert kept["seed"] == 5
    assert kept["train"] == 36
    assert np.isfinite(kept["test"]["mae"])


def test_predictor_comes_from_the_hub_by_name(hub, tmp_path: Path) -> None:
    design = Design("statnn", config={"head": 4})
    Predictor("p", SPACE, design, "generalization", design.build(SPACE)).save(tmp_path / "p")
    data = (tmp_path / "p" / FILE).read_bytes()
    commit = hub.add("owner/name", {FILE: data, "sub/" + FILE: data, "other.bin": b"x" * 9999})
    for text in ("owner/name", f"owner/name@{commit}", "owner/name/sub", f"owner/name/sub/{FILE}"):
        assert Predictor.load(f"hf://{text}").design == design
    assert len(hub.cdn.seen("GET")) == 1  # one file by its bytes, and nothing else


def test_predictor_is_not_taken_for_a_network(run, tmp_path: Path) -> None:
    design = Design("statnn", config={"head": 4})
    Predictor("p", SPACE, design, "generalization", design.build(SPACE)).save(tmp_path / "p")
    ran = run("inspect", tmp_path / "p" / FILE)
    assert ran.code == 3
    assert "a qem predictor" in ran.err


def test_networks_without_a_bias_are_not_those_with_one(run, tmp_path: Path) -> None:
    """Their rows hold other numbers at the same places."""
    plain = cnn([1, 3, 4], 3)
    last = replace(plain.layers[-1], bias=None)
    bare = chain(
        (*plain.layers[:-1], last), "cnn", {"conv1.weight": (3, 3), "conv2.weight": (3, 3)}
    )
    design = Design("statnn", config={"head": 4})
    Predictor("p", plain, design, "generalization", design.build(plain)).save(tmp_path / "p")
    assert not Predictor.load(tmp_path / "p").fits(bare.running("relu"))
    zoo = write_mixed(tmp_path / "zoo", [plain, bare.running("relu")])
    ran = run("predict", zoo, "-p", tmp_path / "p", "--json")
    assert (ran.code, ran.json["n"], len(ran.json["failed"])) == (4, 16, 16)
    assert all("not what 'p' reads" in item["reason"] for item in ran.json["failed"])
    assert len(gather([Zoo.open(zoo)], TASK).spaces) == 2


def test_kernels_of_other_shapes_are_other_networks() -> None:
    spaces = [
        chain(cnn([1, 3, 4], 3).layers, "cnn", {"conv1.weight": size, "conv2.weight": (3, 3)})
        for size in ((3, 3), (1, 9))
    ]
    assert spaces[0].size == spaces[1].size
    assert not spaces[0].fits(spaces[1])
