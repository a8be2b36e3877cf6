"""Simple preference optimisation (Meng et al. 2024): rewards are beta times the mean log-probability of an answer's
tokens, without a reference model, and differ by a margin."""

from cordee.train.preference import Answers, Losses, PairPreference


class SimPO(PairPreference):
    stage = "simpo"

    def losses(self, chosen: Answers, rejected: Answers) -> Losses:
        import torch.nn.functional as F

        better, worse = (self.options.simpo_beta * side.logps / side.lengths for side in (chosen, rejected))
        losses = -F.logsigmoid(better - worse - self.options.simpo_gamma)
        return losses, {"rewards/chosen": better, "rewards/rejected": worse}


OBJECTIVE = SimPO()
