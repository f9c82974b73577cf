"""Frozen tokens: from the backbone, from the cache on the disk, clustered, as pools."""
