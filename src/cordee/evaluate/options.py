"""The options of `cordee evaluate`."""

from dataclasses import dataclass

from cordee.config.laws import at_most, required_unless
from cordee.config.option import option
from cordee.generate.options import InferenceConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Evaluation."""

    task: tuple[str, ...] = option(("perplexity",), "benchmark tasks to run: perplexity")
    task_data_path: tuple[str, ...] = option((), "text files or .bin/.idx prefixes, or a directory with its subfolders")
    json_keys: tuple[str, ...] = option(("text",), "fields with text, each its own document", aliases=("--json-key",))
    whole_files: bool = option(False, "take a .txt file as one document, not every line as one")
    seq_length: int | None = option(None, "context window in tokens [the model's max-position-embeddings]", above=0)
    stride: int | None = option(None, "sliding window perplexity: tokens between windows [the window]", above=0)
    prepend_bos: bool = option(True, "prepend the tokenizer's BOS token to every document, if it has one")
    evaluation_batch_size: int = option(
        8, "sequences scored in one batch", above=0, elsewhere=("per_device_eval_batch_size", "eval_batch_size")
    )
    max_eval_samples: int | None = option(None, "evaluate only the first documents [all]", above=0)
    skip_invalid: bool = option(False, "count and skip records that cannot be read, instead of aborting")
    output: str | None = option(None, "results as JSON, too; if interrupted, resumes from FILE.partial", metavar="FILE")

    laws = (required_unless("task_data_path"), at_most("stride", other="seq_length"))


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(InferenceConfig, EvaluateOptions):
    """Scores of a model."""

    nproc_per_node: int | None = option(None, "processes, data-parallel over copies of the model [one copy]", above=0)
