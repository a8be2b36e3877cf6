"""`cordee check` of a training run, and the check before one is launched."""

from __future__ import annotations

from cordee import launch
from cordee.config.schema import TrainConfig
from cordee.errors import Findings, Problem
from cordee.train import outputs
from cordee.train.plan import Fingerprints, fingerprint_data, plan_run


def check_run(config: TrainConfig, fingerprints: Fingerprints | None = None) -> list[Problem]:
    """Everything that is wrong with a run, as far as it can be known without starting it; needs no device and no torch.

    The number of processes is the launcher's, or --nproc-per-node. Without `fingerprints` of the data, its contents are
    not compared with those of a run to resume: the run itself does that when it starts.
    """
    found = Findings(outputs.check_free(config))
    found.attempt(lambda: plan_run(config, launch.world_size(config.nproc_per_node), fingerprints=fingerprints))
    return found.problems


def check_with_contents(config: TrainConfig) -> list[Problem]:
    """As `check_run`, with the contents of the data, of which it reads up to 2 GiB."""
    unread = Findings()
    fingerprints = unread.attempt(lambda: fingerprint_data(config))
    found = check_run(config, fingerprints)
    told = {(problem.option, problem.value) for problem in found}
    return [*found, *(problem for problem in unread.problems if (problem.option, problem.value) not in told)]
