"""A pickle read as data: nothing is imported, made or called, whatever it asks for.

Its opcodes are run on a machine of our own, see _pickle_machine.py.
"""

from __future__ import annotations

import codecs
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap
from typing import Any

from qemcli.formats._pickle_machine import MARK, Bad, Call, Machine, Named, hashable, name_of

MAX_STEPS = 8_000_000  # each makes one small object at most
MAX_NUMBER = 32  # bytes of an integer
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # what Python 2 called them


@dataclass(frozen=True)
class Pickled:
    """What a pickle holds, where it ends, and what it would have called that the caller does not
    know."""

    value: Any
    end: int
    calls: tuple[str, ...]


def read(data: bytes | mmap, start: int, call: Call, persistent: Callable[[Any], Any]) -> Pickled:
    """Read the pickle that begins at `start`.

    `call(name, args)` says what such a call stands for, or UNKNOWN; `persistent(id)` what an
    object outside the pickle is. Raises Bad for what is no pickle, is cut short or is too large.
    """
    machine = Machine(data, start, call, persistent)
    try:
        value = _run(machine)
    except (IndexError, KeyError, TypeError, struct.error, AttributeError, RecursionError) as error:
        raise Bad(f"no sound pickle ({type(error).__name__} at byte {machine.at})") from None
    except (UnicodeError, ValueError, OverflowError) as error:
        raise error if isinstance(error, Bad) else Bad(f"no sound pickle ({error})") from None
    return Pickled(value, machine.at, tuple(dict.fromkeys(machine.calls)))


def _run(machine: Machine) -> Any:
    for _ in range(MAX_STEPS):
        code = machine.take(1)[0]
        if code == pickle.STOP[0]:
            return machine.stack.pop()
        step = _STEPS.get(code)
        if step is None:
            raise Bad(f"opcode {code:#04x} at byte {machine.at - 1} is none that torch writes")
        step(machine)
    raise Bad(f"more than {MAX_STEPS} steps")


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


def _named(m: Machine) -> None:
    m.push(Named(_line_name(m)))


def _line_name(m: Machine) -> str:
    module, name = _text(m.line()), _text(m.line())
    return f"{_RENAMED.get(module, module)}.{name}"


def _stack_named(m: Machine) -> None:
    module, name = m.pair()
    if not isinstance(module, str) or not isinstance(name, str):
        raise Bad("a name that is no string")
    m.push(Named(f"{module[:200]}.{name[:200]}"))


def _dict(m: Machine) -> None:
    values = m.marked()
    m.push({})
    m.update(values)


def _set(m: Machine) -> None:
    values = m.marked()
    m.push(frozenset(hashable(v) for v in values))


def _object(m: Machine) -> None:
    kind, *args = m.marked()
    m.calls.append(name_of(kind))
    m.make(kind, args)


def _instance(m: Machine) -> None:
    name = _line_name(m)
    m.calls.append(name)
    m.make(Named(name), m.marked())


def _new(m: Machine) -> None:
    kind, args = m.pair()
    m.make(kind, args)


def _new_with_names(m: Machine) -> None:
    names = m.stack.pop()
    kind, args = m.pair()
    m.spend(args)
    m.make(kind, (*args, names))


def _tuple_of(count: int) -> Callable[[Machine], None]:
    def step(m: Machine) -> None:
        if len(m.stack) < count:
            raise Bad("a tuple of more than there is")
        found = tuple(m.stack[len(m.stack) - count :])
        del m.stack[len(m.stack) - count :]
        m.push(found)

    return step


def _constant(value: Any) -> Callable[[Machine], None]:
    return lambda m: m.push(value)


_STEPS: dict[int, Callable[[Machine], Any]] = {
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
