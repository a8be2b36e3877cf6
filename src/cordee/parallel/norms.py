"""Norms and counts over tensors that ranks of a pipeline have parts of.

Owns adding up over the pipeline what `optim/clip.py` works out of one rank's tensors. Each tensor belongs to one rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cordee.model.gpt import GPTModel
from cordee.optim import clip
from cordee.parallel import collectives
from cordee.parallel.layout import Layout


def own(model: GPTModel) -> list[nn.Parameter]:
    """The trained parameters that count on this rank: a copy of another rank's embedding does not."""
    copy = model.embedding.weight if model.copies_embedding else None
    return [parameter for parameter in model.parameters() if parameter.requires_grad and parameter is not copy]


def global_norm(tensors: Sequence[Tensor], layout: Layout, device: torch.device) -> float:
    """L2 norm over all elements of all ranks' `tensors`; NaN or inf where one of them is not finite."""
    norm = clip.global_norm(tensors) if tensors else torch.zeros((), device=device)
    if layout.degrees.pp == 1:
        return norm.item()
    return collectives.sum_over(norm.square(), layout, ("pp",)).sqrt().item()


def count_zeros(tensors: Sequence[Tensor], layout: Layout, device: torch.device) -> int:
    """How many elements of all ranks' `tensors` are exactly 0."""
    count = clip.count_zeros(tensors) if tensors else torch.zeros((), dtype=torch.int64, device=device)
    return int(collectives.sum_over(count, layout, ("pp",)))
