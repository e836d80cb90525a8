"""Chains of affine maps with an activation between them: MLPs, CNNs and SIRENs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from qemcli.errors import UnsupportedError
from qemcli.spaces._notation import Axis, NamedTensor, parse
from qemcli.spaces._space import WeightSpace

if TYPE_CHECKING:
    from torch import Tensor


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


class Layered(WeightSpace):
    """Affine layers with an activation between them, whatever else joins them; its tensors stand
    layer by layer, weight before bias.

    Attributes:
        layers: the maps, input first; the last gives the answers.
        forward: how the network is run.
    """

    layers: tuple[Layer, ...]
    forward: Forward

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.layers[0].cols, *(layer.rows for layer in self.layers))

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axis that every layer writes: `h1`, `h2`, ..., and `y`, the last."""
        return (*(f"h{i}" for i in range(1, len(self.layers))), "y")

    def same_layers(self, other: Layered) -> bool:
        """True where `other` has the same maps, biases and kernels, whatever its tensors are
        called: then rows of one are rows of the other."""
        return self._maps == other._maps

    @property
    def _maps(self) -> list[tuple[Any, ...]]:
        return [
            (la.rows, la.cols, la.taps, la.conv, la.bias is None, *self[la.weight].unfolded[2:])
            for la in self.layers
        ]

    def matrices(self, w: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Every layer as W (b, rows, cols, taps) and bias (b, rows); an absent bias reads as
        zeros."""
        pairs = []
        for la in self.layers:
            weight = w[la.weight].reshape(-1, la.rows, la.cols, la.taps)
            bias = w[la.bias] if la.bias else weight.new_zeros(len(weight), la.rows)
            pairs.append((weight, bias))
        return pairs


@dataclass(frozen=True)
class Chain(Layered, kind="chain"):
    """A chain of affine maps; its tensors stand layer by layer, weight before bias.

    Attributes:
        layers: the chain of affine maps, input first.
        activation: a name of ACTIVATIONS, or None where it is not known (then only permutations
        are claimed).
        forward: how the network is run.
        skipped: (name, reason) of every tensor of the checkpoint that has no place here.
    """

    layers: tuple[Layer, ...]
    activation: str | None = None
    forward: Forward = Forward()
    skipped: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    @property
    def hidden(self) -> dict[str, int]:
        """Hidden axes and their number of neurons, first layer first."""
        return {f"h{i}": layer.rows for i, layer in enumerate(self.layers[:-1], start=1)}

    def fits(self, other: WeightSpace) -> bool:
        """True where `other` has the same chain of layers, whatever its tensors are called."""
        return isinstance(other, Chain) and self.same_layers(other)

    def from_matrices(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The inverse of `matrices`; the bias of a layer that has none is dropped."""
        w: dict[str, Tensor] = {}
        for la, (weight, bias) in zip(self.layers, pairs, strict=True):
            w[la.weight] = weight.reshape(-1, *self[la.weight].shape)
            if la.bias:
                w[la.bias] = bias
        return w

    def without(self, skipped: tuple[tuple[str, str], ...]) -> Chain:
        """The same space, with more tensors named as left out."""
        return replace(self, skipped=(*self.skipped, *skipped))

    def unstated(self) -> Chain:
        """The same tensors with no activation stated."""
        return replace(self, activation=None)

    def record(self) -> dict[str, Any]:
        """What `to_json` writes."""
        sizes = {axis.name: axis.size for t in self.tensors for axis in t.axes}
        taps = [[axis.size for axis in t.axes] for t in self.tensors]
        return {
            "family": self.family,
            "tensors": {t.name: str(t) for t in self.tensors},
            "sizes": {n: s for n, s in sizes.items() if n[0] in "hxy"},
            "shapes": {t.name: shape for t, shape in zip(self.tensors, taps, strict=True)},
            "layers": [asdict(layer) for layer in self.layers],
            "activation": self.activation,
            "forward": asdict(self.forward),
        }

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Chain:
        """The inverse of `record`."""
        shapes = record["shapes"]
        tensors = tuple(parse(n, a, shapes[n]) for n, a in record["tensors"].items())
        layers = tuple(Layer(**layer) for layer in record["layers"])
        forward = dict(record["forward"])
        forward["image"] = tuple(forward["image"]) if forward.get("image") else None
        forward["levels"] = tuple(forward.get("levels", Forward.levels))
        return cls(record["family"], tensors, layers, record["activation"], Forward(**forward))

    def running(self, activation: str | None = None, **forward: object) -> Chain:
        """The same tensors with another activation or another way of running them."""
        changed = replace(self.forward, **forward) if forward else self.forward  # type: ignore[arg-type]
        return replace(self, activation=activation or self.activation, forward=changed)


def chain_of(space: WeightSpace, what: str) -> Chain:
    """The space itself where it is a chain; UnsupportedError where it is not: `what` is for no
    other."""
    if isinstance(space, Chain):
        return space
    raise UnsupportedError(
        f"{what} is for MLPs, CNNs and SIRENs; these networks are {space.title}",
        "`qem models` says what there is for them",
    )


def chain(
    layers: Sequence[Layer],
    family: str,
    kernels: Mapping[str, tuple[int, int]] | None = None,
    activation: str | None = None,
    forward: Forward = Forward(),
) -> Chain:
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
    return Chain(family, tuple(tensors), tuple(layers), activation, forward)


def mlp(widths: Sequence[int], activation: str | None = "relu", bias: bool = True) -> Chain:
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
) -> Chain:
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
) -> Chain:
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
