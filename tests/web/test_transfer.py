"""Files over HTTP: whole and checked, or not under their name."""

import hashlib
import json

import pytest
from fake_web import Fault

from qemcli.errors import EnvironmentFailure, UsageError
from qemcli.web import sources, transfer
from qemcli.web.transfer import Remote

DATA = bytes(range(256)) * 300
SHA256 = f"sha256:{hashlib.sha256(DATA).hexdigest()}"


@pytest.fixture
def http():
    with transfer.client() as client:
        yield client


def fetched(http, web, folder, **known):
    web.files.setdefault("/a.zip", DATA)
    moved = []
    transfer.download(http, Remote(f"{web.url}/a.zip", "a.zip", **known), folder, moved.append)
    data = (folder / "a.zip").read_bytes()
    assert [p.name for p in folder.iterdir()] == ["a.zip"]
    assert sum(moved) == len(data)
    return data


@pytest.mark.parametrize("cut", [0, 1, 511, len(DATA) - 1])
def test_connection_that_breaks_off_is_taken_up_where_it_was(http, web, tmp_path, cut):
    web.faults += [Fault("GET", cut=cut)]
    assert fetched(http, web, tmp_path, checksum=SHA256) == DATA
    ranges = [asked.headers.get("range") for asked in web.asked]
    assert ranges == [None, f"bytes={cut}-" if cut else None]


def test_server_that_sends_a_little_each_time_is_outlasted(http, web, tmp_path):
    web.faults += [Fault("GET", cut=9000, times=8)]
    assert fetched(http, web, tmp_path) == DATA
    assert len(web.asked) == 9


def test_server_that_sends_nothing_is_left_after_five_tries(http, web, tmp_path):
    web.faults += [Fault("GET", cut=0, times=99)]
    with pytest.raises(EnvironmentFailure, match="broke off"):
        fetched(http, web, tmp_path)
    assert len(web.asked) == transfer.TRIES
    assert not (tmp_path / "a.zip").exists()


def test_run_that_was_cut_off_is_taken_up_by_the_next(http, web, tmp_path):
    web.files["/a.zip"] = DATA
    web.faults += [Fault("GET", cut=5000), Fault("GET", status=404)]
    with pytest.raises(EnvironmentFailure, match="404"):
        fetched(http, web, tmp_path)
    assert (tmp_path / ".a.zip.part").stat().st_size == 5000
    assert fetched(http, web, tmp_path) == DATA
    assert web.asked[-1].headers["range"] == "bytes=5000-"


def test_part_of_another_version_is_thrown_away(http, web, tmp_path):
    web.files["/a.zip"] = b"old" * 9000
    web.faults += [Fault("GET", cut=5000), Fault("GET", status=404)]
    with pytest.raises(EnvironmentFailure):
        fetched(http, web, tmp_path)
    web.files["/a.zip"] = DATA
    assert fetched(http, web, tmp_path, checksum=SHA256) == DATA


def test_part_of_which_nothing_is_known_is_thrown_away(http, web, tmp_path):
    (tmp_path / ".a.zip.part").write_bytes(b"someone's")
    assert fetched(http, web, tmp_path) == DATA
    assert "range" not in web.asked[0].headers


@pytest.mark.parametrize("fault", [{"no_range": True}, {"status": 416}])
def test_server_without_range_sends_all_of_it_again(http, web, tmp_path, fault):
    web.faults += [Fault("GET", cut=5000), Fault("GET", **fault)]
    assert fetched(http, web, tmp_path, checksum=SHA256) == DATA


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_busy_server_is_asked_again(http, web, waits, tmp_path, status):
    web.faults += [Fault("GET", status=status, headers={"Retry-After": "11"})]
    assert fetched(http, web, tmp_path) == DATA
    assert waits == [11]


def test_server_that_asks_for_an_hour_is_believed(http, web, waits, tmp_path):
    web.faults += [Fault("GET", status=429, headers={"Retry-After": "3600"})]
    with pytest.raises(EnvironmentFailure, match="3600 s"):
        fetched(http, web, tmp_path)
    assert not waits


@pytest.mark.parametrize("known", [{"checksum": SHA256}, {"checksum": f"md5:{'0' * 32}"}])
def test_wrong_bytes_are_deleted(http, web, tmp_path, known):
    web.faults += [Fault("GET", corrupt=True)]
    with pytest.raises(EnvironmentFailure, match="not those that were published"):
        fetched(http, web, tmp_path, **known)
    assert not list(tmp_path.iterdir())


def test_wrong_size_is_found_before_anything_is_fetched(http, web, tmp_path):
    with pytest.raises(EnvironmentFailure, match="7 were published"):
        fetched(http, web, tmp_path, size=7)
    assert not (tmp_path / "a.zip").exists()


def test_cloud_storage_states_a_checksum_that_is_kept(http, web, tmp_path):
    import base64

    right = base64.b64encode(hashlib.md5(DATA).digest()).decode()
    web.extra["/a.zip"] = {"x-goog-hash": f"crc32c=AAAAAA==,md5={right}"}
    assert fetched(http, web, tmp_path) == DATA
    (tmp_path / "a.zip").unlink()
    web.faults += [Fault("GET", corrupt=True)]
    with pytest.raises(EnvironmentFailure, match="md5"):
        fetched(http, web, tmp_path)


@pytest.mark.parametrize("fault", [Fault("GET", page=True), Fault("GET", status=403)])
def test_page_instead_of_a_file_is_named(http, web, tmp_path, fault):
    web.faults += [fault]
    with pytest.raises(EnvironmentFailure, match=r"web page|403"):
        fetched(http, web, tmp_path)


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/a.zip"])
def test_redirect_to_another_scheme_is_refused(http, web, tmp_path, to):
    web.moved["/a.zip"] = to
    with pytest.raises((EnvironmentFailure, UsageError)):
        fetched(http, web, tmp_path)
    assert not (tmp_path / "a.zip").exists()


def test_redirect_is_followed_and_a_loop_is_not(http, web, tmp_path):
    web.moved["/b.zip"] = f"http://localhost:{web.port}/a.zip"
    web.files["/a.zip"] = DATA
    transfer.download(http, Remote(f"{web.url}/b.zip", "b.zip"), tmp_path, lambda n: None)
    assert (tmp_path / "b.zip").read_bytes() == DATA
    web.moved["/a.zip"] = f"{web.url}/a.zip"
    with pytest.raises(EnvironmentFailure, match="redirected 10 times"):
        fetched(http, web, tmp_path)


def test_checksum_that_is_none_counts_as_none(http, web, tmp_path):
    web.faults += [Fault("GET", headers={"x-goog-hash": "md5=x"})]
    assert fetched(http, web, tmp_path) == DATA


def test_part_that_got_its_name_before_it_was_held_is_left_alone(tmp_path, monkeypatch):
    part, target = tmp_path / ".a.part", tmp_path / "a"
    part.write_bytes(DATA)
    held = transfer.fcntl.flock

    def flock(file, how):
        part.rename(target)  # by the one who held it
        held(file, how)

    monkeypatch.setattr(transfer.fcntl, "flock", flock)
    with pytest.raises(EnvironmentFailure, match="another qem download"), transfer._alone(part):
        pass
    assert target.read_bytes() == DATA


def test_second_writer_is_told(http, web, tmp_path):
    import fcntl

    with (tmp_path / ".a.zip.part").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(EnvironmentFailure, match="another qem download"):
            fetched(http, web, tmp_path)


def test_full_disk_is_seen_before(http, web, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(9, 8, 1))
    with pytest.raises(EnvironmentFailure, match="1 are free"):
        fetched(http, web, tmp_path)


def test_addresses_are_told_apart(http, web, monkeypatch):
    monkeypatch.setenv("QEM_GCS", web.url)
    for text in (
        "gs://bucket/a/b.tar.xz",
        "https://storage.cloud.google.com/bucket/a/b.tar.xz?x=1",
    ):
        assert sources.expand(http, text) == [Remote(f"{web.url}/bucket/a/b.tar.xz", "b.tar.xz")]
    for host in ("drive.google.com/drive/folders/1", "www.dropbox.com/sh/56?dl=0"):
        assert isinstance(sources.expand(http, f"https://{host}"), sources.Share)
    for text in ("https://user:secret@host/a.zip", "https://host/", "ftp://host/a", "https://h/.."):
        with pytest.raises(UsageError) as caught:
            sources.expand(http, text)
        assert "secret" not in caught.value.message


def record(web, files):
    listed = [
        {
            "key": name,
            "size": len(data),
            "checksum": f"md5:{hashlib.md5(data).hexdigest()}",
            "links": {"self": f"{web.url}/api/records/7/files/{name}/content"},
        }
        for name, data in files.items()
    ]
    web.files["/api/records/7"] = json.dumps({"id": 7, "files": listed}).encode()
    for name, data in files.items():
        web.files[f"/api/records/7/files/{name}/content"] = data


def test_zenodo_record_tells_its_files(http, web, monkeypatch):
    monkeypatch.setenv("QEM_ZENODO", web.url)
    record(web, {"a.zip": DATA, "b.zip": b"b"})
    for text in ("zenodo:7", "https://zenodo.org/record/7", "https://doi.org/10.5281/zenodo.7"):
        found = sources.expand(http, text)
        assert [(r.name, r.size, r.checksum[:4]) for r in found] == [
            ("a.zip", len(DATA), "md5:"),
            ("b.zip", 1, "md5:"),
        ]
    one = sources.expand(http, "https://zenodo.org/records/7/files/b.zip?download=1")
    assert [r.name for r in one] == ["b.zip"]
    with pytest.raises(EnvironmentFailure, match=r"holds no 'c.zip'"):
        sources.expand(http, "https://zenodo.org/records/7/files/c.zip")
    for broken in (b"{}", b"[", b'{"files": [{"key": "../x", "size": 1, "checksum": "md5:0"}]}'):
        web.files["/api/records/7"] = broken
        with pytest.raises((EnvironmentFailure, UsageError)):
            sources.expand(http, "zenodo:7")
