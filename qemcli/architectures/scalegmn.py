"""ScaleGMN: message passing that carries the neurons' scales or signs along; GMN without them.

Kalogeropoulos et al., Scale Equivariant Graph Metanetworks, arXiv:2406.10685.

    x_i <- q_i x_i,   e_ij <- q_i / q_j e_ij    on hidden neurons, in every layer

The activation of the INPUT networks chooses the group: odd -> signs (tanh, sine), homogeneous ->
positive scales (relu). `symmetry = permutation` drops the factors and puts ordinary perceptrons
everywhere: the GMN of the tables of arXiv:2602.01083.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from torch import Tensor

from qemcli.errors import UnsupportedError, UsageError
from qemcli.layers import quasi
from qemcli.layers import scale_equivariant as blocks
from qemcli.layers.deltas import Deltas
from qemcli.layers.features import Features, require_hidden
from qemcli.layers.graph import Windows
from qemcli.layers.metanetwork import Metanetwork
from qemcli.layers.presets import Preset
from qemcli.layers.scale_entry import Graph, ScaleEntry
from qemcli.layers.scale_graph import PERMUTATION, SCALE, SIGN, ScaleLayer, ScaleStack
from qemcli.layers.scale_quasi import carried
from qemcli.layers.scale_readouts import EndsReadout, GraphReadout, OutputsReadout, PlainReadout
from qemcli.registry import suggest
from qemcli.spaces import HOMOGENEOUS, ODD, Chain, WeightSpace

SYMMETRIES = {"permutation": PERMUTATION, "sign": SIGN, "scale": SCALE}
DIRECTIONS = ("forward", "both")
INVARIANTS: dict[str, type[blocks.Absolute] | type[blocks.Symmetrised]] = {
    "abs": blocks.Absolute,
    "symmetrised": blocks.Symmetrised,
}
ENDS = {"plain": blocks.PlainEnds, "modulated": blocks.ModulatedEnds}
READOUTS = ("ends", "graph")


@dataclass(frozen=True)
class Config:
    """`channels` of nodes and edges, `width` of every perceptron, `layers`.

    `symmetry`: auto (the activation's), sign, scale or permutation (GMN). `direction` of messages:
    forward | both. `invariants` of signs: abs | symmetrised. At inputs and outputs perceptrons
    (`ends`: plain | modulated by a linear map), two of them where `ends_apart`. `readout`: ends
    (outputs, and inputs where messages go both ways) | graph. `skip`: linear skips around layers;
    `edge_codes`: learned codes of edges too; `inner_codes`: codes are read by messages and updates;
    `norm`: LayerNorm in perceptrons; `dropout` in [0, 1) of nodes, `inner_dropout` in perceptrons.
    `standardised`: one size a tensor, by `calibrate`. `quasi`: none | paper | released | exact, on
    the embedded graph, its `eps` at the start, in (-.999, .999), and whether it is learned.
    `expand`: branches of the editor.
    """

    channels: int = 32
    width: int = 32
    layers: int = 3
    symmetry: str = "auto"
    direction: str = "forward"
    invariants: str = "abs"
    ends: str = "plain"
    ends_apart: bool = False
    readout: str = "graph"
    skip: bool = True
    edge_codes: bool = False
    inner_codes: bool = False
    norm: bool = True
    dropout: float = 0.0
    inner_dropout: float = 0.0
    standardised: bool = True
    quasi: str = "none"
    eps: float = 0.01
    eps_learned: bool = True
    outputs: int = 1
    expand: int = 1


_PAPER = "arXiv:2406.10685, released configuration"
_MNIST = Config(
    128, 128, 4, "sign", invariants="symmetrised", ends="modulated", readout="ends",
    edge_codes=True, dropout=0.2, standardised=False, outputs=10,
)  # fmt: skip
_FASHION = Config(
    128, 64, 2, "sign", invariants="symmetrised", ends_apart=True, edge_codes=True, dropout=0.2,
    inner_dropout=0.2, standardised=False, outputs=10,
)  # fmt: skip
_CIFAR = Config(
    64, 64, 4, "sign", ends_apart=True, readout="ends", skip=False, dropout=0.2,
    standardised=False, outputs=10,
)  # fmt: skip
_RELU = Config(128, 128, 4, "scale", readout="ends", skip=False, standardised=False)
_TANH = Config(
    128, 128, 4, "sign", invariants="symmetrised", ends_apart=True, skip=False, standardised=False
)
_BOTH = "arXiv:2406.10685, released configuration; messages from above read the updated edges"
_SUM = "; the readout calls its map of the ends, which the released code has and skips"
PRESETS = {
    "scalegmn-inr-mnist": Preset(_MNIST, 1_772_042, _PAPER, "siren-mnist"),
    "scalegmn-b-inr-mnist": Preset(
        replace(_MNIST, direction="both", skip=False, edge_codes=False, inner_codes=True),
        3_089_162, _BOTH, "siren-mnist",
    ),
    "scalegmn-inr-fashion": Preset(_FASHION, 664_458, _PAPER + _SUM, "siren-fashion"),
    "scalegmn-b-inr-fashion": Preset(
        replace(_FASHION, direction="both"), 1_011_338, _BOTH + _SUM, "siren-fashion"
    ),
    "scalegmn-inr-cifar": Preset(_CIFAR, 397_450, _PAPER, "siren-cifar"),
    "scalegmn-b-inr-cifar": Preset(
        replace(_CIFAR, direction="both", ends="modulated", ends_apart=False, norm=False),
        492_298, _BOTH, "siren-cifar",
    ),
    "scalegmn-cnn-relu": Preset(_RELU, 1_356_801, _PAPER),
    "scalegmn-b-cnn-relu": Preset(
        replace(_RELU, direction="both"), 2_263_809,
        f"{_PAPER}; from above reciprocals are read, as the paper says and the code does not",
    ),
    "scalegmn-cnn-tanh": Preset(_TANH, 2_318_849, _PAPER + _SUM, "cnn-zoo-tanh"),
    "scalegmn-b-cnn-tanh": Preset(
        replace(_TANH, direction="both", dropout=0.2), 3_441_665, _BOTH + _SUM, "cnn-zoo-tanh"
    ),
    "scalegmn-small": Preset(
        Config(16, 16, outputs=10), None, "ours: what two cores train", "siren-mnist"
    ),
    "scalegmn-b-small": Preset(
        Config(16, 16, direction="both", outputs=10), None, "ours: what two cores train",
        "siren-mnist",
    ),
    "scalegmn-cnn-small": Preset(Config(16, 16), None, "ours: what two cores train"),
    "scalegmn-b-cnn-small": Preset(
        Config(16, 16, direction="both"), None, "ours: what two cores train"
    ),
    "gmn-small": Preset(
        Config(16, 16, symmetry="permutation", direction="both", outputs=10), None,
        "ours: what two cores train", "siren-mnist",
    ),
}  # fmt: skip
_EDIT = Config(
    128, 128, 10, "sign", ends_apart=True, dropout=0.1, inner_dropout=0.1, standardised=False
)
_GMN = replace(_EDIT, symmetry="permutation", direction="both", inner_dropout=0.0)
_OCE = "arXiv:2602.01083, with the code of arXiv:2406.10685; from above the updated edges are read"
EDITORS = {
    "scalegmn-edit": Preset(_EDIT, 4_002_058, _PAPER, "siren-mnist"),
    "scalegmn-b-edit": Preset(
        replace(_EDIT, direction="both", ends_apart=False, inner_dropout=0.0), 4_821_385, _BOTH,
        "siren-mnist",
    ),
    "gmn-edit": Preset(_GMN, 2_429_832, f"{_OCE}, without branches", "siren-mnist"),
    "gmn-oce-1": Preset(
        replace(_GMN, channels=127, width=127), 2_392_180, f"{_OCE}, k = 1", "siren-mnist"
    ),
    "gmn-oce-8": Preset(
        replace(_GMN, channels=127, width=127, expand=8), None,
        f"{_OCE}, k = 8 (its count is not known)", "siren-mnist",
    ),
    "scalegmn-edit-small": Preset(
        Config(16, 16, direction="both"), None, "ours: what two cores train", "siren-mnist"
    ),
}  # fmt: skip


class _Carrying(Metanetwork):
    """What model and editor have in common: a backbone that carries factors along."""

    space: Chain
    config: Config
    backbone: ScaleStack
    quasi: quasi.Layer | None

    def claims(self, space: WeightSpace) -> set[str]:
        """Permutations, with the factors that are carried along, as far as the quasi layer keeps
        them."""
        kept = quasi.keeps(self.quasi) or self._no_op()
        return claims(self.space, self.config) if kept else set()

    def _no_op(self) -> bool:
        """One element of the group that is carried along, which an invariant answer cancels."""
        return False

    def graphs(self, w: Mapping[str, Tensor], read: Set[int] | None = None) -> list[Graph]:
        """The graph after the entry, with the quasi layer on it, and after every layer."""
        layer = self.quasi
        put = None if layer is None else lambda graph: carried(layer, graph, w)
        return self.backbone(w, read, put)

    def shown(self, steps: list[Features]) -> list[tuple[str, Features]]:
        """Edges and nodes of layers 1..L after every layer, by name."""
        start = "layer" if self.quasi is None else "quasi-layer"  # not strict: equivariance.py
        return [(f"{start}{i}", features) for i, features in enumerate(steps)]

    def calibrate(self, w: Mapping[str, Tensor]) -> None:
        """Standardise by the training set, where the configuration says so."""
        if self.config.standardised:
            self.backbone.entry.calibrate(w)


class Model(_Carrying):
    """dict of (b, *shape) -> raw outputs (b, outputs)."""

    def __init__(self, space: Chain, config: Config = Config()) -> None:
        super().__init__()
        self.space, self.config = space, config
        self.backbone = _backbone(space, config)
        style = style_of(space, config)
        self.readout = _readout(space, config)(space, config.channels, config.outputs, style)
        # Drawn last: with one seed, every mode starts from the same backbone and head.
        self.quasi = _quasi(space, config)

    def _no_op(self) -> bool:
        carries = resolved(self.space, self.config) == "scale"
        return carries and isinstance(self.quasi, quasi.Paper)

    def equivariant(self, w: Mapping[str, Tensor]) -> list[tuple[str, Features]]:
        """Edges and nodes of layers 1..L after every layer."""
        return self.shown([graph.features() for graph in self.graphs(w)])

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        return self.readout(self.graphs(w, self.readout.read)[-1].nodes)


class Editor(_Carrying):
    """dict of (b, *shape) -> what each of k = `expand` branches adds to it, dict of (b, k, *shape).

    The last layer writes k channels on nodes, and on edges k for every tap. The delta of b_l is on
    the nodes of layer l, that of W_l on its edges: both carry the factors of what they join.
    """

    def __init__(self, space: Chain, config: Config = Config()) -> None:
        super().__init__()
        self.space, self.config = space, config
        self.backbone = _backbone(space, config, config.expand)
        self.windows, self.out = Windows(space), Deltas(space)
        self.quasi = _quasi(space, config)

    def equivariant(self, w: Mapping[str, Tensor]) -> list[tuple[str, Features]]:
        """Edges and nodes of layers 1..L after every layer."""
        steps = [graph.features() for graph in self.graphs(w)]
        edges, nodes = zip(*steps[-1], strict=True)
        branches = self.windows.branches(edges, self.config.expand)
        steps[-1] = list(zip(branches, nodes, strict=True))
        return self.shown(steps)

    def forward(self, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.out(self.equivariant(w)[-1][1])


def _quasi(space: Chain, config: Config) -> quasi.Layer | None:
    c = config.channels
    return quasi.make(config.quasi, space, c, c, config.eps, config.eps_learned)


def claims(space: Chain, config: Config) -> set[str]:
    """The groups that these maps commute with. Where an activation has signs and scales both
    (identity), only one of them is carried along."""
    name = resolved(space, config)
    if name == "permutation":
        return {"permutation"}
    whole = space.activation in HOMOGENEOUS and space.activation in ODD
    return {"permutation", name} | (set() if whole else {"monomial"})


def resolved(space: Chain, config: Config) -> str:
    """The name of the symmetry, where it is `auto` by the networks' activation."""
    name = config.symmetry
    if name not in ("auto", *SYMMETRIES):
        hint = suggest(name, ["auto", *SYMMETRIES])
        raise UsageError(f"scalegmn has no symmetry '{name}'", hint)
    scaled, signed = space.activation in HOMOGENEOUS, space.activation in ODD
    if name == "auto":
        name = "scale" if scaled else "sign"
    if name == "permutation" or (scaled if name == "scale" else signed):
        return name
    what = space.activation or "not known"
    raise UnsupportedError(
        f"scalegmn carries {name}s along, and the networks' activation is {what}",
        "say --activation, or choose symmetry = permutation",
    )


def _backbone(space: Chain, config: Config, writes: int = 0) -> ScaleStack:
    """`writes`: what the last layer writes on nodes, and on edges for every tap (0: as many
    channels on nodes as before, and no edges)."""
    require_hidden(space, "ScaleGMN")
    if config.direction not in DIRECTIONS:
        hint = suggest(config.direction, list(DIRECTIONS))
        raise UsageError(f"scalegmn has no direction '{config.direction}'", hint)
    symmetry, style = SYMMETRIES[resolved(space, config)], style_of(space, config)
    both, c, inner = config.direction == "both", config.channels, config.layers - 1
    codes, edges = c if config.inner_codes else 0, writes * Windows(space).largest
    layers = [ScaleLayer(c, c, c, symmetry, style, both, codes) for _ in range(inner)]
    last = replace(symmetry, two=False)  # its edges from above are read no more
    layers.append(ScaleLayer(c, writes or c, edges, last, style, both, codes))
    entry = ScaleEntry(space, c, symmetry, both, config.edge_codes)
    skips = (inner if writes else config.layers) if config.skip else 0
    return ScaleStack(entry, layers, skips, config.inner_codes, config.dropout, bool(writes))


def style_of(space: Chain, config: Config) -> blocks.Style:
    """How the blocks are made; UsageError for what there is not."""
    for name, value, known in (
        ("invariants", config.invariants, INVARIANTS),
        ("ends", config.ends, ENDS),
    ):
        if value not in known:
            raise UsageError(f"scalegmn has no {name} '{value}'", suggest(value, list(known)))
    scaled = resolved(space, config) == "scale"
    return blocks.Style(
        config.width,
        config.norm,
        config.inner_dropout,
        blocks.Direction if scaled else INVARIANTS[config.invariants],
        ENDS[config.ends],
        config.ends_apart,
    )


def _readout(
    space: Chain, config: Config
) -> type[EndsReadout | OutputsReadout | GraphReadout | PlainReadout]:
    if config.readout == "ends":
        return EndsReadout if config.direction == "both" else OutputsReadout
    if config.readout == "graph":
        plain = resolved(space, config) == "permutation"
        return PlainReadout if plain else GraphReadout
    hint = suggest(config.readout, list(READOUTS))
    raise UsageError(f"scalegmn has no readout '{config.readout}'", hint)
