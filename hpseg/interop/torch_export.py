"""A run as one file without this package: `hpseg export RUN --out model.pt2`, a torch.export program.

    import json, torch
    facts = {"hpseg.json": ""}
    model = torch.export.load("model.pt2", extra_files=facts).module()
    model(images)                       # images (1, 3, H, W): float in [0, 1], or uint8 if exported so
    json.loads(facts["hpseg.json"])     # classes, names, palette, patch, what goes in and what comes out

Scaling to the backbone's mean and standard deviation is part of the program, and so are its weights; bringing a
photograph to size is not: a short side of `predict_size` pixels, both sides multiples of `patch`.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpkernels import __version__
from hpseg.assets import PHOTOS
from hpseg.data.transforms import load_image, square, to_tensor
from hpseg.inference.segmenter import Segmenter, load
from hpseg.run.errors import UsageError
from hpseg.run.files import require_file, write_atomically

FACTS = "hpseg.json"
TOLERANCE = 1e-4  # of the largest similarity: the program may fuse what eager mode rounds in between
LABELS_TOLERANCE = 1e-3  # share of pixels that may lie on the other side of a tie
MAX_SIDE = 512  # patches
INPUTS, OUTPUTS = ("float", "uint8"), ("similarities", "labels")


class Deployed(nn.Module):
    """Backbone, head and clusters: images (1, 3, H, W) -> similarities (1, K, h, w), or labels (1, H, W) uint8."""

    def __init__(self, segmenter: Segmenter, output: str):
        super().__init__()
        self.segmenter, self.output = segmenter, output

    def forward(self, images: Tensor) -> Tensor:
        similarities = self.segmenter.similarities(self.segmenter(images))
        if self.output == "similarities":
            return similarities
        return F.interpolate(similarities, images.shape[2:], mode="bilinear").argmax(1).to(torch.uint8)


@torch.no_grad()
def export(
    run: str | Path,
    out: str | Path,
    *,
    input: str = "float",
    output: str = "similarities",
    size: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> dict:
    """Writes the program to `out` (ending in .pt2) once it agrees with the run; returns the facts stored in it.

    input: "float" in [0, 1] or "uint8". output: "similarities" (1, K, H / patch, W / patch) to the unit centroids,
    whose largest decides, or "labels" (1, H, W) uint8. size: fixed (height, width) in pixels; None leaves both free, in
    whole patches, which torch.export cannot do for backbones with rotary position embeddings (DINOv3): UsageError.

    The file is kept only if similarities differ by at most TOLERANCE times the largest, or labels in at most
    LABELS_TOLERANCE of the pixels, on noise and on a photograph.
    """
    out = Path(out)
    for name, value, choices in (("input", input, INPUTS), ("output", output, OUTPUTS)):
        if value not in choices:
            raise UsageError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    if out.suffix != ".pt2":
        raise UsageError(f"out: expected a name that ends in .pt2, got {str(out)!r}")
    require_file("out", out, overwrite)
    segmenter = load(run, "cpu")
    patch = segmenter.backbone.patch
    if size is not None:
        height, width = size
        size = (height, width)
    if size is not None and (min(size) < 2 * patch or any(side % patch for side in size)):
        raise UsageError(f"size: expected height and width in multiples of {patch}, at least {2 * patch}, got {size}")
    model = Deployed(segmenter, output).eval()
    examples = _examples(segmenter, input, size)
    program = _trace(model, examples[0], patch, size)
    key = segmenter.key()
    facts = {
        "input": {"shape": [1, 3, *(size or ("H", "W"))], "dtype": input, "range": [0, 1 if input == "float" else 255]},
        "output": output,
        "patch": patch,
        "predict_size": segmenter.config.predict_size,
        "classes": segmenter.config.classes,
        "names": [key.names[cluster] for cluster in range(segmenter.config.classes)],
        "palette": key.colours,
        "backbone": segmenter.backbone.name,
        "method": segmenter.config.method,
        "hpseg": __version__,
    }
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={FACTS: json.dumps(facts)})
    loaded = torch.export.load(io.BytesIO(content.getbuffer()))
    foreign = {str(node.target) for node in loaded.graph.nodes if str(node.target).startswith("hpkernels")}
    if foreign:
        raise RuntimeError(f"the program needs {', '.join(sorted(foreign))}, which torch alone does not have")
    for images in examples:
        _require_agreement(_answer(loaded, images), model(images))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, content.getbuffer())
    return facts


def _examples(segmenter: Segmenter, input: str, size: tuple[int, int] | None) -> list[Tensor]:
    """Noise and a photograph, of two sizes where the size is free."""
    patch = segmenter.backbone.patch
    height, width = size or (5 * patch, 7 * patch)
    noise = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    side = segmenter.backbone.snap(segmenter.config.predict_size)
    photograph = to_tensor(square(load_image(min(PHOTOS.glob("*.jpg"))), max(size or (side,))))[None]
    if size:
        photograph = photograph[:, :, :height, :width]
    if input == "uint8":
        return [(noise * 255).to(torch.uint8), photograph]
    return [noise, photograph / 255]


def _trace(model: nn.Module, images: Tensor, patch: int, size: tuple[int, int] | None) -> torch.export.ExportedProgram:
    sides = {}
    if size is None:
        rows, columns = (torch.export.Dim(name, min=2, max=MAX_SIDE) for name in ("rows", "columns"))
        sides = {2: patch * rows, 3: patch * columns}
    try:
        # Not strict: the backbone's own way of bringing its position embedding to size is traced as it runs.
        return torch.export.export(model, (images,), dynamic_shapes={"images": sides}, strict=False)
    except (torch._dynamo.exc.UserError, RuntimeError, ValueError, TypeError) as error:
        way_out = "; try a fixed --size HEIGHT WIDTH" if size is None else ""
        raise UsageError(
            f"run: torch.export cannot trace this backbone ({str(error).splitlines()[0]}){way_out}"
        ) from None


def _answer(program: torch.export.ExportedProgram, images: Tensor) -> Tensor:
    try:
        return program.module()(images)
    except AssertionError as error:  # the guards of a program that was traced for one size only
        raise UsageError(
            f"run: its backbone exports for one size only ({str(error).splitlines()[0]}); pass --size HEIGHT WIDTH"
        ) from None


def _require_agreement(found: Tensor, expected: Tensor) -> None:
    if found.dtype == torch.uint8:
        share = float((found != expected).float().mean())
        if share > LABELS_TOLERANCE:
            raise RuntimeError(
                f"the exported program gives other labels in {share:.1%} of the pixels; nothing was written"
            )
        return
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not error <= TOLERANCE:
        raise RuntimeError(f"the exported program is off by {error:.2g} of the largest similarity; nothing was written")
