"""RUN/preview/step_000200.png: a few training photographs as the head and the clusters of that step see them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from hpseg.data.transforms import UnreadableImage, short_side
from hpseg.inference.pictures import contact_sheet, fitted, fitted_map, label_image, overlay
from hpseg.inference.segmenter import Segmenter
from hpseg.run.files import write_image
from hpseg.run.folder import PREVIEWS

SHOWN, HEIGHT = 4, 160
TITLES = ["photograph", "clusters", "overlay"]


class Previews:
    """The same photographs every time, spread evenly over the training files; unreadable ones are passed over."""

    def __init__(self, out: Path, files: list[Path], read: Callable[[Path], Image.Image], size: int, patch: int):
        self.folder, self.pictures = out / PREVIEWS, []
        first = [files[number * len(files) // SHOWN] for number in range(min(SHOWN, len(files)))]
        for path in dict.fromkeys(first + files):
            if len(self.pictures) == min(SHOWN, len(files)):
                break
            try:
                self.pictures.append(short_side(_middle(read(path)), size, patch))
            except UnreadableImage:
                continue

    def write(self, step: int, segmenter: Segmenter) -> Image.Image | None:
        """Draws the sheet, writes and returns it; None if no picture can be read any more. Nothing here is random."""
        if not self.pictures:
            return None
        colours, views = segmenter.key().colours, []
        for picture in self.pictures:
            small, labels = fitted(picture, HEIGHT), fitted_map(segmenter.predict(picture), HEIGHT)
            views.append([small, label_image(labels, colours), overlay(small, labels, colours=colours)])
        sheet = contact_sheet(views, TITLES, HEIGHT)
        self.folder.mkdir(exist_ok=True)
        write_image(self.folder / f"step_{step:06d}.png", sheet)
        return sheet


def _middle(picture: Image.Image) -> Image.Image:
    """The middle of a picture more than twice as long as it is wide: a panorama would leave the others no room."""
    longest = 2 * min(picture.size)
    width, height = (min(side, longest) for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
