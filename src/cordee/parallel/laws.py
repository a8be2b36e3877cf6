"""The laws of layouts: one for each technique, all of one signature, without torch.

Owns the laws between model, degrees and options. Those between degrees are `degrees.py`'s, those of pipelines
`pipeline/check.py`'s; laws between the options of a technique are declared with these (options.py)."""

from collections.abc import Sequence
from dataclasses import dataclass

from cordee.errors import Problem, Problems, at_most, divides, divisible, requires
from cordee.model import shards
from cordee.model.config import ModelConfig
from cordee.parallel.degrees import Degrees, ulysses_ranks
from cordee.parallel.options import LayoutOptions

TENSOR, CONTEXT, EXPERT = "--tensor-model-parallel-size", "--context-parallel-size", "--expert-model-parallel-size"
ULYSSES = "--ulysses-degree-in-cp"
# The options that the numbers of a model follow from.
MODEL = ("model", "load")
HEADS = (*MODEL, "num_attention_heads", "num_query_groups", "group_query_attention")
WIDTHS = (*MODEL, "ffn_hidden_size", "hidden_size", "moe_intermediate_size", "n_shared_experts")
_ALGORITHM = ("context_parallel_size", "context_parallel_algo")


@dataclass(frozen=True, kw_only=True)
class PlacedRun:
    """The subject of laws. `model` is None where it is not known; `micro_batches`: how many each kind of step has."""

    model: ModelConfig | None
    degrees: Degrees
    options: LayoutOptions
    micro_batches: Sequence[int] = (1,)


def check(run: PlacedRun) -> Problems:
    """What keeps the degrees of a run from fitting its model."""
    for law in (tensor, overlap, context, expert):
        yield from law(run)


def tensor(run: PlacedRun) -> Problems:
    """Tensor-parallel ranks shard heads, widths and the vocabulary; with sequence parallelism the tokens too."""
    size, tokens = run.degrees.tp, run.options.seq_length // run.degrees.cp
    if size == 1:
        given, why = run.options.sequence_parallel or None, f"{TENSOR} is 1"
        yield from requires("--sequence-parallel", given, f"{TENSOR} 2 or more", why, "tensor_model_parallel_size")
        return
    if run.model is not None:
        yield from sharded(run.model, size)
    if run.options.sequence_parallel and tokens % size:
        why = f"the {tokens} tokens of a rank are not divisible by {size} tensor-parallel ranks"
        involved = ("seq_length", "tensor_model_parallel_size", "context_parallel_size")
        yield Problem("--sequence-parallel", True, why, f"take a multiple of {size}", "divisible", involved, size)


def sharded(model: ModelConfig, size: int) -> Problems:
    """What keeps `size` tensor-parallel ranks from sharding the parameters of `model`."""
    for heads in shards.num_heads(model):
        yield from divides(TENSOR, size, heads, "attention heads", *HEADS)
    for width in shards.mlp_widths(model):
        yield from divides(TENSOR, size, width, "channels of the MLP", *WIDTHS)
    if shards.part_of(model.vocab_size, size - 1, size)[0] >= model.vocab_size:
        why = f"one of the ranks would get none of {model.vocab_size} tokens"
        yield Problem(TENSOR, size, why, "lower it", "at most", (*MODEL, "vocab_size"), model.vocab_size)
    for attention in shards.attentions(model):
        groups, norm = attention.num_kv_heads, attention.qk_norm
        if groups % size == 0 or attention.num_heads % size:
            continue
        if size % groups:
            why = f"{groups} key and value heads can be neither sharded nor repeated evenly"
            yield Problem(TENSOR, size, why, f"give a divisor or a multiple of {groups}", "divides", HEADS, groups)
        elif norm is not None and norm.over == "all":
            yield from divides(TENSOR, size, groups, "key heads, which the norm over all keys needs sharded,", *HEADS)


def overlap(run: PlacedRun) -> Problems:
    """GEMMs that are cut into parts, overlapped with their collectives, have no low-rank adapters beside them."""
    adapted = run.model.adapted() if run.model is not None and run.options.tp_comm_overlap else ()
    if names := dict.fromkeys(name for path, name, _ in adapted if path.startswith("layers.")):
        why = f"low-rank adapters (low_rank: {', '.join(names)}) need the whole input or output of a block"
        fix = "leave it out, or train without adapters"
        yield Problem("--tp-comm-overlap", True, why, fix, "excludes", ("low_rank",))


def context(run: PlacedRun) -> Problems:
    """Context-parallel ranks shard the tokens of each sequence: Ulysses by heads, a ring into equal parts."""
    size, options = run.options.context_parallel_size, run.options
    if size == 1:
        return
    if run.model is not None and (prefix := run.model.num_prefix_tokens):
        why = f"every rank would attend to the prefix of {prefix} tokens (num_prefix_tokens) by itself"
        yield Problem(CONTEXT, size, why, "leave it out, or train without a prefix", "excludes", ("num_prefix_tokens",))
    algorithm, degree = options.context_parallel_algo, options.ulysses_degree_in_cp
    if algorithm != "hybrid_cp_algo":
        needed = "--context-parallel-algo hybrid_cp_algo"
        yield from requires(ULYSSES, degree, needed, f"{algorithm} has none", *_ALGORITHM)
    elif degree is None:
        yield Problem(ULYSSES, None, "hybrid_cp_algo needs it", f"give a divisor of {size}", "missing", _ALGORITHM)
    elif degree == size:
        why = f"half of the {size} context-parallel ranks, so that no ring is left"
        yield from at_most(ULYSSES, degree, size // 2, why, *_ALGORITHM)
    ulysses = ulysses_ranks(options)
    if size % ulysses == 0:
        yield from _ring(options, size // ulysses)
        yield from _heads(run.model, options, ulysses)


def _ring(options: LayoutOptions, ring: int) -> Problems:
    size, window, option = options.context_parallel_size, options.cp_window_size, "--cp-window-size"
    involved = (*_ALGORITHM, "ulysses_degree_in_cp")
    if ring == 1 and window > 1:
        yield from requires(option, window, "--context-parallel-algo megatron_cp_algo", "there is no ring", *involved)
    elif ring > 1:
        yield from divides(option, window, ring, "ranks of the ring", *involved)
        if window == ring:
            fix = f"give a divisor of {ring} below it; 1 is one plain ring"
            yield Problem(option, window, f"it is the whole ring of {ring} ranks", fix, "at most", involved, ring - 1)
    halves = ring > 1 and options.cp_attention_mask_type == "causal"
    what = f"{size} context-parallel ranks{' x 2 equal chunks of each' if halves else ''}"
    parts = 2 * size if halves else size
    yield from divisible("--seq-length", options.seq_length, parts, what, *involved, "cp_attention_mask_type")


def _heads(model: ModelConfig | None, options: LayoutOptions, ulysses: int) -> Problems:
    tensor, given = options.tensor_model_parallel_size, options.ulysses_degree_in_cp
    option = ULYSSES if given else CONTEXT
    for heads in shards.num_heads(model) if model is not None and ulysses > 1 else ():
        if heads % (ulysses * tensor):
            why = f"{heads} heads are not divisible by {ulysses} ranks of Ulysses x {tensor} tensor-parallel ranks"
            fix = "lower it, or take megatron_cp_algo, which shards no heads"
            involved = (*_ALGORITHM, "tensor_model_parallel_size", "ulysses_degree_in_cp", *HEADS)
            yield Problem(option, ulysses, why, fix, "divides", involved, heads)


def expert(run: PlacedRun) -> Problems:
    """Expert-parallel ranks shard the experts."""
    if run.model is not None:
        yield from shards.expert_problems(EXPERT, run.degrees.ep, run.model, *MODEL, "num_experts")
