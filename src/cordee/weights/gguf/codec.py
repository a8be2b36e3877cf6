"""GGUF: weights in and out, as llama.cpp has them.

Owns matching an architecture's rules with the tensors of a file, both ways, and the checks of that. Memory is
the tensors asked for; when writing, some slices."""

import atexit
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cordee.errors import Problem, ProblemError, raise_all
from cordee.families.registry import ModelSpec, spec_from_hf
from cordee.model.config import AttentionConfig, Llama3Scaling, ModelConfig
from cordee.model.rotary import inverse_frequencies
from cordee.tensors.rules import Rule
from cordee.tensors.views import Shape, View, whole
from cordee.weights.codec import PlannedFile, Source
from cordee.weights.files import unfit
from cordee.weights.gguf import architecture, vocabulary
from cordee.weights.gguf.file import NAMES_OF_TYPES, GGUFFile, create
from cordee.weights.gguf.header import SUFFIX
from cordee.weights.gguf.tensors import rules
from cordee.weights.regions import Destination, contiguous
from cordee.weights.ruled import RuledSink, RuledSource, foreign_tensors
from cordee.weights.staged_sink import Output
from cordee.weights.staging import TERMS

logger = logging.getLogger("cordee")

FILE = f"model{SUFFIX}"  # what is written
_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}  # llama.cpp's numbers for "most tensors are"


def read(path: str | Path) -> "GGUFSource":
    """The weights of a file, or of a directory with one. ProblemError with everything that is wrong with it."""
    return GGUFSource(GGUFFile(_file_of(Path(path))))


def _file_of(path: Path) -> Path:
    """The file itself. ProblemError if a directory has several."""
    if path.is_file():
        return path
    found = sorted(path.glob(f"*{SUFFIX}"))
    if len(found) > 1:
        why = f"it holds several files of GGUF: {', '.join(file.name for file in found)}"
        raise ProblemError.of("model directory", path, why, "give the path of one of them", "several", limit=found)
    return found[0]


class GGUFSource(RuledSource):
    """Weights in a file of GGUF; packed ones are unpacked as they are read.

    `assets` is a directory with the tokenizer that the file describes; it is there until the process ends."""

    def __init__(self, file: GGUFFile):
        self.path = file.path
        strange = vocabulary.strange_ids(file.values)
        self.notes = tuple(f"{key} is {value!r}, which is no token: ignored" for key, value in strange.items())
        values = {key: value for key, value in file.values.items() if key not in strange}
        row, names = architecture.architecture_of(values, str(file.path)), file.tensors.keys()
        factors = _factors(file)
        hf = architecture.hf_config(row, values, names, None if factors is None else factors.tolist())
        if (embedding := file.tensors.get("token_embd.weight")) is not None:
            hf |= {"vocab_size": embedding.shape[0], "torch_dtype": str(embedding.dtype).removeprefix("torch.")}
        self.spec = spec_from_hf(hf, str(file.path))
        self._rules = rules(self.spec.config, row.paired)
        self.files = dict.fromkeys(names, file)
        raise_all([*self._check_tensors(file), *self._check_factors(factors)])
        self._restore_tokenizer(values)

    def _check_tensors(self, file: GGUFFile) -> Iterator[Problem]:
        rules, shapes = self._rules, self._shapes
        assert rules.keys() == shapes.keys(), f"no tensors for {shapes.keys() - rules.keys()}"
        needed = {foreign: shape for _, foreign, shape in foreign_tensors(rules, shapes)}
        if missing := needed.keys() - file.tensors.keys():
            why = f"tensors are missing: {', '.join(sorted(missing))}"
            yield Problem(str(self.path), None, why, "take a whole file of the model", "missing", limit=missing)
        if unknown := file.tensors.keys() - needed.keys() - {architecture.ROPE_FACTORS}:
            why = f"tensors that its architecture does not have: {', '.join(sorted(unknown))}"
            yield Problem(str(self.path), None, why, "take the Hugging Face model", "unknown", limit=unknown)
        for name in needed.keys() & file.tensors.keys():
            yield from unfit(file, name, needed[name], "take another file of the model")

    def _check_factors(self, factors: Tensor | None) -> Iterator[Problem]:
        """The scaling was guessed from the factors; it has to make them."""
        if factors is None:
            return
        made = rope_factors(self.spec.config)
        if made is None or made.shape != factors.shape or not torch.allclose(made, factors, rtol=1e-4):
            yield _strange_factors(self.path)

    def _restore_tokenizer(self, values: Mapping[str, Any]) -> None:
        directory = Path(tempfile.mkdtemp(prefix="cordee-gguf-"))
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        why = vocabulary.restore(values, directory)
        if why is None:
            self.assets = directory
        else:
            self.notes = (*self.notes, why)


def _factors(file: GGUFFile) -> Tensor | None:
    """What `ROPE_FACTORS` holds, float32 `[rotary_dim / 2]`, if it is there. ProblemError if it cannot be factors."""
    if (stored := file.tensors.get(architecture.ROPE_FACTORS)) is None:
        return None
    factors = file.read(architecture.ROPE_FACTORS, whole(stored.shape)).float()
    if factors.ndim != 1 or not bool(((factors > 0) & factors.isfinite()).all()):
        raise ProblemError([_strange_factors(file.path)])
    return factors


def _strange_factors(path: Path) -> Problem:
    why = "they are not those of Llama 3's scaling, the only one that is read from factors"
    return Problem(f"{path}: {architecture.ROPE_FACTORS}", None, why, "take the Hugging Face model")


def rope_factors(config: ModelConfig) -> Tensor | None:
    """What Llama 3's scaling divides frequencies by, float32 `[rotary_dim / 2]`; None for other models."""
    attention = config.layers[0].attention
    if not isinstance(attention, AttentionConfig) or attention.rope is None:
        return None
    rope, dim = attention.rope, attention.head_dim
    if not isinstance(rope.scaling, Llama3Scaling):
        return None
    return inverse_frequencies(replace(rope, scaling=None), dim) / inverse_frequencies(rope, dim)


@dataclass(frozen=True)
class GGUFPlan:
    """A file to be written: its values, the shapes and types of its tensors, and what becomes of each parameter.

    dtypes: by canonical name, what is written."""

    spec: ModelSpec
    row: architecture.Architecture
    values: dict[str, Any]
    tensors: dict[str, tuple[Shape, torch.dtype]]
    rules: dict[str, Rule]
    dtypes: dict[str, torch.dtype]
    factors: Tensor | None

    def files(self) -> list[PlannedFile]:
        return [PlannedFile(FILE, sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors.values()))]


class Held(Source):
    """The parameters of `source` as a file of this plan gives them back: what is stored shifted is rounded once."""

    def __init__(self, plan: GGUFPlan, source: Source):
        self.spec = plan.spec
        self._plan, self._source = plan, source

    def dtype(self, name: str) -> torch.dtype:
        return self._plan.dtypes[name]

    def view(self, name: str) -> View:
        rule, dtype = self._plan.rules[name], self._plan.dtypes[name]
        parts = rule.foreign_views(self._source.view(name))
        return rule.view(lambda foreign, index: parts[foreign].read(index).to(dtype), self.shape(name))


def plan(spec: ModelSpec, dtypes: Mapping[str, torch.dtype], assets: Path | None) -> GGUFPlan:
    """Lay a file out; warnings are logged.

    dtypes: by canonical name; what llama.cpp wants in float32 is written so all the same.
    assets: directory with the tokenizer that goes into the file.
    ProblemError if llama.cpp has no such model or no such tokenizer, or tensors are of another type."""
    factors = rope_factors(spec.config)
    row, values, notes = architecture.choose(spec, None if factors is None else factors.tolist())
    found, shapes = rules(spec.config, row.paired), spec.shapes()
    dtypes = {name: dtypes[name] if _keeps(name, rule, shapes[name]) else torch.float32 for name, rule in found.items()}
    if strange := {str(dtype) for dtype in dtypes.values()} - {str(dtype) for dtype in NAMES_OF_TYPES}:
        why = f"weights are stored as {', '.join(sorted(strange))}, which llama.cpp does not compute with"
        raise ProblemError.of("--params-dtype", None, why, "give float32, float16 or bfloat16", "dtype")
    tensors = {} if factors is None else {architecture.ROPE_FACTORS: (tuple(factors.shape), torch.float32)}
    tensors |= {foreign: (shape, dtypes[name]) for name, foreign, shape in foreign_tensors(found, shapes)}
    values |= {
        "general.type": "model",
        "general.name": spec.family.name,
        "general.file_type": _FILE_TYPES[dtypes["embedding.weight"]],
        "general.quantization_version": 2,
        **vocabulary.describe(assets, spec.config.vocab_size),
    }
    ends, left = architecture.further_ends(spec.hf_config, values.get("tokenizer.ggml.eos_token_id"))
    values |= ends
    if left:
        notes.append(f"a file of GGUF has no place for more tokens that end a text; left out: {left}")
    notes += _notes_on_tokenizer(values, assets)
    for note in notes:
        logger.warning(note)
    return GGUFPlan(spec, row, values, tensors, found, dtypes, factors)


def _notes_on_tokenizer(values: Mapping[str, Any], assets: Path | None) -> Iterator[str]:
    """What is lost of the tokenizer in `assets`."""
    if assets is None or values["tokenizer.ggml.model"] in vocabulary.NONE:
        yield "no tokenizer is known for this model: the file has none, and llama.cpp will take only token ids"
        return
    with tempfile.TemporaryDirectory(prefix="cordee-gguf-") as directory:
        if (why := vocabulary.restore(values, Path(directory))) is not None:
            yield f"the tokenizer cannot be read back from the file: {why}"
        elif lost := vocabulary.compare_tokenizers(assets, Path(directory)):
            yield f"llama.cpp does not match tokens as {assets} does: {lost}"


def _keeps(name: str, rule: Rule, shape: Shape) -> bool:
    """llama.cpp computes with vectors, and chooses experts, in float32."""
    return not name.endswith("router.weight") and all(len(foreign) > 1 for foreign in rule.foreign_shapes(shape))


class GGUFSink(RuledSink):
    """A directory with a file of GGUF in the making. Of the assets only terms of use are copied."""

    patterns = TERMS

    def __init__(self, output: Output, plan: GGUFPlan):
        self.plan = plan
        super().__init__(output, plan.spec, plan.rules, plan.dtypes)

    def begin(self, folder: Path) -> None:
        self._path = folder / FILE
        self._offsets = create(self._path, self.plan.values, self.plan.tensors)
        if (factors := self.plan.factors) is not None:
            self.place(architecture.ROPE_FACTORS, tuple(factors.shape), factors.dtype).write(factors)

    def place(self, foreign: str, shape: Shape, dtype: torch.dtype) -> Destination:
        assert self.plan.tensors[foreign] == (shape, dtype), f"{foreign}: {shape}, {dtype}"
        return Destination(self._path, contiguous(self._offsets[foreign], shape, dtype))

    def finish(self) -> None:
        """Nothing: the file is laid out from the beginning."""
