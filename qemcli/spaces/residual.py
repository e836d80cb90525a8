"""Chains of affine maps with residual sums: layers whose outputs are added share their neurons.

    "conv1.weight": h1 x* u v    "conv2.weight": h2 h1* u v    "conv3.weight": h1 h2* u v

h1 twice, because layer 3 adds what layer 1 gave: a permutation or a factor of those neurons acts on
both layers at once, and on all that read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from qemcli.errors import InputError
from qemcli.spaces._notation import Axis, NamedTensor, parse
from qemcli.spaces._space import WeightSpace
from qemcli.spaces.chain import Chain, Forward, Layer, Layered, chain_of

NONE = -1  # nothing is added to this layer


@dataclass(frozen=True)
class Residual(Layered, kind="residual"):
    """Convolutions, then dense layers, some of them with an earlier layer's output added.

    Run as the CNN Wild Park's networks are (Kofinas et al., arXiv:2403.12143; its published
    sampler): z_l = W_l * o_{l-1} + b_l + o_{added[l]} and o_l = f(z_l), so what is added has passed
    its own activation and is added before this layer's. Convolutions are padded by half their
    kernel, and only the first has the stride of `forward`: images keep their size and can be added.

    Attributes:
        layers: the maps, input first; the last gives the answers.
        added: for every layer the number of the earlier layer (from 0) whose output is added to its
        own, of as many neurons; -1 where none is, as on the first and the last.
        activation: a name of ACTIVATIONS, the same after every layer but the last; None where it is
        not known or layers differ (then only permutations are claimed).
        forward: how the network is run; its padding and pooling have no meaning here.
        skipped: (name, reason) of every tensor of the checkpoint that has no place here.
    """

    layers: tuple[Layer, ...]
    added: tuple[int, ...]
    activation: str | None = None
    forward: Forward = field(default_factory=Forward)
    skipped: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axis that every layer writes: `h1` of the first; of layers that are added to each
        other that of the earliest; `y` of the last."""
        return _axes(self.added)

    def step(self, i: int) -> tuple[int, tuple[int, int]]:
        """(stride, padding in height and width) of the convolution that is layer i."""
        height, width = self[self.layers[i].weight].unfolded[2:]
        return (1 if i else self.forward.stride), (height // 2, width // 2)

    @property
    def hidden(self) -> dict[str, int]:
        """Hidden axes and their number of neurons, in the order of the network; layers that are
        added to each other are on one axis."""
        return {a: la.rows for a, la in zip(self.axes[:-1], self.layers[:-1], strict=True)}

    @property
    def title(self) -> str:
        """Family, widths, activation and sums."""
        return f"{self.family} {self.widths} {self.activation} with sums ({self.sums})"

    @property
    def sums(self) -> str:
        """Which layers (from 1) are added to which: `1 to 3, 2 to 4`."""
        pairs = enumerate(self.added, start=1)
        return ", ".join(f"{earlier + 1} to {i}" for i, earlier in pairs if earlier != NONE)

    def fits(self, other: WeightSpace) -> bool:
        """True where `other` has the same layers and sums, whatever its tensors are called."""
        if not isinstance(other, Residual):
            return False
        return self.added == other.added and self.same_layers(other)

    def running(self, activation: str | None = None, **forward: object) -> Residual:
        """The same tensors with another activation or another way of running them."""
        changed = replace(self.forward, **forward) if forward else self.forward  # type: ignore[arg-type]
        return replace(self, activation=activation or self.activation, forward=changed)

    def without(self, skipped: tuple[tuple[str, str], ...]) -> Residual:
        """The same space, with more tensors named as left out."""
        return replace(self, skipped=(*self.skipped, *skipped))

    def unstated(self) -> Residual:
        """The same tensors with no activation stated."""
        return replace(self, activation=None)

    def record(self) -> dict[str, Any]:
        """What `to_json` writes."""
        return {
            "kind": "residual",
            "family": self.family,
            "tensors": {t.name: str(t) for t in self.tensors},
            "shapes": {t.name: t.unfolded for t in self.tensors},
            "layers": [asdict(layer) for layer in self.layers],
            "added": self.added,
            "activation": self.activation,
            "forward": asdict(self.forward),
        }

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Residual:
        """The inverse of `record`."""
        shapes = record["shapes"]
        tensors = tuple(parse(n, a, shapes[n]) for n, a in record["tensors"].items())
        layers = tuple(Layer(**layer) for layer in record["layers"])
        forward = dict(record["forward"])
        forward["image"] = tuple(forward["image"]) if forward.get("image") else None
        forward["levels"] = tuple(forward["levels"])
        added, run = tuple(record["added"]), Forward(**forward)
        _check(tensors, layers, added)
        return cls(record["family"], tensors, layers, added, record["activation"], run)


def layered_of(space: WeightSpace, what: str) -> Layered:
    """The space itself where it is made of affine layers; UnsupportedError where it is not: `what`
    is for no other."""
    return space if isinstance(space, Layered) else chain_of(space, what)


def residual(chain: Chain, added: Sequence[int]) -> Residual:
    """The layers of a chain with sums: `residual(cnn([1, 8, 4, 8], 10), [-1, -1, 0, -1])` adds what
    the first convolution gives to what the third gives.

    InputError where a sum is of layers of different widths or kinds, or reads a later layer, or
    where a kernel has no middle, so that images do not keep their size.
    """
    added = tuple(added)
    _check(chain.tensors, chain.layers, added)
    axes = _axes(added)
    renamed = {"x": "x", "y": "y"} | {f"h{i}": axis for i, axis in enumerate(axes, start=1)}

    def tied(t: NamedTensor) -> NamedTensor:
        dims = tuple(tuple(_named(axis, renamed) for axis in dim) for dim in t.dims)
        return NamedTensor(t.name, dims)

    tensors = tuple(tied(t) for t in chain.tensors)
    forward = replace(chain.forward, padding=0, pooling="none")
    return Residual(
        chain.family, tensors, chain.layers, added, chain.activation, forward, chain.skipped
    )


def _named(axis: Axis, names: Mapping[str, str]) -> Axis:
    return replace(axis, name=names.get(axis.name, axis.name))


def _axes(added: Sequence[int]) -> tuple[str, ...]:
    first: list[int] = []  # of every layer, the earliest layer on its axis
    for i, earlier in enumerate(added):
        first.append(i if earlier == NONE else first[earlier])
    return (*(f"h{i + 1}" for i in first[:-1]), "y")


def _check(tensors: Sequence[NamedTensor], layers: Sequence[Layer], added: Sequence[int]) -> None:
    kernels = {t.name: t.unfolded[2:] for t in tensors}
    for layer in layers[1:]:
        if layer.conv and any(side % 2 == 0 for side in kernels[layer.weight]):
            raise InputError(f"tensor '{layer.weight}': an even kernel changes the image's size")
    if len(added) != len(layers):
        raise InputError(f"{len(layers)} layers, and sums are stated of {len(added)}")
    last = len(layers) - 1
    for i, earlier in enumerate(added):
        if earlier == NONE:
            continue
        if i == last or not 0 <= earlier < i:
            raise InputError(f"layer {earlier} cannot be added to layer {i} of {len(layers)}")
        here, there = layers[i], layers[earlier]
        if (here.rows, here.conv) != (there.rows, there.conv):
            raise InputError(
                f"layer {earlier} of {there.rows} neurons cannot be added to layer {i} of "
                f"{here.rows}"
            )
