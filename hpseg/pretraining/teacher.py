"""What a student ViT is taught: features of any network of timm, on the student's grid and of the student's width."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpseg.models.architecture import feature_info, stages_of
from hpseg.models.backbone import Backbone, fingerprint, load_backbone
from hpseg.models.extractor import PLAIN_VITS
from hpseg.models.weights import load_network, require_reachable, timm_source
from hpseg.run.errors import UsageError


class Teacher(nn.Module, ABC):
    """A frozen network whose feature maps are the lesson.

    Attributes: name, source (the file its weights come from), licence (as timm states it, or None), fingerprint (of
    the weights), stride (pixels to which sides of pictures are rounded), levels ({stride: weight}), normalisation
    (mean and std of its pictures).
    """

    name: str
    source: str
    licence: str | None
    fingerprint: str
    stride: int
    levels: dict[int, float]
    normalisation: dict[str, tuple[float, ...]]

    @abstractmethod
    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Pictures (B, 3, H, W) in [0, 1] -> a feature map (B, C, h, w), fp32, of each level."""

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode whatever is asked for: it is frozen."""
        return super().train(False)


class VitTeacher(Teacher):
    """The patch tokens of a ViT, after its final norm."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone
        self.name, self.source, self.stride = backbone.name, backbone.source, backbone.patch
        self.licence = (getattr(backbone.vit, "pretrained_cfg", None) or {}).get("license")
        self.fingerprint, self.levels = backbone.fingerprint, {backbone.patch: 1.0}
        self.normalisation = {key: tuple(getattr(backbone, key).flatten().tolist()) for key in ("mean", "std")}

    @torch.no_grad()
    def maps(self, pixels: Tensor) -> list[Tensor]:
        tokens = self.backbone(pixels)
        return [tokens.features.transpose(1, 2).unflatten(2, tokens.grid)]


class ConvTeacher(Teacher):
    """Stages of a convolutional network, named by their strides."""

    def __init__(self, network: nn.Module, name: str, source: str, levels: dict[int, float]):
        super().__init__()
        import timm

        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.name, self.source, self.fingerprint = name, source, fingerprint(network)
        self.licence = network.pretrained_cfg.get("license")
        strides = [stage["reduction"] for stage in feature_info(network)]
        self.levels, self.stride = levels or {strides[-1]: 1.0}, strides[-1]
        try:
            self.stages = stages_of(network, self.levels)
        except ValueError as error:
            raise UsageError(f"--levels: {name!r}: {error}") from None
        data = timm.data.resolve_model_data_config(network)
        self.normalisation = {"mean": tuple(data["mean"]), "std": tuple(data["std"])}

    @torch.no_grad()
    def maps(self, pixels: Tensor) -> list[Tensor]:
        mean, std = (pixels.new_tensor(self.normalisation[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        pixels = ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)
        options = {"indices": self.stages, "norm": False, "intermediates_only": True}
        return [values.float() for values in self.network.forward_intermediates(pixels, **options)]


def parse_levels(text: str | None) -> dict[int, float]:
    """ "16:0.5,32" -> {16: 0.5, 32: 1.0}: strides and weights."""
    levels = {}
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        match = re.fullmatch(r"(\d+)(?::(\d*\.?\d+))?", part)
        if match is None or float(match[2] or 1) == 0:
            raise UsageError(f"--levels: expected STRIDE:WEIGHT, separated by commas, got {part!r}")
        levels[int(match[1])] = float(match[2] or 1)
    return dict(sorted(levels.items()))


def load_teacher(name: str, weights: Path | None, levels: str | None, dtype: str = "fp32") -> Teacher:
    """The network `name` of timm, or a file that `hpseg pretrain` or `hpseg distill` wrote, with the weights of a local
    file if one is given. levels: of a convolutional network, see parse_levels; the deepest one without. dtype: of a
    ViT's arithmetic; a convolutional network follows autocast."""
    import timm

    wanted = parse_levels(levels)
    base = name.split(".")[0]
    if Path(name).is_file() and weights is not None:
        raise UsageError(f"--teacher-weights: {name} holds weights itself; expected none, got {weights}")
    try:
        if Path(name).is_file():
            teacher = VitTeacher(load_backbone("embedded", name, dtype=dtype))
        elif not timm.models.is_model(base) or timm.models.is_model_in_modules(base, PLAIN_VITS):
            teacher = VitTeacher(load_backbone(name, weights, dtype=dtype))
        else:
            return ConvTeacher(*load_conv(name, weights), wanted)
    except UsageError as error:  # of functions for which it is another argument
        file = "--teacher" if weights is None else "--teacher-weights"
        said = str(error).replace("backbone: ", "--teacher: ", 1).replace("weights: ", f"{file}: ", 1)
        raise UsageError(said if said.startswith("--") else f"--teacher: {said}") from None
    except (RuntimeError, KeyError) as error:  # timm's, of a tag that it does not know
        raise UsageError(f"--teacher: timm cannot make {name!r} ({str(error)[:300]})") from None
    if wanted:
        raise UsageError(f"--levels: {name!r} is a ViT, which teaches its patch tokens; leave --levels out")
    return teacher


def load_conv(name: str, weights: Path | None) -> tuple[nn.Module, str, str]:
    """A convolutional network of timm without its classifier, its name, and the file its weights come from."""
    import timm

    if weights is None:
        require_reachable(name)
    with torch.random.fork_rng(devices=[]):
        network = timm.create_model(name, pretrained=weights is None, num_classes=0)
    if weights is not None:
        load_network(network, weights, "weights")
    network.prune_intermediate_layers(len(feature_info(network)), prune_norm=True, prune_head=True)
    return network, name, timm_source(network) if weights is None else weights.name


class Lesson(nn.Module):
    """The teacher's levels as targets: (B, T, width) on the student's grid.

        y = sqrt(width / v) [w_1 (x_1 - m_1) / s_1, ..., w_n (x_n - m_n) / s_n] R

    m_l is the mean of level l and s_l its root mean squared distance from it, both over the patches of the crops that
    `fit` has seen; R (C, width) holds the principal directions, zeros beyond C of them; v is the mean squared length,
    so that targets are as long as the tokens of a layer norm.
    """

    def __init__(self, weights: Sequence[float], channels: Sequence[int], width: int):
        super().__init__()
        self.weights = list(weights)
        self.register_buffer("mean", torch.zeros(sum(channels)))
        self.register_buffer("scale", torch.ones(sum(channels)))
        self.register_buffer("rotation", torch.zeros(sum(channels), width))

    @staticmethod
    def joined(maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """Levels (B, C_l, h_l, w_l) -> (B, T, C) on the grid: means of finer maps, interpolation of coarser ones."""
        levels = []
        for values in maps:
            finer = values.shape[-1] > grid[1]
            mode = {"mode": "area"} if finer else {"mode": "bilinear", "align_corners": False}
            levels.append(F.interpolate(values, grid, **mode))
        return torch.cat(levels, 1).flatten(2).transpose(1, 2)

    def fit(self, batches: Iterable[list[Tensor]], grid: tuple[int, int]) -> None:
        """Sets mean, scale and rotation by the maps of some batches."""
        count, total, products = 0, 0.0, 0.0
        channels = []
        for maps in batches:
            channels = [values.shape[1] for values in maps]
            rows = self.joined(maps, grid).flatten(0, 1).double()
            count, total, products = count + len(rows), total + rows.sum(0), products + rows.T @ rows
        mean = total / count
        covariance = products / count - torch.outer(mean, mean)
        parts = covariance.diagonal().split(channels)
        scale = torch.cat(
            [
                torch.full_like(part, weight / part.sum().clamp(min=1e-12).sqrt())
                for part, weight in zip(parts, self.weights, strict=True)
            ]
        )
        covariance = scale[:, None] * covariance * scale
        variance, axes = torch.linalg.eigh(covariance)
        kept = min(self.rotation.shape)
        axes = axes.flip(1)[:, :kept] * (self.rotation.shape[1] / variance.flip(0)[:kept].sum()).sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        self.rotation.zero_()
        self.rotation[:, :kept] = axes

    def forward(self, maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
        return ((self.joined(maps, grid) - self.mean) * self.scale) @ self.rotation
