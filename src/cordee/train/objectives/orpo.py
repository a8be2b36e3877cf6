"""Odds ratio preference optimisation (Hong et al. 2024): the negative log-likelihood of the chosen answer, and beta
times the log odds ratio of the two.

Likelihoods are means over the tokens of an answer; none is over its prompt."""

from cordee.train.preference import Answers, Losses, PairPreference


class ORPO(PairPreference):
    stage = "orpo"

    def losses(self, chosen: Answers, rejected: Answers) -> Losses:
        import torch
        import torch.nn.functional as F

        # Below 0, for the odds of what is certain are infinite; expm1, for 1 - exp rounds to nothing near it.
        better, worse = ((side.logps / side.lengths).clamp(max=-1e-6) for side in (chosen, rejected))
        ratio = better - worse - torch.log(-torch.expm1(better)) + torch.log(-torch.expm1(worse))
        beta, nll = self.options.orpo_beta, -chosen.logps / chosen.lengths
        metrics = {"rewards/chosen": beta * better, "rewards/rejected": beta * worse, "nll": nll, "log_odds": ratio}
        return nll - beta * F.logsigmoid(ratio), metrics


OBJECTIVE = ORPO()
