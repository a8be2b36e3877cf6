"""The options of samples and batches, of the data that they come from, and of preprocessing.

Owns their names, types, defaults and help texts, and what each needs of others."""

from dataclasses import dataclass, fields
from typing import Literal

from cordee.config.laws import GIVEN, POSITIVE, Wanted, but, excludes, ignored, needs, required_unless
from cordee.config.option import option, required
from cordee.tokenizer.options import TokenizerOptions


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Batch, gradient accumulation and length of the run."""

    seq_length: int = required("tokens per sample", above=0, elsewhere=("max_seq_length", "block_size", "cutoff_len"))
    micro_batch_size: int = option(
        1,
        "samples of one forward and backward on a data-parallel rank",
        above=0,
        elsewhere=("per_device_train_batch_size", "per_device_eval_batch_size"),
    )
    global_batch_size: int | None = option(
        None,
        "samples per step: micro-batch x data-parallel ranks x gradient accumulation steps [x 1]",
        above=0,
        elsewhere=("gradient_accumulation_steps", "train_batch_size"),
    )
    rampup_batch_size: tuple[int, int, int] | None = option(
        None, "batch size ramp-up, START INCREMENT SAMPLES: over so many samples up to --global-batch-size", above=0
    )
    train_iters: int | None = option(None, "length of the run in optimizer steps", above=0, elsewhere=("max_steps",))
    train_samples: int | None = option(None, "length of the run in samples", above=0)
    num_epochs: float | None = option(
        None,
        "length of the run in passes over the data, rounded up to whole iterations",
        above=0,
        at_most=1_000_000,
        elsewhere=("epochs", "num_train_epochs"),
    )
    seed: int = option(1234, "random seed of initial weights, shuffling and dropout", at_least=0, below=2**32)

    laws = (
        excludes("train_samples", "train_iters"),
        excludes("num_epochs", "train_iters", "train_samples"),
        required_unless("train_iters", train_samples=GIVEN, num_epochs=GIVEN, skip_train=True),
        needs("rampup_batch_size", train_samples=GIVEN),
        needs("rampup_batch_size", global_batch_size=GIVEN),
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data."""

    data_path: tuple[str, ...] = option((), ".bin/.idx prefix, or blend: WEIGHT PREFIX ...; --split divides it in 3")
    train_data_path: tuple[str, ...] = option((), "as --data-path, for training only; --split is then ignored")
    valid_data_path: tuple[str, ...] = option((), "as --data-path, for validation only")
    test_data_path: tuple[str, ...] = option((), "as --data-path, for the final test only")
    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] | None = option(
        None,
        "several prefixes without weights: each by its size, or alike (or by --interleave-probs), an epoch ending when "
        "the first dataset, or the last, is exhausted",
    )
    interleave_probs: tuple[float, ...] = option((), "shares of the datasets that --mix-strategy interleaves", above=0)
    multiple_validation_sets: bool = option(
        False, "report the validation loss of each dataset of the blend too; --valid-data-path may then have no weights"
    )
    split: str = option("969, 30, 1", "proportions of --data-path for training, validation and test", metavar="A,B,C")
    data_cache_path: str | None = option(None, "cache: shuffled orders, tokenized records [beside data]", metavar="DIR")
    dataloader_type: Literal["single", "cyclic"] = option(
        "single", "sampler: single: sequential over the dataset's own shuffled index; cyclic: reshuffled every epoch"
    )
    num_workers: int = option(
        0, "dataloader threads of a process; 0: the main one loads", at_least=0, elsewhere=("dataloader_num_workers",)
    )
    eod_mask_loss: bool = option(False, "loss mask: no loss on the token after an end-of-document (EOD) token")
    reset_position_ids: bool = option(False, "restart position ids at every document of a sample")
    reset_attention_mask: bool = option(False, "block-diagonal mask: documents of a sample do not see each other")

    laws = (
        ignored("split", data_path=GIVEN),
        needs("multiple_validation_sets", eval_iters=POSITIVE),
        needs("interleave_probs", mix_strategy=Wanted("an interleaving one", lambda mix: mix not in (None, "concat"))),
    )


@dataclass(frozen=True, kw_only=True)
class SampleOptions(BatchOptions, DataOptions):
    """What decides which samples a run sees, and when."""


@dataclass(frozen=True, kw_only=True)
class DialogueOptions:
    """Instruction and preference data."""

    handler_name: str | None = option(
        None,
        "what records are: AlpacaStyleInstructionHandler, SharegptStyleInstructionHandler, MessagesHandler and others, "
        "which an unknown name lists [text: GeneralPretrainHandler; train: by the keys of the first record]",
        metavar="NAME",
    )
    map_keys: str | None = option(None, "JSON object: a key of the handler to a key of the records", metavar="JSON")
    prompt_type: str | None = option(
        None, "prompt template: default, chatml, qwen, llama2, llama3, mistral, alpaca, ...", elsewhere=("template",)
    )
    hf_chat_template: bool = option(False, "prompt template: the tokenizer's own Jinja chat template")
    train_on: Literal["assistant", "last", "all"] = option(
        "assistant", "tokens with a label: every answer, the last, or all", synonyms={"target": "assistant"}
    )
    mask_history: bool = option(False, "as --train-on last")
    pack: bool = option(False, "pack several samples into rows of exactly --seq-length tokens", elsewhere=("packing",))
    neat_pack: bool = option(False, "as --pack, with attention and positions per sample", elsewhere=("neat_packing",))
    dataset_dir: str | None = option(None, "LlamaFactoryInstructionHandler: of dataset_info.json [data]", metavar="DIR")
    skip_invalid: bool = option(False, "count and skip records that cannot be used, instead of aborting")

    laws = (
        excludes("prompt_type", "hf_chat_template"),
        excludes("pack", "neat_pack"),
        excludes("train_on", "mask_history"),
    )


@dataclass(frozen=True, kw_only=True)
class TuningDataOptions(DialogueOptions):
    """Instruction and preference data."""

    variable_seq_lengths: bool = option(False, "pad to the longest of each micro-batch", aliases=("--dynamic-padding",))
    pad_to_multiple_of: int = option(8, "with --variable-seq-lengths: lengths are multiples of this", above=0)

    laws = (
        ignored("pad_to_multiple_of", variable_seq_lengths=True),
        ignored(*(each.name for each in fields(DialogueOptions)), "variable_seq_lengths", stage=but("pretrain")),
    )


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Input and output."""

    input: str | None = option(
        None,
        "file or directory with its subfolders: json, jsonl, csv, txt, parquet, arrow, documents of at most 16 MiB; "
        "to merge: directory of .bin/.idx",
        metavar="PATH",
    )
    output_prefix: str = required("writes PREFIX_KEY_document.bin and .idx", metavar="PREFIX")
    whole_files: bool = option(False, "take a .txt file as one document, not every line as one")
    hf_datasets_params: str | None = option(None, "instead of --input: JSON for datasets.load_dataset", metavar="FILE")
    streaming: bool = option(False, "with --hf-datasets-params: stream, do not download; local files always stream")
    json_keys: tuple[str, ...] = option(("text",), "fields to tokenize, a .bin/.idx pair each", aliases=("--json-key",))
    kto: bool = option(False, "samples for --stage kto: with the flag kto_tag or label of the record, pairs as two")
    append_eod: bool = option(False, "append the tokenizer's end-of-document (EOD) token to every document")
    seq_length: int | None = option(None, "skip documents of this many tokens or more; instructions: of more", above=0)
    cut_long: bool = option(False, "instruction data: cut prompts and answers to --seq-length in proportion, skip none")
    workers: int = option(1, "tokenizer processes; the output does not depend on their number", above=0)
    n_subs: int = option(1, "multiplies --workers: number of parts that are tokenized in parallel", above=0)
    merge_group_keys: tuple[str, ...] = option((), "merge pairs of --input with the key in their name into PREFIX_KEY")
    overwrite: bool = option(False, "overwrite existing output")
    log_interval: int = option(100, "documents between progress lines", above=0)

    laws = (
        required_unless("input", hf_datasets_params=GIVEN, merge_group_keys=GIVEN),
        needs("merge_group_keys", "whole_files", input=GIVEN),
        excludes("whole_files", "merge_group_keys", "hf_datasets_params", mutual=False),
        needs("pack", "neat_pack", "cut_long", seq_length=GIVEN),
        needs("prompt_type", "hf_chat_template", "map_keys", "train_on", "mask_history", "kto", handler_name=GIVEN),
        needs("dataset_dir", handler_name="LlamaFactoryInstructionHandler"),
    )


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(PreprocessOptions, DialogueOptions, TokenizerOptions):
    """Text, instructions or preferences to .bin/.idx."""


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """What is shown."""

    prefix: str = required("prefix of a .bin/.idx pair", positional=True, metavar="PREFIX")
    num: int = option(3, "sequences to show, decoded if a tokenizer is given", at_least=0)
    start: int = option(0, "first sequence to show", at_least=0)


@dataclass(frozen=True, kw_only=True)
class ShowDataConfig(ShowOptions, TokenizerOptions):
    """What is in a .bin/.idx pair."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """What is shown."""

    data: str = required("`cordee preprocess` prefix, or file or directory of records", positional=True, metavar="DATA")
    seq_length: int = option(2048, "sequence length of the run: tokens per sample", above=0)
    num: int = option(3, "samples to show", at_least=0)
    start: int = option(0, "first sample to show", at_least=0)
    html: str | None = option(None, "write the page to this file too", metavar="FILE")
    data_cache_path: str | None = option(None, "cache directory of tokenized records [beside the data]", metavar="DIR")
    reset_position_ids: bool = option(False, "as for training")
    reset_attention_mask: bool = option(False, "as for training")


@dataclass(frozen=True, kw_only=True)
class InspectConfig(InspectOptions, DialogueOptions, TokenizerOptions):
    """What a model will see of data for tuning, and what is wrong with it."""
