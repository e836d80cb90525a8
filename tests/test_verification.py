"""The verifier judges rightly: what is invariant passes, what is not fails, what cannot be told
says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qemcli import verification
from qemcli.designs import Design
from qemcli.errors import InconclusiveError, UsageError
from qemcli.layers.twin import Twin
from qemcli.predictors import Predictor
from qemcli.spaces import Chain, cnn, mlp
from qemcli.verification import Check

SPACE = cnn([1, 5, 7, 4], 3, positions=4)
CHECK = Check(samples=6)


def _networks(space: Chain, count: int = 8) -> Tensor:
    return 0.3 * torch.randn(count, space.size, generator=torch.Generator().manual_seed(3))


def _predictor(architecture: str, quasi: str, **config: object) -> Predictor:
    torch.manual_seed(0)
    design = Design(architecture, quasi, dict(config))
    return Predictor("p", SPACE, design, "generalization", design.build(SPACE).eval())


@pytest.mark.parametrize("architecture", ["statnn", "nfn", "monomial_nfn"])
def test_balanced_predictor_holds(architecture: str) -> None:
    report = verification.verify(
        _predictor(architecture, "balanced"), _networks(SPACE), None, CHECK
    )
    assert report.code == 0
    assert "monomial" in report.claimed
    assert report.sensitive


@pytest.mark.parametrize("quasi", ["none", "paper", "exact"])
def test_monomial_predictor_holds_layer_by_layer(quasi: str) -> None:
    predictor = _predictor("monomial_nfn", quasi)
    report = verification.verify(predictor, _networks(SPACE), None, CHECK)
    assert report.code == 0
    assert any(r["kind"] == "equivariance" for r in report.rows)


def test_bad_twin_is_found() -> None:
    report = verification.verify(_predictor("nfn", "none"), _networks(SPACE), "monomial", CHECK)
    assert report.code == 1
    assert report.broken == ["monomial"]


@pytest.mark.parametrize("architecture", ["statnn", "nfn", "monomial_nfn"])
def test_twin_of_a_predictor_that_holds_does_not(architecture: str) -> None:
    predictor = _predictor(architecture, "balanced")
    twin = replace(predictor, model=Twin(predictor.model, SPACE))
    report = verification.verify(twin, _networks(SPACE), None, CHECK)
    assert report.claimed == sorted(predictor.claims)
    assert report.code == 1
    assert {"monomial", "permutation"} <= set(report.broken)


def test_released_quasi_layer_does_not_hold_and_its_leak_is_told() -> None:
    predictor = _predictor("monomial_nfn", "released", eps=0.5)
    report = verification.verify(predictor, _networks(SPACE), "monomial", CHECK)
    assert report.code == 1
    (leak,) = [r for r in report.rows if r["kind"] == "leak"]
    assert leak["max_error"] > 1e-4
    assert leak["holds"] is None


def test_paper_quasi_layer_leaks_nothing_and_exact_does() -> None:
    found = {}
    for quasi in ("paper", "exact"):
        predictor = _predictor("monomial_nfn", quasi, eps=0.5)
        report = verification.verify(predictor, _networks(SPACE), None, CHECK)
        (leak,) = [r for r in report.rows if r["kind"] == "leak"]
        found[quasi] = leak["max_error"]
    assert found["paper"] < 1e-10
    assert found["exact"] > 1e-4


def test_predictor_that_claims_nothing_cannot_be_told() -> None:
    report = verification.verify(_predictor("flat_mlp", "none"), _networks(SPACE), None, CHECK)
    assert report.code == 6


def test_constant_predictor_is_inconclusive() -> None:
    predictor = _predictor("statnn", "none")
    for p in predictor.model.parameters():
        nn.init.zeros_(p)
    with pytest.raises(InconclusiveError, match="same to every network"):
        verification.verify(predictor, _networks(SPACE), None, CHECK)


class WrongOnPurpose(nn.Module):
    """Sums that ignore order everywhere but in one neuron: nearly invariant, and not."""

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        total = sum(x.flatten(1).square().sum(1) for x in w.values())
        return (total + 1e-4 * w["conv2.bias"][:, 0])[:, None]


class Norms(nn.Module):
    """The sum of squares: invariant to permutations, not to scales."""

    def forward(self, w: Mapping[str, Tensor]) -> Tensor:
        return sum(x.flatten(1).square().sum(1) for x in w.values())[:, None]


@pytest.mark.parametrize(("model", "code"), [(WrongOnPurpose(), 1), (Norms(), 0)])
def test_stranger_is_judged(model: nn.Module, code: int) -> None:
    w = SPACE.unflatten(_networks(SPACE).double())
    groups = ["permutation"]
    report = verification.verify_predictor(model, SPACE, w, groups, groups, CHECK)
    assert report.code == code


def test_nfn_from_pypi_is_judged() -> None:
    """The published HNP network: invariant to permutations (0), not to scales (1)."""
    from nfn.common import WeightSpaceFeatures, network_spec_from_wsfeat
    from nfn.layers import HNPLinear, HNPPool, TupleOp

    space = cnn([1, 5, 7, 4], 3)

    def features(w: Mapping[str, Tensor]) -> WeightSpaceFeatures:
        weights = [w[la.weight][:, None] for la in space.layers]
        return WeightSpaceFeatures(weights, [w[str(la.bias)][:, None] for la in space.layers])

    flat = _networks(space)
    torch.manual_seed(0)
    spec = network_spec_from_wsfeat(features(space.unflatten(flat)))
    linear, pool = HNPLinear(spec, 1, 4), HNPPool(spec)
    body = nn.Sequential(linear, TupleOp(nn.ReLU()), pool, nn.Flatten())

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body.double()

        def forward(self, w: Mapping[str, Tensor]) -> Tensor:
            return self.body(features(w))[:, :3]

    w = space.unflatten(flat.double())
    for group, code in (("permutation", 0), ("monomial", 1)):
        report = verification.verify_predictor(Adapter(), space, w, [group], [group], CHECK)
        assert report.code == code, group


def test_network_function_holds_and_controls_move() -> None:
    space = mlp([3, 6, 4, 2])
    w = space.unflatten(_networks(space, 1).double())
    report = verification.verify_network(space, w, ["permutation", "scale", "monomial"], CHECK)
    assert report.code == 0
    assert {r["kind"] for r in report.rows} == {"function", "control"}


def test_networks_that_do_not_fit_are_inconclusive() -> None:
    with pytest.raises(InconclusiveError, match="0 finite networks"):
        verification.networks(SPACE, [], 8, None)


def test_module_that_is_not_there_is_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no_such_module"):
        verification.module("no_such_module:make", None)


@pytest.mark.parametrize(("group", "code"), [(None, 0), ("monomial", 1)])
def test_command_leaves_with_the_verdict(group, code, run, tmp_path, monkeypatch) -> None:
    from zoo_kit import write_zoo

    zoo = write_zoo(tmp_path / "zoo", SPACE, _networks(SPACE))
    folder = tmp_path / "predictor"
    _predictor("nfn", "none").save(folder)
    more = ["--group", group] if group else []
    ran = run("verify-invariance", folder, "--zoo", zoo, "--samples", 3, "--json", *more)
    assert ran.code == code
    assert {"rows", "verdict", "tolerance", "claims"} <= set(ran.json)
    picture = tmp_path / "errors.png"
    run("verify-invariance", folder, "--zoo", zoo, "--samples", 3, "--picture", picture)
    assert picture.stat().st_size > 1000


def test_command_on_a_module_of_ones_own(run, tmp_path, monkeypatch) -> None:
    from safetensors.torch import save_file
    from zoo_kit import write_zoo

    zoo = write_zoo(tmp_path / "zoo", SPACE, _networks(SPACE))
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Mine(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.scale = nn.Parameter(torch.ones(1))\n\n"
        "    def forward(self, w):\n"
        "        return self.scale * w['conv1.weight'].flatten(1).square().sum(1, keepdim=True)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    weights = tmp_path / "mine.safetensors"
    save_file({"scale": torch.full((1,), 2.0)}, weights)
    call = ["verify-invariance", weights, "--module", "mine:Mine", "--zoo", zoo, "--samples", 3]
    assert run(*call, "--group", "permutation").code == 0
    assert run(*call, "--group", "scale").code == 1
    assert run(*call[:3], "mine:Nobody", *call[4:]).code == 2
