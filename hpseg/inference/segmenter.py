"""A trained run at work: a photograph in, a label map of its own size out."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from hpseg.assets import EMBEDDED
from hpseg.data.transforms import ImageLike, as_picture, short_side, to_tensor
from hpseg.inference.crf import dense_crf
from hpseg.inference.label_map import Key, LabelMap, Matching, label_map
from hpseg.inference.windows import Windows, slide
from hpseg.methods.base import method_class
from hpseg.models.backbone import Backbone, load_backbone, pick_device
from hpseg.models.finetune import predicting
from hpseg.models.heads import Classifier, ClusterProbe, Head
from hpseg.run.config import Config
from hpseg.run.errors import UsageError
from hpseg.run.folder import load_model

logger = logging.getLogger(__name__)
CRF_PIXELS = 1 << 19


class Segmenter(nn.Module):
    """Backbone, trained head and clusters of one run.

    `segmenter(images)` gives codes (B, dim, rows, columns); `segmenter.predict(image)` gives labels (H, W) uint8.
    matching: the classes of the clusters, where the run was scored on labels, else None.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        clusters: ClusterProbe | Classifier,
        config: Config,
        matching: Matching | None = None,
    ):
        super().__init__()
        self.backbone, self.head, self.clusters, self.config = backbone, head, clusters, config
        self.matching = matching
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) uint8, or float in [0, 1]; sides multiples of the patch."""
        tokens = self.backbone(images)
        return self.head.codes_of(tokens).transpose(1, 2).unflatten(2, tokens.grid)

    def pixels(self, picture: Image.Image) -> Tensor:
        """(1, 3, H, W) uint8 on the run's device."""
        return to_tensor(picture)[None].to(next(self.head.parameters()).device)

    def prepare(self, image: ImageLike, size: int | None = None) -> tuple[Tensor, tuple[int, int]]:
        """(1, 3, H', W') uint8, short side at `size` (None: the run's), whole patches; and the image's own (H, W)."""
        picture = as_picture(image)
        resized = short_side(picture, size or self.config.predict_size, self.backbone.patch)
        return self.pixels(resized), (picture.height, picture.width)

    def similarities(self, codes: Tensor) -> Tensor:
        """<s, c_k> for codes (B, D, rows, columns) and unit centroids, or scores of classes: (B, K, rows, columns)."""
        return self.clusters(codes.movedim(1, -1)).movedim(-1, 1)

    @torch.no_grad()
    def predict(
        self,
        image: ImageLike,
        *,
        size: int | None = None,
        window: int | None = None,
        stride: int | None = None,
        crf: bool = False,
        as_classes: bool = False,
    ) -> np.ndarray:
        """Cluster of every pixel, (H, W) uint8 at the image's own size.

        image: a path, a PIL image, an array (H, W), (H, W, 3) uint8, or a tensor (3, H, W), uint8 or float in [0, 1].
        size: short side in pixels that the picture is brought to, None for the run's `predict_size`.
        window, stride: pixels of the resized picture. None shows it to the backbone as a whole up to windows.MAX_TOKENS
        patches, and beyond in overlapping windows, in memory that does not grow with its height.
        crf: sharpen the regions with `hpseg.inference.crf.dense_crf`; this needs the codes of all patches at once.
        as_classes: class ids instead of clusters, labels.NO_CLASS for clusters that no class was matched to.
        """
        matching = self._require_matching() if as_classes else None
        if size is not None and size < 16:
            raise UsageError(f"size: expected at least 16 pixels, got {size}")
        picture = as_picture(image)
        pixels, own_size = self.prepare(picture, size)
        if crf:
            labels = label_map(self.refined(picture, self.codes(pixels, window, stride)), own_size)
        else:
            maps = LabelMap(pixels.shape[2] // self.backbone.patch, own_size)
            for band in self.bands(pixels, lambda part: {"maps": self.similarities(self(part))}, window, stride):
                maps.add(band["maps"])
            labels = maps.labels
        return labels if matching is None else matching.classes(labels)

    def bands(
        self,
        pixels: Tensor,
        describe: Callable[[Tensor], dict[str, Tensor]],
        window: int | None = None,
        stride: int | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """What `describe` makes of a picture (1, 3, H, W), in bands of rows; see `windows.slide` and `predict`."""
        patch = self.backbone.patch
        grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
        return slide(pixels, patch, Windows.plan(grid, patch, window, stride), describe)

    def codes(self, pixels: Tensor, window: int | None = None, stride: int | None = None) -> Tensor:
        """Codes (1, D, rows, columns) of a picture (1, 3, H, W), in windows as `predict` has them; all are kept."""
        bands = self.bands(pixels, lambda part: {"codes": self(part)}, window, stride)
        return torch.cat([band["codes"] for band in bands], 2)

    def key(self, as_classes: bool = False) -> Key:
        """Names and colours of the numbers in this run's label maps."""
        if as_classes:
            self._require_matching()
        return Key.make(self.config.classes, self.matching, as_classes)

    def _require_matching(self) -> Matching:
        if self.matching is None:
            raise UsageError("as_classes: the clusters have no classes yet; run `hpseg eval RUN DATA` first")
        return self.matching

    @torch.no_grad()
    def refined(self, picture: Image.Image, codes: Tensor) -> Tensor:
        """Marginals (1, K, h, w) of a dense CRF on the picture, from softmax_k(2 cos(s, c_k)) of its codes (1, D, ...),
        or from the softmax of class scores.

        As published: codes are first brought to the picture's size, which is at most CRF_PIXELS (a larger picture is
        taken smaller), and the CRF sees the channels in the order blue, green, red.
        """
        if self.config.learns_classes:
            return refined_scores(picture, self.similarities(codes.float()))
        image, size = _for_crf(picture, codes.device)
        similarities = _resized(self.similarities(codes.float()), size)
        squares = codes.new_zeros(1, 1, *size)
        for part in codes.float().split(64, dim=1):  # all channels at once would be D / K times the result
            squares += _resized(part, size).square().sum(1, keepdim=True)
        cosines = similarities * squares.clamp_min(1e-24).rsqrt()
        return dense_crf(image, (2 * cosines[0]).softmax(0))[None]


def refined_scores(picture: Image.Image, scores: Tensor) -> Tensor:
    """The same from the softmax of class scores (1, K, ...), as published for linear probes."""
    image, size = _for_crf(picture, scores.device)
    return dense_crf(image, _resized(scores, size)[0].softmax(0))[None]


def _for_crf(picture: Image.Image, device: torch.device) -> tuple[Tensor, tuple[int, int]]:
    """The picture as the CRF sees it, uint8 (H, W, 3), and its (H, W)."""
    scale = min(1.0, (CRF_PIXELS / (picture.width * picture.height)) ** 0.5)
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    image = torch.from_numpy(np.array(picture)).flip(2).contiguous().to(device)
    return image, (picture.height, picture.width)


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def load(run: str | Path, device: str = "auto") -> Segmenter:
    """The trained run in folder `run`, ready to predict. A backbone other than the trained one is an error."""
    run = Path(run)
    tensors, fingerprint = load_model(run)
    config = Config.load(run / "config.json")
    if config.weights is not None:
        path = run / config.weights  # a relative path is one within the run
        inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(run))
        if not inside and not Path(config.weights).is_absolute():
            raise UsageError(f"run: the weights that {run / 'config.json'} names lie outside of it: {config.weights!r}")
        config = dataclasses.replace(config, weights=str(path))
    backbone = _trained_on(run, config, tensors, fingerprint)
    if config.labels_used:
        logger.warning(f"{run}: {config.labels_used}")
    return _joined(backbone, tensors, config, Matching.load(run)).to(pick_device(device))


def _trained_on(run: Path, config: Config, tensors: dict[str, Tensor], fingerprint: str) -> Backbone:
    """The backbone that a run was trained on, or trained. Older runs call "embedded-selfsup" "embedded"."""
    # A backbone that was trained is in the run; only the shape of one that comes as a file is in that file.
    weights = None if config.finetune and config.backbone not in EMBEDDED else config.weights
    loaded = partial(
        load_backbone, weights=weights, pretrained=not config.finetune, dtype=config.dtype, pos_embed=config.pos_embed
    )
    names, found = [config.backbone], []
    if config.backbone == "embedded" and weights is None:
        names.append("embedded-selfsup")
    for name in names:
        try:
            backbone = predicting(loaded(name), tensors, config)
        except UsageError:  # trained weights of the other shape
            if name == names[-1]:
                raise
            continue
        if backbone.fingerprint == fingerprint:
            return backbone
        found.append(backbone.fingerprint)
    raise UsageError(
        f"run: {run} was trained on {config.backbone!r} with weights {fingerprint}, but those found now "
        f"are {' and '.join(found)}"
    )


def assemble(backbone: Backbone, tensors: dict[str, Tensor], config: Config) -> Segmenter:
    """A segmenter of trained tensors, named as in model.safetensors, which it shares; draws no random numbers.

    backbone: the one that training started from.
    """
    return _joined(predicting(backbone, tensors, config), tensors, config)


def _joined(
    backbone: Backbone, tensors: dict[str, Tensor], config: Config, matching: Matching | None = None
) -> Segmenter:
    with torch.device("meta"):
        head, clusters = method_class(config.method).parts(backbone.channels, config)
    for name, part in (("head", head), ("clusters", clusters)):
        of_part = {key.removeprefix(f"{name}."): x for key, x in tensors.items() if key.startswith(f"{name}.")}
        try:
            part.load_state_dict(of_part, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(f"run: config.json and model.safetensors do not belong together ({reason})") from None
    return Segmenter(backbone, head, clusters, config, matching)
