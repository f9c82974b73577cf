"""From a file to an 8-bit RGB picture, and from a picture to the views that training sees."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hpseg.run.errors import UsageError

logger = logging.getLogger(__name__)
ImageLike: TypeAlias = "str | Path | Image.Image | np.ndarray | Tensor"


# What Pillow raises for a file that it cannot decode.
UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class UnreadableImage(OSError):
    """The file is not a picture that can be decoded; the message names it."""


def skip(error: UnreadableImage, strict: bool = False) -> None:
    """Says that a picture is passed over; UsageError if none may be."""
    if strict:
        raise UsageError(f"strict: {error}; remove or mend it, or leave --strict out")
    logger.warning(f"skipped {error}")


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """Any picture as 8-bit RGB, turned upright by its EXIF orientation.

    16-bit and floating-point pictures are scaled to 8 bits, transparent parts are laid on white, CMYK, palette and
    grayscale pictures are converted. Pictures of more than 2 * PIL.Image.MAX_IMAGE_PIXELS pixels (178,956,970 unless
    set otherwise) are not decoded: a small file can hold a picture that no memory does.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(ImageOps.exif_transpose(source))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of half that size; of metadata that nobody reads
            with Image.open(source) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except UNDECODABLE as error:
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


def as_picture(image: ImageLike) -> Image.Image:
    """A path, PIL image, array or tensor as an upright RGB picture."""
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"image: expected a tensor (3, H, W), got {tuple(image.shape)}")
        pixels = image.detach().cpu()
        pixels = (pixels * 255).round().clamp(0, 255).to(torch.uint8) if pixels.is_floating_point() else pixels
        image = pixels.permute(1, 2, 0).numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise ValueError(f"image: expected uint8 (H, W), (H, W, 3) or (H, W, 4), got {image.dtype} {image.shape}")
        image = Image.fromarray(image)
    return load_image(image)


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


RESIZES = {"bilinear": Image.Resampling.BILINEAR, "nearest": Image.Resampling.NEAREST}  # the first is antialiased


def square(
    image: Image.Image, size: int, generator: torch.Generator | None = None, resize: str = "bilinear"
) -> Image.Image:
    """Short side to `size`, then a size x size crop: central, or anywhere with a generator.

    resize: of RESIZES; "nearest" as published, also in how it rounds sides and the place of the central crop.
    """
    shortest = min(image.size)
    if resize == "nearest":
        width, height = (size * side // shortest for side in image.size)
    else:
        width, height = (max(size, round(side * (size / shortest))) for side in image.size)
    image = image.resize((width, height), RESIZES[resize])
    room = (width - size, height - size)
    if generator is None:
        left, top = (round(free / 2) if resize == "nearest" else free // 2 for free in room)
    else:
        left, top = (int(torch.randint(free + 1, (), generator=generator)) for free in room)
    return image.crop((left, top, left + size, top + size))


def short_side(image: Image.Image, size: int, patch: int, resize: str = "bilinear") -> Image.Image:
    """The whole picture: short side as near to `size`, long side as near to its proportion as whole patches allow."""
    scale = size / min(image.size)
    width, height = (max(2, round(side * scale / patch)) * patch for side in image.size)
    return image.resize((width, height), RESIZES[resize])


def jitter(image: Tensor, seed: int, normalisation: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Photometric jitter of an RGB picture (3, H, W) uint8, before any normalisation; geometry stays.

    Brightness, contrast and saturation by up to 0.3, hue by 0.1, in random order; gray with probability 0.2; Gaussian
    blur (5 pixels, sigma 0.1 to 2) with probability 0.5.
    normalisation: mean and standard deviation (3, 1, 1). The jitter is then of the normalised picture, as in the code
    of Hidden Positives: torchvision takes it to be in [0, 1] and clamps it there, at the mean and one deviation above.
    The outcome, fp32 (3, H, W), is the picture that would normalise to that.
    """
    if normalisation is not None:
        mean, std = normalisation
        return _jittered((image / 255 - mean) / std, seed) * std + mean
    return _jittered(image, seed)


def _jittered(image: Tensor, seed: int) -> Tensor:
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
