"""A Hub on this machine: enough of its endpoints that the real client reads and writes it.

Large files are answered from another origin (a second port), as the real one does; `page` files fit
on a page of the tree.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from fake_web import Asked, Reply, Web, whole

LARGE = (".safetensors", ".parquet", ".bin", ".pt", ".zip")


@dataclass
class Repo:
    """A repository: its commits, oldest first, and the names of some."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes]) -> str:
        """A new commit on main; returns its id."""
        number = f"{len(self.commits)}{sorted(files)}"
        oid = hashlib.sha1(number.encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.refs["main"] = oid
        return oid


def git_id(data: bytes) -> str:
    """Git's id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class FakeHub:
    """The server; `web.faults` and `cdn.faults` are what goes wrong."""

    def __init__(self, page: int = 2) -> None:
        self.page, self.mangle = page, False
        self.repos: dict[tuple[str, str], Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.web, self.cdn = Web(self._answer), Web(self._blob)
        self.url = self.web.url

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        """Serve until the block ends."""
        with self.web.running(), self.cdn.running():
            yield self

    def add(self, name: str, files: dict[str, bytes], kind: str = "model", **more: Any) -> str:
        """A repository with one commit (or one more); returns the commit."""
        repo = self.repos.setdefault((kind, name), Repo(**more))
        for data in files.values():
            self.stored[hashlib.sha256(data).hexdigest()] = data
        return repo.commit(files)

    def _blob(self, asked: Asked, body: bytes) -> Reply:
        oid = urlsplit(asked.path).path.rsplit("/", 1)[-1]
        if asked.method == "PUT":
            self.stored[oid] = body[::-1] if self.mangle else body
            return Reply()
        return whole(self.stored[oid]) if oid in self.stored else Reply(404)

    def _answer(self, asked: Asked, body: bytes) -> Reply:
        url = urlsplit(asked.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[:1] == ["api"]:
            return self._api(asked, parts[1:], parse_qs(url.query), body)
        kind = "dataset" if parts[0] == "datasets" else "model"
        parts = parts[1:] if kind == "dataset" else parts
        if parts[1].endswith(".git"):
            return self._batch(json.loads(body))
        repo, commit = self._at(kind, "/".join(parts[:2]), parts[3], asked)
        return commit if repo is None else self._resolve(repo, commit, "/".join(parts[4:]))

    def _at(self, kind: str, name: str, revision: str, asked: Asked) -> tuple[Any, Any]:
        """(repository, commit), or (None, the refusal)."""
        repo = self.repos.get((kind, name))
        if repo is None or (repo.private and "authorization" not in asked.headers):
            return None, refusal(404, "RepoNotFound")
        if repo.gated and "authorization" not in asked.headers:
            return None, refusal(401, "GatedRepo")
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return None, refusal(404, "RevisionNotFound")
        return repo, commit

    def _resolve(self, repo: Repo, commit: str, path: str) -> Reply:
        data = repo.commits[commit].get(path)
        if data is None:
            return refusal(404, "EntryNotFound", {"X-Repo-Commit": commit})
        if not path.endswith(LARGE):
            return whole(data, {"X-Repo-Commit": commit, "ETag": f'"{git_id(data)}"'})
        oid = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        where = {"Location": f"{self.cdn.url}/blob/{oid}", "X-Repo-Commit": commit}
        return Reply(302, b"", {**where, **linked})

    def _api(self, asked: Asked, parts: list[str], query: Any, body: bytes) -> Reply:
        if parts == ["repos", "create"]:
            return self._create(json.loads(body))
        if parts == ["validate-yaml"]:
            return said({"errors": [], "warnings": []})
        if parts == ["whoami-v2"]:
            return said({"name": "owner", "type": "user", "orgs": []})
        kind, name = parts[0].rstrip("s"), "/".join(parts[1:3])
        what = parts[3] if len(parts) > 3 else ""
        revision = parts[4] if len(parts) > 4 else "main"
        repo, commit = self._at(kind, name, revision, asked)
        if repo is None:
            return commit
        if what in ("", "revision"):
            names = [{"rfilename": path} for path in repo.commits[commit]]
            return said({"id": name, "sha": commit, "siblings": names, "private": repo.private})
        return getattr(self, f"_{what}")(repo, commit, asked, query, body)

    def _create(self, given: dict[str, Any]) -> Reply:
        name = "/".join(filter(None, [given.get("organization"), given["name"]]))
        kind = given.get("type") or "model"
        url = f"{self.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.repos:
            return Reply(409, json.dumps({"url": url}).encode())
        private = given.get("visibility") == "private" or given.get("private") is True
        self.repos[kind, name] = Repo(private=private)
        self.repos[kind, name].commit({})
        return said({"url": url})

    def _tree(self, repo: Repo, commit: str, asked: Asked, query: Any, body: bytes) -> Reply:
        listed = [entry(path, data) for path, data in sorted(repo.commits[commit].items())]
        start = int(query.get("cursor", ["0"])[0])
        reply = said(listed[start : start + self.page])
        if start + self.page < len(listed):
            path = urlsplit(asked.path).path
            following = f"{self.url}{path}?recursive=true&cursor={start + self.page}"
            reply.headers["Link"] = f'<{following}>; rel="next"'
        return reply

    def _preupload(self, repo: Repo, commit: str, asked: Asked, query: Any, body: bytes) -> Reply:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return said({"files": modes})

    def _batch(self, given: dict[str, Any]) -> Reply:
        objects = []
        for item in given["objects"]:
            href = {"href": f"{self.cdn.url}/blob/{item['oid']}"}
            actions = {} if item["oid"] in self.stored else {"actions": {"upload": href}}
            objects.append({"oid": item["oid"], "size": item["size"], **actions})
        return said({"transfer": "basic", "objects": objects})

    def _commit(self, repo: Repo, commit: str, asked: Asked, query: Any, body: bytes) -> Reply:
        files = dict(repo.commits[commit])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
        oid = repo.commit(files)
        name = urlsplit(asked.path).path.removeprefix("/api/").removeprefix("models/")
        where = f"{self.url}/{name.removesuffix('/commit/main')}/commit/{oid}"
        return said({"commitOid": oid, "commitUrl": where, "success": True})


def entry(path: str, data: bytes) -> dict[str, Any]:
    """A file in a tree: large ones with their sha256."""
    oid = hashlib.sha256(data).hexdigest()
    if not path.endswith(LARGE):
        return {"type": "file", "oid": git_id(data), "size": len(data), "path": path}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n"
    lfs = {"oid": oid, "size": len(data), "pointerSize": len(pointer)}
    found = {"type": "file", "oid": git_id(pointer.encode()), "size": len(data), "path": path}
    return {**found, "lfs": lfs}


def said(content: Any) -> Reply:
    """JSON."""
    return Reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})


def refusal(status: int, code: str, headers: dict[str, str] | None = None) -> Reply:
    """An error as the Hub states it."""
    stated = {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})}
    return Reply(status, json.dumps({"error": code}).encode(), stated)
