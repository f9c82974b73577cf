"""Unsupervised semantic segmentation: a frozen ViT, a folder of photographs, label maps. See `hpseg --help`.

hpseg.train("photos/", "runs/photos", classes=8)
labels = hpseg.load("runs/photos").predict("photo.jpg")
hpseg.overlay("photo.jpg", labels).save("photo_overlay.png")
"""

from typing import TYPE_CHECKING

# Imported on first use: importing hpseg pulls in neither torch nor timm.
_HOMES = {
    "__version__": "hpkernels",
    "train": "hpseg.training",
    "load": "hpseg.predict",
    "overlay": "hpseg.plots",
    "Segmenter": "hpseg.predict",
    "predict_files": "hpseg.labelling",
    "show": "hpseg.sheet",
    "export": "hpseg.program",
    "import_hp": "hpseg.released",
    "export_hp": "hpseg.released",
    "evaluate": "hpseg.evaluation.evaluate",
    "Config": "hpseg.config",
    "UsageError": "hpseg.config",
}
__all__ = list(_HOMES)

if TYPE_CHECKING:
    from hpkernels import __version__ as __version__
    from hpseg.config import Config as Config
    from hpseg.config import UsageError as UsageError
    from hpseg.evaluation.evaluate import evaluate as evaluate
    from hpseg.labelling import predict_files as predict_files
    from hpseg.plots import overlay as overlay
    from hpseg.predict import Segmenter as Segmenter
    from hpseg.predict import load as load
    from hpseg.program import export as export
    from hpseg.released import export_hp as export_hp
    from hpseg.released import import_hp as import_hp
    from hpseg.sheet import show as show
    from hpseg.training import train as train
else:

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'hpseg' has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
