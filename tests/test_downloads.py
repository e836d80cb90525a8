"""qem download: everything that an argument means, or a failure that says what is missing."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from itertools import count

import pytest
from fake_web import Fault
from safetensors.torch import save
from zoo_files import network, write_folder

DATA = b"archive" * 5000
FILES = {
    "a.safetensors": save(network(0).state_dict()),
    "README.md": b"card",
    "b.bin": b"\1" * 5000,
}


@pytest.fixture
def card(tmp_path, monkeypatch):
    """Write the card of a published zoo called `far`."""

    def write(download, checksums=None):
        folder = tmp_path / "shipped" / "zoos" / "far"
        folder.mkdir(parents=True, exist_ok=True)
        sums = f"checksums: {json.dumps(checksums)}\n" if checksums else ""
        (folder / "README.md").write_text(
            f"---\nlicense: mit\ndownload: {json.dumps(download)}\n{sums}---\n# far\n"
        )
        for module in ("qemcli.zoos.published", "qemcli.zoos.resolve", "qemcli.downloads"):
            monkeypatch.setattr(f"{module}.shipped", lambda kind: tmp_path / "shipped" / kind)

    return write


def test_dry_run_tells_sizes_and_fetches_nothing(hub, run, tmp_path):
    commit = hub.add("owner/name", FILES)
    ran = run("download", "hf://owner/name", "--include", "*.bin", "--dry-run", "--json")
    assert ran.json["source"] == [f"hf://owner/name@{commit}"]
    assert (ran.json["files"], ran.json["bytes"]) == (1, 5000)
    assert ran.json["rows"][0]["checksum"].startswith("sha256:")
    assert not hub.cdn.asked
    assert "b.bin" in run("download", "hf://owner/name", "--dry-run").out


def test_repository_goes_to_a_folder_with_its_receipt(hub, run, tmp_path):
    commit = hub.add("owner/name", FILES, "dataset")
    for _ in range(2):
        ran = run("download", "hf://datasets/owner/name", "--dest", "d", "--json")
        assert (ran.code, ran.json["path"]) == (0, "d")
    assert {p: (tmp_path / "d" / p).read_bytes() for p in FILES} == FILES
    receipt = json.loads((tmp_path / "d" / "qem-download.json").read_text())
    assert receipt["pinned"] == [f"hf://datasets/owner/name@{commit}"]
    assert receipt["complete"] is True
    assert set(receipt["files"]) == set(FILES)
    assert len(hub.cdn.seen("GET")) == 2


def test_folder_of_somebody_else_is_left_alone(hub, run, tmp_path):
    hub.add("owner/name", FILES)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.safetensors").write_bytes(b"mine")
    ran = run("download", "hf://owner/name", "--dest", "d")
    assert (ran.code, "not empty" in ran.err) == (2, True)
    assert (tmp_path / "d" / "a.safetensors").read_bytes() == b"mine"


def test_download_that_was_cut_off_is_no_zoo_and_goes_on(hub, run, tmp_path):
    hub.add("owner/name", FILES)
    hub.cdn.faults += [Fault(hashlib.sha256(FILES["b.bin"]).hexdigest(), status=403, times=9)]
    assert run("download", "hf://owner/name", "--dest", "d").code == 5
    ran = run("index", "d", "--out", "i")
    assert ran.code == 3
    assert "qem download hf://owner/name --dest d" in ran.err
    hub.cdn.faults.clear()
    assert run("download", "hf://owner/name", "--dest", "d", "--quiet").code == 0
    assert run("index", "d", "--out", "i", "--activation", "relu").code in (0, 4)


def test_published_zoo_comes_by_its_name(hub, web, card, run, tmp_path, monkeypatch):
    monkeypatch.setenv("QEM_GCS", web.url)
    web.files["/bucket/mnist.tar.xz"] = DATA
    right = hashlib.md5(DATA).hexdigest()
    card(["gs://bucket/mnist.tar.xz"], {"mnist.tar.xz": f"md5:{right}"})
    assert "qem download far" in run("index", "far").err
    web.faults += [Fault("GET", cut=9000)]
    ran = run("download", "far", "--json")
    assert (ran.code, ran.json["path"], ran.json["bytes"]) == (0, "far", len(DATA))
    assert (tmp_path / "far" / "mnist.tar.xz").read_bytes() == DATA
    asked = len(web.seen("GET"))
    assert run("download", "far").code == 0
    assert len(web.seen("GET")) == asked  # nothing is fetched twice
    (tmp_path / "far" / "mnist.tar.xz").write_bytes(DATA[:-1] + b"x")
    assert run("download", "far").code == 0
    assert (tmp_path / "far" / "mnist.tar.xz").read_bytes() == DATA


def test_wrong_checksum_of_a_card_is_no_success(hub, web, card, run, tmp_path):
    web.files["/a.zip"] = DATA
    card([f"{web.url}/a.zip"], {"a.zip": "md5:" + "0" * 32})
    ran = run("download", "far", "--dest", "d")
    assert (ran.code, "not those that were published" in ran.err) == (5, True)
    assert not (tmp_path / "d" / "a.zip").exists()


def test_what_only_a_browser_fetches_is_told(hub, card, run):
    card(["https://drive.google.com/drive/folders/15Cd"])
    ran = run("download", "far")
    assert ran.code == 5
    assert "https://drive.google.com/drive/folders/15Cd" in ran.err
    assert "qem index ARCHIVE" in ran.err


def test_offline_forbids_every_address(hub, web, run, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run("download", f"{web.url}/a.zip").code == 5
    assert run("download", "hf://owner/name").code == 5
    assert not web.asked


def test_arguments_that_mean_nothing_are_named(hub, card, run):
    card(["https://host/a.zip"])
    assert "Did you mean 'far'" in run("download", "fra").err
    assert run("download", "hf://nothing").code == 2
    hub.add("owner/name", FILES)
    ran = run("download", "hf://owner/name", "--include", "*.zip")
    assert (ran.code, "README.md" in ran.err) == (3, True)


def test_zoo_and_checkpoint_are_read_from_the_hub(hub, run, tmp_path):
    root = write_folder(tmp_path / "z")
    files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.safetensors")}
    hub.add("owner/zoo", files, "dataset")
    hub.add("owner/net", {"model.safetensors": FILES["a.safetensors"]})
    ran = run("index", "hf://datasets/owner/zoo/run0", "--json")
    assert (ran.json["checkpoints"], ran.json["index"]) == (3, "zoo-index/index.parquet")
    ran = run("inspect", "hf://owner/net/model.safetensors", "--json")
    assert ran.json["parameters"] == 44


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_download_that_was_killed_goes_on_where_it_was(hub, web, tmp_path, end):
    web.files["/far.zip"] = DATA
    web.faults += [Fault("GET", cut=20000, hang=True)]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "c")}
    command = [sys.executable, "-m", "qemcli", "download", f"{web.url}/far.zip", "--dest", "d"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ignored in background jobs
    first = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, preexec_fn=heard
    )
    part = tmp_path / "d" / ".far.zip.part"
    wait = threading.Event().wait  # time.sleep is the fixture's
    for tries in count():
        if part.is_file() and part.stat().st_size == 20000:
            break
        assert tries < 3000
        wait(0.02)
    first.send_signal(end)
    said = first.communicate()[1].decode()
    assert first.returncode == (-9 if end == signal.SIGKILL else 130)
    assert end == signal.SIGKILL or "go on with: qem download" in said
    assert not (tmp_path / "d" / "far.zip").exists()
    assert subprocess.run(command, cwd=tmp_path, env=environment, check=False).returncode == 0
    assert web.asked[-1].headers["range"] == "bytes=20000-"
    assert (tmp_path / "d" / "far.zip").read_bytes() == DATA


def test_real_process_fetches_from_the_hub_and_then_offline(hub, tmp_path):
    hub.add("owner/name", FILES)
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(tmp_path / "c"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONWARNINGS": "error",
    }
    command = [sys.executable, "-m", "qemcli", "download", "hf://owner/name", "--json"]
    shown = []
    for offline in ("0", "1"):
        environment["HF_HUB_OFFLINE"] = offline
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        assert "hf_secret" not in ran.stderr + ran.stdout
        shown.append(json.loads(ran.stdout)["path"])
        asked = len(hub.web.asked)
    assert shown[0] == shown[1]
    assert asked == len(hub.web.asked)


def test_archive_that_was_downloaded_is_the_zoo(hub, web, run, tmp_path):
    from qemcli.zoos.resolve import locate

    web.files["/far.npz"] = DATA
    ran = run("download", f"{web.url}/far.npz")
    assert (ran.code, "1 by length alone" in ran.err) == (0, True)
    assert locate("far").name == "far.npz"
    (tmp_path / "far" / "index.parquet").write_bytes(b"")
    assert locate("far").name == "far"


def test_twins_for_other_libraries_are_not_fetched(hub, tmp_path):
    from qemcli.zoos.resolve import locate

    hub.add("owner/net", {**FILES, "pytorch_model.bin": b"same", "onnx/model.onnx": b"same"})
    folder = locate("hf://owner/net")
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == set(FILES)
    assert locate("hf://owner/net/pytorch_model.bin").read_bytes() == b"same"
