"""Dialogues: what instruction records become, whatever their layout, and what templates write.

Owns the form of a message and of a dialogue, and of the JSON in them. Knows no record layout, template or tokenizer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "observation", "function"]
IGNORED = -100  # the label of a token that is not trained
ANSWERS = ("assistant", "function")  # what the model writes


class BadRecord(Exception):
    """Why a record cannot be used. Whoever reads records counts it, with the place of the record."""


@dataclass(frozen=True)
class Message:
    """One message. A "function" message is a call of tools: its content is JSON, {"name": ..., "arguments": {...}} or a
    list of such; "observation" is what a tool returned. Unless `trained` it is not learned.

    more: further fields of an OpenAI message, such as reasoning_content, or the content beside tool calls. The
    tokenizer's own template is given them."""

    role: Role
    content: str
    trained: bool = True
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Dialogue:
    """Messages, and the tools that they may call: JSON, a list of OpenAI tools or of their "function" objects."""

    messages: tuple[Message, ...]
    tools: str | None = None


def raise_unless_alternating(messages: Sequence[Message]) -> None:
    """Questions, of a user or a tool, and answers by turns, from a question on."""
    for i, message in enumerate(messages):
        if (message.role in ANSWERS) != (i % 2 == 1) or message.role == "system":
            raise BadRecord(f"message {i + 1} is of {message.role!r}: user and assistant must alternate")


def calls_of(content: str) -> list[dict[str, Any]]:
    """The calls of a "function" message, arguments as objects (OpenAI has them as JSON in a string)."""
    value = _parsed(content, "tool call")
    calls = value if isinstance(value, list) else [value]
    for call in calls:
        if not (isinstance(call, dict) and isinstance(call.get("name"), str) and "arguments" in call):
            raise BadRecord("a tool call is no object with a name and arguments")
        if isinstance(call["arguments"], str):
            call["arguments"] = _parsed(call["arguments"], "tool call")
    return calls


def tools_of(tools: str) -> list[dict[str, Any]]:
    """The "function" objects of the tools of a dialogue."""
    value = _parsed(tools, "list of tools")
    if not isinstance(value, list):
        raise BadRecord("the tools are no list")
    functions = [each.get("function", each) if isinstance(each, dict) else each for each in value]
    if not all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in functions):
        raise BadRecord("a tool is no object with a name")
    return functions


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"a {what} is no JSON: {error}") from error
