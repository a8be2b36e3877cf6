"""`cordee check` of a training run, and the check before one is launched."""

from __future__ import annotations

from typing import Any

from cordee import launch
from cordee.config.schema import TrainConfig
from cordee.errors import Findings, Problem, unique
from cordee.train import objectives, outputs
from cordee.train.plan import plan_run


def check_run(config: TrainConfig, fingerprint: Any = None) -> list[Problem]:
    """Everything that is wrong with a run, as far as it can be known without starting it; needs no device and no torch.

    The number of processes is the launcher's, or --nproc-per-node. Without `fingerprint` of the data, its contents are
    not compared with those of a run to resume: the run itself does that when it starts.
    """
    found = Findings()
    found.problems += found.attempt(lambda: outputs.check_free(config)) or []
    found.attempt(lambda: plan_run(config, launch.world_size(config.nproc_per_node), fingerprint=fingerprint))
    return list(dict.fromkeys(found.problems))


def check_with_contents(config: TrainConfig) -> list[Problem]:
    """As `check_run`, with the contents of the data, of which up to some GiB are read."""
    unread = Findings()
    fingerprint = unread.attempt(lambda: objectives.named(config.stage).fingerprint(config))
    return unique([*check_run(config, fingerprint), *unread.problems])
