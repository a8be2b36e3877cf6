"""Hugging Face directories: weights in and out.

Owns matching a family's rules with the tensors in the files, both ways, and the files beside the weights.
Nothing is read before it is asked for: memory is the tensors asked for, and when writing, some slices."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch

from cordee.errors import Problem, Problems, raise_all
from cordee.families.registry import ModelSpec, spec_from_directory
from cordee.log import counted
from cordee.tensors.rules import Rule
from cordee.tensors.views import Shape, whole
from cordee.weights.codec import PlannedFile
from cordee.weights.files import SAFETENSORS, SAFETENSORS_INDEX, TensorFile, open_files, unfit
from cordee.weights.regions import Destination
from cordee.weights.ruled import RuledSink, RuledSource, foreign_tensors
from cordee.weights.safetensors_file import SafetensorsWriter, room_for
from cordee.weights.staged_sink import Output

_OTHER_CONFIG = "take the config.json that belongs to these weights"
MAX_SHARD_SIZE = 5 * 10**9  # bytes; as transformers 4 has it, and small enough for any file system

Rename = Callable[[str], str]
Files = dict[str, TensorFile]  # by the names of the tensors in them


def read(path: str | Path, rename: Rename = str) -> "HFSource":
    """The weights of a Hugging Face directory, checked against its `config.json`.

    rename: maps the family's names of tensors to those in the files, where they are others.
    ProblemError with everything that is wrong: configuration, files, names and shapes."""
    path = Path(path)
    spec = spec_from_directory(path)
    files, notes = open_files(path)
    return HFSource(path, spec, files, rename, notes)


class HFSource(RuledSource):
    """Weights in a Hugging Face directory. `files` maps each foreign name to the file that holds it; `notes` are of
    what is not read."""

    def __init__(self, path: Path, spec: ModelSpec, files: Files, rename: Rename = str, notes: tuple[str, ...] = ()):
        self.path = path
        self.assets = path
        self.files = files
        self.notes = notes
        prefix = spec.family.base_prefix  # which the names in the files have or lack
        self.spec = replace(spec, base_prefix=not prefix or any(name.startswith(prefix) for name in files))
        self._leave_out()
        self._rules = _renamed(self.spec.rules(), rename)
        if self.spec.config.tie_word_embeddings:
            self._take_head_for_embedding()
        raise_all([*self._match_names(), *self._check_tensors()])

    def _leave_out(self) -> None:
        """Without the part that the family does not build, if the files have it."""
        family = self.spec.family
        if family.left_out is None:
            return
        part = family.left_out(self.spec.hf_config)
        starts = (*part.prefixes, *(prefix.removeprefix(family.base_prefix) for prefix in part.prefixes))
        kept = {name: file for name, file in self.files.items() if not name.startswith(starts)}
        if count := len(self.files) - len(kept):
            self.files = kept
            self.spec = replace(self.spec, hf_config=self.spec.hf_config | part.config)
            self.notes = (*self.notes, f"{part.what} are not built and left out: {counted(count, 'tensor')}")

    def _take_head_for_embedding(self) -> None:
        """Of a tied pair some files hold only the head: transformers 4 kept whichever came first."""
        rule, head = self._rules["embedding.weight"], _head_names(self.spec)
        if self.files.keys().isdisjoint(rule.foreign) and head <= self.files.keys():
            self._rules["embedding.weight"] = replace(rule, foreign=tuple(head))
            self.notes = (*self.notes, f"{_listed(head)} read as the embedding, to which the head is tied")

    def _match_names(self) -> Iterable[Problem]:
        needed = {foreign for rule in self._rules.values() for foreign in rule.foreign}
        found = self.files.keys()
        ignored = {name for name in found - needed if _is_ignored(name, self.spec)}
        if ignored:
            self.notes = (*self.notes, f"{counted(len(ignored), 'tensor')} without weights ignored: {_listed(ignored)}")
        unknown = found - needed - ignored
        if self.spec.config.tie_word_embeddings and (head := unknown & _head_names(self.spec)):
            unknown -= head
            yield from self._check_tied(head)
        if missing := needed - found:
            fix = "copy all files of the checkpoint, with the config.json that belongs to them"
            if missing == _head_names(self.spec):
                fix = 'if its embedding serves as head, say "tie_word_embeddings": true in config.json'
            why = f"tensors are missing: {_listed(missing)}"
            yield Problem(str(self.path), None, why, fix, "missing", limit=missing)
        if unknown:
            why = f"tensors that family {self.spec.family.name} does not know: {_listed(unknown)}"
            yield Problem(str(self.path), None, why, _OTHER_CONFIG, "unknown", limit=unknown)

    def _check_tied(self, head: set[str]) -> Iterable[Problem]:
        """A stored copy of a tied head is left out if it is a copy; else the configuration is wrong."""
        (name,) = head
        stored = self.files[name].read(name, whole(self.files[name].tensors[name].shape))
        (embedding,) = self._rules["embedding.weight"].foreign
        if embedding in self.files and torch.equal(stored, self.files[embedding].read(embedding, whole(stored.shape))):
            self.notes = (*self.notes, f"{name} ignored: it repeats the embedding, to which the head is tied")
            return
        why = 'it differs from the embedding, but "tie_word_embeddings" says they are one'
        fix = 'say "tie_word_embeddings": false in config.json to keep it'
        yield Problem(f"{self.path}: {name}", None, why, fix, "tied")

    def _check_tensors(self) -> Iterable[Problem]:
        for _, foreign, shape in foreign_tensors(self._rules, self._shapes):
            if foreign in self.files:
                yield from unfit(self.files[foreign], foreign, shape, _OTHER_CONFIG)


def _renamed(rules: dict[str, Rule], rename: Rename) -> dict[str, Rule]:
    return {name: rule.named(str, rename) for name, rule in rules.items()}


def _is_ignored(name: str, spec: ModelSpec) -> bool:
    full = name if spec.base_prefix else spec.family.base_prefix + name
    patterns = (re.escape(template).replace(r"\{i\}", r"\d+") for template in spec.family.ignored)
    return any(re.fullmatch(pattern, full) for pattern in patterns)


def _head_names(spec: ModelSpec) -> set[str]:
    """Foreign names of the head, tied or not."""
    rules = spec.family.weights(spec.config)
    return {name for rule in rules if rule.canonical == "head.weight" for name in rule.foreign}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def write(
    path: str | Path,
    spec: ModelSpec,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    assets: str | Path | None = None,
    overwrite: bool = False,
    workers: int = 1,
) -> "HFSink":
    """A Hugging Face directory to be filled with the weights of `spec`; it appears under its name when complete.

    dtype: type of all weights; None keeps each as it is put.
    max_shard_size: bytes of the largest file, unless one tensor is larger.
    assets: directory from which tokenizer and generation files are copied.
    overwrite: replace a model directory at `path`.
    workers: threads that write.
    ProblemError if something is at `path` that must not be replaced."""
    raise_all(check_heads(spec))
    output = Output(Path(path), Path(assets) if assets else None, workers, overwrite)
    return HFSink(output, spec, dict.fromkeys(spec.shapes(), dtype) if dtype else {}, max_shard_size)


def check_heads(spec: ModelSpec) -> Problems:
    """Value heads that transformers has no place for: it has one for that of a reward model of some families."""
    if spec.config.score and (spec.config.lm_head or spec.family.classifier is None):
        name = spec.family.name
        why = f"transformers has no {'language model' if spec.config.lm_head else name} with a value head"
        yield Problem("model", name, why, "keep the checkpoint, which --load reads", "reward model")


def planned_files(
    spec: ModelSpec, dtypes: Mapping[str, torch.dtype], max_shard_size: int = MAX_SHARD_SIZE
) -> list[PlannedFile]:
    """The files that `write` makes of weights of `dtypes`, by canonical name, put in the order of the forward."""
    shards = [0]
    for name, _, shape in foreign_tensors(spec.rules(), spec.shapes()):
        itemsize = dtypes[name].itemsize
        nbytes = math.prod(shape) * itemsize
        if shards[-1] and (shards[-1] + nbytes > max_shard_size or shards[-1] % itemsize):
            shards.append(0)
        shards[-1] += nbytes
    return [PlannedFile(_file_name(number, len(shards)), nbytes) for number, nbytes in enumerate(shards)]


def _file_name(number: int, count: int) -> str:
    return SAFETENSORS if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


class HFSink(RuledSink):
    """A Hugging Face directory in the making; `rename` maps the family's names of tensors to those to write."""

    def __init__(
        self,
        output: Output,
        spec: ModelSpec,
        dtypes: Mapping[str, torch.dtype],
        max_shard_size: int = MAX_SHARD_SIZE,
        rename: Rename = str,
    ):
        self._max_shard_size = max_shard_size
        self._shards: list[SafetensorsWriter] = []
        super().__init__(output, spec, _renamed(spec.rules(), rename), dtypes)
        tensors = foreign_tensors(self._rules, self._shapes)
        self._sizes = {foreign: math.prod(shape) for _, foreign, shape in tensors}  # elements of those still to come

    def place(self, foreign: str, shape: Shape, dtype: torch.dtype) -> Destination:
        shard = self._shard_for(math.prod(shape) * dtype.itemsize, dtype.itemsize)
        del self._sizes[foreign]
        return Destination(shard.path, shard.add(foreign, shape, dtype))

    def _shard_for(self, nbytes: int, itemsize: int) -> SafetensorsWriter:
        """The shard that is being filled, or if it has no room for a tensor of `nbytes`, a new one."""
        last = self._shards[-1] if self._shards else None
        if last is not None and last.nbytes + nbytes <= self._max_shard_size and last.fits(itemsize):
            return last
        room = room_for(_most_names(self._sizes, self._max_shard_size))
        self._shards.append(SafetensorsWriter(self._staging.scratch / f"shard-{len(self._shards)}", room))
        return self._shards[-1]

    def finish(self) -> None:
        for shard in self._shards:
            shard.close()
        self._name_shards()
        super().finish()

    def _name_shards(self) -> None:
        """Shards get their final names when their number is known."""
        count = len(self._shards)
        weight_map = {}
        for number, shard in enumerate(self._shards):
            file = _file_name(number, count)
            shard.path.rename(self._staging.scratch / file)
            weight_map |= dict.fromkeys(shard.names, file)
        if count == 1:
            return
        total = sum(shard.nbytes for shard in self._shards)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        self._staging.write_json(SAFETENSORS_INDEX, index)


def _most_names(sizes: dict[str, int], nbytes: int) -> list[str]:
    """Names that take at least as much room as those of any tensors that fit into `nbytes`, of a byte an element."""
    count = sum(start < nbytes for start in accumulate(sorted(sizes.values()), initial=0))
    return sorted(sizes, key=len, reverse=True)[: max(count, 1)]
