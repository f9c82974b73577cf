"""A frozen timm ViT: patch features after the final norm and neighbour weights of the last block in one pass.

Covers timm's `VisionTransformer` (DINO, DINOv2 with registers, ...) and `Eva` (DINOv3, ...) families, with weights from
timm, from a local file with timm's or the original DINO key names, or of a small ViT in this package ("embedded",
"embedded-selfsup").
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import hpkernels
from hpseg.assets import EMBEDDED
from hpseg.models.architecture import build_vit
from hpseg.models.products import LinearByConvolution
from hpseg.models.weights import load_weights, missing_file, plain_vit, read_weights, require_reachable, timm_source
from hpseg.run.errors import UsageError


class Tokens(NamedTuple):
    """Frozen output for a batch: fp32 features (B, T, C), neighbour weights (B, T, 9) or None; grid (rows, columns);
    colours (B, T, 3), the mean RGB of each patch in [0, 1].

    T are the patches of the grid, row by row.
    """

    features: Tensor
    neighbors: Tensor | None
    grid: tuple[int, int]
    colours: Tensor | None = None


class Backbone(nn.Module):
    """Frozen ViT, unless hpseg.models.finetune trains a copy of it.

    Attributes: name, source (file its weights come from), note (what whoever reads results must know of them, or ""),
    patch (pixels), channels, fingerprint (of the weights).

    pos_embed: how a learned table of position embeddings is brought to another grid than its own: "timm" (bicubic,
    antialiased) or "dino", see `_DinoPositions`. On the table's own grid, and without a table, there is no difference.
    """

    patch: int
    channels: int
    prefix: int
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        vit: nn.Module,
        name: str,
        mean: tuple,
        std: tuple,
        dtype: str = "fp32",
        pos_embed: str = "timm",
        source: str = "",
        note: str = "",
    ):
        super().__init__()
        attention = getattr(vit.blocks[-1], "attn", None) if hasattr(vit, "blocks") else None
        if not hasattr(attention, "fused_attn"):
            raise UsageError(
                f"backbone: {name!r} is a {type(vit).__name__}; expected a plain ViT of timm's VisionTransformer "
                "or Eva families, for example vit_small_patch8_224.dino"
            )
        self.vit = vit.eval().requires_grad_(False)
        self.name, self.source, self.note, self.dtype, self.pos_embed = name, source, note, dtype, pos_embed
        patch = vit.patch_embed.patch_size
        if patch[0] != patch[1]:
            raise UsageError(f"backbone: {name!r} has patches of {patch[0]} x {patch[1]} pixels, expected square ones")
        self.patch, self.channels, self.prefix = patch[0], vit.num_features, vit.num_prefix_tokens
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.fingerprint = fingerprint(vit)

    def facts(self) -> dict[str, str]:
        """What a result says of the backbone."""
        found = {"name": self.name, "weights": self.source, "fingerprint": self.fingerprint}
        return {**found, "note": self.note} if self.note else found

    def train(self, mode: bool = True) -> Backbone:
        """Stays in evaluation mode whatever is asked for, frozen or trained."""
        return super().train(False)

    def snap(self, pixels: int) -> int:
        """The nearest whole number of patches, at least two, in pixels."""
        return max(2, round(pixels / self.patch)) * self.patch

    def forward(self, images: Tensor, with_neighbors: bool = False) -> Tokens:
        """images: (B, 3, H, W) uint8, or float in [0, 1]; H and W multiples of `patch`. Features carry gradients."""
        if images.shape[-2] % self.patch or images.shape[-1] % self.patch:
            raise ValueError(f"images: expected sides that are multiples of {self.patch}, got {tuple(images.shape)}")
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        colours = F.avg_pool2d(x, self.patch).flatten(2).transpose(1, 2)
        x = (x - self.mean) / self.std
        grid = (x.shape[-2] // self.patch, x.shape[-1] // self.patch)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            if not with_neighbors:
                return Tokens(self._features(x), None, grid, colours)
            with _last_products(self.vit) as products:
                features = self._features(x)
        if len(products) != 1:
            raise UsageError(
                f"backbone: the last block of {self.name!r} makes {len(products)} attention products, expected one"
            )
        queries, keys, scale = products[0]
        queries, keys = queries.detach(), keys.detach()
        patches = slice(self.prefix, None)
        weights = hpkernels.neighbor_weights_qk(queries[:, :, patches], keys[:, :, patches], grid, scale=scale)
        return Tokens(features, weights, grid, colours)

    def _features(self, x: Tensor) -> Tensor:
        with _DinoPositions() if self.pos_embed == "dino" else nullcontext(), LinearByConvolution():
            last = self.vit.forward_intermediates(x, indices=1, norm=True, output_fmt="NLC", intermediates_only=True)
        return last[0].float()


class _DinoPositions(TorchFunctionMode):
    """The position embedding as DINO's own code resamples it, of a table of n x m patches for a grid of h x w:

        bicubic, no antialiasing, pixel centres aligned, scale factors ((h + 0.1) / n, (w + 0.1) / m)

    torch samples at the scale it is told and not at h / n: 0.1 was added against a rounding error, and the published
    heads were trained and scored with what came of it. timm asks torch for the size instead, and here it is changed.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.interpolate or kwargs.get("mode") != "bicubic":
            return function(*args, **kwargs)
        table, grid = args[0], kwargs["size"]
        if tuple(table.shape[-2:]) == tuple(grid):
            return table
        scale = tuple((wanted + 0.1) / own for wanted, own in zip(grid, table.shape[-2:], strict=True))
        return function(table, scale_factor=scale, mode="bicubic", align_corners=False)


@contextmanager
def _last_products(vit: nn.Module):
    """Collects (queries, keys, scale or None) of the attention products of the last block, which stays fused.

    They are taken where timm hands them to torch, (B, heads, N, d), so with whatever norm or rotation a family applies.
    """
    attention, products = vit.blocks[-1].attn, []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if function is F.scaled_dot_product_attention:
                products.append((args[0], args[1], kwargs.get("scale")))
            return function(*args, **kwargs)

    def watched(*args, **kwargs):
        with Watch():
            return forward(*args, **kwargs)

    forward, fused = attention.forward, attention.fused_attn
    attention.forward, attention.fused_attn = watched, True
    try:
        yield products
    finally:
        del attention.forward
        attention.fused_attn = fused


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device: expected auto, cpu or cuda[:N], got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device: expected auto, cpu or cuda[:N], got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device: {name!r} asked for, but torch {torch.__version__} sees no CUDA device")
    return device


@torch.random.fork_rng(devices=[])  # timm's random initialisation is no business of the caller's random numbers
def load_backbone(
    name: str = "embedded",
    weights: str | Path | None = None,
    *,
    pretrained: bool = True,
    dtype: str = "fp32",
    pos_embed: str = "timm",
) -> Backbone:
    """The frozen ViT `name`: one of `hpseg.assets.EMBEDDED`, or a timm name, with the weights of `weights` if given.

    With name "embedded" a file in `weights` brings its own architecture and input normalisation: from the `.json` of
    the same stem beside it, {"arch": {VisionTransformer arguments}, "mean": ..., "std": ...} and what else `build_vit`
    reads. A plain ViT with 64 channels a head needs no `.json`, since the shapes of its tensors tell; the original DINO
    files are such, see `hpseg.models.weights.DINO_FILES`. `pretrained=False` leaves timm's random initialisation.
    pos_embed: see `Backbone`.
    """
    if name in EMBEDDED:
        file = Path(weights) if weights is not None else EMBEDDED[name]
        name = "embedded" if weights is not None else name  # a file is not the ViT that a preset names
        if weights is not None and not file.is_file():
            raise missing_file(file)
        sidecar = file.with_suffix(".json")
        facts = _read_facts(sidecar) if sidecar.is_file() else plain_vit(read_weights(file), file)
        try:
            vit = build_vit(facts)
        except (TypeError, ValueError, AttributeError, AssertionError, ArithmeticError, RuntimeError) as error:
            raise UsageError(f"weights: {sidecar} describes no ViT of timm ({str(error)[:300]})") from None
        load_weights(vit, file)
        note = str(facts.get("note", ""))
        return Backbone(vit, name, facts["mean"], facts["std"], dtype, pos_embed, file.name, note)

    import timm

    options = dict(num_classes=0, dynamic_img_size=True)
    try:
        if weights is None and pretrained:
            require_reachable(name)
        vit = timm.create_model(name, pretrained=weights is None and pretrained, **options)
    except (
        RuntimeError,
        TypeError,
    ) as error:  # what timm raises for unknown names and for models without these options
        close = ", ".join(timm.list_models(f"*{name.split('.')[0][:12]}*")[:5]) or "see timm.list_models('vit_*')"
        raise UsageError(f"backbone: timm cannot make a ViT named {name!r} ({error}); near names: {close}") from None
    if weights is not None:
        load_weights(vit, Path(weights))
    data = timm.data.resolve_model_data_config(vit)
    source = Path(weights).name if weights is not None else timm_source(vit) if pretrained else "random"
    return Backbone(vit, name, data["mean"], data["std"], dtype, pos_embed, source)


def _read_facts(path: Path) -> dict:
    """The description beside a weights file: {"arch": {...}, "mean": [r, g, b], "std": [r, g, b]}."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        mean, std = (torch.tensor(facts[name], dtype=torch.float32).view(3) for name in ("mean", "std"))
        if isinstance(facts["arch"], dict) and mean.isfinite().all() and std.isfinite().all() and std.min() > 0:
            return facts
        reason = "its values are of another kind"
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise UsageError(
        f"weights: {path} is no description of a ViT, which has arch, mean and std, the two of 3 numbers, those of std "
        f"above 0 ({reason})"
    )


def fingerprint(vit: nn.Module) -> str:
    """Short hash of all weights: a run refuses to predict with a backbone it was not trained on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vit.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
