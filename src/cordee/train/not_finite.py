"""A loss or gradient that is not finite: where it comes from, in words.

Owns the search for the rank or the parameters, which costs time only when the run ends for it anyway."""

from torch import Tensor, nn

from cordee.errors import Problem
from cordee.model.parameter import local_shard
from cordee.parallel import collectives
from cordee.parallel.layout import Layout


def find(model: nn.Module, local_loss: Tensor, layout: Layout, *, step: int, values: str, samples: range) -> Problem:
    """The problem of `step`, the same on all ranks; all of them call it.

    `local_loss` is the sum of this rank's losses, `values` what was found not to be finite, `samples` what the step was
    taken on. Its kind is what is the first not to be: the "loss" of the ranks in its limit, the "gradient" of the
    parameters in it, or the "norm" alone."""
    finite = collectives.gather(bool(local_loss.isfinite()), layout)
    ranks = [str(rank) for rank, is_finite in enumerate(finite) if not is_finite]
    if ranks:
        kind, limit, why = "loss", ranks, f"the loss is not finite on rank {', '.join(ranks)}"
    elif names := _bad_gradients(model, layout):
        kind, limit, why = "gradient", names, f"the loss is finite, but not its gradient by {', '.join(names[:3])}"
    else:
        kind, limit, why = "norm", None, "the gradient is finite, but too large for its norm to be"
    fix = (
        "resume from the last checkpoint with a smaller --lr or --clip-grad or a longer warm-up, or look at the data: "
        f"samples {samples.start} to {samples.stop - 1}"
    )
    return Problem(f"step {step}", values, why, fix, kind, limit=limit)


def _bad_gradients(model: nn.Module, layout: Layout) -> list[str]:
    """Parameters whose gradient is not finite on any rank, in the order of the model."""
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not local_shard(parameter.grad)[0].isfinite().all()
    ]
    return list(dict.fromkeys(name for part in collectives.gather(names, layout) for name in part))
