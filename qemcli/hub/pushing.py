"""Files of this disk as one commit of a repository, which holds all of them afterwards or is left
as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qemcli.errors import EnvironmentFailure, UsageError
from qemcli.hub import repository
from qemcli.hub.fetching import digest
from qemcli.hub.reference import Reference
from qemcli.hub.repository import api, told


def check(ref: Reference) -> None:
    """Refuse what cannot be pushed to: a revision, a path, no network."""
    if ref.revision or ref.path:
        raise UsageError(
            f"{ref}: a push makes the newest commit of a whole repository",
            f"write {Reference(ref.name, ref.kind)}",
        )
    if repository.offline():
        raise EnvironmentFailure(f"{ref}: HF_HUB_OFFLINE forbids the network", "unset it")


def push(ref: Reference, files: Mapping[str, Path], private: bool, message: str) -> Reference:
    """Make the repository where it is not there, commit the files, look whether they arrived.

    `files` are paths in the repository -> files here; others that it holds stay. Returns the
    reference with its commit. Raises EnvironmentFailure where the Hub refuses, or holds other
    bytes than were sent.
    """
    from huggingface_hub import CommitOperationAdd

    check(ref)
    hub = api()
    with told(ref), _silent():
        hub.create_repo(ref.name, repo_type=ref.kind, private=private, exist_ok=True)
        made = hub.create_commit(
            ref.name,
            [CommitOperationAdd(path, file) for path, file in files.items()],
            commit_message=message,
            repo_type=ref.kind,
        )
    there = {file.path: file for file in repository.listing(ref, made.oid).files}
    for path, local in files.items():
        found = there.get(path)
        if found is None or digest(local, found) != (found.sha256 or found.blob):
            raise EnvironmentFailure(
                f"{ref}: {path} did not arrive as it was sent (commit {made.oid[:12]})",
                "push again",
            )
    return ref.at(made.oid)


def visible(ref: Reference) -> bool:
    """True where everybody can read the repository."""
    with told(ref):
        return not api().repo_info(ref.name, repo_type=ref.kind).private


@contextmanager
def _silent() -> Iterator[None]:
    """Without the client's own bars."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
