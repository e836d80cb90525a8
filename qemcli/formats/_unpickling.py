"""Pickles that have to be run (`--allow-pickle`): read by a process that can do little else, and
kept beside as plain tensors, which every command reads as data.

`runs/model.pt` becomes `runs/model.pt.safetensors`; a folder with both lists the second one.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from qemcli.checkpoints import Checkpoint, RunsCode, open_checkpoint
from qemcli.errors import EnvironmentFailure, InputError, QemError
from qemcli.writing import beside

TWIN = ".safetensors"  # follows the whole name of the file that it was made from
NEWEST = (2, 10)  # torch before it can be made to write where it should not, whatever we forbid
SECONDS, MEGABYTES = 20, 4096  # of processor time and memory, above what torch itself takes
WAIT = 120  # seconds that it may take in all
LARGEST = 2 << 30  # bytes of a pickle
SCRIPT = Path(__file__).with_name("_sandbox.py")
Say = Callable[[str], None]


def twin(path: Path, warn: Say) -> Path:
    """The file itself where it is data; else its twin, made by running the pickle once.

    Raises InputError where the pickle wanted more than to be read, EnvironmentFailure where torch
    is too old.
    """
    try:
        open_checkpoint(path)
    except RunsCode:
        return _twin(path, warn)
    except QemError:
        pass  # the reader says what is wrong with it
    return path


def stopped(paths: Iterable[Path], warn: Say) -> dict[Path, str]:
    """Make the twins of those of many files that are pickles; which did not come to an end, and
    why."""
    found = {}
    for path in paths:
        try:
            twin(path, warn)
        except InputError as error:
            found[path] = error.message.removeprefix(f"{path}: ")
    return found


def _twin(path: Path, warn: Say) -> Path:
    _new_enough()
    kept = path.with_name(path.name + TWIN)
    if kept.is_file() and kept.stat().st_mtime_ns >= path.stat().st_mtime_ns:
        return kept
    warn(
        f"{path}: a pickle, which is run, confined (--allow-pickle); its tensors go to {kept.name}"
    )
    with tempfile.TemporaryDirectory(prefix="qem-pickle-") as folder:
        data = Path(folder, "plain.pt")
        missing = _run(path, data)
        if missing:
            warn(f"this system has no {missing}: only Python itself confines the pickle")
        try:
            checkpoint = open_checkpoint(data)
            beside(kept, lambda out: _save(checkpoint, out))
        except InputError as error:
            reason = error.message.removeprefix(f"{data}: ")
            raise InputError(f"{path}: {reason}", error.hint) from None
    return kept


def _new_enough() -> None:
    from importlib.metadata import version

    found = version("torch")
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < NEWEST:
        raise EnvironmentFailure(
            f"--allow-pickle needs torch {'.'.join(map(str, NEWEST))} or newer, this is {found}",
            "pip install --upgrade torch",
        )


def _run(path: Path, out: Path) -> str:
    """Run the pickle of `path`, its content as plain data to `out`; what could not be forbidden."""
    if path.stat().st_size > LARGEST:
        raise InputError(f"{path}: a pickle of {path.stat().st_size} bytes is too large to be run")
    home = str(out.parent)
    environment = {"OMP_NUM_THREADS": "1", "HOME": home, "TMPDIR": home, "PATH": ""}
    words = [sys.executable, "-I", "-B", str(SCRIPT), str(SECONDS), str(MEGABYTES)]
    with path.open("rb") as given, out.open("wb") as taken:
        try:
            done = subprocess.run(
                words, stdin=given, stdout=taken, stderr=subprocess.PIPE, cwd=home,
                env=environment, timeout=WAIT, start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise InputError(f"{path}: its pickle ran for {WAIT} s and was stopped") from None
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    if done.returncode or not out.stat().st_size:
        raise InputError(
            f"{path}: {_end(done.returncode, said)}",
            "save model.state_dict() alone, where the file comes from",
        )
    return said[-1].removeprefix("missing: ") if said else ""


def _end(code: int, said: list[str]) -> str:
    """What became of the pickle, in a line."""
    if code == 0:
        return "its pickle left before it was read"
    if code > 0:
        return f"its pickle was not read ({said[-1][:240] if said else f'exit {code}'})"
    why = {24: f"more than {SECONDS} s of processor time", 25: "a file of unbounded size"}
    return f"its pickle was stopped ({why.get(-code, f'signal {-code}')})"


def _save(checkpoint: Checkpoint, out: Path) -> None:
    """The tensors as safetensors; the file sorts them, so the space goes with them where there is
    one."""
    import torch
    from safetensors.torch import save_file

    stated = {k: str(v) for k, v in checkpoint.metadata.items()}
    arrays = checkpoint.tensors()
    with suppress(QemError):  # then it is listed by its tensors alone
        space = checkpoint.space()
        stated["qem.space"] = space.to_json()
        gone = {name for norm in checkpoint.norms for name in norm.own}
        left = {name: array for name, array in arrays.items() if name not in gone}
        arrays = left | checkpoint.folded(space)
    save_file({n: torch.from_numpy(a.copy()) for n, a in arrays.items()}, out, metadata=stated)
