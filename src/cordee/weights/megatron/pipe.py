"""What a pipeline of DeepSpeed saves, as a checkpoint of tensor ranks with AscendSpeed's names.

Owns the numbering of its modules, and what can be wrong with the files: modules or ranks that are missing. To DeepSpeed
a model is a list of modules and functions, and all that is known of a module is its number in it. As Megatron-DeepSpeed
and AscendSpeed build the list, a function is 0 and the embedding 1; the layers, the final norm and an untied head
follow, until 2023 with a function between embedding and layers and one between layers and norm. Weights are in

    layer_05-model_01-model_states.pt   what training saves: module 5 of tensor rank 1, with the module's own names;
                                        the `mp_rank_XX_model_states.pt` beside them have the settings
    mp_rank_03_model_states.pt          what AscendSpeed's converter of BLOOM writes: all modules of a stage, here of
                                        stage 1 and rank 1 of 2, as `5.input_layernorm.weight` and
                                        `tied_modules.embed.word_embeddings.weight`"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, product
from pathlib import Path
from typing import Any

from torch import Tensor

from cordee.errors import Problem, ProblemError, raise_all
from cordee.tensors.views import Index
from cordee.weights.megatron import files as megatron
from cordee.weights.megatron.layout import Rank, layer_files, rank_files
from cordee.weights.megatron.legacy import MODEL
from cordee.weights.torch_file import Keys

logger = logging.getLogger("cordee")

EMBEDDING = 1  # the number of the embedding where its name does not give it
GAPS = (1, 2)  # from embedding to layers and from layers to norm, the same: without and with a function between them
_NUMBERED = re.compile(r"(?:module\.)?(?:(\d{1,9})|tied_modules\.embed)\.(.+)")
_EARLY = "attention."  # as AscendSpeed's first models of LLaMA's form called what is self_attention since
_NORM = re.compile(r"(?:final_layernorm\.)?(weight|bias)")


def open_folder(folder: Path) -> dict[Rank, megatron.RankFile]:
    """The file of every rank in a folder of ranks or of a pipeline, of which each tensor rank is one file.

    ProblemError with all that is wrong with them."""
    if layers := layer_files(folder):
        return _of_layers(folder, layers)
    ranks = megatron.open_ranks(folder)
    if any(_NUMBERED.fullmatch(name) for file in ranks.values() for _, name in file.keys):
        return _of_stages(folder, ranks)
    return megatron.by_rank(folder, ranks)


class Gathered:
    """Several files as one: the first of a tensor's keys is the file. `content` is that of the one with settings."""

    def __init__(self, content: Any, files: Mapping[str, megatron.Contents]):
        self.content = content
        self.not_read = sorted({name for file in files.values() for name in file.not_read})
        self.tensors = {(at, *keys): region for at, file in files.items() for keys, region in file.tensors.items()}
        self._files = files

    def read(self, keys: Keys, index: Index) -> Tensor:
        return self._files[keys[0]].read(keys[1:], index)


def _of_layers(folder: Path, paths: Mapping[tuple[int, int], Path]) -> dict[Rank, megatron.RankFile]:
    layers = megatron.open_all(paths, megatron.open_file)
    settings = megatron.open_all(rank_files(folder), lambda path: megatron.RankFile(megatron.open_file(path), {}))
    raise_all(megatron.disagreements(folder, {Rank(*ranks): file for ranks, file in settings.items()}))
    first = next(iter(settings.values()), megatron.RankFile(Gathered({}, {}), {}))
    size = max(megatron.size_of(first.args, "tensor"), *(1 + rank for _, rank in layers))
    numbers = sorted({number for number, _ in layers})
    lost = (key for key in product(numbers, range(size)) if key not in layers)
    raise_all(_missing(folder, (f"layer_{number:02d}-model_{rank:02d}-model_states.pt" for number, rank in lost)))
    starts = _starts(folder, {number: {keys[0] for keys in layers[number, 0].tensors} for number in numbers})
    found = {}
    for rank in range(size):
        held = Gathered(first.file.content, {str(number): layers[number, rank] for number in numbers})
        found[Rank(rank)] = megatron.RankFile(
            held, {(0, _named(starts[int(number)], ".".join(name))): (number, *name) for number, *name in held.tensors}
        )
    raise_all(megatron.disagreements(folder, found))
    return found


def _of_stages(folder: Path, ranks: Mapping[tuple[int, ...], megatron.RankFile]) -> dict[Rank, megatron.RankFile]:
    """Stage by stage, all tensor ranks of one after the other; those of the first hold tensors of the same names."""
    if wrong := next((numbers for numbers in sorted(ranks) if len(numbers) > 1), None):
        why = f"files of a pipeline have one number, but one of these has {len(wrong)}"
        raise ProblemError.of(str(folder), None, why, megatron.COPY_AGAIN)
    files = {number: file for (number,), file in sorted(ranks.items())}
    last = max(files)
    raise_all(_missing(folder, (f"mp_rank_{n:02d}_model_states.pt" for n in range(last) if n not in files)))
    names = {number: {name for _, name in file.keys} for number, file in files.items()}
    size = max(1 + number for number in files if names[number] == names[0])
    if left := len(files) % size:
        raise_all(_missing(folder, [f"mp_rank_{last + n:02d}_model_states.pt" for n in range(1, 1 + size - left)]))
    ranks_files = [{number: file for number, file in files.items() if number % size == r} for r in range(size)]
    raise_all(_repeated(folder, [name for number in ranks_files[0] for name in names[number]]))
    modules: dict[int, set[str]] = {}
    for module, name in (_module(name) for number in ranks_files[0] for name in names[number]):
        modules.setdefault(module, set()).add(name)
    starts, found = _starts(folder, modules), {}
    for rank, stages in enumerate(ranks_files):
        held = Gathered(stages[rank].file.content, {str(number): file.file for number, file in stages.items()})
        keys = {}
        for number, file in reversed(stages.items()):  # what two stages hold alike is taken from the first
            for (_, full), at in file.keys.items():
                module, name = _module(full)
                keys[0, _named(starts.get(module, f"{module}."), name)] = (str(number), *at)
        found[Rank(rank)] = megatron.RankFile(held, keys)
    raise_all(megatron.disagreements(folder, found))
    return found


def _repeated(folder: Path, names: list[str]) -> Iterator[Problem]:
    """Only the embedding may be in two stages; else two ranks of one stage were taken for two stages."""
    counts = Counter(name for name in names if "tied_modules." not in name)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        why = f"some ranks of a stage hold tensors that others do not; several hold {', '.join(twice[:3])}"
        yield Problem(str(folder), None, why, megatron.ONE_CHECKPOINT, "disagree", limit=twice)


def _module(full: str) -> tuple[int, str]:
    """The number of the module, and the name in it, of what a stage's file calls `full`."""
    match = _NUMBERED.fullmatch(full)
    return (int(match[1] or EMBEDDING), match[2]) if match else (-1, full)


def _starts(folder: Path, modules: Mapping[int, set[str]]) -> dict[int, str]:
    """What AscendSpeed's names begin with in each of `modules`, names by number. ProblemError if one lacks."""
    embeddings = [number for number, names in modules.items() if "word_embeddings.weight" in names]
    layers = sorted(number for number, names in modules.items() if "input_layernorm.weight" in names)
    norms = [number for number, names in modules.items() if names and all(map(_NORM.fullmatch, names))]
    sought = {"the embedding": embeddings, "layers": layers, "the final norm": norms}
    if absent := [what for what, numbers in sought.items() if not numbers]:
        why = f"no file holds {' or '.join(absent)}"
        raise ProblemError.of(str(folder), None, why, megatron.COPY_AGAIN, "missing", limit=absent)
    embedding, norm = min(embeddings), max(norms)
    gap = min(layers[0] - embedding, norm - layers[-1], max(GAPS))
    lost = (number for number in range(embedding + gap, norm - gap + 1) if number not in layers)
    raise_all(_missing(folder, (f"those of module {number}" for number in lost)))
    starts = {number: f"{MODEL}.encoder.layers.{n}." for n, number in enumerate(layers)}
    starts |= {embedding: f"{MODEL}.embedding.", norm: f"{MODEL}.encoder.final_layernorm."}
    _doubt_order(folder, modules)
    heads = {number: f"{MODEL}.output_layer." for number, names in modules.items() if "lm_head.weight" in names}
    return {number: f"{number}." for number in modules} | starts | heads


def _doubt_order(folder: Path, modules: Mapping[int, set[str]]) -> None:
    if any(name.startswith(f"{_EARLY}query_key_value.") for names in modules.values() for name in names):
        logger.warning(
            "%s: its attention has the names of AscendSpeed's first LLaMA, of which some stored all queries before all "
            "keys and values; files do not say so, and they are read as groups of heads: see that the model answers",
            folder,
        )


def _named(start: str, name: str) -> str:
    """AscendSpeed's name of what a module whose names begin with `start` calls `name`."""
    if start.endswith((".final_layernorm.", ".output_layer.")):
        return start + name.rpartition(".")[2]
    return start + (f"self_{name}" if name.startswith(_EARLY) else name)


def _missing(folder: Path, files: Iterable[str], most: int = 20) -> Iterator[Problem]:
    """A name or a setting may claim any number of files, so no more than `most` are looked for."""
    if first := list(islice(files, most + 1)):
        more = " and more" if len(first) > most else ""
        why = f"files are missing: {', '.join(first[:most])}{more}"
        yield Problem(str(folder), None, why, megatron.COPY_AGAIN, "missing", limit=first[:most])
