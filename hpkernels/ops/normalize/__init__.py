"""Rows divided by their Euclidean norm."""
