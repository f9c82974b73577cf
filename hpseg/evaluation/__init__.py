"""Scores of label maps against ground truth, and the baselines they stand beside."""
