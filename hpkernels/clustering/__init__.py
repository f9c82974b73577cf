"""Clusters of rows: k-means, assignment and distances of outliers."""
