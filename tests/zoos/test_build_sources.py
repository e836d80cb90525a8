"""Images come by feature type, whatever their columns are called."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_web import Fault

from qemcli.errors import EnvironmentFailure, InputError, UsageError
from qemcli.zoos.build import sources
from qemcli.zoos.build.recipe import Recipe

PLAN = Recipe(test_images=4)


def _png(pixels: np.ndarray) -> dict[str, object]:
    from PIL import Image

    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    return {"bytes": held.getvalue(), "path": None}


def _write(path: Path, pixels: np.ndarray, stated: bool) -> None:
    """A parquet in the Hub's schema: the picture is called `img`, and a count stands before the
    class."""
    import pyarrow
    from pyarrow import parquet

    names = {"serial": list(range(len(pixels))), "img": [_png(p) for p in pixels]}
    names["fine"] = [i % 3 for i in range(len(pixels))]
    if not stated:
        del names["serial"]
    table = pyarrow.table(names)
    if stated:
        kinds = {"serial": "Value", "img": "Image", "fine": "ClassLabel"}
        features = {name: {"_type": kind} for name, kind in kinds.items()}
        record = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": record})
    parquet.write_table(table, path)


@pytest.mark.parametrize("stated", [True, False], ids=["schema metadata", "column types"])
def test_parquet_columns_are_found_by_type(stated: bool, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 6, 6), dtype=np.uint8)
    _write(tmp_path / "x.parquet", pixels, stated)
    plan = replace(PLAN, source=str(tmp_path / "x.parquet"))
    found = sources.load(plan)
    assert found.shape == (1, 6, 6)
    assert (len(found.train), len(found.test), found.classes) == (8, 4, 3)
    everything = torch.cat([found.train, found.test])
    labels = torch.cat([found.train_label, found.test_label])
    wanted = torch.from_numpy(pixels.astype(np.float32) / 255 * 2 - 1)[:, None]
    for image, label in zip(everything, labels, strict=True):
        i = int((wanted - image).abs().flatten(1).sum(1).argmin())
        torch.testing.assert_close(image, wanted[i])
        assert int(label) == i % 3


def test_colour_images_are_resized_by_area(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    _write(tmp_path / "x.parquet", pixels, True)
    _write(tmp_path / "y.parquet", pixels[:5], True)
    plan = replace(
        PLAN, source=str(tmp_path / "x.parquet"), test_source=str(tmp_path / "y.parquet"), resize=4
    )
    found = sources.load(plan)
    assert found.shape == (3, 4, 4)
    assert (len(found.train), len(found.test)) == (6, 4)
    means = pixels.reshape(6, 4, 2, 4, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2) / 255 * 2 - 1
    np.testing.assert_allclose(found.train, means, atol=1e-5)


def test_digits_lie_between_minus_one_and_one() -> None:
    found = sources.load(PLAN)
    assert found.shape == (1, 8, 8)
    assert len(found.train) + len(found.test) == 1797
    assert (float(found.train.min()), float(found.train.max())) == (-1.0, 1.0)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "RGB", "RGBA", "I;16"])
def test_pictures_of_every_mode_are_grey_or_coloured_in_the_unit_range(mode, tmp_path) -> None:
    from PIL import Image

    ramp = np.repeat(np.linspace(0, 255, 8, dtype=np.uint8)[None], 8, axis=0)
    grey = Image.fromarray(ramp)
    if mode == "I;16":
        picture = Image.fromarray(ramp.astype(np.uint16) * 257)
    else:
        picture = (grey.convert("RGB") if mode == "P" else grey).convert(mode)
    held = io.BytesIO()
    picture.save(held, "PNG")
    found = sources._picture(tmp_path, {"bytes": held.getvalue()})
    channels = {"P": 3, "RGB": 3, "RGBA": 4, "LA": 2}.get(mode, 1)
    assert found.shape == (channels, 8, 8)
    assert (found[0].min(), found[0].max()) == (0, 1)
    if mode != "1":
        assert np.abs(found[0] - ramp / 255).max() < (0.2 if mode == "P" else 1e-6)


def test_picture_that_is_none_is_named(tmp_path: Path) -> None:
    import pandas

    path = tmp_path / "x.parquet"
    pandas.DataFrame({"a": [{"bytes": b"no", "path": None}] * 3, "b": [0, 1, 2]}).to_parquet(path)
    with pytest.raises(InputError, match="no image"):
        sources.load(replace(PLAN, source=str(path)))


def test_hub_name_without_a_file_is_named(hub) -> None:
    hub.add("owner/name", {"a.parquet": b"", "b.parquet": b""}, "dataset")
    for text, kind in (("hf://datasets", UsageError), ("hf://datasets/owner", EnvironmentFailure)):
        with pytest.raises(kind, match=text):
            sources.load(replace(PLAN, source=text))
    with pytest.raises(InputError, match="2 files, not one"):
        sources.load(replace(PLAN, source="hf://datasets/owner/name"))


def test_images_of_the_hub_are_those_of_one_commit_and_checked(hub, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    _write(tmp_path / "x.parquet", pixels, True)
    first = (tmp_path / "x.parquet").read_bytes()
    commit = hub.add("owner/name", {"deep/x.parquet": first}, "dataset")
    _write(tmp_path / "x.parquet", 255 - pixels, True)
    hub.add("owner/name", {"deep/x.parquet": (tmp_path / "x.parquet").read_bytes()}, "dataset")
    at = f"hf://datasets/owner/name@{commit}/deep/x.parquet"
    assert sources.pinned(at) == at
    assert commit not in sources.pinned("hf://datasets/owner/name/deep/x.parquet")
    np.testing.assert_array_equal(sources.read(at)[0][:, 0], pixels / np.float32(255))


def test_images_that_are_not_those_the_hub_names_are_refused(hub, tmp_path: Path) -> None:
    pixels = np.zeros((6, 8, 8), dtype=np.uint8)
    _write(tmp_path / "x.parquet", pixels, True)
    hub.cdn.faults += [Fault("GET /blob", corrupt=True)]
    hub.add("owner/name", {"x.parquet": (tmp_path / "x.parquet").read_bytes()}, "dataset")
    with pytest.raises(EnvironmentFailure, match="its bytes are not those"):
        sources.load(replace(PLAN, source="hf://datasets/owner/name/x.parquet"))
