"""The options of preference training.

Owns their names, types, defaults and help texts, and which stages they are of."""

from dataclasses import dataclass
from typing import Literal

from cordee.config.laws import Wanted, ignored, needs
from cordee.config.option import option

_PAIRS = Wanted("dpo, orpo, simpo or rm", lambda stage: stage in ("dpo", "orpo", "simpo", "rm"))
_SCORED = Wanted("dpo or kto", lambda stage: stage in ("dpo", "kto"))
_REFERRING = Wanted("dpo, kto, grpo or ppo", lambda stage: stage in ("dpo", "kto", "grpo", "ppo"))


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions:
    """Preference training."""

    is_pairwise_dataset: bool = option(False, "the data is of pairs, as that of these stages always is")
    ref_model: str | None = option(None, "reference model, in any format [initial weights of the run]", metavar="DIR")
    precompute_reference: bool = option(False, "score the data by the reference model once, into --data-cache-path")
    dpo_beta: float = option(0.1, "dpo: weight of the distance from the reference model", above=0)
    dpo_loss_type: Literal["sigmoid", "hinge", "ipo"] = option("sigmoid", "dpo: loss", elsewhere=("pref_loss",))
    dpo_label_smoothing: float = option(0.0, "dpo: probability of a swapped pair (cDPO)", at_least=0, below=0.5)
    dpo_ftx: float = option(0.0, "dpo: weight of chosen answers' mean NLL", at_least=0, aliases=("--pref-ftx",))
    orpo_beta: float = option(0.1, "orpo: weight of the odds ratio", above=0)
    simpo_beta: float = option(2.0, "simpo: scale of the mean log-probability of an answer", above=0)
    simpo_gamma: float = option(0.5, "simpo: margin of the rewards that is aimed at", at_least=0)
    kto_beta: float = option(0.1, "kto: weight of the distance from the reference model", above=0)
    kto_desirable_weight: float = option(1.0, "kto: weight of desirable answers", at_least=0)
    kto_undesirable_weight: float = option(1.0, "kto: weight of undesirable answers", at_least=0)

    rm_center_coefficient: float = option(0.0, "rm: weight of the squared sum of a pair's scores", at_least=0)

    laws = (
        needs("is_pairwise_dataset", stage=_PAIRS),
        needs("dpo_label_smoothing", dpo_loss_type="sigmoid"),
        ignored("ref_model", stage=_REFERRING),
        ignored("precompute_reference", stage=_SCORED),
        ignored("dpo_beta", "dpo_loss_type", "dpo_label_smoothing", "dpo_ftx", stage="dpo"),
        ignored("orpo_beta", stage="orpo"),
        ignored("simpo_beta", "simpo_gamma", stage="simpo"),
        ignored("kto_beta", "kto_desirable_weight", "kto_undesirable_weight", stage="kto"),
        ignored("rm_center_coefficient", stage="rm"),
    )
