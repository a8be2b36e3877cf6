"""Training: the trainer, objectives, metrics.

Owns a run from its plan to its last step. The package is also the function that a program calls, `cordee.train(...)`:
both want one name, and Python gives it to the package as soon as any of its modules is imported. So the package can be
called, and is then `cordee.train.start.train`."""

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cordee.train.options import TrainConfig


class _Callable(ModuleType):
    def __call__(self, config: "TrainConfig | Mapping[str, object]") -> int:
        from cordee.train.start import train  # light until it is called

        return train(config)


sys.modules[__name__].__class__ = _Callable
