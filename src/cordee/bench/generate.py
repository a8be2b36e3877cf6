"""`cordee bench generate`: the most likely continuation of one prompt, token by token, beside transformers.

Both load the same Llama from the same Hugging Face directory and write the same number of tokens with their caches. Two
sizes: the small one, on which calling modules costs most, and that of `cordee bench train`, which reads 92 MB of
weights for every token."""

import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cordee.bench.contest import Baton, Contender, Results, Shift, Turn, apart, hold
from cordee.bench.llama import save
from cordee.bench.options import BenchConfig
from cordee.bench.report import Report
from cordee.errors import ProblemError

PEERS = ()
STEPS = 3
PROMPT_TOKENS, NEW_TOKENS = 32, 128
CORDEE, PEER = "cordee", "transformers"
MODELS: dict[str, dict[str, int]] = {
    "small": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 704,
        "vocab_size": 4096,
    },
    "as in training": {},
}


def run(config: BenchConfig, on_turn: Callable[[int, str, Turn], None]) -> Report:
    """For each model let the contenders take turns of `config.steps` continuations."""
    steps = config.steps or STEPS
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for size, path in _models(config, Path(folder)):
            contenders = [Contender(name, play, (str(path), steps)) for name, play in ((CORDEE, ours), (PEER, theirs))]
            results[size] = hold(contenders, config.rounds, config.threads or 1, on_turn)
    return _report(config, results)


def _models(config: BenchConfig, folder: Path) -> Iterator[tuple[str, Path]]:
    """The models to measure and where they are: those of `MODELS`, made here, or the one that is given."""
    if config.load is not None:
        yield Path(config.load).name, Path(config.load)
        return
    for size, shape in MODELS.items():
        apart(save, str(folder / size), PROMPT_TOKENS + NEW_TOKENS, shape)
        yield size, folder / size


def ours(baton: Baton, folder: str, steps: int) -> None:
    from cordee.api import GPTModel

    model = GPTModel.from_pretrained(folder)
    _play(baton, steps, lambda prompt: model.generate(prompt, max_new_tokens=NEW_TOKENS))


def theirs(baton: Baton, folder: str, steps: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.eval()

    def write(prompt: list[int]) -> list[int]:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
        return ids[0, len(prompt) :].tolist()

    _play(baton, steps, write)


def _play(baton: Baton, steps: int, write: Callable[[list[int]], Sequence[int]]) -> None:
    prompt = list(range(100, 100 + PROMPT_TOKENS))
    shift = Shift(baton, steps)
    while not shift.over:
        written = write(prompt)
        if len(written) != NEW_TOKENS:
            why = f"it ends its text after {len(written)} tokens, and {NEW_TOKENS} are measured"
            raise ProblemError.of("--load", None, why, "give a model that goes on, or leave it out")
        shift.piece_done(fingerprint=zlib.crc32(repr(list(written)).encode()))


def _report(config: BenchConfig, results: dict[str, Results]) -> Report:
    rows, figures, notes = [], {}, []
    for size, found in results.items():
        for name in (CORDEE, PEER):
            speed, ratio = NEW_TOKENS / found.median(name), found.ratio(name, PEER)
            memory = f"{found.peak_bytes(name) / 2**20:,.0f} MiB"
            rows.append([f"{size}: {name}", f"{speed:,.0f}", f"{ratio:.2f}", memory])
            figures |= {f"{size}: {name}: tokens/s": speed, f"{size}: {name}: speed by transformers": ratio}
        if found.figure(CORDEE, "fingerprint") != found.figure(PEER, "fingerprint"):
            notes.append(f"{size}: the two write different tokens, where two are about as likely")
    notes += [
        f"{NEW_TOKENS} tokens after a prompt of {PROMPT_TOKENS}, batch 1, greedy, with cache, float32, "
        f"{config.threads} threads",
        f"{config.rounds} rounds of {config.steps or STEPS} continuations in turns, after a round that is not counted",
    ]
    if config.load is None:
        shapes = "4 layers, hidden 256, vocabulary 4096; as in training: 6 layers, hidden 384, vocabulary 32000"
        notes.append(f"small: Llama of {shapes}")
    columns = ["", "tokens/s", "x transformers", "peak memory"]
    return Report(title="Generation", columns=columns, rows=rows, figures=figures, notes=notes)
