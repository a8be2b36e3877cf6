"""Where messages for people go.

Owns how the logger "cordee" prints. Knows nothing of ranks but the one it is told at start.
"""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("cordee")


def setup(rank: int = 0, level: int = logging.INFO) -> None:
    """Print messages of rank 0 and warnings of every rank to standard error, those of other ranks with their number."""
    logger.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level if rank == 0 else logging.WARNING)
    logger.propagate = False
