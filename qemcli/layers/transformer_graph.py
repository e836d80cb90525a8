"""The typed graph of a transformer, whatever its family.

A set of neurons for the stream behind every part of a block, joined by edges of value 1 where there
are residual sums. Query, key and value edges lead to the same neurons of attention, one a number of
a head. Gains and shifts of a norm are edges from nodes of their own to the neurons of the stream
that are normed, numbered by the layer that reads them. Source: Lim et al., arXiv:2312.04501.

Ours, where the paper is silent: query heads that share keys and values are sets of their own, with
an edge of value 1 from every number of the keys; a gate is a second block beside that of the
feed-forward; rotated numbers of a head are told apart by their place in it; embeddings are edges
from tokens, positions and segments, and where answers share them there is no second block.
"""

from __future__ import annotations

from collections.abc import Mapping

from qemcli.errors import UnsupportedError
from qemcli.layers.drawing import Drawing, TypedGraph
from qemcli.spaces import NamedTensor, Transformer
from qemcli.spaces.transformer import Block

PLACES = {"v": "vocabulary", "t": "position", "s": "segment"}  # what embeddings read
QKV = ("query", "key", "value")


def of_transformer(space: Transformer) -> TypedGraph:
    """Its graph; UnsupportedError where the values of its heads have other widths than the keys."""
    return _Plan(space).drawn()


class _Plan:
    """A transformer's graph in the making: the stream so far, and the layer that it is in."""

    def __init__(self, space: Transformer) -> None:
        self.space, self.drawing = space, Drawing(space, "uw")
        self.plain, self.post = space.placement == "plain", space.placement == "post"
        self.named = {t.name: t for t in space.outside}
        inside = [place.tensor for block in space.blocks for _, place in block.places]
        first = min(i for i, t in enumerate(space.tensors) if t.name in inside)
        self.before = [t for t in space.tensors[:first] if t.name in self.named]
        self.after = [t for t in space.outside if t not in self.before]
        # What attention reads first has an order where the positions added to it are fixed.
        self.stream = self.drawing.stand(space.width, "stream", 1, self.plain)
        self.layer = 1
        self.sets: dict[str, int] = {}  # by the axes that later maps read

    def drawn(self) -> TypedGraph:
        """The graph."""
        for t in self.before:
            self._entered(t)
        pairs = zip(self.space.blocks, self.space.heads, strict=True)
        for block, (groups, queries, d, e) in pairs:
            if d != e:
                raise UnsupportedError("no typed graph is known of heads whose values are wider")
            self._block(block, groups, queries, d)
        self.sets["r"] = self.stream
        for t in self.after:
            self._answered(t)
        return self.drawing.done()

    def _entered(self, t: NamedTensor) -> None:
        """An embedding, a map of patches, or what stands on the first stream."""
        letters = [axis.name[0] for axis in t.axes]
        if len(letters) == 1:
            self._vector(t, 1, self.stream)
        elif "x" in letters:
            inputs = self.drawing.stand(t.axes[letters.index("x")].size, "input", 0, True)
            self.drawing.tensor(t.name, "convolution", 1, inputs, self.stream)
        else:
            own = next((letter for letter in letters if letter in PLACES), None)
            size = t.axes[letters.index(own)].size if own else 1
            places = self.drawing.stand(size, PLACES[own] if own else "special", 0, bool(own))
            self.drawing.tensor(t.name, "embedding", 1, places, self.stream)
            if own:
                self.sets[own] = places

    def _vector(self, t: NamedTensor, layer: int, target: int) -> None:
        """A bias of the map beside it, else the gain or the shift of a norm."""
        stem, _, last = t.name.rpartition(".")
        beside = self.named.get(f"{stem}.weight")
        gain = last == "weight"
        if not gain and (beside is None or len(beside.axes) > 1):
            conv = beside is not None and "x" in [axis.name for axis in beside.axes]
            kind = "convolution-bias" if conv else "linear-bias"
            self.drawing.vector(t.name, kind, layer, target)
        else:
            kind = "gain" if gain else "shift"
            self.drawing.vector(t.name, kind, layer, target, source=kind)

    def _norm(self, block: Mapping[str, str], role: str, layer: int, target: int) -> None:
        self.drawing.vector(block.get(role), "gain", layer, target, source="gain")
        self.drawing.vector(block.get(f"{role}_shift"), "shift", layer, target, source="shift")

    def _block(self, block: Block, groups: int, queries: int, d: int) -> None:
        """Attention, then the feed-forward, which reads the same stream where it is parallel."""
        names = {role: place.tensor for role, place in block.places}
        read, layer = self.stream, self.layer
        parallel = self.space.style.parallel
        stand = self.drawing.stand
        middle = stand(self.space.width, "stream", layer + (4 if parallel else 2))
        self._norm(names, "norm1", layer + (2 if self.post else 1), middle if self.post else read)
        self._attention(block, names, (groups, queries, d), (read, middle))
        if not self.plain:
            self.drawing.same("sum", layer + 2, read, middle)
        start = read if parallel else middle
        end = middle if parallel else stand(self.space.width, "stream", layer + 4)
        self._norm(names, "norm2", layer + (4 if self.post else 3), end if self.post else start)
        self._forward(names, start, end)
        if not (self.plain or parallel):
            self.drawing.same("sum", layer + 4, start, end)
        self.stream, self.layer = end, layer + 4

    def _attention(
        self,
        block: Block,
        names: Mapping[str, str],
        heads: tuple[int, int, int],
        ends: tuple[int, int],
    ) -> None:
        """Keys and values meet the queries in their own neurons, or, where heads share them, in a
        set for each query head of a group."""
        drawing, (groups, queries, d), (read, middle) = self.drawing, heads, ends
        at, rotated = self.layer + 1, self.space.rotary.pairing != "none"
        parts = {role: {} if p.part is None else {"c": p.part} for role, p in block.places}
        kept = ("attention", at, rotated, groups)
        own = [drawing.stand(groups * d, *kept) for _ in range(queries)]
        shared = own[0] if queries == 1 else drawing.stand(groups * d, *kept)
        for role in QKV:
            for q, target in enumerate(own if role == "query" else [shared]):
                head = {"q": q} if role == "query" and queries > 1 else {}
                drawing.tensor(names[role], role, at, read, target, parts[role] | head)
                bias = f"{role}_bias"
                if bias in names:
                    drawing.vector(names[bias], "linear-bias", at, target, parts[bias] | head)
        for q, source in enumerate(own):
            if queries > 1:
                drawing.same("group", at, shared, source)
            head = {"q": q} if queries > 1 else {}
            drawing.tensor(names["out"], "out", at + 1, source, middle, head)
        drawing.vector(names.get("out_bias"), "linear-bias", at + 1, middle)

    def _forward(self, names: Mapping[str, str], start: int, end: int) -> None:
        drawing, at = self.drawing, self.layer + 3
        size = self.space[names["up"]].size // self.space.width
        wide = drawing.stand(size, self.space.activation or "unknown", at)
        for role, kind in (("up", "linear"), ("gate", "gate")):
            if role in names:
                drawing.tensor(names[role], kind, at, start, wide)
                drawing.vector(names.get(f"{role}_bias"), f"{kind}-bias", at, wide)
        drawing.tensor(names["down"], "linear", at + 1, wide, end)
        drawing.vector(names.get("down_bias"), "linear-bias", at + 1, end)

    def _answered(self, t: NamedTensor) -> None:
        """A map behind the blocks, to outputs or to what other maps read, or a vector on them."""
        dual = next((axis.name for axis in t.axes if axis.dual), None)
        name = next(axis.name for axis in t.axes if not axis.dual)
        key = name if name[0] != "r" else "r"
        if dual is None:
            if key not in self.sets:
                raise UnsupportedError(
                    f"no typed graph is known of '{t.name}', which nothing writes"
                )
            target = self.sets[key]
            self._vector(t, self.drawing.nodes[target].layer, target)
            return
        source = self.sets[dual if dual[0] != "r" else "r"]
        at = self.drawing.nodes[source].layer + 1
        kinds = {"y": "output", "v": "output", "r": "stream", "h": self.space.activation}
        kind = kinds.get(key[0]) or "unknown"
        size = next(axis.size for axis in t.axes if not axis.dual)
        target = self.drawing.stand(size, kind, at, kind == "output")
        self.drawing.tensor(t.name, "linear", at, source, target)
        self.sets[key] = target
