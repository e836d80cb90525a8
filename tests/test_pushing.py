"""qem push: what was sent is there, and is read again by its name."""

import json

import pytest
from fake_web import Fault
from zoo_files import write_folder

from qemcli import spaces
from qemcli.designs import Design
from qemcli.predictor_files import FILE
from qemcli.predictors import Predictor
from qemcli.zoos.zoo import Zoo

# The client itself uploads in a way that its HTTP library would rather not see.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
SPACE = spaces.mlp([3, 5, 4], "relu")


@pytest.fixture
def predictor(tmp_path):
    design = Design("statnn", config={"head": 4})
    made = Predictor("mine", SPACE, design, "generalization", design.build(SPACE))
    made.save(tmp_path / "mine")
    return tmp_path / "mine"


def test_pushed_predictor_is_read_by_its_name(hub, run, predictor, tmp_path):
    ran = run("push", predictor, "hf://owner/mine", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["private"] is True
    repo = hub.repos["model", "owner/mine"]
    sent = repo.commits[repo.refs["main"]]
    assert sent[FILE] == (predictor / FILE).read_bytes()
    assert b"qem predict ZOO -p hf://owner/mine" in sent["README.md"]
    assert ran.json["commit"] == f"hf://owner/mine@{repo.refs['main']}"
    zoo = write_folder(tmp_path / "z")
    ours = run("predict", zoo, "-p", predictor, "--json").json["rows"]
    assert run("predict", zoo, "-p", "hf://owner/mine", "--json").json["rows"] == ours


def test_card_that_is_there_is_sent_as_it_is(hub, run, predictor):
    (predictor / "README.md").write_text("---\nlibrary_name: qem\n---\nmine\n")
    (predictor / "train.toml").write_text("seed = 0\n")
    (predictor / ".secret").write_text("no")
    assert run("push", predictor, "hf://owner/mine", "--public").code == 0
    repo = hub.repos["model", "owner/mine"]
    assert not repo.private
    assert set(repo.commits[repo.refs["main"]]) == {FILE, "README.md", "train.toml"}


def test_pushed_zoo_is_the_same_zoo(hub, run, tmp_path):
    zoo = write_folder(tmp_path / "z")
    ran = run("push", zoo, "hf://datasets/owner/zoo")
    assert ran.code == 0
    found = Zoo.open("hf://datasets/owner/zoo")
    names = found.index["checkpoint"].tolist()
    assert names == Zoo.open(zoo).index["checkpoint"].tolist()
    repo = hub.repos["dataset", "owner/zoo"]
    assert b"6 checkpoints" in repo.commits[repo.refs["main"]]["README.md"]


def test_dry_run_sends_nothing(hub, run, predictor):
    ran = run("push", predictor, "hf://owner/mine", "--dry-run", "--json")
    assert {row["file"] for row in ran.json["rows"]} == {FILE, "README.md"}
    assert not hub.web.asked
    assert not hub.repos


@pytest.mark.parametrize("to", ["owner/mine", "hf://owner/mine@v1", "hf://owner/mine/sub"])
def test_push_goes_to_a_repository_alone(hub, run, predictor, to):
    assert run("push", predictor, to).code == 2


def test_what_did_not_arrive_is_no_success(hub, run, predictor):
    hub.cdn.faults += [Fault("PUT", status=500, times=99)]
    ran = run("push", predictor, "hf://owner/mine")
    assert ran.code == 5
    assert "hf_secret" not in ran.err
    hub.cdn.faults.clear()
    hub.mangle = True
    ran = run("push", predictor, "hf://owner/mine")
    assert (ran.code, "did not arrive" in ran.err) == (5, True)


def test_index_without_weights_is_not_pushed(hub, run, tmp_path):
    zoo = write_folder(tmp_path / "z")
    run("index", zoo, "--out", tmp_path / "i")
    ran = run("push", tmp_path / "i", "hf://datasets/owner/zoo")
    assert (ran.code, str(zoo) in ran.err) == (2, True)
    outside = tmp_path / "outside"
    outside.write_text(json.dumps({}))
    (zoo / "link.json").symlink_to(outside)
    ran = run("push", zoo, "hf://datasets/owner/zoo")
    assert (ran.code, "leaves the folder" in ran.err) == (3, True)
