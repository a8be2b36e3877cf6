"""Templates: how messages are written for a model.

Owns the values of --prompt-type and the reading of a tokenizer's own chat template. Knows no token id.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Template:
    """What all templates have in common."""


def template_named(prompt_type: str) -> Template:
    """Raises `ProblemError` for an unknown name."""
    raise NotImplementedError


def chat_template(directory: Path) -> Template:
    """The tokenizer's own template. Raises `ProblemError` if it has none that can be used."""
    raise NotImplementedError
