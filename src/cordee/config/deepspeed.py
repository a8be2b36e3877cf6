"""A DeepSpeed configuration file as values of options.

Owns which of its fields are options here: the ZeRO stage, precision, batch sizes and clipping. All other fields tune
DeepSpeed's own engine; they are listed, so that nobody takes them for granted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cordee.config.option import options_of, to_flag
from cordee.config.schema import TrainConfig
from cordee.config.values import Raw, Unfit, convert, to_raw
from cordee.errors import Problem
from cordee.files import read_json

FLAG = "--deepspeed-config"
ACCUMULATION = "gradient_accumulation_steps"
AUTO = "auto"  # what other programs fill in before DeepSpeed sees it: not given


class Entry(NamedTuple):
    """What `field` of the file, such as fp16.enabled, gives `option`: text of a value, or why there is none."""

    field: str
    option: str
    value: Raw | Unfit


def _fixed_scale(value: object) -> Raw:
    """A loss scale of 0 is a dynamic one."""
    return None if value == 0 else to_raw(value)


def _power_of_two(value: object) -> Raw:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 100:
        raise Unfit("it is no exponent of two", "give a number from 0 to 100")
    return to_raw(2.0**value)


_OPTIONS: dict[str, tuple[str, Callable[[object], Raw]]] = {
    "zero_optimization.stage": ("zero_stage", to_raw),
    "fp16.enabled": ("fp16", to_raw),
    "bf16.enabled": ("bf16", to_raw),
    "bfloat16.enabled": ("bf16", to_raw),
    "fp16.loss_scale": ("loss_scale", _fixed_scale),
    "fp16.initial_scale_power": ("initial_loss_scale", _power_of_two),
    "fp16.loss_scale_window": ("loss_scale_window", to_raw),
    "fp16.hysteresis": ("hysteresis", to_raw),
    "fp16.min_loss_scale": ("min_loss_scale", to_raw),
    "train_batch_size": ("global_batch_size", to_raw),
    "train_micro_batch_size_per_gpu": ("micro_batch_size", to_raw),
    "gradient_clipping": ("clip_grad", to_raw),
}


def read(path: str) -> tuple[list[Entry], list[Problem]]:
    """What the file gives options, and what is wrong with the file as such."""
    fields, problems = _fields(path)
    return [_entry(name, value) for name, value in fields.items() if name in _used(fields)], problems


def check(config: TrainConfig, processes: int) -> Iterator[Problem]:
    """Where the file of --deepspeed-config, if there is one, and the options of a run contradict each other."""
    if config.deepspeed_config is None:
        return
    entries, problems = read(config.deepspeed_config)
    yield from problems
    options = {option.name: option for option in options_of(TrainConfig)}
    for entry in entries:
        where, given = f"{entry.field} in {config.deepspeed_config}", getattr(config, entry.option)
        try:
            if isinstance(entry.value, Unfit):
                raise entry.value
            value = convert(options[entry.option], entry.value)
        except Unfit as unfit:
            yield Problem(where, None, unfit.why, unfit.fix)
            continue
        if value != given:
            yield Problem(to_flag(entry.option), given, f"{where} says {value}", "keep one of the two")
    yield from _accumulation(config, processes)


def _accumulation(config: TrainConfig, processes: int) -> Iterator[Problem]:
    """Passes of a step follow from batch sizes and ranks here; the file may only say the same."""
    assert config.deepspeed_config is not None
    passes = _fields(config.deepspeed_config)[0].get(ACCUMULATION, AUTO)
    if passes == AUTO:
        return
    where = f"{ACCUMULATION} in {config.deepspeed_config}"
    if not isinstance(passes, int) or isinstance(passes, bool) or passes < 1:
        yield Problem(where, passes, "it is no number of passes", "give a whole number from 1 on")
        return
    model = config.tensor_model_parallel_size * config.pipeline_model_parallel_size * config.context_parallel_size
    data = max(1, processes // model)
    samples = config.micro_batch_size * data
    if (config.global_batch_size or samples) != samples * passes:
        why = f"{where} says {passes}: that makes {samples * passes} samples, {config.micro_batch_size} a pass on each "
        why += f"of {data} data-parallel ranks"
        fix = f"give {samples * passes}, or leave {ACCUMULATION} out"
        yield Problem("--global-batch-size", config.global_batch_size, why, fix)


def without_effect(path: str | None) -> Iterator[str]:
    """The fields of the file, if there is one, that change nothing here, in words."""
    if path is None:
        return
    fields, _ = _fields(path)
    idle = [name for name in fields if name != ACCUMULATION and name not in _used(fields)]
    if idle:
        yield f"without effect: {', '.join(idle)} in {path}, for that is DeepSpeed's own engine"


def _used(fields: dict[str, Any]) -> set[str]:
    """The fields that give an option something. How float16 is scaled says nothing where it is off."""
    used = {name for name, value in fields.items() if name in _OPTIONS and value != AUTO}
    if fields.get("fp16.enabled") in (None, False):
        used -= {name for name in used if name.startswith("fp16.") and name != "fp16.enabled"}
    return used


def _entry(name: str, value: object) -> Entry:
    option, translate = _OPTIONS[name]
    try:
        return Entry(name, option, translate(value))
    except Unfit as unfit:
        return Entry(name, option, unfit)


def _fields(path: str) -> tuple[dict[str, Any], list[Problem]]:
    """The fields of the file by their names, sections and fields joined by a dot."""
    try:
        root = read_json(Path(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        return {}, [Problem(FLAG, path, f"the file cannot be read: {reason}", "give a readable JSON file")]
    except json.JSONDecodeError as error:
        return {}, [Problem(FLAG, path, f"it is not JSON: line {error.lineno}: {error.msg}", "mend the file")]
    except ValueError as error:
        return {}, [Problem(FLAG, path, str(error), "give DeepSpeed's configuration file")]
    if not isinstance(root, dict):
        return {}, [Problem(FLAG, path, "it does not hold an object", "give DeepSpeed's configuration file")]
    return dict(_flat(root)), []


def _flat(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
