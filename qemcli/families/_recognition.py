"""The weight space of a transformer, from the names and shapes of its tensors and what config.json
says; the number of heads stands in no tensor."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qemcli import registry
from qemcli.errors import InputError, UnsupportedError
from qemcli.families import _config
from qemcli.families._attention import sizes, unread, words
from qemcli.families._config import Config
from qemcli.families._family import Family
from qemcli.spaces import Block, NamedTensor, Place, Rotary, Style, Transformer, parse

Shape = tuple[int, ...]
UNPLACED = "no place in this family of transformers"
NEEDED = ("query", "key", "value", "out", "up", "down")
SUFFIXES = {".weight": False, ".gamma": False, ".bias": True, ".beta": True}  # -> is a bias
_WRAPPED = ("", "module.", "_orig_mod.", "model.")
_REFUSED = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"lora_|adapter", "an adapter beside the weights: merge it first"),
        (r"qweight|qzeros|g_idx|absmax|quant_state|weight_scale", "quantised weights"),
        (r"[qk]_(layer)?norm\b|query_norm|key_norm", "normalised queries and keys"),
        (r"relative_(attention|position)_bias|distance_embedding", "relative position biases"),
        (r"crossattention|cross_attn|encoder_attn|EncDecAttention", "cross-attention"),
        (r"experts?\b|block_sparse_moe|router", "a mixture of experts"),
        (r"\bsinks\b", "attention sinks"),
    )
)


@functools.cache
def families() -> tuple[Family, ...]:
    """All families, those with the most marks first."""
    found = [registry.load("families", name).FAMILY for name in registry.names("families")]
    return tuple(sorted(found, key=lambda family: (-len(family.marks), family.name)))


def recognise(
    shapes: Mapping[str, Shape],
    metadata: Mapping[str, Any],
    activation: str | None = None,
    heads: int | None = None,
) -> Transformer | None:
    """The weight space of a transformer; None where the tensors are those of none.

    `activation` and `heads` are what the caller states. Raises UnsupportedError for a kind of
    transformer that has another symmetry, InputError where heads are not known or config.json
    contradicts the tensors.
    """
    config = _config.read(metadata, heads)
    if config.kind is not None:
        _config.refuse(config)
    found = _family(shapes, config)
    if found is None:
        return None
    build = _Build(*found, config, shapes)
    build.blocks()
    build.outside()
    return build.space(activation)


def _family(shapes: Mapping[str, Shape], config: Config) -> tuple[Family, str] | None:
    """(family, what stands before its names); the family that config.json states where it does."""
    kind = config.kind
    known = [family for family in families() if kind is None or kind in family.types]
    if not known:
        names = sorted(name for family in families() for name in family.types)
        raise UnsupportedError(
            f"config.json: model_type '{kind}' is none that qem knows", f"Known: {', '.join(names)}"
        )
    for family in known:
        prefix = _prefix(family, shapes)
        if prefix is not None:
            return family, prefix
    if kind is not None:
        first = known[0].block.format(0) + known[0].marks[0]
        raise InputError(f"config.json says {kind}, but no tensor is called '{first}'")
    return None


def _prefix(family: Family, shapes: Mapping[str, Shape]) -> str | None:
    marks = [family.block.format(0) + mark for mark in family.marks]
    for wrapped in _WRAPPED:
        for prefix in family.prefixes:
            before = wrapped + prefix
            if all(_there(before + mark, shapes) for mark in marks):
                return before
    return None


def _there(name: str, shapes: Mapping[str, Shape]) -> bool:
    return name in shapes or any(name + suffix in shapes for suffix in SUFFIXES)


@dataclass
class _Build:
    """A space under construction: sizes of axes as tensors tell them, one after the other."""

    family: Family
    prefix: str
    config: Config
    shapes: Mapping[str, Shape]
    sizes: dict[str, int] = field(default_factory=lambda: {"c": 3, "o": 1})
    tensors: list[NamedTensor] = field(default_factory=list)
    places: list[Block] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)

    def blocks(self) -> None:
        """Every block's tensors, in the order of the family's table."""
        inner = self._sorted()
        stated = self.config.number(self.family.key("blocks"))
        count = max(inner) + 1
        if stated is not None and stated != count:
            raise InputError(f"config.json says {stated} blocks, the tensors have {count}")
        for i in range(count):
            self._block(i, inner.get(i, {}))

    def _sorted(self) -> dict[int, dict[str, tuple[str, bool, str]]]:
        """Block -> role -> (tensor, whether it is a bias, its map)."""
        before = re.escape(self.prefix + self.family.block).replace(r"\{\}", r"(\d{1,5})")
        pattern = re.compile(f"{before}(.+)")
        found: dict[int, dict[str, tuple[str, bool, str]]] = {}
        for name in self.shapes:
            for foreign, reason in _REFUSED:
                if foreign.search(name):
                    raise self._refusal(name, reason)
            match = pattern.fullmatch(name)
            if match is None or self._passed(name):
                continue
            stem, bias = _split(match[2])
            if stem not in self.family.maps:
                raise self._refusal(name, "no part of a block that qem knows")
            found.setdefault(int(match[1]), {})[match[2]] = (name, bias, stem)
        return found

    def _refusal(self, name: str, reason: str) -> UnsupportedError:
        return UnsupportedError(
            f"tensor '{name}': {reason}, which qem does not act on in a {self.family.name} network"
        )

    def _passed(self, name: str) -> bool:
        reason = next((r for p, r in self.family.passed.items() if re.search(p, name)), None)
        if reason is not None:
            self.skipped[name] = reason
        return reason is not None

    def _block(self, i: int, held: Mapping[str, tuple[str, bool, str]]) -> None:
        listed = list(self.family.maps)
        rows = sorted(held.values(), key=lambda row: (listed.index(row[2]), row[1]))
        at = self.prefix + self.family.block.format(i)
        held_shapes = {stem: (name, self.shapes[name]) for name, bias, stem in rows if not bias}
        found = sizes(self.family, self.config, at, held_shapes)
        self.sizes |= {f"{axis}{i + 1}": size for axis, size in found.items()}
        places: list[tuple[str, Place]] = []
        for name, bias, stem in rows:
            axes, roles = self.family.maps[stem]
            parts = roles.split()
            stream = self._stream(i, parts[0])
            self._tensor(name, _numbered(unread(axes) if bias else axes, i + 1, stream))
            for part, role in enumerate(parts):
                full = _role(role, bias)
                places.append((full, Place(name, part if len(parts) > 1 else None)))
        lacking = [role for role in NEEDED if role not in dict(places)]
        if lacking:
            raise InputError(f"block {i} has no {lacking[0]} among its tensors '{at}...'")
        self.places.append(Block(tuple(places)))

    def _stream(self, i: int, role: str) -> str:
        """What the stream is called on the side of a role that meets it."""
        if self.family.placement != "plain":
            return "r"
        if role in ("out", "up", "gate"):
            return f"m{i + 1}"
        return f"r{i + 1}" if role == "down" else f"r{i}"

    def _tensor(self, name: str, axes: str) -> None:
        """Add a tensor; sizes that are not known yet follow from its shape."""
        shape = self.shapes[name]
        dims = [word.strip("()*").split() for word in words(axes)]
        if len(dims) != len(shape):
            raise InputError(f"tensor '{name}' has shape {shape}, its axes are '{axes}'")
        for names, size in zip(dims, shape, strict=True):
            unknown = [n for n in names if n not in self.sizes]
            known = math.prod(self.sizes[n] for n in names if n in self.sizes)
            if len(unknown) == 1 and size % known == 0:
                self.sizes[unknown[0]] = size // known
            elif unknown or known != size:
                said = ", ".join(f"{n} {self.sizes[n]}" for n in names if n in self.sizes)
                raise InputError(
                    f"tensor '{name}' has shape {shape}, where the others and config.json say "
                    f"'{axes}' with {said}"
                )
        self.tensors.append(parse(name, axes, [self.sizes[n] for names in dims for n in names]))
        self.written |= {w for w in re.findall(r"\S+", axes) if not w.endswith("*")}

    def outside(self) -> None:
        """What stands before and after the blocks; what is unknown is named."""
        inner, self.tensors = self.tensors, []
        known = {t.name for t in inner} | set(self.skipped)
        found = {name: self._outer(name) for name in self.shapes if name not in known}
        found = {name: place for name, place in found.items() if not self._passed(name)}
        self.skipped |= {name: UNPLACED for name, (stem, _) in found.items() if not stem}
        for table, blocks in ((self.family.before, inner), (self.family.after, [])):
            rows = [(stem, bias, name) for name, (stem, bias) in found.items() if stem in table]
            for stem, bias, name in sorted(rows, key=lambda r: (list(table).index(r[0]), r[1])):
                self._tensor(name, self._read(unread(table[stem]) if bias else table[stem]))
            self.tensors += blocks

    def _outer(self, name: str) -> tuple[str, bool]:
        """(map, whether it is the bias) of a tensor outside the blocks; an empty map for none."""
        for short in (name.removeprefix(self.prefix), name):
            for stem, bias in ((short, False), _split(short)):
                if stem in self.family.before or stem in self.family.after:
                    return stem, bias
        return "", False

    def _read(self, axes: str) -> str:
        """A map reads what another writes; else it reads the stream."""
        unwritten = [w for w in words(axes) if w.endswith("*") and w[:-1] not in self.written]
        text = " ".join("r*" if w in unwritten else w for w in words(axes))
        if self.family.placement == "plain":
            text = re.sub(r"\br\*", f"r{len(self.places)}*", text)
            text = re.sub(r"\br(?![\d*])", "r0", text)
        return text

    def space(self, activation: str | None) -> Transformer:
        """The space, once its sizes are what config.json says."""
        style = Style(
            activation or self.config.activation(self.family),
            self.family.norm,
            self.family.placement,
            self._rotary(),
            bool(self.config.said.get("use_parallel_residual", False)),
            self._tied(),
        )
        blocks, tensors = tuple(self.places), tuple(self.tensors)
        skipped = tuple(self.skipped.items())
        space = Transformer(self.family.name, tensors, blocks, style, skipped)
        for what, size in (("width", space.width), ("ffn", self.sizes["f1"])):
            stated = self.config.number(self.family.key(what))
            if stated is not None and stated != size:
                key = self.family.key(what)
                raise InputError(f"config.json: {key} is {stated}, the tensors have {size}")
        return space

    def _rotary(self) -> Rotary:
        if self.family.pairing == "none":
            return Rotary()
        share = self.config.share(self.family.rotated)
        if share != 1 and not self.config.said:
            raise InputError(
                f"a {self.family.name} network: no tensor says how much of a head is rotated",
                "give the directory with its config.json",
            )
        dims = int(self.sizes["d1"] * share)
        return Rotary(self.family.pairing, dims - dims % 2)

    def _tied(self) -> bool:
        head, named = self.family.head, self.config.said.get("architectures")
        told = str(named[0]) if isinstance(named, list) and named else ""
        if not head or (told and not re.search("LM|PreTraining|DoubleHeads", told)):
            return False  # no head over the vocabulary: BertModel, GPT2ForSequenceClassification
        there = any(t.name.endswith(f"{head}.weight") for t in self.tensors)
        return bool(self.config.said.get("tie_word_embeddings", not there))


def _split(name: str) -> tuple[str, bool]:
    """(map, whether it is the bias) of a tensor's name."""
    for suffix, bias in SUFFIXES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), bias
    return name, False


def _role(role: str, bias: bool) -> str:
    if not bias:
        return role
    return f"{role}_shift" if role.startswith("norm") else f"{role}_bias"


def _numbered(axes: str, block: int, stream: str) -> str:
    """A block's axes: numbers on those that are its own, and the stream's name."""
    numbered = re.sub(r"\b([kqdef])\b", rf"\g<1>{block}", axes)
    return re.sub(r"\br\b", stream, numbered)


__all__ = ["UNPLACED", "families", "recognise"]
