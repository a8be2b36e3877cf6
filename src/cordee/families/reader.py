"""Strict reading of a Hugging Face `config.json`.

Owns its problems: missing keys, wrong types, contradicting values, and keys that change the mathematics in a way the
family does not implement. All are collected and reported at once. Knows no family."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cordee.errors import Problem, ProblemError, raise_all
from cordee.files import read_json
from cordee.model.config import MAX_LAYERS, too_large

T = TypeVar("T")
REQUIRED = object()
_MANY = 1e30  # larger numbers are no hyperparameters

# Keys that count layers, of which families make lists: a limit has to hold before a `ModelConfig` can check it.
LAYER_COUNTS = ("n_layer", "num_hidden_layers", "num_layers", "num_nextn_predict_layers")

# Keys that change what a model computes, with the values, besides null, at which they change nothing. A family that
# implements one reads it; for the others any further value is a problem, never a silently different model.
MATHEMATICAL: dict[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "multi_query_attention": (True,),
    "moe_intermediate_size": (),
    "n_routed_experts": (0,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "original_rope": (True,),
    "parallel_attn": (False,),
    "partial_rotary_factor": (1,),
    "post_layer_norm": (True,),
    "pre_seq_len": (),
    "prefix_lm": (False,),
    "qk_layernorm": (False,),
    "quantization_bit": (0,),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rmsnorm": (True,),
    "rope_interleave": (True,),
    "rope_ratio": (1,),
    "router_jitter_noise": (0,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "scale_depth": (),
    "scale_emb": (1,),
    "sliding_window": (),
    "swiglu_alpha": (1.702,),
    "swiglu_limit": (),
    "use_bidirectional_attention": (False,),
    "use_cache_quantization": (False,),
    "use_qk_norm": (False,),
    "z_loss_weight": (0,),
}

# Keys that change neither weights nor logits: names, token ids, outputs, generation, implementation choices.
IRRELEVANT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _from_model_config _name_or_path
    apply_query_key_layer_scaling architectures attention_softmax_in_fp32 attn_implementation auto_map bf16
    bias_dropout_fusion bos_token_id cache_implementation chunk_size_feed_forward decoder_start_token_id do_sample
    dtype eos_token_id finetuning_task fp16 fp32 id2label is_decoder label2id masked_softmax_fusion max_length
    model_type n_ctx offset_alibi onnx_safe output_attentions output_hidden_states output_router_logits pad_token_id
    padded_vocab_size prefix pretraining_tp problem_type reorder_and_upcast_attn return_dict return_dict_in_generate
    sep_token_id skip_bias_add softmax_in_fp32 task_specific_params temperature tie_encoder_decoder tokenizer_class
    tokenizer_type top_k top_p torch_dtype torchscript transformers_version typical_p unk_token_id use_cache
    use_cache_kernel use_flash_attn
    """.split()
)
IRRELEVANT_PREFIXES = ("summary_",)  # the classification head of GPT-2's double-headed model


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; ProblemError if it holds something else."""
    why = "not a JSON object"
    try:
        if isinstance(found := read_json(file), dict):
            return found
    except (OSError, ValueError) as error:
        why = f"not JSON: {error}"
    raise ProblemError.of(str(file), None, why, "copy the file again", "corrupt")


class ConfigReader:
    """Reads typed values from a configuration; collects every problem and continues with a stand-in value."""

    def __init__(self, hf: Mapping[str, Any], where: str = "config.json"):
        self.hf = hf
        self.where = where
        self.problems: list[Problem] = []
        self._read: set[str] = set()
        self._stood_in: set[str] = set()  # keys without a value of their own

    def problem(self, key: str, why: str, fix: str, kind: str = "invalid", limit: object = None) -> None:
        """Collect a problem with the value of `key`, once however often it is read."""
        problem = Problem(f"{self.where}: {key}", self.hf.get(key), why, fix, kind, limit=limit)
        if problem not in self.problems:
            self.problems.append(problem)

    def value(self, key: str, default: Any = REQUIRED) -> Any:
        """The value, whatever its type; missing and null give the `default`."""
        self._read.add(key)
        if (value := self.hf.get(key)) is not None:
            return value
        if default is REQUIRED:
            self._stood_in.add(key)
            fix = "take the config.json that was published with the weights"
            self.problem(key, "the key is missing", fix, "missing")
            return None
        return default

    def alias(self, *keys: str) -> str:
        """The name, of several for one value, that is in the configuration; where several are, they must agree."""
        self._read.update(keys)
        given = [key for key in keys if self.hf.get(key) is not None] or [keys[0]]
        for key in given[1:]:
            if self.hf[key] != self.hf[given[0]]:
                self.problem(key, f"{given[0]} is {self.hf[given[0]]}", "keep one of the two")
        return given[0]

    def integer(self, key: str, default: Any = REQUIRED) -> Any:
        """A positive whole number below 2^31; a number of layers is at most MAX_LAYERS."""
        value = self.value(key, default)
        if key in LAYER_COUNTS and isinstance(value, int) and value > MAX_LAYERS:
            self._stood_in.add(key)
            problem = too_large(key, value, MAX_LAYERS)
            self.problem(key, problem.why, problem.fix)
            return 1
        fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
        return value if value is default or fits else self._wrong(key, value, "a positive whole number", 1)

    def nullable(self, key: str, default: int | None) -> Any:
        """As `integer`, where null has a meaning of its own: None, and a missing key the `default`."""
        return self.integer(key, None if key in self.hf else default)

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """A number that is not negative."""
        return self._number(key, default, lambda value: 0 <= value < _MANY, "a number of at least 0", 1.0)

    def probability(self, key: str, default: Any = REQUIRED) -> Any:
        """A number from 0 on and below 1."""
        return self._number(key, default, lambda value: 0 <= value < 1, "a number from 0 on and below 1", 0.0)

    def positive(self, key: str, default: Any = REQUIRED) -> Any:
        """A number above 0."""
        return self._number(key, default, lambda value: 0 < value < _MANY, "a number above 0", 1.0)

    def _number(self, key: str, default: Any, in_range: Callable[[float], bool], expected: str, stand_in: float) -> Any:
        value = self.value(key, default)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and in_range(value)
        return value if value is default or fits else self._wrong(key, value, expected, stand_in)

    def flag(self, key: str, default: Any = REQUIRED) -> Any:
        """True or false."""
        value = self.value(key, default)
        return value if isinstance(value, bool) else self._wrong(key, value, "true or false", False)

    def choice(self, key: str, table: Mapping[str, T], default: Any = REQUIRED) -> T:
        """The entry of `table` under the value, or under the name `default`."""
        value = self.value(key, default)
        if isinstance(value, str) and value in table:
            return table[value]
        return self._wrong(key, value, f"one of {', '.join(table)}", next(iter(table.values())))

    def _wrong(self, key: str, value: object, expected: str, stand_in: T) -> T:
        self._stood_in.add(key)
        if value is not None:  # a missing key is a problem already
            self.problem(key, f"not {expected}", f"give {expected}", limit=expected)
        return stand_in

    def section(self, key: str) -> Mapping[str, Any]:
        """An object with keys of its own; without it, an empty one."""
        value = self.value(key, {})
        return value if isinstance(value, Mapping) else self._wrong(key, value, "an object", {})

    def divides(self, divisor_key: str, divisor: int, key: str, value: int) -> None:
        """`divisor`, of `divisor_key`, must divide `value`, of `key`, unless one of them is a stand-in."""
        if value % divisor and not {divisor_key, key} & self._stood_in:
            why = f"{key} = {value} is not divisible by {divisor}"
            self.problem(divisor_key, why, f"correct {key} or {divisor_key}")

    def accept_all(self) -> None:
        """Count every key as read."""
        self._read |= self.hf.keys()

    def unread(self) -> list[str]:
        """Keys that carry a value, were not read and are not known to be irrelevant."""
        return [
            key
            for key, value in self.hf.items()
            if key not in self._read
            and key not in IRRELEVANT
            and key not in MATHEMATICAL
            and not key.startswith(IRRELEVANT_PREFIXES)
            and value not in (None, False, [], {}, "")
        ]

    def unimplemented(self) -> list[Problem]:
        """Problems of the keys that change the mathematics and were not read."""
        found = []
        for key in self.hf.keys() & (MATHEMATICAL.keys() - self._read):
            value = self.hf[key]
            if value is not None and value not in MATHEMATICAL[key]:
                found.append(_unimplemented(f"{self.where}: {key}", value))
        layer_types = self.hf.get("layer_types") if "layer_types" not in self._read else None
        plain = isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types)
        if layer_types and not plain:
            found.append(_unimplemented(f"{self.where}: layer_types", layer_types))
        return sorted(found, key=lambda problem: problem.option)

    def not_understood(self) -> list[Problem]:
        """Every unread key as a problem, for sections in which each key matters."""
        return [_unimplemented(f"{self.where}: {key}", self.hf[key]) for key in self.unread()]

    def finish(self) -> None:
        """Raise all problems, also those of unread keys that change the mathematics."""
        raise_all(self.problems + self.unimplemented())


def _unimplemented(option: str, value: object) -> Problem:
    if option.endswith("quantization_config"):
        method = value.get("quant_method") if isinstance(value, Mapping) else None
        why = "quantised weights are not supported"
        return Problem(option, method or "...", why, "take the unquantised checkpoint", "quantised")
    return Problem(
        option,
        value,
        "the key changes the mathematics, and this family does not implement it",
        "use a checkpoint without it, or add it to the family (docs/adding-a-family.md)",
    )
