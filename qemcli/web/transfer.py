"""One file over HTTP: resumed by Range, checked by length and checksum, under its name only when
whole.

While it is fetched it is `.NAME.part`, and `.NAME.part.json` says of which version of what.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from qemcli.errors import EnvironmentFailure, UsageError

if TYPE_CHECKING:
    from httpx2 import Client, Response

TRIES = 5  # in a row without a single byte
PATIENCE = 300  # seconds: a server that asks for a longer wait is believed, and left
CHUNK, HOPS = 1 << 20, 10
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
AGAIN = "run the same command again: it goes on where it stopped"


@dataclass(frozen=True)
class Remote:
    """A file on a server; `size` in bytes and `checksum` ("md5:..." or "sha256:...") where they
    were published."""

    url: str
    name: str
    size: int | None = None
    checksum: str | None = None


class _Again(Exception):
    """A failure that may pass; `wait` in seconds where the server says how long."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


def client() -> Client:
    """The HTTP client: no credentials, ten seconds to connect, thirty for every piece."""
    import httpx2

    from qemcli import __version__

    timeout = httpx2.Timeout(30, connect=10)
    headers = {"User-Agent": f"qem/{__version__}", "Accept-Encoding": "identity"}
    return httpx2.Client(timeout=timeout, headers=headers, trust_env=True, follow_redirects=False)


def patiently(what: Callable[[], None], moved: Callable[[], int], where: str) -> None:
    """Do it until it succeeds; EnvironmentFailure after TRIES failures in which nothing `moved`."""
    tries, before = 0, moved()
    while True:
        try:
            return what()
        except _Again as error:
            tries = tries + 1 if moved() <= before else 1
            before = moved()
            if tries >= TRIES or (error.wait or 0) > PATIENCE:
                asked = f"; it asks to wait {error.wait:.0f} s" if error.wait else ""
                raise EnvironmentFailure(f"{where}: {error}{asked}", AGAIN) from None
            time.sleep(error.wait if error.wait is not None else min(2**tries, 30))


@contextmanager
def opened(
    http: Client, remote: Remote, method: str = "GET", headers: dict[str, str] | None = None
) -> Iterator[Response]:
    """The answer behind all redirects, its body not read; raises _Again or EnvironmentFailure for
    a status that is none of 200, 206 and 416."""
    import httpx2

    try:
        request = http.build_request(method, remote.url, headers=headers)
        for _ in range(HOPS):
            _allowed(request.url, remote)
            response = http.send(request, stream=True)
            if response.next_request is None:
                break
            response.close()
            if request.url.scheme == "https" and response.next_request.url.scheme != "https":
                raise EnvironmentFailure(f"{shown(remote.url)}: redirected to an insecure address")
            request = response.next_request
        else:
            raise EnvironmentFailure(f"{shown(remote.url)}: redirected {HOPS} times")
        try:
            _judge(response, remote)
            yield response
        finally:
            response.close()
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise UsageError(f"{shown(remote.url)}: {error}") from None
    except httpx2.TransportError as error:
        raise _Again(f"the connection broke off ({type(error).__name__})") from None


def _allowed(url: object, remote: Remote) -> None:
    scheme = str(url).split(":", 1)[0]
    if scheme not in ("http", "https"):
        raise EnvironmentFailure(f"{shown(remote.url)}: redirected to {scheme}:, which is not read")


def _judge(response: Response, remote: Remote) -> None:
    status, where = response.status_code, shown(remote.url)
    if status in _BUSY:
        raise _Again(f"the server answers {status}", _wait(response))
    if status not in (200, 206, 416):
        hint = "it may need a login, or have moved" if status in (401, 403, 404, 410) else None
        raise EnvironmentFailure(f"{where}: the server answers {status}", hint)
    page = response.headers.get("Content-Type", "").startswith("text/html")
    if page and status != 416 and not remote.name.endswith((".html", ".htm")):
        raise EnvironmentFailure(
            f"{where}: it answers with a web page, not with {remote.name}",
            "fetch the file in a browser, then give its path",
        )


def _wait(response: Response) -> float | None:
    """Retry-After: seconds, or a date."""
    from email.utils import parsedate_to_datetime

    said = response.headers.get("Retry-After", "").strip()
    if said.isdecimal():
        return float(said)
    try:
        return max(parsedate_to_datetime(said).timestamp() - time.time(), 0)
    except (ValueError, TypeError):
        return None


def shown(url: str) -> str:
    """An address without its query, which may be a signature."""
    return url.split("?", 1)[0]


def probe(http: Client, remote: Remote) -> Remote:
    """The same with the size and checksum that the server tells, without its bytes."""
    found = [remote]

    def ask() -> None:
        with opened(http, remote, "HEAD") as response:
            length = response.headers.get("Content-Length", "")
            size = int(length) if length.isdigit() else None
            found[0] = replace(
                remote, size=remote.size or size, checksum=remote.checksum or _stated(response)
            )

    patiently(ask, lambda: 0, shown(remote.url))
    return found[0]


def _stated(response: Response) -> str | None:
    """The md5 that Google Cloud Storage sends with an object."""
    for part in response.headers.get("x-goog-hash", "").split(","):
        kind, _, value = part.strip().partition("=")
        if kind == "md5":
            try:
                return f"md5:{base64.b64decode(value).hex()}"
            except ValueError:
                return None  # nothing that can be compared
    return None


def digests(path: Path) -> dict[str, str]:
    """sha256 and md5 of a file, in one pass."""
    hashes = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            for kind in hashes.values():
                kind.update(piece)
    return {name: kind.hexdigest() for name, kind in hashes.items()}


def download(
    http: Client, remote: Remote, folder: Path, advance: Callable[[int], None]
) -> dict[str, object]:
    """Fetch `folder/NAME`; returns its size and sha256.

    Raises EnvironmentFailure where it cannot be had whole, or is not what was published: what
    was fetched is then deleted.
    """
    target, part = folder / remote.name, folder / f".{remote.name}.part"
    side = part.with_name(f"{part.name}.json")
    with _alone(part) as file:
        transfer = Transfer(http, remote, file, side, advance)
        patiently(transfer.more, lambda: transfer.reached, shown(remote.url))
        file.flush()
        os.fsync(file.fileno())
        found = digests(part)
        kind, _, wanted = (transfer.checksum or "").partition(":")
        if wanted and found.get(kind) != wanted.lower():
            part.unlink()
            side.unlink(missing_ok=True)
            raise EnvironmentFailure(
                f"{shown(remote.url)}: the bytes received are not those that were published "
                f"({kind} {found.get(kind)}, not {wanted}); they were deleted",
                "run the same command again to fetch it anew",
            )
        os.replace(part, target)
        side.unlink(missing_ok=True)
    return {"size": target.stat().st_size, "sha256": found["sha256"], "checked": bool(wanted)}


@contextmanager
def _alone(part: Path) -> Iterator[BinaryIO]:
    """The unfinished file, at its end, held by this process alone."""
    with part.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise _busy(part) from None
        # Who held it may have given it its name meanwhile: then it is no part any more.
        if not part.exists() or not os.path.samestat(part.stat(), os.fstat(file.fileno())):
            raise _busy(part)
        yield file


def _busy(part: Path) -> EnvironmentFailure:
    return EnvironmentFailure(f"{part}: another qem download is writing it", "wait for it")


class Transfer:
    """One file on its way: asks for what is not there yet."""

    def __init__(
        self,
        http: Client,
        remote: Remote,
        file: BinaryIO,
        side: Path,
        advance: Callable[[int], None],
    ) -> None:
        self.http, self.remote, self.file, self.side = http, remote, file, side
        self.advance, self.checksum = advance, remote.checksum
        self.reached = self.told = 0  # bytes received in all; bytes that the bar knows of
        self.validator = self._known()

    def _known(self) -> str | None:
        """The version of which a part is there; a part of nothing known is thrown away."""
        try:
            known = json.loads(self.side.read_text())
            same = known["url"] == self.remote.url and isinstance(known["validator"], str)
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not same:
            self.file.truncate(0)
        return known["validator"] if same else None

    @property
    def at(self) -> int:
        """Bytes that are there."""
        return os.fstat(self.file.fileno()).st_size

    def more(self) -> None:
        """Fetch the rest; raises _Again where it breaks off."""
        headers = {}
        if self.validator:
            headers = {"Range": f"bytes={self.at}-", "If-Range": self.validator} if self.at else {}
        else:  # a version that cannot be told from another
            self.file.truncate(0)
        with opened(self.http, self.remote, headers=headers) as response:
            total = self._begin(response)
            for piece in response.iter_raw():
                self.file.write(piece)
                self.reached += len(piece)
                self._tell()
                if total is not None and self.at > total:
                    self.file.truncate(0)
                    raise EnvironmentFailure(
                        f"{shown(self.remote.url)}: it sends more than its {total} bytes"
                    )
        self.file.flush()
        if total is not None and self.at != total:
            raise _Again(f"it broke off at {self.at} of {total} bytes")

    def _begin(self, response: Response) -> int | None:
        """Set the file to where the answer's bytes belong; the size of the whole."""
        total = self._place(response)
        if self.remote.size is not None and total not in (None, self.remote.size):
            raise EnvironmentFailure(
                f"{shown(self.remote.url)}: it has {total} bytes, {self.remote.size} were published"
            )
        self.checksum = self.checksum or _stated(response)
        tag = response.headers.get("ETag", "")
        strong = tag if tag and not tag.startswith("W/") else None
        self.validator = strong or response.headers.get("Last-Modified")
        self.side.write_text(json.dumps({"url": self.remote.url, "validator": self.validator}))
        room = shutil.disk_usage(self.side.parent).free
        if total is not None and total - self.at > room:
            raise EnvironmentFailure(
                f"{self.side.parent}: {total - self.at} bytes are to come, {room} are free",
                "free some space, or give another --dest",
            )
        self._tell()
        return self.remote.size if total is None else total

    def _place(self, response: Response) -> int | None:
        if response.status_code == 206:
            span = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if span and int(span[1]) == self.at:
                return int(span[3])
        if response.status_code != 200:  # 416, or another range than was asked for
            self.file.truncate(0)
            raise _Again("the server has another version by now")
        self.file.truncate(0)
        length = response.headers.get("Content-Length", "")
        return int(length) if length.isdigit() else None

    def _tell(self) -> None:
        self.file.flush()
        self.advance(self.at - self.told)
        self.told = self.at
