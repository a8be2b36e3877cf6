"""AdamW: Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019)."""

from typing import TYPE_CHECKING

from cordee.optim.algorithms import Groups
from cordee.optim.options import OptimizerOptions

if TYPE_CHECKING:
    from torch.optim import AdamW


def build(options: OptimizerOptions, groups: Groups, fused: bool) -> "AdamW":
    """One fused kernel over all parameters of a group, else torch's operators over lists of tensors."""
    from torch.optim import AdamW

    betas = (options.adam_beta1, options.adam_beta2)
    return AdamW(groups, lr=options.lr, betas=betas, eps=options.adam_eps, fused=fused, foreach=not fused)


ALGORITHMS = {
    "adam": build,
    "fused_adam": lambda options, groups, fused: build(options, groups, True),
    "foreach_adam": lambda options, groups, fused: build(options, groups, False),
}
