"""The loss scale that keeps small fp16 gradients from vanishing.

Owns the scale and the rule that moves it (Micikevicius et al. 2018, with Megatron's hysteresis). After each step it is
given whether a gradient overflowed; it knows neither gradients nor devices."""

from dataclasses import dataclass

from cordee.optim.options import PrecisionOptions


@dataclass(kw_only=True)
class LossScaler:
    """Static: `dynamic` False. Dynamic: the scale doubles after `window` good steps in a row and, once `hysteresis`
    overflows came without such a window between them, halves with each further one, never below `minimum`."""

    scale: float = 1.0
    dynamic: bool = False
    minimum: float = 1.0
    window: int = 1000
    hysteresis: int = 2
    good_steps: int = 0
    overflows: int = 0

    def update(self, overflow: bool) -> None:
        """Take note of a step; one with an overflow was skipped."""
        if not self.dynamic:
            return
        if overflow:
            self.good_steps = 0
            self.overflows += 1
            if self.overflows >= self.hysteresis:
                self.scale = max(self.scale / 2, self.minimum)
            return
        self.good_steps += 1
        if self.good_steps == self.window:
            self.good_steps = self.overflows = 0
            self.scale *= 2

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps; the rule itself comes from the options of the run that resumes."""
        return {"scale": self.scale, "good_steps": self.good_steps, "overflows": self.overflows}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Resume from `state`; a static scale keeps its own value."""
        if self.dynamic:
            self.scale = float(state["scale"])
            self.good_steps = int(state["good_steps"])
            self.overflows = int(state["overflows"])


def build_scaler(options: PrecisionOptions) -> LossScaler:
    """The scaler of a run: a fixed scale of 1 unless it computes in fp16."""
    if not options.fp16:
        return LossScaler()
    if options.loss_scale is not None:
        return LossScaler(scale=options.loss_scale)
    return LossScaler(
        scale=options.initial_loss_scale,
        dynamic=True,
        minimum=options.min_loss_scale,
        window=options.loss_scale_window,
        hysteresis=options.hysteresis,
    )
