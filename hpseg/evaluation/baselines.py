"""The baselines beside a trained head: spherical k-means of what the backbone, or colour alone, says of patches.

A fit depends on the backbone, the photographs, the prediction size, the number of clusters and the seed alone, and so
its centroids are kept in RUN/baselines.safetensors: the next `hpseg eval` needs no photograph for them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

import hpkernels
from hpseg.data.transforms import UnreadableImage, skip
from hpseg.evaluation.contenders import KMEANS_ROWS, Segments, kmeans_segments
from hpseg.features.cache import backbone_recipe, file_identity, hashed
from hpseg.inference.segmenter import Segmenter
from hpseg.models.heads import fit_centroids
from hpseg.run.errors import UsageError
from hpseg.run.files import write_atomically
from hpseg.run.folder import load_tensors
from hpseg.runtime.messages import progress, waiting

logger = logging.getLogger(__name__)
FILE = "baselines.safetensors"
# Pixels of a prepared photograph (1, 3, H, W) and its file -> what is known of it by name, (1, rows, columns, C) each.
Describe = Callable[[Tensor, Path], dict[str, Tensor]]


def fit_baselines(
    runs: list[str | Path],
    segmenters: list[Segmenter],
    files: list[Path],
    read: Callable[[Path], Image.Image],
    describe: Describe,
    names: list[str],
    strict: bool,
    seed: int,
) -> list[dict[str, Segments]]:
    """Of each run, k-means over patches of `files` by every description in `names`: {"kmeans_<name>": ...}.

    There are as many clusters as the run has, and run number r is seeded with seed + r. Photographs that cannot be read
    are named and passed over, or a UsageError if strict. Nothing where none can be read.
    """
    keys = [_key(one, files, seed + number) for number, one in enumerate(segmenters)]
    kept = [_kept(Path(run), key) for run, key in zip(runs, keys, strict=True)]
    if not all(set(names) <= set(centroids) for centroids in kept):
        rows, unreadable = _sampled(segmenters[0], files, read, describe, strict, seed)
        if not rows:
            return [{} for _ in runs]
        for number, (run, key, one) in enumerate(zip(runs, keys, segmenters, strict=True)):
            for name in names:
                with waiting(f"k-means, {name}"):
                    kept[number][name] = fit_centroids(rows[name], one.config.classes, seed + number)
            if not unreadable:  # or nobody would hear of them the next time
                _keep(Path(run), key, kept[number])
    return [{f"kmeans_{name}": kmeans_segments(name, of_run[name]) for name in names} for of_run in kept]


def _sampled(
    segmenter: Segmenter,
    files: list[Path],
    read: Callable[[Path], Image.Image],
    describe: Describe,
    strict: bool,
    seed: int,
) -> tuple[dict[str, Tensor], bool]:
    """About KMEANS_ROWS random patches, (N, C) by name, as many of each photograph; whether one was unreadable."""
    each, rng, rows, unreadable = math.ceil(KMEANS_ROWS / len(files)), torch.Generator().manual_seed(seed), [], False
    for path in progress(files, "fit", len(files)):
        try:
            pixels = segmenter.prepare(read(path))[0]
        except UnreadableImage as error:
            skip(error, strict)
            unreadable = True
            continue

        def of_band(part: Tensor, path: Path = path) -> dict[str, Tensor]:
            return {name: maps.movedim(3, 1) for name, maps in describe(part, path).items()}

        bands = list(segmenter.bands(pixels, of_band))
        described = {name: torch.cat([band[name] for band in bands], 2)[0].flatten(1).T for name in bands[0]}
        picks = torch.randperm(len(described["features"]), generator=rng)[:each]
        rows.append({name: tokens[picks.to(tokens.device)] for name, tokens in described.items()})
    return {name: torch.cat([part[name] for part in rows]) for name in (rows[0] if rows else ())}, unreadable


def _key(segmenter: Segmenter, files: list[Path], seed: int) -> str:
    """A hash of all that decides the centroids."""
    config, device = segmenter.config, next(segmenter.head.parameters()).device
    recipe = {
        **backbone_recipe(segmenter.backbone),
        "computed by": [device.type, torch.__version__, hpkernels.__version__],
        "size": [config.predict_size, segmenter.backbone.patch],
        "rows": KMEANS_ROWS,
        "clusters": config.classes,
        "seed": seed,
    }
    return hashed([recipe, [[str(path), *file_identity(str(path))] for path in files]])


def _kept(run: Path, key: str) -> dict[str, Tensor]:
    """Centroids by description, from an earlier evaluation; none where something was another."""
    if not (run / FILE).is_file():
        return {}
    try:
        tensors, metadata = load_tensors(run / FILE)
    except UsageError:  # damaged; it is written anew
        return {}
    return tensors if metadata.get("key") == key else {}


def _keep(run: Path, key: str, centroids: dict[str, Tensor]) -> None:
    content = {name: value.cpu().contiguous() for name, value in centroids.items()}
    with suppress(OSError):  # it is fitted again then
        write_atomically(run / FILE, save(content, {"key": key}))
