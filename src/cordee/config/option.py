"""How one option is declared: default, help, spellings, choices.

Owns `option` and `required`, which declare a field of a schema class, and `options_of`, which reads the declarations
back for the loader, the help and the renderer. Knows no option by name, no file and no command line."""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

_KEY = "cordee.option"


@dataclass(frozen=True, kw_only=True)
class _Declaration:
    help: str
    aliases: tuple[str, ...] = ()
    negations: tuple[str, ...] = ()
    shorthands: Mapping[str, object] = field(default_factory=dict)
    synonyms: Mapping[str, str] = field(default_factory=dict)
    metavar: str | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    positional: bool = False
    reads: str | None = None
    elsewhere: tuple[str, ...] = ()
    empty: bool = False


def option(default: Any, help: str, **details: Any) -> Any:
    """Declare a field: `micro_batch_size: int = option(1, "samples per forward pass", above=0)`.

    The field's annotation is its type: `bool`, `int`, `float`, `str`, `Literal[...]` (its choices), `tuple[T, ...]`,
    `tuple[T, T, T]`, `Mapping[str, str | int | bool]`, each also with `| None`, where None means "not given".

    details:
        aliases: other flags with the same meaning, spelled as flags: `("--layernorm-epsilon",)`.
        negations: flags of a boolean that switch it off, besides `--no-<name>`.
        shorthands: flags without a value that set this one: `{"--use-distributed-optimizer": 1}`.
        synonyms: other spellings of a value: `{"bf16": "bfloat16"}`.
        metavar: how the help names the value.
        at_least, above, at_most, below: the range of a number, or of each number of a list.
        positional: the value also stands without its flag: `cordee bench train`.
        elsewhere: what other programs call it: a name that is answered with ours, as its values may have another unit.
        empty: a text may have no characters, which is else what a variable that is not set leaves.
        reads: the value, such as a file, sets further options that are not given: those that a function,
            `module:function`, returns as entries, with problems, for it, the values so far and the options given."""
    declaration = _Declaration(help=help, **details)
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={_KEY: declaration})
    return field(default=default, metadata={_KEY: declaration})


def required(help: str, **details: Any) -> Any:
    """Declare a field that every run must give; details as for `option`."""
    return field(metadata={_KEY: _Declaration(help=help, **details)})


@dataclass(frozen=True, kw_only=True)
class Option:
    """A declared option, read back."""

    name: str  # field name and YAML key
    kind: type  # bool, int, float, str
    shape: Literal["one", "many", "map"]
    length: int | None  # of a tuple with a fixed length
    optional: bool  # None is allowed and means "not given"
    default: object  # MISSING when required
    choices: tuple[object, ...]
    group: str  # title of the topic
    declared: _Declaration

    @property
    def is_switch(self) -> bool:
        """Whether its flags take no value."""
        return self.kind is bool and self.shape == "one"

    @property
    def flag(self) -> str:
        return to_flag(self.name)

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def value_flags(self) -> tuple[str, ...]:
        """Flags that take the option's value; those of a boolean set it to True."""
        return (self.flag, *self.declared.aliases)

    @property
    def negations(self) -> tuple[str, ...]:
        """Flags that set a boolean to False."""
        return ("--no-" + to_flag(self.name)[2:], *self.declared.negations) if self.kind is bool else ()


def to_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@functools.cache
def options_of(schema: type) -> tuple[Option, ...]:
    """All options of a schema class, in the order of its bases."""
    hints, declared = get_type_hints(schema), {f.name: f for f in dataclasses.fields(schema)}
    return tuple(_read(declared[name], hints[name], group) for name, group in _groups(schema).items())


def _groups(schema: type) -> dict[str, str]:
    """Title of the class that declares each field, in order of bases: its `group`, or its docstring's first line."""
    return {
        name: (vars(base).get("group") or base.__doc__ or "").splitlines()[0].rstrip(".")
        for base in schema.__mro__
        for name in inspect.get_annotations(base)
    }


def _read(declared: dataclasses.Field[Any], hint: Any, group: str) -> Option:
    inner, optional = _without_none(hint)
    shape: Literal["one", "many", "map"] = "one"
    length = None
    if get_origin(inner) is tuple:
        items = get_args(inner)
        shape, length = "many", None if items[-1] is Ellipsis else len(items)
        inner = items[0]
    elif get_origin(inner) is Mapping:
        shape, inner = "map", str
    choices = get_args(inner) if get_origin(inner) is Literal else ()
    default = {} if declared.default_factory is not MISSING else declared.default
    return Option(
        name=declared.name,
        kind=type(choices[0]) if choices else inner,
        shape=shape,
        length=length,
        optional=optional,
        default=default,
        choices=choices,
        group=group,
        declared=declared.metadata[_KEY],
    )


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) not in (types.UnionType, typing.Union):
        return hint, False
    kinds = [kind for kind in get_args(hint) if kind is not types.NoneType]
    assert len(kinds) == 1, f"an option has one type, or one type and None: {hint}"
    return kinds[0], True
