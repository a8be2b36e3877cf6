"""A model from stored weights, ready to run on one device or on several, and what its files say of its tokens.

Owns what generation and evaluation need before they start. Where weights come from is the matter of their `Source`."""

from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import torch

from cordee import device as devices
from cordee import launch
from cordee.errors import Findings, Problem, ProblemError
from cordee.families.reader import read_object
from cordee.families.registry import ModelSpec
from cordee.generate.options import InferenceConfig
from cordee.log import logger
from cordee.model.gpt import GPTModel
from cordee.parallel import collectives, inference
from cordee.parallel.degrees import Degrees
from cordee.parallel.inference import InferenceStage
from cordee.parallel.layout import Layout, process_group
from cordee.tokenizer import Tokenizer, load_tokenizer, names_tokenizer
from cordee.weights.codec import Source
from cordee.weights.load import load_into

DTYPES = ("float32", "bfloat16", "float16")


def load_model(source: Source, dtype: str | None = None, device: str | None = None) -> GPTModel:
    """The model in `source`, in evaluation mode. Takes the memory of the model and its largest tensor.

    dtype: name of the type of its weights; None takes the stored one.
    device: where it goes; None takes the fastest there is. ProblemError if there is none of that name."""
    model = GPTModel(source.spec.config, device=device_of(device), dtype=dtype_of(dtype, source))
    fill(model, source)
    return model


def join(config: InferenceConfig, shape: Degrees, stack: ExitStack, phase: str) -> Layout | None:
    """The layout of several processes, in a group that lasts as long as `stack`; None for one alone.

    `phase` says in an error what the processes were doing when they lost each other ("while generating")."""
    if shape.world_size == 1:
        return None
    kind, timeout = _own_device(config).type, timedelta(minutes=config.distributed_timeout_minutes)
    stack.enter_context(collectives.contact(phase))
    backend = devices.KINDS[kind].collective_backend(config.distributed_backend)
    stack.enter_context(process_group(launch.rank_info(), backend, timeout))
    return Layout(shape, kind, timeout)


def load_part(source: Source, config: InferenceConfig, layout: Layout | None) -> tuple[GPTModel, InferenceStage | None]:
    """The model in `source`, or this process's part of it in `layout` and where that is."""
    source.drop_values("--load")
    if layout is None:
        return load_model(source, config.dtype, config.device), None
    model, stage = inference.build(source.spec.config, layout, dtype_of(config.dtype, source), _own_device(config))
    fill(model, source)
    return model, stage


def _own_device(config: InferenceConfig) -> torch.device:
    """That of this process, one of several on this machine."""
    kind = devices.kind().name if config.device is None else device_of(config.device).type
    on_it = kind == devices.kind().name
    return devices.local_device(launch.rank_info().local_rank) if on_it else torch.device(kind)


def check_part(source: Source | None, config: InferenceConfig, shape: Degrees) -> list[Problem]:
    """What keeps `load_part` from loading, as far as it can be known before, and without a source that is not there."""
    found = Findings()
    if source is not None:
        found.attempt(lambda: dtype_of(config.dtype, source))
        found.attempt(lambda: source.spec.without_values("--load", []))
    if config.device is not None:
        found.attempt(lambda: device_of(config.device))
    if shape.world_size > 1 and source is not None:
        found.problems += inference.check(source.spec.config, shape)
    return found.problems


def dtype_of(name: str | None, source: Source) -> torch.dtype:
    """The type of that name, or that of the first weights of `source`. ProblemError if it is none to compute in."""
    if name is None:
        return source.dtype(source.names()[0])
    if name not in DTYPES:
        raise ProblemError.of("--dtype", name, "there is no such type", f"give one of {', '.join(DTYPES)}", "missing")
    return getattr(torch, name)


def device_of(name: str | None) -> torch.device:
    """The device of that name, or the fastest there is. ProblemError if this machine has none of that name."""
    if name is None:
        return devices.local_device(0)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:  # which one hangs on how torch was built
        why = str(error).splitlines()[0]
        raise ProblemError.of("--device", name, why, f"give {devices.kind().name}, or leave it out") from error


def fill(model: GPTModel, source: Source) -> None:
    """Give `model` the weights of `source` and put it in evaluation mode."""
    for note in load_into(model, source).notes:
        logger.info(note)
    model.eval()


def tokenizer_of(config: InferenceConfig, source: Source | None) -> Tokenizer | None:
    """The tokenizer of the options, else that beside the model; None if they name none and there is no model."""
    if source is None and not names_tokenizer(config):
        return None
    tokenizer = load_tokenizer(config, str(source.assets) if source and source.assets else None)
    if source is not None and (note := tokenizer.beyond(source.spec.config.vocab_size)):
        logger.warning(note)
    return tokenizer


def stop_ids(spec: ModelSpec, assets: Path | None, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The tokens that end a text: those at which transformers' `generate` stops, and the tokenizer's eos.

    transformers takes `eos_token_id`, a token or a list of them, from the `generation_config.json` beside the model,
    and from `config.json` only where there is no such file. Ids that the model lacks are reported and ignored: it never
    writes them. ProblemError for what is not an id."""
    file = None if assets is None else assets / "generation_config.json"
    if file is not None and file.is_file():
        where, given = str(file), read_object(file).get("eos_token_id")
    else:
        where, given = "config.json", spec.hf_config.get("eos_token_id")
    ids = _token_ids(given, f"{where}: eos_token_id", spec.config.vocab_size)
    return frozenset(ids if tokenizer is None or tokenizer.eos is None else {*ids, tokenizer.eos})


def _token_ids(given: object, where: str, vocab_size: int) -> set[int]:
    listed = [] if given is None else given if isinstance(given, list) else [given]
    ids = {i for i in listed if type(i) is int}  # which true is not
    if len(ids) < len(set(map(repr, listed))):
        raise ProblemError.of(where, given, "not a token id or a list of token ids", "correct the file")
    if strange := {i for i in ids if not 0 <= i < vocab_size}:
        logger.warning("%s: ignored, as the model has %d tokens: %s", where, vocab_size, sorted(strange))
    return ids - strange
