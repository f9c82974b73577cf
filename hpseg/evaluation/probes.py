"""`hpseg probe RUN DATA`: a linear and a cluster probe on the frozen codes of a run, the usual measure of a
representation. The only verb that fits anything on labels.

Both probes are fitted to the training split and scored on the other one. As published: the linear probe is one linear
layer from codes to classes, its logits brought to the labels' size bilinearly, cross-entropy over the pixels that
count; the cluster probe is cosine k-means by gradient descent and never sees a label.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from hpseg.data.datasets import NAMES, LabelledSet, open_data
from hpseg.data.folder import hash_seed
from hpseg.data.transforms import UnreadableImage, skip
from hpseg.evaluation.evaluate import report
from hpseg.evaluation.metrics import confusion
from hpseg.evaluation.pixel_loss import Labels, PixelCrossEntropy
from hpseg.evaluation.protocols import PROTOCOLS
from hpseg.features.kept import KeptTokens
from hpseg.inference.label_map import label_map
from hpseg.inference.segmenter import Segmenter, load
from hpseg.models.heads import ClusterProbe
from hpseg.run.errors import UsageError
from hpseg.run.files import write_atomically, write_json
from hpseg.runtime.messages import Stopwatch, progress, waiting

CACHE_BYTES = 4 << 30  # of codes in half precision and of what is needed of their labels, kept between epochs


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
    watch = Stopwatch("loading")
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
    with waiting("loading"):
        segmenter = load(run, device)
    kept = KeptTokens(segmenter.backbone, segmenter.config, Path(run))
    source = _Codes(segmenter, kept, fit, protocol, strict)
    classes = len(fit.classes) or source.largest_class() + 1
    if not classes:
        raise UsageError(f"data: no labelled pixel in {fit.name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash_seed("probe", seed))
        linear = nn.Linear(segmenter.config.dim, classes).to(source.device)
        clusters = ClusterProbe(segmenter.config.dim, classes).to(source.device)
    watch.phase("fitting")
    with PixelCrossEntropy(source.device) as pixel_loss:
        _fit(linear, clusters, source, pixel_loss, steps, batch_size, lr, cluster_lr, seed)

    watch.phase("scoring")
    counts = {name: np.zeros((classes, 256), np.int64) for name in ("linear", "cluster")}
    held = _Codes(segmenter, kept, held_out, protocol, strict)
    for index in progress(range(len(held)), "score", len(held)):
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
    facts |= {"backbone": segmenter.backbone.facts(), "labels_used": segmenter.config.labels_used}
    results = report(counts, held_out, facts, matched={"linear": False, "cluster": True})
    tensors = {f"linear.{name}": value for name, value in linear.state_dict().items()}
    tensors |= {f"cluster.{name}": value for name, value in clusters.state_dict().items()}
    content = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(Path(run) / "probe.safetensors", save(content, metadata={"classes": "\n".join(fit.classes)}))
    results |= watch.results()
    write_json(Path(run) / "probe.json", results)
    return results


class _Codes:
    """Codes (1, D, h, w) and labels (H, W) of a labelled set."""

    def __init__(self, segmenter: Segmenter, kept: KeptTokens, labelled: LabelledSet, protocol: str, strict: bool):
        self.segmenter, self.kept, self.labelled, self.view_of = segmenter, kept, labelled, PROTOCOLS[protocol]
        self.device = next(segmenter.head.parameters()).device
        self.unreadable, self.strict = set[int](), strict

    def __len__(self) -> int:
        return len(self.labelled.pairs)

    def largest_class(self) -> int:
        paths = progress((path for _, path in self.labelled.pairs), "labels", len(self))
        return max(int(self.labelled.class_map(path).max(initial=-1)) for path in paths)

    @torch.no_grad()
    def read(self, index: int) -> tuple[Tensor, np.ndarray] | None:
        """None for a picture that cannot be decoded, which is named once."""
        image_path, label_path = self.labelled.pairs[index]
        try:
            picture = self.labelled.load_image(image_path)
        except UnreadableImage as error:
            if index not in self.unreadable:
                skip(error, self.strict)
            self.unreadable.add(index)
            return None
        segmenter = self.segmenter
        truth = self.labelled.labels(label_path, picture.size)
        view = self.view_of(picture, truth, segmenter.config.predict_size, segmenter.backbone.patch)

        def codes(part: Tensor) -> dict[str, Tensor]:
            tokens = self.kept(part, image_path)
            return {"codes": segmenter.head.codes_of(tokens).transpose(1, 2).unflatten(2, tokens.grid)}

        bands = segmenter.bands(segmenter.pixels(view.shown), codes, view.window)
        found = torch.cat([band["codes"] for band in bands], 2)
        return found.half().float(), view.truth  # rounded whether they are kept or not: keeping changes no result


class _Example(NamedTuple):
    codes: Tensor  # (h w, D) fp16
    labels: Labels


class _Examples:
    """What the probes are fitted to, a picture at a time; kept from the first time on, up to CACHE_BYTES."""

    def __init__(self, source: _Codes, classes: int):
        self.source, self.classes = source, classes
        self.held: dict[int, _Example] = {}
        self.free = CACHE_BYTES

    def read(self, index: int) -> _Example | None:
        """None for a picture that cannot be decoded."""
        example = self.held.get(index)
        if example is None:
            read = self.source.read(index)
            if read is None:
                return None
            codes, truth = read
            labels = Labels.of(torch.from_numpy(truth).to(self.source.device), self.classes, tuple(codes.shape[2:]))
            example = _Example(codes[0].flatten(1).T.half().contiguous(), labels)
            size = example.codes.nbytes + labels.bytes
            if size <= self.free:
                self.held[index], self.free = example, self.free - size
        return example


def _fit(
    linear: nn.Linear,
    clusters: ClusterProbe,
    source: _Codes,
    pixel_loss: PixelCrossEntropy,
    steps: int,
    batch_size: int,
    lr: float,
    cluster_lr: float,
    seed: int,
) -> None:
    examples = _Examples(source, linear.out_features)
    optimizers = (torch.optim.Adam(linear.parameters(), lr=lr), torch.optim.Adam(clusters.parameters(), lr=cluster_lr))
    generator = torch.Generator().manual_seed(hash_seed("probe order", seed))
    order: list[int] = []
    for _ in progress(range(steps), "probe", steps, "step"):
        batch = []
        for _ in range(min(batch_size, len(source))):
            order = order or torch.randperm(len(source), generator=generator).tolist()
            if (example := examples.read(order.pop())) is not None:
                batch.append(example)
        if len(source.unreadable) == len(source):
            raise UsageError(f"data: none of the {len(source)} pictures of {source.labelled.name} can be decoded")
        if not batch:
            continue
        codes, labels = torch.cat([example.codes for example in batch]).float(), [one.labels for one in batch]
        supervised = pixel_loss(linear(codes), labels) / max(1, sum(one.pixels for one in labels))
        loss = supervised + _cluster_loss(clusters, batch, codes)  # disjoint parameters: one backward pass for both
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        if not torch.isfinite(loss):
            raise UsageError(
                f"lr, cluster_lr: the loss is {loss.item()} with {lr} and {cluster_lr}; expected smaller ones"
            )
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


def _cluster_loss(clusters: ClusterProbe, batch: list[_Example], codes: Tensor) -> Tensor:
    """The mean over pictures of `ClusterProbe.loss`, in one product. codes: of the whole batch, (rows, D)."""
    nearest = clusters(F.normalize(codes, dim=1)).amax(1)
    return -torch.stack([of_picture.mean() for of_picture in nearest.split([len(one.codes) for one in batch])]).mean()
