"""The options of `cordee quickstart`."""

from dataclasses import dataclass

from cordee.config.option import option


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Quickstart."""

    input: str | None = option(None, "training text: file or directory [Python's standard library]", metavar="PATH")
    output: str = option("quickstart-run", "directory for all results", metavar="DIR")
    nproc_per_node: int = option(2, "training processes (ranks)", above=0)
    train_iters: int | None = option(None, "training iterations [as many as fit in --train-seconds]", above=0)
    train_seconds: float = option(100.0, "training time in seconds", above=0)
    seed: int = option(1234, "random seed of initial weights and sample order", at_least=0, below=2**32)
    overwrite: bool = option(False, "overwrite the results of an earlier quickstart")
