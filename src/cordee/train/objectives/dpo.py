"""Direct preference optimisation (Rafailov et al. 2023), with the losses of SLiC (hinge) and of IPO (Azar et al. 2023).

A reward is beta times what an answer's log-probability has gained over the reference model's: of the whole answer, of
IPO the mean over its tokens."""

from cordee.train.preference import Answers, Losses, PairPreference


class DPO(PairPreference):
    stage = "dpo"
    refers = True

    def losses(self, chosen: Answers, rejected: Answers) -> Losses:
        import torch.nn.functional as F

        options, beta = self.options, self.options.dpo_beta
        is_ipo = options.dpo_loss_type == "ipo"
        better, worse = (side.gained / side.lengths if is_ipo else side.gained for side in (chosen, rejected))
        margin, smoothing = beta * (better - worse), options.dpo_label_smoothing
        if is_ipo:
            losses = (better - worse - 1 / (2 * beta)).square()
        elif options.dpo_loss_type == "hinge":
            losses = F.relu(1 - margin)
        else:
            losses = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
        metrics = {"rewards/chosen": beta * better, "rewards/rejected": beta * worse}
        if options.dpo_ftx:
            metrics["nll"] = -chosen.logps / chosen.lengths
            losses = losses + options.dpo_ftx * metrics["nll"]
        return losses, metrics


OBJECTIVE = DPO()
