"""What techniques do to a module, in one object on it: its `placement`.

Owns how parallelism, memory techniques and adapters enter a model, and the record of what they did there. Knows none
of them.

A module that has seams is built with a `Placement` of its own kind, a dataclass whose fields are the seams and whose
defaults are those of one process. A field that holds a function is a *hook*, which the module calls, and any other a
*fact*, such as the first head that this rank computes. Every parameter has one more hook, "view_of_NAME": how the
parameter, as it is kept, becomes the tensor that this process computes with. Nothing else is changed by assignment
either: what is not in the record cannot have happened.

    linear.placement.wrap("product", "adapters", lambda inner: ...)       # in addition to what others do
    mlp.placement.replace("dispatch", "expert parallelism", dispatcher)   # instead of the default
    attention.placement.set("tensor parallelism", first_head=8)           # once

Whoever computes what a module does without calling it asks `altered`, and calls it if anything is."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

Call = Callable[..., Tensor]  # of a forward and its inputs: what the forward makes of them
View = Callable[[Tensor], Tensor]


class ConflictError(ValueError):
    """Technique `by` wants what the technique `other` has done to `hook` to be otherwise."""

    def __init__(self, placement: "Placement", hook: str, by: str, other: str):
        super().__init__(f"{by} cannot go with {other}: both change `{hook}` of a {type(placement).__name__}")
        self.hook, self.by, self.other = hook, by, other


class Change(NamedTuple):
    """What a technique did to a hook or fact. `compiles`: torch.compile may trace it. `final`: none may come after."""

    hook: str
    by: str
    compiles: bool = False
    final: bool = False

    def __str__(self) -> str:
        return f"{self.by} has changed `{self.hook}`"


def unchanged(x: Tensor) -> Tensor:
    return x


def plainly(forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
    return forward(*inputs)


def before(function: Callable[[Tensor], Tensor]) -> Callable[[Callable[[Tensor], Any]], Callable[[Tensor], Any]]:
    """For `wrap`: the hook of what `function` makes."""
    return lambda inner: lambda x: inner(function(x))


def after(function: Callable[[Tensor], Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """For `wrap`: `function` of what the hook makes."""
    return lambda inner: lambda *inputs: function(inner(*inputs))


@dataclass(eq=False, kw_only=True)
class Placement:
    """Of a module without further seams. `applied` is what was done, in order."""

    applied: tuple[Change, ...] = field(default_factory=tuple, init=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self) or name not in self.__dataclass_fields__:
            raise AttributeError(f"{name} of a placement is changed by wrap, replace or set, which keep a record")
        super().__setattr__(name, value)

    @property
    def hooks(self) -> list[str]:
        """The names of all hooks."""
        return [name for name, value in vars(self).items() if callable(value)]

    def wrap(self, hook: str, by: str, around: Callable[[Any], Any], *, compiles: bool = False) -> None:
        """Let the hook be `around(hook)`: the last technique to wrap is the outermost.

        ConflictError where a technique that replaced the hook allows none after it."""
        for change in self._changes(hook):
            if change.final:
                raise ConflictError(self, hook, by, change.by)
        self._change(around(vars(self)[hook]), Change(hook, by, compiles))

    def replace(
        self,
        hook: str,
        by: str,
        function: Any,
        *,
        instead_of: str | None = None,
        final: bool = False,
        compiles: bool = False,
    ) -> None:
        """Let the hook be `function` instead of its default, or of what the one technique `instead_of` made of it.

        ConflictError where what another technique has done would be lost."""
        found = self._changes(hook)
        for change in found:
            if change.by != instead_of or change.final:
                raise ConflictError(self, hook, by, change.by)
        vars(self)["applied"] = tuple(change for change in self.applied if change.hook != hook)
        self._change(function, Change(hook, by, compiles, final))

    def set(self, by: str, **facts: Any) -> None:
        """Set facts of a layout. ConflictError where another technique has set another value."""
        for fact, value in facts.items():
            for change in self._changes(fact):
                if vars(self)[fact] != value:
                    raise ConflictError(self, fact, by, change.by)
            self._change(value, Change(fact, by, compiles=True))

    def declare(self, parameter: str) -> None:
        """Give `parameter` its view."""
        view = f"view_of_{parameter}"
        assert view not in vars(self), f"{parameter} is declared twice"
        vars(self)[view] = unchanged

    def view(self, parameter: str) -> View:
        """How `parameter`, as it is kept, becomes the tensor that this process computes with."""
        return getattr(self, f"view_of_{parameter}")

    def _changes(self, hook: str) -> list[Change]:
        assert hook in vars(self) and hook != "applied", f"{type(self).__name__} has no {hook}"
        return [change for change in self.applied if change.hook == hook]

    def _change(self, value: Any, change: Change) -> None:
        vars(self)[change.hook] = value
        vars(self)["applied"] = (*self.applied, change)


@dataclass(eq=False, kw_only=True)
class CallPlacement(Placement):
    """Of a module whose forward can be run in another way: computed again in the backward, for instance."""

    call: Call = plainly


@dataclass(eq=False, kw_only=True)
class BlockPlacement(CallPlacement):
    """Of a block: what happens to activations `[batch, seq, embed]` as they enter and leave it."""

    enter: View = unchanged
    exit: View = unchanged


def changes(module: nn.Module) -> Iterator[Change]:
    """What was done to `module` and its parts."""
    for part in module.modules():
        if isinstance(placement := getattr(part, "placement", None), Placement):
            yield from placement.applied


def altered(module: nn.Module, honoured: Collection[str] = ()) -> str | None:
    """What `module` or one of its parts does beyond what its class says; None if nothing.

    `honoured` are hooks and facts that whoever asks takes part in, whatever they are."""
    for change in changes(module):
        if change.hook not in honoured:
            return str(change)
    for part in module.modules():
        name = type(part).__name__
        if part._forward_hooks or part._forward_pre_hooks:
            return f"a {name} has a forward hook"
        for attribute in vars(part):
            if callable(getattr(type(part), attribute, None)):
                return f"`{attribute}` of a {name} is replaced"
    return None
