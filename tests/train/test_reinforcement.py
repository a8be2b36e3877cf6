"""Reinforcement learning: losses and gradients are the formulas, whatever the layout; rollouts and rewards are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cordee
from cordee.checkpoint import source
from cordee.checkpoint.storage import location_of
from cordee.convert import job as convert
from cordee.convert.options import ConvertConfig
from cordee.data.encode import column_of
from cordee.data.messages import IGNORED
from cordee.data.tuning import field_names, prompt_length
from cordee.errors import ProblemError
from cordee.train.options import TrainConfig
from cordee.train.plan import check_run, plan_run
from tests.data.test_tuning import write
from tests.matrix import sampled
from tests.train import test_preference, tiny
from tests.train.test_preference import LAYOUTS, figures, once, ready, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

REWARDS = """
def evens(prompts, completions, answers):
    assert len(prompts) == len(completions) == len(answers)
    return [sum(int(word) % 2 == 0 for word in text.split()) / 4 - len(text.split()) / 50 for text in completions]

def like(prompts, completions, answers):
    return [float(len(set(a.split()) & set(c.split()))) for a, c in zip(answers, completions, strict=True)]

def raises(prompts, completions, answers):
    raise KeyError("no such thing")

def bad(prompts, completions, answers):
    return [float("nan")] * len(completions)

def few(prompts, completions, answers):
    completions.clear()
    return [1.0]

def ends(prompts, completions, answers):
    raise SystemExit(0)

def named(prompts, completions, answers):
    return dict.fromkeys(range(len(completions)), 1.0)

def none(prompts, completions, answers):
    return [None for _ in completions]

def wrong(completions):
    return [1.0 for _ in completions]
"""
SIZE, GROUP = 8, 4
ENDS = {2, tiny.VOCAB - 1}  # of the model and of the tokenizer
KINDS: dict[str, dict[str, Any]] = {
    "grpo": {"stage": "grpo", "kl_coefficient": 0.3},
    "grpo tokens": {"stage": "grpo", "loss_level": "token", "scale_rewards": "batch", "rollout_temperature": 1.4},
    "ppo": {"stage": "ppo", "kl_coefficient": 0.2, "gae_lambda": 0.9, "discount": 0.95, "value_coefficient": 0.5},
}


def given(folder: Path, models: tuple[str, str], **options: Any) -> TrainConfig:
    folder.mkdir(exist_ok=True)
    (folder / "rewards.py").write_text(REWARDS)
    functions = tuple(f"{folder / 'rewards.py'}:{name}" for name in ("evens", "like"))
    common: dict[str, Any] = {"tokenizer_type": "NullTokenizer", "num_generations": GROUP, "global_batch_size": SIZE}
    common |= {"reward_function": functions, "reward_weights": (1.0, 0.5), "max_completion_length": 6}
    common |= {"rollout_batch_size": 3, "lr_warmup_iters": 0, "ref_model": models[1], "seq_length": 16}
    if not list(folder.glob("dialogues_*")):
        make_data(folder)
    config = test_preference.given(folder, models, **{**common, **options, "stage": "kto"})
    data = {} if "train_data_path" in options else {"data_path": (str(folder / "dialogues"),)}
    return replace(config, stage=options["stage"], vocab_size=tiny.VOCAB, **data)


def make_data(folder: Path) -> None:
    """Dialogues of one or two answers, the last of which counts."""
    random, columns = np.random.default_rng(3), [[], [], []]
    for number in range(40):
        turns = [random.integers(tiny.VOCAB - 1, size=int(random.integers(1, 5))).tolist() for _ in range(4)]
        first = [] if number % 3 else [(turns[0], False), (turns[1], True)]
        ids, labels = [], []
        for turn, trained in [*first, (turns[2], False), (turns[3], True)]:
            ids += turn
            labels += turn if trained else [IGNORED] * len(turn)
        for column, values in zip(columns, (ids, [1] * len(ids), labels), strict=True):
            column.append(values)
    write(folder / "dialogues", dict(zip(field_names(False), map(column_of, columns), strict=True)))


def rollouts(config: TrainConfig, iteration: int) -> list[dict[str, Any]]:
    lines = (Path(config.save or "") / f"rollouts/step-{iteration:08d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def ids(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def logps(model: torch.nn.Module, prompt: list[int], completion: list[int], temperature: float) -> Tensor:
    logits = model(torch.tensor([prompt + completion])).logits[0] / temperature
    chosen = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return chosen.gather(1, torch.tensor(completion)[:, None])[:, 0]


def expected(config: TrainConfig) -> dict[str, float]:
    """Of the first step, from what was written in it: every rollout alone, by transformers in float64."""
    from transformers import AutoModelForCausalLM

    paths = (config.load, config.ref_model)
    policy, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in paths)
    found = rollouts(config, 1)
    assert len(found) == SIZE
    rewards, T = [], config.rollout_temperature
    for each in found:
        words = ids(each["completion"])
        evens = sum(word % 2 == 0 for word in words) / 4 - len(words) / 50
        rewards.append(evens + 0.5 * len(set(words) & set(ids(each["answer"]))))
    rows = [(ids(each["prompt"]), each["tokens"]) for each in found]
    assert all(each["finish"] == ("stop" if each["tokens"][-1] in ENDS else "length") for each in found)
    own = [logps(policy, *row, T) for row in rows]
    other = [logps(reference, *row, T).detach() for row in rows]
    lengths = [len(completion) for _, completion in rows]
    metrics = {"reward": float(np.mean(rewards)), "length": float(np.mean(lengths))}
    loss = (ppo if config.stage == "ppo" else grpo)(config, policy, rows, rewards, own, other)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])
    return {"loss": loss.item(), "grad_norm": norm.item(), **metrics}


def grpo(config, policy, rows, rewards, own, other) -> Tensor:
    groups = np.array(rewards).reshape(-1, GROUP)
    spread = groups.std(ddof=1) if config.scale_rewards == "batch" else groups.std(1, ddof=1, keepdims=True)
    advantages = ((groups - groups.mean(1, keepdims=True)) / (spread + 1e-4)).ravel()
    losses = []
    for a, p, q in zip(advantages, own, other, strict=True):
        kl = torch.exp(q - p) - (q - p) - 1
        losses.append(-(torch.exp(p - p.detach()) * a) + (config.kl_coefficient or 0) * kl)
    if config.loss_level == "token":
        return torch.cat(losses).mean()
    return torch.stack([each.mean() for each in losses]).mean()


def ppo(config, policy, rows, rewards, own, other) -> Tensor:
    weight = score(config).double()
    policy.register_parameter("score", torch.nn.Parameter(weight))
    values, estimates, targets = [], [], []
    for (prompt, completion), reward, p, q in zip(rows, rewards, own, other, strict=True):
        hidden = policy.model(torch.tensor([prompt + completion])).last_hidden_state[0]
        v = (hidden @ policy.score[0])[len(prompt) - 1 : -1]
        given = [-config.kl_coefficient * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True)]
        given[-1] += reward
        after, advantages = 0.0, []
        for place in reversed(range(len(completion))):
            following = v[place + 1].item() if place + 1 < len(completion) else 0.0
            delta = given[place] + config.discount * following - v[place].item()
            after = delta + config.discount * config.gae_lambda * after
            advantages.insert(0, after)
        values.append(v)
        estimates += advantages
        targets += [a + b for a, b in zip(advantages, v.tolist(), strict=True)]
    advantages = (np.array(estimates) - np.mean(estimates)) / np.std(estimates)
    p = torch.cat(own)
    losses = -torch.exp(p - p.detach()) * torch.tensor(advantages)
    return (losses + config.value_coefficient * (torch.cat(values) - torch.tensor(targets)) ** 2 / 2).mean()


def score(config: TrainConfig) -> Tensor:
    """The value head as it is initialised: no step moves it far enough to count."""
    at = location_of(f"{config.save}/iter_0000001")
    return source.read(at).tensor("score.weight")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, models) -> Callable[[str], TrainConfig]:
    return once(lambda kind: given(tmp_path_factory.mktemp("alone"), models, **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_is_what_the_formula_gives(models, tmp_path: Path, kind: str):
    config = given(tmp_path, models, **KINDS[kind], train_iters=1, save_interval=1, lr=1e-30, eval_iters=0)
    train(0, 1, config)
    found = figures(config)
    for figure, value in expected(config).items():
        assert found[figure][0] == pytest.approx(value, rel=2e-5, abs=1e-6), figure


@pytest.mark.parametrize(("layout", "kind"), sampled(LAYOUTS, KINDS))
def test_one_loss_under_every_layout(pool, alone, models, tmp_path: Path, layout: str, kind: str):
    reference = alone(kind)
    ranks, options = LAYOUTS[layout]
    config = given(tmp_path, models, **KINDS[kind], **options)
    pool.run(train, ranks, config)
    wanted, found = figures(reference), figures(config)
    assert len(found["loss"]) == 3 and len(found["validation"]) == 2
    for each in ("prompt", "completion", "answer", "finish"):
        assert [row[each] for row in rollouts(config, 3)] == [row[each] for row in rollouts(reference, 3)]
    for figure, values in wanted.items():
        assert found[figure] == pytest.approx(values, rel=1e-4, abs=1e-5), figure


@pytest.mark.parametrize("ranks", [1, 2])
def test_rewards_by_a_model_are_those_of_transformers(pool, models, tmp_path: Path, ranks: int):
    """Beside those of a function; the policy has adapters."""
    from transformers import AutoModelForSequenceClassification

    judge = AutoModelForSequenceClassification.from_pretrained(models[1], num_labels=1, pad_token_id=0)
    judge.save_pretrained(tmp_path / "judge")
    adapters = {"lora_target_modules": ("all-linear",), "lora_r": 4, "zero_stage": 3 if ranks == 2 else 0}
    config = given(tmp_path, models, stage="grpo", reward_model=str(tmp_path / "judge"), train_iters=1, **adapters)
    config = replace(config, reward_weights=(1.0, 0.5, 2.0))
    pool.run(train, ranks, config) if ranks > 1 else train(0, 1, config)
    found = rollouts(config, 1)
    for each in found:
        with torch.no_grad():
            wanted = judge(torch.tensor([ids(each["prompt"]) + each["tokens"]])).logits.item()
        assert each["rewards"]["reward model"] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    totals = [np.dot(config.reward_weights, list(each["rewards"].values())) for each in found]
    assert figures(config)["reward"] == pytest.approx([np.mean(totals)], rel=1e-5)


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_several_steps_on_the_same_rollouts(models, tmp_path: Path, kind: str):
    """Are clipped against the policy that wrote them, and a run that resumes between blocks goes on as it would."""
    more = {**KINDS[kind], "updates_per_rollout": 2, "train_iters": 4, "lr": 3e-2, "lr_warmup_iters": 0}
    whole = given(tmp_path / "whole", models, **more)
    train(0, 1, whole)
    files = sorted(path.name for path in (Path(whole.save or "") / "rollouts").iterdir())
    assert files == ["step-00000001.jsonl", "step-00000003.jsonl"]
    found = figures(whole)
    assert found["reward"][0] == found["reward"][1] != found["reward"][2] == found["reward"][3]
    assert found["clipped"][0] == 0 and found["clipped"][1] > 0
    first = given(tmp_path / "first", models, **more, exit_interval=2)
    train(0, 1, first)
    train(0, 1, tiny.resumed(first))
    assert figures(first)["loss"] == pytest.approx(found["loss"], rel=1e-6)


def test_what_ppo_has_trained_is_a_language_model(alone, tmp_path: Path):
    """Without the value head, with transformers' logits; the value head is no part of what is written."""
    from transformers import AutoModelForCausalLM

    config = alone("ppo")
    convert.run(ConvertConfig(load_dir=config.save, save_dir=str(tmp_path / "hf"), save_model_type="hf"))
    written, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours = cordee.GPTModel.from_pretrained(str(tmp_path / "hf"))(ids)
        assert torch.allclose(ours, written(ids).logits, atol=1e-5)


def test_a_validation_is_the_mean_reward(models, tmp_path: Path):
    config = given(tmp_path, models, stage="grpo", train_iters=1, eval_interval=1, lr=1e-30)
    data = {"train_data_path": config.data_path, "valid_data_path": config.data_path, "data_path": ()}
    train(0, 1, config := replace(config, **data))
    found = figures(config)
    assert found["validation"] == pytest.approx([-reward for reward in found["reward"]], rel=1e-5)


def test_truncated_completions_are_left_out(models, tmp_path: Path):
    """Those that one token ends are not."""
    config = given(
        tmp_path, models, stage="grpo", mask_truncated_completions=True, train_iters=1, max_completion_length=1
    )
    train(0, 1, config)
    found = figures(config)
    kept = rollouts(config, 1)
    ended = np.array([each["finish"] == "stop" for each in kept])
    rewards = np.array([each["rewards"][name] for each in kept for name in config.reward_function]).reshape(SIZE, 2)
    groups = (rewards @ config.reward_weights).reshape(-1, GROUP)
    gained = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    assert ended.any() and found["truncated"] == [1 - ended.mean()]
    assert found["loss"][0] == pytest.approx(-gained.ravel()[ended].sum() / SIZE, rel=1e-5)


FAILURES = {"raises": "KeyError", "bad": "nan", "few": "1 rewards for 8", "ends": "SystemExit"}
FAILURES |= {"named": "1 rewards for 8", "none": "None"}


@pytest.mark.parametrize("name", FAILURES)
def test_a_function_that_fails_loses_nothing(models, tmp_path: Path, name: str):
    """The step before is saved, and the message says what went wrong."""
    config = given(tmp_path, models, stage="grpo", train_iters=3, save_interval=3, eval_iters=0)
    counting = f"""
import rewards

def after_the_first(prompts, completions, answers, calls=[]):
    calls.append(1)
    return [0.0 for _ in completions] if len(calls) == 1 else rewards.{name}(prompts, completions, answers)
"""
    (tmp_path / "counting.py").write_text(counting)
    function = f"{tmp_path / 'counting.py'}:after_the_first"
    with pytest.raises(ProblemError) as caught:
        train(0, 1, replace(config, reward_function=(function,), reward_weights=None))
    (problem,) = caught.value.problems
    assert problem.subject == "reward_function" and FAILURES[name] in problem.why
    assert (Path(config.save or "") / "iter_0000001").is_dir()


def test_what_is_wrong_is_found_before_anything_starts(models, tmp_path: Path):
    assert check_run(given(tmp_path, models, stage="grpo")) == []
    for options, subjects in (
        ({"reward_function": (), "reward_weights": None}, ["reward_function"]),
        ({"reward_function": ("no_such_module:name",), "reward_weights": None}, ["reward_function"]),
        ({"reward_function": (f"{tmp_path}/rewards.py:wrong",), "reward_weights": None}, ["reward_function"]),
        ({"reward_function": ("a.py:a", "b.py:b")}, ["reward_function", "reward_function"]),
        ({"reward_weights": (1.0,)}, ["reward_weights"]),
        ({"train_on": "all"}, ["train_on"]),
        ({"rollout_dir": "memory://bucket"}, ["rollout_dir"]),
        ({"num_generations": 1}, ["num_generations"]),
        ({"global_batch_size": 6}, ["global_batch_size"]),
        ({"max_completion_length": 16}, ["max_completion_length"]),
        ({"dataloader_type": "cyclic"}, ["dataloader_type"]),
        ({"neat_pack": True}, ["neat_pack"]),
        ({"reward_model": models[1]}, ["reward_model", "reward_weights"]),
    ):
        config = given(tmp_path, models, stage="grpo", **options)
        assert sorted(problem.subject for problem in check_run(config)) == subjects, options
    quiet = given(tmp_path, models, stage="grpo", save=None, save_interval=None, clip_range=0.3)
    notes = " ".join(plan_run(ready(quiet), 1).notes)
    assert all(each in notes for each in ("--ref-model", "--clip-range", "rollouts are not kept"))
    cut = given(tmp_path, models, stage="grpo", seq_length=9)
    assert "prompts cut to their last 3 tokens" in " ".join(plan_run(ready(cut), 1).notes)


def test_the_last_answer_is_what_is_written_anew():
    kept = IGNORED
    assert prompt_length(np.array([kept, 5, 6, kept, kept, 7, 8])) == 5
    assert prompt_length(np.array([kept, kept, 7, kept])) == 2
    assert prompt_length(np.array([kept, kept])) == 2
