"""What an entry of families/ says of a family of transformers: names, storage, style."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

_EMPTY: Mapping[str, str] = MappingProxyType({})
USUAL = MappingProxyType(  # what config.json calls the sizes in most families
    {
        "width": "hidden_size", "blocks": "num_hidden_layers", "heads": "num_attention_heads",
        "groups": "num_key_value_heads", "head": "head_dim", "ffn": "intermediate_size",
        "activation": "hidden_act",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A family of transformers, told from its names alone.

    Axes are those of spaces/transformer.py without the block's number. A map's axes are those of
    its weight; its bias, where there is one, has those that are not read (`*`).

    Attributes:
        name: as users read it.
        block: what a block's tensors begin with, `{}` for its number from 0.
        maps: name in the block -> (axes, role), or (axes, roles in the order of `c`) where fused.
        before: name -> axes of what stands before the blocks, in the order of the network.
        after: the same of what stands after; a dual axis that nothing writes is the stream.
        marks: tensors of block 0 that tell the family, one of them a query.
        prefixes: what may stand before most names.
        types: model_type in config.json.
        config: what config.json calls the sizes, where not as in USUAL.
        norm, placement, pairing: as Style and Rotary say them.
        rotated: the share of a head that is rotated where config.json does not say.
        head: the map that writes answers over the vocabulary, where embeddings can be tied to it.
        passed: patterns of tensors that are no weights -> why.
        activation: of the feed-forward, where config.json does not say.
    """

    name: str
    block: str
    maps: Mapping[str, tuple[str, str]]
    before: Mapping[str, str]
    after: Mapping[str, str]
    marks: tuple[str, ...]
    prefixes: tuple[str, ...] = ("",)
    types: tuple[str, ...] = ()
    config: Mapping[str, str] = field(default_factory=lambda: _EMPTY)
    norm: str = "layer"
    placement: str = "pre"
    pairing: str = "none"
    rotated: float = 1.0
    head: str = ""
    passed: Mapping[str, str] = field(default_factory=lambda: _EMPTY)
    activation: str | None = None

    def key(self, size: str) -> str:
        """What config.json calls a size."""
        return self.config.get(size, USUAL[size])
