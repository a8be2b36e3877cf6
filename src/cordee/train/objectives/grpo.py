"""Group relative policy optimisation (Shao et al. 2024): how good a completion is, is told by others to its prompt.

The divergence from the reference model, where it is asked for, is part of the loss. Loss levels: of whole rollouts as
in the paper, of all tokens of a step as DAPO (Yu et al. 2025) has it."""

from collections.abc import Mapping

from cordee.train.reinforcement import Reinforcement


class GRPO(Reinforcement):
    stage = "grpo"
    default_kl = 0.0
    default_level = "sequence"

    def credited(self, totals: Mapping[int, float]) -> Mapping[int, float]:
        from cordee.train.rollout import advantages

        return advantages(totals, self.learning.num_generations, self.learning.scale_rewards)


OBJECTIVE = GRPO()
