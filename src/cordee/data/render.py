"""Dialogues to token ids and labels.

Owns which tokens are trained. Labels come from where a token stands, never from its id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cordee.data.messages import Dialogue, Message
from cordee.data.templates import Template
from cordee.tokenizer import Tokenizer

IGNORED = -100


@dataclass(frozen=True)
class Turn:
    """What comes before an answer, and the answer. labels[i] is the id that position i has to be predicted as, not
    shifted; -100 where it is not trained. `unproved`: answers in `source` that were to be trained but that the template
    writes otherwise in hindsight."""

    source: list[int]
    target: list[int]
    source_labels: list[int]
    target_labels: list[int]
    unproved: int = 0


class Renderer:
    def __init__(
        self,
        template: Template,
        tokenizer: Tokenizer,
        *,
        train_on: Literal["assistant", "last", "all"] = "assistant",
        mask_history: bool = False,
    ):
        raise NotImplementedError

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        raise NotImplementedError

    def turns(self, dialogue: Dialogue) -> list[Turn]:
        """Raises `BadRecord` for a dialogue that the template does not take, or of which nothing is trained."""
        raise NotImplementedError

    def prompt(self, messages: Sequence[Message], tools: str | None = None) -> list[int]:
        """The ids that a model is given to answer the last message."""
        raise NotImplementedError
