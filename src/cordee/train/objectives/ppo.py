"""Proximal policy optimisation (Schulman et al. 2017) as of Ouyang et al. 2022: values say what is to be expected.

A token is rewarded by how little it moves away from the reference model, the last one by the rollout's reward too.
Advantages are estimated over the tokens of a rollout (GAE, Schulman et al. 2016) and have mean 0 and variance 1 over
those of a step. The value head shares the layers of the policy, and its loss is clipped as that of the policy is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from cordee.data.messages import IGNORED
from cordee.families.registry import ModelSpec
from cordee.train.reinforcement import Reinforcement

if TYPE_CHECKING:
    from torch import Tensor

    from cordee.data.tuning_collate import RolloutBatch
    from cordee.model.head import Head
    from cordee.parallel.execution import Frozen
    from cordee.parallel.layout import Layout


class PPO(Reinforcement):
    stage = "ppo"
    defaults: ClassVar[Mapping[str, Any]] = {"num_generations": 1, "kl_coefficient": 0.05, "loss_level": "token"}
    in_loss = False

    def model(self, spec: ModelSpec, notes: list[str]) -> ModelSpec:
        if not spec.config.score:
            notes.append("the value head is initialised by --seed")
        return spec.without_values("--load", []).with_heads(score=True, lm_head=True)

    def credited(self, totals: Mapping[int, float]) -> Mapping[int, float]:
        return totals

    def remembered(self, batches: list[Any], policy: Frozen) -> list[Any]:
        from cordee.parallel import collectives

        found = zip(batches, policy.forward(batches, self._seen), strict=True)
        made = [replace(batch, old=x[0], values=x[1]) if x is not None else batch for batch, x in found]
        made = [batch if batch.old is None else self._estimated(batch, policy.layout) for batch in made]
        own = [batch.advantages[batch.labels != IGNORED].double() for batch in made if batch.old is not None]
        sums = [sum(float(f(each)) for each in own) for f in (len, lambda x: x.sum(), lambda x: x.square().sum())]
        count, total, squares = collectives.sum_numbers(sums, policy.layout)
        mean = total / max(count, 1)
        spread = max(squares / max(count, 1) - mean**2, 0.0) ** 0.5 + 1e-8
        return [replace(batch, advantages=(batch.advantages - mean) / spread) for batch in made]

    def _seen(self, head: Head, hidden: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        return self.token_logps(head, hidden, batch), head.scores(hidden)

    def _estimated(self, batch: RolloutBatch, layout: Layout) -> RolloutBatch:
        """With advantages and returns, whose sequences are whole for that."""
        import torch

        from cordee.parallel import context

        assert batch.old is not None and batch.values is not None
        own, options = (batch.labels != IGNORED).to(batch.old.device), self.learning
        penalty = self.kl * (batch.reference.to(batch.old.device) - batch.old)
        whole = context.whole(torch.stack([batch.values, penalty, own.float()]), layout, self._data.config)
        values, rewards, mask = whole[0], whole[1].clone(), whole[2]
        last = mask.cumsum(1) == mask.sum(1, keepdim=True)  # from the last token of a completion on
        rewards += batch.rewards[:, :1].to(rewards.device) * (last & (mask > 0))
        advantages, after = torch.zeros_like(values), torch.zeros_like(values[:, 0])
        following = torch.zeros_like(after)
        for place in reversed(range(values.shape[1])):
            inside = mask[:, place]
            delta = rewards[:, place] + options.discount * following - values[:, place]
            after = (delta + options.discount * options.gae_lambda * after) * inside
            following, advantages[:, place] = values[:, place] * inside, after
        part = context.part(torch.stack([advantages, advantages + values]), layout, self._data.config)
        return replace(batch, advantages=part[0], returns=part[1])

    def further(self, head: Head, hidden: Tensor, batch: RolloutBatch) -> tuple[Tensor | float, dict[str, Tensor]]:
        if batch.returns is None or batch.values is None:  # of a validation
            return super().further(head, hidden, batch)
        import torch

        values, wide = head.scores(hidden), self.learning.value_clip_range
        near = batch.values + (values - batch.values).clamp(-wide, wide)
        losses = torch.maximum((values - batch.returns).square(), (near - batch.returns).square()) / 2
        return self.learning.value_coefficient * losses, {"value loss": losses, "returns": batch.returns}


OBJECTIVE = PPO()
