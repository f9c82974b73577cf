"""ViTs on stages of a convolutional network, and those that ship."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import SMALL

import hpseg
from hpseg.assets import EMBEDDED
from hpseg.models.architecture import ConvStem, HalvingConv, build_vit, fold_batch_norms, stages_of
from hpseg.models.backbone import load_backbone
from hpseg.models.finetune import parameter_groups, trainable
from hpseg.run.config import make_config
from hpseg.run.errors import UsageError

STEM = {"network": "test_efficientnet", "strides": [4, 8, 16]}
ARCH = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
FACTS = {"arch": ARCH, "stem": STEM, "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture(scope="module")
def hybrid_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("hybrid") / "hybrid.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(build_vit(FACTS).state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps(FACTS))
    return path


def random_stem(**options):
    torch.manual_seed(0)
    stem = ConvStem(**STEM, img_size=32, patch_size=8, embed_dim=24, **options)
    for module in stem.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                torch.nn.init.uniform_(module.weight, 0.5, 2)
                torch.nn.init.normal_(module.bias)
    return stem


def batch_norms(stem):
    return sum(isinstance(module, torch.nn.BatchNorm2d) for module in stem.network.modules())


@pytest.mark.parametrize("network", ["test_efficientnet", "test_resnet", "tf_efficientnet_lite0"])
def test_folded_batch_norms_change_nothing(network, monkeypatch):
    monkeypatch.setitem(STEM, "network", network)
    stem, pixels = random_stem(folded=False), torch.rand(2, 3, 64, 96)
    before, norms = stem(pixels).detach(), batch_norms(stem)
    fold_batch_norms(stem.network)
    assert batch_norms(stem) < norms / 3  # a deep stem of a ResNet is followed by one, which stays
    torch.testing.assert_close(stem(pixels), before, atol=1e-4 * float(before.abs().max()), rtol=0)
    names = random_stem().network.state_dict().keys()
    assert names == stem.network.state_dict().keys()  # what is built folded takes what was folded later


@pytest.mark.parametrize("size", [(16, 16), (32, 40), (24, 56)])
def test_stages_come_to_the_grid(size):
    stem, pixels = random_stem(), torch.rand(1, 3, *size)
    assert stem(pixels).shape == (1, size[0] // 8, size[1] // 8, 24)
    maps = stem.network.forward_intermediates(pixels, indices=[1, 2, 3], norm=False, intermediates_only=True)
    fine, same, coarse = (norm(x) for norm, x in zip(stem.standardise, maps))
    grid = tuple(same.shape[2:])
    levels = [F.avg_pool2d(fine, 2), same, F.interpolate(coarse, grid, mode="bilinear", align_corners=False)]
    torch.testing.assert_close(stem(pixels), stem.project(torch.cat(levels, 1).movedim(1, 3)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", [3, 5])
def test_padding_is_tensorflows_for_even_sizes_and_the_same_for_odd_ones(kernel):
    from timm.layers import Conv2dSame

    same, halving = Conv2dSame(3, 4, kernel, 2), HalvingConv(3, 4, kernel, 2)
    halving.load_state_dict(same.state_dict())
    x = torch.rand(1, 3, 12, 18)
    torch.testing.assert_close(halving(x), same(x))
    odd = halving(x[:, :, :11, :17])
    assert odd.shape == halving(x).shape
    torch.testing.assert_close(odd[:, :, :-2, :-2], halving(x)[:, :, :-2, :-2])


def test_calibration_standardises_the_levels():
    stem, batches = random_stem(), [torch.rand(4, 3, 32, 32) for _ in range(3)]
    stem.calibrate(batches)
    assert not any(module.training for module in stem.modules())
    maps = stem.network.forward_intermediates(torch.cat(batches), indices=[2], norm=False, intermediates_only=True)
    level = stem.standardise[1](maps[0])
    torch.testing.assert_close(level.mean((0, 2, 3)), torch.zeros(level.shape[1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(level.var((0, 2, 3)), torch.ones(level.shape[1]), atol=0.05, rtol=0)


def test_a_stride_that_no_stage_has():
    with pytest.raises(ValueError, match="expected strides of stages, 2, 4, 8, 16, 32, got 3"):
        stages_of(random_stem().network, [3])


@pytest.mark.parametrize(
    "change",
    [
        {"stem": 3},
        {"stem": {"network": "nothing", "strides": [8]}},
        {"stem": {**STEM, "strides": [7]}},
        {"model": "no"},
    ],
)
def test_descriptions_that_build_nothing(change, hybrid_file, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(hybrid_file.read_bytes())
    path.with_suffix(".json").write_text(json.dumps({**FACTS, **change}))
    with pytest.raises(UsageError, match="weights: .*w.json describes no ViT of timm"):
        load_backbone(weights=path)


def test_a_hybrid_trains_exports_and_tunes(hybrid_file, photos, tmp_path):
    hpseg.train(photos, tmp_path / "run", weights=hybrid_file, steps=2, **SMALL)
    segmenter = hpseg.load(tmp_path / "run", device="cpu")
    facts = hpseg.export(tmp_path / "run", tmp_path / "m.pt2")
    model = torch.export.load(tmp_path / "m.pt2").module()
    for size in ((24, 40), (64, 48)):
        images = torch.rand(1, 3, *size)
        expected = segmenter.similarities(segmenter(images))
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert facts["patch"] == 8

    config = make_config(method="dgcl", images="x", labeled="1/4", finetune=True, backbone_lr=0.8, layer_decay=0.5)
    trained = trainable(segmenter.backbone, config)
    trained(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).features.sum().backward()
    names = {id(p): name for name, p in trained.vit.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in parameter_groups(trained, config) for p in g["params"]}
    assert rates.keys() == set(names.values())
    assert {rate for name, rate in rates.items() if name.startswith("patch_embed.")} == {min(rates.values())}


def test_the_two_that_ship():
    tokens = {}
    for name, file in EMBEDDED.items():
        backbone = load_backbone(name)
        assert backbone.name == name and backbone.source == file.name and backbone.patch == 8
        assert backbone.channels == 192 and file.stat().st_size < 8e6
        tokens[name] = backbone(torch.randint(256, (1, 3, 32, 48), dtype=torch.uint8)).features
        facts = json.loads(file.with_suffix(".json").read_text())
        assert not {"/", "\\"} & set(str(facts["options"].get("teacher_weights", "")))
    facts = json.loads(EMBEDDED["embedded"].with_suffix(".json").read_text())
    assert "labels" in facts["note"] and load_backbone("embedded").facts()["note"] == facts["note"]
    assert "note" not in load_backbone("embedded-selfsup").facts()
    assert facts["teacher"]["licence"] == "apache-2.0" and len(facts["photographs"]) == 546
    assert all({"source", "licence"} <= photograph.keys() for photograph in facts["photographs"])
    assert "msrc" not in str(facts["photographs"]).lower()
    assert make_config(method="fs4").backbone == "embedded-selfsup" and make_config().backbone == "embedded"


def test_a_run_from_when_embedded_was_the_other_one(photos, tmp_path):
    """It predicts with the ViT it was trained on, which is found by its fingerprint."""
    settings = {**SMALL, "size": 32, "predict_size": 32}
    hpseg.train(photos, tmp_path / "run", backbone="embedded-selfsup", steps=1, **settings)
    file = tmp_path / "run" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "backbone": "embedded"}))
    assert hpseg.load(tmp_path / "run", device="cpu").backbone.name == "embedded-selfsup"
    hpseg.train(photos, tmp_path / "new", steps=1, **settings)
    assert hpseg.load(tmp_path / "new", device="cpu").backbone.name == "embedded"
    file.write_bytes((tmp_path / "new" / "config.json").read_bytes().replace(b'"embedded"', b'"embedded-selfsup"'))
    (tmp_path / "run" / "model.safetensors").write_bytes((tmp_path / "new" / "model.safetensors").read_bytes())
    with pytest.raises(UsageError, match="run: .* was trained on 'embedded-selfsup' with weights"):
        hpseg.load(tmp_path / "run", device="cpu")
