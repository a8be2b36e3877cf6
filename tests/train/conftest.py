"""Models that several tests of tuning begin with."""

import pytest
import torch

from tests.train import tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    """Directories of a policy and of another model, whose likelihoods differ much."""
    from transformers import LlamaConfig, LlamaForCausalLM

    found = []
    for seed in (0, 1):  # the second, which is surer, is wrong about most that the first is
        torch.manual_seed(seed)
        shape = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
        shape |= {"intermediate_size": 48, "vocab_size": tiny.VOCAB, "max_position_embeddings": 32}
        model = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.15 + 0.1 * seed, tie_word_embeddings=False))
        found.append(str(tmp_path_factory.mktemp(f"model{seed}")))
        model.save_pretrained(found[-1])
    return found[0], found[1]
