"""From a file to an 8-bit RGB picture, and from a picture to the views that training sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


class UnreadableImage(OSError):
    """The file is not a picture that can be decoded; the message names it."""


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """Any picture as 8-bit RGB, turned upright by its EXIF orientation.

    16-bit and floating-point pictures are scaled to 8 bits, transparent parts are laid on white, CMYK, palette and
    grayscale pictures are converted.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(ImageOps.exif_transpose(source))
    try:
        with Image.open(source) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{source}: {error}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        # "I" holds 16-bit pictures in 32 bits; floating point is taken as [0, 1] unless its values say otherwise.
        if image.mode == "F":
            scale = 255.0 if np.nanmax(values, initial=0) <= 1 else 1.0
        else:
            scale = 255 / 65535 if image.mode != "I" or values.max(initial=0) > 255 else 1.0
        image = Image.fromarray(np.nan_to_num(values * scale).round().clip(0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def five_crop(image: Image.Image, which: int) -> Image.Image:
    """Half-size crop number `which`: 0-3 the corners (top left, top right, bottom left, bottom right), 4 the centre."""
    width, height = image.size
    w, h = max(1, width // 2), max(1, height // 2)
    left, top = (
        (0, 0),
        (width - w, 0),
        (0, height - h),
        (width - w, height - h),
        ((width - w) // 2, (height - h) // 2),
    )[which]
    return image.crop((left, top, left + w, top + h))


def square(image: Image.Image, size: int, generator: torch.Generator | None = None) -> Image.Image:
    """Short side to `size` (bilinear, antialiased), then a size x size crop: central, or anywhere with a generator."""
    width, height = image.size
    scale = size / min(width, height)
    image = image.resize((max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.BILINEAR)
    room = (image.width - size, image.height - size)
    if generator is None:
        left, top = room[0] // 2, room[1] // 2
    else:
        left, top = (int(torch.randint(free + 1, (), generator=generator)) for free in room)
    return image.crop((left, top, left + size, top + size))


def short_side(image: Image.Image, size: int, patch: int) -> Image.Image:
    """The whole picture: short side as near to `size`, long side as near to its proportion as whole patches allow."""
    scale = size / min(image.size)
    width, height = (max(2, round(side * scale / patch)) * patch for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def jitter(image: Tensor, seed: int) -> Tensor:
    """Photometric jitter of an RGB picture (3, H, W) uint8, before any normalisation; geometry stays.

    Brightness, contrast and saturation by up to 0.3, hue by 0.1, in random order; gray with probability 0.2; Gaussian
    blur (5 pixels, sigma 0.1 to 2) with probability 0.5.
    """
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(5, sigma=(0.1, 2.0))], p=0.5),
        ]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transform(image)
