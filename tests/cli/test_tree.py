"""The command tree: light, complete, and honest about what goes wrong."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from qemcli.cli import _code, _tree
from qemcli.cli._out import Answer, Sink, cell, plain, printable
from qemcli.errors import InputError, QemError, UsageError

COMMANDS = sorted(_tree.modules())


def _python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_tree_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'pandas', 'pyarrow', 'numpy', 'scipy'}"
    code = (
        "import sys; sys.argv = ['qem', '--help']\n"
        "from qemcli.cli import main\n"
        "try: main()\n"
        f"except SystemExit: print('LOADED', sorted({heavy} & set(sys.modules)))"
    )
    assert "LOADED []" in _python(code)


def test_help_is_five_times_faster_than_importing_torch() -> None:
    def best(code: list[str]) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([sys.executable, *code], capture_output=True, check=True)
            times.append(time.perf_counter() - start)
        return min(times)

    assert 5 * best(["-m", "qemcli", "--help"]) < best(["-c", "import torch"])


@pytest.mark.parametrize("command", COMMANDS)
def test_command_has_help_with_an_example(command: str, run: Callable) -> None:
    ran = run(command, "--help")
    assert ran.code == 0
    assert f"qem {command}" in ran.out.replace("\n", " ")
    assert "--install-completion" not in ran.out


@pytest.mark.parametrize("command", COMMANDS)
def test_command_refuses_an_unknown_option(command: str, run: Callable) -> None:
    ran = run(command, "--no-such-option")
    assert ran.code == 2
    assert ran.out == ""
    assert "Traceback" not in ran.err


def test_unknown_command_is_usage(run: Callable) -> None:
    assert run("predikt").code == 2


@pytest.mark.parametrize("error", [UsageError, InputError, QemError])
def test_errors_become_one_line_and_their_code(
    error: type[QemError], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _code(error("what and where", "what to do")) == error.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: what and where\nhint:  what to do\n"


def test_bug_leaves_a_crash_file_and_70(capsys: pytest.CaptureFixture[str]) -> None:
    assert _code(ZeroDivisionError("x")) == 70
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sent", "code", "said"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")]
)
def test_stopped_build_leaves_a_command_that_goes_on(
    sent: str, code: int, said: str, tmp_path
) -> None:
    import shlex
    import signal

    recipe = tmp_path / "long.toml"
    text = "models = 12\nblock = 1\ncheckpoints = [1, 400]\nbatch = 4\nchannels = [3]\n"
    recipe.write_text(text + "test_images = 50\n")
    out = tmp_path / "zoo"
    words = [sys.executable, "-m", "qemcli"]
    call = ["build", str(recipe), "--out", str(out), "--workers", "1"]
    running = subprocess.Popen(
        [*words, *call],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A gate that runs in the background ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("parts/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(getattr(signal, sent))
    printed, narrated = running.communicate(timeout=60)
    assert running.returncode == code, narrated
    assert printed == ""
    assert said in narrated
    assert "Traceback" not in narrated
    hint = narrated.split("go on with: qem ")[1]
    done = subprocess.run([*words, *shlex.split(hint)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (out / "index.parquet").is_file()


def test_interrupt_is_130_and_full_disk_is_5() -> None:
    import errno

    assert _code(KeyboardInterrupt()) == 130
    assert _code(OSError(errno.ENOSPC, "No space left on device", "x")) == 5
    assert _code(MemoryError()) == 5


def test_answer_in_json_is_strict_and_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    sink = Sink(json=True)
    sink.note("narration")
    rows = [{"checkpoint": "a", "prediction": float("nan")}]
    sink.answer(Answer(rows, {"tau": 0.5}))
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "tau": 0.5,
        "rows": [{"checkpoint": "a", "prediction": None}],
        "failed": [],
    }
    assert err == "narration\n"


def test_failed_items_are_listed_and_leave_with_4(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    with pytest.raises(typer.Exit) as left:
        Sink().answer(Answer([{"a": 1}], failed=[{"checkpoint": "b", "reason": "cut short"}]))
    assert left.value.exit_code == 4
    assert "b: cut short" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_rows_are_written_by_suffix(suffix: str, tmp_path) -> None:
    import pandas

    from qemcli.cli._out import write_rows

    path = tmp_path / f"rows.{suffix}"
    write_rows(Answer([{"a": 1, "b": 0.1}, {"a": 2, "b": 0.2}]), path)
    readers = {"csv": pandas.read_csv, "parquet": pandas.read_parquet}
    if suffix in readers:
        assert readers[suffix](path)["b"].tolist() == [0.1, 0.2]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_unknown_suffix_is_refused(tmp_path) -> None:
    from qemcli.cli._out import write_rows

    with pytest.raises(UsageError, match="suffix"):
        write_rows(Answer([{"a": 1}]), tmp_path / "rows.xlsx")


def test_text_from_files_cannot_drive_the_terminal() -> None:
    assert printable("a\x1b[2Jb\u202ec\n") == "a\\x1b[2Jb\\u202ec\\n"
    assert cell("x\ny") == "x\\ny"


def test_numbers_are_rounded_for_people_only() -> None:
    assert cell(0.123456) == "0.1235"
    assert plain({"x": 0.123456}) == {"x": 0.123456}


def test_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m qemcli --help | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""
