"""Losses and gradients of objectives of tuning are those of TRL, token for token, in float32.

Both sides have the same weights and the same ids: those of the samples, or of the rollouts, of our first step, which
TRL's collators and trainers are given in place of what they would tokenize or sample. Where TRL defines something
otherwise than our objectives, the test of it says what, and compares what is left."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cordee.convert import job as convert
from cordee.convert.options import ConvertConfig
from cordee.data.encode import column_of
from cordee.data.messages import IGNORED
from cordee.data.tuning import field_names
from cordee.data.tuning_dataset import MISMATCHED
from cordee.train.options import TrainConfig
from cordee.train.plan import plan_run
from tests.data.test_tuning import write
from tests.train import test_preference, test_reinforcement, test_reward, tiny
from tests.train.test_preference import figures, ready, train
from tests.train.test_reinforcement import GROUP, SIZE, ids, rollouts

trl = pytest.importorskip("trl", minversion="1.16", reason="needs trl, of the extra `test`")

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled",
    "ignore:You are (using 'rollout_func'|importing from 'trl.experimental')",
    "ignore:.*deprecated and will be removed in v6:FutureWarning",  # of transformers, in what TRL calls
)

REL = 1e-5  # 7e-7 of a loss and 2e-6 of a gradient are what float32 gives
PAIRS = ("prompt", "chosen", "rejected")
ONE = {"train_iters": 1, "eval_iters": 0, "lr_warmup_iters": 0}
WORDS = {"prompt": "1 2", "chosen": "3", "rejected": "4", "completion": "5", "label": True}  # what trainers ask for
SMOOTHING, CENTER = 0.1, 0.3
Sample = dict[str, Any]


# ---- what both are given ---------------------------------------------------------------------------------------------


def samples_of(config: TrainConfig) -> list[Sample]:
    """Those of the first step, as lists."""
    dataset = plan_run(replace(ready(config), save=None, save_interval=None), 1).data.open(verified=False)["train"]
    found = [dataset[index] for index in range(config.global_batch_size or 1)]
    return [{name: np.asarray(values).tolist() for name, values in sample.items()} for sample in found]


def parts(sample: Sample, side: str) -> tuple[list[int], list[int]]:
    """The prompt and the answer, which all labels are of."""
    tokens, labels = sample[f"{side}input_ids"], sample[f"{side}labels"]
    first = labels.count(IGNORED)
    assert labels == [IGNORED] * first + tokens[first:] and first > 0
    return tokens[:first], tokens[first:]


def pair(sample: Sample) -> Sample:
    (prompt, chosen), (same, rejected) = (parts(sample, f"{side}_") for side in ("chosen", "rejected"))
    assert prompt == same
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def write_short_pairs(prefix: Path) -> None:
    """Pairs of answers of lengths of their own, with prompts of one token."""
    random = np.random.default_rng(5)
    columns: list[list[list[int]]] = [[] for _ in field_names(True)]
    for _ in range(20):
        first = int(random.integers(tiny.VOCAB))
        for side in (0, 3):
            answer = random.integers(tiny.VOCAB, size=int(random.integers(1, 12))).tolist()
            for place, values in enumerate(([first, *answer], [1] * (len(answer) + 1), [IGNORED, *answer])):
                columns[side + place].append(values)
    write(prefix, dict(zip(field_names(True), map(column_of, columns), strict=True)))


def whole_pair(sample: Sample) -> Sample:
    """A pair as the older collators take it."""
    return {name: values for name, values in sample.items() if name.startswith(("chosen_", "rejected_"))}


def trainer_of(
    kind: str, folder: Path, model: Any, columns: tuple[str, ...], given: dict[str, Any], **options: Any
) -> Any:
    """A trainer of TRL, with a row of data that is not used; the last token of the model ends and pads. The model is in
    eval mode, as it is loaded: it has no dropout, and no loss is divided by steps of accumulation."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    last = str(model.config.vocab_size - 1)
    tokenizer = Tokenizer(WordLevel({str(number): number for number in range(int(last) + 1)}, unk_token="0"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0", eos_token=last, pad_token=last)
    home = import_module(f"trl.experimental.{kind.lower()}") if kind in ("ORPO", "CPO") else trl
    local = {"output_dir": str(folder / "trl"), "report_to": [], "use_cpu": True, "bf16": False}
    local |= {"gradient_checkpointing": False, "per_device_train_batch_size": SIZE}
    return getattr(home, f"{kind}Trainer")(
        model=model,
        args=getattr(home, f"{kind}Config")(**local, **options),
        train_dataset=Dataset.from_dict({name: [WORDS[name]] for name in columns}),
        processing_class=fast,
        **given,
    )


def causal(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def compare(config: TrainConfig, trainer: Any, losses: list[torch.Tensor], step: int = 0) -> None:
    """The mean of `losses`, and its gradient, are those of a step of ours."""
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])
    found = figures(config)
    assert found["loss"][step] == pytest.approx(loss.item(), rel=REL)
    assert found["grad_norm"][step] == pytest.approx(norm.item(), rel=REL)


# ---- preferences -----------------------------------------------------------------------------------------------------

DPO: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {  # ours, TRL's, whether each pair is a batch
    "sigmoid": ({}, {"loss_type": ["sigmoid"]}, False),
    "smoothed": ({"dpo_label_smoothing": SMOOTHING}, {"loss_type": ["aot"], "label_smoothing": SMOOTHING}, True),
    "ftx": ({"dpo_ftx": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, True),
    "hinge": ({"dpo_loss_type": "hinge"}, {"loss_type": ["hinge"]}, False),
    "ipo": ({"dpo_loss_type": "ipo"}, {"loss_type": ["ipo"]}, False),
}


@pytest.mark.parametrize("kind", DPO)
def test_dpo(models, tmp_path: Path, kind: str):
    """TRL's `sigmoid` has no label smoothing, and its `robust` is another loss (of Chowdhury et al. 2024): ours, which
    is cDPO, is that of `aot` where a batch is one pair, for there is nothing to sort. Its `sft` is a mean over the
    tokens of a batch, which of one pair is ours."""
    ours, options, single = DPO[kind]
    config = test_preference.given(tmp_path, models, stage="dpo", dpo_beta=0.2, **ours, **ONE)
    train(0, 1, config)
    given = {"ref_model": causal(models[1])}
    trainer = trainer_of("DPO", tmp_path, causal(models[0]), PAIRS, given, beta=0.2, **options)
    pairs = [pair(sample) for sample in samples_of(config)]
    batches = [[each] for each in pairs] if single else [pairs]
    compare(config, trainer, [trainer.compute_loss(trainer.model, trainer.data_collator(each)) for each in batches])


def test_orpo_of_answers(models, tmp_path: Path):
    """The negative log-likelihood of TRL is of prompt and answer, and a mean over the tokens of a batch: that of the
    answer alone, the mean of each, which the paper's formula has, is made here of TRL's log-probabilities; the odds
    ratio is its own."""
    config = test_preference.given(tmp_path, models, stage="orpo", orpo_beta=0.3, **ONE)
    train(0, 1, config)
    trainer = trainer_of("ORPO", tmp_path, causal(models[0]), PAIRS, {}, beta=0.3, max_length=32)
    batch = trainer.data_collator([whole_pair(sample) for sample in samples_of(config)])
    chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, batch)
    compare(config, trainer, [-chosen.mean() - trainer.odds_ratio_loss(chosen, rejected)[0].mean()])


def test_orpo_of_prompts_of_a_token(models, tmp_path: Path):
    """The whole loss as TRL computes it, where a batch is one pair and nothing predicts the prompt."""
    write_short_pairs(tmp_path / "pairs")
    config = test_preference.given(tmp_path, models, stage="orpo", orpo_beta=0.3, **ONE)
    train(0, 1, config)
    trainer = trainer_of("ORPO", tmp_path, causal(models[0]), PAIRS, {}, beta=0.3, max_length=32)
    samples = samples_of(config)
    assert all(len(pair(sample)["prompt_ids"]) == 1 for sample in samples)
    batches = [trainer.data_collator([whole_pair(sample)]) for sample in samples]
    compare(config, trainer, [trainer.compute_loss(trainer.model, batch) for batch in batches])


def test_simpo(models, tmp_path: Path):
    """`simpo` of TRL's CPO, without the negative log-likelihood that it adds unless told not to."""
    config = test_preference.given(tmp_path, models, stage="simpo", simpo_beta=1.5, simpo_gamma=0.4, **ONE)
    train(0, 1, config)
    options = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 1.5, "simpo_gamma": 0.4, "max_length": 32}
    trainer = trainer_of("CPO", tmp_path, causal(models[0]), PAIRS, {}, **options)
    batch = trainer.data_collator([whole_pair(sample) for sample in samples_of(config)])
    compare(config, trainer, [trainer.compute_loss(trainer.model, batch)])


def test_kto(models, tmp_path: Path):
    """TRL makes mismatched answers by a rotation of each batch, ours are drawn over the data: it is given ours, and
    estimates the divergence of them."""
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7, "beta": 0.2}
    ours = {f"kto_{name}": value for name, value in weights.items()}
    config = test_preference.given(tmp_path, models, stage="kto", **ours, **ONE)
    train(0, 1, config)
    given = {"ref_model": causal(models[1])}
    trainer = trainer_of("KTO", tmp_path, causal(models[0]), ("prompt", "completion", "label"), given, **weights)
    examples = []
    for sample in samples_of(config):
        (prompt, answer), (same, other) = parts(sample, ""), parts(sample, MISMATCHED)
        assert prompt == same
        desirable = bool(sample["desirable"][0])
        examples.append(
            {"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": other, "label": desirable}
        )
    assert len({each["label"] for each in examples}) == 2
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    (kl,) = trainer._metrics["eval"]["kl"]
    assert kl > 1 and figures(config)["kl"][0] == pytest.approx(kl, rel=REL)
    compare(config, trainer, [loss])


@pytest.mark.parametrize("center", [0.0, CENTER])
def test_rm(tmp_path: Path, center: float):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**test_reward.SHAPE, num_labels=1))
    model.save_pretrained(path := str(tmp_path / "model"))
    config = test_preference.given(tmp_path, (path, path), stage="rm", rm_center_coefficient=center, **ONE)
    train(0, 1, config)
    options = {"center_rewards_coefficient": center or None}
    trainer = trainer_of("Reward", tmp_path, model.eval(), ("chosen", "rejected"), {}, **options)
    examples = [
        {f"{side}_ids": sample[f"{side}_input_ids"] for side in ("chosen", "rejected")} for sample in samples_of(config)
    ]
    batch = trainer.data_collator(examples)
    assert trainer.model.config.pad_token_id == test_reward.PAD
    compare(config, trainer, [trainer.compute_loss(trainer.model, batch)])


# ---- rollouts --------------------------------------------------------------------------------------------------------

LEVELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, TRL's
    "grpo": ({"kl_coefficient": 0.3}, {"loss_type": "grpo", "beta": 0.3, "scale_rewards": "group"}),
    "bnpo": (
        {"loss_level": "token", "scale_rewards": "batch", "kl_coefficient": 0.1, "rollout_temperature": 1.4},
        {"loss_type": "bnpo", "scale_rewards": "batch", "beta": 0.1, "temperature": 1.4},
    ),
    "dapo": (
        {"loss_level": "token", "scale_rewards": "none", "kl_coefficient": 0.2, "rollout_temperature": 0.7},
        {"loss_type": "dapo", "scale_rewards": "none", "beta": 0.2, "temperature": 0.7},
    ),
    "grpo masked": (
        {"mask_truncated_completions": True, "kl_coefficient": 0.3},
        {"loss_type": "grpo", "mask_truncated_completions": True, "beta": 0.3},
    ),
    "dapo masked": (
        {"mask_truncated_completions": True, "loss_level": "token"},
        {"loss_type": "dapo", "mask_truncated_completions": True},
    ),
}


def grpo_of(config: TrainConfig, folder: Path, models: tuple[str, str], **options: Any) -> tuple[Any, Sample]:
    """A trainer of GRPO, and what it makes of our rollouts of the first step and their rewards: advantages,
    log-probabilities of the reference model, masks and padding are its own."""
    found = rollouts(config, 1)

    def written(prompts: list[str], trainer: Any) -> Sample:
        assert len(prompts) == len(found)
        tokens = [each["tokens"] for each in found]
        return {"prompt_ids": [ids(each["prompt"]) for each in found], "completion_ids": tokens, "logprobs": None}

    def first(**given: Any) -> list[float]:
        return [each["rewards"][config.reward_function[0]] for each in found]

    def second(**given: Any) -> list[float]:
        return [each["rewards"][config.reward_function[1]] for each in found]

    given = {"reward_funcs": [first, second], "rollout_func": written}
    common = {"num_generations": GROUP, "reward_weights": list(config.reward_weights or ())}
    common |= {"use_bias_correction_kl": False}
    trainer = trainer_of("GRPO", folder, causal(models[0]), ("prompt",), given, **common, **options)
    if trainer.ref_model is not None:  # which is the policy that it began with
        trainer.ref_model.load_state_dict(causal(models[1]).state_dict())
    return trainer, trainer._generate_and_score_completions([{"prompt": each["prompt"]} for each in found])


@pytest.mark.parametrize("kind", LEVELS)
def test_grpo(models, tmp_path: Path, kind: str):
    """`bnpo` and `dapo` are both ours over tokens, where a step is one batch. TRL multiplies the divergence from the
    reference by the probability ratio unless told not to (`use_bias_correction_kl`, of DeepSeek-V3.2), which is another
    gradient of the same loss: the divergence of the paper, which is ours, is without."""
    ours, options = LEVELS[kind]
    config = test_reinforcement.given(tmp_path, models, stage="grpo", **ours, **ONE)
    train(0, 1, config)
    trainer, inputs = grpo_of(config, tmp_path, models, **options)
    ends = [each["finish"] for each in rollouts(config, 1)]
    assert "masked" not in kind or len(set(ends)) == 2
    compare(config, trainer, [trainer.compute_loss(trainer.model, inputs)])


def test_grpo_is_clipped(models, tmp_path: Path):
    """The second step on the same rollouts: of our weights after the first one, whose log-probabilities before it are
    TRL's own."""
    ours = {"updates_per_rollout": 2, "kl_coefficient": 0.3, "clip_range": 0.1, "clip_range_high": 0.3, "lr": 3e-2}
    config = test_reinforcement.given(
        tmp_path, models, stage="grpo", train_iters=2, eval_iters=0, save_interval=1, **ours
    )
    train(0, 1, config)
    clipping = {"num_iterations": 2, "epsilon": 0.1, "epsilon_high": 0.3}
    trainer, inputs = grpo_of(config, tmp_path, models, loss_type="grpo", beta=0.3, **clipping)
    assert inputs["old_per_token_logps"] is not None
    compare(config, trainer, [trainer.compute_loss(trainer.model, inputs)])
    convert.run(ConvertConfig(load_dir=f"{config.save}/iter_0000001", save_dir=str(tmp_path / "hf")))
    trainer.model.load_state_dict(causal(str(tmp_path / "hf")).state_dict())
    trainer.model.zero_grad()
    compare(config, trainer, [trainer.compute_loss(trainer.model, inputs)], step=1)
    assert figures(config)["clipped"][1] > 0
