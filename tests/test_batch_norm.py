"""Batch normalisation folded into its layer: the same function, found by names, refused where names
do not tell; and a zoo of such networks read like any other."""

from __future__ import annotations

import copy
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qemcli.checkpoints import open_checkpoint
from qemcli.errors import UnsupportedError
from qemcli.spaces import Opaque

WIDTHS = (5, 7, 6, 16)


def _network(seed: int, widths: tuple[int, ...] = WIDTHS, affine: bool = True) -> nn.Sequential:
    """Convolutions with norms that have seen data, the first without a bias, the last without a
    norm."""
    torch.manual_seed(seed)
    a, b, c, d = widths
    net = nn.Sequential(
        nn.Conv2d(1, a, 3, padding=1, bias=False), nn.BatchNorm2d(a, affine=affine), nn.ReLU(),
        nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(),
        nn.Conv2d(b, c, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, d), nn.BatchNorm1d(d),
        nn.ReLU(), nn.Linear(d, 3),
    ).double()  # fmt: skip
    for _ in range(3):
        net(1 + 2 * torch.randn(8, 1, 6, 6, dtype=torch.float64))
    for norm in (m for m in net if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and m.affine):
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.normal_(norm.bias)
    return net.eval()


def _plain(net: nn.Sequential) -> nn.Sequential:
    """The same network without norms, every layer with a bias."""
    found = copy.deepcopy(net)
    for i, module in enumerate(found):
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            found[i] = nn.Identity()
        if isinstance(module, nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.out_channels, dtype=torch.float64))
    return found


def _saved(state: dict[str, torch.Tensor], path: Path) -> Path:
    if path.suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("affine", [True, False])
def test_the_folded_network_is_the_same_function(tmp_path, suffix, affine) -> None:
    net = _network(0, affine=affine)
    checkpoint = open_checkpoint(_saved(net.state_dict(), tmp_path / f"net{suffix}"))
    space = checkpoint.space()
    assert space.widths == (1, *WIDTHS, 3)
    assert checkpoint.coverage(space) == 1
    assert {reason for n, reason in space.skipped if n == "1.running_var"} == {
        "batch normalisation, folded into '0.weight' (before the activation, eps 1e-05)"
    }
    folded = _plain(net)
    x = torch.randn(4, 1, 6, 6, dtype=torch.float64)
    spread = net(x).abs().max()
    assert (folded(x) - net(x)).abs().max() > 1e-2 * spread  # norms that are left out are seen
    state = {n: torch.tensor(a) for n, a in checkpoint.folded(space).items()}
    folded.load_state_dict(state)
    assert (folded(x) - net(x)).abs().max() < 1e-13 * spread
    row = torch.from_numpy(checkpoint.row(space))
    assert torch.equal(row, space.flatten({n: t[None] for n, t in state.items()})[0].float())


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 3)


def test_norms_are_joined_by_their_numbers_not_by_their_order(tmp_path) -> None:
    path = _saved(_Named().state_dict(), tmp_path / "named.pt")
    joined = {norm.mean: norm.weight for norm in open_checkpoint(path).norms}
    assert joined == {"bn1.running_mean": "conv1.weight", "bn2.running_mean": "conv2.weight"}


def _behind(activation: nn.Module) -> nn.Sequential:
    rest = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(nn.Conv2d(1, 4, 3), activation, nn.BatchNorm2d(4), *rest)


def _renamed(net: nn.Module, names: dict[str, str]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in net.state_dict().items():
        module, _, tail = name.rpartition(".")
        renamed[f"{names.get(module, module)}.{tail}"] = tensor
    return renamed


STRANGE = {
    "behind an activation": _behind(nn.ReLU()).state_dict(),
    "no name tells": _renamed(_Named(), {"bn1": "first", "bn2": "second"}),
    "two have the same number": _renamed(_Named(), {"fc1": "dense1", "conv2": "conv1b"}),
    "two norms of one layer": _renamed(_Named(), {"bn2": "norm1"}),
    "a variance is missing": {
        n: t for n, t in _Named().state_dict().items() if n != "bn1.running_var"
    },
    "a gain of another size": _Named().state_dict() | {"bn1.weight": torch.ones(3)},
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_names_do_not_tell_is_refused_and_listed_as_it_is(tmp_path, name) -> None:
    state = STRANGE[name]
    checkpoint = open_checkpoint(_saved(state, tmp_path / "net.pt"))
    assert checkpoint.norms == ()
    with pytest.raises(UnsupportedError, match="normalisation"):
        checkpoint.space()
    listed = checkpoint.listed()
    assert isinstance(listed, Opaque)
    assert {"bn1.running_mean", "2.running_mean", "first.running_mean"} & set(listed.names)
    assert len(checkpoint.row(listed)) == sum(
        t.numel() for t in state.values() if t.is_floating_point()
    )


def test_a_variance_that_is_none_is_flagged_and_not_fatal(run, tmp_path) -> None:
    state = _Named().state_dict() | {"bn1.running_var": torch.full((8,), -1.0)}
    found = run("inspect", _saved(state, tmp_path / "net.pt"), "--json")
    assert found.code == 0
    assert found.json["rows"][0]["finite"] is False
    assert "warning" not in found.err.lower()


def test_a_network_that_is_only_listed_is_not_folded(tmp_path) -> None:
    state = _Named().state_dict() | {"downsample.0.weight": torch.ones(8, 8, 1, 1)}
    checkpoint = open_checkpoint(_saved(state, tmp_path / "resnet.pt"))
    assert len(checkpoint.norms) == 2
    listed = checkpoint.listed()
    assert isinstance(listed, Opaque)
    assert "bn1.running_var" in listed.names
    assert checkpoint.holds(listed)
    assert len(checkpoint.row(listed)) == listed.size


@pytest.mark.parametrize("kind", ["folder", "archive", "index"])
def test_a_zoo_with_norms_is_answered_as_without(run, tmp_path, kind) -> None:
    """By the shipped predictor of such CNNs, from every place where networks may lie."""
    zoo, same = tmp_path / "zoo", tmp_path / "same"
    zoo.mkdir()
    same.mkdir()
    for i, suffix in enumerate((".pt", ".pt", ".safetensors", ".safetensors")):
        torch.manual_seed(i)
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        )  # fmt: skip
        net(2 * torch.randn(8, 1, 12, 12))
        path = _saved(net.state_dict(), zoo / f"run-{i}{suffix}")
        checkpoint = open_checkpoint(path)
        arrays = checkpoint.folded(checkpoint.space())
        _saved({n: torch.tensor(a).float() for n, a in arrays.items()}, same / path.name)
    wanted = run("predict", same, "--activation", "relu", "--json")
    asked = zoo
    if kind == "archive":
        asked = tmp_path / "zoo.tar"
        with tarfile.open(asked, "w") as tar:
            tar.add(zoo, "zoo")
    if kind == "index":
        assert run("index", zoo, "--activation", "relu").code == 0
        assert run("index", zoo, "--update", "--activation", "relu").code == 0
    found = run("predict", asked, "--activation", "relu", "--json")
    assert found.code == wanted.code == 0, found.err
    values = [[row["prediction"] for row in answer.json["rows"]] for answer in (found, wanted)]
    assert len(values[0]) == 4
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    assert max(values[0]) - min(values[0]) > 1e-3
