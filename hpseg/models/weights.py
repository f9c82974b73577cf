"""Backbone weights: files with timm's or the original DINO key names, the original files by name, and what is said when
weights cannot be had."""

from __future__ import annotations

import math
import os
import re
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import torch
from torch import Tensor, nn

from hpseg.run.errors import UsageError
from hpseg.run.files import read_torch

REACH_SECONDS = 5.0

# The original DINO files, and the timm name that holds the same weights. There are two of ViT-S/8: STEGO, Hidden
# Positives and their followers load the one of 300 epochs, which timm lacks; timm's (and torch hub's) is the other.
# Heads and scores of one do not carry over to the other.
DINO_FILES: dict[str, str | None] = {
    "dino_deitsmall8_300ep_pretrain.pth": None,
    "dino_deitsmall8_pretrain.pth": "vit_small_patch8_224.dino",
    "dino_deitsmall16_pretrain.pth": "vit_small_patch16_224.dino",
    "dino_vitbase8_pretrain.pth": "vit_base_patch8_224.dino",
    "dino_vitbase16_pretrain.pth": "vit_base_patch16_224.dino",
}
PUBLISHED_S8, OTHER_S8 = "dino_deitsmall8_300ep_pretrain.pth", "dino_deitsmall8_pretrain.pth"


def dino_url(file: str) -> str:
    """Where the original DINO file of that name is published."""
    return f"https://dl.fbaipublicfiles.com/dino/{Path(file).stem}/{file}"


def note_on(source: str) -> str | None:
    """What to know before results with weights from the file named `source` are compared with published ones."""
    if source != OTHER_S8:
        return None
    return (
        f"these are the weights of {OTHER_S8}; STEGO and Hidden Positives publish their ViT-S/8 results with "
        f"{PUBLISHED_S8} ({dino_url(PUBLISHED_S8)}), for which pass --weights {PUBLISHED_S8}"
    )


def timm_source(vit: nn.Module) -> str:
    """The file that timm's pretrained weights of `vit` were published as, as far as timm says."""
    facts = getattr(vit, "pretrained_cfg", None) or {}
    return (facts.get("url") or facts.get("hf_hub_id") or "timm").rsplit("/", 1)[-1]


def missing_file(path: Path) -> UsageError:
    hint = f"; download it from {dino_url(path.name)}" if path.name in DINO_FILES else ""
    return UsageError(f"weights: no file {path}{hint}")


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
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UsageError(f"weights: {path}: expected finite numbers, found NaN or infinity in {broken[0]}")
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


def plain_vit(tensors: dict[str, Tensor], path: Path) -> dict:
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
        raise missing_file(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UsageError(f"weights: {path} is not a readable safetensors file ({error})") from None
    state = read_torch("weights", path)
    if not isinstance(state, dict):
        raise UsageError(f"weights: {path} holds a {type(state).__name__}, expected a dictionary of tensors")
    return state


def require_reachable(name: str) -> None:
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


def load_network(network: nn.Module, path: Path, argument: str) -> None:
    """Fills a convolutional network of timm, whose classifier may be gone, from a file. A misfit is an error that names
    the argument."""
    classifier = network.pretrained_cfg.get("classifier") or "fc"
    prefixes = tuple(f"{part}." for part in ([classifier] if isinstance(classifier, str) else classifier))
    tensors = _efficientnet_names(read_weights(path), network)
    tensors = {key: value for key, value in tensors.items() if not key.startswith(prefixes)}
    try:
        missing, unexpected = network.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise UsageError(f"{argument}: {path} does not fit ({str(error)[:300]})") from None
    missing = [key for key in missing if key in dict(network.named_parameters()) or "running" in key]
    if missing or unexpected:
        raise UsageError(
            f"{argument}: {path} does not fit {type(network).__name__}: {len(missing)} tensors missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} unexpected ({', '.join(unexpected[:3])})"
        )


# Names of the EfficientNet-PyTorch package and timm's: of the network, of a block, of a block that expands nothing.
_NETWORK = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_BLOCK = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
_BLOCK |= {"_project_conv": "conv_pwl", "_bn2": "bn3", "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
_PLAIN_BLOCK = {**_BLOCK, "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def _efficientnet_names(tensors: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Tensors of the EfficientNet-PyTorch package and its kin by timm's names; others as they are."""
    if "_conv_stem.weight" not in tensors or not hasattr(network, "blocks"):
        return tensors
    blocks = [(f"blocks.{i}.{j}", block) for i, stage in enumerate(network.blocks) for j, block in enumerate(stage)]
    renamed = {}
    for key, value in tensors.items():
        match = re.fullmatch(r"(?:_blocks\.(\d+)\.)?(\w+)\.(\w+)", key)
        if match and match[1] is None and match[2] in _NETWORK:
            key = f"{_NETWORK[match[2]]}.{match[3]}"
        elif match and match[1] is not None and int(match[1]) < len(blocks) and match[2] in _BLOCK:
            prefix, block = blocks[int(match[1])]
            names = _BLOCK if hasattr(block, "conv_pwl") else _PLAIN_BLOCK
            key = f"{prefix}.{names[match[2]]}.{match[3]}"
        renamed[key] = value
    return renamed
