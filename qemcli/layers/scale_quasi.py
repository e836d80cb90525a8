"""The quasi layer on ScaleGMN's graph: a scale for every hidden neuron (and channel) of what enters
it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qemcli.layers.images import whole
from qemcli.layers.quasi import Layer
from qemcli.layers.scale_entry import Graph


def carried(layer: Layer, graph: Graph, w: Mapping[str, Tensor]) -> Graph:
    """Nodes times g_l, edges times g_l / g_{l-1}, and a second set of edges, which carries the
    reciprocal factors, divided by it: where g is one element of the group on all channels, this is
    its action on the graph."""
    features = graph.features()
    ones = [(torch.ones_like(e), torch.ones_like(x)) for e, x in features]
    ratios = layer(w, features, ones)
    pairs = list(zip(features, ratios, strict=True))
    nodes = [graph.nodes[0], *(x * g for (_, x), (_, g) in pairs)]
    edges = [e * g for (e, _), (g, _) in pairs]
    if graph.above is graph.edges:
        return Graph(nodes, [*edges], [*edges])
    above = [whole(e) / g for e, (g, _) in zip(graph.above, ratios, strict=True)]
    return Graph(nodes, [*edges], [*above])
