"""A frozen network that is only read: a plain ViT as in hpseg.models.backbone, or a convolutional network."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from hpseg.assets import EMBEDDED
from hpseg.models.backbone import Backbone, Tokens, fingerprint, load_backbone
from hpseg.models.products import LinearByConvolution
from hpseg.models.weights import load_network, require_reachable, timm_source
from hpseg.run.errors import UsageError

PLAIN_VITS = ("vision_transformer", "eva", "deit", "beit")  # modules of timm


class ConvExtractor(nn.Module):
    """The last feature map of a network of timm, with the attributes of a Backbone; `patch` is its stride in pixels."""

    def __init__(self, network: nn.Module, name: str, source: str):
        super().__init__()
        import timm

        self.network = network.eval().requires_grad_(False)
        self.name, self.source, self.fingerprint = name, source, fingerprint(network)
        self.network.to(memory_format=torch.channels_last)  # takes three quarters of the time on a CPU
        last = network.feature_info[-1]
        self.patch, self.channels = last["reduction"], last["num_chs"]
        data = timm.data.resolve_model_data_config(network)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(data[key]).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> ConvExtractor:
        """Stays in evaluation mode whatever is asked for: it is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tokens:
        """images: (B, 3, H, W) uint8; H and W multiples of `patch`."""
        x = (images.float() / 255 - self.mean) / self.std
        with LinearByConvolution():
            last = self.network.forward_intermediates(
                x, indices=1, norm=False, output_fmt="NCHW", intermediates_only=True
            )
        return Tokens(last[0].flatten(2).transpose(1, 2).float(), None, tuple(last[0].shape[2:]))


def load_extractor(name: str, weights: str | None, stride: int, dtype: str, pos_embed: str) -> Backbone | ConvExtractor:
    """The network `name` of timm, or one of `hpseg.assets.EMBEDDED`, with the weights of a local file if one is given.

    stride: output stride of a convolutional network that can dilate its last stages, 0 for the network's own. dtype,
    pos_embed: of a ViT, see load_backbone.
    """
    import timm

    base = name.split(".")[0]
    if name in EMBEDDED or not timm.models.is_model(base) or timm.models.is_model_in_modules(base, PLAIN_VITS):
        if stride:
            raise UsageError(f"extractor_stride: expected 0 with {name!r}, whose stride is its patch, got {stride}")
        return load_backbone(name, weights, dtype=dtype, pos_embed=pos_embed)
    if weights is None:
        require_reachable(name)
    options = {"output_stride": stride} if stride else {}
    with torch.random.fork_rng(devices=[]):
        try:
            network = timm.create_model(name, pretrained=weights is None, num_classes=0, **options)
        except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
            made = f"{name!r} with {options}" if options else repr(name)
            raise UsageError(f"extractor: timm cannot make {made} ({error})") from None
    if weights is not None:
        load_network(network, Path(weights), "extractor_weights")
    source = Path(weights).name if weights is not None else timm_source(network)
    try:
        extractor = ConvExtractor(network, name, source)
        side = 2 * extractor.patch
        grid = extractor(torch.zeros(1, 3, side, 2 * side, dtype=torch.uint8)).grid
    except (AttributeError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"extractor: {name!r} makes no feature maps of pictures of any size ({type(error).__name__}: {error}); "
            "expected a plain ViT or a convolutional network of timm"
        ) from None
    if grid != (2, 4):
        raise UsageError(f"extractor: {name!r} makes {grid} features of {side} x {2 * side} pixels, expected (2, 4)")
    return extractor
