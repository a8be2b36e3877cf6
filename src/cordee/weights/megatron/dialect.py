"""How the parameters of a checkpoint of Megatron are called.

Owns the form in which a dialect is written down: a table of names, and the few ways in which dialects lay parameters
out differently. The dialects themselves are data, each in its codec's file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from cordee.model.config import LayerConfig

Names = Mapping[str, str | tuple[str, ...]]

# How the experts of a layer are stored: each by itself, in two tensors for all of a rank, or numbered tensors.
Experts = Literal["sequential", "grouped", "numbered"]


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """Names by canonical name, and how parameters are laid out.

    names, layer_names: what a canonical module or parameter is called, outside of the layers and in a layer of given
        form. For a module, `{part}` is "weight" or "bias". Two names are for gate and up apart. What has no name
        cannot be stored.
    layer_prefix: what names in a layer begin with; `{n}` is the layer's number in its chunk.
    tied_head: name of the copy of the embedding that the last of several stages holds for a tied head.
    nested: beginnings of names that are dicts of their own in the file; "a.b" is a dict in a dict.
    experts: how experts are stored; `{e}` in their names is the expert's number on its rank.
    latent_split: whether the projections down to latent vectors are split over tensor ranks.
    shared_split: whether shared experts are.
    packed_latent: the queries' and the keys' projections from the residual stream are one tensor.
    tail_padding: rows that fill up the vocabulary repeat the last ones, instead of the very last."""

    title: str
    names: Names
    layer_names: Callable[[LayerConfig], Names]
    layer_prefix: str
    tied_head: str
    nested: tuple[str, ...] = ()
    experts: Experts = "sequential"
    latent_split: bool = True
    shared_split: bool = True
    packed_latent: bool = False
    tail_padding: bool = False

    def model_names(self, canonical: str) -> tuple[str, ...] | None:
        """Names of a parameter outside of the layers; None if it has none."""
        return _lookup(self.names, canonical)

    def names_in_layer(self, canonical: str, layer: LayerConfig, number: int) -> tuple[str, ...] | None:
        """Names of a parameter of `layer`, the `number`-th of a chunk; `canonical` is what follows `layers.{i}.`."""
        found = _lookup(self.layer_names(layer), canonical)
        prefix = self.layer_prefix.format(n=number)
        return None if found is None else tuple(prefix + name for name in found)

    def keys(self, name: str) -> tuple[str, ...]:
        """The keys, outermost first, under which a file's model holds the tensor `name`."""
        for start in sorted(self.nested, key=len, reverse=True):
            if name.startswith(f"{start}."):
                return (*start.split("."), name.removeprefix(f"{start}."))
        return (name,)


def _lookup(names: Names, canonical: str) -> tuple[str, ...] | None:
    module, _, part = canonical.rpartition(".")
    found = names.get(canonical) or names.get(module)
    if found is None:
        return None
    return tuple(name.replace("{part}", part) for name in ((found,) if isinstance(found, str) else found))
