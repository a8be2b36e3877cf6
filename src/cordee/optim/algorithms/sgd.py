"""Stochastic gradient descent with momentum; the weight decay is part of the gradient."""

from typing import TYPE_CHECKING

from cordee.optim.algorithms import Groups
from cordee.optim.options import OptimizerOptions

if TYPE_CHECKING:
    from torch.optim import SGD


def build(options: OptimizerOptions, groups: Groups, fused: bool) -> "SGD":
    from torch.optim import SGD

    # Its fused kernel takes no DTensor.
    return SGD(groups, lr=options.lr, momentum=options.sgd_momentum, foreach=True)


ALGORITHMS = {"sgd": build}
