"""The options of checkpoints."""

from dataclasses import dataclass

from cordee.config.laws import GIVEN, POSITIVE, needs
from cordee.config.option import option


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Checkpoints."""

    save: str | None = option(None, "checkpoint directory or fsspec URL", metavar="DIR|URL", elsewhere=("output_dir",))
    save_interval: int | None = option(
        None, "iterations between checkpoints; the last is always saved [only that]", above=0, elsewhere=("save_steps",)
    )
    keep_last: int | None = option(None, "newest checkpoints to keep [all]", above=0, elsewhere=("save_total_limit",))
    save_best: bool = option(False, "also save the best checkpoint by validation loss; --keep-last never removes it")
    async_save: bool = option(True, "asynchronous checkpoints: write in the background while training continues")
    save_optim: bool = option(True, "save optimizer state; a run cannot resume exactly without it")
    load: str | None = option(
        None,
        "checkpoint directory or URL to resume from, or weights to start from, of any format that cordee convert "
        "reads (Hugging Face, Megatron, GGUF, ...)",
        metavar="DIR|URL|FILE",
        elsewhere=("model_name_or_path", "resume_from_checkpoint"),
    )
    ckpt_step: int | None = option(None, "iteration to load [last good one; Megatron's: its tracker file]", at_least=0)
    finetune: bool = option(False, "load only the weights of --load, start at iteration 0")
    load_optim: bool = option(True, "resume the optimizer state of --load")
    load_rng: bool = option(True, "resume the random number generator (RNG) state of --load")
    exit_on_missing_checkpoint: bool = option(False, "exit if --load is --save and has no checkpoint; else start anew")

    laws = (
        needs("save_interval", "keep_last", "save_best", save=GIVEN),
        needs("save_best", eval_iters=POSITIVE),
        needs("ckpt_step", "finetune", "exit_on_missing_checkpoint", load=GIVEN),
    )
