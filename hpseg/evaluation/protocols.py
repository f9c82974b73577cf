"""How a picture and its labels are brought to the size they are scored at.

default  the whole picture, short side at the run's prediction size (bilinear, antialiased), in overlapping windows
         where it is very long (hpseg.inference.windows); scores at its own size
stego    as published by STEGO and kept by Hidden Positives: short side at 320 and labels with it, both by nearest
         neighbour, then the central 320 x 320; codes are brought to that size bilinearly. STEGO also averages the
         codes of the picture and of its mirror image (`flip`). For published heads and numbers the run's backbone
         must see 320 pixels as theirs did: `--pos-embed dino` when training (the presets named after data sets
         have it; at 224 pixels, a DINO model's own grid, it changes nothing), and for ViT-S/8 the original file
         dino_deitsmall8_300ep_pretrain.pth, not timm's (hpseg.models.weights).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from hpseg.data.transforms import short_side

STEGO_SIZE = 320


class View(NamedTuple):
    """What is shown to the backbone, the picture that it stands for, and the labels (H, W) int64 of that picture.

    window: side in pixels of what is shown at once, None to leave that to `hpseg.inference.windows`.
    """

    shown: Image.Image
    picture: Image.Image
    truth: np.ndarray
    window: int | None = None


Protocol = Callable[[Image.Image, np.ndarray, int, int], View]


def default(picture: Image.Image, truth: np.ndarray, size: int, patch: int) -> View:
    return View(short_side(picture, size, patch), picture, truth)


def stego(picture: Image.Image, truth: np.ndarray, size: int, patch: int) -> View:
    """size is ignored: the published evaluation is at 320 pixels, here rounded to whole patches."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    side = max(2, round(STEGO_SIZE / patch)) * patch

    def cut(image: Image.Image) -> Image.Image:
        return F.center_crop(F.resize(image, [side], InterpolationMode.NEAREST), [side, side])

    cropped = cut(picture)
    return View(cropped, cropped, np.asarray(cut(Image.fromarray(truth.astype(np.int32)))).astype(np.int64), side)


PROTOCOLS: dict[str, Protocol] = {"default": default, "stego": stego}
