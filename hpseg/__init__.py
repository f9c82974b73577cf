"""Unsupervised semantic segmentation: a frozen ViT, a folder of photographs, label maps. See `hpseg --help`.

hpseg.train("photos/", "runs/photos", classes=8)
labels = hpseg.load("runs/photos").predict("photo.jpg")
hpseg.overlay("photo.jpg", labels).save("photo_overlay.png")
"""

from typing import TYPE_CHECKING

# Imported on first use: importing hpseg pulls in neither torch nor timm.
_HOMES = {
    "__version__": "hpkernels",
    "train": "hpseg.training.loop",
    "load": "hpseg.inference.segmenter",
    "overlay": "hpseg.inference.pictures",
    "Segmenter": "hpseg.inference.segmenter",
    "predict_files": "hpseg.inference.predict_files",
    "show": "hpseg.inference.sheet",
    "write_report": "hpseg.reporting.report",
    "export": "hpseg.interop.torch_export",
    "import_hp": "hpseg.interop.released_checkpoints",
    "export_hp": "hpseg.interop.released_checkpoints",
    "evaluate": "hpseg.evaluation.evaluate",
    "Config": "hpseg.run.config",
    "UsageError": "hpseg.run.errors",
}
__all__ = list(_HOMES)

if TYPE_CHECKING:
    from hpkernels import __version__ as __version__
    from hpseg.evaluation.evaluate import evaluate as evaluate
    from hpseg.inference.pictures import overlay as overlay
    from hpseg.inference.predict_files import predict_files as predict_files
    from hpseg.inference.segmenter import Segmenter as Segmenter
    from hpseg.inference.segmenter import load as load
    from hpseg.inference.sheet import show as show
    from hpseg.interop.released_checkpoints import export_hp as export_hp
    from hpseg.interop.released_checkpoints import import_hp as import_hp
    from hpseg.interop.torch_export import export as export
    from hpseg.reporting.report import write_report as write_report
    from hpseg.run.config import Config as Config
    from hpseg.run.errors import UsageError as UsageError
    from hpseg.training.loop import train as train
else:

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'hpseg' has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
