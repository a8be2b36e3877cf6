"""The options of reinforcement learning.

Owns their names, types, defaults and help texts, and which stages they are of."""

from dataclasses import dataclass
from typing import Literal

from cordee.config.laws import SEVERAL, Wanted, ignored, needs
from cordee.config.option import option

STAGES = ("grpo", "ppo")
_LEARNING = Wanted("grpo or ppo", lambda stage: stage in STAGES)
_OTHER = Wanted("other than grpo or ppo", lambda stage: stage not in STAGES)


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """Reinforcement learning (grpo, ppo)."""

    reward_function: tuple[str, ...] = option(
        (), "Python functions of prompts, completions and answers that return rewards", metavar="MODULE:NAME|FILE:NAME"
    )
    reward_model: str | None = option(None, "reward model, such as --stage rm makes, in any format", metavar="DIR")
    reward_weights: tuple[float, ...] | None = option(None, "weights of the functions, then of the model [1 each]")
    num_generations: int | None = option(
        None, "rollouts of a prompt, which --global-batch-size counts [grpo: 8, ppo: 1]", above=0
    )
    max_completion_length: int = option(256, "maximum number of tokens of a rollout, of --seq-length", above=0)
    rollout_temperature: float = option(1.0, "softmax temperature of rollouts, and of the policy", above=0)
    rollout_top_k: int = option(0, "sample from the k most likely tokens; 0: no limit", at_least=0)
    rollout_top_p: float = option(1.0, "nucleus sampling of rollouts", above=0, at_most=1)
    rollout_batch_size: int = option(64, "rollouts decoded in one batch on a rank", above=0)
    rollout_dir: str | None = option(None, "rollouts of each step with rewards [rollouts in --save]", metavar="DIR")
    updates_per_rollout: int = option(1, "steps on the same rollouts, with the ratio to their policy clipped", above=0)
    clip_range: float = option(0.2, "clip the probability ratio to 1 - c ... 1 + c", aliases=("--epsilon",), above=0)
    clip_range_high: float | None = option(None, "c above 1 [--clip-range]", aliases=("--epsilon-high",), above=0)
    kl_coefficient: float | None = option(
        None, "weight of the KL divergence from the reference model [grpo: 0, no reference; ppo: 0.05]", at_least=0
    )
    loss_level: Literal["token", "sequence"] | None = option(
        None, "all tokens of a step count the same, or all rollouts [grpo: sequence, ppo: token]"
    )
    mask_truncated_completions: bool = option(False, "leave rollouts without an end out of the loss")
    scale_rewards: Literal["group", "batch", "none"] = option(
        "group", "grpo: divide advantages by the standard deviation of the rewards of a prompt, or of a step"
    )
    discount: float = option(1.0, "ppo: discount of later rewards (gamma)", above=0, at_most=1)
    gae_lambda: float = option(0.95, "ppo: lambda of the generalised advantage estimation", at_least=0, at_most=1)
    value_coefficient: float = option(0.1, "ppo: weight of the loss of values", aliases=("--vf-coef",), at_least=0)
    value_clip_range: float = option(0.2, "ppo: clip values to so much around those of the rollouts", above=0)

    laws = (
        ignored(
            *("reward_function", "reward_model", "reward_weights", "num_generations", "max_completion_length"),
            *("rollout_temperature", "rollout_top_k", "rollout_top_p", "rollout_batch_size", "rollout_dir"),
            *("updates_per_rollout", "clip_range", "clip_range_high", "kl_coefficient", "loss_level"),
            "mask_truncated_completions",
            stage=_LEARNING,
        ),
        ignored("scale_rewards", stage="grpo"),
        ignored("clip_range", "clip_range_high", "value_clip_range", updates_per_rollout=SEVERAL),
        ignored("discount", "gae_lambda", "value_coefficient", "value_clip_range", stage="ppo"),
        needs("pack", "neat_pack", "reset_position_ids", "reset_attention_mask", "rampup_batch_size", stage=_OTHER),
    )
