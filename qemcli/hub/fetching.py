"""Files of a repository on this disk, each one's bytes checked against the hash that the repository
names; a fetch with a file missing is a failure, never a smaller answer.

Without `dest` they lie in the Hub's own cache, and beside it, in `qem/<commit>.json`, what the
repository holds and which files were found sound: that is what offline mode answers from.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qemcli.errors import EnvironmentFailure, InputError
from qemcli.hub import repository
from qemcli.hub.reference import Reference
from qemcli.hub.repository import File, Passing, Tree, quiet, told
from qemcli.writing import beside

THREADS = 8
PAUSES = (2, 8)  # seconds before a file is asked for again
Advance = Callable[[int], None]


@dataclass
class Copy:
    """What is known of one commit on this disk: its files, and the change times of those whose
    bytes were checked."""

    tree: Tree
    verified: dict[str, int] = field(default_factory=dict)
    complete: bool = True  # False: listed from what lies in the cache, others may exist

    @property
    def folder(self) -> Path:
        """The snapshot in the Hub's cache."""
        return _storage(self.tree.ref) / "snapshots" / self.tree.commit

    def sound(self, file: File) -> bool:
        """True where the file lies in the cache and has not changed since it was checked."""
        path = self.folder / file.path
        try:
            status = path.stat()
        except OSError:
            return False
        return self.verified.get(file.path) == status.st_mtime_ns and status.st_size == file.size

    def save(self) -> None:
        """Write it down, beside and renamed; a cache that is read-only is left alone."""
        target = _record(self.tree.ref, self.tree.commit)
        record = {"files": [asdict(f) for f in self.tree.files], "verified": self.verified}
        with suppress(PermissionError):
            beside(target, lambda path: path.write_text(json.dumps(record)))


def _storage(ref: Reference) -> Path:
    from huggingface_hub import constants

    name = "--".join([f"{ref.kind}s", *ref.name.split("/")])
    return Path(constants.HF_HUB_CACHE).expanduser() / name


def _record(ref: Reference, commit: str) -> Path:
    return _storage(ref) / "qem" / f"{commit}.json"


def known(ref: Reference, commit: str) -> Copy | None:
    """What was written down of a commit; None where nothing was, or it cannot be read."""
    try:
        record = json.loads(_record(ref, commit).read_text())
        files = tuple(File(**entry) for entry in record["files"])
        verified = {str(path): int(time) for path, time in record["verified"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    for file in files:
        repository.check_inside(file.path, str(ref))
    return Copy(Tree(ref, commit, files), verified)


def look(ref: Reference) -> Copy:
    """What a repository holds at the commit that is meant: from what was written down, else from
    the Hub, else, offline, from what lies in the cache."""
    commit = repository.resolve(ref)
    found = known(ref, commit)
    if found is not None:
        return found
    if repository.offline():
        return _cached(ref, commit)
    return Copy(repository.listing(ref, commit))


def _cached(ref: Reference, commit: str) -> Copy:
    """The files that another tool has put into the cache: their blobs are named by their hashes."""
    from huggingface_hub import snapshot_download

    with told(ref):
        folder = Path(
            snapshot_download(ref.name, repo_type=ref.kind, revision=commit, local_files_only=True)
        )
    files = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        blob, size = path.resolve().name, path.stat().st_size
        sha256 = blob if len(blob) == 64 else None
        files.append(File(path.relative_to(folder).as_posix(), size, blob, sha256))
    return Copy(Tree(ref, commit, tuple(files)), complete=False)


def fetch(
    ref: Reference,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dest: Path | None = None,
    advance: Advance = lambda n: None,
    copy: Copy | None = None,
) -> Path:
    """The folder that holds the files of a repository, all of them there and checked.

    `copy` is what `look` has found; `dest` is a folder to put them in instead of the Hub's cache.
    Raises EnvironmentFailure where one file cannot be had or its bytes are not those that the
    repository names (it is then deleted), InputError where no file is meant.
    """
    copy = copy or look(ref)
    return fetch_files(copy, copy.tree.select(include, exclude), dest, advance)


def fetch_files(
    copy: Copy, files: Sequence[File], dest: Path | None = None, advance: Advance = lambda n: None
) -> Path:
    """As `fetch`, for files that were chosen already."""
    folder = copy.folder if dest is None else dest
    fetcher = Fetcher(copy, dest, advance)
    try:
        _all(fetcher, files)
    finally:
        if dest is None and copy.complete:
            copy.save()
    missing = [file.path for file in files if not (folder / file.path).is_file()]
    if missing:
        raise EnvironmentFailure(
            f"{copy.tree.ref}: {len(missing)} files are missing, the first is {missing[0]}",
            "run the same command again",
        )
    return folder


def _all(fetcher: Fetcher, files: Sequence[File]) -> None:
    """Every file, some at a time; the first failure ends the others at their next piece."""
    with quiet(), ThreadPoolExecutor(THREADS) as pool:
        try:
            for done in as_completed([pool.submit(fetcher.one, file) for file in files]):
                done.result()
        except BaseException:
            fetcher.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Stopped(Exception):
    """Another file failed, or the user wants to stop: this transfer ends too."""


class Fetcher:
    """Fetches and checks single files of one commit."""

    def __init__(self, copy: Copy, dest: Path | None, advance: Advance) -> None:
        self.copy, self.dest, self.advance = copy, dest, advance
        self.stop = threading.Event()
        self._lock = threading.Lock()

    def one(self, file: File) -> None:
        """Fetch one file where it is not there, and check its bytes."""
        copy = self.copy
        if self.stop.is_set():
            return
        if self.dest is None and copy.sound(file):
            self.told(file.size)
            return
        bar = Bar(self)
        path = self._patiently(file, bar)
        self.told(file.size - bar.moved)
        self._check(file, path)

    def _patiently(self, file: File, bar: Bar) -> Path:
        """Fetch it; after a failure that may pass, again."""
        for pause in PAUSES:
            try:
                return self._download(file, bar)
            except Passing:
                self.told(-bar.moved)
                bar.moved = 0
                time.sleep(pause)
        return self._download(file, bar)

    def _download(self, file: File, bar: Bar) -> Path:
        from huggingface_hub import hf_hub_download

        ref = self.copy.tree.ref
        made: Any = bar  # called like the class that is asked for
        with told(ref):
            return Path(
                hf_hub_download(
                    ref.name,
                    file.path,
                    repo_type=ref.kind,
                    revision=self.copy.tree.commit,
                    local_dir=self.dest,
                    endpoint=repository.endpoint(),
                    library_name="qem",
                    tqdm_class=made,
                )
            )

    def _check(self, file: File, path: Path) -> None:
        status = path.stat()
        if status.st_size == file.size and digest(path, file) == (file.sha256 or file.blob):
            with self._lock:
                self.copy.verified[file.path] = status.st_mtime_ns
            return
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise EnvironmentFailure(
            f"{self.copy.tree.ref}: {file.path}: its bytes are not those that the repository names "
            f"(by their {'sha256' if file.sha256 else 'git id'}); it was deleted",
            "run the same command again to fetch it anew",
        )

    def told(self, size: int) -> None:
        """Move the progress bar."""
        with self._lock:
            self.advance(size)


def digest(path: Path, file: File) -> str:
    """The sha256 of a large file, git's id of a small one: what the repository names it by."""
    git = f"blob {path.stat().st_size}\0".encode()
    start: Any = hashlib.sha256 if file.sha256 else lambda: hashlib.sha1(git)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, start).hexdigest()


class Bar:
    """The client's bar of one transfer, as it calls it: made, updated, closed."""

    total = 0

    def __init__(self, fetcher: Fetcher) -> None:
        self.fetcher, self.moved = fetcher, 0

    def __call__(self, *_: Any, **__: Any) -> Bar:
        return self

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, n: float | None = 1) -> None:
        """`n` bytes more; raises _Stopped where the other transfers have ended."""
        if self.fetcher.stop.is_set():
            raise _Stopped
        self.moved += int(n or 0)
        self.fetcher.told(int(n or 0))

    def _nothing(self, *_: Any, **__: Any) -> None:
        """What else a bar is told: bytes on the wire and rates, which ours works out itself."""

    update_transfer = set_postfix_str = set_transfer_postfix_str = refresh = close = _nothing


def one_file(ref: Reference) -> Path:
    """The one file that hf://owner/name[@revision]/path names; InputError where it is not one."""
    copy = look(ref)
    files = copy.tree.select()
    if len(files) != 1 or files[0].path != ref.path:
        raise InputError(f"{ref}: {len(files)} files, not one", "name one file in the repository")
    return fetch(ref, copy=copy) / ref.path
