"""megatron-core on the CPU: what it makes of a checkpoint, and checkpoints that it writes.

To be run in the workers of `tests.pool`, one for each tensor rank. The model is built from the settings in the
checkpoint, as Megatron does it.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing.dummy
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextlib.contextmanager
def on_cpu(world_size: int) -> Iterator[None]:
    """megatron-core's groups, and its questions for the current device answered."""
    tracker = mock.Mock(fork=contextlib.nullcontext)  # of random states for dropout, which is off
    with warnings.catch_warnings(), contextlib.ExitStack() as patches:
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state

        patches.enter_context(mock.patch("torch.cuda.current_device", return_value="cpu"))
        patches.enter_context(mock.patch("megatron.core.tensor_parallel.get_cuda_rng_tracker", return_value=tracker))
        # Without Transformer Engine these are asked for all the same: None as a class, and a name that is not there.
        patches.enter_context(mock.patch("megatron.core.transformer.multi_latent_attention.TELinear", LatentCore))
        patches.enter_context(mock.patch("megatron.core.transformer.moe.moe_utils.te_general_gemm", None, create=True))
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()


class LatentCore(nn.Module):
    """Attention with values of another size than keys, which megatron-core's own has only with Transformer Engine."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **kwargs):
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs) -> Tensor:
        """[seq, batch, heads, dim] to [seq, batch, heads * dim of values]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return y.permute(2, 0, 1, 3).flatten(2)


def build(args: Namespace, tensor: int, **more) -> nn.Module:
    """The model that the settings of a checkpoint describe."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    latent = getattr(args, "multi_latent_attention", False)
    moe = getattr(args, "num_experts", None)
    values = {
        "num_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "ffn_hidden_size": args.ffn_hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "num_query_groups": args.num_query_groups,
        "kv_channels": args.kv_channels,
        "normalization": args.normalization,
        "layernorm_epsilon": args.norm_epsilon,
        "gated_linear_unit": args.swiglu,
        "activation_func": F.silu if args.swiglu else gelu_tanh if args.openai_gelu else F.gelu,
        "add_bias_linear": args.add_bias_linear,
        "add_qkv_bias": getattr(args, "add_qkv_bias", False),
        "qk_layernorm": getattr(args, "qk_layernorm", False),
        "tensor_model_parallel_size": tensor,
        "use_cpu_initialization": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
    }
    if moe:
        values |= {
            "num_moe_experts": moe,
            "moe_router_topk": args.moe_router_topk,
            "moe_router_pre_softmax": args.moe_router_pre_softmax,
            "moe_router_score_function": args.moe_router_score_function,
            "moe_router_load_balancing_type": "none",
            "moe_layer_freq": args.moe_layer_freq,
            "moe_ffn_hidden_size": args.moe_ffn_hidden_size,
            "moe_shared_expert_intermediate_size": args.moe_shared_expert_intermediate_size,
            "moe_token_dispatcher_type": "allgather",
        }
    if latent:
        values |= {
            "q_lora_rank": args.q_lora_rank,
            "kv_lora_rank": args.kv_lora_rank,
            "qk_head_dim": args.qk_head_dim,
            "qk_pos_emb_head_dim": args.qk_pos_emb_head_dim,
            "v_head_dim": args.v_head_dim,
            "rope_type": "rope",
            "rotary_base": args.rotary_base,
            "multi_latent_attention": True,
            "apply_rope_fusion": False,
        }
    config = (MLATransformerConfig if latent else TransformerConfig)(**{**values, **more})
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=args.normalization)
    if latent:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = LatentCore
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        parallel_output=False,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=getattr(args, "rotary_base", 10000),
    ).eval()


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    causal = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    return model(ids, positions, causal)


def loaded_logits(rank: int, world_size: int, path: Path, ids: Tensor) -> Tensor:
    """What megatron-core computes with a checkpoint, which it must take with nothing missing and nothing left."""
    with on_cpu(world_size):
        file = path / "iter_0000001" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        content = torch.load(file, map_location="cpu", weights_only=False)
        model = build(content["args"], world_size)
        model.load_state_dict(content["model"], strict=True)
        return logits(model, ids)


def save(
    rank: int,
    world_size: int,
    path: Path,
    args: Namespace,
    ids: Tensor | None,
    together: Path | None = None,
    metadata: dict[str, object] | None = None,
) -> Tensor | None:
    """Write random weights as Megatron does; what it computes with them.

    together: where all ranks write them as one checkpoint of `torch_dist` besides, in the form that `metadata` asks.
    """
    with on_cpu(world_size):
        model = build(args, world_size)
        generator = torch.Generator().manual_seed(7 + rank)
        shared = torch.Generator().manual_seed(5)
        for parameter in model.parameters():
            source = generator if getattr(parameter, "tensor_model_parallel", False) else shared
            scale = 0.3 / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 0.1
            offset = 1.0 if parameter.ndim == 1 and parameter.min() > 0.5 else 0.0
            parameter.data = offset + torch.randn(parameter.shape, generator=source) * (5 * scale)
        folder = path / "iter_0000005" / f"mp_rank_{rank:02d}"
        folder.mkdir(parents=True)
        content = {
            "args": args,
            "checkpoint_version": 3.0,
            "iteration": 5,
            "model": model.state_dict_for_save_checkpoint(),
        }
        torch.save(content, folder / "model_optim_rng.pt")
        (path / "latest_checkpointed_iteration.txt").write_text("5")
        if together is not None:
            _save_together(together, {**content, "model": model}, metadata or {})
        return None if ids is None else logits(model, ids)


def _save_together(path: Path, content: dict[str, object], metadata: dict[str, object]) -> None:
    """Threads write, since workers of the pool may have no processes of their own."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    model = content["model"].sharded_state_dict(metadata={**metadata, "dp_cp_group": group})
    folder = path / "iter_0000005"
    folder.mkdir(parents=True, exist_ok=True)
    (path / "latest_checkpointed_iteration.txt").write_text("5")
    writer = "megatron.core.dist_checkpointing.strategies.filesystem_async.mp.get_context"
    with mock.patch("torch.cuda.synchronize"), mock.patch(writer, lambda kind: multiprocessing.dummy):
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
        dist_checkpointing.save({**content, "model": model}, str(folder), strategy)
