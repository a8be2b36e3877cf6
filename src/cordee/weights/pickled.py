"""Pickles read as data: nothing that they name is imported, built or called.

Owns what stands for it: a name is a `Name`, a call is a `Call`, and only the constructors that the reader hands in
(`Builder`) are run. Plain data is read by the standard library's unpickler, the one that is written in Python, which is
left with no opcode that imports, calls, or sets attributes. Text opcodes of protocols 0 and 1 and `copyreg` extensions,
which no file of weights uses, are refused. Knows no format of weights."""

import io
import mmap
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

Operation = Callable[[Any], None]  # of an opcode: what it does to the machine
_CORRUPT = (LookupError, TypeError, AttributeError, OverflowError, RecursionError)
_CORRUPT += (EOFError, UnicodeError, struct.error, pickle.UnpicklingError)


class Mapped(mmap.mmap):
    """A file mapped into memory, of which a pickle may be a small part: nothing is copied that it cannot be."""

    def read(self, size: int) -> bytes:
        if not 0 <= size <= len(self) - self.tell():
            raise EOFError("it ends before its content does")
        return super().read(size)

    def readline(self) -> bytes:
        return self.read(self.find(b"\n", start := self.tell(), start + 2**12) + 1 - start)  # a name, or refused


@dataclass(frozen=True, slots=True)
class Name:
    """What Python would import."""

    module: str
    name: str


@dataclass(eq=False, slots=True)
class Call:
    """What Python would build: `function`, called with `args`, then given `state`.

    Items that a class of lists or dicts would be given are not kept: nothing that is read has such."""

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
    data: bytes | Mapped,
    start: int = 0,
    *,
    resolve: Callable[[str, str], object] = Name,
    persistent: Callable[[object], object] = _refuse,
) -> tuple[object, int]:
    """The content of the pickle at `start` in `data`, and where it ends.

    resolve: what stands for (module, name): plain data, a `Builder`, or a `Name`.
    persistent: what stands for the object that the file keeps elsewhere under an id.
    ValueError if it is corrupt, or has opcodes that no file of weights has. Memory: a constant times the pickle."""
    file = data if isinstance(data, Mapped) else io.BytesIO(data)
    file.seek(start)
    try:
        return _Machine(file, resolve, persistent).load(), file.tell()
    except _CORRUPT as error:
        raise ValueError(f"its pickle is corrupt at byte {file.tell()}: {type(error).__name__} {error}") from error


class _Opcodes(dict[int, Operation]):
    def __missing__(self, code: int) -> Operation:
        raise ValueError(f"its pickle has the opcode {bytes([code])!r}, which no file of weights has")


def _python(opcodes: str) -> dict[int, Operation]:
    """What Python does at these opcodes, by their codes."""
    return {(code := getattr(pickle, name)[0]): pickle._Unpickler.dispatch[code] for name in opcodes.split()}


def _hashing(opcodes: str, keys: slice) -> dict[int, Operation]:
    """The same, of opcodes that hash `keys` of the stack, which are looked at before. Python hashes nested tuples by a
    recursion that nothing stops, and of large numbers any count may be alike."""

    def checked(operation: Operation, machine: Any) -> None:
        for key in machine.stack[keys]:
            for item in key if isinstance(key, tuple | frozenset) else (key,):
                if isinstance(item, tuple | frozenset) or (isinstance(item, int) and not -(2**63) <= item < 2**63):
                    raise TypeError("keys of nested tuples, or of large numbers")
        operation(machine)

    return {code: partial(checked, operation) for code, operation in _python(opcodes).items()}


class _Machine(pickle._Unpickler):
    """Python's, of which `stack` and `read` are used, and `dispatch` is replaced by opcodes that do no harm."""

    stack: list[Any]

    def __init__(self, file: Any, resolve: Callable[[str, str], object], persistent: Callable[[object], object]):
        super().__init__(file, encoding="latin-1")  # of the texts of Python 2
        self._resolve, self._persistent = resolve, persistent

    def find_class(self, module: str, name: str) -> object:
        return self._resolve(module, name)

    def persistent_load(self, pid: object) -> object:
        return self._persistent(pid)

    def call(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(args, tuple):
            raise TypeError("arguments that are no tuple")
        self.stack.append(function.function(*args) if isinstance(function, Builder) else Call(function, args))

    def call_with_keywords(self) -> None:
        if self.stack.pop():
            raise ValueError("something is called with keywords, which no file of weights does")
        self.call()

    def build(self) -> None:
        """State goes to calls alone. What a builder has made is complete, and its attributes are of no interest."""
        state = self.stack.pop()
        if isinstance(target := self.stack[-1], Call):
            target.state = state

    dispatch = _Opcodes(
        _python("PROTO STOP MARK POP POP_MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET BINPERSID")
        | _python("NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT SHORT_BINBYTES BINBYTES BINBYTES8")
        | _python("SHORT_BINSTRING BINSTRING SHORT_BINUNICODE BINUNICODE BINUNICODE8 EMPTY_DICT EMPTY_SET EMPTY_LIST")
        | _python("GLOBAL STACK_GLOBAL APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3")
        | _hashing("SETITEM", slice(-2, -1))
        | _hashing("SETITEMS", slice(None, None, 2))
        | _hashing("ADDITEMS FROZENSET", slice(None))
    )
    dispatch[pickle.BYTEARRAY8[0]] = dispatch[pickle.BINBYTES8[0]]  # which has no memory made that nothing fills
    dispatch[pickle.FRAME[0]] = lambda machine: machine.read(8)  # Python would copy all that the frame says it has
    dispatch[pickle.REDUCE[0]] = dispatch[pickle.NEWOBJ[0]] = call
    dispatch[pickle.NEWOBJ_EX[0]] = call_with_keywords
    dispatch[pickle.BUILD[0]] = build
