"""Directories with a tiny model and its tokenizer, made by transformers and tokenizers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from cordee.generate.loading import load_model
from cordee.model.gpt import GPTModel
from cordee.weights import hf

TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high. "
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002 caf\u00e9 na\u00efve \U0001f600"
)
VOCAB_SIZE = 300
ROWS = 320  # of the models: more than there are tokens
SHAPES = {
    "Llama": {
        "vocab_size": ROWS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "GPT2": {
        "vocab_size": ROWS,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
}


def write_tokenizer(directory: Path, *, bos: bool = True) -> None:
    """A byte-level BPE of 300 tokens: <s> is 0 and, with `bos`, put before every text; </s> is 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 2, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>"} if bos else {"eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))


@dataclass(frozen=True)
class Folder:
    """A directory with a random model of transformers."""

    directory: Path

    def peer(self) -> torch.nn.Module:
        """The model as transformers has it."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.directory).eval()

    def model(self) -> GPTModel:
        """The model as Cordee has it."""
        return load_model(hf.read(self.directory))


def model_directory(kind: str, directory: Path, *, bos: bool = True, **changes: object) -> Folder:
    """A random model of transformers' `kind` ("Llama" or "GPT2") with a tokenizer, in `directory`."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SHAPES[kind], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms begin as constants, which would hide a mix-up
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(std=0.15)
    model.save_pretrained(directory)
    write_tokenizer(directory, bos=bos)
    return Folder(directory)
