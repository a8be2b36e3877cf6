"""Pickles read as data: nothing that they name is imported, built or called.

Owns the machine that a pickle's opcodes drive. Python's own imports and calls what a pickle names; here a name is a
`Name`, a call is a `Call`, and only the constructors that the reader hands in (`Builder`) are run. Text opcodes of
protocols 0 and 1 and `copyreg` extensions, which no file of weights uses, are refused. Knows no format of weights.
"""

import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

_CORRUPT = (
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    struct.error,
    UnicodeDecodeError,
    OverflowError,
    RecursionError,
)


class Bytes(Protocol):
    """`bytes`, or a file mapped into memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class Name:
    """What Python would import."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Call:
    """What Python would build: `function`, called with `args`, then given `state`.

    Items that a class of lists or dicts would be given are not kept: nothing that is read has such.
    """

    function: object
    args: tuple[object, ...]
    state: object = None

    def append(self, item: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def __repr__(self) -> str:
        return "(not read)"


@dataclass(frozen=True, slots=True)
class Builder:
    """A function that may be run: what the reader of a format puts in the place of a name."""

    function: Callable[..., object]


def _refuse(persistent_id: object) -> object:
    raise ValueError("it refers to objects outside of itself")


def load(
    data: Bytes,
    start: int = 0,
    *,
    resolve: Callable[[str, str], object] = Name,
    persistent: Callable[[object], object] = _refuse,
) -> tuple[object, int]:
    """The content of the pickle at `start` in `data`, and where it ends.

    resolve: what stands for (module, name): plain data, a `Builder`, or a `Name`.
    persistent: what stands for the object that the file keeps elsewhere under an id.
    ValueError if it is corrupt, or has opcodes that no file of weights has. Memory: a constant times the pickle.
    """
    machine = _Machine(data, start, resolve, persistent)
    try:
        return machine.run(), machine.at
    except _CORRUPT as error:
        raise ValueError(f"its pickle is corrupt at byte {machine.at}: {type(error).__name__} {error}") from error


class _Machine:
    """A stack of objects, the stacks below each mark, and the memo."""

    def __init__(
        self, data: Bytes, start: int, resolve: Callable[[str, str], object], persistent: Callable[[object], object]
    ):
        self.at = start
        self._data, self._size = data, len(data)
        self._resolve, self._persistent = resolve, persistent
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> object:
        operations = {code[0]: partial(operation, self, *given) for code, (operation, *given) in _OPERATIONS.items()}
        data, memo, stack, at = self._data, self._memo, self._stack, self.at
        while True:
            code = data[at]
            at += 1
            # Metadata of many ranks has millions of opcodes, and two of three are one of these.
            if code == _BINGET:
                stack.append(memo[data[at]])
                at += 1
            elif code == _LONG_BINGET:
                stack.append(memo[int.from_bytes(data[at : at + 4], "little")])
                at += 4
            elif code == _MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif code == _BININT1:
                stack.append(data[at])
                at += 1
            else:
                self.at = at
                if code == pickle.STOP[0]:
                    return stack.pop()
                operation = operations.get(code)
                if operation is None:
                    raise ValueError(f"its pickle has the opcode {bytes([code])!r}, which no file of weights has")
                operation()
                stack, at = self._stack, self.at

    # ---- arguments of opcodes ----------------------------------------------------------------------------------------

    def _take(self, size: int) -> bytes:
        end = self.at + size
        if not self.at <= end <= self._size:
            raise IndexError("it ends before its content does")
        taken = self._data[self.at : end]
        self.at = end
        return taken

    def _number(self, form: struct.Struct) -> Any:
        return form.unpack(self._take(form.size))[0]

    def _line(self) -> str:
        start = self.at
        while self._data[self.at] != 0x0A:
            self.at += 1
        self.at += 1
        return str(self._data[start : self.at - 1], "utf-8")

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    # ---- plain data --------------------------------------------------------------------------------------------------

    def skip(self, size: int) -> None:
        self._take(size)

    def constant(self, make: Callable[[], object]) -> None:
        self._stack.append(make())

    def number(self, form: struct.Struct) -> None:
        self._stack.append(self._number(form))

    def integer(self, form: struct.Struct) -> None:
        self._stack.append(int.from_bytes(self._take(self._number(form)), "little", signed=True))

    def text(self, form: struct.Struct, encoding: str) -> None:
        self._stack.append(str(self._take(self._number(form)), encoding, "surrogatepass"))

    def bytes_(self, form: struct.Struct) -> None:
        self._stack.append(self._take(self._number(form)))

    # ---- containers --------------------------------------------------------------------------------------------------

    def mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._since_mark()

    def pop_mark(self) -> None:
        self._since_mark()

    def last(self, size: int) -> None:
        if len(self._stack) < size:
            raise IndexError("a tuple of more than there is")
        self._stack[-size:] = [tuple(self._stack[-size:])]

    def collect(self, kind: Callable[[list[Any]], object]) -> None:
        items = self._since_mark()
        self._stack.append(kind(items))

    def append(self) -> None:
        item = self._stack.pop()
        self._stack[-1].append(item)

    def appends(self) -> None:
        items = self._since_mark()
        target = self._stack[-1]
        for item in items:
            target.append(item)

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._stack[-1][_flat(key)] = value

    def set_items(self) -> None:
        items = self._since_mark()
        target = self._stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_flat(key)] = value

    def add_items(self) -> None:
        items = self._since_mark()
        self._stack[-1].update(map(_flat, items))

    # ---- memo --------------------------------------------------------------------------------------------------------

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def put(self, form: struct.Struct) -> None:
        self._memo[self._number(form)] = self._stack[-1]

    def get(self, form: struct.Struct) -> None:
        self._stack.append(self._memo[self._number(form)])

    # ---- what Python would import and call ---------------------------------------------------------------------------

    def name(self) -> None:
        self._stack.append(self._resolve(self._line(), self._line()))

    def stack_name(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("a name that is no text")
        self._stack.append(self._resolve(module, name))

    def call(self) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        self._stack.append(_call(function, args))

    def call_with_keywords(self) -> None:
        keywords, args, function = self._stack.pop(), self._stack.pop(), self._stack.pop()
        if keywords:
            raise ValueError("something is called with keywords, which no file of weights does")
        self._stack.append(_call(function, args))

    def build(self) -> None:
        """State goes to calls alone. What a builder has made is complete, and its attributes are of no interest."""
        state = self._stack.pop()
        if isinstance(target := self._stack[-1], Call):
            target.state = state

    def persistent_id(self) -> None:
        self._stack.append(self._persistent(self._stack.pop()))


def _call(function: object, args: object) -> object:
    if not isinstance(args, tuple):
        raise TypeError("arguments that are no tuple")
    return function.function(*args) if isinstance(function, Builder) else Call(function, args)


def _flat(key: object) -> object:
    """`key`, which is to be hashed: Python hashes nested tuples by a recursion that nothing stops, and of large numbers
    any count may be alike."""
    for item in key if isinstance(key, tuple | frozenset) else (key,):
        if isinstance(item, tuple | frozenset) or (isinstance(item, int) and not -(2**63) <= item < 2**63):
            raise TypeError("keys of nested tuples, or of large numbers")
    return key


_BYTE, _SHORT, _SIGNED = struct.Struct("B"), struct.Struct("<H"), struct.Struct("<i")
_WORD, _LONG, _REAL = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct(">d")

_BINGET, _LONG_BINGET, _MEMOIZE, _BININT1 = (
    code[0] for code in (pickle.BINGET, pickle.LONG_BINGET, pickle.MEMOIZE, pickle.BININT1)
)

_OPERATIONS: dict[bytes, tuple[Callable[..., None], *tuple[object, ...]]] = {  # of each opcode, with what it is given
    pickle.PROTO: (_Machine.skip, 1),
    pickle.FRAME: (_Machine.skip, 8),
    pickle.NONE: (_Machine.constant, lambda: None),
    pickle.NEWTRUE: (_Machine.constant, lambda: True),
    pickle.NEWFALSE: (_Machine.constant, lambda: False),
    pickle.EMPTY_LIST: (_Machine.constant, list),
    pickle.EMPTY_TUPLE: (_Machine.constant, tuple),
    pickle.EMPTY_DICT: (_Machine.constant, dict),
    pickle.EMPTY_SET: (_Machine.constant, set),
    pickle.BININT: (_Machine.number, _SIGNED),
    pickle.BININT1: (_Machine.number, _BYTE),
    pickle.BININT2: (_Machine.number, _SHORT),
    pickle.BINFLOAT: (_Machine.number, _REAL),
    pickle.LONG1: (_Machine.integer, _BYTE),
    pickle.LONG4: (_Machine.integer, _WORD),
    pickle.SHORT_BINUNICODE: (_Machine.text, _BYTE, "utf-8"),
    pickle.BINUNICODE: (_Machine.text, _WORD, "utf-8"),
    pickle.BINUNICODE8: (_Machine.text, _LONG, "utf-8"),
    pickle.SHORT_BINSTRING: (_Machine.text, _BYTE, "latin-1"),  # texts of Python 2
    pickle.BINSTRING: (_Machine.text, _WORD, "latin-1"),
    pickle.SHORT_BINBYTES: (_Machine.bytes_, _BYTE),
    pickle.BINBYTES: (_Machine.bytes_, _WORD),
    pickle.BINBYTES8: (_Machine.bytes_, _LONG),
    pickle.BYTEARRAY8: (_Machine.bytes_, _LONG),
    pickle.MARK: (_Machine.mark,),
    pickle.POP: (_Machine.pop,),
    pickle.POP_MARK: (_Machine.pop_mark,),
    pickle.TUPLE1: (_Machine.last, 1),
    pickle.TUPLE2: (_Machine.last, 2),
    pickle.TUPLE3: (_Machine.last, 3),
    pickle.TUPLE: (_Machine.collect, tuple),
    pickle.FROZENSET: (_Machine.collect, lambda items: frozenset(map(_flat, items))),
    pickle.APPEND: (_Machine.append,),
    pickle.APPENDS: (_Machine.appends,),
    pickle.SETITEM: (_Machine.set_item,),
    pickle.SETITEMS: (_Machine.set_items,),
    pickle.ADDITEMS: (_Machine.add_items,),
    pickle.MEMOIZE: (_Machine.memoize,),
    pickle.BINPUT: (_Machine.put, _BYTE),
    pickle.LONG_BINPUT: (_Machine.put, _WORD),
    pickle.BINGET: (_Machine.get, _BYTE),
    pickle.LONG_BINGET: (_Machine.get, _WORD),
    pickle.GLOBAL: (_Machine.name,),
    pickle.STACK_GLOBAL: (_Machine.stack_name,),
    pickle.REDUCE: (_Machine.call,),
    pickle.NEWOBJ: (_Machine.call,),
    pickle.NEWOBJ_EX: (_Machine.call_with_keywords,),
    pickle.BUILD: (_Machine.build,),
    pickle.BINPERSID: (_Machine.persistent_id,),
}
