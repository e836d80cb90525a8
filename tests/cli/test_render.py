"""qem render: pictures and their rows, each network by its own convention, bad input named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qemcli.report import sheet
from qemcli.signals import render
from qemcli.spaces import Chain, mlp, siren
from qemcli.zoos.store import Store

IMAGE = (1, 6, 5)
SPREAD = {"nfn": (0.29, 0.41), "dws": (0.06, 0.02)}  # of the first weights and biases


def draw(space: Chain, seed: int, first: tuple[float, float] = (0.29, 0.41)) -> dict:
    """Weights spread as in a published zoo."""
    rng = torch.Generator().manual_seed(seed)
    w = {n: 0.02 * torch.randn(s, generator=rng) for n, s in space.shapes.items()}
    names = list(w)
    w[names[0]] *= first[0] / 0.02
    w[names[1]] *= first[1] / 0.02
    w[names[-2]] *= 5
    return w


def raw(path: Path, names: str = "net.{}.linear", convention: str = "nfn", outputs: int = 1):
    """A SIREN as it is published: a state dict, and nothing that says how it is run."""
    space = siren([2, 32, 32, outputs])
    stems = [names.format(0), names.format(1), "net.2" if "linear" in names else names.format(2)]
    tensors = draw(space, 0, SPREAD[convention]).values()
    keys = [f"{stem}.{kind}" for stem in stems for kind in ("weight", "bias")]
    torch.save(dict(zip(keys, tensors, strict=True)), path)
    return path


def written(path: Path, space: Chain, seed: int = 0, **said: str) -> Path:
    """A checkpoint that states its own weight space."""
    save_file(draw(space, seed), path, {"qem.space": space.to_json(), **said})
    return path


def png(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with one network of each convention."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in ("nfn", "dws"):
        space = siren([2, 6, 4, 1], convention=name, image=IMAGE)
        written(folder / f"{name}.safetensors", space, psnr="41.5", label="7")
    return folder


def test_render_writes_a_picture_and_rows(run, mixed, tmp_path):
    result = run("render", mixed, "--out", tmp_path / "a.png", "--json")
    assert result.code == 0
    rows = {row["checkpoint"]: row for row in result.json["rows"]}
    assert set(rows) == {"nfn.safetensors", "dws.safetensors"}
    for name in ("nfn", "dws"):
        space = siren([2, 6, 4, 1], convention=name, image=IMAGE)
        image = render(space, {n: t[None] for n, t in draw(space, 0).items()})
        row = rows[f"{name}.safetensors"]
        assert (row["channels"], row["height"], row["width"]) == IMAGE
        assert row["min"] == pytest.approx(float(image.min()), abs=1e-6)
        assert row["max"] == pytest.approx(float(image.max()), abs=1e-6)
        assert (row["convention"], row["psnr"], row["label"]) == (name, 41.5, 7)
    assert png(tmp_path / "a.png").std() > 0
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["a.png"]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_render_takes_another_size_and_format(run, mixed, tmp_path, suffix):
    out = tmp_path / f"a{suffix}"
    result = run("render", mixed / "nfn.safetensors", "-o", out, "--size", "9x4", "--json")
    assert (result.json["rows"][0]["height"], result.json["rows"][0]["width"]) == (9, 4)
    assert out.stat().st_size > 500


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "9"], "HEIGHTxWIDTH"), (["--size", "0x4"], "HEIGHTxWIDTH"),
        (["--size", "99999x4"], "2048"), (["--out", "a.gif"], ".png"),
        (["--out", "none/a.png"], "no such folder"), (["--convention", "nfm"], "nfn, dws"),
        (["--where", "colour == 1"], "colour"),
    ],
)  # fmt: skip
def test_render_refuses_wrong_options(run, mixed, tmp_path, arguments, said):
    result = run("render", mixed, *arguments)
    assert result.code == 2
    assert said in result.err
    assert not [p for p in tmp_path.iterdir() if p.is_file()]


@pytest.mark.parametrize(
    ("names", "convention"), [("net.{}.linear", "nfn"), ("seq.{}", "dws"), ("seq.{}", "nfn")]
)
def test_published_names_are_a_chain_and_nothing_is_claimed(run, tmp_path, names, convention):
    path = raw(tmp_path / "net7.pth", names, convention)
    result = run("inspect", path, "--json")
    found = result.json
    assert (found["family"], found["widths"]) == ("mlp", [2, 32, 32, 1])
    assert (found["activation"], found["groups"]) == (None, ["permutation"])
    assert f"--w0 30 --convention {convention}" in found["hint"]
    assert f"--w0 30 --convention {convention}" in result.err
    refused = run("render", path, "--size", "8x8")
    assert refused.code == 3
    assert "--w0 30 --convention" in refused.err
    assert not (tmp_path / "render.png").exists()
    said = ("--w0", "30", "--convention", convention)
    known = run("inspect", path, "--json", *said).json
    assert (known["family"], known["activation"]) == ("siren", "sin")
    assert "phase" in known["groups"]
    assert "hint" not in known
    shown = run("render", path, "--size", "8x8", "--json", *said)
    assert (shown.code, shown.json["rows"][0]["convention"]) == (0, convention)


def test_w0_alone_is_not_enough_to_render(run, tmp_path):
    path = raw(tmp_path / "net7.pth")
    result = run("render", path, "--size", "8x8", "--w0", "30")
    assert result.code == 3
    assert "axes and levels" in result.err
    w0 = {"activation": "sin", "w0": "30"}
    save_file(torch.load(path), tmp_path / "a.safetensors", w0)
    assert "axes and levels" in run("render", tmp_path / "a.safetensors").err
    save_file(torch.load(path), tmp_path / "a.safetensors", {**w0, "convention": "dws"})
    assert "--size" in run("render", tmp_path / "a.safetensors").err
    result = run("render", tmp_path / "a.safetensors", "--size", "8x8", "--json")
    assert result.json["rows"][0]["convention"] == "dws"


def test_mlp_with_ordinary_weights_is_not_taken_for_a_siren(run, tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(2, 32), torch.nn.Linear(32, 32), torch.nn.Linear(32, 1)
    )
    torch.save(net.state_dict(), tmp_path / "a.pt")
    assert "spread" not in run("inspect", tmp_path / "a.pt", "--json").json["hint"]
    image = torch.nn.Sequential(
        torch.nn.Linear(3, 32), torch.nn.Linear(32, 32), torch.nn.Linear(32, 1)
    )
    torch.save(image.state_dict(), tmp_path / "b.pt")
    assert "hint" not in run("inspect", tmp_path / "b.pt", "--json").json


BAD = {
    "relu": (mlp([2, 6, 1], "relu"), "network with relu"),
    "two outputs": (siren([2, 6, 2], image=(2, 4, 4)), "2 outputs"),
    "one input": (siren([1, 6, 1]), "1 inputs"),
    "no size": (siren([2, 6, 1]), "size of the image"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_image_inr_is_refused_and_counted(run, mixed, tmp_path, case):
    space, said = BAD[case]
    alone = written(tmp_path / "alone.safetensors", space)
    single = run("render", alone, "--out", tmp_path / "a.png")
    assert (single.code, single.out) == (3, "")
    assert said in single.err
    assert not (tmp_path / "a.png").exists()
    written(mixed / "bad.safetensors", space)
    zoo = run("render", mixed, "--out", tmp_path / "a.png", "--json")
    assert zoo.code == 4
    assert len(zoo.json["rows"]) == 2
    (failed,) = zoo.json["failed"]
    assert failed["checkpoint"] == "bad.safetensors"
    assert said in failed["reason"]
    assert (tmp_path / "a.png").exists()
    several = run("render", mixed / "nfn.safetensors", alone, "--json")
    assert (several.code, len(several.json["failed"])) == (4, 1)
    strict = run("render", mixed, "--strict", "--out", tmp_path / "b.png")
    assert strict.code == 3
    assert not (tmp_path / "b.png").exists()


def test_weights_that_are_not_finite_are_named(run, mixed):
    space = siren([2, 6, 4, 1], image=IMAGE)
    w = draw(space, 0)
    w["0.weight"][0, 0] = float("nan")
    save_file(w, mixed / "nan.safetensors", {"qem.space": space.to_json()})
    result = run("render", mixed, "--json")
    assert result.code == 4
    assert "not finite" in result.json["failed"][0]["reason"]


def test_published_archive_is_rendered_without_extraction(run, tmp_path):
    path = tmp_path / "siren_mnist_wts.tar"
    net = raw(tmp_path / "net.pth").read_bytes()
    with tarfile.open(path, "w") as archive:
        for i in range(80):
            info = tarfile.TarInfo(f"siren_mnist_wts/randinit_smaller_{i % 10}s/net{i}.pth")
            info.size = len(net)
            archive.addfile(info, io.BytesIO(net))
        bad = tarfile.TarInfo("siren_mnist_wts/randinit_smaller_0s/net99.pth")
        archive.addfile(bad)
    result = run("render", path, "--json", "--limit", "3")
    assert result.code == 0  # the bad one is not among the first three
    rows = result.json["rows"]
    assert [row["label"] for row in rows] == [0, 0, 0]
    assert (rows[0]["height"], rows[0]["convention"]) == (28, "nfn")
    result = run("render", path, "--json")
    assert "64 of 81" in result.err
    assert {row["label"] for row in result.json["rows"]} == set(range(10))
    assert len(run("render", path, "--json", "--where", "label == 3").json["rows"]) == 8


def test_zoo_in_our_own_layout_is_rendered(run, tmp_path):
    space = siren([2, 6, 4, 3], convention="dws", image=(3, 4, 4))
    flat = np.stack([space.flatten({n: t[None] for n, t in draw(space, i).items()})[0].numpy()
                     for i in range(3)])  # fmt: skip
    store = Store(tmp_path / "own")
    rows = [{"checkpoint": f"net-{i}", "label": i, "psnr": 40.0 + i} for i in range(3)]
    store.write(0, space, flat, rows)
    store.finish(1, {"name": "own"})
    result = run("render", tmp_path / "own", "--json", "--where", "psnr > 40.5")
    assert [(row["label"], row["psnr"], row["convention"]) for row in result.json["rows"]] == [
        (1, 41.0, "dws"), (2, 42.0, "dws"),
    ]  # fmt: skip


def test_nothing_to_render_is_said(run, tmp_path, monkeypatch):
    monkeypatch.setattr("qemcli.zoos.resolve.shipped", lambda kind: tmp_path / kind)
    result = run("render")
    assert result.code == 3
    assert "no ZOO" in result.err
    assert run("render", tmp_path / "nowhere").code == 2


def test_sheet_shows_the_pixels_it_was_given(tmp_path):
    red = np.zeros((3, 4, 4), np.float32)
    red[0] = 1.0
    grey = np.linspace(-0.5, 1.5, 8, dtype=np.float32).reshape(1, 2, 4)
    sheet([[red, grey], [grey]], [["$x_1\x1b漢", "b"], []], tmp_path / "a.png", ["before", "after"])
    pixels = png(tmp_path / "a.png")
    assert pixels.shape[1] == 8 + 96 + 2 * (96 + 8)
    assert pixels[8 : 8 + 96, 104 : 104 + 96].reshape(-1, 3).tolist() == [[255, 0, 0]] * 96**2
    tile = pixels[8 : 8 + 96, 208 : 208 + 96]
    inner = tile[24:72]  # half as high as wide: in the middle, on grey
    assert (tile[:24] == tile[0, 0]).all()
    assert inner[12, 12, 0] == 0  # clipped
    assert inner[36, 84, 0] == 255
    assert abs(int(inner[12, 60, 0]) - round(255 * float(grey[0, 0, 2].clip(0, 1)))) <= 1


def test_failed_writing_leaves_the_old_picture(run, mixed, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    out = tmp_path / "a.png"
    out.write_bytes(b"old")

    def full(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    result = run("render", mixed, "--out", out)
    assert result.code == 5
    assert out.read_bytes() == b"old"
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == '["a.png", "mixed"]'


def test_what_the_caller_says_holds_for_the_sirens_of_a_folder_alone(run, tmp_path):
    folder = tmp_path / "zoo"
    folder.mkdir()
    raw(folder / "a.pth")
    raw(folder / "b.pth", "seq.{}")
    relu = torch.load(folder / "b.pth")
    save_file(relu, folder / "c.safetensors", {"activation": "relu"})
    arguments = ("render", folder, "--size", "6x6", "--json")
    assert run(*arguments).code == 3
    result = run(*arguments, "--w0", "30", "--convention", "dws")
    assert result.code == 4
    assert [row["checkpoint"] for row in result.json["rows"]] == ["a.pth", "b.pth"]
    (failed,) = result.json["failed"]
    assert failed["checkpoint"] == "c.safetensors"
    assert "network with relu" in failed["reason"]
