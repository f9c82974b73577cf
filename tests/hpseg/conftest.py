"""A random tiny ViT in a file and a handful of painted photographs: enough to run everything in seconds."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

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


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def vit_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vit") / "tiny.safetensors"
    save_file(make_vit().state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps({"arch": ARCH, "mean": [0.5] * 3, "std": [0.25] * 3}))
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Five pictures of different sizes and formats, one of them in a sub-folder."""
    root = tmp_path_factory.mktemp("photos")
    (root / "more").mkdir()
    for i, name in enumerate(("a.jpg", "b.png", "c.JPG", "more/d.webp", "e.bmp")):
        paint(50 + 10 * i, 40 + 7 * i, i).save(root / name)
    return root


@pytest.fixture(scope="session")
def run(tmp_path_factory, photos, vit_file):
    """A finished run of 20 steps on the five pictures."""
    import hpseg

    out = tmp_path_factory.mktemp("runs") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    hpseg.train(photos, out, weights=vit_file, steps=20, **SMALL)
    torch.set_num_threads(threads)
    return out
