"""Handlers: how records of each layout become dialogues, pairs of them, or text. The values of --handler-name.

Owns the layouts and their column names (--map-keys, dataset_info.json). Knows no token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cordee.data.messages import Dialogue
from cordee.data.templates import Template


@dataclass(frozen=True, kw_only=True)
class Handler:
    """A layout of records.

    columns: the fields of a record that it reads; `required` are those that no record may lack.
    templated: it takes --prompt-type (or the tokenizer's template); else `own_template` is its fixed one.
    pairwise: records are answers of which one is chosen, read by `pairs`. is_text: they are plain text, read by `text`.
    """

    name: str
    columns: tuple[str, ...]
    required: tuple[str, ...]
    pairwise: bool = False
    templated: bool = False
    is_text: bool = False
    own_template: Template | None = None

    def dialogues(self, record: Mapping[str, Any]) -> list[Dialogue]:
        """Raises `BadRecord`."""
        raise NotImplementedError

    def pairs(self, record: Mapping[str, Any]) -> tuple[Dialogue, Dialogue]:
        """The dialogue with the chosen and with the rejected answer. Raises `BadRecord`."""
        raise NotImplementedError

    def text(self, record: Mapping[str, Any]) -> str:
        """Raises `BadRecord`."""
        raise NotImplementedError


def handler_named(name: str, map_keys: str | None = None) -> Handler:
    """Raises `ProblemError` for an unknown name and for --map-keys that are not such of this handler."""
    raise NotImplementedError


def from_dataset_info(directory: Path, name: str) -> tuple[Path, Handler]:
    """LlamaFactoryInstructionHandler: the file of a dataset in dataset_info.json, and how its records are read."""
    raise NotImplementedError
