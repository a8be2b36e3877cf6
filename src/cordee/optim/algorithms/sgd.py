"""Stochastic gradient descent with momentum; the weight decay is part of the gradient."""

from __future__ import annotations

from typing import Any

from torch.optim import SGD

from cordee.config.schema import OptimizerOptions


def build(options: OptimizerOptions, groups: list[dict[str, Any]], fused: bool) -> SGD:
    return SGD(groups, lr=options.lr, momentum=options.sgd_momentum, fused=fused, foreach=not fused)


ALGORITHMS = {"sgd": build}
