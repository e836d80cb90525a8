"""Commands whose disk fills up, is read-only or is shared with another writer: exit 5, one line,
what was there is whole, and no half file stands under a final name."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from crash_kit import failed_at, limited, qem, tree
from fake_web import Web
from zoo_files import write_folder

from qemcli.shipped import shipped
from qemcli.zoos.alone import alone

FULL, READ_ONLY = errno.ENOSPC, errno.EROFS
ENDS = (".parquet", ".safetensors", ".json", ".png", ".tmp", ".zip", ".pt", ".csv")
EMBEDDED = shipped("zoos") / "cnn-small"


@pytest.fixture
def zoo(tmp_path):
    return write_folder(tmp_path / "z", 11)


def commands(zoo: Path, out: Path) -> dict[str, tuple[object, ...]]:
    """Every command that writes and is quick, into `out`."""
    return {
        "predict": ("predict", EMBEDDED, "--limit", "4", "--out", out / "rows.parquet"),
        "predict-json": ("predict", EMBEDDED, "--limit", "4", "--out", out / "rows.json"),
        "inspect": ("inspect", zoo / "run0" / "n0.safetensors", "--out", out / "rows.csv"),
        "train": ("train", "--zoo", zoo, "--epochs", "2", "--out", out / "p"),
        "render": ("render", "--limit", "2", "--out", out / "sheet.png"),
        "edit": ("edit", "--edit", "dilate", "--limit", "2", "--out", out / "e"),
    }


def each(quick: str) -> list[object]:
    """The commands' names; the gate takes one."""
    names = commands(Path("z"), Path("out"))
    return [pytest.param(n, marks=[] if n == quick else pytest.mark.slow) for n in names]


def whole_files(out: Path) -> set[str]:
    """What stands there under a final name; a recipe is written whole before the work begins."""
    return {name for name in tree(out) if name.endswith(ENDS) and "recipe.json" not in name}


def assert_told(code: int, said: str) -> None:
    assert code == 5, said
    assert "Traceback" not in said
    assert sum(line.startswith("error: ") for line in said.splitlines()) == 1, said


@pytest.mark.parametrize("name", each("train"))
def test_file_that_may_not_grow_is_exit_5(zoo, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    assert_told(*limited(qem(*commands(zoo, out)[name]), 64))
    assert not whole_files(out)


@pytest.mark.parametrize("name", each("inspect"))
def test_read_only_disk_is_exit_5(zoo, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    code, said = failed_at(qem(*commands(zoo, out)[name]), out, 1, READ_ONLY)
    assert_told(code, said)
    assert "Read-only" in said
    assert not whole_files(out)


@pytest.mark.parametrize("name", each(""))
def test_disk_that_is_full_from_the_nth_change_on_is_exit_5(zoo, tmp_path, name):
    for event in range(1, 60):
        out = tmp_path / f"out{event}"
        out.mkdir()
        code, said = failed_at(qem(*commands(zoo, out)[name]), out, event, FULL)
        if code in (0, 4):
            break
        assert_told(code, said)
        assert not any(".tmp" in path for path in tree(out))
    assert event > 1


@pytest.mark.slow
def test_rows_that_were_there_stay_whole_on_a_full_disk(zoo, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "rows.parquet").write_bytes(b"of yesterday")
    for event in (1, 2):
        assert_told(*failed_at(qem(*commands(zoo, out)["predict"]), out, event, FULL))
        assert tree(out) == {"rows.parquet": b"of yesterday"}


@pytest.mark.slow
@pytest.mark.parametrize("step", [1])
def test_download_on_a_disk_that_fills_up_is_no_success_and_goes_on(tmp_path, step):
    data = os.urandom(30_000)
    with Web().running() as web:
        web.files["/far.zip"] = data
        for event in range(1, 60, step):
            out = tmp_path / f"d{event}"
            words = ("download", f"{web.url}/far.zip", "--dest", out)
            code, said = failed_at(qem(*words), out, event, FULL)
            if code == 0:
                break
            assert_told(code, said)
            assert "far.zip" not in tree(out) or tree(out)["far.zip"] == data
            code, said = failed_at(qem(*words), tmp_path / "none", 1)
            assert code == 0, said
            assert tree(out)["far.zip"] == data
    assert event > 3


def test_second_writer_of_a_predictor_or_a_copy_is_refused(zoo, tmp_path):
    with alone(tmp_path / "out"):
        for words in (
            ("train", "--zoo", zoo, "--epochs", "1", "--resume"),
            ("augment", zoo, "--group", "permutation", "--resume"),
        ):
            code, said = failed_at(qem(*words, "--out", tmp_path / "out"), tmp_path / "none", 1)
            assert_told(code, said)
            assert "another qem is writing there" in said, (words, said)


@pytest.mark.parametrize(
    "words", ["zoos", pytest.param("inspect FILE --json", marks=pytest.mark.slow)]
)
def test_reader_that_has_gone_is_quiet(zoo, words):
    file = str(zoo / "run0" / "n0.safetensors")
    command = [sys.executable, "-m", "qemcli", *words.replace("FILE", file).split()]
    done = subprocess.run(
        ["bash", "-c", '"$@" | head -n 0; exit ${PIPESTATUS[0]}', "_", *command],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
