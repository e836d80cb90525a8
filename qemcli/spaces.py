"""Weight spaces: named tensors whose axes are named, and how a network is run from them.

    "0.weight": h1 x*      "0.bias": h1      "2.weight": y h1*      "fc.weight": y (h3 s)*

The same name twice is the same set of neurons; `*` marks the dual axis, the neurons read from.
`h1`, `h2`, ...
are hidden axes, whose order is a matter of taste; `x`, `y`, kernel taps `u v` and flattened
positions `s` are free.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from qemcli.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

HOMOGENEOUS = frozenset({"relu", "leaky_relu", "abs", "identity"})  # f(a x) = a f(x) for a > 0
ODD = frozenset({"tanh", "sin", "erf", "arctan", "identity"})  # f(-x) = -f(x)
ACTIVATIONS = HOMOGENEOUS | ODD | {"sigmoid", "gelu", "silu", "softplus", "elu"}


@dataclass(frozen=True)
class Axis:
    """One named axis; `dual` where its neurons are read from rather than written to."""

    name: str
    size: int
    dual: bool = False

    @property
    def hidden(self) -> bool:
        return self.name[0] == "h" and self.name[1:].isdigit()


@dataclass(frozen=True)
class NamedTensor:
    """A tensor of the space: its checkpoint key and, for each dimension, its axis or axes."""

    name: str
    dims: tuple[tuple[Axis, ...], ...]

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(axis for dim in self.dims for axis in dim)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(axis.size for axis in dim) for dim in self.dims)

    @property
    def unfolded(self) -> tuple[int, ...]:
        """The shape with composite dimensions taken apart: one entry an axis."""
        return tuple(axis.size for axis in self.axes)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return " ".join(_dim_text(dim) for dim in self.dims)


def _dim_text(dim: tuple[Axis, ...]) -> str:
    star = "*" if dim[0].dual else ""
    names = " ".join(axis.name for axis in dim)
    return f"({names}){star}" if len(dim) > 1 else f"{names}{star}"


@dataclass(frozen=True)
class Layer:
    """One affine map of a chain: `weight` is (rows, cols, taps) after folding, `bias` (rows) or
    absent."""

    weight: str
    bias: str | None
    rows: int
    cols: int
    taps: int = 1
    conv: bool = False


@dataclass(frozen=True)
class Forward:
    """How the network is run; enough to evaluate it as a function on a batch of inputs.

    stride, padding and pooling hold for every convolution; `junction` is what stands between the
    last convolution and the first dense layer. `known` is False where these were assumed, not read.
    """

    stride: int = 1
    padding: int = 0
    pooling: str = "none"  # none | max | average, 2x2 after each convolution
    junction: str = "none"  # none | pool | flatten
    w0: float = 1.0  # SIREN: sin(w0 (W x + b))
    offset: float = 0.0  # SIREN: added to the output
    axes: str = "ij"  # SIREN: the first coordinate is the row (ij) or the column (xy); "": unknown
    levels: tuple[float, float] = (-1.0, 1.0)  # SIREN: the outputs of black and of white
    image: tuple[int, ...] | None = (
        None  # (channels, height, width): a CNN's input, what an INR shows
    )
    known: bool = False


@dataclass(frozen=True)
class WeightSpace:
    """Named tensors with named axes, in the order of the network; a point of it is a dict of
    tensors.

    Attributes:
        family: mlp | cnn | siren.
        tensors: every tensor that is understood, layer by layer, weight before bias.
        layers: the chain of affine maps, input first.
        activation: a name of ACTIVATIONS, or None where it is not known (then only permutations
        are claimed).
        forward: how the network is run.
        skipped: (name, reason) of every tensor of the checkpoint that has no place here.
    """

    family: str
    tensors: tuple[NamedTensor, ...]
    layers: tuple[Layer, ...]
    activation: str | None = None
    forward: Forward = Forward()
    skipped: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {t.name: t.shape for t in self.tensors}

    @property
    def size(self) -> int:
        """The number of parameters D."""
        return sum(t.size for t in self.tensors)

    @property
    def hidden(self) -> dict[str, int]:
        """Hidden axes and their number of neurons, first layer first."""
        return {f"h{i}": layer.rows for i, layer in enumerate(self.layers[:-1], start=1)}

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.layers[0].cols, *(layer.rows for layer in self.layers))

    def __getitem__(self, name: str) -> NamedTensor:
        return next(t for t in self.tensors if t.name == name)

    def __str__(self) -> str:
        return "\n".join(f"{t.name}: {t}" for t in self.tensors)

    def fits(self, other: WeightSpace) -> bool:
        """True where `other` has the same chain of layers, whatever its tensors are called."""
        mine = [(la.rows, la.cols, la.taps, la.conv) for la in self.layers]
        return mine == [(la.rows, la.cols, la.taps, la.conv) for la in other.layers]

    def check(self, w: Mapping[str, Tensor]) -> None:
        """Raise InputError unless every tensor is there, as (batch, *shape)."""
        for t in self.tensors:
            if t.name not in w:
                raise InputError(f"tensor '{t.name}' is missing")
            if tuple(w[t.name].shape[1:]) != t.shape:
                got = tuple(w[t.name].shape[1:])
                raise InputError(
                    f"tensor '{t.name}' has shape {got}, the weight space says {t.shape}"
                )

    def flatten(self, w: Mapping[str, Tensor]) -> Tensor:
        """dict of (b, *shape) -> (b, D), tensors in the order of the space."""
        import torch

        return torch.cat([w[t.name].flatten(1) for t in self.tensors], dim=1)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """(b, D) -> dict of (b, *shape); views of `flat`."""
        parts = flat.split([t.size for t in self.tensors], dim=1)
        return {t.name: p.unflatten(1, t.shape) for t, p in zip(self.tensors, parts, strict=True)}

    def matrices(self, w: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Every layer as W (b, rows, cols, taps) and bias (b, rows); an absent bias reads as
        zeros."""
        pairs = []
        for la in self.layers:
            weight = w[la.weight].reshape(-1, la.rows, la.cols, la.taps)
            bias = w[la.bias] if la.bias else weight.new_zeros(len(weight), la.rows)
            pairs.append((weight, bias))
        return pairs

    def from_matrices(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The inverse of `matrices`; the bias of a layer that has none is dropped."""
        w: dict[str, Tensor] = {}
        for la, (weight, bias) in zip(self.layers, pairs, strict=True):
            w[la.weight] = weight.reshape(-1, *self[la.weight].shape)
            if la.bias:
                w[la.bias] = bias
        return w

    def to_json(self) -> str:
        """The space as JSON, as it stands in a safetensors header and in the index."""
        sizes = {axis.name: axis.size for t in self.tensors for axis in t.axes}
        taps = [[axis.size for axis in t.axes] for t in self.tensors]
        record = {
            "family": self.family,
            "tensors": {t.name: str(t) for t in self.tensors},
            "sizes": {n: s for n, s in sizes.items() if n[0] in "hxy"},
            "shapes": {t.name: shape for t, shape in zip(self.tensors, taps, strict=True)},
            "layers": [asdict(layer) for layer in self.layers],
            "activation": self.activation,
            "forward": asdict(self.forward),
        }
        return json.dumps(record)

    @classmethod
    def from_json(cls, text: str) -> WeightSpace:
        """Read what `to_json` wrote; raises InputError where it is not a weight space."""
        try:
            record = json.loads(text)
            shapes = record["shapes"]
            tensors = tuple(parse(n, a, shapes[n]) for n, a in record["tensors"].items())
            layers = tuple(Layer(**layer) for layer in record["layers"])
            forward = dict(record["forward"])
            forward["image"] = tuple(forward["image"]) if forward.get("image") else None
            forward["levels"] = tuple(forward.get("levels", Forward.levels))
            return cls(record["family"], tensors, layers, record["activation"], Forward(**forward))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(f"'qem.space' is not a weight space: {error}") from None

    def running(self, activation: str | None = None, **forward: object) -> WeightSpace:
        """The same tensors with another activation or another way of running them."""
        changed = replace(self.forward, **forward) if forward else self.forward  # type: ignore[arg-type]
        return replace(self, activation=activation or self.activation, forward=changed)


def parse(name: str, pattern: str, sizes: Iterable[int]) -> NamedTensor:
    """Read the notation: `parse("fc.weight", "y (h3 s)*", [10, 16, 4])`, one size an axis."""
    left = iter(sizes)
    dims = []
    for word in re.findall(r"\([^)]*\)\*?|\S+", pattern):
        inner = word.rstrip("*").strip("()").split()
        dims.append(tuple(Axis(n, next(left), word.endswith("*")) for n in inner))
    return NamedTensor(name, tuple(dims))


def chain(
    layers: Sequence[Layer],
    family: str,
    kernels: Mapping[str, tuple[int, int]] | None = None,
    activation: str | None = None,
    forward: Forward = Forward(),
) -> WeightSpace:
    """The weight space of a chain of affine maps; `kernels` gives (height, width) of each
    convolution."""
    tensors: list[NamedTensor] = []
    for i, la in enumerate(layers, start=1):
        row = Axis("y" if i == len(layers) else f"h{i}", la.rows)
        col = Axis("x" if i == 1 else f"h{i - 1}", la.cols, dual=True)
        if la.conv:
            height, width = (kernels or {})[la.weight]
            dims: tuple[tuple[Axis, ...], ...] = (
                (row,),
                (col,),
                (Axis("u", height),),
                (Axis("v", width),),
            )
        elif la.taps > 1:
            dims = ((row,), (col, Axis("s", la.taps, dual=True)))
        else:
            dims = ((row,), (col,))
        tensors.append(NamedTensor(la.weight, dims))
        if la.bias:
            tensors.append(NamedTensor(la.bias, ((row,),)))
    return WeightSpace(family, tuple(tensors), tuple(layers), activation, forward)


def mlp(widths: Sequence[int], activation: str | None = "relu", bias: bool = True) -> WeightSpace:
    """A multilayer perceptron as `nn.Sequential` names it: `mlp([2, 5, 3])` has 0.weight ...
    2.bias."""
    layers = [
        Layer(f"{2 * i}.weight", f"{2 * i}.bias" if bias else None, rows, cols)
        for i, (cols, rows) in enumerate(pairwise(widths))
    ]
    return chain(layers, "mlp", activation=activation, forward=Forward(known=True))


# How the two published families of SIRENs map coordinates to pixels; settings of `Forward`.
CONVENTIONS: dict[str, dict[str, Any]] = {
    "nfn": {"offset": 0.0, "axes": "ij", "levels": (-1.0, 1.0)},
    "dws": {"offset": 0.5, "axes": "xy", "levels": (0.0, 1.0)},
}


def siren(
    widths: Sequence[int],
    w0: float = 30.0,
    convention: str = "nfn",
    image: tuple[int, ...] | None = None,
) -> WeightSpace:
    """A SIREN: sin(w0 (W x + b)) in every layer but the last, then the convention's offset is
    added. `image` is the (channels, height, width) that it shows."""
    run = Forward(w0=w0, image=image, known=True, **CONVENTIONS[convention])
    return replace(mlp(widths, "sin"), family="siren", forward=run)


def cnn(
    channels: Sequence[int],
    classes: int,
    kernel: int = 3,
    activation: str | None = "relu",
    positions: int = 1,
    forward: Forward | None = None,
) -> WeightSpace:
    """Convolutions, then global pooling (`positions` 1) or flattening, then one dense layer.

    `cnn([1, 16, 16, 16], 10)` is the Small CNN Zoo's 4,970 parameters.
    """
    names = [f"conv{i}" for i in range(1, len(channels))]
    layers = [
        Layer(f"{n}.weight", f"{n}.bias", rows, cols, kernel * kernel, conv=True)
        for n, cols, rows in zip(names, channels, channels[1:], strict=False)
    ]
    layers.append(Layer("fc.weight", "fc.bias", classes, channels[-1], positions))
    junction = "pool" if positions == 1 else "flatten"
    kernels = {f"{n}.weight": (kernel, kernel) for n in names}
    run = forward or Forward(padding=kernel // 2, junction=junction, known=True)
    return chain(layers, "cnn", kernels, activation, run)
