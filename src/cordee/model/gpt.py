"""The decoder: embedding, layers, final norm, head.

Owns what is computed. Knows nothing of files, families, processes or optimizers; placement and memory techniques
enter through the seams: parameter axes, the layer span and the `placement` of every module."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cordee.log import logger
from cordee.model.balance import Balance
from cordee.model.bound import Binding, Unsupported, require_known, require_plain, row_index
from cordee.model.cache import Cache
from cordee.model.config import AttentionConfig, ModelConfig
from cordee.model.head import Head, ValueHead
from cordee.model.inputs import Context, Inputs, ModelPlacement
from cordee.model.layer import Layer
from cordee.model.linear import Embedding, factory_kwargs
from cordee.model.low_rank import add_low_rank
from cordee.model.norm import Norm
from cordee.model.parameter import parameter_specs
from cordee.model.placement import altered
from cordee.model.span import Span
from cordee.model.specs import Specs, table
from cordee.ops.dropout import DropoutRNG

Output = Callable[[Head, Tensor], Any]

# What may be set of a model that has a fused decode path; all that concerns the head alone is the head's.
_BOUND = """vocab_size hidden_size max_position_embeddings layers final_norm learned_positions tie_word_embeddings
    norm_head logit_scale logit_softcap embedding_dropout attention_dropout hidden_dropout init_std score"""


class GPTModel(nn.Module):
    """A decoder-only transformer. Parameters are left unset: fill them with `initialise` or from a checkpoint.

    It builds what `spans` name, without them everything; a forward runs one of these. Parameters have the same names
    whatever is built. A head that is tied to an embedding of another process has a copy of it, under its name."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        spans: Sequence[Span] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.placement = ModelPlacement()
        self.config = config
        self.spans = tuple(spans) or (Span(0, config.num_layers),)
        factory = factory_kwargs(device, dtype)
        if self.has_embedding or self.copies_embedding:
            self.embedding = Embedding(table(config, "vocab", config.vocab_size), **factory)
        if self.has_embedding:
            if config.learned_positions:
                positions = table(config, "position", config.max_position_embeddings)
                self.position_embedding = Embedding(positions, **factory)
            if config.embedding_norm is not None:
                self.embedding_norm = Norm(config.embedding_norm, config.hidden_size, **factory)
        self.layers = nn.ModuleDict(
            {str(i): Layer(config.layers[i], config, i, **factory) for span in self.spans for i in span.layers}
        )
        if self.has_head:
            self.final_norm = Norm(config.final_norm, config.hidden_size, **factory)
            if config.score:
                self.score = ValueHead(config, **factory)
            self.head = Head(config, self.score.forward if config.score else None, **factory)
            if config.tied_head:
                self.head.weight = self.embedding.weight
        add_low_rank(self, config, {"embedding"} if self.copies_embedding else set(), **factory)
        self._inputs = Inputs(config)
        if any(isinstance(a := layer.attention, AttentionConfig) and a.softcap is not None for layer in config.layers):
            logger.info("attention scores have a softcap, which torch's fused attention lacks: a slower one does it")

    @property
    def has_embedding(self) -> bool:
        return any(span.embedding for span in self.spans)

    @property
    def has_head(self) -> bool:
        return any(span.head for span in self.spans)

    @property
    def copies_embedding(self) -> bool:
        """Whether the rows of the head are a copy of an embedding that another process has."""
        return self.config.tied_head and self.has_head and not self.has_embedding

    def forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        balance: Balance | None = None,
        dropout_rng: DropoutRNG | None = None,
        output: Output | None = None,
        span: Span | None = None,
    ) -> Any:
        """Logits `[batch, seq, vocab]`, of a reward model scores `[batch, seq]`, or what `output(head, hidden)` makes
        of the last hidden states.

        `inputs` are token ids int64 `[batch, seq]`; for a span without embedding, hidden states `[batch, seq, embed]`.
        `attention_mask` `[batch, seq]` is 1 at real tokens and 0 at padding; positions then count real tokens.
        `segments` int64 `[batch, seq]` number documents that must not see each other. With a `cache` each row of the
        inputs continues what its row of the cache holds. `balance` collects the auxiliary losses of MoE layers.
        In training `dropout_rng` seeds dropout (None: torch's random numbers do). A span without head returns
        hidden states. `span` is the one to run of those that were built, needed where there are several. Hidden states
        that are only a part of a sequence, as between tensor-parallel ranks, need its `position_ids`."""
        if span is None:
            (span,) = self.spans
        tokens, context = self._inputs.prepare(
            inputs, attention_mask, position_ids, segments, cache, balance, dropout_rng, self.training, self.placement
        )
        hidden = self._embed(tokens, context) if span.embedding else tokens
        for index in map(str, span.layers):
            hidden = self.layers[index](hidden, context)
        if cache is not None:
            hidden = hidden[:, -inputs.shape[1] :]  # others were computed anew for the cache
        if not span.head:
            return hidden
        hidden = self.final_norm(hidden)
        if output is not None:
            return output(self.head, hidden)
        return self.head.logits(hidden) if self.config.lm_head else self.head.scores(hidden)

    def bind(self, rows: int, max_length: int) -> Callable[[Tensor, Cache], Tensor]:
        """The fused decode path (see `bound.py`) for about so many rows: tokens int64 `[batch]` and the cache that they
        continue, to logits `[batch, vocab]`. Raises `Unsupported` if the model has none."""
        require_known(self.config, _BOUND)
        require_plain(self, type(self), "embedding position_embedding layers final_norm head score")
        if (why := altered(self)) is not None:
            raise Unsupported(why)
        if type(self).forward is not GPTModel.forward:
            raise Unsupported("it has a forward of its own")
        if not (self.has_embedding and self.has_head) or len(self.own_layers()) < len(self.layers):
            raise Unsupported("its layers are not all here")
        table = self.embedding.bind()
        positions = self.position_embedding.bind() if self.config.learned_positions else None
        binding = Binding(rows, max_length, table.device)
        layers = [layer.bind(binding) for layer in self.own_layers()]
        final_norm, head = self.final_norm.bind(), self.head

        def step(tokens: Tensor, cache: Cache) -> Tensor:
            now = binding.step(cache.extend(1, None, tokens.device))
            x = F.embedding(tokens, table)  # [batch, embed]
            if positions is not None:
                x = x + positions[row_index(now.step)]
            for layer in layers:
                x = layer(x, now)
            return head.logits(final_norm(x))

        return step

    def own_layers(self) -> list[Layer]:
        """The layers that were built, in order."""
        return [layer for layer in self.layers.values() if isinstance(layer, Layer)]

    def parameter_specs(self) -> Specs:
        """Spec of every parameter by canonical name."""
        return parameter_specs(self)

    def _embed(self, input_ids: Tensor, context: Context) -> Tensor:
        hidden = self.embedding(input_ids)
        if self.config.embedding_scale != 1.0:
            # Rounded to the type of the model, as Gemma was trained.
            hidden = hidden * torch.tensor(self.config.embedding_scale, dtype=hidden.dtype).item()
        if self.config.learned_positions:
            hidden = hidden + self.position_embedding(context.positions.ids)
        if self.config.embedding_norm is not None:
            hidden = self.embedding_norm(hidden)
        return context.drop(hidden, self.config.embedding_dropout, "embedding", residual=True)
