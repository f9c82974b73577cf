"""Checkpoints in the exact layout of the released ones of Hidden Positives."""

from __future__ import annotations

import torch
from torch import nn

from hpseg.interop.released_checkpoints import CLUSTER, LINEAR, NET


def make_vit(width, depth=1):
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=224, patch_size=8, embed_dim=width, depth=depth, num_heads=width // 64, num_classes=0, global_pool=""
    )


class Net(nn.Module):
    """The modules of the published network, by their names there."""

    def __init__(self, width, dim, depth):
        super().__init__()

        def straight():
            return nn.Sequential(nn.Conv2d(width, dim, 1))

        def bent():
            return nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, dim, 1))

        self.model = make_vit(width, depth)
        self.cluster1, self.cluster2 = straight(), bent()
        self.ema_model1, self.ema_model2 = straight(), bent()

    def forward(self, x):
        grid = (x.shape[2] // 8, x.shape[3] // 8)
        features = self.model.forward_features(x)[:, 1:].transpose(1, 2).unflatten(2, grid)
        return self.cluster1(features) + self.cluster2(features)


def checkpoint(path, width=384, dim=512, classes=27, depth=1, linear=True):
    torch.manual_seed(width)
    net = Net(width, dim, depth).eval()
    content = {"epoch": 2, "iter": 700, "best_epoch": 2, "best_iter": 700, NET: net.state_dict()}
    content |= {"net_optimizer_state_dict": None, CLUSTER: {"clusters": torch.randn(classes, dim)}, "best": 123.4}
    content |= {LINEAR: nn.Conv2d(dim, classes, 1).state_dict()} if linear else {}
    torch.save(content, path)
    return net, content
