"""Exact, memory-linear search and contrastive losses over all pairs of patches.

The names below are the public interface; everything else may change between versions.
"""

from hpkernels import nn
from hpkernels._version import __version__
from hpkernels.losses import LossStats, hidden_positive_loss, masked_contrastive_loss
from hpkernels.mining import hidden_positives, pairs_above
from hpkernels.ops.local_mix.op import local_mix, neighbor_mix, neighbor_weights, neighbor_weights_qk
from hpkernels.ops.similarity_search.op import max_similarity, topk_similarity
from hpkernels.pairs import PairMask

__all__ = [
    "LossStats",
    "PairMask",
    "__version__",
    "hidden_positive_loss",
    "hidden_positives",
    "local_mix",
    "masked_contrastive_loss",
    "max_similarity",
    "neighbor_mix",
    "neighbor_weights",
    "neighbor_weights_qk",
    "nn",
    "pairs_above",
    "topk_similarity",
]
