"""A pickle read as data: nothing is imported, made or called, whatever it asks for.

The opcodes are run on a stack of our own. A class or function is its name (`Named`), an object of a
class is a note of what it would have been made from (`Foreign`), and a call is handed to the
caller, who may know what it stands for. Every name that would have been called is kept.
"""

from __future__ import annotations

import codecs
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from mmap import mmap
from typing import Any, Final

MAX_STEPS = 8_000_000  # each makes one small object at most
MAX_NUMBER = 32  # bytes of an integer
MAX_KEY = 4  # levels of tuples in a key
MAX_COPIED = 64 << 20  # what calls may be given in all, above the file's own bytes
MARK: Final = object()
_WEIGHTS: dict[type, int] = {
    str: 1,
    bytes: 1,
    list: 16,
    tuple: 16,
    dict: 16,
}  # bytes a piece, or more
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # what Python 2 called them


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


@dataclass(frozen=True)
class Pickled:
    """What a pickle holds, where it ends, and what it would have called that the caller does not
    know."""

    value: Any
    end: int
    calls: tuple[str, ...]


UNKNOWN: Final = object()
Call = Callable[[str, tuple[Any, ...]], Any]


def read(data: bytes | mmap, start: int, call: Call, persistent: Callable[[Any], Any]) -> Pickled:
    """Read the pickle that begins at `start`.

    `call(name, args)` says what such a call stands for, or UNKNOWN; `persistent(id)` what an
    object outside the pickle is. Raises Bad for what is no pickle, is cut short or is too large.
    """
    machine = _Machine(data, start, call, persistent)
    try:
        value = machine.run()
    except (IndexError, KeyError, TypeError, struct.error, AttributeError, RecursionError) as error:
        raise Bad(f"no sound pickle ({type(error).__name__} at byte {machine.at})") from None
    except (UnicodeError, ValueError, OverflowError) as error:
        raise error if isinstance(error, Bad) else Bad(f"no sound pickle ({error})") from None
    return Pickled(value, machine.at, tuple(dict.fromkeys(machine.calls)))


class _Machine:
    """The stack, the memo, and one method for each kind of opcode."""

    def __init__(
        self, data: bytes | mmap, at: int, call: Call, persistent: Callable[[Any], Any]
    ) -> None:
        self.data, self.at, self.call, self.persistent = data, at, call, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.calls: list[str] = []
        self.left = MAX_COPIED + len(data)

    def run(self) -> Any:
        for _ in range(MAX_STEPS):
            code = self.take(1)[0]
            if code == pickle.STOP[0]:
                return self.stack.pop()
            step = _STEPS.get(code)
            if step is None:
                raise Bad(f"opcode {code:#04x} at byte {self.at - 1} is none that torch writes")
            step(self)
        raise Bad(f"more than {MAX_STEPS} steps")

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
            target.update(_key(v) for v in values)
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
            into[_key(key)] = value

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
        name = _name(function)
        found = self.call(name, args) if isinstance(args, tuple) else UNKNOWN
        if found is UNKNOWN:
            self.calls.append(name)
            found = Foreign(name, args if isinstance(args, tuple) else (args,))
        self.push(found)

    def make(self, kind: Any, args: Any) -> None:
        self.spend(args)
        self.push(Foreign(_name(kind), tuple(args)))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Foreign):  # a dict's own attributes are nobody's weights
            target.state = state


def _length(value: Any) -> int:
    weight = _WEIGHTS.get(type(value), 0)
    return weight * len(value) if weight else 0


def _name(value: Any) -> str:
    if isinstance(value, Named | Foreign):
        return value.name
    return f"a {type(value).__name__}"


def _key(value: Any, depth: int = 0) -> Any:
    """The value, if it is safe to hash: nested tuples would be hashed on the C stack, and large
    integers can be chosen so that all have one hash."""
    if isinstance(value, int) and abs(value) >> 60:
        raise Bad("a key of more than 60 bits")
    if isinstance(value, tuple):
        if depth == MAX_KEY:
            raise Bad("a key of nested tuples")
        for item in value:
            _key(item, depth + 1)
    return value


def _whole(raw: bytes) -> int:
    if len(raw) > MAX_NUMBER:
        raise Bad(f"an integer of {len(raw)} bytes")
    return int.from_bytes(raw, "little", signed=True)


def _decimal(raw: bytes) -> int | bool:
    if raw in (b"00", b"01"):
        return raw == b"01"
    if len(raw) > 2 * MAX_NUMBER:
        raise Bad(f"an integer of {len(raw)} digits")
    return int(raw.removesuffix(b"L"))


def _quoted(raw: bytes) -> str:
    if len(raw) < 2 or raw[:1] not in b"'\"" or raw[-1:] != raw[:1]:
        raise Bad("a string without quotes")
    return bytes(codecs.escape_decode(raw[1:-1])[0]).decode("latin-1")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _named(m: _Machine) -> None:
    m.push(Named(_line_name(m)))


def _line_name(m: _Machine) -> str:
    module, name = _text(m.line()), _text(m.line())
    return f"{_RENAMED.get(module, module)}.{name}"


def _stack_named(m: _Machine) -> None:
    module, name = m.pair()
    if not isinstance(module, str) or not isinstance(name, str):
        raise Bad("a name that is no string")
    m.push(Named(f"{module[:200]}.{name[:200]}"))


def _dict(m: _Machine) -> None:
    values = m.marked()
    m.push({})
    m.update(values)


def _set(m: _Machine) -> None:
    values = m.marked()
    m.push(frozenset(_key(v) for v in values))


def _object(m: _Machine) -> None:
    kind, *args = m.marked()
    m.calls.append(_name(kind))
    m.make(kind, args)


def _instance(m: _Machine) -> None:
    name = _line_name(m)
    m.calls.append(name)
    m.make(Named(name), m.marked())


def _new(m: _Machine) -> None:
    kind, args = m.pair()
    m.make(kind, args)


def _new_with_names(m: _Machine) -> None:
    names = m.stack.pop()
    kind, args = m.pair()
    m.spend(args)
    m.make(kind, (*args, names))


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def step(m: _Machine) -> None:
        if len(m.stack) < count:
            raise Bad("a tuple of more than there is")
        found = tuple(m.stack[len(m.stack) - count :])
        del m.stack[len(m.stack) - count :]
        m.push(found)

    return step


def _constant(value: Any) -> Callable[[_Machine], None]:
    return lambda m: m.push(value)


_STEPS: dict[int, Callable[[_Machine], Any]] = {
    code[0]: step
    for code, step in {
        pickle.PROTO: lambda m: m.take(1),
        pickle.FRAME: lambda m: m.take(8),
        pickle.MARK: _constant(MARK),
        pickle.POP: lambda m: m.stack.pop(),
        pickle.POP_MARK: lambda m: m.marked(),
        pickle.DUP: lambda m: m.push(m.stack[-1]),
        pickle.NONE: _constant(None),
        pickle.NEWTRUE: _constant(True),
        pickle.NEWFALSE: _constant(False),
        pickle.INT: lambda m: m.push(_decimal(m.line())),
        pickle.LONG: lambda m: m.push(_decimal(m.line())),
        pickle.BININT: lambda m: m.push(m.number("<i")),
        pickle.BININT1: lambda m: m.push(m.number("<B")),
        pickle.BININT2: lambda m: m.push(m.number("<H")),
        pickle.LONG1: lambda m: m.push(_whole(m.sized("<B"))),
        pickle.LONG4: lambda m: m.push(_whole(m.sized("<i"))),
        pickle.FLOAT: lambda m: m.push(float(m.line())),
        pickle.BINFLOAT: lambda m: m.push(m.number(">d")),
        pickle.STRING: lambda m: m.push(_quoted(m.line())),
        pickle.SHORT_BINSTRING: lambda m: m.push(m.sized("<B").decode("latin-1")),
        pickle.BINSTRING: lambda m: m.push(m.sized("<i").decode("latin-1")),
        pickle.UNICODE: lambda m: m.push(m.line().decode("raw-unicode-escape")),
        pickle.SHORT_BINUNICODE: lambda m: m.push(_text(m.sized("<B"))),
        pickle.BINUNICODE: lambda m: m.push(_text(m.sized("<I"))),
        pickle.BINUNICODE8: lambda m: m.push(_text(m.sized("<Q"))),
        pickle.SHORT_BINBYTES: lambda m: m.push(m.sized("<B")),
        pickle.BINBYTES: lambda m: m.push(m.sized("<I")),
        pickle.BINBYTES8: lambda m: m.push(m.sized("<Q")),
        pickle.BYTEARRAY8: lambda m: m.push(m.sized("<Q")),
        pickle.EMPTY_LIST: lambda m: m.push([]),
        pickle.EMPTY_DICT: lambda m: m.push({}),
        pickle.EMPTY_SET: lambda m: m.push(set()),
        pickle.EMPTY_TUPLE: _constant(()),
        pickle.LIST: lambda m: m.push(m.marked()),
        pickle.TUPLE: lambda m: m.push(tuple(m.marked())),
        pickle.TUPLE1: _tuple_of(1),
        pickle.TUPLE2: _tuple_of(2),
        pickle.TUPLE3: _tuple_of(3),
        pickle.DICT: _dict,
        pickle.FROZENSET: _set,
        pickle.APPEND: lambda m: m.extend([m.stack.pop()]),
        pickle.APPENDS: lambda m: m.extend(m.marked()),
        pickle.ADDITEMS: lambda m: m.extend(m.marked()),
        pickle.SETITEM: lambda m: m.update(list(m.pair())),
        pickle.SETITEMS: lambda m: m.update(m.marked()),
        pickle.PUT: lambda m: m.put(_decimal(m.line())),
        pickle.BINPUT: lambda m: m.put(m.number("<B")),
        pickle.LONG_BINPUT: lambda m: m.put(m.number("<I")),
        pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
        pickle.GET: lambda m: m.push(m.memo[_decimal(m.line())]),
        pickle.BINGET: lambda m: m.push(m.memo[m.number("<B")]),
        pickle.LONG_BINGET: lambda m: m.push(m.memo[m.number("<I")]),
        pickle.GLOBAL: _named,
        pickle.STACK_GLOBAL: _stack_named,
        pickle.REDUCE: lambda m: m.reduce(),
        pickle.BUILD: lambda m: m.build(),
        pickle.OBJ: _object,
        pickle.INST: _instance,
        pickle.NEWOBJ: _new,
        pickle.NEWOBJ_EX: _new_with_names,
        pickle.PERSID: lambda m: m.push(m.persistent(_text(m.line()))),
        pickle.BINPERSID: lambda m: m.push(m.persistent(m.stack.pop())),
    }.items()
}
