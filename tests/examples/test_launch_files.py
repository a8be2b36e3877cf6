"""The launch files of `examples/`: they parse, and what they start is a run that fits."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cordee.config.laws import ignored_options
from cordee.config.load import load_config
from cordee.families.registry import spec_from_preset
from cordee.launch import rank_info
from cordee.parallel import laws
from cordee.parallel.degrees import degrees
from cordee.train import plan
from cordee.train.options import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted((EXAMPLES / "slurm").iterdir())
MANIFESTS = sorted((EXAMPLES / "kubernetes").iterdir())
NODES, PER_NODE = 2, 8

# Stand-ins for the commands of a cluster: srun starts what follows its options once, others say what they were told.
SRUN = 'while [[ "$1" == -* ]]; do shift; done; exec "$@"'
TELL = 'printf "%s\\n" "$0" "$@"'


def require_sound(command: list[str], monkeypatch) -> None:
    """`train` with its options, on all processes of the example."""
    assert command[0] == "train"
    arguments = [word.replace("/shared/multi-node.yaml", str(EXAMPLES / "multi-node.yaml")) for word in command[1:]]
    monkeypatch.chdir(ROOT)
    for name, value in {"RANK": 0, "WORLD_SIZE": NODES * PER_NODE, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    config = load_config(TrainConfig, arguments).config
    assert list(plan.option_problems(config)) == []
    assert ignored_options(replace(config, nproc_per_node=NODES * PER_NODE)) == []
    shape = degrees(config, NODES * PER_NODE)
    assert (shape.tp, shape.data) == (8, 2)
    assert config.model is not None and config.save == config.load
    run = laws.PlacedRun(model=spec_from_preset(config.model).config, degrees=shape, options=config)
    assert list(laws.check(run)) == []


def told_to_torchrun(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The options of torchrun, and what it is to start."""
    cut = words.index("-m")
    assert words[cut + 1] == "cordee"
    return dict(word.removeprefix("--").split("=", 1) for word in words[:cut]), words[cut + 2 :]


def require_meeting(options: dict[str, str], place: str) -> None:
    from torch.distributed.run import get_args_parser

    known = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    assert {f"--{name}" for name in options} <= known
    assert options["nnodes"] == str(NODES) and options["nproc-per-node"] == str(PER_NODE)
    assert options["rdzv-backend"] == "c10d" and options["rdzv-endpoint"] == f"{place}:29400"


def run(script: Path, folder: Path, variables: dict[str, str]) -> list[str]:
    """The command that `script` comes to, and its arguments, with stand-ins for a cluster's commands."""
    for name, body in {"srun": SRUN, "torchrun": TELL, "cordee": TELL, "scontrol": "echo gpu1; echo gpu2"}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    environ = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **variables}
    done = subprocess.run(["bash", str(script)], env=environ, check=True, capture_output=True, text=True)
    first, *words = done.stdout.splitlines()
    return [Path(first).name, *words]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_slurm(script: Path, tmp_path: Path, monkeypatch):
    subprocess.run(["bash", "-n", str(script)], check=True)
    head = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script.read_text(), re.MULTILINE))
    plain = script.name == "srun.sbatch"
    assert (head["nodes"], head["ntasks-per-node"]) == (str(NODES), str(PER_NODE) if plain else "1")
    variables = {"SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_NNODES": head["nodes"], "SLURM_JOB_ID": "4711"}
    program, *words = run(script, tmp_path, {**variables, "SLURM_CPUS_PER_TASK": head["cpus-per-task"]})
    if not plain:
        assert program == "torchrun"
        options, words = told_to_torchrun(words)
        require_meeting(options, "gpu1")
        assert options["rdzv-id"] == "4711"
    else:
        assert program == "cordee"
        tasks = {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
        here = rank_info({**variables, **tasks, "SLURM_TASKS_PER_NODE": "8(x2)"})
        assert (here.rank, here.local_world_size, here.master_addr) == (9, PER_NODE, "gpu1")
    require_sound(words, monkeypatch)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest.name)
def test_kubernetes(manifest: Path, monkeypatch):
    *others, job = yaml.safe_load_all(manifest.read_text())
    spec = job["spec"]
    if job["kind"] == "Job":
        (service,) = others
        assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": "cordee"}
        assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == NODES
        pod = spec["template"]["spec"]
        place = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
        assert pod["subdomain"] == service["metadata"]["name"]
    else:
        assert (job["kind"], others) == ("PyTorchJob", [])
        worker = spec["pytorchReplicaSpecs"]["Worker"]
        policy = spec["elasticPolicy"]
        assert worker["replicas"] == policy["minReplicas"] == policy["maxReplicas"] == NODES
        assert spec["nprocPerNode"] == str(PER_NODE)
        pod, place = worker["template"]["spec"], None
    (container,) = pod["containers"]
    program, *words = container["command"]
    assert program == "torchrun"
    options, words = told_to_torchrun(words)
    if place is not None:
        require_meeting(options, place)
    require_sound(words, monkeypatch)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == PER_NODE
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_commands_of_the_page(monkeypatch):
    text = (ROOT / "docs" / "multi-node.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^torchrun (.*)$", text, re.MULTILINE)
    options, words = told_to_torchrun(command.split())
    require_meeting(options, "node0")
    require_sound(words, monkeypatch)
    for link in re.findall(r"\]\(\.\./([^)]+)\)", text):
        assert (ROOT / link).is_file()
