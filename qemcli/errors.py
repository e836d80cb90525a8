"""Every error a user can meet: what happened, where, and what to do next; each child is one exit
code."""

from __future__ import annotations


class QemError(Exception):
    """A failure that is the input's, the caller's or the machine's, never a bug of ours.

    `message` says what and where in one line; `hint`, where there is one, says what to do next.
    """

    exit_code = 70

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(QemError):
    """The command was called wrongly: an unknown name, options that exclude each other (exit 2)."""

    exit_code = 2


class InputError(QemError):
    """Nothing usable was given: a checkpoint that cannot be read or understood (exit 3)."""

    exit_code = 3


class UnsupportedError(InputError):
    """The checkpoint is sound, but its architecture is one that we do not act on (exit 3)."""


class EnvironmentFailure(QemError):
    """The machine stands in the way: network, disk, permissions, memory, a missing extra (exit
    5)."""

    exit_code = 5


class InconclusiveError(QemError):
    """The question cannot be decided on this input (exit 6)."""

    exit_code = 6
