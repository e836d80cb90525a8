"""Folders and archives that were made to be walked for ever, or to fill memory or the disk."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import tarfile
import time

import pytest
import torch
from zoo_files import network, write_folder

from qemcli.zoos import unpacking
from qemcli.zoos.members import DEEPEST, Folder, tree
from qemcli.zoos.scan import listing


def nest(folder, levels):
    """Folders in folders; a path longer than PATH_MAX is made step by step."""
    held = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=held)
        below = os.open("d", os.O_RDONLY, dir_fd=held)
        os.close(held)
        held = below
    os.close(held)


@pytest.fixture
def deep(tmp_path):
    """A folder of two networks and 1050 folders in folders; taken apart again, which neither
    shutil nor pytest can."""
    root = write_folder(tmp_path / "z", 2)
    nest(root, 1050)
    yield root
    subprocess.run(["rm", "-rf", root / "d"], check=True)


def test_folders_without_end_are_named_and_the_rest_is_indexed(deep, tmp_path, run):
    found = listing(deep)
    assert len(found.entries) == 2
    assert [f["reason"] for f in found.failures] == ["more than 100 folders deep: not looked into"]
    assert found.failures[0]["checkpoint"].count("/") == DEEPEST
    members = [m for m in Folder(deep).members() if m.reason]
    assert [m.name.count("/") for m in members] == [DEEPEST]
    result = run("index", deep, "--out", tmp_path / "out", "--json")
    assert (result.code, result.json["checkpoints"]) == (4, 2), result.err


def packed_net():
    held = io.BytesIO()
    torch.save(network(0).state_dict(), held)
    return held.getvalue()


def giant_head(path, form, size):
    """A tar of a network, then a header that claims to be `size` bytes long, in a hole."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        raw = packed_net()
        info = tarfile.TarInfo("runs/a.pt")
        info.size = len(raw)
        archive.addfile(info, io.BytesIO(raw))
        end = archive.offset
    head = tarfile.TarInfo("giant")
    head.type, head.size = form, size
    with path.open("r+b") as file:
        file.seek(end)
        file.write(head.tobuf(tarfile.GNU_FORMAT))
        file.truncate(end + 512 + size + 1024)  # a hole: it takes no room


@pytest.mark.parametrize("form", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_giant_header_of_a_plain_tar_is_not_read(tmp_path, run, form):
    giant_head(tmp_path / "a.tar", form, 3 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = tree(tmp_path / "a.tar")
    names = [(m.name, m.reason) for m in found.members()]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert names[0] == ("runs/a.pt", None)
    assert f"a header of {3 << 30} bytes" in names[1][1]
    result = run("index", tmp_path / "a.tar", "--out", tmp_path / "out", "--json")
    assert (result.code, result.json["checkpoints"]) == (4, 1), result.err


def test_header_of_digits_is_no_long_search(tmp_path):
    """Python's own search in such a header takes the square of its length."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.XHDTYPE, unpacking.LARGEST_HEAD
        archive.addfile(info, io.BytesIO(b"1" * info.size))
    started = time.process_time()
    list(tree(tmp_path / "a.tar").members())
    assert time.process_time() - started < 3


def test_unpacked_archives_are_removed_oldest_first(tmp_path, monkeypatch):
    monkeypatch.setenv("QEM_CACHE", str(tmp_path / "cache"))
    kept = []
    for i in range(4):
        with tarfile.open(tmp_path / f"{i}.tar.gz", "w:gz") as archive:
            info = tarfile.TarInfo("a.pt")
            info.size = 20_000
            archive.addfile(info, io.BytesIO(os.urandom(info.size)))
        if i == 3:
            monkeypatch.setattr(unpacking, "KEPT", 70_000)
            os.utime(kept[0], ns=(4 * 10**9, 4 * 10**9))  # the first was used last
        kept.append(unpacking.unpacked(tmp_path / f"{i}.tar.gz"))
        os.utime(kept[-1], ns=((i + 1) * 10**9, (i + 1) * 10**9))
    assert [path.is_file() for path in kept] == [True, False, False, True]
    again = unpacking.unpacked(tmp_path / "1.tar.gz")
    assert again == kept[1]
    assert again.is_file()
