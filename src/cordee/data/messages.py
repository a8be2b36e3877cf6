"""Dialogues: what instruction records become, whatever their layout, and what templates render.

Owns the form of a message and of a dialogue. Knows no record layout, template or tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "observation", "function"]
ANSWERS = ("assistant", "function")  # what the model writes


class BadRecord(Exception):
    """Why a record cannot be used. Whoever reads records counts it, with the place of the record."""


@dataclass(frozen=True)
class Message:
    """One message. A "function" message is a call of tools: its content is JSON, {"name": ..., "arguments": {...}} or a
    list of such; "observation" is what a tool returned. Unless `trained` no label comes from it.

    more: further fields of an OpenAI message, such as reasoning_content, or the content beside tool calls. The
    tokenizer's own template is given them.
    """

    role: Role
    content: str
    trained: bool = True
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Dialogue:
    """Messages, and the tools that they may call: JSON, a list of OpenAI tools or of their "function" objects."""

    messages: tuple[Message, ...]
    tools: str | None = None
