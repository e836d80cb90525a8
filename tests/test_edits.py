"""Edits of pictures: what each does, against OpenCV where that is installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qemcli import edits
from qemcli.errors import UsageError


@pytest.fixture
def images(rng: torch.Generator) -> torch.Tensor:
    """Eight-bit pictures that are not square, smooth enough to have a contrast."""
    coarse = torch.rand(4, 3, 4, 5, generator=rng)
    fine = torch.nn.functional.interpolate(coarse, (17, 22), mode="bilinear")
    return (fine * 255).round() / 255


def test_every_edit_keeps_shape_range_and_input(images) -> None:
    assert {"dilate", "erode", "contrast", "clahe", "invert", "rotate"} <= set(edits.names())
    for name in set(edits.names()) - {"clahe"}:
        before = images.clone()
        after = edits.find(name)(images)
        assert after.shape == images.shape
        assert 0 <= after.min() <= after.max() <= 1
        assert torch.equal(images, before), name
        assert (after - images).abs().mean() > 1e-3, name


def test_dilation_and_erosion_are_extrema_of_neighbourhoods(images) -> None:
    picture = images[0, 0]
    dilated, eroded = (edits.find(n)(images)[0, 0] for n in ("dilate", "erode"))
    for y, x in ((0, 0), (16, 21), (8, 11), (0, 13)):
        block = picture[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        assert dilated[y, x] == block.max()
        corner = picture[max(0, y - 1) : y + 1, max(0, x - 1) : x + 1]
        assert eroded[y, x] == corner.min()


def test_contrast_keeps_the_mean_and_scales_what_differs() -> None:
    images = 0.5 + 0.1 * torch.linspace(-1, 1, 24).reshape(1, 1, 4, 6)
    after = edits.find("contrast:2")(images)
    torch.testing.assert_close(after, 0.5 + 2 * (images - 0.5))
    assert edits.find("contrast").amount == 1.5
    torch.testing.assert_close(edits.find("contrast:1")(images), images)


def test_rotation_turns_anticlockwise_about_the_middle() -> None:
    images = torch.zeros(1, 1, 9, 9)
    images[0, 0, 4, 8] = 1  # to the right of the middle
    turned = edits.find("rotate:90")(images)
    assert turned[0, 0, 0, 4] == pytest.approx(1, abs=1e-5)  # above it
    wide = torch.zeros(1, 1, 9, 15)
    wide[0, 0, 4, 11] = 1  # four pixels to the right: four above, though the picture is not square
    assert edits.find("rotate:90")(wide)[0, 0, 0, 7] == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(edits.find("rotate:0")(wide), wide)


def test_what_lies_outside_the_scale_is_clipped_first() -> None:
    images = torch.tensor([-0.5, 0.25, 1.5]).reshape(1, 1, 1, 3)
    assert edits.find("invert")(images).flatten().tolist() == [1.0, 0.75, 0.0]


def test_morphology_and_clahe_are_opencv_s(images) -> None:
    cv2 = pytest.importorskip("cv2")
    pixels = (images * 255).round().to(torch.uint8)
    for i, picture in enumerate(pixels[:, 0].numpy()):
        for name, call, side in (("dilate", cv2.dilate, 3), ("erode", cv2.erode, 2)):
            wanted = call(picture, np.ones((side, side), np.uint8), iterations=1)
            found = (edits.find(name)(images)[i, 0] * 255).round().to(torch.uint8).numpy()
            np.testing.assert_array_equal(found, wanted)
    grey = edits.find("clahe")(images[:, :1])
    wanted = cv2.createCLAHE(clipLimit=1.0, tileGridSize=(3, 3)).apply(pixels[0, 0].numpy())
    np.testing.assert_array_equal((grey[0, 0] * 255).round().to(torch.uint8).numpy(), wanted)
    colour = edits.find("clahe")(images)
    assert colour.shape == images.shape
    # Only the lightness is touched: a colour's channels keep their order.
    assert torch.corrcoef(torch.stack([colour.flatten(), images.flatten()]))[0, 1] > 0.9
    assert (colour - images).abs().max() > 0.02


def test_edits_are_named_with_their_amount() -> None:
    assert str(edits.find("rotate")) == "rotate:10"
    assert edits.find(str(edits.find("contrast:0.5"))).amount == 0.5
    assert str(edits.find("dilate")) == "dilate"
    with pytest.raises(UsageError, match="no edit is called 'dilat'") as error:
        edits.find("dilat")
    assert "dilate" in (error.value.hint or "")
    for wrong in ("rotate:x", "rotate:nan", "dilate:3"):
        with pytest.raises(UsageError):
            edits.find(wrong)
