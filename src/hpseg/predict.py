"""A trained run at work: a photograph in, a label map of its own size out."""

from __future__ import annotations

import colorsys
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from hpseg.backbones import Backbone, load_backbone, pick_device
from hpseg.checkpoints import load_model
from hpseg.config import Config, UsageError
from hpseg.crf import dense_crf
from hpseg.data.folder import find_images
from hpseg.data.transforms import UnreadableImage, load_image, short_side, to_tensor
from hpseg.heads import ClusterProbe, SegmentationHead

CRF_PIXELS = 1 << 19

ImageLike = "str | Path | Image.Image | np.ndarray | Tensor"


class Segmenter(nn.Module):
    """Frozen backbone, trained head and clusters of one run.

    `segmenter(images)` gives codes (B, dim, rows, columns); `segmenter.predict(image)` gives labels (H, W) uint8.
    """

    def __init__(self, backbone: Backbone, head: SegmentationHead, clusters: ClusterProbe, config: Config):
        super().__init__()
        self.backbone, self.head, self.clusters, self.config = backbone, head, clusters, config
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) uint8, or float in [0, 1]; sides multiples of the patch."""
        tokens = self.backbone(images)
        return self.head(tokens.features).transpose(1, 2).unflatten(2, tokens.grid)

    def pixels(self, picture: Image.Image) -> Tensor:
        """(1, 3, H, W) uint8 on the run's device."""
        return to_tensor(picture)[None].to(next(self.head.parameters()).device)

    def prepare(self, image: ImageLike) -> tuple[Tensor, tuple[int, int]]:
        """(1, 3, H', W') uint8, short side at `config.predict_size`, whole patches; and the image's own (H, W)."""
        picture = as_picture(image)
        resized = short_side(picture, self.config.predict_size, self.backbone.patch)
        return self.pixels(resized), (picture.height, picture.width)

    def similarities(self, codes: Tensor) -> Tensor:
        """<s, c_k> for codes (B, D, rows, columns) and unit centroids: (B, K, rows, columns)."""
        return self.clusters(codes.movedim(1, -1)).movedim(-1, 1)

    @torch.no_grad()
    def predict(self, image: ImageLike, *, crf: bool = False) -> np.ndarray:
        """Cluster of every pixel, (H, W) uint8 at the image's own size.

        image: a path, a PIL image, an array (H, W), (H, W, 3) uint8, or a tensor (3, H, W), uint8 or float in [0, 1].
        crf: sharpen the regions with `hpseg.crf.dense_crf`.
        """
        picture = as_picture(image)
        pixels, size = self.prepare(picture)
        codes = self(pixels)
        return label_map(self.refined(picture, codes) if crf else self.similarities(codes), size)

    @torch.no_grad()
    def refined(self, picture: Image.Image, codes: Tensor) -> Tensor:
        """Marginals (1, K, h, w) of a dense CRF on the picture, from softmax_k(2 cos(s, c_k)) of its codes (1, D, ...).

        As published: codes are first brought to the picture's size, which is at most CRF_PIXELS (a larger picture is
        taken smaller), and the CRF sees the channels in the order blue, green, red.
        """
        scale = min(1.0, (CRF_PIXELS / (picture.width * picture.height)) ** 0.5)
        if scale < 1:
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            picture = picture.resize(size, Image.Resampling.BILINEAR)
        size = (picture.height, picture.width)
        squares = codes.new_zeros(1, 1, *size)
        for part in codes.float().split(64, dim=1):  # all channels at once would be D / K times the result
            squares += _resized(part, size).square().sum(1, keepdim=True)
        cosines = _resized(self.similarities(codes.float()), size) * squares.clamp_min(1e-24).rsqrt()
        image = torch.from_numpy(np.array(picture)).flip(2).contiguous().to(codes.device)
        return dense_crf(image, (2 * cosines[0]).softmax(0))[None]


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def label_map(similarity: Tensor, size: tuple[int, int]) -> np.ndarray:
    """argmax over K of (1, K, h, w) similarities brought to `size` bilinearly: (H, W) uint8.

    The argmax does not see the length of a pixel's code, so K maps are resized instead of all channels of the code.
    Done in bands of rows, so that a large photograph needs no K x H x W floats at once.
    """
    similarity, (height, width) = similarity.float(), size
    labels = np.empty(size, np.uint8)
    columns = F.interpolate(similarity, (similarity.shape[2], width), mode="bilinear", align_corners=False)
    for top in range(0, height, 256):
        rows = torch.arange(top, min(top + 256, height), device=similarity.device)
        position = ((rows + 0.5) * (columns.shape[2] / height) - 0.5).clamp(0, columns.shape[2] - 1)
        low = position.floor().long()
        high = (low + 1).clamp_max(columns.shape[2] - 1)
        share = (position - low).view(-1, 1)
        band = columns[0, :, low] * (1 - share) + columns[0, :, high] * share
        labels[top : top + len(rows)] = band.argmax(0).to(torch.uint8).cpu().numpy()
    return labels


def as_picture(image: ImageLike) -> Image.Image:
    """A path, PIL image, array or tensor as an upright RGB picture."""
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"image: expected a tensor (3, H, W), got {tuple(image.shape)}")
        image = image.detach().cpu()
        image = (image * 255).round().clamp(0, 255).to(torch.uint8) if image.is_floating_point() else image
        image = image.permute(1, 2, 0).numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.ndim == 3 and image.shape[2] not in (3, 4):
            raise ValueError(f"image: expected uint8 (H, W), (H, W, 3) or (H, W, 4), got {image.dtype} {image.shape}")
        image = Image.fromarray(image)
    return load_image(image)


def load(run: str | Path, device: str = "auto") -> Segmenter:
    """The trained run in folder `run`, ready to predict. A backbone other than the trained one is an error."""
    run = Path(run)
    tensors, fingerprint = load_model(run)
    config = Config.load(run / "config.json")
    backbone = load_backbone(config.backbone, config.weights, dtype=config.dtype)
    if backbone.fingerprint != fingerprint:
        raise UsageError(
            f"run: {run} was trained on {config.backbone!r} with weights {fingerprint}, but those found now "
            f"are {backbone.fingerprint}"
        )
    head, clusters = SegmentationHead(backbone.channels, config.dim), ClusterProbe(config.dim, config.classes)
    for name, part in (("head", head), ("clusters", clusters)):
        part.load_state_dict(
            {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        )
    return Segmenter(backbone, head, clusters, config).to(pick_device(device))


def palette() -> list[int]:
    """256 RGB colours, flat: the first dozens well apart (hue by the golden ratio, three brightnesses), white last."""
    colours = []
    for i in range(255):
        rgb = colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.75, 0.45, 0.95)[i % 3], (0.95, 0.75, 0.55)[i // 3 % 3])
        colours.extend(round(255 * value) for value in rgb)
    return colours + [255, 255, 255]


def label_image(labels: np.ndarray) -> Image.Image:
    """A palette PNG's picture: its pixels are the labels, its palette makes them visible."""
    picture = Image.fromarray(labels)
    picture.putpalette(palette())
    return picture


def overlay(image: ImageLike, labels: np.ndarray, alpha: float = 0.5) -> Image.Image:
    """The photograph with its label colours laid over it; alpha 0 is the photograph, 1 the colours."""
    if not 0 <= alpha <= 1:
        raise UsageError(f"overlay: expected an opacity in [0, 1], got {alpha}")
    return Image.blend(as_picture(image), label_image(labels).convert("RGB"), alpha)


def predict_files(
    run: str | Path,
    images: Iterable[str | Path],
    out: str | Path,
    overlay_alpha: float | None = None,
    device: str = "auto",
    crf: bool = False,
) -> list[str]:
    """Writes OUT/<name>.png per photograph (files, or folders searched recursively) and, with `overlay_alpha`,
    OUT/<name>_overlay.jpg. Returns the files that could not be read; they are named and skipped.

    Names keep the path below a given folder. Two inputs that would share a name are an error before anything is
    written.
    """
    if overlay_alpha is not None and not 0 <= overlay_alpha <= 1:
        raise UsageError(f"overlay: expected an opacity in [0, 1], got {overlay_alpha}")
    jobs: dict[Path, Path] = {}
    for given in map(Path, images):
        for path in [given] if given.is_file() else find_images(given):
            name = Path(path.name) if given.is_file() else path.relative_to(given)
            target = Path(out) / name.with_suffix(".png")
            if target in jobs:
                target = Path(out) / f"{name}.png"  # a.jpg beside a.png: keep both apart by their endings
            if target in jobs:
                raise UsageError(f"images: {path} and {jobs[target]} would both be written to {target}")
            jobs[target] = path
    segmenter, unreadable = load(run, device), []
    for target, path in tqdm(jobs.items(), desc="predict", unit="image", disable=None):
        try:
            picture = load_image(path)
        except UnreadableImage as error:
            print(f"skipped {error}", file=sys.stderr)
            unreadable.append(str(path))
            continue
        labels = segmenter.predict(picture, crf=crf)
        target.parent.mkdir(parents=True, exist_ok=True)
        label_image(labels).save(target)
        if overlay_alpha is not None:
            overlay(picture, labels, overlay_alpha).save(target.with_name(f"{target.stem}_overlay.jpg"), quality=92)
    return unreadable
