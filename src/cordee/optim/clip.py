"""The global gradient norm, and scaling by it.

Owns the arithmetic over gradients that live as plain tensors or as DTensors on several meshes, where a shard is
counted once however often it is replicated. Knows no optimizer and no schedule."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of those `parameters` that have one."""
    return [p.grad for p in parameters if p.grad is not None]


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm over all elements of all `tensors`, a float32 scalar; NaN or inf where one of them is not finite.

    torch's operators on lists take one mesh at a time, so there is one norm a mesh. Every rank of the meshes calls
    it with the same tensors in the same order."""
    by_mesh: dict[object, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_mesh[tensor.device_mesh if isinstance(tensor, DTensor) else None].append(tensor)
    norms = [_full(torch.nn.utils.get_total_norm(group)).float() for group in by_mesh.values()]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def scale_(grads: Sequence[Tensor], factor: float) -> None:
    """Multiply all `grads` by `factor` in place; a stage of which nothing is trained has none."""
    if grads and factor != 1.0:
        torch._foreach_mul_([grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads], factor)


@torch.no_grad()
def count_zeros(grads: Sequence[Tensor]) -> Tensor:
    """How many elements of all `grads` are exactly 0, an int64 scalar; shards count once."""
    return torch.stack([_full((grad == 0).sum()) for grad in grads]).sum()


def clip_factor(norm: float, max_norm: float) -> float:
    """What to scale gradients of this `norm` by so that it is at most `max_norm`; a limit of 0 is none."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
