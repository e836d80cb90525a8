"""The machine that reads pickles as data: a stack, a memo, and no way to make or call anything.

A class or function is its name (`Named`), an object of a class is a note of what it would have been
made from (`Foreign`), and a call is handed to the caller, who may know what it stands for. Every
name that would have been called is kept. The opcodes are in _pickles.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from mmap import mmap
from typing import Any, Final

MAX_KEY = 4  # levels of tuples in a key
MAX_PIECES = 256  # of a key: it is hashed anew each time, and may hold one tuple many times
MAX_COPIED = 64 << 20  # what calls may be given in all, above the file's own bytes
MARK: Final = object()
_WEIGHTS: dict[type, int] = {
    str: 1,
    bytes: 1,
    list: 16,
    tuple: 16,
    dict: 16,
}  # bytes a piece, or more


class Bad(ValueError):
    """What is wrong with a pickle."""


@dataclass(frozen=True)
class Named:
    """A class or function that a pickle speaks of: its module and name, never looked up."""

    name: str


@dataclass(eq=False)
class Foreign:
    """An object that a pickle would have made: of what class, from what, with what put into it."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    values: list[Any] = field(default_factory=list)


UNKNOWN: Final = object()
Call = Callable[[str, tuple[Any, ...]], Any]


class Machine:
    """The stack, the memo, and one method for each kind of opcode."""

    def __init__(
        self, data: bytes | mmap, at: int, call: Call, persistent: Callable[[Any], Any]
    ) -> None:
        self.data, self.at, self.call, self.persistent = data, at, call, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.calls: list[str] = []
        self.left = MAX_COPIED + len(data)

    def take(self, count: int) -> bytes:
        found = self.data[self.at : self.at + count]
        if count < 0 or len(found) != count:
            raise Bad(f"cut short at byte {self.at}")
        self.at += count
        return found

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.at, self.at + 10_000)
        if end < 0:
            raise Bad(f"cut short at byte {self.at}")
        return self.take(end + 1 - self.at)[:-1]

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def sized(self, form: str) -> bytes:
        return self.take(self.number(form))

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def marked(self) -> list[Any]:
        """What stands above the last mark, taken off with it."""
        at = len(self.stack) - 1
        while self.stack[at] is not MARK:
            at -= 1
            if at < 0:
                raise Bad("a mark is missing")
        found = self.stack[at + 1 :]
        del self.stack[at:]
        return found

    def pair(self) -> tuple[Any, Any]:
        second = self.stack.pop()
        return self.stack.pop(), second

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Foreign):
            target.values.extend(values)
        elif isinstance(target, set):
            target.update(hashable(v) for v in values)
        elif isinstance(target, list):
            target.extend(values)
        else:
            raise Bad(f"items for a {type(target).__name__}")

    def update(self, values: list[Any]) -> None:
        target = self.stack[-1]
        into = target.items if isinstance(target, Foreign) else target
        if not isinstance(into, dict) or len(values) % 2:
            raise Bad(f"pairs for a {type(target).__name__}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            into[hashable(key)] = value

    def spend(self, args: Any) -> None:
        """Count what a call or an object may copy: a few bytes can ask for the same value again and
        again."""
        self.left -= _length(args)
        if self.left < 0:
            raise Bad("objects made from more than the file holds")

    def reduce(self) -> None:
        function, args = self.pair()
        self.spend(args)
        for arg in args if isinstance(args, tuple) else ():
            self.spend(arg)
        name = name_of(function)
        found = self.call(name, args) if isinstance(args, tuple) else UNKNOWN
        if found is UNKNOWN:
            self.calls.append(name)
            found = Foreign(name, args if isinstance(args, tuple) else (args,))
        self.push(found)

    def make(self, kind: Any, args: Any) -> None:
        self.spend(args)
        self.push(Foreign(name_of(kind), tuple(args)))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Foreign):  # a dict's own attributes are nobody's weights
            target.state = state


def _length(value: Any) -> int:
    weight = _WEIGHTS.get(type(value), 0)
    return weight * len(value) if weight else 0


def name_of(value: Any) -> str:
    if isinstance(value, Named | Foreign):
        return value.name
    return f"a {type(value).__name__}"


def hashable(value: Any) -> Any:
    """The value, if it is safe to hash: nested tuples would be hashed on the C stack, one tuple
    may stand in another many times, and large integers can be chosen so that all have one hash."""
    if type(value) is str:
        return value
    waiting, pieces = [(value, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        pieces += 1
        if isinstance(item, int) and abs(item) >> 60:
            raise Bad("a key of more than 60 bits")
        if isinstance(item, tuple):
            if depth == MAX_KEY or pieces + len(item) > MAX_PIECES:
                raise Bad("a key of nested tuples")
            waiting += [(part, depth + 1) for part in item]
    return value
