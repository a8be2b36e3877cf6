"""Preference training: losses and gradients are the formulas, whatever the layout; the reference stays as it was."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cordee.checkpoint import formats
from cordee.data.encode import column_of
from cordee.data.messages import IGNORED
from cordee.data.tuning import field_names
from cordee.log import in_bytes
from cordee.train import objectives
from cordee.train.check import examine
from cordee.train.objectives.orpo import OBJECTIVE as ORPO
from cordee.train.options import TrainConfig
from cordee.train.plan import check_run, plan_run
from cordee.train.preference import Answers
from tests.data.test_tuning import write
from tests.matrix import sampled
from tests.train import tiny

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

PAIRS = 40
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2 sequence": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "cp2 ring": (2, {"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"}),
    "cp2 ulysses": (2, {"context_parallel_size": 2, "context_parallel_algo": "ulysses_cp_algo"}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2 zero3": (2, {"zero_stage": 3}),
    "larger micro-batches": (1, {"micro_batch_size": 4}),
}
KINDS: dict[str, dict[str, Any]] = {
    "sigmoid": {"stage": "dpo", "dpo_label_smoothing": 0.1, "dpo_ftx": 0.5},
    "hinge": {"stage": "dpo", "dpo_loss_type": "hinge"},
    "ipo": {"stage": "dpo", "dpo_loss_type": "ipo"},
    "orpo": {"stage": "orpo", "orpo_beta": 0.3},
    "simpo": {"stage": "simpo", "simpo_beta": 1.5},
    "kto": {"stage": "kto", "kto_desirable_weight": 1.5, "kto_undesirable_weight": 0.7},
}


# ---- data and models -------------------------------------------------------------------------------------------------


def make_data(folder: Path) -> None:
    """Prompts with two answers each, all of lengths of their own, some beyond the length of a sequence; as pairs, and
    all the answers as samples of KTO, of which the middle ones have the prompts of their neighbours."""
    random = np.random.default_rng(3)
    pairs: list[list[Any]] = [[] for _ in field_names(True)]
    single: list[list[Any]] = [[] for _ in field_names(False, True)]
    for number in range(PAIRS):
        prompt = random.integers(tiny.VOCAB, size=int(random.integers(1, 9))).tolist()
        for side in (0, 3):
            if side == 0 or number != 7:  # of one pair both are the same
                answer = random.integers(tiny.VOCAB, size=int(random.integers(1, 12))).tolist()
            ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
            for place, values in enumerate((ids, [1] * len(ids), labels)):
                pairs[side + place].append(values)
                single[place].append(values)
            single[3].append([int(side == 0 or number % 5 == 0)])
    for name, names, columns in (("pairs", field_names(True), pairs), ("single", field_names(False, True), single)):
        write(folder / name, dict(zip(names, map(column_of, columns), strict=True)))


def given(folder: Path, models: tuple[str, str], **options: Any) -> TrainConfig:
    folder.mkdir(exist_ok=True)
    if not list(folder.glob("pairs_*")):
        make_data(folder)
    data = (str(folder / ("single" if options["stage"] == "kto" else "pairs")),)
    referring = {"ref_model": models[1]} if options.get("stage") in ("dpo", "kto") else {}
    common = {"data_path": data, "train_iters": 3, "eval_iters": 1, "eval_interval": 2, "load": models[0]}
    config = tiny.config(folder, **{**common, "variable_seq_lengths": True, **referring, **options})
    shape = {each.name: each.default for each in fields(TrainConfig) if each.name in tiny.MODEL}
    return replace(config, **shape)


def ready(config: TrainConfig) -> TrainConfig:
    return objectives.named(config.stage).ready(config)


def train(rank: int, world_size: int, config: TrainConfig) -> None:
    tiny.train_rank(rank, world_size, ready(config))


def figures(config: TrainConfig) -> dict[str, list[float]]:
    found, held_out = tiny.records(config), tiny.records(config, "validation")
    read = {name: [found[step][name] for step in sorted(found)] for name in ("loss", "grad_norm")}
    for name in found[1]["metrics"]:
        read[name] = [found[step]["metrics"][name] for step in sorted(found)]
    return read | {"validation": [held_out[step]["loss"] for step in sorted(held_out)]}


# ---- the formulas ----------------------------------------------------------------------------------------------------


def logp(model: torch.nn.Module, ids: np.ndarray, labels: np.ndarray) -> tuple[Tensor, int]:
    """The log-probability of an answer, and its length, from logits in float64."""
    logits = model(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
    places = [place for place in range(1, len(labels)) if labels[place] != IGNORED]
    return torch.stack([logits[place - 1, labels[place]] for place in places]).sum(), len(places)


Side = tuple[Tensor, Tensor, int]  # log-probability by the policy, by the reference, length


def dpo(config: TrainConfig, chosen: Side, rejected: Side) -> tuple[Tensor, Tensor, Tensor]:
    beta, kind, e = config.dpo_beta, config.dpo_loss_type, config.dpo_label_smoothing
    gains = [policy - reference for policy, reference, _ in (chosen, rejected)]
    if kind == "ipo":
        gains = [gain / side[2] for gain, side in zip(gains, (chosen, rejected), strict=True)]
    h = beta * (gains[0] - gains[1])
    if kind == "sigmoid":
        loss = -(1 - e) * torch.log(1 / (1 + torch.exp(-h))) - e * torch.log(1 / (1 + torch.exp(h)))
    elif kind == "hinge":
        loss = torch.clamp(1 - h, min=0)
    else:
        loss = (gains[0] - gains[1] - 1 / (2 * beta)) ** 2
    return loss - config.dpo_ftx * chosen[0] / chosen[2], beta * gains[0], beta * gains[1]


def orpo(config: TrainConfig, chosen: Side, rejected: Side) -> tuple[Tensor, Tensor, Tensor]:
    (c, r), beta = (policy / length for policy, _, length in (chosen, rejected)), config.orpo_beta
    odds = torch.log(torch.exp(c) / (1 - torch.exp(c))) - torch.log(torch.exp(r) / (1 - torch.exp(r)))
    return -c - beta * torch.log(1 / (1 + torch.exp(-odds))), beta * c, beta * r


def simpo(config: TrainConfig, chosen: Side, rejected: Side) -> tuple[Tensor, Tensor, Tensor]:
    c, r = (config.simpo_beta * policy / length for policy, _, length in (chosen, rejected))
    return -torch.log(1 / (1 + torch.exp(-(c - r - config.simpo_gamma)))), c, r


FORMULAS = {"dpo": dpo, "orpo": orpo, "simpo": simpo}


def expected(config: TrainConfig) -> dict[str, float]:
    """Of the first step: every answer alone, by transformers."""
    from transformers import AutoModelForCausalLM

    paths = (config.load, config.ref_model or config.load)
    policy, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in paths)
    dataset = plan_run(replace(ready(config), save=None, save_interval=None), 1).data.open(verified=False)["train"]
    samples = [dataset[index] for index in range(config.global_batch_size or 1)]

    def side(sample: Any, name: str) -> Side:
        ids, labels = sample[f"{name}input_ids"], sample[f"{name}labels"]
        own, length = logp(policy, ids, labels)
        return own, logp(reference, ids, labels)[0].detach(), length

    if config.stage == "kto":
        loss, figures = kto(config, [(side(s, ""), side(s, "mismatched_"), bool(s["desirable"][0])) for s in samples])
    else:
        formula = FORMULAS[config.stage]
        found = [formula(config, side(sample, "chosen_"), side(sample, "rejected_")) for sample in samples]
        losses, better, worse = map(torch.stack, zip(*found, strict=True))
        loss = losses.mean()
        figures = {"rewards/chosen": better.mean(), "rewards/rejected": worse.mean()}
        figures |= {"rewards/margins": (better - worse).mean(), "rewards/accuracies": (better > worse).double().mean()}
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])
    return {name: value.item() for name, value in {"loss": loss, "grad_norm": norm, **figures}.items()}


def kto(config: TrainConfig, samples: list[tuple[Side, Side, bool]]) -> tuple[Tensor, dict[str, Tensor]]:
    z = torch.stack([policy - reference for _, (policy, reference, _), _ in samples]).mean().detach().clamp(min=0)
    gains = torch.stack([policy - reference for (policy, reference, _), _, _ in samples])
    wanted, beta = torch.tensor([desirable for *_, desirable in samples]), config.kto_beta
    good = config.kto_desirable_weight * (1 - torch.sigmoid(beta * (gains - z)))
    bad = config.kto_undesirable_weight * (1 - torch.sigmoid(beta * (z - gains)))
    rewards = {"rewards/chosen": beta * gains[wanted].mean(), "rewards/rejected": beta * gains[~wanted].mean()}
    return torch.where(wanted, good, bad).mean(), {"kl": z, **rewards}


# ---- what is trained -------------------------------------------------------------------------------------------------


def once(given: Callable[[str], TrainConfig]) -> Callable[[str], TrainConfig]:
    """Gives a run of a kind, trained in one process when it is first asked for."""

    @functools.cache
    def run(kind: str) -> TrainConfig:
        train(0, 1, config := given(kind))
        return config

    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory, models) -> Callable[[str], TrainConfig]:
    """Of one pair a micro-batch."""
    return once(lambda kind: given(tmp_path_factory.mktemp("alone"), models, **KINDS[kind]))


def test_a_run_resumes_with_its_reference_alone(alone, models):
    """Not with another, nor with other weights at its path; a copy elsewhere is the same."""
    first = alone("hinge")
    assert check_run(tiny.resumed(first)) == []
    found = check_run(tiny.resumed(first, ref_model=models[0]))
    assert [(each.option, each.kind) for each in found] == [("--ref-model", "differs")]


def test_the_memory_of_the_reference_is_foreseen(alone, models):
    elements = sum(map(math.prod, formats.read(models[1]).spec.shapes().values()))
    assert f"{in_bytes(4 * elements)} more of weights: the reference model" in examine(alone("hinge"))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_is_what_the_formula_gives(alone, kind: str):
    config = alone(kind)
    found = figures(config)
    wanted = expected(config)
    assert kind != "kto" or wanted["kl"] > 1
    for figure, value in wanted.items():
        assert found[figure][0] == pytest.approx(value, rel=2e-5), figure


@pytest.mark.parametrize("size", [1, 3, 5])
def test_kto_of_few_samples_is_what_the_formula_gives(models, tmp_path: Path, size: int):
    """No mean is over a part of a step, and no answer matched, however few there are."""
    config = given(tmp_path, models, stage="kto", global_batch_size=size, train_iters=2, eval_iters=0)
    train(0, 1, config)
    found = tiny.records(config)[1]
    wanted = expected(config)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=2e-5)
    assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=2e-5)
    assert found["metrics"]["kl"] == pytest.approx(wanted["kl"], rel=2e-5, abs=1e-6)


def test_the_odds_of_what_is_certain_are_finite():
    logps = torch.tensor([0.0, -1e-9, -1e-3, -200.0], requires_grad=True)
    chosen, rejected = (Answers(side, side, torch.ones(4)) for side in (logps, logps.flip(0)))
    losses, metrics = ORPO.losses(chosen, rejected)
    losses.sum().backward()
    assert logps.grad is not None and logps.grad.isfinite().all() and losses.isfinite().all()
    c, r = logps.detach().double()[2:], logps.detach().double().flip(0)[2:].clamp(max=-1e-6)
    odds = c - r - torch.log(-torch.expm1(c)) + torch.log(-torch.expm1(r))
    assert metrics["log_odds"][2:].tolist() == pytest.approx(odds.tolist(), rel=1e-5)


@pytest.mark.parametrize(("layout", "kind"), sampled(LAYOUTS, KINDS))
def test_one_loss_under_every_layout(pool, alone, models, tmp_path: Path, layout: str, kind: str):
    reference = alone(kind)
    ranks, options = LAYOUTS[layout]
    config = given(tmp_path, models, **KINDS[kind], **options)
    pool.run(train, ranks, config)
    wanted, found = figures(reference), figures(config)
    assert len(found["loss"]) == 3 and len(found["validation"]) == 2
    for figure, values in wanted.items():
        assert found[figure] == pytest.approx(values, rel=1e-5, abs=1e-6), figure


def test_dpo_begins_at_the_initial_weights_and_keeps_them(pool, models, tmp_path: Path):
    """The loss is ln 2 there, and the gradient none of zero; a run that resumes, on other ranks, has the same
    reference, though it loads other weights."""
    whole = given(tmp_path / "whole", models, stage="dpo", ref_model=None, train_iters=4)
    train(0, 1, whole)
    found = figures(whole)
    assert found["loss"][0] == pytest.approx(math.log(2), rel=1e-7) and found["grad_norm"][0] > 0.1
    first = given(tmp_path / "first", models, stage="dpo", ref_model=None, train_iters=4, exit_interval=2)
    train(0, 1, first)
    pool.run(train, 2, tiny.resumed(first, zero_stage=1, exit_interval=3))
    train(0, 1, tiny.resumed(first))
    assert figures(first)["loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_the_reference_is_the_model_as_the_run_begins(models, tmp_path: Path):
    """With adapters that it goes on from, and the options that change the model."""
    alike = {"stage": "dpo", "ref_model": None, "train_iters": 2}
    first = given(tmp_path / "first", models, **alike, lora_target_modules=("all-linear",), lora_r=4)
    more = given(tmp_path / "more", models, **alike, load=first.save, finetune=True)
    other = given(tmp_path / "other", models, **alike, rotary_base=500)
    for config in (first, more, other):
        train(0, 1, config)
        found = figures(config)
        assert found["loss"][0] == pytest.approx(math.log(2), rel=1e-6) and found["grad_norm"][0] > 0.01
    assert figures(more)["logps/chosen"][0] != pytest.approx(figures(first)["logps/chosen"][0], rel=1e-4)


@pytest.mark.parametrize("kind", ["sigmoid", "kto"])
def test_a_reference_that_is_computed_once_is_the_same(pool, alone, models, tmp_path: Path, kind: str):
    """On two ranks that share sequences and samples; then it is on disk, and its model is not needed any more."""
    once = {"precompute_reference": True, "data_cache_path": str(tmp_path / "cache"), **KINDS[kind]}
    config = given(tmp_path, models, context_parallel_size=2, context_parallel_algo="megatron_cp_algo", **once)
    pool.run(train, 4, replace(config, nproc_per_node=4))
    wanted, files = figures(alone(kind)), set((tmp_path / "cache").glob("*reference.npy"))
    assert len(files) == 2  # to train and to validate
    for figure, values in wanted.items():
        assert figures(config)[figure] == pytest.approx(values, rel=1e-5, abs=1e-5), figure
    again = replace(given(tmp_path, models, **once), save=str(tmp_path / "again"))
    train(0, 1, again)
    assert figures(again)["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert set((tmp_path / "cache").glob("*reference.npy")) == files
    train(0, 1, replace(again, save=str(tmp_path / "other"), ref_model=models[0]))
    assert len(set((tmp_path / "cache").glob("*reference.npy"))) == 4


def test_what_is_wrong_is_found_before_anything_starts(models, tmp_path: Path):
    assert check_run(given(tmp_path, models, stage="dpo")) == []
    from transformers import LlamaForCausalLM

    small = str(tmp_path / "small")
    model = LlamaForCausalLM.from_pretrained(models[0])
    model.resize_token_embeddings(tiny.VOCAB - 8)
    model.save_pretrained(small)
    for options, subjects in (
        ({"stage": "dpo", "ref_model": str(tmp_path / "none")}, ["ref_model"]),
        ({"stage": "dpo", "ref_model": small}, ["ref_model"]),
        ({"stage": "sft"}, ["data_path"]),
        ({"stage": "sft", "is_pairwise_dataset": True}, ["data_path", "is_pairwise_dataset"]),
        ({"stage": "dpo", "data_path": (str(tmp_path / "single"),)}, ["data_path"]),
        ({"stage": "dpo", "dpo_loss_type": "ipo", "dpo_label_smoothing": 0.1}, ["dpo_label_smoothing"]),
    ):
        assert sorted(problem.subject for problem in check_run(given(tmp_path, models, **options))) == subjects
    cut = given(tmp_path, models, stage="dpo", seq_length=6, kto_beta=0.5)
    notes = " ".join(plan_run(ready(cut), 1).notes)
    assert "--kto-beta" in notes and "cut to --seq-length 6" in notes and "are the same: 1 of the 40" in notes
