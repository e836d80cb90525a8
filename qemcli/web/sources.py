"""What an address means: a Zenodo record, an object of Google Cloud Storage, a plain file, or a
share that only a browser can fetch."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from qemcli.errors import EnvironmentFailure, UsageError
from qemcli.web.transfer import Remote, opened, patiently, shown

if TYPE_CHECKING:
    from httpx2 import Client

_ZENODO = re.compile(
    r"(?:zenodo:|https?://(?:www\.)?zenodo\.org/records?/|https?://doi\.org/10\.5281/zenodo\.)"
    r"(\d+)(?:/files/([^?]+))?(?:\?.*)?/?"
)
_GCS = re.compile(
    r"(?:gs://|https?://storage\.(?:cloud\.google|googleapis)\.com/)([^/]+)/([^?]+).*"
)
_BROWSER = {
    "drive.google.com": "Google Drive",
    "docs.google.com": "Google Drive",
    "www.dropbox.com": "Dropbox",
    "dropbox.com": "Dropbox",
    "drive.proton.me": "Proton Drive",
}
READS = "it reads https://, gs://bucket/file, zenodo:RECORD and hf://owner/name"
SCHEMES = ("http://", "https://", "gs://", "zenodo:")
LARGEST_RECORD = 8 << 20  # bytes of a Zenodo record's description


@dataclass(frozen=True)
class Share:
    """What only a browser can fetch: where, and from whom."""

    url: str
    host: str


def is_address(text: str) -> bool:
    """True for what `expand` takes."""
    return text.startswith(SCHEMES)


def expand(http: Client, text: str) -> list[Remote] | Share:
    """The files behind an address; a Zenodo record's come with sizes and md5 sums.

    Mirrors: $QEM_ZENODO and $QEM_GCS replace the two services' addresses. Raises UsageError for
    an address that is none or carries a password.
    """
    record = _ZENODO.fullmatch(text)
    if record:
        return zenodo(http, record[1], unquote(record[2] or ""))
    bucket = _GCS.fullmatch(text)
    if bucket:
        host = os.environ.get("QEM_GCS") or "https://storage.googleapis.com"
        path = f"{bucket[1]}/{quote(unquote(bucket[2]))}"
        return [Remote(f"{host.rstrip('/')}/{path}", _name(bucket[2], text))]
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{shown(text)}: no address that qem reads", "https://, gs:// or zenodo:")
    if parts.username or parts.password:
        raise UsageError(f"{parts.hostname}: an address with a password is not taken")
    if parts.hostname in _BROWSER:
        return Share(text, _BROWSER[parts.hostname])
    return [Remote(text, _name(parts.path, text))]


def _name(path: str, where: str) -> str:
    """The last part of a path, as a file's name; UsageError where it is none."""
    name = PurePosixPath(unquote(path)).name
    if not name or name.startswith(".") or not name.isprintable() or "\\" in name or ":" in name:
        raise UsageError(f"{shown(where)}: no file's name at its end", "name one file")
    return name


def zenodo(http: Client, record: str, only: str = "") -> list[Remote]:
    """The files of a Zenodo record (of its newest version, where the number is that of all), or
    the one that is named."""
    host = (os.environ.get("QEM_ZENODO") or "https://zenodo.org").rstrip("/")
    found: list[Any] = []
    ask = Remote(f"{host}/api/records/{record}", "record.json")

    def read() -> None:
        with opened(http, ask) as response:
            body = b""
            for piece in response.iter_raw():
                body += piece
                if len(body) > LARGEST_RECORD:
                    break
            found[:] = [body]

    patiently(read, lambda: 0, ask.url)
    try:
        files = [_remote(host, record, entry) for entry in json.loads(found[0])["files"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise EnvironmentFailure(
            f"{ask.url}: not the description of a record", "try again later"
        ) from None
    kept = [file for file in files if not only or file.name == only]
    if not kept:
        names = ", ".join(file.name for file in files[:5]) or "no file that is open to all"
        raise EnvironmentFailure(f"zenodo:{record}: it holds no '{only}'", f"it holds {names}")
    return kept


def _remote(host: str, record: str, entry: dict[str, Any]) -> Remote:
    name = _name(entry["key"], f"zenodo:{record}")
    url = entry.get("links", {}).get("self") or f"{host}/records/{record}/files/{quote(name)}"
    if name != entry["key"] or not str(url).startswith(("http://", "https://")):
        raise ValueError(entry["key"])
    return Remote(str(url), name, int(entry["size"]), str(entry["checksum"]))
