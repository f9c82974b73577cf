"""Exact, memory-linear search and contrastive losses over all pairs of patches.

The names below are the public interface; everything else may change between versions.
"""

from hpkernels import nn
from hpkernels._version import __version__
from hpkernels.attention.neighbor import neighbor_attention
from hpkernels.clustering.kmeans import Assignment, Clustering, assign_clusters, kmeans
from hpkernels.clustering.outliers import outlier_distances
from hpkernels.density import neighbor_density
from hpkernels.losses.by_label import supervised_contrastive_loss
from hpkernels.losses.hidden_positive import LossStats, hidden_positive_loss, masked_contrastive_loss
from hpkernels.mining import hidden_positives
from hpkernels.mixing import local_mix, neighbor_mix, neighbor_weights, neighbor_weights_qk
from hpkernels.pairs import PairMask
from hpkernels.search import max_similarity, pairs_above, topk_similarity

__all__ = [
    "Assignment",
    "Clustering",
    "LossStats",
    "PairMask",
    "__version__",
    "assign_clusters",
    "hidden_positive_loss",
    "hidden_positives",
    "kmeans",
    "local_mix",
    "masked_contrastive_loss",
    "max_similarity",
    "neighbor_attention",
    "neighbor_density",
    "neighbor_mix",
    "neighbor_weights",
    "neighbor_weights_qk",
    "nn",
    "outlier_distances",
    "pairs_above",
    "supervised_contrastive_loss",
    "topk_similarity",
]
