"""Pictures for the eye: palettes, label maps in colour, overlays, legends and contact sheets. PIL and numpy only."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hpseg.data.transforms import ImageLike, as_picture
from hpseg.run.errors import UsageError


def palette() -> list[int]:
    """256 RGB colours, flat: each well apart from its neighbours, white last.

    Not the bit-reversed palette of VOC, whose number 0 is black, as for a background: a cluster is nothing of the kind,
    and under an overlay black and its dark neighbours cannot be told from shadows. Here hues follow the golden ratio,
    at three strengths and three brightnesses.
    """
    colours: list[int] = []
    for i in range(255):
        rgb = colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.75, 0.45, 0.95)[i % 3], (0.95, 0.75, 0.55)[i // 3 % 3])
        colours.extend(round(255 * value) for value in rgb)
    return [*colours, 255, 255, 255]


def label_image(labels: np.ndarray, colours: Sequence[int] | None = None) -> Image.Image:
    """A palette PNG's picture: its pixels are the labels (H, W) uint8; 256 colours, flat, make them visible."""
    picture = Image.fromarray(labels)
    picture.putpalette(list(colours or palette()))
    return picture


def overlay(
    image: ImageLike, labels: np.ndarray, alpha: float = 0.5, colours: Sequence[int] | None = None
) -> Image.Image:
    """The photograph with its label colours laid over it; alpha 0 is the photograph, 1 the colours."""
    if not 0 <= alpha <= 1:
        raise UsageError(f"overlay: expected an opacity in [0, 1], got {alpha}")
    return Image.blend(as_picture(image), label_image(labels, colours).convert("RGB"), alpha)


def legend(names: dict[int, str], width: int, font_size: int = 16, colours: Sequence[int] | None = None) -> Image.Image:
    """A strip of colour swatches, each with its name, in lines at most `width` pixels long.

    A name wider than that makes the strip wider instead of being cut.
    """
    colours = colours or palette()
    font, pad = ImageFont.load_default(font_size), max(2, font_size // 3)
    line = font_size + 2 * pad
    places, x, y, longest = [], pad, 0, 0
    for value, name in names.items():
        entry = font_size + pad + int(font.getlength(name)) + 2 * pad
        if x > pad and x + entry > width:
            x, y = pad, y + line
        places.append((value, name, x, y))
        x += entry
        longest = max(longest, x)
    strip = Image.new("RGB", (max(width, longest), y + line), "white")
    draw = ImageDraw.Draw(strip)
    for value, name, x, y in places:
        colour = tuple(colours[3 * value : 3 * value + 3])
        draw.rectangle((x, y + pad, x + font_size, y + pad + font_size), fill=colour, outline="gray")
        draw.text((x + font_size + pad, y + line // 2), name, fill="black", font=font, anchor="lm")
    return strip


def with_legend(picture: Image.Image, names: dict[int, str], colours: Sequence[int] | None = None) -> Image.Image:
    """The picture with a legend below it, in letters that stay readable when the picture is shown at screen size."""
    strip = legend(names, picture.width, max(14, picture.width // 50), colours)
    sheet = Image.new("RGB", (strip.width, picture.height + strip.height), "white")
    sheet.paste(picture, (0, 0))
    sheet.paste(strip, (0, picture.height))
    return sheet


def contact_sheet(rows: list[list[Image.Image]], titles: list[str], height: int = 120) -> Image.Image:
    """Rows of pictures under column titles; every picture is brought to the same height, or less where it would become
    wider than three heights, every column to one width."""
    rows = [[_fitted(picture, height) for picture in row] for row in rows]
    width, gap = max(p.width for row in rows for p in row), 4
    sheet = Image.new("RGB", (len(titles) * (width + gap) + gap, len(rows) * (height + gap) + 20), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((gap + column * (width + gap) + width // 2, 10), title, fill="black", anchor="mm")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            left = gap + x * (width + gap) + (width - picture.width) // 2
            sheet.paste(picture, (left, 20 + y * (height + gap) + (height - picture.height) // 2))
    return sheet


def _fitted(picture: Image.Image, height: int) -> Image.Image:
    scale = min(height / picture.height, 3 * height / picture.width)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.convert("RGB").resize((width, height))
