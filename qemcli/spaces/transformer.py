"""Transformers: stacks of attention and feed-forward blocks, whatever their storage.

    "h.0.attn.c_attn.weight": r* (c k1 d1)    fused, stored [in, out]: columns q, k, v
    "q_proj.weight": (k1 q1 d1) r*            separate, stored [out, in], grouped queries
    "query_key_value.weight": (k1 c d1) r*    fused, q, k, v of every head together

Axes of block i, counted from 1: `k{i}` key/value groups, `q{i}` query heads of a group, `d{i}`
query and key numbers of a head, `e{i}` value numbers of a head, `f{i}` feed-forward neurons; `c` is
the fused axis. Between the blocks: `r`, the residual stream. Without residual sums (placement
"plain") no two layers share neurons: block i reads `r{i-1}`, its attention writes `m{i}`, its
feed-forward `r{i}`. Outside: `v` vocabulary, `t` positions, `s` segments, `x` inputs, `u` and `w`
patch taps, `o` an axis of one, `h1` a classifier's hidden neurons, `y` outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from qemcli.errors import InputError, UnsupportedError
from qemcli.spaces._notation import NamedTensor, parse
from qemcli.spaces._space import WeightSpace

if TYPE_CHECKING:
    from torch import Tensor

# The axes of every role, in the order that `read` gives them. Maps act on rows, x W, as in the
# papers: the side that reads stands before the side that is written.
ROLES: dict[str, str] = {
    "norm1": "r", "norm1_shift": "r",
    "query": "kqrd", "query_bias": "kqd", "key": "krd", "key_bias": "kd",
    "value": "kre", "value_bias": "ke", "out": "kqer", "out_bias": "r",
    "norm2": "r", "norm2_shift": "r",
    "gate": "rf", "gate_bias": "f", "up": "rf", "up_bias": "f", "down": "fr", "down_bias": "r",
}  # fmt: skip
FROZEN = "fixed sinusoids of the positions, not weights"


class Place(NamedTuple):
    """Where a role is stored: a tensor, and the index on its axis `c` where it is fused."""

    tensor: str
    part: int | None = None


@dataclass(frozen=True)
class Rotary:
    """How queries and keys are rotated by position: `half` pairs number j with j + dims/2,
    `interleaved` 2j with 2j + 1; numbers from `dims` on are not rotated."""

    pairing: str = "none"  # none | half | interleaved
    dims: int = 0


@dataclass(frozen=True)
class Block:
    """The roles of one block and where each is stored."""

    places: tuple[tuple[str, Place], ...]

    @property
    def roles(self) -> dict[str, Place]:
        return dict(self.places)


@dataclass(frozen=True)
class Style:
    """What tensors do not say of a transformer: how its maps stand together.

    norm is layer (LayerNorm) or rms, with or without parameters: a block without the role `norm1`
    has none. placement is of the norm before ("pre") or after ("post") the residual sum, or
    "plain": norm first, no residual sum. `parallel`: attention and feed-forward read the same
    stream. `tied`: the embedding also writes the answers.
    """

    activation: str | None = None
    norm: str = "layer"
    placement: str = "pre"
    rotary: Rotary = Rotary()
    parallel: bool = False
    tied: bool = False


@dataclass(frozen=True)
class Transformer(WeightSpace, kind="transformer"):
    """A transformer; its tensors stand in the order of the network.

    Attributes:
        family: gpt2 | bert | vit | llama | qwen2 | gpt_neox | small-transformer | ...
        blocks: the roles of each block, first block first.
        style: activation, norm, placement, rotary, ties.
        skipped: (name, reason) of every tensor of the checkpoint that has no place here.
    """

    blocks: tuple[Block, ...]
    style: Style = Style()
    skipped: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    @property
    def activation(self) -> str | None:
        """That of the feed-forward; of its gate where it is gated."""
        return self.style.activation

    @property
    def norm(self) -> str:
        return self.style.norm

    @property
    def placement(self) -> str:
        return self.style.placement

    @property
    def rotary(self) -> Rotary:
        return self.style.rotary

    @property
    def tied(self) -> bool:
        return self.style.tied

    @property
    def gated(self) -> bool:
        """True for SwiGLU and its like: act(x gate) * (x up)."""
        return "gate" in self.blocks[0].roles

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> size; a fused tensor's `d` stands for its `e` as well."""
        return {axis.name: axis.size for t in self.tensors for axis in t.axes}

    @property
    def width(self) -> int:
        """D, the numbers of a token."""
        return self[self.blocks[0].roles["down"].tensor].size // self.sizes["f1"]

    @property
    def heads(self) -> tuple[tuple[int, int, int, int], ...]:
        """(K, Q, d, e) of every block: groups, query heads a group, query and value numbers."""
        sizes = self.sizes
        return tuple(
            (sizes[f"k{i}"], sizes.get(f"q{i}", 1), sizes[f"d{i}"], sizes[f"e{i}"])
            for i in range(1, len(self.blocks) + 1)
        )

    @property
    def outside(self) -> tuple[NamedTensor, ...]:
        """The tensors outside the blocks: embeddings, last norm, answers."""
        held = {place.tensor for block in self.blocks for _, place in block.places}
        return tuple(t for t in self.tensors if t.name not in held)

    @property
    def hidden(self) -> dict[str, int]:
        """Feed-forward neurons, block by block, and a classifier's; what `act` of the groups on
        neurons moves. Heads and the stream have groups of their own."""
        sizes = self.sizes
        mine = [f"f{i}" for i in range(1, len(self.blocks) + 1)]
        return {name: sizes[name] for name in (*mine, "h1") if name in sizes}

    @property
    def widths(self) -> tuple[int, ...]:
        """Inputs (vocabulary, or numbers of a patch), D behind every block, outputs."""
        sizes = self.sizes
        first = sizes.get("v", sizes.get("x", 0) * sizes.get("u", 1) * sizes.get("w", 1))
        first = first or self.width
        return (first, *[self.width] * len(self.blocks), sizes.get("y", first))

    @property
    def depth(self) -> int:
        return 4 * len(self.blocks) + 2

    @property
    def title(self) -> str:
        """Family, blocks, width, heads and activation."""
        groups, queries, _, _ = self.heads[0]
        return (
            f"{self.family} of {len(self.blocks)} blocks, width {self.width}, "
            f"{groups * queries} heads, {self.activation}"
        )

    def read(self, w: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The roles of every block, (b, *axes of ROLES), views of the tensors of `w`."""
        return [
            {role: self._role(i, role, place, w[place.tensor]) for role, place in block.places}
            for i, block in enumerate(self.blocks, start=1)
        ]

    def write(
        self, w: Mapping[str, Tensor], blocks: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The inverse of `read`: the roles back in storage; tensors outside the blocks from `w`."""
        stored: dict[str, Tensor] = {}
        for i, (block, roles) in enumerate(zip(self.blocks, blocks, strict=True), start=1):
            parts: dict[str, dict[int, Tensor]] = {}
            for role, place in block.places:
                part = self._stored(i, role, place, roles[role])
                parts.setdefault(place.tensor, {})[place.part or 0] = part
            stored |= {name: self._joined(name, found) for name, found in parts.items()}
        return {t.name: stored.get(t.name, w[t.name]) for t in self.tensors}

    def _role(self, i: int, role: str, place: Place, x: Tensor) -> Tensor:
        """(b, *shape) -> (b, *axes of the role)."""
        x = x.reshape(-1, *self[place.tensor].unfolded)
        axes = _letters(self[place.tensor])
        if place.part is not None:
            x = x.select(1 + axes.index("c"), place.part)
        order = _order(role, axes.replace("c", ""))
        x = x.movedim([1 + axes.replace("c", "").index(a) for a in order], [*range(1, x.dim())])
        return x.unsqueeze(2) if "q" in ROLES[role] and "q" not in order else x

    def _stored(self, i: int, role: str, place: Place, x: Tensor) -> Tensor:
        """(b, *axes of the role) -> (b, *axes of the tensor without `c`)."""
        axes = _letters(self[place.tensor]).replace("c", "")
        order = _order(role, axes)
        if "q" in ROLES[role] and "q" not in order:
            x = x.flatten(1, 2)  # one query head a group
        return x.movedim([1 + order.index(a) for a in axes], [*range(1, x.dim())])

    def _joined(self, name: str, parts: Mapping[int, Tensor]) -> Tensor:
        import torch

        axes = _letters(self[name])
        if "c" not in axes:
            return parts[0].reshape(-1, *self[name].shape)
        joined = torch.stack([parts[p] for p in sorted(parts)], dim=1 + axes.index("c"))
        return joined.reshape(-1, *self[name].shape)

    def fits(self, other: WeightSpace) -> bool:
        """True where `other` has the same maps, whatever its tensors are called."""
        if not isinstance(other, Transformer) or self.style != other.style:
            return False
        ends = [sorted(map(str, s.outside)) for s in (self, other)]
        names = [[tuple(sorted(b.roles)) for b in s.blocks] for s in (self, other)]
        same = ends[0] == ends[1] and names[0] == names[1] and self.heads == other.heads
        return same and self.sizes == other.sizes

    def running(self, activation: str | None = None) -> Transformer:
        """The same tensors with another activation, where one is given."""
        style = replace(self.style, activation=activation or self.activation)
        return replace(self, style=style)

    def without(self, skipped: tuple[tuple[str, str], ...]) -> Transformer:
        """The same space, with more tensors named as left out."""
        return replace(self, skipped=(*self.skipped, *skipped))

    def unstated(self) -> Transformer:
        """The same tensors with no activation stated."""
        return replace(self, style=replace(self.style, activation=None))

    def record(self) -> dict[str, Any]:
        """What `to_json` writes."""
        return {
            "kind": "transformer",
            "family": self.family,
            "tensors": {t.name: str(t) for t in self.tensors},
            "shapes": {t.name: t.unfolded for t in self.tensors},
            "blocks": [dict(block.places) for block in self.blocks],
            "style": asdict(self.style),
        }

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Transformer:
        """The inverse of `record`."""
        shapes = record["shapes"]
        tensors = tuple(parse(n, a, shapes[n]) for n, a in record["tensors"].items())
        blocks = tuple(
            Block(tuple((role, Place(*place)) for role, place in block.items()))
            for block in record["blocks"]
        )
        style = dict(record["style"])
        style["rotary"] = Rotary(**style["rotary"])
        return cls(record["family"], tensors, blocks, Style(**style))


def transformer_of(space: WeightSpace, what: str) -> Transformer:
    """The space itself where it is a transformer; UnsupportedError where it is not: `what` is for
    no other."""
    if isinstance(space, Transformer):
        return space
    raise UnsupportedError(
        f"{what} is for transformers; these networks are {space.title}",
        "`qem models` says what there is for them",
    )


def small_transformer(
    width: int,
    heads: int,
    ffn: int,
    blocks: int,
    outputs: int,
    patch: tuple[int, int] | None = None,
) -> Transformer:
    """The Small Transformer Zoo's network: no residual sums, norms without parameters, attention
    without biases, ReLU. `patch` is (channels, side) of its patch embedding; None for text, whose
    word vectors are not part of it.

    `small_transformer(32, 2, 64, 2, 10, (1, 4))` has 18,506 parameters, without patch and with
    4 outputs 17,764. Raises InputError where the heads do not divide the width.
    """
    if width % heads:
        raise InputError(f"{heads} heads do not divide a width of {width}")
    tensors: list[NamedTensor] = []
    if patch is not None:
        channels, side = patch
        conv = parse("embedding.conv1.weight", "r0 x u w", (width, channels, side, side))
        tensors += [conv, parse("embedding.conv1.bias", "r0", (width,))]
    found = []
    for i in range(1, blocks + 1):
        made, block = _small_block(i, width, heads, ffn)
        tensors += made
        found.append(block)
    tensors += [
        parse("classifier.fc1.weight", f"h1 r{blocks}*", (width, width)),
        parse("classifier.fc1.bias", "h1", (width,)),
        parse("classifier.fc2.weight", "y h1*", (outputs, width)),
        parse("classifier.fc2.bias", "y", (outputs,)),
    ]
    style = Style("relu", placement="plain")
    return Transformer("small-transformer", tuple(tensors), tuple(found), style)


def _small_block(i: int, width: int, heads: int, ffn: int) -> tuple[list[NamedTensor], Block]:
    at, per = f"encoder.{i - 1}", width // heads
    read, mid, out = f"r{i - 1}", f"m{i}", f"r{i}"
    rows = {
        "query": ("attention.queries.weight", f"(k{i} d{i}) {read}*", (heads, per, width)),
        "key": ("attention.keys.weight", f"(k{i} d{i}) {read}*", (heads, per, width)),
        "value": ("attention.values.weight", f"(k{i} e{i}) {read}*", (heads, per, width)),
        "out": ("attention.out_projection.weight", f"{mid} (k{i} e{i})*", (width, heads, per)),
        "up": ("fc1.weight", f"f{i} {mid}*", (ffn, width)),
        "up_bias": ("fc1.bias", f"f{i}", (ffn,)),
        "down": ("fc2.weight", f"{out} f{i}*", (width, ffn)),
        "down_bias": ("fc2.bias", out, (width,)),
    }
    tensors = [parse(f"{at}.{name}", axes, sizes) for name, axes, sizes in rows.values()]
    return tensors, Block(tuple((role, Place(f"{at}.{row[0]}")) for role, row in rows.items()))


def _letters(tensor: NamedTensor) -> str:
    """One letter an axis; the stream's two names in a plain block are both `r`."""
    return "".join("r" if axis.name[0] == "m" else axis.name[0] for axis in tensor.axes)


def _order(role: str, axes: str) -> str:
    """The role's axes by the letters that the tensor has for them."""
    wanted = ROLES[role] if "e" in axes else ROLES[role].replace("e", "d")
    return wanted if "q" in axes else wanted.replace("q", "")
