"""`hpseg probe RUN DATA`: a linear and a cluster probe on the frozen codes of a run, the usual measure of a
representation. The only verb that fits anything on labels.

Both probes are fitted to the training split and scored on the other one. As published: the linear probe is one linear
layer from codes to classes, its logits brought to the labels' size bilinearly, cross-entropy over the pixels that
count; the cluster probe is cosine k-means by gradient descent and never sees a label.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from hpseg.data.datasets import NAMES, LabelledSet, open_data
from hpseg.data.folder import hash_seed
from hpseg.data.transforms import UnreadableImage, skip
from hpseg.evaluation.evaluate import report
from hpseg.evaluation.metrics import confusion
from hpseg.evaluation.protocols import PROTOCOLS
from hpseg.inference.label_map import label_map
from hpseg.inference.segmenter import Segmenter, load
from hpseg.models.heads import ClusterProbe
from hpseg.run.errors import UsageError
from hpseg.run.files import write_atomically, write_json

CACHE_BYTES = 4 << 30  # of codes kept between epochs, in half precision


def probe(
    run: str | Path,
    data: str | Path,
    *,
    root: str | Path | None = None,
    score_on: str | Path | None = None,
    void: int = 255,
    protocol: str = "default",
    steps: int = 1000,
    batch_size: int = 16,
    lr: float = 1e-3,
    cluster_lr: float = 5e-3,
    strict: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> dict:
    """Fits both probes and scores them; also written to RUN/probe.json and RUN/probe.safetensors.

    data: a named data set with `root` (fitted on its train, scored on its val split), or a folder with images/ and
    labels/ together with `score_on`, another such folder. lr: Adam, linear probe (1e-3 in Hidden Positives, 5e-3 in
    STEGO); cluster_lr: Adam, cluster probe. strict: a picture that cannot be read is a UsageError.
    """
    if str(data) in NAMES:
        if score_on is not None:
            raise UsageError(f"score_on: {data} is scored on its val split, expected none, got {str(score_on)!r}")
        fit, held_out = (open_data(data, root, split) for split in ("train", "val"))
    else:
        if score_on is None:
            raise UsageError("score_on: expected a folder with images/ and labels/ that the probes are not fitted to")
        fit, held_out = open_data(data, root, void=void), open_data(score_on, void=void)
    if protocol not in PROTOCOLS:
        raise UsageError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise UsageError(f"{name}: expected at least 1, got {value}")
    for name, value in (("lr", lr), ("cluster_lr", cluster_lr)):
        if not 0 <= value < math.inf:
            raise UsageError(f"{name}: expected a finite number of at least 0, got {value}")
    segmenter = load(run, device)
    source = _Codes(segmenter, fit, protocol, strict)
    classes = len(fit.classes) or source.largest_class() + 1
    if not classes:
        raise UsageError(f"data: no labelled pixel in {fit.name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash_seed("probe", seed))
        linear = nn.Linear(segmenter.config.dim, classes).to(source.device)
        clusters = ClusterProbe(segmenter.config.dim, classes).to(source.device)
    _fit(linear, clusters, source, steps, batch_size, lr, cluster_lr, seed)

    counts = {name: np.zeros((classes, 256), np.int64) for name in ("linear", "cluster")}
    held = _Codes(segmenter, held_out, protocol, strict)
    for index in tqdm(range(len(held)), desc="score", unit="image", disable=None, leave=False):
        example = held.read(index)
        if example is None:
            continue
        codes, truth = example
        for name, layer in (("linear", linear), ("cluster", clusters)):
            with torch.no_grad():
                maps = layer(codes.movedim(1, -1)).movedim(-1, 1)
            counts[name] += confusion(label_map(maps, truth.shape), truth, classes, 256)
    facts = {"data": str(data), "score_on": str(score_on or "val"), "protocol": protocol}
    facts |= {"images": len(held) - len(held.unreadable), "steps": steps, "seed": seed}
    facts["labels_used"] = segmenter.config.labels_used
    results = report(counts, held_out, facts, matched={"linear": False, "cluster": True})
    tensors = {f"linear.{name}": value for name, value in linear.state_dict().items()}
    tensors |= {f"cluster.{name}": value for name, value in clusters.state_dict().items()}
    content = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(Path(run) / "probe.safetensors", save(content, metadata={"classes": "\n".join(fit.classes)}))
    write_json(Path(run) / "probe.json", results)
    return results


class _Codes:
    """Codes (1, D, h, w) and labels (H, W) of a labelled set; codes are kept while they fit in CACHE_BYTES."""

    def __init__(self, segmenter: Segmenter, labelled: LabelledSet, protocol: str, strict: bool):
        self.segmenter, self.labelled, self.view_of = segmenter, labelled, PROTOCOLS[protocol]
        self.device = next(segmenter.head.parameters()).device
        self.kept: dict[int, tuple[Tensor, np.ndarray]] = {}
        self.kept_bytes, self.unreadable, self.strict = 0, set(), strict

    def __len__(self) -> int:
        return len(self.labelled.pairs)

    def largest_class(self) -> int:
        return max(int(self.labelled.class_map(path).max(initial=-1)) for _, path in self.labelled.pairs)

    @torch.no_grad()
    def read(self, index: int) -> tuple[Tensor, np.ndarray] | None:
        """None for a picture that cannot be decoded, which is named once."""
        if index in self.kept:
            codes, truth = self.kept[index]
            return codes.to(self.device).float(), truth
        image_path, label_path = self.labelled.pairs[index]
        try:
            picture = self.labelled.load_image(image_path)
        except UnreadableImage as error:
            if index not in self.unreadable:
                skip(error, self.strict)
            self.unreadable.add(index)
            return None
        config = self.segmenter.config
        truth = self.labelled.labels(label_path, picture.size)
        view = self.view_of(picture, truth, config.predict_size, self.segmenter.backbone.patch)
        codes = self.segmenter.codes(self.segmenter.pixels(view.shown), view.window)
        half, labels = codes.half().cpu(), view.truth.astype(np.int16)
        size = half.numel() * 2 + labels.nbytes
        if self.kept_bytes + size <= CACHE_BYTES:
            self.kept[index], self.kept_bytes = (half, labels), self.kept_bytes + size
        return half.to(self.device).float(), labels  # rounded whether kept or not: the cache changes no result


def _fit(
    linear: nn.Linear,
    clusters: ClusterProbe,
    source: _Codes,
    steps: int,
    batch_size: int,
    lr: float,
    cluster_lr: float,
    seed: int,
) -> None:
    optimizers = (torch.optim.Adam(linear.parameters(), lr=lr), torch.optim.Adam(clusters.parameters(), lr=cluster_lr))
    generator = torch.Generator().manual_seed(hash_seed("probe order", seed))
    order: list[int] = []
    for _ in tqdm(range(steps), desc="probe", unit="step", disable=None, leave=False):
        losses, pixels = [], 0
        for _ in range(min(batch_size, len(source))):
            order = order or torch.randperm(len(source), generator=generator).tolist()
            example = source.read(order.pop())
            if example is None:
                continue
            codes, truth = example
            labels = torch.from_numpy(truth.astype(np.int64)).to(source.device)[None]
            labels = torch.where(labels < linear.out_features, labels, -1)
            logits = linear(codes.movedim(1, -1)).movedim(-1, 1)
            logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
            supervised = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
            losses.append((supervised, clusters.loss(codes.movedim(1, -1))))
            pixels += int((labels >= 0).sum())
        if len(source.unreadable) == len(source):
            raise UsageError(f"data: none of the {len(source)} pictures of {source.labelled.name} can be decoded")
        if not losses:
            continue
        supervised, clustering = (torch.stack(terms) for terms in zip(*losses, strict=True))
        loss = supervised.sum() / max(1, pixels) + clustering.mean()  # disjoint parameters: one backward pass for both
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        if not torch.isfinite(loss):
            raise UsageError(
                f"lr, cluster_lr: the loss is {loss.item()} with {lr} and {cluster_lr}; expected smaller ones"
            )
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
