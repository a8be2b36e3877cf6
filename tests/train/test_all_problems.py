"""All problems at once: what is wrong with one option hides nothing that is wrong with others.

A catalogue of single faults in a run that is otherwise sound; of two faults that involve no common option, `cordee
check` finds together what it finds of each alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pytest

from cordee import cli
from cordee.config.load import load_as_far_as_possible
from cordee.config.option import options_of
from cordee.config.spelling import spellings
from cordee.errors import Problem, name_of
from cordee.model.options import ModelOptions
from cordee.train.options import TrainConfig
from tests.train import tiny

MODEL = {option.name for option in options_of(ModelOptions)}
DRAWN = 120

# Each is sound with what `BASE` gives, but for the one fault.
FAULTS = """
--lr -1
--lr abc
--min-lr 3
--lr-warmup-init 2
--lr-warmup-iters 50
--lr-warmup-samples 4
--lr-decay-samples 8
--lr-decay-style cosin
--lr-decay-style WSD
--lr-decay-style WSD --lr-wsd-decay-iters 7
--lr-wsd-decay-samples 4
--weight-decay -1
--start-weight-decay 0.1
--weight-decay-incr-style linear
--override-opt-param-scheduler --use-checkpoint-opt-param-scheduler
--optimizer adamm
--adam-beta1 1.5
--adam-eps 0
--clip-grad -1
--fp16 --bf16
--loss-scale 8
--min-loss-scale 1e30
--hysteresis 0
--seq-length 64
--seq-length 1.5
--micro-batch-size 0
--micro-batch-size 3
--global-batch-size 7
--rampup-batch-size 2 2 100
--train-samples 100 --train-iters 6
--train-iters 0
--train-iters 100000000000000000
--seed -1
--stage absent
--split 0,1,0
--split a,b
--dataloader-type random
--num-workers -1
--eod-mask-loss
--train-data-path {data}
--valid-data-path {missing}
--tensor-model-parallel-size 3
--tensor-model-parallel-size 8
--sequence-parallel
--pipeline-model-parallel-size 3
--pipeline-schedule zbv
--pipeline-schedule circular
--num-layer-list 1,1,1
--num-layers-per-virtual-pipeline-stage 1
--noop-layers 0
--use-manual-layer-allocation
--manual-mbs 1,2
--optimized-pipeline
--fold-mode aiao
--pipeline-timeline {missing}
--context-parallel-size 3
--context-parallel-size 4 --context-parallel-algo hybrid_cp_algo
--context-parallel-size 4 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 4
--context-parallel-size 4 --context-parallel-algo megatron_cp_algo --cp-window-size 3
--context-parallel-algo ring
--expert-model-parallel-size 2
--expert-model-parallel-size 3
--zero-stage 4
--zero-stage 0 --num-distributed-optimizer-instances 2
--num-distributed-optimizer-instances 3
--overlap-param-gather --delay-param-gather
--deepspeed
--deepspeed-config {missing}
--deepspeed-config {deepspeed}
--distributed-backend mpi
--distributed-timeout-minutes 0
--save {file}
--save-interval 0
--keep-last 0
--ckpt-step 4
--finetune
--exit-on-missing-checkpoint
--load {missing}
--load {file}
--eval-interval 0
--eval-iters -1
--skip-train --eval-iters 0
--exit-interval 0
--save-best --eval-iters 0
--early-stopping-patience 0
--early-stopping-threshold 0.1
--multiple-validation-sets --eval-iters 0
--log-interval 0
--tensorboard-dir {file}
--metrics-file {folder}
--peak-tflops 0
--compile all
--manual-gc-interval 3
--hidden-size 33
--hidden-size abc
--num-layers 0
--num-attention-heads 5
--num-query-groups 3
--ffn-hidden-size 0
--max-position-embeddings 8
--position-embedding-type spiral
--normalization BatchNorm
--hidden-dropout 1
--vocab-size 0
--model absent
--moe-router-topk 2
--moe-z-loss-coeff 0.1
--rope-scaling-factor 2
--tokenizer-type Unknown
--tokenizer-type PretrainedFromHF --tokenizer-name-or-path {missing}
--tokenizer-type GPT2BPETokenizer --vocab-file {missing} --merge-file {missing}
--padded-vocab-size 10
--unknown-flag 3
--sed 3
-zz 3
""".strip().splitlines()

BASE = {
    **tiny.MODEL,
    "split": "90,10,0",
    "seq_length": tiny.LENGTH,
    "global_batch_size": 8,
    "train_iters": 6,
    "lr": 1e-2,
    "eval_iters": 2,
    "save_interval": 2,
    "nproc_per_node": 4,
}


@dataclass(frozen=True)
class Found:
    """What is wrong: laws that are broken, as (subject, kind, limit), and the options that these and the flags name."""

    laws: frozenset[tuple[str, str, str]]
    names: frozenset[str]


class Check:
    """`cordee check` of the sound run with some flags more, each set of which is checked once."""

    def __init__(self, folder: Path):
        data, file = tiny.make_data(folder), folder / "file"
        file.write_text("no directory")
        settings = folder / "deepspeed.json"
        settings.write_text(json.dumps({"gradient_clipping": -1}))
        missing = folder / "absent" / "thing"
        self.places = {"data": data, "file": file, "folder": folder, "missing": missing, "deepspeed": settings}
        base = folder / "base.yaml"
        lines = {**BASE, "data_path": data, "save": folder / "run"}
        base.write_text(
            "".join(
                f"{name}: {str(value).lower() if isinstance(value, bool) else value}\n" for name, value in lines.items()
            )
        )
        self.base = ["--config", str(base)]

    def __call__(self, *faults: str) -> Found:
        flags = " ".join(faults).format(**self.places).split()
        problems = list(self._problems(flags))
        table = spellings(TrainConfig)
        given = {table[name_of(flag)].option.name for flag in flags if name_of(flag) in table and flag.startswith("--")}
        names = given.union(*(problem.names for problem in problems))
        if names & MODEL:
            names |= {"model"}  # a model that its options do not make is unknown, and with it all that fits it
        laws = frozenset((problem.subject, problem.kind, str(problem.limit)) for problem in problems)
        return Found(laws, frozenset(names))

    def _problems(self, flags: list[str]) -> Iterator[Problem]:
        loaded = load_as_far_as_possible(TrainConfig, [*self.base, *flags])
        command = cli.COMMANDS["check"]
        yield from loaded.problems
        yield from cli.further(command, loaded) if loaded.problems else cli.problems(command, loaded)


@pytest.fixture(scope="module")
def check(tmp_path_factory) -> Check:
    return Check(tmp_path_factory.mktemp("check"))


@pytest.fixture(scope="module")
def alone(check) -> dict[str, Found]:
    return {fault: check(fault) for fault in FAULTS}


def test_the_run_is_sound_and_every_fault_is_found(check, alone):
    assert check() == Found(frozenset(), frozenset())
    assert [fault for fault, found in alone.items() if not found.laws] == []


def independent(alone: dict[str, Found]) -> list[tuple[str, str]]:
    return [(a, b) for a, b in combinations(alone, 2) if not alone[a].names & alone[b].names]


def hidden(check: Check, alone: dict[str, Found], pairs: list[tuple[str, str]]) -> dict[tuple[str, str], object]:
    """What of pairs is not found together."""
    missed = {pair: (alone[pair[0]].laws | alone[pair[1]].laws) - check(*pair).laws for pair in pairs}
    return {pair: laws for pair, laws in missed.items() if laws}


def test_two_faults_are_found_together(check, alone):
    pairs = independent(alone)
    assert len(FAULTS) >= 60 and len(pairs) > len(FAULTS) * (len(FAULTS) - 1) / 4  # most pairs are independent
    assert hidden(check, alone, random.Random(0).sample(pairs, DRAWN)) == {}


@pytest.mark.exhaustive
def test_any_two_faults_are_found_together(check, alone):
    assert hidden(check, alone, independent(alone)) == {}
