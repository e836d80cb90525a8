"""A network of any architecture as one typed graph: its neurons, and blocks of edges between them.

    nodes   a set for every place that neurons stand in: (how many, type, layer number)
    edges   a block for every tensor: each of m sources to each of n targets, one edge a kernel tap
            beside the other; biases, gains and shifts of norms from a node of their own; sums with
            an earlier layer as edges of value 1, each neuron to its own

Sets and blocks follow from the named axes: the axis that a tensor writes and the one that it reads
are the sets, kernel taps and flattened positions are parallel edges. Blocks are dense, so every sum
over the edges of a node is a reduction over an axis, without gather or scatter.
Source of the graph: Lim et al., arXiv:2312.04501.
"""

from __future__ import annotations

from collections.abc import Sequence

from qemcli.errors import UnsupportedError
from qemcli.layers.drawing import EDGES, NODES, Drawing, Edges, Nodes, TypedGraph
from qemcli.layers.transformer_graph import of_transformer
from qemcli.spaces import Chain, Layer, Residual, Transformer, WeightSpace
from qemcli.spaces.residual import NONE

__all__ = ["EDGES", "NODES", "Edges", "Nodes", "TypedGraph", "typed_graph"]


def typed_graph(space: WeightSpace) -> TypedGraph:
    """The graph of an MLP, a CNN, a SIREN, one with residual sums, or a transformer.

    Raises UnsupportedError for every other network.
    """
    if isinstance(space, Chain):
        return _layered(space, space.layers, [NONE] * len(space.layers))
    if isinstance(space, Residual):
        return _layered(space, space.layers, space.added)
    if isinstance(space, Transformer):
        return of_transformer(space)
    raise UnsupportedError(
        f"no typed graph is known of {space.title}",
        "known: MLPs, CNNs, SIRENs, residual networks, transformers",
    )


def _layered(space: Chain | Residual, layers: Sequence[Layer], added: Sequence[int]) -> TypedGraph:
    """Layer by layer; what is added to layer l comes from the neurons of an earlier one."""
    drawing = Drawing(space, "uvs")
    sets = [drawing.stand(layers[0].cols, "input", 0, True)]
    for l, (layer, earlier) in enumerate(zip(layers, added, strict=True), start=1):
        last = l == len(layers)
        kind = "output" if last else space.activation or "unknown"
        sets.append(drawing.stand(layer.rows, kind, l, last))
        shape = "convolution" if layer.conv else "linear" if layer.taps == 1 else "flattened"
        drawing.tensor(layer.weight, shape, l, sets[-2], sets[-1])
        of_bias = "convolution-bias" if layer.conv else "linear-bias"
        drawing.vector(layer.bias, of_bias, l, sets[-1])
        if earlier != NONE:
            drawing.same("sum", l, sets[earlier + 1], sets[-1])
    return drawing.done()
