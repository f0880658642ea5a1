"""A pickle read as data: nothing that it names is imported, called or made.

A pickle is a program for a stack machine, whose instructions `pickletools.genops` lists without running anything. The
machine here keeps a name as a `Name`, and a call as an `Object`: what was to be called, with which arguments, and what
was put into it. So a class that is not installed, or is not wanted, is a record like any other.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

_DICTS = ("collections OrderedDict", "collections defaultdict", "builtins dict", "__builtin__ dict")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_IGNORED = ("PROTO", "FRAME", "READONLY_BUFFER")


@dataclass(eq=False)
class Name:
    """A function or a class that the pickle names: `name` is "module qualname"."""

    name: str


@dataclass(eq=False)
class Persistent:
    """What is stored outside of the pickle, by the identity that it has there."""

    identity: Any


@dataclass(eq=False)
class Object:
    """What calling `kind` with `arguments` would have made, and what was put into it afterwards."""

    kind: Any
    arguments: tuple
    state: Any = None
    items: dict = field(default_factory=dict)
    parts: list = field(default_factory=list)


@dataclass(eq=False)
class _Key:
    """A key of a dict that is no plain value: by its identity, so that nothing of it is computed."""

    value: Any


class _Mark:
    pass


def read_pickle(file: BinaryIO, stored: list[Any] | None = None) -> Any:
    """The content of the pickle at the file's position, which is left behind its end.

    stored   a list that takes the identity of each Persistent
    Numbers, strings, bytes, None, tuples, lists, dicts and sets (as lists) are what they are; the rest is Name, Object
    and Persistent. Raises ValueError for what is no whole pickle.
    """
    machine = _Machine()
    try:
        for code, argument, _ in pickletools.genops(file):
            if code.name == "STOP":
                return machine.stack.pop()
            machine.run(code.name, argument)
            if stored is not None and code.name == "BINPERSID":
                stored.append(machine.stack[-1].identity)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise ValueError(f"a damaged pickle ({type(error).__name__})") from error
    raise ValueError("a pickle without an end")


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            self.stack.append(argument)
        elif name not in _IGNORED:
            _STEPS[name](self, argument)

    def pop_mark(self) -> list[Any]:
        """What stands above the last mark, which goes, too."""
        above = []
        while (value := self.stack.pop()) is not _Mark:
            above.append(value)
        return above[::-1]

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def call(self, kind: Any, arguments: Any) -> None:
        if isinstance(kind, Name) and kind.name in _DICTS:
            pairs = [each for each in arguments if isinstance(each, list)]
            self.stack.append({})
            for pair in pairs[0] if pairs else ():
                self.set_items(list(pair))
        else:
            self.stack.append(Object(kind, tuple(arguments)))

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        table = target.items if isinstance(target, Object) else target
        for key, value in zip(values[::2], values[1::2], strict=True):
            plain = key is None or isinstance(key, str | bytes | int | float)
            table[key if plain else _Key(key)] = value

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        (target.parts if isinstance(target, Object) else target).extend(values)

    def build(self, state: Any) -> None:
        if isinstance(self.stack[-1], Object):  # a dict's attributes, such as a state_dict's _metadata, are left out
            self.stack[-1].state = state

    def tuple_of(self, count: int) -> None:
        values = self.stack[-count:]
        if len(values) < count:
            raise IndexError
        self.stack[-count:] = [tuple(values)]


def _call_above_mark(machine: _Machine, argument: Any) -> None:
    kind, *arguments = machine.pop_mark()
    machine.call(kind, arguments)


def _reduce(machine: _Machine, argument: Any) -> None:
    arguments = machine.stack.pop()
    machine.call(machine.stack.pop(), arguments)


def _reduce_with_names(machine: _Machine, argument: Any) -> None:
    machine.stack.pop()
    _reduce(machine, argument)


def _stack_global(machine: _Machine, argument: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(Name(f"{module} {name}"))


def _set_item(machine: _Machine, argument: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


def _dict_above_mark(machine: _Machine, argument: Any) -> None:
    values = machine.pop_mark()
    machine.stack.append({})
    machine.set_items(values)


_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
_STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    "MARK": lambda m, a: m.stack.append(_Mark),
    "POP": lambda m, a: m.stack.pop(),
    "POP_MARK": lambda m, a: m.pop_mark(),
    "DUP": lambda m, a: m.stack.append(m.stack[-1]),
    "EMPTY_LIST": lambda m, a: m.stack.append([]),
    "EMPTY_SET": lambda m, a: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, a: m.stack.append(()),
    "EMPTY_DICT": lambda m, a: m.stack.append({}),
    "LIST": lambda m, a: m.stack.append(m.pop_mark()),
    "FROZENSET": lambda m, a: m.stack.append(m.pop_mark()),
    "TUPLE": lambda m, a: m.stack.append(tuple(m.pop_mark())),
    "TUPLE1": lambda m, a: m.tuple_of(1),
    "TUPLE2": lambda m, a: m.tuple_of(2),
    "TUPLE3": lambda m, a: m.tuple_of(3),
    "DICT": _dict_above_mark,
    "APPEND": lambda m, a: m.extend([m.stack.pop()]),
    "APPENDS": lambda m, a: m.extend(m.pop_mark()),
    "ADDITEMS": lambda m, a: m.extend(m.pop_mark()),
    "SETITEM": _set_item,
    "SETITEMS": lambda m, a: m.set_items(m.pop_mark()),
    **{name: lambda m, a: m.stack.append(m.memo[int(a)]) for name in ("GET", "BINGET", "LONG_BINGET")},
    **{name: lambda m, a: m.put(int(a)) for name in ("PUT", "BINPUT", "LONG_BINPUT")},
    "MEMOIZE": lambda m, a: m.put(len(m.memo)),
    **{name: lambda m, a: m.stack.append(Name(f"extension {a}")) for name in ("EXT1", "EXT2", "EXT4")},
    "NEXT_BUFFER": lambda m, a: m.stack.append(Persistent("buffer")),
    "PERSID": lambda m, a: m.stack.append(Persistent(a)),
    "BINPERSID": lambda m, a: m.stack.append(Persistent(m.stack.pop())),
    "GLOBAL": lambda m, a: m.stack.append(Name(a)),
    "STACK_GLOBAL": _stack_global,
    "INST": lambda m, a: m.call(Name(a), m.pop_mark()),
    "OBJ": _call_above_mark,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _reduce_with_names,
    "BUILD": lambda m, a: m.build(m.stack.pop()),
}
