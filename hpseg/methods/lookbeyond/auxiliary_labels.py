"""Auxiliary labels: clusters of a frozen network's features over a whole training set, one label map a photograph.

They are in RUN/auxiliary.safetensors:

    labels (R,) int16      of the feature cells of photograph after photograph, row by row; -1 for outliers
    grids (n, 2) int64     rows and columns of each photograph
    centroids (K, D), thresholds (K,) fp32
        metadata           recipe: JSON of all that decides them; sha256: of recipe and tensors

A file of another recipe, or a damaged one, is made anew. The checkpoint has the checksum, so that a run never goes on
with labels other than those it was started with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hpkernels
from hpseg.data.folder import PhotoFolder, hash_seed, load_batches
from hpseg.features.cache import file_identity
from hpseg.features.clustering import FeatureStream, assign_features, cluster_features
from hpseg.run.config import Config
from hpseg.run.files import Damaged, checksum, read_checked, save_checked, write_atomically
from hpseg.runtime.distributed import Ranks
from hpseg.runtime.messages import progress

FILE = "auxiliary.safetensors"
SCOPES = {"per_cluster": "cluster", "global": "all"}  # as hpkernels calls them


@dataclass(frozen=True)
class AuxiliaryLabels:
    """Label map of photograph `index` as `labels[index]`: int64 (rows, columns), -1 for outliers."""

    tensors: dict[str, Tensor]
    digest: str

    def __post_init__(self) -> None:
        ends = self.tensors["grids"].prod(1).cumsum(0).tolist()
        object.__setattr__(self, "starts", [0, *ends])

    def __len__(self) -> int:
        return len(self.tensors["grids"])

    def __getitem__(self, index: int) -> np.ndarray:
        part = self.tensors["labels"][self.starts[index] : self.starts[index + 1]]
        return part.view(*self.tensors["grids"][index].tolist()).numpy().astype(np.int64)

    @property
    def clusters(self) -> int:
        return len(self.tensors["centroids"])

    @staticmethod
    def open(path: Path, recipe: dict) -> AuxiliaryLabels | None:
        """Those in the file if it is whole and of that recipe."""
        if not path.is_file():
            return None
        try:
            tensors, metadata = read_checked(path)
        except Damaged:
            return None
        if metadata != {"recipe": json.dumps(recipe)}:
            return None
        return AuxiliaryLabels(tensors, checksum(tensors, metadata))

    @staticmethod
    def make(path: Path, recipe: dict, tensors: dict[str, Tensor]) -> AuxiliaryLabels:
        """Writes the file."""
        tensors, metadata = {n: x.cpu().contiguous() for n, x in tensors.items()}, {"recipe": json.dumps(recipe)}
        write_atomically(path, save_checked(tensors, metadata))
        return AuxiliaryLabels(tensors, checksum(tensors, metadata))


def recipe_of(extractor: nn.Module, photographs: PhotoFolder, config: Config) -> dict:
    """All that decides the labels."""
    chosen = ("extractor_size", "outliers", "outlier_scope", "dtype", "pos_embed", "size", "seed")
    settings = {name: value for name, value in vars(config).items() if name.startswith("auxiliary_") or name in chosen}
    return {
        "extractor": extractor.fingerprint,
        "stride": extractor.patch,
        **settings,
        "files": [[str(path), *file_identity(str(path))] for path in photographs.files],
    }


@torch.no_grad()
def auxiliary_labels(
    path: Path, extractor: nn.Module, photographs: PhotoFolder, config: Config, device: torch.device, ranks: Ranks
) -> tuple[AuxiliaryLabels, set[str]]:
    """Labels of whole photographs, from `path` or made and written there; and the files that could not be decoded.

    The features, unit rows, are clustered by k-means on a sample, then refined over all of them if asked for
    (hpseg.features.clustering); the share `outliers` of the rows farthest from their centroids gets no label. Each rank
    describes a share of the photographs and clusters the features of all.
    """
    recipe = recipe_of(extractor, photographs, config)
    if found := ranks.from_first(lambda: AuxiliaryLabels.open(path, recipe)):
        return found, set()
    side = extractor.patch * max(2, round((config.extractor_size or config.size) / extractor.patch))
    whole = PhotoFolder(photographs.files, side, "center", config.seed, False, photographs.read).whole(extractor.patch)
    count, grids = len(whole.files), {}
    unreadable: set[str] = set()

    def features(first: int) -> Iterator[Tensor]:
        """A batch is one photograph of each rank; in the last one some ranks may have none left, and give no rows."""
        starts = range(first * ranks.size, count, ranks.size)
        own = [[(0, min(start + ranks.rank, count - 1))] for start in starts]
        views = load_batches(whole, own, config.workers)
        for start, view in zip(starts, progress(views, "auxiliary labels", len(starts)), strict=True):
            unreadable.update(view.unreadable)
            tokens = extractor(view.images.to(device))
            if start not in grids:
                grids.update(enumerate(ranks.collect(tokens.grid), start))
            rows = F.normalize(tokens.features[0], dim=1)
            yield ranks.concat(rows if start + ranks.rank < count else rows[:0])

    stream, spherical = FeatureStream(features), config.auxiliary_spherical
    centroids = cluster_features(
        stream,
        config.auxiliary_clusters,
        seed=hash_seed("auxiliary", config.seed),
        spherical=spherical,
        iterations=config.auxiliary_iterations,
        restarts=config.auxiliary_restarts,
        rows=config.auxiliary_rows,
        passes=config.auxiliary_passes,
    )
    thresholds = torch.full((len(centroids),), torch.inf, device=centroids.device)
    if config.outliers:
        scope = SCOPES[config.outlier_scope]
        thresholds = hpkernels.outlier_distances(
            stream, centroids, fraction=config.outliers, scope=scope, spherical=spherical
        )
    assigned = assign_features(stream, centroids, spherical=spherical, thresholds=thresholds)
    labels = torch.cat([part.short().cpu() for part in assigned])
    tensors = {
        "labels": labels,
        "grids": torch.tensor([grids[number] for number in range(count)]),
        "centroids": centroids,
        "thresholds": thresholds,
    }
    return ranks.from_first(lambda: AuxiliaryLabels.make(path, recipe, tensors)), unreadable
