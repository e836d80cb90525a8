"""A run that is killed, or whose disk fails, at any step: what is there stays whole, and --resume
ends with the bytes of a run that nothing happened to."""

import errno
import functools
import os
import subprocess
import sys
import time

import pytest
from crash_kit import DONE, die, failed_at, killed_at, limited, qem, tree
from safetensors.torch import save_file
from zoo_files import network, write_broken, write_folder

from qemcli.errors import EnvironmentFailure
from qemcli.processes import spread
from qemcli.zoos import indexing
from qemcli.zoos.alone import LOCK, alone
from qemcli.zoos.build import cnn_zoo, run, sources
from qemcli.zoos.build.recipe import Recipe
from qemcli.zoos.indexing import index

PLAN = Recipe(
    name="tiny", test_images=20, models=2, checkpoints=(1,), batch=4, channels=(2,), block=1
)
STEPS = [pytest.param(1, marks=pytest.mark.slow), 4]  # the gate kills at every fourth change


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "CHUNK_ROWS", 2)
    root = write_folder(tmp_path / "source", 3)
    write_broken(root)
    for file in root.rglob("*"):  # the same index, to the byte, whenever it is made
        if file.is_file() and not file.is_symlink():
            os.utime(file, (1_000_000, 1_000_000))
    return root


@pytest.fixture
def build(monkeypatch):
    images = sources.load(PLAN)
    made = functools.lru_cache(lambda numbers: cnn_zoo.block.__wrapped__(PLAN, images, numbers))
    whole = cnn_zoo.block
    monkeypatch.setattr(cnn_zoo, "block", lambda r, i, numbers, d: made(tuple(numbers)))
    cnn_zoo.block.__wrapped__ = whole
    for numbers in run.blocks(PLAN):
        made(tuple(numbers))
    return lambda out, resume=False: run.build(PLAN, images, out, 1, resume)


def every_event(work, out, again, step, at_most=80):
    """Kill at the first change, at the next, ...: each time `again` must end as expected."""
    for event in range(1, at_most, step):
        target = out(event)
        if not killed_at(lambda target=target: work(target), target, event):
            return event
        again(target)
    raise AssertionError(f"more than {at_most} changes")


@pytest.mark.parametrize("step", STEPS)
def test_index_killed_at_every_step_ends_the_same(folder, tmp_path, step):
    index(folder, out=tmp_path / "whole")
    expected = tree(tmp_path / "whole")

    def again(target):
        index(folder, out=target)
        assert tree(target) == expected

    events = every_event(lambda t: index(folder, out=t), lambda i: tmp_path / f"k{i}", again, step)
    assert events > 8


@pytest.mark.parametrize("step", STEPS)
def test_updated_index_killed_at_every_step_is_the_old_or_the_new(folder, tmp_path, step):
    index(folder, out=tmp_path / "old")
    old = tree(tmp_path / "old")["index.parquet"]
    save_file(network(9).state_dict(), folder / "new.safetensors", {"activation": "relu"})
    index(folder, out=tmp_path / "new")
    expected = tree(tmp_path / "new")

    def start(event):
        (tmp_path / f"k{event}").mkdir()
        (tmp_path / f"k{event}" / "index.parquet").write_bytes(old)
        return tmp_path / f"k{event}"

    def again(target):
        assert (target / "index.parquet").read_bytes() in (old, expected["index.parquet"])
        index(folder, out=target)
        assert tree(target) == expected

    assert every_event(lambda t: index(folder, out=t), start, again, step) > 8


@pytest.mark.parametrize("step", STEPS)
def test_build_killed_at_every_step_ends_the_same(build, tmp_path, step):
    build(tmp_path / "whole")
    expected = tree(tmp_path / "whole")

    def again(target):
        build(target, resume=True)
        assert tree(target) == expected

    assert every_event(build, lambda i: tmp_path / f"k{i}", again, step) > 10


@pytest.mark.slow
def test_augment_killed_at_every_step_ends_the_same(build, tmp_path):
    build(tmp_path / "z")
    words = ("augment", tmp_path / "z", "--group", "permutation", "--factor", "2", "--out")
    with pytest.raises(SystemExit) as left:
        qem(*words, tmp_path / "whole")()
    assert not left.value.code
    expected = tree(tmp_path / "whole")

    def again(target):
        with pytest.raises(SystemExit):
            qem(*words, target, "--resume")()
        assert set(tree(target)) == set(expected)
        assert tree(target)["index.parquet"] == expected["index.parquet"]

    assert every_event(lambda t: qem(*words, t)(), lambda i: tmp_path / f"k{i}", again, 1) > 10


@pytest.mark.parametrize("step", STEPS)
def test_index_on_a_disk_that_fills_up_leaves_the_old_one(folder, tmp_path, step):
    out = tmp_path / "out"
    index(folder, out=out)
    before = tree(out)
    save_file(network(9).state_dict(), folder / "new.safetensors", {"activation": "relu"})
    for event in range(1, 80, step):
        code, said = failed_at(qem("index", folder, "--out", out), out, event)
        if code == 4:  # it was through: the folder has broken files
            assert tree(out) != before
            break
        assert code == 5, (event, said)
        assert said.startswith("error: ")
        assert "Traceback" not in said
        assert tree(out)["index.parquet"] == before["index.parquet"]
        assert not list(out.glob("*.tmp"))
    assert event > 6
    code, said = failed_at(qem("index", folder, "--out", out), out, 1, errno.EROFS)
    assert (code, "Read-only" in said) == (5, True), said


@pytest.mark.parametrize("step", STEPS)
def test_build_on_a_disk_that_fills_up_goes_on_afterwards(build, tmp_path, step):
    build(tmp_path / "whole")
    expected = tree(tmp_path / "whole")
    for event in range(1, 80, step):
        out = tmp_path / f"n{event}"
        code, said = failed_at(lambda out=out: build(out), out, event)
        if code == DONE:
            break
        assert "OSError(28" in said, said
        build(out, resume=True)
        assert tree(out) == expected
    assert event > 10


@pytest.mark.parametrize("size", [0, 700])
def test_file_that_may_not_grow_is_exit_5_and_no_half_file(build, folder, tmp_path, size):
    build(tmp_path / "z")
    for name, words in {
        "i": ("index", folder), "a": ("augment", tmp_path / "z", "--group", "permutation"),
        "e": ("canonicalize", tmp_path / "z"),
    }.items():  # fmt: skip
        out = tmp_path / name
        code, said = limited(qem(*words, "--out", out), size)
        assert code == 5, (name, said)
        assert "Traceback" not in said
        whole = tree(out) if out.exists() else {}
        assert not [f for f in whole if f.endswith((".parquet", ".safetensors", ".tmp", ".arrow"))]


def test_second_writer_is_refused_while_the_first_one_writes(build, folder, tmp_path):
    with alone(tmp_path / "out"):
        for words in (("index", folder), ("build", "cnn-digits", "--models", "1", "--resume")):
            code, said = failed_at(qem(*words, "--out", tmp_path / "out"), tmp_path / "none", 1)
            assert code == 5, said
            assert "another qem is writing there" in said
        with pytest.raises(EnvironmentFailure):
            build(tmp_path / "out", resume=True)
    build(tmp_path / "out")
    assert LOCK not in os.listdir(tmp_path / "out")


def test_lock_of_a_killed_writer_holds_nobody(tmp_path):
    code = (
        "from qemcli.zoos.alone import alone\nfrom pathlib import Path\nimport sys\n"
        f"with alone(Path({str(tmp_path)!r})):\n    print(1, flush=True)\n    sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"1\n"
    with pytest.raises(EnvironmentFailure), alone(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    assert (tmp_path / LOCK).exists()
    with alone(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_worker_that_is_killed_is_said_and_none_is_left():
    from multiprocessing import active_children

    with pytest.raises(EnvironmentFailure, match="worker process was killed"):
        list(spread(die, [(0,), (1,), (2,)], 1))
    deadline = time.monotonic() + 10
    while active_children() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not active_children()


def test_checkpoint_that_is_read_may_not_be_written_over(folder, tmp_path):
    """--out into the zoo that is read is refused before anything is done."""
    before = tree(folder)
    for command in ("augment", "canonicalize"):
        words = (command, folder, "--out", folder)
        code, said = failed_at(qem(*words), tmp_path / "none", 1)
        assert code == 2, said
    assert tree(folder) == before
