"""A DeepSpeed configuration file as values of options.

Owns which of its fields set options: the ZeRO stage, precision, batch sizes and gradient clipping. All others tune
DeepSpeed's own engine and are reported as ignored."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cordee.config.option import options_of, to_flag
from cordee.config.values import Entry, Raw, Unfit, convert, to_raw
from cordee.errors import Problem, Problems
from cordee.files import read_json
from cordee.parallel.degrees import RANKS
from cordee.parallel.options import LayoutOptions

FLAG = "--deepspeed-config"
ACCUMULATION = "gradient_accumulation_steps"
AUTO = "auto"  # a value that other programs fill in before DeepSpeed reads the file: not given


def _power_of_two(value: object) -> Raw:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 100:
        raise Unfit("the value is no exponent of two", "give a number from 0 to 100", "range")
    return to_raw(2.0**value)


_OPTIONS: dict[str, tuple[str, Callable[[object], Raw]]] = {
    "zero_optimization.stage": ("zero_stage", to_raw),
    "fp16.enabled": ("fp16", to_raw),
    "bf16.enabled": ("bf16", to_raw),
    "bfloat16.enabled": ("bf16", to_raw),
    "fp16.loss_scale": ("loss_scale", lambda value: None if value == 0 else to_raw(value)),  # 0: a dynamic one
    "fp16.initial_scale_power": ("initial_loss_scale", _power_of_two),
    "fp16.loss_scale_window": ("loss_scale_window", to_raw),
    "fp16.hysteresis": ("hysteresis", to_raw),
    "fp16.min_loss_scale": ("min_loss_scale", to_raw),
    "train_batch_size": ("global_batch_size", to_raw),
    "train_micro_batch_size_per_gpu": ("micro_batch_size", to_raw),
    "gradient_clipping": ("clip_grad", to_raw),
}


@dataclass(frozen=True)
class Settings:
    """The fields of a file by name, section and field joined by a dot, or why there are none."""

    path: str
    fields: Mapping[str, Any]
    problems: tuple[Problem, ...] = ()

    def used(self) -> set[str]:
        """The fields that set an option. Loss scaling does not where float16 is off."""
        used = {name for name, value in self.fields.items() if name in _OPTIONS and value != AUTO}
        if self.fields.get("fp16.enabled") in (None, False):
            used -= {name for name in used if name.startswith("fp16.") and name != "fp16.enabled"}
        return used

    def entries(self) -> list[Entry]:
        """The options that the file sets."""
        used = self.used()
        return [_entry(name, value) for name, value in self.fields.items() if name in used]

    def ignored(self) -> Iterator[str]:
        """A note on the fields that change nothing."""
        idle = [name for name in self.fields if name != ACCUMULATION and name not in self.used()]
        if idle:
            yield f"ignored: {', '.join(idle)} in {self.path} (they tune DeepSpeed's own engine)"


def read(path: str) -> Settings:
    """The fields of a file, and the problems of reading it."""
    try:
        root = read_json(Path(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        return _unread(path, f"the file cannot be read: {reason}", "give a readable JSON file")
    except json.JSONDecodeError as error:
        return _unread(path, f"the file is not JSON: line {error.lineno}: {error.msg}", "correct the file")
    except ValueError as error:
        return _unread(path, str(error))
    if not isinstance(root, dict):
        return _unread(path, "the file does not hold an object")
    return Settings(path, dict(_flat(root)))


def entries(path: str, *_: object) -> tuple[list[Entry], Sequence[Problem]]:
    """The options that a file sets, and the problems of reading it."""
    settings = read(path)
    return settings.entries(), settings.problems


def _unread(path: str, why: str, fix: str = "give DeepSpeed's configuration file") -> Settings:
    unknown = {option for option, _ in _OPTIONS.values()}
    return Settings(path, {}, (Problem(FLAG, path, why, fix, "unreadable", sorted(unknown)),))


def check(config: LayoutOptions, file: Settings, data_ranks: int) -> Problems:
    """The contradictions between the file of --deepspeed-config and the options of a run over `data_ranks`."""
    yield from file.problems
    options = {option.name: option for option in options_of(type(config))}
    for entry in file.entries():
        where, given = f"{entry.field} in {file.path}", getattr(config, entry.option)
        try:
            if isinstance(entry.value, Unfit):
                raise entry.value
            value = convert(options[entry.option], entry.value)
        except Unfit as unfit:
            yield Problem(where, None, unfit.why, unfit.fix, unfit.kind, (entry.option,))
            continue
        if value != given:
            why, fix = f"{where} is {value}", "keep one of the two"
            yield Problem(to_flag(entry.option), given, why, fix, "excludes", ("deepspeed_config",), value)
    yield from _accumulation(config, file, data_ranks)


def _accumulation(config: LayoutOptions, file: Settings, data_ranks: int) -> Problems:
    """Gradient accumulation steps follow from batch sizes and ranks; the file must agree."""
    passes = file.fields.get(ACCUMULATION, AUTO)
    if passes == AUTO:
        return
    where = f"{ACCUMULATION} in {file.path}"
    if not isinstance(passes, int) or isinstance(passes, bool) or passes < 1:
        yield Problem(where, passes, "not a positive whole number", "give a whole number from 1 on", "type")
        return
    samples = config.micro_batch_size * data_ranks
    if (config.global_batch_size or samples) != samples * passes:
        needed = samples * passes
        why = f"{where} is {passes}: {passes} x {config.micro_batch_size} per micro-batch x {data_ranks} data-parallel "
        why += f"ranks are {needed} samples"
        fix = f"give {needed}, or leave {ACCUMULATION} out"
        involved = ("deepspeed_config", "micro_batch_size", *RANKS)
        yield Problem("--global-batch-size", config.global_batch_size, why, fix, "accumulates", involved, needed)


def _entry(name: str, value: object) -> Entry:
    option, translate = _OPTIONS[name]
    try:
        return Entry(name, option, translate(value))
    except Unfit as unfit:
        return Entry(name, option, unfit)


def _flat(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
