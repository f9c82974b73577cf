"""Inner-product search in Triton: tiles of queries against tiles of keys; no N x M numbers are stored.

`rows` reduces each row to its maximum or its k best keys, `pairs` compares all pairs with thresholds.
"""

from hpkernels.ops.similarity_search.triton.pairs import pairs_above
from hpkernels.ops.similarity_search.triton.rows import max_similarity, topk_similarity

__all__ = ["max_similarity", "pairs_above", "topk_similarity"]
