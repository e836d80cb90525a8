"""The files of a repository at one commit, and what went wrong in words.

huggingface_hub does the talking; it is imported on use, and its messages, which may hold signed
addresses, are replaced by ours.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from qemcli.errors import EnvironmentFailure, InputError, UsageError
from qemcli.hub.reference import SHAPE, Reference

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOGIN = "hf auth login"


class Passing(EnvironmentFailure):
    """A failure that may be gone a moment later: the server's, or the connection's."""


@dataclass(frozen=True)
class File:
    """One file of a repository: its path, bytes, git's id of it and, for large files, the sha256
    of its bytes."""

    path: str
    size: int
    blob: str
    sha256: str | None = None


@dataclass(frozen=True)
class Tree:
    """All files of a repository at one commit, by path."""

    ref: Reference
    commit: str
    files: tuple[File, ...]

    def select(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> tuple[File, ...]:
        """The files below the reference's path that match one of `include` (all where there is
        none) and none of `exclude`: shell patterns on whole paths, a folder with what is in it.

        Raises InputError where not one is left.
        """
        from huggingface_hub.utils import filter_repo_objects

        path = self.ref.path
        below = [f for f in self.files if not path or f.path == path or _below(f.path, path)]
        wanted = [p for p in include if p]
        kept = list(
            filter_repo_objects(
                below,
                allow_patterns=wanted or None,
                ignore_patterns=list(exclude) or None,
                key=lambda file: file.path,
            )
        )
        if not kept:
            asked = path or ", ".join(wanted) or "any file"
            names = ", ".join(file.path for file in self.files[:5])
            raise InputError(
                f"{self.ref}: the repository holds no '{asked}' at {self.commit[:12]}",
                f"it holds {names}{' ...' if len(self.files) > 5 else ''}" if names else None,
            )
        return tuple(kept)


def _below(path: str, folder: str) -> bool:
    return path.startswith(f"{folder}/")


def endpoint() -> str | None:
    """$HF_ENDPOINT as it is now: huggingface_hub reads it once, when it is imported."""
    return os.environ.get("HF_ENDPOINT") or None


def api() -> HfApi:
    """The Hub's client."""
    from huggingface_hub import HfApi

    from qemcli import __version__

    return HfApi(endpoint=endpoint(), library_name="qem", library_version=__version__)


def offline() -> bool:
    """True where the user has forbidden the network ($HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return constants.is_offline_mode()


def resolve(ref: Reference) -> str:
    """The commit that a reference means now, or meant when it was last asked for where the Hub
    cannot be reached."""
    with told(ref):
        return api().resolve_revision(ref.name, repo_type=ref.kind, revision=ref.revision).resolved


def listing(ref: Reference, commit: str) -> Tree:
    """All files of a commit, however many pages they take; UsageError where one would lie outside
    of the folder it is put in."""
    from huggingface_hub import RepoFile

    with told(ref):
        found = [
            entry
            for entry in api().list_repo_tree(
                ref.name, recursive=True, revision=commit, repo_type=ref.kind
            )
            if isinstance(entry, RepoFile)
        ]
    files = [File(f.path, f.size, f.blob_id, f.lfs.sha256 if f.lfs else None) for f in found]
    for file in files:
        check_inside(file.path, str(ref))
    return Tree(ref, commit, tuple(sorted(files, key=lambda file: file.path)))


def check_inside(path: str, where: str) -> None:
    """Refuse a name that would be written outside of its folder, or that is none."""
    parts = PurePosixPath(path).parts
    drive = bool(parts) and ":" in parts[0]
    hostile = ".." in parts or path.startswith("/") or "\\" in path or "\0" in path or drive
    if hostile or not parts or ".git" in parts:
        raise UsageError(f"{where}: a file's name points out of the folder ({path[:80]!r})")


@contextmanager
def told(ref: Reference) -> Iterator[None]:
    """Turn what the client raises into one line and what to do next; a full disk stays itself."""
    from httpx2 import HTTPError
    from huggingface_hub import errors

    try:
        with quiet():
            yield
    except (
        HTTPError,
        OSError,
        ValueError,
        errors.EntryNotFoundError,
        errors.RevisionResolutionError,
        errors.XetDownloadError,
    ) as error:
        raise _retold(ref, error) from None
    except RuntimeError as error:
        if not isinstance(error.__cause__, (HTTPError, OSError)):
            raise
        raise _retold(ref, error.__cause__) from None  # what became of one file of a commit


@contextmanager
def quiet() -> Iterator[None]:
    """Without the client's own warnings, which name signed addresses; threads are as quiet as the
    block that waits for them."""
    from huggingface_hub.utils import logging

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    shown = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(shown)


def _retold(ref: Reference, error: Exception) -> Exception:
    from huggingface_hub import errors

    kinds: tuple[tuple[type[Exception] | tuple[type[Exception], ...], type, str, str], ...] = (
        (errors.HFValidationError, UsageError, "no name of a repository", f"write {SHAPE}"),
        (
            errors.GatedRepoError, EnvironmentFailure, "a gated repository",
            f"ask for access on its page, then `{LOGIN}`",
        ),
        (
            errors.RepositoryNotFoundError, EnvironmentFailure,
            "no such repository, or a private one",
            f"a data set is hf://datasets/owner/name; a private one needs `{LOGIN}`",
        ),
        (
            errors.RevisionNotFoundError, EnvironmentFailure,
            f"it has no revision '{ref.revision or 'main'}'", "name a branch, a tag or a commit",
        ),
        (
            errors.RemoteEntryNotFoundError, EnvironmentFailure,
            "a file that the repository lists is not there", "try again later",
        ),
        (
            (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError,
             errors.RevisionResolutionError),
            EnvironmentFailure, "the Hub cannot be reached, and it is not in the cache",
            "unset HF_HUB_OFFLINE, or try again with a network",
        ),
    )  # fmt: skip
    for kind, ours, what, hint in kinds:
        if isinstance(error, kind):
            return ours(f"{ref}: {what}", hint)
    return _broken(ref, error)


def _broken(ref: Reference, error: Exception) -> Exception:
    """Answers with a status, lost connections; what the disk says stays as it is."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return EnvironmentFailure(f"{ref}: the Hub refuses it ({status})", f"`{LOGIN}`")
    if status == 429:
        return EnvironmentFailure(
            f"{ref}: the Hub asks for fewer requests (429)",
            "wait some minutes and run the same command again: finished files are kept",
        )
    if status:
        kind = Passing if status >= 500 else EnvironmentFailure
        return kind(f"{ref}: the Hub answers {status}", "try again later")
    if isinstance(error, OSError) and error.errno:
        return error
    return Passing(
        f"{ref}: the transfer broke off ({type(error).__name__})",
        "run the same command again: finished files are kept",
    )
