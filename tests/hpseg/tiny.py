"""A random tiny ViT, painted pictures, settings that finish in seconds."""

import numpy as np
import torch
from PIL import Image

ARCH = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL = dict(
    classes=3,
    batch_size=2,
    size=32,
    predict_size=48,
    dim=16,
    pool_size=32,
    lambda_warmup=2,
    workers=0,
    device="cpu",
    cache_features=False,
    consistency_weight=0.05,
    clusters="probe",
    quiet=True,
)
DGCL = dict(
    method="dgcl", labeled="1/4", classes=3, batch_size=4, size=32, predict_size=48, dim=16, bank_rows=60,
    bank_inserts=20, anchors=10, positives=8, contrast_negatives=32, supervised_share=0.1, lr=0.1, workers=0,
    device="cpu", quiet=True,
)  # fmt: skip
DGCL_SETTINGS = {name: value for name, value in DGCL.items() if name != "quiet"} | {"images": "x"}


def make_vit(seed=0):
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTransformer(num_classes=0, global_pool="", dynamic_img_size=True, **ARCH)


def paint(width, height, seed):
    """Smooth random colours: a picture with regions."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)
