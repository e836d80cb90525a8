"""The matrix of bad input: what a user may point qem at, what it says, and the exit code.

Every row of BAD is tried alone (`qem inspect`: the stated code, one line, nothing on stdout) and as
an item of a zoo (`qem index`: exit 4, named with a reason, the good ones indexed).
"""

import gzip
import io
import json
import lzma
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from zoo_files import network, write_folder

from qemcli.errors import InputError
from qemcli.formats._safetensors_header import header_of

GOOD = save(network(0).state_dict(), {"activation": "relu"})
LENGTH = int.from_bytes(GOOD[:8], "little")


def with_header(change):
    header = json.loads(GOOD[8 : 8 + LENGTH])
    raw = json.dumps(change(header)).encode()
    return struct.pack("<Q", len(raw)) + raw + GOOD[8 + LENGTH :]


def moved(name, **fields):
    return lambda header: {**header, name: {**header[name], **fields}}


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def packed_integers():
    state = {"l.qweight": torch.zeros(8, 4, dtype=torch.int32), "l.scales": torch.ones(1, 4).half()}
    return save({**state, "l.qzeros": torch.zeros(1, 1, dtype=torch.int32)})


PAGE = b"<!DOCTYPE html><html><head><title>404</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
FIRST = GOOD[8 : 8 + LENGTH].split(b'"0.bias":')[1].split(b"}")[0] + b"}"
TWICE = GOOD[8 : 8 + LENGTH].replace(b'"0.bias":', b'"0.bias":' + FIRST + b',"0.bias":')
BAD = {  # row of the matrix, file name -> (bytes, what is said)
    (1, "empty.safetensors"): (b"", "empty or cut short"),
    (1, "seven.pt"): (b"\0" * 7, "empty or cut short"),
    (2, "header.safetensors"): (GOOD[: LENGTH // 2], "needs"),
    (2, "body.safetensors"): (GOOD[:-1], f"needs {len(GOOD)} bytes, has {len(GOOD) - 1}"),
    (3, "tail.safetensors"): (GOOD + b"PK\x05\x06", "too many after its last tensor"),
    (4, "pointer.safetensors"): (POINTER, "git-lfs pointer"),
    (4, "page.safetensors"): (PAGE, "web page"),
    (4, "answer.safetensors"): (b'{"error":"gated"}', "JSON text"),
    (4, "packed.safetensors"): (gzip.compress(GOOD), "gzip"),
    (4, "packed.pt"): (lzma.compress(GOOD), "xz"),
    (4, "folder.safetensors"): (zipped({"a.txt": b"a"}), "zip archive"),
    (4, "pickle.safetensors"): (pickle.dumps({"a": 1}), "pickle"),
    (5, "length.safetensors"): (struct.pack("<Q", 2**62) + b"{" * 90, "over the limit"),
    (5, "limit.safetensors"): (struct.pack("<Q", 100_000_008) + b"{" * 90, "over the limit"),
    (5, "beyond.safetensors"): (struct.pack("<Q", 9_999) + b"{" * 90, "needs 10007 bytes"),
    (6, "nested.safetensors"): (struct.pack("<Q", 60_000) + b'{"a":' * 12_000, "not JSON"),
    (7, "twice.safetensors"): (
        struct.pack("<Q", len(TWICE)) + TWICE + GOOD[8 + LENGTH :], "stands twice"
    ),
    (8, "overlap.safetensors"): (with_header(moved("0.bias", data_offsets=[4, 24])), "hole"),
    (8, "shape.safetensors"): (with_header(moved("0.bias", shape=[2**40, 2**40])), "too large"),
    (8, "negative.safetensors"): (with_header(moved("0.bias", shape=[-5])), "no counts"),
    (8, "reversed.safetensors"): (with_header(moved("0.bias", data_offsets=[20, 0])), "offsets"),
    (9, "nul.safetensors"): (with_header(lambda h: {**h, "a\0b": h["0.bias"]}), "NUL"),
    (14, "unknown.safetensors"): (with_header(moved("0.bias", dtype="F99")), "unknown dtype"),
    (15, "model.gguf"): (b"GGUF" + bytes(60), "quantised GGUF"),
    (15, "gptq.safetensors"): (packed_integers(), "quantised"),
    (21, "plain.bin"): (pickle.dumps({"w": np.zeros(3)}, 4), "a pickle can run code|pickle"),
    (24, "slip.npz"): (zipped({"../../x.npy": b"no array"}), "cut short or damaged|array"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "name"), BAD)
def test_bad_file_given_by_name_is_one_line_and_exit_3(run, tmp_path, row, name):
    data, said = BAD[row, name]
    (tmp_path / name).write_bytes(data)
    result = run("inspect", tmp_path / name)
    assert (result.code, result.out) == (3, ""), result
    lines = result.err.splitlines()
    assert lines[0].startswith(f"error: {tmp_path / name}: ")
    assert len(lines) <= 2
    assert any(part in result.err for part in said.split("|")), result.err
    assert "Traceback" not in result.err


def test_bad_files_in_a_zoo_are_named_and_the_rest_is_indexed(run, tmp_path):
    write_folder(tmp_path / "z", 2)
    for (_, name), (data, _) in BAD.items():
        (tmp_path / "z" / name).write_bytes(data)
    result = run("index", tmp_path / "z", "--out", tmp_path / "out", "--json")
    assert result.code == 4
    lost = {name for _, name in BAD} - {"gptq.safetensors"}  # sound, and listed as what it is
    assert result.json["checkpoints"] == 3
    assert {f["checkpoint"] for f in result.json["failed"]} == lost
    assert all(f["reason"] for f in result.json["failed"])
    assert run("index", tmp_path / "z", "--strict").code == 3


def test_names_from_hell_are_indexed_and_shown_as_text(run, tmp_path):  # rows 9, 10, 11
    state = network(0).state_dict()
    names = ["../../x", "con", "n" * 300, "\x1b[31mred\n\u202e"]
    evil = {f"{n}.{k}": t for n, (k, t) in zip(names, state.items(), strict=True)}
    folder = tmp_path / "z"
    folder.mkdir()
    raw = save(evil, {"activation": "relu"})
    for name in ("-x.safetensors", "two words.safetensors", "new\nline.safetensors"):
        (folder / name).write_bytes(raw)
    with open(os.fsencode(folder) + b"/\xff\xfe.safetensors", "wb") as file:
        file.write(raw)
    result = run("index", "z", "--out", "out")
    assert result.code in (3, 4)
    assert "not UTF-8" in result.err
    assert "\x1b" not in result.out + result.err
    assert run("inspect", "--", "z/-x.safetensors").code in (0, 3)
    code = run("augment", "z", "--group", "permutation", "--out", "copies").code
    assert code in (3, 4)
    assert sorted(os.listdir(tmp_path)) in (["out", "z"], ["copies", "out", "z"], ["z"])


def test_folder_of_traps_is_walked_and_left(run, tmp_path):  # row 25
    folder = write_folder(tmp_path / "z", 2)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "up.safetensors").symlink_to("/dev/zero")
    (folder / "away").symlink_to("/etc", target_is_directory=True)
    os.mkfifo(folder / "run0" / "pipe.safetensors")
    result = run("index", folder, "--out", tmp_path / "out", "--json")
    assert (result.code, result.json["checkpoints"]) == (4, 2)
    reasons = {f["checkpoint"]: f["reason"] for f in result.json["failed"]}
    assert "leaves the folder" in reasons["up.safetensors"]
    assert "not a regular file" in reasons["run0/pipe.safetensors"]


def test_values_that_are_not_numbers_are_flagged_and_json_stays_strict(run, tmp_path):  # row 12
    for i, value in enumerate([float("nan"), float("inf"), -1e38, 1e-45]):
        state = network(i).state_dict()
        state["0.weight"][0, 0] = value
        save_file(state, tmp_path / f"{i}.safetensors", {"activation": "relu"})
    result = run("index", ".", "--out", "out", "--json")
    assert (result.code, result.json["finite"]) == (0, 2)
    json.loads(result.out, parse_constant=pytest.fail)
    assert run("inspect", "0.safetensors", "--json").json["finite"] is False
    augmented = run("augment", "0.safetensors", "--group", "permutation", "--out", "copies")
    assert augmented.code == 3
    assert "not finite" in augmented.err


def test_setting_that_is_code_is_never_run(run, tmp_path):  # row 23
    canary = tmp_path / "canary"
    code = f"__import__('os').system('touch {canary}')"
    np.save(tmp_path / "weights.npy", np.zeros((9, 4970), np.float32))
    (tmp_path / "layout.csv").write_text(
        f'varname,start_idx,end_idx,size,shape\nsequential/conv2d/bias:0,0,16,16,"{code}"\n'
    )
    (tmp_path / "metrics.csv").write_text("a,step\n" + "x,86\n" * 9)
    result = run("index", ".", "--out", "out")
    assert result.code in (2, 3), result
    assert "Traceback" not in result.err
    assert not canary.exists()
    (tmp_path / "recipe.toml").write_text(f'models = "{code}"')
    assert run("build", "recipe.toml", "--out", "zoo").code == 2
    assert not canary.exists()


def bombs():
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    many = json.dumps({f"t{i}": entry for i in range(200_000)}).encode()
    return {
        "200 k tensors": (many, True),
        "50 MB of metadata": (json.dumps({"__metadata__": {"a": "x" * 50_000_000}}).encode(), True),
        "lists": (b'{"a":[' + b"[]," * 16_000_000 + b"[]]}", False),
        "numbers": (b'{"a":[' + b"1.5," * 12_000_000 + b"0]}", False),
        "brackets": (b'{"a":' + b"[" * 20_000_000, False),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["200 k tensors", "50 MB of metadata", "lists", "numbers", "brackets"]
)
def test_header_bomb_costs_little(name):  # row 6
    raw, sound = bombs()[name]
    data = struct.pack("<Q", len(raw)) + raw
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        started = time.process_time()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            header_of(lambda start, count: data[start : start + count], len(data), "bomb")
            held = True
        except InputError:
            held = False
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(writer, json.dumps([held, time.process_time() - started, grown]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    held, seconds, grown = json.loads(os.read(reader, 999))
    assert held is sound
    assert seconds < 10
    assert grown < 600_000  # kB


def shell(command, **environment):
    words = f"{sys.executable} -m qemcli"
    return subprocess.run(
        ["bash", "-c", command.replace("qem", words, 1)],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_closed_and_full_outputs_are_quiet(tmp_path):  # row 36
    folder = write_folder(tmp_path / "z", 3)
    files = " ".join(str(p) for p in folder.rglob("*.safetensors"))
    closed = shell(f"qem inspect {files} --json | head -c 1; exit ${{PIPESTATUS[0]}}")
    assert (closed.returncode, closed.stderr) == (0, "")
    full = shell(f"qem inspect {files} --json > /dev/full")
    assert (full.returncode, "Traceback" in full.stderr) == (5, False), full.stderr
    mute = shell(f"qem index {folder} --out {tmp_path}/out 2>&-")
    assert (mute.returncode, mute.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "environment"),
    [
        ("-O", {}), ("", {"PYTHONWARNINGS": "error"}), ("", {"HOME": "/nonexistent"}),
        ("", {"LANG": "C", "LC_ALL": "C", "COLUMNS": "20"}),
    ],
)  # fmt: skip
def test_odd_environments_change_nothing(tmp_path, options, environment):  # rows 36, 46
    folder = write_folder(tmp_path / "z", 3)
    words = [sys.executable, *options.split(), "-m", "qemcli", "index", folder, "--out", "out"]
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


def left_running(group, patience=5):
    """The processes of a group that still run; one that has ended and waits for pid 1 to take
    notice (multiprocessing's tracker of semaphores, mostly) runs no more."""
    deadline = time.monotonic() + patience
    while True:
        listed = subprocess.run(
            ["ps", "-eo", "pgid=,stat=,pid=,args="], capture_output=True, text=True
        )
        rows = [line.split(None, 3) for line in listed.stdout.splitlines()]
        found = [r[3] for r in rows if r[0] == str(group) and not r[1].startswith("Z")]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [2, 15])
def test_stopped_workers_leave_no_traceback_and_no_process(tmp_path, sent):  # rows 34, 35
    folder = write_folder(tmp_path / "z", 60)
    code = (
        "from qemcli.zoos import indexing; indexing.CHUNK_ROWS = 1\n"
        "import sys; from qemcli.cli import main\n"
        f"if __name__ == '__main__':\n    sys.argv = ['qem', 'index', '{folder}', '--workers',"
        f" '2', '--out', '{tmp_path}/out']\n    main()\n"
    )
    (tmp_path / "go.py").write_text(code)
    for wait in (0.5, 0.8, 1, 2, 4):
        running = subprocess.Popen(
            [sys.executable, "go.py"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            start_new_session=True,
        )  # fmt: skip
        time.sleep(wait)
        os.killpg(running.pid, sent)  # as a terminal does: to the workers too
        _, said = running.communicate(timeout=120)
        assert running.returncode in (128 + sent, -sent, 0), said
        assert "Traceback" not in said or running.returncode == -sent, said
        assert "go on with: qem index" in said or running.returncode in (-sent, 0), said
        assert not left_running(running.pid), said
