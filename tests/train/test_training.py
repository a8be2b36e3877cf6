"""A run against a plain loop, across ranks, and on from a checkpoint."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from cordee.checkpoint import directory, source
from cordee.checkpoint.storage import location_of
from cordee.data.build import build_datasets
from cordee.errors import ProblemError
from cordee.families.registry import spec_from_options
from cordee.model.gpt import GPTModel
from cordee.model.init import initialise
from cordee.tokenizer import holds_tokenizer
from cordee.train import job
from cordee.train.options import TrainConfig
from cordee.train.plan import plan_run
from cordee.weights import hf
from cordee.weights.load import save_from
from tests.matrix import on_demand, sampled
from tests.train import tiny

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def plain_loop(given, steps: int) -> list[float]:
    """The same training written down directly: full logits, mean over all tokens, torch's own clip and AdamW."""
    spec = spec_from_options(given)
    model = GPTModel(spec.config)
    initialise(model, given.seed)
    decays = [p for p in model.parameters() if p.ndim > 1]
    spared = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decays, "weight_decay": 0.01}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, fused=False, foreach=False)
    dataset = build_datasets(given, given.train_iters * tiny.BATCH, 0, 0).train
    losses = []
    for step in range(steps):
        tokens = torch.from_numpy(np.stack([dataset[step * tiny.BATCH + i]["tokens"] for i in range(tiny.BATCH)]))
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        done = step / given.train_iters
        rate = 1e-2 * (step if step <= 1 else 0.5 * (1 + np.cos(np.pi * (step - 1) / (given.train_iters - 1))))
        assert 0 <= done < 1
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_says_who_keeps_what(tmp_path: Path, capsys):
    assert job.run(tiny.config(tmp_path)) == 0
    said = capsys.readouterr().err
    assert "\n1 process\n  rank 0: 17,472 parameters between steps\n" in said
    assert "16 bytes for each of the 17,472 parameters" in said


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run in one process, by which others are measured; its checkpoints are only read."""
    given = tiny.config(tmp_path_factory.mktemp("alone"), eval_iters=2, eval_interval=3)
    assert job.run(given) == 0
    return given


def test_equals_a_plain_loop(alone: TrainConfig):
    losses = tiny.losses(alone)
    assert losses == pytest.approx(plain_loop(alone, 6), rel=1e-5)
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("micro_batch_size", [2, 8])
def test_micro_batches_make_no_difference(tmp_path: Path, alone: TrainConfig, micro_batch_size: int):
    other = tiny.config(tmp_path, micro_batch_size=micro_batch_size)
    job.run(other)
    assert tiny.losses(other) == pytest.approx(tiny.losses(alone), rel=1e-5)


@pytest.mark.parametrize(("ranks", "stage"), sampled([2, 4], [0, 1, 2, 3], whole=[2]))
def test_ranks_make_no_difference(tmp_path: Path, pool, alone: TrainConfig, ranks: int, stage: int):
    many = tiny.config(tmp_path, eval_iters=2, eval_interval=3, nproc_per_node=ranks, zero_stage=stage)
    assert {ending.code for ending in pool.run(tiny.train_rank, ranks, many)} == {0}
    assert tiny.losses(many) == pytest.approx(tiny.losses(alone), rel=1e-5)
    ours, theirs = tiny.records(many, "validation"), tiny.records(alone, "validation")
    assert ours.keys() == theirs.keys() == {3, 6}
    assert all(ours[i]["loss"] == pytest.approx(theirs[i]["loss"], rel=1e-5) for i in ours)
    norms = [[record["grad_norm"] for record in tiny.records(run).values()] for run in (alone, many)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


DROPOUT = {"attention_dropout": 0.1, "hidden_dropout": 0.2}
GROWING = {"train_iters": None, "train_samples": 48, "rampup_batch_size": (4, 4, 8), "lr_warmup_iters": 0}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict], TrainConfig]:
    """Runs that nothing interrupts, one for the same options."""
    done: dict[str, TrainConfig] = {}

    def run(options: dict) -> TrainConfig:
        if (key := str(options)) not in done:
            done[key] = tiny.config(tmp_path_factory.mktemp("whole"), **options)
            job.run(done[key])
        return done[key]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, DROPOUT, GROWING, {"optimizer": "sgd"}, {"optimizer": "foreach_adam"}])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path: Path, whole_runs, options: dict, stop: int):
    whole = whole_runs(options)
    parts = tiny.config(tmp_path, exit_interval=stop, **options)
    assert job.run(parts) == 0
    assert directory.iterations(location_of(parts.save))[0] == stop
    assert job.run(tiny.resumed(parts)) == 0
    assert tiny.losses(parts) == tiny.losses(whole)
    last = len(tiny.losses(whole))
    ours, theirs = (source.read(run.save, last) for run in (parts, whole))
    for name in ours.names():
        assert torch.equal(ours.tensor(name), theirs.tensor(name))
    assert ours.manifest["trainer"] == theirs.manifest["trainer"]


@pytest.mark.parametrize("order", ["single", "cyclic"])
@pytest.mark.parametrize("length", [6, 80])
def test_a_run_that_has_become_longer_or_shorter_sees_the_samples_it_would_have_seen(tmp_path: Path, order, length):
    """Megatron shuffles 40 steps, which take three epochs, otherwise than 6 or 80."""
    given = tiny.config(
        tmp_path, train_iters=40, lr_decay_style="constant", lr_warmup_iters=0, dataloader_type=order, exit_interval=4
    )
    job.run(given)
    expected = tiny.losses(given)
    going_on = tiny.resumed(given, ckpt_step=2, train_iters=length, exit_interval=4, save=str(tmp_path / "again"))
    job.run(going_on)
    assert tiny.losses(going_on) == expected[2:]
    blocks = directory.read_manifest(location_of(tmp_path / "again" / "iter_0000004"))["data"]["blocks"]
    assert blocks == directory.read_manifest(location_of(Path(given.save) / "iter_0000004"))["data"]["blocks"]


@pytest.mark.slow
def test_a_run_of_a_billion_steps_resumes_bit_for_bit(tmp_path: Path):
    """Its order is in blocks; no memory and no time hangs on its length. In a process of its own, which has too little
    memory for an order of that length."""
    given = tiny.config(tmp_path, train_iters=10**9, eval_iters=10**9, eval_interval=10**6, exit_interval=4)
    script = """
import pickle, resource, sys
from cordee.train import job
resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))
sys.exit(job.run(pickle.load(sys.stdin.buffer)))
"""
    for config in (given, tiny.resumed(given, ckpt_step=2, exit_interval=4, save=str(tmp_path / "again"))):
        done = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(config), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
    again = replace(given, save=str(tmp_path / "again"))
    assert len(tiny.losses(given)) == 4 and tiny.losses(again) == tiny.losses(given)[2:]


def test_dropout_depends_on_the_seed_and_nothing_else(tmp_path: Path, alone: TrainConfig, whole_runs):
    first, again = whole_runs(DROPOUT), tiny.config(tmp_path, **DROPOUT)
    torch.rand(3)  # whatever was drawn before
    job.run(again)
    assert tiny.losses(first) == tiny.losses(again)
    assert tiny.losses(first) != tiny.losses(alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 4},
        {"nproc_per_node": 2},
        {"nproc_per_node": 2, "tensor_model_parallel_size": 2},
        {"nproc_per_node": 4, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ],
)
def test_dropout_is_the_same_on_every_layout(tmp_path: Path, pool, whole_runs, changes: dict):
    other = tiny.config(tmp_path, **DROPOUT, **changes)
    pool.run(tiny.train_rank, other.nproc_per_node, other)
    assert tiny.losses(other) == pytest.approx(tiny.losses(whole_runs(DROPOUT)), rel=1e-5)


def test_ranks_go_on_from_each_other(tmp_path: Path, pool, alone: TrainConfig):
    parts = tiny.config(tmp_path, exit_interval=2, zero_stage=3)
    job.run(parts)
    for ranks, stop, stage in ((2, 4, 3), (4, 5, 0), (2, None, 1)):
        going_on = tiny.resumed(parts, exit_interval=stop, nproc_per_node=ranks, zero_stage=stage)
        pool.run(tiny.train_rank, ranks, going_on)
    assert tiny.losses(parts) == pytest.approx(tiny.losses(alone), rel=1e-5)
    consumed = [record["consumed_samples"] for record in tiny.records(parts).values()]
    assert consumed == [8, 16, 24, 32, 40, 48]


def test_one_rank_goes_on_from_four(tmp_path: Path, pool, alone: TrainConfig):
    parts = tiny.config(tmp_path, exit_interval=3, nproc_per_node=4)
    pool.run(tiny.train_rank, 4, parts)
    job.run(tiny.resumed(parts))
    assert tiny.losses(parts) == pytest.approx(tiny.losses(alone), rel=1e-5)


def test_batch_that_grows(tmp_path: Path):
    given = tiny.config(tmp_path, **GROWING)
    job.run(given)
    sizes = [record["global_batch_size"] for record in tiny.records(given).values()]
    assert sizes == [4, 4, 8, 8, 8, 8, 8]
    assert tiny.records(given)[7]["consumed_samples"] == 48


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision(tmp_path: Path, precision: str):
    exact = tiny.config(tmp_path, save=str(tmp_path / "exact"), train_iters=4)
    job.run(exact)
    given = tiny.config(tmp_path, train_iters=4, exit_interval=2, initial_loss_scale=1024.0, **{precision: True})
    job.run(given)
    job.run(tiny.resumed(given))
    assert tiny.losses(given) == pytest.approx(tiny.losses(exact), rel=2e-2)
    assert source.read(given.save).dtype("embedding.weight") == torch.float32
    scale = tiny.records(given)[4]["loss_scale"]
    assert scale == (1024.0 if precision == "fp16" else 1.0)


def test_overflow_skips_the_step_and_lowers_the_scale(tmp_path: Path):
    given = tiny.config(tmp_path, fp16=True, train_iters=20, save_interval=20, exit_interval=9)
    job.run(given)
    job.run(tiny.resumed(given))
    found = list(tiny.records(given).values())
    scales = [record["loss_scale"] for record in found]
    assert scales[:3] == [2.0**32, 2.0**32, 2.0**31]  # hysteresis 2
    skipped = [record["skipped_iterations"] for record in found]
    assert sum(skipped) > 5 and skipped[-1] == 0
    trainer = source.read(given.save).manifest["trainer"]
    assert trainer["skipped_iterations"] == sum(skipped)
    assert trainer["consumed_samples"] == 20 * tiny.BATCH
    # The schedule waits for steps that count: the first of them is taken at its very beginning.
    first = skipped.index(0)
    assert found[first]["learning_rate"] == 0.0
    assert found[first + 1 + skipped[first + 1]]["learning_rate"] > 0.0


def test_validation_is_the_exact_mean(tmp_path: Path):
    given = tiny.config(tmp_path, eval_iters=2, eval_interval=3, micro_batch_size=2, split="80,10,10")
    job.run(given)
    assert list(tiny.records(given, "validation")) == [3, 6]
    assert list(tiny.records(given, "test")) == [6]
    weights = source.read(given.save)
    model = GPTModel(weights.spec.config)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights.tensor(name))
    _, valid, test = build_datasets(given, 48, 16, 16)
    for kind, held_out in (("validation", valid), ("test", test)):
        tokens = torch.from_numpy(np.stack([held_out[i]["tokens"] for i in range(16)]))
        with torch.no_grad():
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        assert tiny.records(given, kind)[6]["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.slow
def test_validation_does_not_disturb_training(tmp_path: Path, pool):
    for ranks in (1, 2):
        without = tiny.config(tmp_path, save=str(tmp_path / f"without{ranks}"), nproc_per_node=ranks, **DROPOUT)
        often = tiny.config(
            tmp_path,
            save=str(tmp_path / f"often{ranks}"),
            nproc_per_node=ranks,
            eval_iters=1,
            eval_interval=1,
            **DROPOUT,
        )
        for given in (without, often):
            pool.run(tiny.train_rank, ranks, given)
        assert tiny.losses(often) == tiny.losses(without)


def test_starts_from_hugging_face_weights(tmp_path: Path):
    given = tiny.config(tmp_path, load=str(tmp_path / "model"))
    spec = spec_from_options(given)
    model = GPTModel(spec.config)
    initialise(model, 99)
    with hf.write(tmp_path / "model", spec) as sink:
        save_from(model, sink)
    assert job.run(given) == 0
    dataset = build_datasets(given, 48, 0, 0).train
    tokens = torch.from_numpy(np.stack([dataset[i]["tokens"] for i in range(tiny.BATCH)]))
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert tiny.losses(given)[0] == pytest.approx(loss.item(), rel=1e-5)


def test_finetune_takes_the_weights_only(tmp_path: Path, alone: TrainConfig):
    second = tiny.config(tmp_path, load=alone.save, finetune=True)
    job.run(second)
    assert min(tiny.records(second)) == 1
    assert tiny.losses(second)[0] < tiny.losses(alone)[0] - 0.05


def test_without_optimizer_state(tmp_path: Path):
    given = tiny.config(tmp_path, save_optim=False, exit_interval=3)
    job.run(given)
    assert job.run(tiny.resumed(given, load_optim=False)) == 0
    assert sorted(tiny.records(given)) == [1, 2, 3, 4, 5, 6]


def test_only_validation(tmp_path: Path, alone: TrainConfig):
    second = tiny.config(
        tmp_path,
        load=alone.save,
        data_path=alone.data_path,
        save=None,
        save_interval=None,
        skip_train=True,
        eval_iters=1,
        metrics_file=str(tmp_path / "only" / "metrics.jsonl"),
    )
    assert job.run(second) == 0
    assert "validation" in (tmp_path / "only" / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("extent", ["blocks", *on_demand("model")])
def test_compiled(tmp_path: Path, alone: TrainConfig, extent: str):
    compiled = tiny.config(tmp_path, compile=extent)
    job.run(compiled)
    assert tiny.losses(compiled) == pytest.approx(tiny.losses(alone), rel=1e-5)


def test_tokenizer_lies_beside_the_checkpoints(tmp_path: Path):
    words = {str(i): i for i in range(tiny.VOCAB - 1)} | {"<eos>": tiny.VOCAB - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<eos>"))
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    given = tiny.config(tmp_path, tokenizer_name_or_path=str(tmp_path / "tokenizer"), exit_interval=2)
    job.run(given)
    assert holds_tokenizer(given.save)
    assert source.read(given.save).assets == Path(given.save)
    going_on = tiny.resumed(given, tokenizer_name_or_path=None, eod_mask_loss=True)
    assert plan_run(going_on, 1).tokenizer.eod == tiny.VOCAB - 1
    assert job.run(going_on) == 0


def test_samples_that_make_no_step_are_told(tmp_path: Path):
    given = tiny.config(tmp_path, train_iters=None, train_samples=21, lr_warmup_iters=0)
    plan = plan_run(given, 1)
    assert plan.iterations == 2
    assert any("5 samples of --train-samples" in note for note in plan.notes)
    with pytest.raises(ProblemError) as caught:
        plan_run(replace(given, train_samples=7), 1)
    assert [(problem.option, problem.limit) for problem in caught.value.problems] == [("--train-samples", 8)]
