"""What `hf://[datasets/]owner/name[@revision][/path]` means."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from urllib.parse import unquote

from qemcli.errors import UsageError

PREFIX = "hf://"
SHAPE = "hf://[datasets/]owner/name[@revision][/path]"
# A revision with slashes is one of the Hub's own (refs/pr/1), or its slashes are written %2F.
_FORM = re.compile(
    r"hf://(datasets/|models/)?([\w-][\w.-]*/[\w.-]+?)"
    r"(?:@(refs/(?:pr|convert)/[\w.-]+|[\w.%-]+?))?(?:/+(.*?)/*)?"
)


@dataclass(frozen=True)
class Reference:
    """A repository of the Hub, and what of it is meant: a revision, a path inside."""

    name: str
    kind: str = "model"
    revision: str | None = None
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read the text; UsageError where it has another shape or its path leaves the
        repository."""
        found = _FORM.fullmatch(text)
        if not found:
            raise UsageError(f"{text}: not {SHAPE}")
        prefix, name, revision, path = found.groups()
        if ".." in (path or "").split("/") or "\\" in (path or ""):
            raise UsageError(f"{text}: its path points out of the repository")
        kind = "dataset" if prefix == "datasets/" else "model"
        return cls(name, kind, unquote(revision) if revision else None, path or "")

    def at(self, commit: str) -> Reference:
        """The same, pinned to a commit."""
        return replace(self, revision=commit)

    def __str__(self) -> str:
        folder = "datasets/" if self.kind == "dataset" else ""
        revision = f"@{self.revision.replace('/', '%2F')}" if self.revision else ""
        return f"{PREFIX}{folder}{self.name}{revision}{f'/{self.path}' if self.path else ''}"
