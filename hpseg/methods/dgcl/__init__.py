"""DGCL (CVPR 2023): density-guided contrast with few labels."""
