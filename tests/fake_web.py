"""A web server on this machine with faults: what real ones do on a bad day, on purpose."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD path" holds `match`."""

    match: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # bytes of the body after which the connection ends
    corrupt: bool = False  # one byte is another
    no_range: bool = False  # a Range is answered with everything
    page: bool = False  # a web page instead
    hang: bool = False  # after `cut` bytes nothing comes, and the connection stays


@dataclass
class Asked:
    """One request as the server saw it."""

    method: str
    path: str
    headers: dict[str, str]
    port: int

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Reply:
    """An answer before faults."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Web:
    """Files at paths, or whatever `answer` says; every request is in `asked`."""

    def __init__(self, answer: Callable[[Asked, bytes], Reply] | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.extra: dict[str, dict[str, str]] = {}
        self.moved: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.answer = answer or self._file
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.web = self
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    @contextmanager
    def running(self) -> Iterator[Web]:
        """Serve until the block ends."""
        self._thread.start()
        try:
            yield self
        finally:
            self.closing.set()
            self.server.shutdown()
            self.server.server_close()
            self._thread.join(5)

    def seen(self, text: str) -> list[Asked]:
        """The requests whose "METHOD path" holds a text."""
        return [asked for asked in self.asked if text in str(asked)]

    def _file(self, asked: Asked, body: bytes) -> Reply:
        path = unquote(urlsplit(asked.path).path)
        if path in self.moved:
            return Reply(302, b"", {"Location": self.moved[path]})
        if path not in self.files:
            return Reply(404, b"not here")
        return whole(self.files[path], self.extra.get(path, {}))

    def fault(self, asked: Asked) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and fault.match in str(asked):
                    fault.times -= 1
                    return fault
        return None


class Server(ThreadingHTTPServer):
    """The socket of a Web."""

    daemon_threads = True
    web: Web

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left: part of the tests."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def _any(self) -> None:
        web = self.server.web
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        headers = {key.lower(): value for key, value in self.headers.items()}
        asked = Asked(self.command, self.path, headers, web.port)
        web.asked.append(asked)
        fault = web.fault(asked) or Fault("")
        refused = Reply(fault.status or 0, b"no", dict(fault.headers))
        reply = refused if fault.status else spoilt(fault, web.answer(asked, body), headers)
        self._send(reply, fault.cut)
        if fault.hang:
            web.closing.wait(60)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _any

    def _chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, reply: Reply, cut: int | None) -> None:
        self.send_response(reply.status)
        for key, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[:cut])
        if cut is not None:
            self.close_connection = True


def spoilt(fault: Fault, reply: Reply, headers: dict[str, str]) -> Reply:
    """What a fault makes of an answer."""
    if fault.page:
        return Reply(200, b"<!doctype html>", {"Content-Type": "text/html"})
    if fault.corrupt and reply.body:
        reply.body = bytes([reply.body[0] ^ 1]) + reply.body[1:]
    if "range" in headers and reply.status == 200 and not fault.no_range:
        return ranged(reply, headers)
    return reply


def whole(body: bytes, headers: dict[str, str] | None = None) -> Reply:
    """A file, its ETag the hash of its bytes."""
    return Reply(200, body, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', **(headers or {})})


def ranged(reply: Reply, headers: dict[str, str]) -> Reply:
    """What a server that knows Range makes of an answer."""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", headers["range"])
    tag = headers.get("if-range")
    if not found or (
        tag and tag not in (reply.headers.get("ETag"), reply.headers.get("Last-Modified"))
    ):
        return reply
    start, size = int(found[1]), len(reply.body)
    if start >= size:
        return Reply(416, b"", {"Content-Range": f"bytes */{size}"})
    stop = min(int(found[2]) + 1 if found[2] else size, size)
    span = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
    return Reply(206, reply.body[start:stop], {**reply.headers, **span})
