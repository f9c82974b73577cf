"""The nearest centroid of each row, with the sums and counts of all clusters."""
