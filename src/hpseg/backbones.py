"""A frozen timm ViT: patch features after the final norm and neighbour weights of the last block in one pass.

Covers timm's `VisionTransformer` (DINO, DINOv2 with registers, ...) and `Eva` (DINOv3, ...) families, with weights from
timm, from a local file with timm's or the original DINO key names, or of the small ViT in this package ("embedded").
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import hpkernels
from hpseg.config import UsageError

EMBEDDED = Path(__file__).parent / "assets" / "vit_tiny8.safetensors"
REACH_SECONDS = 5.0


class Tokens(NamedTuple):
    """Frozen output for a batch: fp32 features (B, T, C), neighbour weights (B, T, 9) or None; grid (rows, columns).

    Rows of `features` and `neighbors` are the patches of the grid, row by row.
    """

    features: Tensor
    neighbors: Tensor | None
    grid: tuple[int, int]


class Backbone(nn.Module):
    """Frozen ViT. Attributes: name, patch (pixels), channels, fingerprint (of the weights)."""

    def __init__(self, vit: nn.Module, name: str, mean: tuple, std: tuple, dtype: str = "fp32"):
        super().__init__()
        attention = getattr(vit.blocks[-1], "attn", None) if hasattr(vit, "blocks") else None
        if not hasattr(attention, "fused_attn"):
            raise UsageError(
                f"backbone: {name!r} is a {type(vit).__name__}; expected a plain ViT of timm's VisionTransformer "
                "or Eva families, for example vit_small_patch8_224.dino"
            )
        self.vit = vit.eval().requires_grad_(False)
        self.name, self.dtype = name, dtype
        patch = vit.patch_embed.patch_size
        if patch[0] != patch[1]:
            raise UsageError(f"backbone: {name!r} has patches of {patch[0]} x {patch[1]} pixels, expected square ones")
        self.patch, self.channels, self.prefix = patch[0], vit.num_features, vit.num_prefix_tokens
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.fingerprint = _fingerprint(vit)

    def train(self, mode: bool = True) -> Backbone:
        """Stays in evaluation mode whatever is asked for: it is frozen."""
        return super().train(False)

    def snap(self, pixels: int) -> int:
        """The nearest whole number of patches, at least two, in pixels."""
        return max(2, round(pixels / self.patch)) * self.patch

    @torch.no_grad()
    def forward(self, images: Tensor, with_neighbors: bool = False) -> Tokens:
        """images: (B, 3, H, W) uint8, or float in [0, 1]; H and W multiples of `patch`."""
        if images.shape[-2] % self.patch or images.shape[-1] % self.patch:
            raise ValueError(f"images: expected sides that are multiples of {self.patch}, got {tuple(images.shape)}")
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        x = (x - self.mean) / self.std
        grid = (x.shape[-2] // self.patch, x.shape[-1] // self.patch)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            if not with_neighbors:
                return Tokens(self._features(x), None, grid)
            with _last_products(self.vit) as products:
                features = self._features(x)
        if len(products) != 1:
            raise UsageError(
                f"backbone: the last block of {self.name!r} makes {len(products)} attention products, expected one"
            )
        queries, keys, scale = products[0]
        patches = slice(self.prefix, None)
        weights = hpkernels.neighbor_weights_qk(queries[:, :, patches], keys[:, :, patches], grid, scale=scale)
        return Tokens(features, weights, grid)

    def _features(self, x: Tensor) -> Tensor:
        return self.vit.forward_intermediates(x, indices=1, norm=True, output_fmt="NLC", intermediates_only=True)[
            0
        ].float()


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
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device: {name!r} asked for, but torch {torch.__version__} sees no CUDA device")
    return device


@torch.random.fork_rng(devices=[])  # timm's random initialisation is no business of the caller's random numbers
def load_backbone(
    name: str = "embedded", weights: str | Path | None = None, *, pretrained: bool = True, dtype: str = "fp32"
) -> Backbone:
    """The frozen ViT `name`: "embedded", or a timm name, with the weights of `weights` if given.

    With name "embedded" a file in `weights` brings its own architecture and input normalisation: from the `.json` of
    the same stem beside it, {"arch": {VisionTransformer arguments}, "mean": ..., "std": ...}, or else, for a plain ViT
    with 64 channels a head, from the shapes of its tensors. `pretrained=False` leaves timm's random initialisation.
    """
    import timm

    if name == "embedded":
        file = Path(weights) if weights is not None else EMBEDDED
        if weights is not None and not file.is_file():
            raise UsageError(f"weights: no file {file}")
        sidecar = file.with_suffix(".json")
        facts = json.loads(sidecar.read_text()) if sidecar.is_file() else _plain_vit(read_weights(file), file)
        arch = {"num_classes": 0, "global_pool": "", "dynamic_img_size": True, **facts["arch"]}
        vit = timm.models.vision_transformer.VisionTransformer(**arch)
        load_weights(vit, file)
        return Backbone(vit, name, facts["mean"], facts["std"], dtype)

    options = dict(num_classes=0, dynamic_img_size=True)
    try:
        if weights is None and pretrained:
            _require_reachable(name)
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
    return Backbone(vit, name, data["mean"], data["std"], dtype)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The backbone's tensors, fp32, by timm's names, from a .safetensors or torch file.

    Takes the "teacher", "state_dict" or "model" entry where there is one, strips `module.` and `backbone.` and leaves
    out projection heads.
    """
    state = _read_state(path)
    for entry in ("teacher", "state_dict", "model"):
        if isinstance(state.get(entry), dict):
            state = state[entry]
    tensors = {}
    for key, value in state.items():
        while key.startswith(("module.", "backbone.")):
            key = key.split(".", 1)[1]
        if isinstance(value, Tensor) and not key.startswith(("head.", "dino_head.", "ibot_head.")):
            tensors[key] = value.float()
    if not tensors:
        raise UsageError(f"weights: {path} holds no backbone tensors, expected a ViT with timm's or DINO's key names")
    return tensors


def load_weights(vit: nn.Module, path: Path) -> None:
    """Fills `vit` from a file, its position embedding resampled to the grid. A misfit is an error."""
    tensors = read_weights(path)
    adapt = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
    try:
        missing, unexpected = vit.load_state_dict(adapt(tensors, vit) if adapt else tensors, strict=False)
    except (RuntimeError, KeyError) as error:
        raise UsageError(f"weights: {path} does not fit {type(vit).__name__} ({str(error)[:300]})") from None
    if missing or unexpected:
        raise UsageError(
            f"weights: {path} does not fit {type(vit).__name__}: {len(missing)} tensors missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} unexpected ({', '.join(unexpected[:3])})"
        )


def _plain_vit(tensors: dict[str, Tensor], path: Path) -> dict:
    """Architecture of a plain ViT (class token, square grid, 64 channels a head) from the shapes of its tensors."""
    try:
        width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
        grid = math.isqrt(tensors["pos_embed"].shape[1] - 1)
        depth = len({key.split(".")[1] for key in tensors if key.startswith("blocks.")})
    except (KeyError, ValueError):
        raise UsageError(
            f"weights: {path} is not a plain ViT; name its architecture with --backbone, or put a "
            f"{path.with_suffix('.json').name} beside it"
        ) from None
    return {
        "arch": {
            "img_size": grid * patch,
            "patch_size": patch,
            "embed_dim": width,
            "depth": depth,
            "num_heads": max(1, width // 64),
        },
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }


def _read_state(path: Path) -> dict:
    if not path.is_file():
        raise UsageError(f"weights: no file {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UsageError(f"weights: {path} is not a readable safetensors file ({error})") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError) as error:
        raise UsageError(
            f"weights: {path} is not a torch file of plain tensors ({str(error).splitlines()[0]})"
        ) from None
    if not isinstance(state, dict):
        raise UsageError(f"weights: {path} holds a {type(state).__name__}, expected a dictionary of tensors")
    return state


def _require_reachable(name: str) -> None:
    """Says within REACH_SECONDS that timm's weights cannot be had, where a download would retry for minutes."""
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    hint = (
        "download them elsewhere and pass --weights FILE, or use the ViT that ships with this package: "
        "--backbone embedded"
    )
    if not timm.models.is_model(name.split(".")[0]):
        return  # timm's own sentence about the name is the better one
    facts = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    if facts is None or not facts.has_weights:
        raise UsageError(
            f"backbone: timm has no pretrained weights for {name!r}; name one with a tag, such as "
            "vit_small_patch8_224.dino, or pass --weights FILE"
        )
    if facts.hf_hub_id:
        files = ("model.safetensors", "pytorch_model.bin")
        if any(isinstance(try_to_load_from_cache(facts.hf_hub_id, file), str) for file in files):
            return
        url = f"{constants.ENDPOINT}/{facts.hf_hub_id}/resolve/main/{files[0]}"
    else:
        url = facts.url
        if (Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]).is_file():
            return
    problem = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else _unreachable(url)
    if problem:
        raise UsageError(f"backbone: the pretrained weights of {name!r} cannot be reached ({problem}); {hint}")


def _unreachable(url: str) -> str | None:
    """Why `url` cannot be fetched, or None. In a thread, because looking up a host name heeds no timeout."""
    answer: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=REACH_SECONDS).close()
            answer.append(None)
        except urllib.error.HTTPError as error:
            answer.append(f"{url} answers {error.code}")
        except (OSError, ValueError) as error:
            answer.append(f"{url}: {getattr(error, 'reason', error)}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return answer[0] if answer else f"no answer from {url} in {REACH_SECONDS:.0f} s"


def _fingerprint(vit: nn.Module) -> str:
    """Short hash of all weights: a run refuses to predict with a backbone it was not trained on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vit.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
