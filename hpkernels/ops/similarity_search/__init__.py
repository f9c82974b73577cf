"""Search over all pairs of two sets of vectors by inner product."""
