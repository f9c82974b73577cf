"""FS^4 (arXiv 2202.11981): fully self-supervised segmentation."""
