"""A million rows, small files and mapped arrays, against reading the bytes alone.

CPU seconds of one thread, so that other work on the machine does not show.
"""

import hashlib
import json
import os
import subprocess
import sys
import time

import numpy as np
import pandas
import pyarrow
import pytest
from pyarrow import parquet
from safetensors.numpy import save_file

from qemcli import spaces
from qemcli.zoos import sources
from qemcli.zoos.indexing import index
from qemcli.zoos.statistics import describe, digests
from qemcli.zoos.zoo import Zoo

ROWS = 1_000_000
SPACE = spaces.cnn([1, 3, 4], 5)
LARGER = spaces.cnn([1, 16, 16, 16], 10)


def cpu(work):
    started = time.process_time()
    work()
    return time.process_time() - started


def say(text):
    sys.stderr.write(f"\n{text}\n")


@pytest.fixture(scope="module")
def million(tmp_path_factory):
    root = tmp_path_factory.mktemp("million")
    arch, number, rng = sources.arch_id(SPACE), np.arange(ROWS), np.random.default_rng(0)
    (root / "weights" / arch).mkdir(parents=True)
    flat = rng.standard_normal((ROWS, SPACE.size), dtype=np.float32)
    shard = f"weights/{arch}/shard-00000.safetensors"
    save_file({"weights": flat}, root / shard, {"qem.space": SPACE.to_json()})
    table = pyarrow.table(
        {
            "uid": number, "row": number, "arch": pyarrow.repeat(arch, ROWS),
            "checkpoint": [f"run-{i // 9:06d}/step-{i % 9:05d}" for i in range(ROWS)],
            "shard": pyarrow.repeat(shard, ROWS), "file": pyarrow.nulls(ROWS),
            "activation": np.where(rng.random(ROWS) < 0.5, "relu", "tanh"),
            "step": (number % 9).astype(np.int32), "test_accuracy": rng.random(ROWS),
            "config.lr": rng.random(ROWS),
            "config.optimizer": np.array(["adam", "sgd"])[number % 2],
        }
    )  # fmt: skip
    stated = json.dumps({"version": 1, "spaces": {arch: SPACE.to_json()}, "source": "test"})
    table = table.replace_schema_metadata({b"qem.index": stated})
    parquet.write_table(table, root / "index.parquet", compression="zstd")
    (root / "zoo.json").write_text(json.dumps({"format": "qem-zoo", "version": 1}))
    return root


@pytest.mark.bench
def test_million_rows_are_filtered_within_a_second(million):
    opened = []
    seconds = cpu(lambda: opened.append(Zoo.open(million)))
    found = []
    filtered = cpu(lambda: found.append(opened[0].where("step == 8 and activation == 'relu'")))
    say(f"a million rows: opened in {seconds:.2f} s, filtered in {filtered:.2f} s")
    assert 50_000 < len(found[0]) < 60_000
    assert filtered < 1


@pytest.mark.bench
def test_million_rows_are_indexed_in_less_than_a_gigabyte(million, tmp_path):
    code = (
        "from pathlib import Path; from qemcli.zoos.indexing import index\n"
        f"print(index({str(million)!r}, out={str(tmp_path / 'out')!r})['checkpoints'])\n"
        # not ru_maxrss, which begins with the peak of the process that this one was forked from
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0][:-3])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, peak = map(int, done.stdout.split())
    say(f"a million rows indexed: peak {peak} MB")
    assert count == ROWS
    assert peak < 1024


@pytest.mark.bench
def test_small_files_against_reading_them_alone(tmp_path):
    rng = np.random.default_rng(0)
    shapes = [(16, 9), (16,), (16, 16, 9), (16,), (16, 16, 9), (16,), (10, 16), (10,)]
    names = [f"{i}.{n}" for i in range(4) for n in ("weight", "bias")]
    count = int(os.environ.get("QEM_BENCH_FILES", "20000"))
    for i in range(count):
        (tmp_path / "z" / f"{i // 500}").mkdir(parents=True, exist_ok=True)
        state = {
            n: rng.standard_normal(s, dtype=np.float32) for n, s in zip(names, shapes, strict=True)
        }
        save_file(state, tmp_path / "z" / f"{i // 500}" / f"{i}.safetensors")
    files = sorted(map(str, (tmp_path / "z").rglob("*.safetensors")))

    def alone():
        for file in files:
            with open(file, "rb") as opened:
                opened.read()

    def hashed():
        for file in files:
            with open(file, "rb") as opened:
                hashlib.sha256(opened.read()).digest()

    read, digest = (min(cpu(work) for _ in range(3)) for work in (alone, hashed))
    whole = cpu(lambda: index(tmp_path / "z", out=tmp_path / "out"))
    again = cpu(lambda: index(tmp_path / "z", out=tmp_path / "out", update=True))
    rates = [f"{count / s:.0f}/s" for s in (read, digest, whole, again)]
    say(
        f"bytes alone {rates[0]}, with their sha256 {rates[1]}, indexed with statistics {rates[2]} "
        f"({whole / read:.1f} and {whole / digest:.1f} times the seconds), --update {rates[3]}"
    )
    assert again < whole


@pytest.mark.bench
def test_mapped_array_is_read_at_half_the_bandwidth_of_memory(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "w.npy", rng.standard_normal((20_000, LARGER.size), dtype=np.float32))
    mapped = np.load(tmp_path / "w.npy", mmap_mode="r")
    held = np.array(mapped)
    table = pandas.DataFrame({"row": np.arange(len(held))})
    copied = min(cpu(held.copy) for _ in range(5))
    said = [f"copied {held.nbytes / copied / 1e9:.2f} GB/s"]
    taken = {}
    kernels = np.arange(LARGER.size).reshape(-1, 10).T.ravel()  # transposed, as Keras stores them
    for name, order in (("in order", np.arange(LARGER.size)), ("transposed", kernels)):
        source = sources.matrix(mapped, order)
        taken[name] = min(cpu(lambda s=source: s(LARGER, table)) for _ in range(5))
        said.append(f"{name} {held.nbytes / taken[name] / 1e9:.2f} GB/s")
    some = held[:2000]
    described = min(cpu(lambda: describe(LARGER, some)) for _ in range(3))
    hashed = min(cpu(lambda: digests(some)) for _ in range(3))
    said.append(f"statistics and sha256 {some.nbytes / described / 1e9:.2f} GB/s")
    said.append(f"sha256 alone {some.nbytes / hashed / 1e9:.2f} GB/s")
    say(", ".join(said))
    assert taken["in order"] < 2 * copied
