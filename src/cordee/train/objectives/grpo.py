"""Group relative policy optimisation (Shao et al. 2024): how good a completion is, is told by others to its prompt.

The divergence from the reference model, where it is asked for, is part of the loss. Loss levels: of whole rollouts as
in the paper, of all tokens of a step as DAPO (Yu et al. 2025) has it."""

from collections.abc import Mapping
from typing import Any, ClassVar

from cordee.train.reinforcement import Reinforcement


class GRPO(Reinforcement):
    stage = "grpo"
    defaults: ClassVar[Mapping[str, Any]] = {"num_generations": 8, "kl_coefficient": 0.0, "loss_level": "sequence"}

    def credited(self, totals: Mapping[int, float]) -> Mapping[int, float]:
        from cordee.train.rollout import advantages

        return advantages(totals, self.learning.num_generations or 1, self.learning.scale_rewards)


OBJECTIVE = GRPO()
