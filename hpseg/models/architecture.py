"""Builds the ViTs that this package trains and ships, from the description in the .json beside their weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


class ConvStem(nn.Module):
    """The first stages of a convolutional network in the place of a ViT's patch embedding.

    The stages of the given strides are brought to the ViT's grid (finer ones by means, coarser ones by interpolation),
    standardised by fixed statistics, see `calibrate`, and projected to the ViT's width. Such hybrids learn from few
    pictures: Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021; Xiao et al., "Early convolutions help
    transformers see better", NeurIPS 2021.

    network: name of a timm network; its weights are random until they are loaded. strides: those of its stages to use.
    folded: batch norms are part of the convolutions before them, which is faster; a stem that is trained keeps them
    apart, with fixed statistics, and `fold_batch_norms` joins them afterwards.
    """

    def __init__(
        self,
        network: str,
        strides: Sequence[int],
        img_size: int,
        patch_size: int,
        embed_dim: int,
        folded: bool = True,
        **_: Any,  # what else timm tells a patch embedding
    ):
        super().__init__()
        import timm

        self.network = timm.create_model(network, pretrained=False, num_classes=0)
        self.strides, self.stages = tuple(strides), stages_of(self.network, strides)
        widths = [feature_info(self.network)[stage]["num_chs"] for stage in self.stages]
        self.network.prune_intermediate_layers(self.stages, prune_norm=True, prune_head=True)
        _pad_alike(self.network)
        if folded:
            fold_batch_norms(self.network)
        self.standardise = nn.ModuleList([nn.BatchNorm2d(width, affine=False, momentum=None) for width in widths])
        self.project = nn.Linear(sum(widths), embed_dim)
        self.patch_size, self.grid_size = (patch_size, patch_size), (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.eval()

    def train(self, mode: bool = True) -> ConvStem:
        """Stays in evaluation mode: its statistics are fixed, whatever the ViT does."""
        return super().train(False)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Sets mean and variance of every level to those over batches (B, 3, H, W) of normalised pictures."""
        for norm in self.standardise:
            norm.reset_running_stats()
            norm.training = True
        for pixels in batches:
            self(pixels)
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, width)."""
        grid = (pixels.shape[2] // self.patch_size[0], pixels.shape[3] // self.patch_size[1])
        maps = self.network.forward_intermediates(
            pixels.contiguous(memory_format=torch.channels_last),
            indices=self.stages,
            norm=False,
            stop_early=True,
            intermediates_only=True,
        )
        levels = []
        for norm, values, stride in zip(self.standardise, maps, self.strides, strict=True):
            if stride < self.patch_size[0]:
                values = F.adaptive_avg_pool2d(values, grid)
            elif stride > self.patch_size[0]:
                values = F.interpolate(values, grid, mode="bilinear", align_corners=False)
            levels.append(norm(values))
        return self.project(torch.cat(levels, 1).permute(0, 2, 3, 1))


class HalvingConv(nn.Conv2d):
    """A convolution of stride 2 that pads as TensorFlow's "same" does for even sizes, whatever the size.

    TensorFlow's own padding shifts by a pixel between odd and even sizes. It also depends on the size in a way that
    torch.export cannot simplify: an export for free sizes took over ten minutes.
    """

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for extent in reversed(self.kernel_size):
            first = (extent - 2) // 2
            pads += [first, extent - 1 - first]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _pad_alike(network: nn.Module) -> None:
    """Puts a HalvingConv in the place of every convolution whose padding depends on the size."""
    from timm.layers import Conv2dSame

    for module in list(network.modules()):
        for name, conv in module.named_children():
            if isinstance(conv, Conv2dSame) and conv.stride == (2, 2) and conv.dilation == (1, 1):
                shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)
                alike = HalvingConv(*shape, groups=conv.groups, bias=conv.bias is not None)
                alike.weight, alike.bias = conv.weight, conv.bias
                setattr(module, name, alike)


def fold_batch_norms(network: nn.Module) -> None:
    """Makes every batch norm in evaluation mode a part of the convolution that stands before it in its module."""
    for module in list(network.modules()):
        children = list(module.named_children())
        for (_, conv), (name, norm) in pairwise(children):
            if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
                continue
            statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
            conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
            # timm's batch norms hold the activation that follows.
            rest = [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]
            setattr(module, name, nn.Sequential(*rest))


def feature_info(network: nn.Module) -> list[dict[str, Any]]:
    """timm's facts about the stages of a network: num_chs, reduction (stride), module."""
    info = network.feature_info
    return info.info if hasattr(info, "info") else info


def stages_of(network: nn.Module, strides: Iterable[int]) -> list[int]:
    """Numbers of the stages that have these strides; a stride that no stage has is a ValueError."""
    known = {stage["reduction"]: number for number, stage in enumerate(feature_info(network))}
    for stride in strides:
        if stride not in known:
            raise ValueError(f"expected strides of stages, {', '.join(map(str, known))}, got {stride}")
    return [known[stride] for stride in strides]


def build_vit(facts: dict[str, Any]) -> nn.Module:
    """The ViT that `facts` describe, with random weights.

    arch   arguments of timm's VisionTransformer, or of the timm model that "model" names
    model  optional, name of a timm ViT
    stem   optional, {"network": name, "strides": [...]}, see ConvStem
    """
    import timm

    arch = {"num_classes": 0, "dynamic_img_size": True, **facts["arch"]}
    if "stem" in facts:
        arch["embed_layer"] = partial(ConvStem, **facts["stem"])
    if "model" in facts:
        return timm.create_model(facts["model"], pretrained=False, **arch)
    return timm.models.vision_transformer.VisionTransformer(**{"global_pool": "", **arch})
