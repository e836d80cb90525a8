"""What is not a checkpoint is said to be what it is, in one line with what to do."""

import gzip
import os
import socket
import zipfile

import pytest

from qemcli.checkpoints import open_checkpoint
from qemcli.errors import EnvironmentFailure, InputError, UsageError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
IMPOSTORS = {
    "git-lfs": (POINTER, "git-lfs pointer"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "json": (b'{"error": "Repository not found"}', "JSON text"),
    "gzip": (gzip.compress(b"x" * 100), "gzip"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
    "gguf": (b"GGUF" + bytes(50), "GGUF"),
    "pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94.", "pickle"),
    "empty": (b"", "empty"),
    "short": (b"abc", "cut short"),
    "noise": (bytes(range(200, 250)), "no format|over the limit"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz", ""])
@pytest.mark.parametrize("name", IMPOSTORS)
def test_impostor_is_named(name, suffix, tmp_path):
    data, what = IMPOSTORS[name]
    file = tmp_path / f"file{suffix}"
    file.write_bytes(data)
    with pytest.raises(InputError, match=what) as caught:
        open_checkpoint(file)
    assert caught.value.exit_code == 3
    assert caught.value.message.startswith(f"{file}: ")
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_zip_named_safetensors_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.safetensors", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(InputError, match="zip archive that holds no checkpoint"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_missing_path_and_folder_are_wrong_usage(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(UsageError):
            open_checkpoint(path)


def test_pipe_and_socket_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "fifo.pt")
    with pytest.raises(InputError, match="not a regular file"):
        open_checkpoint(tmp_path / "fifo.pt")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s.pt"))
        with pytest.raises(InputError, match="not a regular file"):
            open_checkpoint(tmp_path / "s.pt")


def test_unreadable_file_is_the_machines_fault(tmp_path, monkeypatch):
    file = tmp_path / "a.pt"
    file.write_bytes(b"x" * 20)

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(EnvironmentFailure, match="permission denied"):
        open_checkpoint(file)
