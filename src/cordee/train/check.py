"""`cordee check` of a training run."""

from __future__ import annotations

from cordee import launch
from cordee.config.schema import TrainConfig
from cordee.errors import Findings, Problem
from cordee.train import outputs
from cordee.train.plan import plan_run


def check_run(config: TrainConfig) -> list[Problem]:
    """Everything that is wrong with a run, as far as it can be known without starting it; needs no device and no torch.

    The number of processes is the launcher's, or --nproc-per-node.
    """
    found = Findings(outputs.check_free(config))
    found.attempt(lambda: plan_run(config, launch.world_size(config.nproc_per_node)))
    return found.problems
