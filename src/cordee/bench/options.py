"""The options of `cordee bench`."""

from dataclasses import dataclass
from typing import Literal

from cordee.config.option import option, required


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Measurement."""

    steps: int | None = option(None, "measured steps (tokens, files) per round [enough for a steady median]", above=0)
    rounds: int = option(5, "rounds of interleaved measurement of all peers; suites without peers run one", above=0)
    threads: int | None = option(None, "CPU threads [all cores]", above=0)
    compile: Literal["none", "blocks", "model"] = option(
        "none", "train: torch.compile of each transformer layer (blocks) or of the whole model"
    )
    load: str | None = option(
        None,
        "generate, lora: model directory [a random Llama of 35 M parameters]; rl: one that writes English; "
        "sft: file of Alpaca's records [made]",
        metavar="PATH",
    )
    model: str | None = option(None, "convert: preset whose shapes the checkpoint has [llama2-13b]", metavar="PRESET")
    scratch: str | None = option(
        None, "convert: directory with room for the checkpoint [temporary directory]", metavar="DIR"
    )
    discard: bool = option(False, "convert: free the disk space of written output at once")
    output: str | None = option(None, "also write the report: Markdown to a .md, else JSON", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class BenchConfig(BenchOptions):
    """Speed and memory against peers."""

    suite: Literal["train", "generate", "preprocess", "convert", "parity", "resume", "sft", "lora", "rl"] = required(
        "what to measure", positional=True
    )
