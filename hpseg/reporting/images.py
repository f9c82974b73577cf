"""Pictures inside of a page: data URIs of bounded length."""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

from PIL import Image

SMALLEST = 16  # pixels of the long side, below which nothing is made smaller any more
QUALITIES = (84, 74)  # of JPEG, before a picture is made smaller


class Embedded(NamedTuple):
    """A picture for `<img src>`. width, height: of its pixels."""

    uri: str
    width: int
    height: int


def fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) with the long side at `side`, or as it is where it is smaller."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def embedded(picture: Image.Image, side: int, most: int) -> Embedded:
    """A palette picture as PNG, another as JPEG: its long side at most `side` pixels, its URI at most `most` bytes.

    What takes more room gets a lower quality, then fewer pixels, down to SMALLEST.
    """
    while True:
        shown = _resized(picture, side)
        for quality in QUALITIES if picture.mode != "P" else (None,):
            uri = _uri(shown, quality)
            if len(uri) <= most or (side <= SMALLEST and quality != QUALITIES[0]):
                return Embedded(uri, *shown.size)
        share = min(0.8, 0.95 * (most / len(uri)) ** 0.5)
        side = max(SMALLEST, int(max(shown.size) * share))


def _resized(picture: Image.Image, side: int) -> Image.Image:
    size = fitted(picture.size, side)
    if size == picture.size:
        return picture
    return picture.resize(size, Image.Resampling.NEAREST if picture.mode == "P" else Image.Resampling.LANCZOS)


def _uri(picture: Image.Image, quality: int | None) -> str:
    content = io.BytesIO()
    if quality is None:
        picture.save(content, "PNG", optimize=True)
    else:
        picture.convert("RGB").save(content, "JPEG", quality=quality, optimize=True, progressive=True)
    kind = "png" if quality is None else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
