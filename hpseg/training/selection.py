"""`--select-on-labels DATA`: labels choose the checkpoint. Off unless asked for; nothing else in training sees a label.

Every `select_every` steps and at the end, what the run would give is scored on the labelled pictures, and the best is
kept. Such a score flatters: labels that chose a checkpoint are no longer unseen. The run says so wherever it is used.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from hpseg.data.datasets import LabelledSet, open_data
from hpseg.data.transforms import UnreadableImage
from hpseg.evaluation.evaluate import report
from hpseg.evaluation.metrics import confusion
from hpseg.inference.segmenter import Segmenter, assemble
from hpseg.models.backbone import Backbone
from hpseg.run.config import Config
from hpseg.runtime.distributed import ALONE, Ranks

SPLIT = "val"  # of a named data set


class Selection:
    """The best of the candidates so far: `step`, its `miou` in percent, its `tensors` as in model.safetensors."""

    def __init__(self, config: Config, ranks: Ranks = ALONE):
        root = config.select_root
        if root is None and config.select_on_labels == config.images:
            root = config.root
        self.config, self.ranks, self.labelled = config, ranks, open_data(config.select_on_labels, root, SPLIT)
        self.step, self.miou, self.tensors, self.scored = -1, -1.0, {}, 0

    def due(self, step: int) -> bool:
        return step % self.config.select_every == 0 or step == self.config.steps

    def consider(self, step: int, tensors: dict[str, Tensor], backbone: Backbone) -> float:
        """Scores a candidate, keeps it if it is the best (the earliest of equals), and returns its mIoU in percent."""
        miou = mean_iou(assemble(backbone, tensors, self.config), self.labelled, self.ranks)
        self.scored += 1
        if miou > self.miou:
            copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
            self.step, self.miou, self.tensors = step, miou, copies
        return miou

    def state(self) -> dict:
        return {"step": self.step, "miou": self.miou, "tensors": self.tensors, "scored": self.scored}

    def load_state(self, state: dict) -> None:
        self.step, self.miou = state["step"], state["miou"]
        self.tensors, self.scored = state["tensors"], state["scored"]

    def results(self) -> dict:
        return {
            "selection": f"{self.config.labels_used} Step {self.step} was the best of {self.scored} that were scored.",
            "selected_step": self.step,
            "selected_miou": self.miou,
        }


def mean_iou(segmenter: Segmenter, labelled: LabelledSet, ranks: Ranks) -> float:
    """mIoU in percent of whole pictures at their own size, as in `hpseg eval`. Each rank scores a part of them."""
    counts = np.zeros((segmenter.config.classes, 256), np.int64)
    with ranks.agree():
        for image, label in labelled.pairs[ranks.rank :: ranks.size]:
            try:
                picture = labelled.load_image(image)
            except UnreadableImage:
                continue
            truth = labelled.labels(label, picture.size)
            counts += confusion(segmenter.predict(picture), truth, len(counts), 256)
    matched = {"trained": not segmenter.config.learns_classes}
    return report({"trained": sum(ranks.collect(counts))}, labelled, {}, matched)["trained"]["miou"]
