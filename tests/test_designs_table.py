"""The table of designs says what is: every architecture with every quasi layer and with branches is
built, run and found to keep what it claims, or refused in one line that says what to take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_kit import draw_weights, randomise

from qemcli import groups, registry
from qemcli.designs import QUASI, Design, editors, kinds
from qemcli.errors import QemError
from qemcli.layers.quasi import leak
from qemcli.layers.shown import Shown
from qemcli.predictors import Predictor
from qemcli.spaces import WeightSpace, cnn, residual, siren, small_transformer
from qemcli.testing import invariance_error, sensitivity

TABLE = Path(__file__).parents[1] / ".github" / "DESIGNS.md"
NETWORKS: dict[str, WeightSpace] = {
    "chain": cnn([1, 4, 3, 5], 2),
    "residual": residual(cnn([1, 4, 3, 4], 2), [-1, -1, 0, -1]),
    "transformer": small_transformer(6, 2, 5, 1, 4, (3, 2)),
}
SIREN = siren([2, 5, 4, 1], image=(1, 5, 5))
SMALL: dict[str, dict[str, Any]] = {
    "dws": {"hidden": 4, "depth": 1, "heads": 2},
    "flat_mlp": {"head": 8},
    "gmn": {"channels": 4, "layers": 2},
    "neural_graphs": {"channels": 8, "layers": 2},
    "nfn": {"channels": (4, 3), "head": 8},
    "nft": {"channels": 8, "heads": 2, "depth": 1, "fourier": 3, "fourier_scale": 0.2, "head": 8},
    "monomial_nfn": {"channels": (4, 3), "head": 8},
    "probegen": {"probes": 4},
    "probestat": {"probes": 4, "head": 8},
    "scalegmn": {"channels": 4, "width": 4, "layers": 2},
    "spectral": {"head": 8},
    "statnn": {"head": 8},
    "transformer_nfn": {"channels": (3,)},
}
NAMES = registry.names("architectures")
LIMIT = 1e-9
WORDS = ("quasi layer", "editor", "expand")  # of refusals that name no architecture


def own_network(architecture: str) -> WeightSpace:
    """What its cells are tried on."""
    if architecture == "rendered_cnn":
        return SIREN
    read = kinds(registry.load("architectures", architecture))
    return next(space for space in NETWORKS.values() if isinstance(space, read))


def made(design: Design, space: WeightSpace) -> tuple[Predictor, Mapping[str, torch.Tensor]]:
    """A predictor whose parameters are drawn anew, and networks."""
    torch.manual_seed(0)
    model = randomise(design.build(space, 2).double().eval())
    if isinstance(model, Shown):  # small deltas: sin(30 x) makes much of rounding
        torch.nn.init.constant_(model.editor.out.scales, 1e-3)
    w = draw_weights(space, 4, torch.Generator().manual_seed(1))
    model.calibrate(w)
    task = "generalization" if design.edit is None else "editing"
    return Predictor("made", space, design, task, model), w


def outcome(design: Design, space: WeightSpace) -> set[str] | None:
    """The groups that it keeps, each of them measured, and controls seen; None where refused."""
    refused = None
    try:
        predictor, w = made(design, space)
    except QemError as error:
        refused = error
    if refused is not None:
        message = str(refused)
        assert design.architecture in message or any(w in message for w in WORDS), message
        assert "\n" not in message
        assert refused.hint, message
        return None
    with torch.no_grad():
        assert predictor(w).isfinite().all()
        for group in sorted(predictor.claims):
            element = groups.sample(group, space, 4, torch.Generator().manual_seed(2))
            moved = invariance_error(predictor, space, w, element).max()
            assert moved < LIMIT, (design, group, float(moved))
        if predictor.claims:
            seen = sensitivity(predictor, space, w, torch.Generator().manual_seed(3))
            assert max(float(change.max()) for change in seen.values()) > 1e3 * LIMIT, design
    return predictor.claims


def word(claims: set[str] | None, base: set[str] | None) -> str:
    """What a mode does to the claims of the design without one."""
    if claims is None or base is None:
        return "refused"
    if claims == base:
        return "kept" if base else "none"
    if claims > base:
        return f"and {', '.join(sorted(claims - base))}"
    return f"only {', '.join(sorted(claims))}" if claims else "none"


def cells(architecture: str, space: WeightSpace, more: dict[str, Any]) -> list[str]:
    """The claims without a quasi layer, and what every mode does to them."""
    base, found = None, []
    for mode in QUASI:
        inside = {"eps": 0.5} if mode not in ("none", "balanced") else {}
        config = {**SMALL.get(architecture, {}), **more, **inside}
        claims = outcome(Design(architecture, mode, config), space)
        if mode == "none":
            base = claims
            found.append("refused" if claims is None else ", ".join(sorted(claims)) or "none")
        else:
            found.append(word(claims, base))
    return found


def lines(title: str) -> list[str]:
    """The rows of the table under this title."""
    _, _, rest = TABLE.read_text(encoding="utf-8").partition(f"## {title}\n")
    assert rest, title
    table = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    return table[1:]


@pytest.mark.parametrize("architecture", NAMES)
def test_every_quasi_layer_is_as_the_table_says(architecture: str) -> None:
    row = [f"`{architecture}`", *cells(architecture, own_network(architecture), {})]
    assert f"| {' | '.join(row)} |" in lines("Quasi layers")


@pytest.mark.parametrize("architecture", editors())
def test_every_editor_with_branches_is_as_the_table_says(architecture: str) -> None:
    row = [f"`{architecture}`", *cells(architecture, SIREN, {"edit": "dilate", "expand": 3})]
    assert f"| {' | '.join(row)} |" in lines("Editors and output expansion")


@pytest.mark.parametrize("architecture", NAMES)
def test_every_kind_of_network_is_read_or_refused(architecture: str) -> None:
    config, found = SMALL.get(architecture, {}), []
    for name, space in NETWORKS.items():
        if architecture == "rendered_cnn" and name == "chain":
            space = SIREN
        refused = outcome(Design(architecture, "none", config), space) is None
        found.append("no" if refused else "yes")
    many = hasattr(registry.load("architectures", architecture), "Mixture")
    row = [f"`{architecture}`", *found, "yes" if many else "no"]
    assert f"| {' | '.join(row)} |" in lines("Networks")


def test_table_has_no_other_rows() -> None:
    assert len(lines("Quasi layers")) == len(lines("Networks")) == len(NAMES)
    assert len(lines("Editors and output expansion")) == len(editors())


@pytest.mark.parametrize("architecture", sorted(set(NAMES) - set(editors())))
def test_branches_are_refused_where_nothing_is_edited(architecture: str) -> None:
    space = own_network(architecture)
    for config in ({"expand": 3}, {"edit": "dilate", "expand": 3}):
        assert outcome(Design(architecture, "none", config), space) is None


def test_no_editor_has_less_than_one_branch() -> None:
    for architecture in editors():
        assert outcome(Design(architecture, config={"edit": "dilate", "expand": 0}), SIREN) is None


@pytest.mark.parametrize("architecture", ["monomial_nfn", "scalegmn"])
def test_one_group_element_on_all_channels_is_a_no_op_under_an_exact_head(architecture) -> None:
    """And a scale of its own on every channel is none: the control."""
    moved = {}
    for mode in ("paper", "exact"):
        config = {**SMALL[architecture], "eps": 0.5}
        predictor, w = made(Design(architecture, mode, config), NETWORKS["chain"])
        with torch.no_grad():
            change = leak(predictor.metanetwork, w).abs().max()
            moved[mode] = float(change / predictor(w).std())
    assert moved["paper"] < 1e-10
    assert moved["exact"] > 1e-3
