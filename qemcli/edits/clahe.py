"""CLAHE: contrast-limited adaptive histogram equalisation of the lightness (clip 1.0, 3 x 3 tiles).

The published contrast target: OpenCV's, on the L channel of Lab of the 8-bit picture; as published,
channels are handed over in the order red, green, blue where OpenCV takes blue, green, red. Grey
pictures are their own lightness. Source: arXiv:2302.14040 (CIFAR-10). Needs the extra `edits`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qemcli.errors import EnvironmentFailure

CLIP = 1.0
TILES = (3, 3)


def target(images: Tensor) -> Tensor:
    """(b, c, h, w) in [0, 1] -> the same, in steps of 1/255."""
    try:
        import cv2
    except ImportError:
        raise EnvironmentFailure("CLAHE is OpenCV's", "pip install 'qemcli[edits]'") from None
    equaliser = cv2.createCLAHE(clipLimit=CLIP, tileGridSize=TILES)
    pixels = (images.detach().cpu() * 255).round().to(torch.uint8).numpy()
    done = np.stack([_equalised(cv2, equaliser, picture) for picture in pixels])
    return torch.from_numpy(done).to(images) / 255


def _equalised(cv2: Any, equaliser: Any, picture: np.ndarray) -> np.ndarray:
    """(c, h, w) of 8 bits -> the same."""
    if len(picture) == 1:
        return equaliser.apply(picture[0])[None]
    lab = cv2.cvtColor(np.ascontiguousarray(picture.transpose(1, 2, 0)), cv2.COLOR_BGR2LAB)
    lab[..., 0] = equaliser.apply(np.ascontiguousarray(lab[..., 0]))
    return cv2.cvtColor(lab, cv2.COLOR_LAB2BGR).transpose(2, 0, 1)
