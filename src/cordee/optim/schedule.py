"""Learning rate and weight decay as functions of one number.

Owns warmup, decay and the schedule of the weight decay. The number is the position of the run, counted in samples:
those of all steps that changed the parameters so far. Nothing is stored, so a resumed run cannot disagree with an
uninterrupted one. Knows no optimizer."""

import math
from dataclasses import asdict, dataclass
from typing import Literal

from cordee.errors import Problem, Problems, at_most
from cordee.log import counted
from cordee.optim.options import OptimizerOptions


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warmup from `init_lr` to `max_lr`, then a decay to `min_lr` that ends at position `decay`.

    `warmup`, `decay` and `growth` are positions in samples; `warmup` may be a fraction of a sample. Styles are those
    of Megatron: "constant", "linear", "cosine" and, for the rate, "inverse-square-root" and "WSD", which stays at
    `max_lr` until the last `anneal` samples before `decay` and decays by `anneal_style`. The weight decay goes from
    `start_weight_decay` at 0 to `end_weight_decay` at `growth`."""

    max_lr: float
    min_lr: float = 0.0
    init_lr: float = 0.0
    warmup: float = 0
    decay: int
    style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    anneal: int = 0
    anneal_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    start_weight_decay: float = 0.0
    end_weight_decay: float = 0.0
    growth: int
    growth_style: Literal["constant", "linear", "cosine"] = "constant"

    def effective(self) -> dict[str, float | str]:
        """The fields that make a difference: two schedules with equal ones are the same."""
        values = asdict(self)
        if self.style == "constant":
            del values["decay"], values["min_lr"]
        if self.style != "WSD":
            del values["anneal"], values["anneal_style"]
        if self.warmup <= 0:
            del values["init_lr"]
        if self.growth_style == "constant":
            del values["growth"], values["start_weight_decay"]
        return values

    def learning_rate(self, position: int) -> float:
        """Rate of the step taken at `position`."""
        high, low = self.max_lr, self.min_lr
        if self.warmup > 0 and position <= self.warmup:
            return self.init_lr + (high - self.init_lr) * position / self.warmup
        if self.style == "constant":
            return high
        if position > self.decay:
            return low
        if self.style == "inverse-square-root":
            return max(low, high * math.sqrt(max(self.warmup, 1)) / math.sqrt(max(position, 1)))
        wsd = self.style == "WSD"
        begin, form = (self.decay - self.anneal, self.anneal_style) if wsd else (self.warmup, self.style)
        left = 1.0 if position <= begin else _left(form, (position - begin) / (self.decay - begin))
        return low + left * (high - low)

    def weight_decay(self, position: int) -> float:
        """Weight decay of the step taken at `position`."""
        if self.growth_style == "constant" or position > self.growth:
            return self.end_weight_decay
        done = position / self.growth
        part = done if self.growth_style == "linear" else 0.5 * (1.0 - math.cos(math.pi * done))
        return self.start_weight_decay + part * (self.end_weight_decay - self.start_weight_decay)


def _left(form: str, done: float) -> float:
    """What is left of a decay of which the fraction `done` is over: from 1 to 0."""
    match form:
        case "linear":
            return 1.0 - done
        case "exponential":
            return 2.0 * 0.5**done - 1.0
        case "minus_sqrt":
            return 1.0 - math.sqrt(done)
    return 0.5 * (1.0 + math.cos(math.pi * done))


def build_schedule(
    options: OptimizerOptions, train_iters: int | None, train_samples: int | None, global_batch_size: int
) -> Schedule:
    """The schedule of a run of this length; lengths in steps become samples by `global_batch_size`."""
    if train_samples is not None:
        length = train_samples
        decay = options.lr_decay_samples or length
        warmup, anneal = options.lr_warmup_samples, options.lr_wsd_decay_samples or 0
    else:
        length = (train_iters or 1) * global_batch_size
        decay = (options.lr_decay_iters or train_iters or 1) * global_batch_size
        warmup = options.lr_warmup_iters * global_batch_size
        anneal = (options.lr_wsd_decay_iters or 0) * global_batch_size
    if options.lr_warmup_fraction is not None:
        warmup = options.lr_warmup_fraction * decay
    constant = options.weight_decay_incr_style == "constant"
    start, end = options.start_weight_decay, options.end_weight_decay
    return Schedule(
        max_lr=options.lr,
        min_lr=options.min_lr,
        init_lr=options.lr_warmup_init,
        warmup=warmup,
        decay=decay,
        style=options.lr_decay_style,
        anneal=anneal,
        anneal_style=options.lr_wsd_decay_style,
        start_weight_decay=options.weight_decay if constant or start is None else start,
        end_weight_decay=options.weight_decay if constant or end is None else end,
        growth=length,
        growth_style=options.weight_decay_incr_style,
    )


def problems(options: OptimizerOptions, train_iters: int | None, train_samples: int | None) -> Problems:
    """A warm-up must end before the schedule does, and before the decay phase of WSD begins, which has to be given."""
    of_iterations, of_samples = ("iters", "iteration", train_iters), ("samples", "sample", train_samples)
    unit, what, whole = of_iterations if train_samples is None else of_samples
    warmup, length = getattr(options, f"lr_warmup_{unit}"), getattr(options, f"lr_decay_{unit}") or whole
    if warmup and length and warmup >= length and options.lr_warmup_fraction is None:
        why = f"the learning rate schedule ends after {counted(length, what)}"
        involved = (f"lr_decay_{unit}", f"train_{unit}")
        yield Problem(f"--lr-warmup-{unit}", warmup, why, f"give less than {length}", "at most", involved, length)
    if options.lr_decay_style != "WSD":
        return
    option, anneal = f"--lr-wsd-decay-{unit}", getattr(options, f"lr_wsd_decay_{unit}")
    if anneal is None:
        why, fix = "WSD has no default for the length of its decay phase", "give it, or another --lr-decay-style"
        yield Problem(option, None, why, fix, "missing", ("lr_decay_style", "train_samples"))
    elif length:
        begins = warmup if options.lr_warmup_fraction is None else options.lr_warmup_fraction * length
        warm_up = (f"lr_warmup_{unit}", "lr_warmup_fraction", "model")  # a preset's recipe sets the fraction
        involved = (f"lr_decay_{unit}", f"train_{unit}", *warm_up, "lr_decay_style")
        rest = f"the {counted(length, what)} of the learning rate schedule less its warm-up"
        yield from at_most(option, anneal, max(0, int(length - begins)), rest, *involved)
