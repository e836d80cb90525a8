"""Repositories of the Hub: fetched whole and checked, or not at all."""

import pytest

from qemcli.errors import EnvironmentFailure, InputError, UsageError
from qemcli.hub import fetching
from qemcli.hub.reference import Reference

FILES = {
    "README.md": b"a card",
    "a.safetensors": b"\x10" * 3000,
    "deep/b.safetensors": b"\x11" * 70000,
    "deep/c.txt": b"",
    "config.json": b"{}",
}


def fetched(text, **options):
    return fetching.fetch(Reference.parse(text), **options)


def test_reference_is_read_and_written_alike():
    for text in (
        "hf://owner/name",
        "hf://datasets/owner/na.me@v1.0",
        "hf://owner/name@refs%2Fpr%2F1/deep/file.bin",
        "hf://datasets/owner/name/deep",
    ):
        assert str(Reference.parse(text)) == text
    assert Reference.parse("hf://o/n@refs/pr/3/x") == Reference("o/n", "model", "refs/pr/3", "x")
    for text in ("hf://nothing", "hf://o/n/../../x", "hf://", "hf://o/n@", "hf://../n"):
        with pytest.raises(UsageError, match="hf://"):
            Reference.parse(text)


def test_repository_comes_whole_over_all_pages(hub):
    commit = hub.add("owner/name", FILES)
    moved = []
    folder = fetched("hf://owner/name", advance=moved.append)
    assert folder.name == commit
    assert {p: (folder / p).read_bytes() for p in FILES} == FILES
    assert sum(moved) == sum(map(len, FILES.values()))
    assert len(hub.web.seen("/tree/")) == 3
    hub.web.asked.clear()
    assert fetched("hf://owner/name") == folder
    assert len(hub.web.asked) == 1  # which commit main is
    hub.web.asked.clear()
    assert fetched(f"hf://owner/name@{commit}") == folder
    assert not hub.web.asked


def test_path_and_patterns_choose(hub):
    hub.add("owner/name", FILES)
    folder = fetched("hf://owner/name/deep")
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["b.safetensors", "c.txt"]
    fetched("hf://owner/name", include=["*.json"])
    assert (folder / "config.json").is_file()
    assert not (folder / "a.safetensors").exists()
    with pytest.raises(InputError, match=r"holds no 'x\*'") as caught:
        fetched("hf://owner/name", include=["x*"])
    assert "README.md" in str(caught.value.hint)


def test_token_stays_with_the_hub(hub):
    hub.add("owner/name", FILES, private=True)
    fetched("hf://owner/name")
    assert all("authorization" in asked.headers for asked in hub.web.asked)
    assert len(hub.cdn.asked) == 2
    assert not any("authorization" in asked.headers for asked in hub.cdn.asked)


@pytest.mark.parametrize("cut", [0, 1, 2999, 69999])
def test_body_that_breaks_off_is_fetched_on(hub, cut):
    from fake_web import Fault

    hub.add("owner/name", FILES)
    hub.cdn.faults += [Fault("GET", cut=cut, times=2)]
    folder = fetched("hf://owner/name")
    assert {p: (folder / p).read_bytes() for p in FILES} == FILES
    assert len(hub.cdn.asked) > 2


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("where", ["/tree/", "HEAD /owner/name", "GET /owner/name/resolve"])
def test_busy_hub_is_asked_again(hub, waits, status, where):
    from fake_web import Fault

    hub.add("owner/name", FILES)
    hub.web.faults += [Fault(where, status=status, headers={"Retry-After": "7"})]
    folder = fetched("hf://owner/name")
    assert all((folder / path).is_file() for path in FILES)
    assert waits or where.startswith("HEAD")


@pytest.mark.parametrize(("status", "message"), [(429, "fewer requests"), (500, "answers 500")])
def test_hub_that_stays_busy_is_no_success(hub, status, message):
    from fake_web import Fault

    hub.add("owner/name", FILES)
    hub.cdn.faults += [Fault("GET", status=status, times=99)]
    with pytest.raises(EnvironmentFailure, match=message) as caught:
        fetched("hf://owner/name")
    assert "hf_secret" not in caught.value.message
    assert str(hub.cdn.port) not in caught.value.message
    hub.cdn.faults.clear()
    assert (fetched("hf://owner/name") / "a.safetensors").is_file()


@pytest.mark.parametrize("name", ["a.safetensors", "README.md"])
def test_wrong_bytes_are_found_and_deleted(hub, name):
    from fake_web import Fault

    hub.add("owner/name", FILES)
    server = hub.cdn if name.endswith("safetensors") else hub.web
    server.faults += [
        Fault("GET /blob" if server is hub.cdn else "GET /owner/name/resolve", corrupt=True)
    ]
    with pytest.raises(EnvironmentFailure, match="not those that the repository names"):
        fetched("hf://owner/name", include=[name])
    folder = fetched("hf://owner/name", include=[name])
    assert (folder / name).read_bytes() == FILES[name]


def test_file_damaged_in_the_cache_is_found(hub):
    hub.add("owner/name", FILES)
    path = fetched("hf://owner/name") / "a.safetensors"
    path.resolve().write_bytes(b"\x12" * 3000)
    with pytest.raises(EnvironmentFailure, match="not those"):
        fetched("hf://owner/name")
    assert (fetched("hf://owner/name") / "a.safetensors").read_bytes() == FILES["a.safetensors"]


def test_missing_file_is_no_success(hub):
    from fake_web import Fault

    hub.add("owner/name", FILES)
    lacking = {"X-Error-Code": "EntryNotFound"}
    hub.web.faults += [Fault("HEAD /owner/name", status=404, headers=lacking)]
    with pytest.raises(EnvironmentFailure, match="lists is not there"):
        fetched("hf://owner/name")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf://owner/nothing", "no such repository"),
        ("hf://owner/name@v9", "no revision 'v9'"),
        ("hf://owner/gated", "a gated repository"),
        ("hf://datasets/owner/name", "no such repository"),
    ],
)
def test_refusals_are_told_apart(hub, monkeypatch, text, message):
    monkeypatch.delenv("HF_TOKEN")
    hub.add("owner/name", FILES)
    hub.add("owner/gated", FILES, gated=True)
    with pytest.raises(EnvironmentFailure, match=message) as caught:
        fetched(text)
    assert caught.value.hint


def test_name_that_points_out_is_refused(hub, tmp_path):
    for name in ("../evil.safetensors", "/etc/evil", "a\\..\\b", "x/../../y", ".git/hooks/x"):
        hub.repos.clear()
        hub.add("owner/name", {name: b"evil"})
        with pytest.raises(UsageError, match="points out"):
            fetched("hf://owner/name", dest=tmp_path / "d")


def test_offline_answers_from_the_cache(hub, monkeypatch):
    from huggingface_hub import constants

    commit = hub.add("owner/name", FILES)
    folder = fetched("hf://owner/name", include=["*.json", "README.md"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.web.asked.clear()
    assert fetched("hf://owner/name", include=["*.json"]) == folder
    assert fetched(f"hf://owner/name@{commit}", include=["README.md"]) == folder
    assert not hub.web.asked
    with pytest.raises(EnvironmentFailure, match="not in the cache"):
        fetched("hf://owner/name")
    with pytest.raises(EnvironmentFailure, match="not in the cache"):
        fetched("hf://owner/other")


def test_offline_takes_what_another_tool_has_cached(hub, monkeypatch):
    from huggingface_hub import constants, snapshot_download

    hub.add("owner/name", FILES)
    snapshot_download("owner/name", endpoint=hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = fetched("hf://owner/name")
    assert {p: (folder / p).read_bytes() for p in FILES} == FILES
    (folder / "a.safetensors").resolve().write_bytes(b"damaged")
    with pytest.raises(EnvironmentFailure, match="not those"):
        fetched("hf://owner/name")


def test_network_that_is_away_leaves_the_cache(hub):
    from fake_web import Fault

    hub.add("owner/name", FILES)
    folder = fetched("hf://owner/name")
    hub.web.faults += [Fault("/api/", status=503, times=99)]
    assert fetched("hf://owner/name") == folder


def test_interrupted_fetch_keeps_finished_files(hub):
    hub.add("owner/name", {f"{i}.bin": bytes([i]) * 2000 for i in range(20)})
    seen = []

    def advance(size):
        seen.append(size)
        if len(seen) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetched("hf://owner/name", advance=advance)
    before = len(hub.cdn.asked)
    assert 0 < before < 40
    folder = fetched("hf://owner/name")
    assert len(list(folder.iterdir())) == 20
    assert len(hub.cdn.asked) < before + 20
