"""Pictures for the eye: label maps in colour, overlays, legends and contact sheets. PIL and numpy only."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from hpseg.data.transforms import ImageLike, as_picture
from hpseg.inference.palette import palette
from hpseg.run.errors import UsageError

TINT = 0.4  # opacity at which both the photograph and its regions can be read
PIXELS_PER_BORDER = 500  # of the picture's short side, to one pixel of border on either side of it
SHEET_WIDTH = 10  # heights of a picture in it; one that is alone may be wider
GAP = 6


def label_image(labels: np.ndarray, colours: Sequence[int] | None = None) -> Image.Image:
    """A palette PNG's picture: its pixels are the labels (H, W) uint8; 256 colours, flat, make them visible."""
    picture = Image.fromarray(labels)
    picture.putpalette(list(colours or palette()))
    return picture


def overlay(
    image: ImageLike,
    labels: np.ndarray,
    alpha: float = TINT,
    colours: Sequence[int] | None = None,
    *,
    border: int | None = None,
) -> Image.Image:
    """The photograph with its label colours laid over it; alpha 0 is the photograph, 1 the colours.

    border: pixels along the edge of every region in which its colour is stronger, so that a light tint is enough; None
    takes one for small pictures and more for large ones, 0 none.
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"overlay: expected an opacity in [0, 1], got {alpha}")
    if border is not None and border < 0:
        raise UsageError(f"border: expected at least 0 pixels, got {border}")
    photograph, flat = as_picture(image), label_image(labels, colours).convert("RGB")
    tinted = Image.blend(photograph, flat, alpha)
    width = max(1, round(min(flat.size) / PIXELS_PER_BORDER)) if border is None else border
    if width:
        tinted.paste(Image.blend(photograph, flat, 1 - (1 - alpha) ** 4), mask=_edges(labels, width))
    return tinted


def _edges(labels: np.ndarray, width: int) -> Image.Image:
    """Where another label is at most `width` pixels away."""
    low = high = Image.fromarray(labels)
    for _ in range(width):
        low, high = low.filter(ImageFilter.MinFilter(3)), high.filter(ImageFilter.MaxFilter(3))
    return ImageChops.difference(low, high).point(lambda apart: 255 if apart else 0)


def legend(names: dict[int, str], width: int, font_size: int = 16, colours: Sequence[int] | None = None) -> Image.Image:
    """A strip of colour swatches, each with its name, in lines at most `width` pixels long.

    A name wider than that makes the strip wider instead of being cut.
    """
    colours = colours or palette()
    font, pad = ImageFont.load_default(font_size), max(2, font_size // 3)
    line = font_size + 2 * pad
    places, x, y, longest = [], pad, 0, 0
    for value, name in names.items():
        entry = font_size + pad + int(font.getlength(name)) + 3 * pad
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


def with_legend(
    picture: Image.Image, names: dict[int, str], colours: Sequence[int] | None = None, font_size: int | None = None
) -> Image.Image:
    """The picture with a legend below it, in letters that stay readable when the picture is shown at screen size."""
    strip = legend(names, picture.width, font_size or max(14, picture.width // 50), colours)
    sheet = Image.new("RGB", (strip.width, picture.height + strip.height), "white")
    sheet.paste(picture, (0, 0))
    sheet.paste(strip, (0, picture.height))
    return sheet


def fitted(picture: Image.Image, height: int) -> Image.Image:
    """The picture at this height, or less where it would become wider than three heights. Labels stay labels."""
    scale = min(height / picture.height, 3 * height / picture.width)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    labels = picture.mode in ("L", "P")
    return picture.resize(size, Image.Resampling.NEAREST if labels else Image.Resampling.LANCZOS)


def fitted_map(labels: np.ndarray, height: int) -> np.ndarray:
    """The label map (H, W) uint8 at the size that `fitted` gives its picture."""
    return np.asarray(fitted(Image.fromarray(labels), height))


def letters(height: int) -> int:
    """Font size of titles and legends of a sheet whose pictures have this height."""
    return max(13, height // 8)


Column = list[Image.Image]  # the views of a picture, from the top


def _bands(columns: list[Column], width: int) -> list[list[Column]]:
    """Columns in their order, in as few bands as `width` allows, of about the same length."""

    def filled(limit: float) -> list[list[Column]]:
        bands: list[list[Column]] = []
        room = 0.0
        for column in columns:
            room -= column[0].width + GAP
            if not bands or room < 0:
                bands.append([])
                room = limit - column[0].width - GAP
            bands[-1].append(column)
        return bands

    fewest = len(filled(width))
    limits = np.linspace(sum(column[0].width + GAP for column in columns) / fewest, width, 100)
    return next((bands for bands in map(filled, limits) if len(bands) == fewest), filled(width))


def contact_sheet(
    pictures: list[list[Image.Image]], titles: list[str], height: int = 160, width: int | None = None
) -> Image.Image:
    """Pictures side by side, the views of each one below the other, in as few bands as `width` allows.

    titles: of the views, at the left of every band. Each view is brought to `height`, see `fitted`; one that has that
    size already is taken as it is. width: of the sheet in pixels, None for SHEET_WIDTH heights.
    """
    font = ImageFont.load_default(letters(height))
    words = ["\n".join(textwrap.wrap(title, 12, break_long_words=False)) for title in titles]
    drawing = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = GAP + max(round(drawing.multiline_textbbox((0, 0), text, font=font)[2]) for text in words) + 2 * GAP
    bands = _bands(
        [[fitted(view, height).convert("RGB") for view in views] for views in pictures],
        (width or SHEET_WIDTH * height) - left,
    )
    lines = [max(view.height for view in line) for band in bands for line in zip(*band, strict=True)]
    across = max(left + sum(column[0].width + GAP for column in band) for band in bands)
    tall = GAP + sum(line + GAP for line in lines) + 2 * GAP * (len(bands) - 1)
    sheet = Image.new("RGB", (across, tall), "white")
    draw, y = ImageDraw.Draw(sheet), GAP
    for band in bands:
        for number, text in enumerate(words):
            line, x = max(column[number].height for column in band), left
            draw.multiline_text((left - 2 * GAP, y + line // 2), text, "black", font, anchor="rm", align="right")
            for column in band:
                sheet.paste(column[number], (x, y + (line - column[number].height) // 2))
                x += column[number].width + GAP
            y += line + GAP
        y += 2 * GAP
    return sheet
