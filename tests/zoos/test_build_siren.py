"""SIRENs fitted side by side are the SIRENs that autograd and torch's Adam would fit one by one."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from torch import Tensor

from qemcli import signals
from qemcli.errors import InputError, UsageError
from qemcli.functions import respond
from qemcli.spaces import Chain, siren
from qemcli.zoos.build import recipe, run, siren_zoo
from qemcli.zoos.build.siren import Batch, Fit, fitted, slots
from qemcli.zoos.build.siren_recipe import INITS, SirenRecipe
from qemcli.zoos.zoo import Zoo

PLAN = SirenRecipe(
    name="tiny", train=4, val=2, test=3, widths=(16, 12), psnr=22.0, steps=120, lr=5e-3, block=4
)
CASES = [
    siren((2, 7, 5, 3), 11.0, "nfn", (3, 6, 9)),
    siren((2, 4, 1), 30.0, "dws", (1, 5, 4)),
    siren((2, 6, 5, 4, 1), 11.0, "dws", (1, 5, 7)),
]
each_case = pytest.mark.parametrize("space", CASES, ids=["colour", "shallow", "deep"])


def _begun(space: Chain, fit: Fit, count: int = 3) -> tuple[Batch, Tensor, Tensor]:
    """A batch in float64 with random networks and images: the batch, weights, images."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(count, space.size, generator=generator, dtype=torch.float64) * 0.3
    image = torch.rand(count, *(space.forward.image or ()), generator=generator).double()
    batch = Batch(space, fit, count, torch.float64)
    batch.load(torch.arange(count), flat, image)
    return batch, flat, image


def _errors(space: Chain, flat: Tensor, image: Tensor) -> Tensor:
    """Mean squared errors (n,), by the way networks are run everywhere else."""
    x = signals.coordinates(space, *image.shape[2:], torch.float64)
    shown = respond(space, space.unflatten(flat), x).transpose(1, 2)
    return (shown - image.flatten(2)).square().mean((1, 2))


@each_case
def test_gradient_is_autograd_s(space: Chain) -> None:
    batch, flat, image = _begun(space, Fit(first_w0=space.forward.w0))
    errors = batch.measure()
    flat.requires_grad_()
    wanted = _errors(space, flat, image)
    wanted.sum().backward()
    batch.flat = batch.gradient  # read in the order of the space
    found = batch.parameters(torch.arange(3))
    torch.testing.assert_close(errors, wanted.detach(), rtol=1e-12, atol=0)
    assert flat.grad is not None
    assert (found - flat.grad).abs().max() < 1e-10 * flat.grad.abs().max()


@each_case
def test_steps_are_those_of_torch_s_adam(space: Chain) -> None:
    batch, flat, image = _begun(space, Fit(first_w0=space.forward.w0, lr=3e-3))
    alone = flat.clone().requires_grad_()
    adam = torch.optim.Adam([alone], lr=3e-3)
    for _ in range(4):
        batch.measure()
        batch.step()
        adam.zero_grad()
        _errors(space, alone, image).sum().backward()
        adam.step()
    found = batch.parameters(torch.arange(3))
    assert (alone.detach() - flat).abs().max() > 5e-3
    torch.testing.assert_close(found, alone.detach(), rtol=1e-9, atol=1e-9)


def test_fast_waves_are_sine_and_cosine() -> None:
    space = siren((2, 8, 8, 1), 30.0, "dws", (1, 16, 16))
    batch = Batch(space, Fit(), 1)
    turns = torch.linspace(-6, 6, 8 * 256).view(1, 8, 256)
    sine, dip = torch.empty(1, 8, 256), torch.empty(1, 8, 256)
    angle = 2 * torch.pi * turns.double()
    batch._waves(turns.clone(), sine, dip)
    assert (sine - angle.sin()).abs().max() < 1e-6
    assert (1 - dip / 2 - angle.cos()).abs().max() < 1e-6


def test_first_layer_s_own_w0_is_folded_into_its_weights() -> None:
    space = siren((2, 5, 4, 1), 10.0, "nfn", (1, 6, 6))
    batch, flat, image = _begun(space, Fit(first_w0=25.0))
    found = batch.parameters(torch.arange(3))
    torch.testing.assert_close(found[:, 15:], flat[:, 15:])
    torch.testing.assert_close(found[:, :15], flat[:, :15] * 2.5)  # 5 x 2 weights, 5 biases
    torch.testing.assert_close(batch.measure(), _errors(space, found, image))
    assert (_errors(space, flat, image) - batch.measure()).abs().min() > 1e-3


@pytest.mark.parametrize("count", [1, 2, 5])
def test_networks_leave_at_their_own_goal(count: int) -> None:
    space = siren((2, 8, 6, 1), 10.0, "dws", (1, 6, 6))
    plan = dataclasses.replace(PLAN, widths=(8, 6), w0=10.0)
    image = torch.rand(7, 1, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    starts = [(i, siren_zoo.initial(space, plan, i).double(), image[i] * i / 8) for i in range(7)]
    found = {}
    for size in (count, 7):
        batch = Batch(space, Fit(10.0, 1e-2, 1e-3, 37), size, torch.float64)
        found[size] = {f.number: f for f in fitted(batch, starts)}
        assert sorted(found[size]) == list(range(7))
    for i, alone in found[count].items():
        assert alone.steps == found[7][i].steps
        torch.testing.assert_close(alone.flat, found[7][i].flat, rtol=1e-8, atol=1e-10)
        error = _errors(space, alone.flat[None], starts[i][2][None])
        assert float(error) == pytest.approx(alone.mse, rel=1e-9)  # frozen where it was measured
        assert alone.mse <= 1e-3 or alone.steps == 37
    steps = {f.steps for f in found[7].values()}
    assert len(steps) > 2
    assert max(steps) == 37


@pytest.mark.parametrize("init", INITS)
def test_initial_weights_are_the_recipe_s(init: str) -> None:
    space = siren((2, 400, 300, 1), 30.0, "nfn", (1, 4, 4))
    flat = siren_zoo.initial(space, dataclasses.replace(PLAN, init=init), 3)
    (w1, b1), (w2, b2), (w3, b3) = space.matrices(space.unflatten(flat[None]))
    bounds = {
        "nfn": (1 / 2, 2**-0.5, 0.1225 / 30, 400**-0.5, 0.1414 / 30),
        "dws": (3**0.5 / 30, 0, 0.1225 / 30, 0, 300**-0.5),
        "dws-first": (1 / 2, 0, 0.1225 / 30, 0, 300**-0.5),
    }[init]
    for values, bound in zip((w1, b1, w2, b2, w3), bounds, strict=True):
        assert float(values.abs().max()) == pytest.approx(bound, rel=0.02)
    assert 0 < float(b3.abs()) < 300**-0.5


@pytest.fixture(scope="module")
def pictures() -> siren_zoo.Pictures:
    return siren_zoo.load(PLAN)


@pytest.mark.parametrize("convention", ["nfn", "dws"])
def test_stored_psnr_is_that_of_the_stored_weights(
    convention: str, pictures: siren_zoo.Pictures, tmp_path: Path
) -> None:
    plan = dataclasses.replace(PLAN, convention=convention)
    summary = run.build(plan, pictures, tmp_path / "zoo", 1)
    zoo = Zoo.open(tmp_path / "zoo")
    ((space, flat, positions),) = zoo.load()
    assert (space.forward.w0, space.forward.axes) == (30.0, {"nfn": "ij", "dws": "xy"}[convention])
    assert zoo.record["recipe"]["convention"] == convention
    rows = zoo.index.iloc[positions]
    black, white = space.forward.levels
    outputs = respond(space, space.unflatten(flat), signals.coordinates(space, 8, 8))
    shown = ((outputs - black) / (white - black)).transpose(1, 2).unflatten(2, (8, 8))
    where = {(s, r): i for i, (s, r) in enumerate(zip(pictures.split, pictures.row, strict=True))}
    own = [where[key] for key in zip(rows["split"], rows["image"], strict=True)]
    mse = (shown - pictures.pixels[own]).double().square().flatten(1).mean(1).numpy()
    np.testing.assert_allclose(rows["psnr"], -10 * np.log10(mse), atol=1e-9)
    np.testing.assert_array_equal(rows["label"], pictures.label[own])
    other = (shown - pictures.pixels[own].mT).square().flatten(1).mean(1).numpy()
    assert (other > 2 * mse).all()  # rows are rows
    assert rows["psnr"].min() >= 22 or rows["steps"].max() == 120
    assert (rows["psnr"] >= 22).sum() >= 5
    assert summary["networks"] == 9


def test_build_resumes_to_the_same_zoo(pictures: siren_zoo.Pictures, tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, steps=10)
    run.build(plan, pictures, tmp_path / "a", 1)

    def stop(fitted: int) -> None:
        if fitted:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.build(plan, pictures, tmp_path / "b", 1, advance=stop)
    advanced: list[int] = []
    run.build(plan, pictures, tmp_path / "b", 1, resume=True, advance=advanced.append)
    assert advanced == [4, 4, 1]
    tables = [pandas.read_parquet(tmp_path / n / "index.parquet") for n in "ab"]
    pandas.testing.assert_frame_equal(*tables)
    files = [sorted((tmp_path / n).rglob("*.safetensors")) for n in "ab"]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_splits_are_by_image_and_seeds_by_network(tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, views=3, steps=0)
    found = siren_zoo.load(plan)
    table = pandas.DataFrame(siren_zoo.block(plan, found, list(range(plan.networks)))[2])
    assert table.groupby("split").size().to_dict() == {"test": 3, "train": 12, "val": 2}
    assert table.groupby("image")["split"].nunique().max() == 1
    assert table["seed"].nunique() == plan.networks == 17
    shared = dataclasses.replace(plan, shared_init=True)
    _, flat, rows = siren_zoo.block(shared, found, list(range(4)))
    assert len({row["seed"] for row in rows}) == 1
    assert (flat == flat[0]).all()


def test_zoo_is_resized_in_proportion() -> None:
    whole = SirenRecipe(train=11500, val=500, test=4000)
    small = whole.resized(160)
    assert (small.train, small.val, small.test) == (115, 5, 40)
    assert dataclasses.replace(whole, views=3).resized(390).networks == pytest.approx(390, abs=3)
    assert slots(CASES[0], "cpu") == 64


def _parquet(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    rows = []
    for picture in pixels:
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, format="PNG")
        rows.append({"bytes": stream.getvalue(), "path": None})
    pandas.DataFrame({"image": rows, "label": range(len(rows))}).to_parquet(path)


def test_images_that_no_siren_shows_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, shape in (("alpha", (8, 6, 6, 4)), ("grey", (8, 6, 6)), ("large", (8, 7, 7))):
        _parquet(tmp_path / name, rng.integers(0, 256, shape, dtype=np.uint8))
    plan = dataclasses.replace(PLAN, source=str(tmp_path / "alpha"), train=2, val=1, test=1)
    with pytest.raises(InputError, match="4 channels"):
        siren_zoo.load(plan)
    plan = dataclasses.replace(plan, source=str(tmp_path / "grey"))
    assert siren_zoo.load(plan).shape == (1, 6, 6)
    with pytest.raises(InputError, match=r"large: images of \(1, 7, 7\)"):
        siren_zoo.load(dataclasses.replace(plan, test_source=str(tmp_path / "large")))
    with pytest.raises(UsageError, match="7 images for 71"):
        siren_zoo.load(dataclasses.replace(plan, train=70))
    (tmp_path / "text").write_text("no parquet")
    with pytest.raises(InputError, match="not a readable parquet"):
        siren_zoo.load(dataclasses.replace(plan, source=str(tmp_path / "text")))


def test_colour_images_are_fitted(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)
    _parquet(tmp_path / "x", pixels)
    plan = dataclasses.replace(
        PLAN, source=str(tmp_path / "x"), train=3, val=1, test=1, psnr=30.0, widths=(64,), steps=300
    )
    space, flat, rows = siren_zoo.block(plan, siren_zoo.load(plan), list(range(5)))
    assert space.forward.image == (3, 6, 8)
    shown = signals.render(space, space.unflatten(torch.from_numpy(flat)))
    for picture, row in zip(shown, rows, strict=True):
        truth = pixels[row["image"]].transpose(2, 0, 1) / 255
        assert row["psnr"] == pytest.approx(
            -10 * np.log10(np.mean((picture.numpy() - truth) ** 2)), abs=1e-4
        )
        assert row["psnr"] > 20


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("family = 'sirn'", "Did you mean 'siren'"),
        ("family = 'siren'\nconvention = 'dwsnets'", "Did you mean 'dws'"),
        ("family = 'siren'\nmodels = 3", "no setting is called 'models'"),
        ("family = 'siren'\nwidths = []", "positive"),
        ("family = 'siren'\nshared_init = 1", "something like False"),
        ("family = 'siren'\nw0 = 0", "above 0"),
    ],
)
def test_recipe_names_what_is_wrong(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        recipe.load(path)
    assert said in f"{error.value.message} {error.value.hint}"


def test_shipped_recipes_are_read() -> None:
    root = Path(__file__).parents[2] / "zoos"
    for name in ("siren-mnist", "siren-fashion", "siren-cifar"):
        plan = recipe.load(root / name / "recipe.toml")
        assert isinstance(plan, SirenRecipe)
        assert not plan.shared_init


def test_build_command_fits_a_zoo(run: Callable, tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text("family = 'siren'\nwidths = [6]\nsteps = 3\n")
    ran = run("build", path, "--out", tmp_path / "zoo", "--models", 6, "--json", "--device", "cpu")
    assert ran.code == 0
    assert ran.json["networks"] == ran.json["below_target"] == 6
    card = (tmp_path / "zoo" / "README.md").read_text()
    assert "2-6" in card
    assert "init nfn" in card
