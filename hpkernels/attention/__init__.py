"""Context-aware attention between a patch and its neighbors, in plain torch."""
