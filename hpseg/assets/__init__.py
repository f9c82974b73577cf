"""What ships with the package: the weights of two small ViTs and some photographs; README.md says whose they are."""

from pathlib import Path

_HERE = Path(__file__).parent
# Weights by the names of backbones; the architecture is in the .json beside them.
EMBEDDED = {
    "embedded": _HERE / "hybrid_tiny8.safetensors",  # has seen labels of ImageNet indirectly, through its teacher
    "embedded-selfsup": _HERE / "vit_tiny8.safetensors",  # has seen no label; until 2026-11 the one called "embedded"
}
PHOTOS = _HERE / "photos"
