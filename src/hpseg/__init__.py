"""Unsupervised semantic segmentation: a frozen ViT, a folder of photographs, label maps. See `hpseg --help`.

hpseg.train("photos/", "runs/photos", classes=8)
labels = hpseg.load("runs/photos").predict("photo.jpg")
hpseg.overlay("photo.jpg", labels).save("photo_overlay.png")
"""

# Imported on first use: importing hpseg pulls in neither torch nor timm.
_HOMES = {
    "__version__": "hpkernels",
    "train": "hpseg.training",
    "load": "hpseg.predict",
    "overlay": "hpseg.predict",
    "Segmenter": "hpseg.predict",
    "evaluate": "hpseg.evaluation.evaluate",
    "Config": "hpseg.config",
    "UsageError": "hpseg.config",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'hpseg' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
