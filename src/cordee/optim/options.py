"""The options of optimizers, schedules and mixed precision.

Owns their names, types, defaults and help texts, and what each needs of others."""

from dataclasses import dataclass
from typing import Literal

from cordee.config.laws import GIVEN, NOT_GIVEN, POSITIVE, at_most, but, excludes, ignored, needs, required_unless
from cordee.config.option import option, required


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer and learning rate schedule."""

    optimizer: str = option(
        "adam", "adam: AdamW, fused if the device can; fused_adam, foreach_adam: that one; sgd", elsewhere=("optim",)
    )
    lr: float = required("peak learning rate", above=0, elsewhere=("learning_rate",))
    min_lr: float = option(0.0, "learning rate at the end of the decay", at_least=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = option(
        "linear", "learning rate schedule after warm-up; WSD: warm-up, stable, decay", elsewhere=("lr_scheduler_type",)
    )
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = option(
        "exponential", "WSD: form of the decay phase"
    )
    lr_wsd_decay_iters: int | None = option(
        None, "WSD: length of the decay phase, which is the end of --lr-decay-iters", above=0
    )
    lr_wsd_decay_samples: int | None = option(None, "WSD: as --lr-wsd-decay-iters, with --train-samples", above=0)
    lr_decay_iters: int | None = option(None, "decay length: iterations until --min-lr [the whole run]", above=0)
    lr_decay_samples: int | None = option(None, "decay length in samples, with --train-samples [whole run]", above=0)
    lr_warmup_fraction: float | None = option(
        None, "linear warm-up / decay length", at_least=0, at_most=1, elsewhere=("warmup_ratio",)
    )
    lr_warmup_iters: int = option(0, "linear warm-up in iterations", at_least=0, elsewhere=("warmup_steps",))
    lr_warmup_samples: int = option(0, "linear warm-up in samples, for runs with --train-samples", at_least=0)
    lr_warmup_init: float = option(0.0, "learning rate at the start of warm-up", at_least=0)
    weight_decay: float = option(0.01, "decoupled weight decay; biases and norm weights are not decayed", at_least=0)
    start_weight_decay: float | None = option(
        None, "weight decay at the start of the run, if --weight-decay-incr-style is not constant", at_least=0
    )
    end_weight_decay: float | None = option(
        None, "weight decay at the end of the run, if --weight-decay-incr-style is not constant", at_least=0
    )
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = option("constant", "weight decay schedule")
    clip_grad: float = option(
        1.0, "gradient clipping: maximum global L2 norm; 0: none", at_least=0, elsewhere=("max_grad_norm",)
    )
    adam_beta1: float = option(0.9, "first-moment decay (Adam beta1), of the mean of gradients", at_least=0, below=1)
    adam_beta2: float = option(0.999, "second-moment decay (Adam beta2), of squared gradients", at_least=0, below=1)
    adam_eps: float = option(1e-8, "Adam epsilon, added to the denominator", above=0, elsewhere=("adam_epsilon",))
    sgd_momentum: float = option(0.9, "SGD momentum factor", at_least=0)
    override_opt_param_scheduler: bool = option(
        False,
        "on resume, take learning rate and weight decay schedules from the options, not the checkpoint",
        aliases=("--override-opt_param-scheduler", "--override-lr-scheduler"),
    )
    use_checkpoint_opt_param_scheduler: bool = option(
        False,
        "on resume, take them from the checkpoint, whatever the options say",
        aliases=("--use-checkpoint-opt_param-scheduler", "--use-checkpoint-lr-scheduler"),
    )

    laws = (
        at_most("min_lr", "lr_warmup_init", other="lr"),
        needs("lr_decay_samples", "lr_wsd_decay_samples", "lr_warmup_samples", train_samples=GIVEN),
        excludes("lr_decay_iters", "train_samples", mutual=False),
        excludes("lr_wsd_decay_iters", "train_samples", mutual=False),
        ignored("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples", lr_decay_style="WSD"),
        excludes("lr_warmup_iters", "train_samples", mutual=False),
        excludes("lr_warmup_iters", "lr_warmup_fraction"),
        excludes("lr_warmup_samples", "lr_warmup_fraction"),
        required_unless("start_weight_decay", "end_weight_decay", weight_decay_incr_style="constant"),
        needs("start_weight_decay", "end_weight_decay", weight_decay_incr_style=but("constant")),
        at_most("start_weight_decay", other="end_weight_decay"),
        excludes("use_checkpoint_opt_param_scheduler", "override_opt_param_scheduler"),
        ignored("min_lr", lr_decay_style=but("constant")),
        ignored("lr_decay_iters", "lr_decay_samples", lr_decay_style=but("constant"), lr_warmup_fraction=GIVEN),
        ignored("lr_warmup_init", lr_warmup_iters=POSITIVE, lr_warmup_samples=POSITIVE, lr_warmup_fraction=POSITIVE),
        ignored("adam_beta1", "adam_beta2", "adam_eps", optimizer=but("sgd")),
        ignored("sgd_momentum", optimizer="sgd"),
    )


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """Precision: master weights and optimizer state are always float32."""

    fp16: bool = option(False, "mixed precision: compute in float16, with loss scaling")
    bf16: bool = option(False, "mixed precision: compute in bfloat16")
    accumulate_allreduce_grads_in_fp32: bool = option(
        True, "all-reduce and reduce-scatter gradients in float32, not in the compute dtype"
    )
    loss_scale: float | None = option(None, "fp16: static loss scale [dynamic loss scaling]", above=0)
    initial_loss_scale: float = option(2.0**32, "fp16: initial dynamic loss scale", above=0)
    min_loss_scale: float = option(1.0, "fp16: minimum dynamic loss scale", above=0)
    loss_scale_window: int = option(1000, "fp16: steps without overflow before the loss scale doubles", above=0)
    hysteresis: int = option(2, "fp16: overflow steps (inf or NaN gradients) before the loss scale halves", above=0)

    laws = (
        excludes("fp16", "bf16"),
        needs("loss_scale", fp16=True),
        at_most("min_loss_scale", other="initial_loss_scale"),
        ignored("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis", fp16=True),
        ignored("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis", loss_scale=NOT_GIVEN),
        ignored("accumulate_allreduce_grads_in_fp32", fp16=True, bf16=True),
    )
