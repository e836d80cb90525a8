"""The weight space of a module, read from its graph (torch.fx), with how it is run: stride,
padding, pooling, what stands between the convolutions and the dense layers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.nn import functional as F

from qemcli.errors import UnsupportedError
from qemcli.spaces import Chain, Forward, Layer, chain

_ACTIVATIONS: dict[Any, str] = {
    nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid",
    nn.GELU: "gelu", nn.SiLU: "silu", nn.Softplus: "softplus", nn.ELU: "elu",
    torch.relu: "relu", F.relu: "relu", F.leaky_relu: "leaky_relu", torch.tanh: "tanh",
    F.tanh: "tanh", torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", F.gelu: "gelu", F.silu: "silu",
    F.softplus: "softplus", F.elu: "elu", torch.sin: "sin", torch.abs: "abs", torch.erf: "erf",
    torch.arctan: "arctan", torch.atan: "arctan", operator.abs: "abs",
    "relu": "relu", "tanh": "tanh", "sigmoid": "sigmoid", "sin": "sin", "abs": "abs", "erf": "erf",
    "arctan": "arctan", "atan": "arctan",
}  # fmt: skip
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d, F.dropout, F.dropout2d, "contiguous")
_MAX, _AVERAGE = (nn.MaxPool2d, F.max_pool2d), (nn.AvgPool2d, F.avg_pool2d)
_GLOBAL = (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d)
_FLATTEN = (nn.Flatten, torch.flatten, "flatten", "view", "reshape", torch.reshape)


@dataclass
class _Walk:
    """What was met on the way from the input to the output."""

    module: nn.Module
    layers: list[Layer] = field(default_factory=list)
    kernels: dict[str, tuple[int, int]] = field(default_factory=dict)
    steps: list[list[str]] = field(default_factory=lambda: [[]])  # between two layers, in order
    convolutions: set[tuple[int, int]] = field(default_factory=set)
    w0: set[float] = field(default_factory=set)
    factor: float | None = None
    offset: float = 0.0
    junction: str = "none"

    def refuse(self, what: str, reason: str) -> NoReturn:
        raise UnsupportedError(
            f"'{what}': {reason}", "qem acts on chains of Linear and Conv2d, one activation"
        )


def trace(module: nn.Module, image: tuple[int, ...] | None = None) -> Chain:
    """The weight space of a module that is a chain of Linear and Conv2d layers.

    `image` is the (channels, height, width) that a CNN reads, if known. Raises UnsupportedError
    that names the first thing it does not understand.
    """
    try:
        graph = fx.Tracer().trace(module)
    except (fx.proxy.TraceError, TypeError, RuntimeError, ValueError) as error:
        raise UnsupportedError(
            f"{type(module).__name__} cannot be traced: {str(error).splitlines()[0][:100]}",
            "its forward must not depend on the values of its input",
        ) from None
    walk = _Walk(module)
    for node in _line(graph, walk):
        _step(walk, node)
    return _space(walk, image)


def _line(graph: fx.Graph, walk: _Walk) -> list[fx.Node]:
    """The nodes that carry the signal, each read by the next alone."""
    sizes = ("size", "dim")
    nodes = [n for n in graph.nodes if not _is_size(n, sizes)]
    if sum(n.op == "placeholder" for n in nodes) != 1:
        walk.refuse(type(walk.module).__name__, "it has more than one input")
    for before, node in pairwise(nodes):
        users = [u for u in before.users if not _is_size(u, sizes)]
        if users != [node]:
            walk.refuse(before.name, "it is read more than once: a branch or an addition")
    return [n for n in nodes if n.op not in ("placeholder", "output")]


def _is_size(node: fx.Node, sizes: tuple[str, ...]) -> bool:
    """x.size(0), x.shape[0]: asked of the batch, not computed from the signal."""
    if node.op == "call_method" and node.target in sizes:
        return True
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] == "shape"
    reads = [n for n in node.all_input_nodes]
    getter = node.op == "call_function" and node.target is operator.getitem
    return getter and bool(reads) and _is_size(reads[0], sizes)


def _step(walk: _Walk, node: fx.Node) -> None:
    if node.op == "call_module":
        called: Any = walk.module.get_submodule(str(node.target))
        kind: Any = type(called)
    elif node.op in ("call_function", "call_method"):
        called, kind = None, node.target
    else:
        walk.refuse(node.name, "a parameter that is used outside of a layer")
    for known, act in _RULES:
        if kind in known:
            return act(walk, node, called)
    walk.refuse(str(node.target), f"{getattr(kind, '__name__', kind)} is not supported")


def _linear(walk: _Walk, node: fx.Node, layer: nn.Linear) -> None:
    name, taps = str(node.target), 1
    if walk.layers and walk.layers[-1].conv:
        channels = walk.layers[-1].rows
        taps = layer.in_features // channels
        if layer.in_features % channels or walk.junction not in ("pool", "flatten"):
            walk.refuse(name, "neither a global pooling nor a flatten stands before it")
        if walk.junction == "pool" and taps != 1:
            walk.refuse(name, "it reads more than one number a channel after global pooling")
    _add(walk, name, layer, layer.out_features, layer.in_features // taps, taps, False)


def _conv(walk: _Walk, node: fx.Node, layer: nn.Conv2d) -> None:
    name = str(node.target)
    if layer.groups != 1:
        walk.refuse(name, f"a grouped convolution ({layer.groups} groups)")
    if layer.dilation != (1, 1) or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        walk.refuse(name, "dilation and paddings other than a number of zeros are not supported")
    if len({*layer.stride}) > 1 or len({*layer.padding}) > 1:
        walk.refuse(name, "its stride or padding differs between the two directions")
    walk.convolutions.add((layer.stride[0], layer.padding[0]))
    height, width = layer.kernel_size
    walk.kernels[f"{name}.weight"] = (height, width)
    _add(walk, name, layer, layer.out_channels, layer.in_channels, height * width, True)


def _add(
    walk: _Walk, name: str, layer: nn.Module, rows: int, cols: int, taps: int, conv: bool
) -> None:
    if any(la.weight == f"{name}.weight" for la in walk.layers):
        walk.refuse(name, "it is used twice: tied layers")
    bias = f"{name}.bias" if layer.bias is not None else None
    walk.layers.append(Layer(f"{name}.weight", bias, rows, cols, taps, conv))
    walk.steps.append([])


def _activation(walk: _Walk, node: fx.Node, layer: nn.Module | None) -> None:
    name = _ACTIVATIONS[type(layer) if layer is not None else node.target]
    slope = getattr(layer, "negative_slope", node.kwargs.get("negative_slope", 0.01))
    plain = getattr(layer, "approximate", node.kwargs.get("approximate", "none")) == "none"
    unit = getattr(layer, "alpha", 1.0) == 1.0 and getattr(layer, "beta", 1.0) == 1.0
    if (name == "leaky_relu" and slope != 0.01) or not plain or not unit:
        walk.refuse(str(node.target), f"a {name} with other settings than torch's defaults")
    if layer is None and len(node.args) > 1:
        walk.refuse(str(node.target), f"a {name} with settings")
    if name == "sin":
        walk.w0.add(walk.factor or 1.0)
    elif walk.factor is not None:
        walk.refuse(str(node.target), "a factor before an activation other than sin")
    walk.factor = None
    walk.steps[-1].append(name)


def _pool(walk: _Walk, node: fx.Node, layer: nn.Module | None) -> None:
    given = dict(zip(("kernel_size", "stride", "padding"), node.args[1:], strict=False))
    setting = {**given, **node.kwargs} if layer is None else vars(layer)
    size, stride = setting.get("kernel_size"), setting.get("stride")
    odd = setting.get("padding", 0) not in (0, (0, 0)) or setting.get("ceil_mode", False)
    if size not in (2, (2, 2)) or stride not in (None, 2, (2, 2)) or odd:
        walk.refuse(str(node.target), "a pooling other than 2 x 2")
    kind = type(layer) if layer is not None else node.target
    walk.steps[-1].append("max" if kind in _MAX else "average")


def _global(walk: _Walk, node: fx.Node, layer: nn.Module | None) -> None:
    size = node.args[1] if layer is None else layer.output_size
    if size not in (1, (1, 1)):
        walk.refuse(str(node.target), "an adaptive pooling to more than one position")
    walk.junction = "pool"


def _mean(walk: _Walk, node: fx.Node, layer: None) -> None:
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    listed = sorted(d % 4 for d in dims) if isinstance(dims, tuple | list) else []
    if listed != [2, 3]:
        walk.refuse(str(node.target), "a mean over something else than height and width")
    walk.junction = "pool"


def _flatten(walk: _Walk, node: fx.Node, layer: nn.Flatten | None) -> None:
    good: Any
    if layer is not None:
        good = layer.start_dim == 1 and layer.end_dim == -1
    elif node.target in (torch.flatten, "flatten"):
        good = node.kwargs.get("start_dim", (*node.args[1:], 0)[0]) == 1 and len(node.args) < 3
    else:
        shape = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
        good = len(shape) == 2 and shape[1] == -1
    if not good:
        walk.refuse(str(node.target), "a reshape other than flatten(1)")
    if walk.layers and walk.layers[-1].conv and walk.junction == "none":
        walk.junction = "flatten"


def _nothing(walk: _Walk, node: fx.Node, layer: nn.Module | None) -> None:
    """Dropout and the like: not there once a network is trained."""


def _multiply(walk: _Walk, node: fx.Node, layer: None) -> None:
    factors = [a for a in node.args if isinstance(a, int | float)]
    if len(factors) != 1 or walk.factor is not None:
        walk.refuse(node.name, "a product that is not w0 before sin")
    walk.factor = float(factors[0])


def _plus(walk: _Walk, node: fx.Node, layer: None) -> None:
    terms = [a for a in node.args if isinstance(a, int | float)]
    if len(terms) != 1 or walk.steps[-1]:
        walk.refuse(node.name, "an addition: residual connections are not supported")
    walk.offset += float(terms[0])
    walk.steps[-1].append("offset")


_RULES: tuple[tuple[Any, Callable[..., None]], ...] = (
    ((nn.Linear,), _linear),
    ((nn.Conv2d,), _conv),
    (_ACTIVATIONS, _activation),
    (_NOTHING, _nothing),
    (_MAX + _AVERAGE, _pool),
    (_GLOBAL, _global),
    ((torch.mean, "mean"), _mean),
    (_FLATTEN, _flatten),
    ((operator.mul, torch.mul, "mul"), _multiply),
    ((operator.add, torch.add, "add"), _plus),
)


def _space(walk: _Walk, image: tuple[int, ...] | None) -> Chain:
    """Check that the same thing happens between all layers, and put the space together."""
    first, *between = walk.steps
    if not walk.layers:
        walk.refuse(type(walk.module).__name__, "it has no Linear and no Conv2d")
    if first or walk.factor is not None or len(walk.convolutions) > 1 or len(walk.w0) > 1:
        walk.refuse(type(walk.module).__name__, "its layers are not run in the same way")
    activation, pooling = _between(walk, between)
    (stride, padding) = next(iter(walk.convolutions), (1, 0))
    family = "cnn" if walk.kernels else "siren" if activation == "sin" else "mlp"
    w0 = next(iter(walk.w0), 1.0)
    run = (stride, padding, pooling, walk.junction, w0, walk.offset)
    forward = Forward(*run, image=image, known=True)
    return chain(walk.layers, family, walk.kernels, activation, forward)


def _between(walk: _Walk, between: list[list[str]]) -> tuple[str | None, str]:
    """(activation, pooling); the same after every hidden layer and nothing after the last."""
    if between[-1] not in ([], ["offset"]):
        walk.refuse(between[-1][0], "an activation or pooling after the last layer")
    activations, poolings = set(), set()
    for layer, steps in zip(walk.layers[:-1], between, strict=False):
        names = [s for s in steps if s not in ("max", "average")]
        pools = [s for s in steps if s in ("max", "average")]
        # A maximum commutes with an increasing activation, an average does not.
        late = not pools or pools == ["max"] or steps[-1] == pools[0]
        if len(names) != 1 or len(pools) > 1 or not late or "offset" in names:
            walk.refuse(layer.weight, f"after it comes {', '.join(steps) or 'no activation'}")
        activations.add(names[0])
        if pools == ["max"] and steps[0] == "max" and names[0] in ("abs", "sin", "gelu", "silu"):
            walk.refuse(layer.weight, f"a maximum before {names[0]}")
        if layer.conv:
            poolings.add(pools[0] if pools else "none")
        elif pools:
            walk.refuse(layer.weight, "pooling after a dense layer")
    if len(activations) > 1 or len(poolings) > 1:
        found = ", ".join(sorted(activations | poolings))
        walk.refuse(type(walk.module).__name__, f"its layers are not run in the same way: {found}")
    return next(iter(activations), None), next(iter(poolings), "none")
