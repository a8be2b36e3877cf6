"""Which part of a model a process builds.

Knows no torch, so that a layout can be worked out and checked before any process starts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """The part of a model that one pipeline stage runs: layers [start, stop), the embedding, norm and head."""

    start: int
    stop: int
    embedding: bool = True
    head: bool = True

    @property
    def layers(self) -> range:
        return range(self.start, self.stop)
