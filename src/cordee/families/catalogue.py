"""The output of `cordee models`: a row per preset and the page of one model. Knows no torch."""

from dataclasses import dataclass

from cordee.families import count as counting
from cordee.families.lenses import FORM, features_of
from cordee.families.registry import families, spec_from_preset
from cordee.model.config import ModelConfig, MoEConfig


@dataclass(frozen=True)
class Row:
    """One preset: its family, parameters, longest sequence in tokens, and the licence of its published weights."""

    family: str
    preset: str
    parameters: int
    context: int
    licence: str


def describe() -> list[Row]:
    """All presets, by family and then as the family lists them."""
    rows = []
    for family in families().values():
        for name, preset in family.presets.items():
            config = spec_from_preset(name).config
            count, context = counting.count_parameters(config), config.max_position_embeddings
            rows.append(Row(family.name, name, count, context, preset.licence))
    return rows


def show(name: str) -> list[tuple[str, str]]:
    """The page of preset `name`, as pairs of a label and a value. ProblemError if there is no such preset."""
    spec = spec_from_preset(name)
    config = spec.config
    seq_length = config.max_position_embeddings
    moe = dict(_moe(config))
    features = {name: str(value) for name, value in features_of(config).items() if name not in moe}
    flops = counting.training_flops_per_token(config, seq_length)
    return [
        ("family", spec.family.name),
        ("architecture", spec.hf_config["architectures"][0]),
        ("licence", spec.family.presets[name].licence),
        *((name, str(lens.get(config))) for name, lens in FORM.items()),
        *features.items(),
        *moe.items(),
        ("tensors", str(len(counting.canonical_shapes(config)))),
        ("parameters", f"{counting.count_parameters(config):,}"),
        ("training FLOPs per token", f"{flops:,} at {seq_length} tokens a sample = {counting.FLOPS_FORMULA}"),
    ]


def _moe(config: ModelConfig) -> list[tuple[str, str]]:
    """The rows of an MoE model, whose MoE layers are alike."""
    layers = [layer.mlp for layer in config.layers if isinstance(layer.mlp, MoEConfig)]
    if not layers:
        return []
    moe = layers[-1]
    return [
        ("layers with experts", str(len(layers))),
        ("num_experts", str(moe.router.num_experts)),
        ("moe_router_topk", str(moe.router.top_k)),
        ("moe_ffn_hidden_size", str(moe.expert.ffn_hidden_size)),
        ("ffn_hidden_size of shared experts", str(moe.shared.ffn_hidden_size if moe.shared else 0)),
        ("matmul weights a token meets", f"{counting.matmul_parameters(config):,}"),
    ]
