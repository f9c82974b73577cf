"""A random tiny ViT, painted pictures, settings that finish in seconds, and processes to do harm to."""

import os

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


def make_vit(seed=0):
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTransformer(num_classes=0, global_pool="", dynamic_img_size=True, **ARCH)


def paint(width, height, seed):
    """Smooth random colours: a picture with regions."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def in_child(work):
    """Runs work() in a forked process that says nothing and ends with it, with status 0 or what SystemExit it raises;
    returns its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        work()
        status = 0
    except SystemExit as error:
        status = error.code
    finally:
        os._exit(status)
