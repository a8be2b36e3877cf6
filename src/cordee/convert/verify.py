"""Whether what was written is what was read.

Owns the comparison of two sources: every tensor bit for bit, by slices, what the models compute, and token ids."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cordee import device
from cordee.errors import Problem, ProblemError, raise_all
from cordee.families.count import count_parameters
from cordee.model.gpt import GPTModel
from cordee.tokenizer import holds_tokenizer
from cordee.weights.codec import Source, slices
from cordee.weights.load import load_into

PROMPT_LENGTH = 16
TOLERANCE = 1e-3  # of logits, where weights differ by roundings
ROUNDING = 4  # roundings by which computed values may differ


def verify(source: Source, written: Source, dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """Compare `written` with `source` in the types of `dtypes`; what was found, in words.

    ProblemError if they differ."""
    problems = [
        Problem(name, None, f"what was written differs from what was read: {why}", "convert again; check the disk")
        for name in source.names()
        if (why := _difference(source, written, name, dtypes[name])) is not None
    ]
    raise_all(problems)
    how = "bit for bit" if source.exact else "up to a rounding"
    notes = [f"verified: {len(source.names())} tensors are {how} what was read"]
    needed, available = 8 * count_parameters(source.spec.config), device.available_memory()
    if needed > available:
        return [*notes, f"logits not compared: that takes {needed:,} bytes of memory, {available:,} are available"]
    length = min(PROMPT_LENGTH, *(model.spec.config.max_position_embeddings for model in (source, written)))
    expected, found = _logits(source, dtypes, length), _logits(written, dtypes, length)
    difference = float((expected - found).abs().max())
    if difference > (0 if source.exact else TOLERANCE * float(expected.abs().max())):
        why = f"the logits of what was written differ by up to {difference:g}, though all tensors are the same"
        raise_all([Problem("model", None, why, "compare the config.json of the two")])
    return [*notes, f"verified: the logits of {length} tokens are the same"]


def verify_tokenizer(source: Path | None, made: Path | None, compare: Callable[[Path, Path], str | None]) -> list[str]:
    """`compare` the tokenizers in two directories; what was found, in words. Without one of the two there is nothing to
    compare.

    ProblemError if they differ."""
    if source is None or made is None or not holds_tokenizer(source):
        return []
    if (why := compare(source, made)) is not None:
        fix = "choose another format, or give its reader the ids that the model's own tokenizer makes"
        raise ProblemError.of("tokenizer", source, why, fix)
    return ["verified: texts with added tokens have the same token ids"]


def _difference(source: Source, written: Source, name: str, dtype: torch.dtype) -> str | None:
    if name not in written.names() or written.shape(name) != source.shape(name):
        return "it is missing or has another shape"
    if written.dtype(name) != dtype:
        return f"its type is {written.dtype(name)}"
    expected_view, found_view = source.view(name), written.view(name)
    for index in slices(source.shape(name), dtype.itemsize):
        expected, found = expected_view.read(index).to(dtype), found_view.read(index)
        if not _equal(expected, found, source.exact):
            return "its values are others"
    return None


def _equal(expected: Tensor, found: Tensor, exact: bool) -> bool:
    """Bit for bit, or for values that are computed, up to a rounding."""
    if torch.equal(_bits(expected), _bits(found)):
        return True
    if exact or not expected.numel():
        return False
    difference = (expected.float() - found.float()).abs().max()
    return bool(difference <= ROUNDING * torch.finfo(expected.dtype).eps * expected.abs().max())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _logits(source: Source, dtypes: Mapping[str, torch.dtype], length: int) -> Tensor:
    """Those of `length` tokens, in float32, of weights as `dtypes` hold them."""
    model = GPTModel(source.spec.config, device="meta").eval()
    load_into(model, source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameter.to(dtypes[name]))
        return model(torch.arange(length)[None] * 7 % source.spec.config.vocab_size)
