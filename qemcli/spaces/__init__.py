"""Weight spaces: named tensors whose axes are named, and how a network is run from them.

    "0.weight": h1 x*      "0.bias": h1      "2.weight": y h1*      "fc.weight": y (h3 s)*

The same name twice is the same set of neurons; `*` marks the dual axis, the neurons read from.
`h1`, `h2`, ... are hidden axes, whose order is a matter of taste; `x`, `y`, kernel taps `u v` and
flattened positions `s` are free. One module a kind of space: chains of affine
maps, chains with residual sums, transformers, and networks that are listed without being
understood.
"""

from qemcli.spaces._notation import Axis, NamedTensor, parse
from qemcli.spaces._space import ACTIVATIONS, HOMOGENEOUS, ODD, WeightSpace
from qemcli.spaces.chain import CONVENTIONS, Chain, Forward, Layer, chain, chain_of, cnn, mlp, siren
from qemcli.spaces.opaque import Opaque, opaque
from qemcli.spaces.residual import Layered, Residual, layered_of, residual
from qemcli.spaces.transformer import (
    FROZEN,
    ROLES,
    Block,
    Place,
    Rotary,
    Style,
    Transformer,
    small_transformer,
    transformer_of,
)

__all__ = [
    "ACTIVATIONS",
    "CONVENTIONS",
    "FROZEN",
    "HOMOGENEOUS",
    "ODD",
    "ROLES",
    "Axis",
    "Block",
    "Chain",
    "Forward",
    "Layer",
    "Layered",
    "NamedTensor",
    "Opaque",
    "Place",
    "Residual",
    "Rotary",
    "Style",
    "Transformer",
    "WeightSpace",
    "chain",
    "chain_of",
    "cnn",
    "layered_of",
    "mlp",
    "opaque",
    "parse",
    "residual",
    "siren",
    "small_transformer",
    "transformer_of",
]
