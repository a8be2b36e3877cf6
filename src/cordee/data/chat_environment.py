"""What chat templates may do: the Jinja environment of `transformers`.

Owns its filters, functions and tags, in a sandbox. A template is other people's program; it reaches the messages only.
"""

import datetime
import json
from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cordee.errors import ProblemError

# What a template raises on messages that it is not made for: by its own word, or as the program that it is.
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the model writes, put between `generation_marks`."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclosed", [nodes.ContextReference()]), [], [], body).set_lineno(line)

    def _enclosed(self, context: Context, caller: Callable[[], str]) -> str:
        before, behind = context["generation_marks"]
        return f"{before}{caller()}{behind}"


def compiled(source: str) -> jinja2.Template:
    """Raises `ProblemError` if it is no template."""
    try:
        return _environment().from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        why, fix = f"it is no Jinja template: {error}", "correct it, or give --prompt-type"
        raise ProblemError.of("--hf-chat-template", None, why, fix) from error


@cache
def _environment() -> jinja2.Environment:
    extensions = [_Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    now = datetime.datetime.now
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: now().strftime(form)}
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
