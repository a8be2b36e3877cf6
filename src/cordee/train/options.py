"""The options of a training run, and of its check.

Owns how they are made of those of its parts, and those that belong to none."""

from dataclasses import dataclass

from cordee.checkpoint.options import CheckpointOptions
from cordee.config.laws import GIVEN, POSITIVE, at_most, ignored, needs
from cordee.config.option import option
from cordee.data.options import BatchOptions, DataOptions, SampleOptions, TuningDataOptions
from cordee.model.options import ExpertTrainingOptions, ModelOptions, PortedOptions
from cordee.optim.options import OptimizerOptions, PrecisionOptions
from cordee.parallel.options import CompileOptions, LayoutOptions, ParallelOptions
from cordee.tokenizer.options import TokenizerOptions
from cordee.train.objectives import ObjectiveOptions
from cordee.train.preference_options import PreferenceOptions
from cordee.tune.options import LoRAOptions


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Validation."""

    eval_interval: int = option(1000, "iterations between validations", above=0, elsewhere=("eval_steps",))
    eval_iters: int = option(100, "global batches per validation; 0: no validation", at_least=0)
    eval_on_start: bool = option(False, "validate before the first iteration too, which is only reported")
    skip_train: bool = option(False, "skip training, only validate and test")

    laws = (ignored("eval_interval", eval_iters=POSITIVE), needs("eval_on_start", "skip_train", eval_iters=POSITIVE))


@dataclass(frozen=True, kw_only=True)
class ExitOptions:
    """Exit: each way saves a checkpoint first."""

    exit_interval: int | None = option(None, "save and exit at an iteration that is divisible by this", above=0)
    exit_duration_in_mins: float | None = option(None, "save and exit after this many minutes", above=0)
    early_stopping_patience: int | None = option(
        None, "early stopping: exit after this many validations in a row without improvement of the loss", above=0
    )
    early_stopping_threshold: float = option(
        0.0, "early stopping: an improvement is a loss lower than the best before by more than this", at_least=0
    )
    exit_signal_handler: bool = option(True, "on SIGTERM or Ctrl-C, finish the iteration, save a checkpoint and exit")
    exit_grace_seconds: float = option(120.0, "seconds from SIGTERM to SIGKILL of a rank's process", at_least=0)

    laws = (
        needs("early_stopping_patience", eval_iters=POSITIVE),
        needs("early_stopping_threshold", early_stopping_patience=GIVEN),
    )


@dataclass(frozen=True, kw_only=True)
class LoggingOptions:
    """Logging."""

    log_interval: int = option(10, "iterations between log lines", above=0, elsewhere=("logging_steps",))
    log_throughput: bool = option(True, "log TFLOP/s per device (model FLOPs: recompute does not count)")
    log_params_norm: bool = option(False, "log the L2 norm of all parameters")
    log_num_zeros_in_grad: bool = option(False, "log the number of zeros in the gradients")
    tensorboard_dir: str | None = option(
        None, "write TensorBoard events to this directory", metavar="DIR", elsewhere=("logging_dir",)
    )
    tensorboard_log_interval: int = option(1, "iterations between TensorBoard and W&B values", above=0)
    wandb_project: str | None = option(None, 'log to this Weights & Biases (W&B) project; needs "cordee[wandb]"')
    wandb_exp_name: str | None = option(None, "name of the W&B run [one that W&B makes up]", elsewhere=("run_name",))
    wandb_save_dir: str | None = option(
        None, "local directory of W&B, which makes wandb/ there [--save, or where the command runs]", metavar="DIR"
    )
    metrics_file: str | None = option(None, "one JSON line per log line [metrics.jsonl in --save]", metavar="FILE")
    peak_tflops: float | None = option(
        None, "peak TFLOP/s of a device, for MFU [known for the device, or measured]", above=0
    )

    laws = (
        ignored("tensorboard_log_interval", tensorboard_dir=GIVEN, wandb_project=GIVEN),
        ignored("wandb_exp_name", "wandb_save_dir", wandb_project=GIVEN),
    )


@dataclass(frozen=True, kw_only=True)
class PerformanceOptions:
    """Performance."""

    manual_gc: bool = option(False, "run Python's garbage collector on all ranks at the same iterations only")
    manual_gc_interval: int = option(0, "--manual-gc: iterations between collections; 0: at validations", at_least=0)
    use_deter_comp: bool = option(
        False, "deterministic kernels only: two runs are bit-identical", aliases=("--deterministic-mode",)
    )

    laws = (needs("manual_gc_interval", manual_gc=True),)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    ModelOptions,
    ExpertTrainingOptions,
    TokenizerOptions,
    SampleOptions,
    LayoutOptions,
    BatchOptions,
    ObjectiveOptions,
    DataOptions,
    TuningDataOptions,
    PreferenceOptions,
    LoRAOptions,
    OptimizerOptions,
    PrecisionOptions,
    ParallelOptions,
    CheckpointOptions,
    ValidationOptions,
    ExitOptions,
    LoggingOptions,
    CompileOptions,
    PerformanceOptions,
    PortedOptions,
):
    """A training run."""

    laws = (at_most("seq_length", other="max_position_embeddings"),)


@dataclass(frozen=True, kw_only=True)
class CheckConfig(TrainConfig):
    """A training run that is only checked."""

    world_size: int | None = option(
        None, "processes of all nodes, for a run on other machines than this [as train would start here]", above=0
    )
