"""`python -m benchmarks gguf`: a model, and what llama.cpp makes of its export: logits, greedy text, speed.

The model of `--load`, else a random Llama, is exported as GGUF in float32. Both then compute the same prompts: how far
logits are apart, and how many tokens of the greedy continuation are the same before the first that is not. Then they
take turns in writing. llama.cpp keeps its keys and values in float32 too, which is not what it does by itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from cordee.bench.contest import Baton, Contender, Results, Shift, Turn, apart, hold, once
from cordee.bench.generate import CORDEE, NEW_TOKENS, PROMPT_TOKENS, STEPS
from cordee.bench.llama import save
from cordee.bench.options import BenchOptions
from cordee.bench.report import Report
from cordee.weights.gguf.codec import FILE

PEERS = ("gguf", "llama_cpp")
PEER = "llama.cpp"
LENGTH = PROMPT_TOKENS + NEW_TOKENS


def run(config: BenchOptions, on_turn: Callable[[int, str, Turn], None]) -> Report:
    """Export, compare, and let the contenders take turns of `config.steps` continuations."""
    steps, threads = config.steps or STEPS, config.threads or 1
    with tempfile.TemporaryDirectory() as folder:
        model, exported = config.load or f"{folder}/model", f"{folder}/exported"
        if config.load is None:
            apart(save, model, LENGTH, {})
        apart(export, model, exported)
        agreement = once(Contender("agreement", agree, (model, exported, threads)), threads)
        contenders = [Contender(CORDEE, ours, (model, steps)), Contender(PEER, theirs, (exported, steps, threads))]
        results = hold(contenders, config.rounds, threads, on_turn)
    return _report(config, agreement, results)


def export(model: str, to: str) -> None:
    from cordee.convert import job
    from cordee.convert.options import ConvertConfig

    job.run(ConvertConfig(load_dir=model, save_dir=to, save_model_type="gguf", params_dtype="float32"))


def agree(baton: Baton, model: str, exported: str, threads: int) -> None:
    """Logits after every token of our own greedy continuation, by both."""
    import numpy as np
    import torch

    loaded, peer = _load(model), _peer(exported, threads, logits_all=True)
    prompt = _prompt(loaded.config.vocab_size)
    baton.take()
    written, other = _ours(loaded, prompt), _theirs(peer, prompt)
    tokens = [*prompt, *written]
    peer.reset()
    peer.eval(tokens)
    with torch.no_grad():
        logits = loaded(torch.tensor([tokens]))[0].numpy()  # [seq, vocab]
    difference = float(np.abs(peer.scores[: len(tokens)] - logits).max())
    same = next((n for n in range(NEW_TOKENS) if written[n] != other[n]), NEW_TOKENS)
    baton.give([0.0], difference=difference, largest=float(np.abs(logits).max()), same=same)


def ours(baton: Baton, model: str, steps: int) -> None:
    loaded = _load(model)
    prompt = _prompt(loaded.config.vocab_size)
    _play(baton, steps, lambda: _ours(loaded, prompt))


def theirs(baton: Baton, exported: str, steps: int, threads: int) -> None:
    peer = _peer(exported, threads)
    prompt = _prompt(peer.n_vocab())
    _play(baton, steps, lambda: _theirs(peer, prompt))


def _prompt(vocab_size: int) -> list[int]:
    return [n % vocab_size for n in range(100, 100 + PROMPT_TOKENS)]


def _load(model: str) -> Any:
    from cordee.checkpoint import formats
    from cordee.generate.loading import load_model

    return load_model(formats.read(model), "float32", "cpu")


def _ours(model: Any, prompt: list[int]) -> list[int]:
    from cordee.generate import engine
    from cordee.generate.options import DecodingOptions

    return engine.generate(model, [prompt], DecodingOptions(max_new_tokens=NEW_TOKENS))[0]


def _peer(exported: str, threads: int, **more: Any) -> Any:
    llama_cpp: Any = import_module("llama_cpp")  # which only those who measure have
    kind = llama_cpp.GGML_TYPE_F32
    options = {"n_ctx": LENGTH, "n_threads": threads, "n_threads_batch": threads, "n_gpu_layers": 0, "verbose": False}
    return llama_cpp.Llama(str(Path(exported) / FILE), type_k=kind, type_v=kind, **options, **more)


def _theirs(peer: Any, prompt: list[int]) -> list[int]:
    return list(islice(peer.generate(prompt, temp=0.0), NEW_TOKENS))


def _play(baton: Baton, steps: int, write: Callable[[], Sequence[int]]) -> None:
    shift = Shift(baton, steps)
    while not shift.over:
        written = write()
        assert len(written) == NEW_TOKENS, f"{len(written)} tokens instead of {NEW_TOKENS}"
        shift.piece_done()


def _report(config: BenchOptions, agreement: Turn, results: Results) -> Report:
    rows, figures = [], dict(agreement.figures)
    for name in (CORDEE, PEER):
        speed, ratio = NEW_TOKENS / results.median(name), results.ratio(name, PEER)
        rows.append([name, f"{speed:,.0f}", f"{ratio:.2f}", f"{results.peak_bytes(name) / 2**20:,.0f} MiB"])
        figures |= {f"{name}: tokens/s": speed, f"{name}: speed by {PEER}": ratio}
    notes = [
        f"logits of {LENGTH} tokens, the largest {figures['largest']:.1f}, differ by up to {figures['difference']:.1e}",
        f"of {NEW_TOKENS} greedy tokens the first {figures['same']:.0f} are the same",
        f"{NEW_TOKENS} tokens after a prompt of {PROMPT_TOKENS}, batch 1, with cache, all in float32, {config.threads} "
        f"threads, model {config.load or 'as in bench train'}",
        f"{config.rounds} rounds of {config.steps or STEPS} continuations in turns, after a round that is not counted",
    ]
    columns = ["", "tokens/s", f"x {PEER}", "peak memory"]
    return Report(title="A model exported to llama.cpp", columns=columns, rows=rows, figures=figures, notes=notes)
