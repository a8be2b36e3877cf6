"""Training from Python: the processes that `cordee train` would start.

Owns what stands between a configuration and the job on each rank: a file with it, and the launch. The command line has
its own way to the same job."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from cordee import device, launch, supervisor
from cordee.config.load import config_from_dict
from cordee.errors import raise_all
from cordee.train import job
from cordee.train.options import TrainConfig
from cordee.train.plan import check_run


def train(config: TrainConfig | Mapping[str, object]) -> int:
    """Train as `cordee train` does with these options; returns its exit code.

    config: a `TrainConfig`, or the values that differ from its defaults, by option name.
    The run takes all local devices, or `nproc_per_node` of them. A single one is this process; several get a process
    each, for which it must be called in the main thread. In a process that torchrun or Slurm started it joins the
    others. ProblemError with everything that is wrong, before anything is started."""
    if isinstance(config, Mapping):
        config = config_from_dict(TrainConfig, config)
    launched = launch.rank_info().launcher
    if not launched and config.nproc_per_node is None:
        config = replace(config, nproc_per_node=device.count())
    raise_all(check_run(config))
    if launched or config.nproc_per_node == 1:
        return job.run(config)
    assert config.nproc_per_node is not None
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "run.yaml"
        file.write_text(json.dumps(asdict(config), ensure_ascii=False), encoding="utf-8")  # which is YAML
        arguments = ["train", "--config", str(file)]
        return supervisor.spawn_local(arguments, config.nproc_per_node, grace_seconds=config.exit_grace_seconds)
