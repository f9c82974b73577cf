"""What ships with the package: the weights of a small ViT and some photographs; README.md says whose they are."""

from pathlib import Path

EMBEDDED = Path(__file__).parent / "vit_tiny8.safetensors"  # its architecture is in the .json beside it
PHOTOS = Path(__file__).parent / "photos"
