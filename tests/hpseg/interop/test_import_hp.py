"""Released checkpoints, in their exact layout: to a run and back without the loss of a bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from released import Net, checkpoint
from tiny import paint
from torch.nn import functional as F

import hpseg
from hpseg.cli.main import main
from hpseg.interop.released_checkpoints import CLUSTER, LINEAR, NET, export_hp, import_hp
from hpseg.run.config import Config
from hpseg.run.errors import UsageError


@pytest.mark.parametrize("width, dim, classes, depth", [(384, 512, 27, 2), (768, 256, 3, 1)])  # ViT-S, ViT-B (Potsdam)
def test_round_trip_is_bitwise(tmp_path, width, dim, classes, depth):
    _, content = checkpoint(tmp_path / "ckpt.pth", width, dim, classes, depth)
    assert main(["import-hp", str(tmp_path / "ckpt.pth"), "--out", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), "--format", "hp", "--out", str(tmp_path / "back.pth")]) == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    for entry in (NET, CLUSTER, LINEAR):
        assert back[entry].keys() == content[entry].keys()
        for name, tensor in content[entry].items():
            assert torch.equal(back[entry][name], tensor), name
    Net(width, dim, depth).load_state_dict(back[NET], strict=True)
    config = Config.load(tmp_path / "run" / "config.json")
    assert (config.preset, config.dim, config.classes) == ("potsdam" if classes == 3 else "cocostuff", dim, classes)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["iter"] == 700


def test_an_imported_run_predicts_as_published_and_moves(tmp_path):
    net, content = checkpoint(tmp_path / "ckpt.pth", depth=1)
    import_hp(tmp_path / "ckpt.pth", tmp_path / "run", preset="cityscapes")
    (tmp_path / "run").rename(tmp_path / "moved")
    segmenter = hpseg.load(tmp_path / "moved", device="cpu")
    images = torch.rand(1, 3, 224, 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    codes = net((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    torch.testing.assert_close(segmenter(images), codes, rtol=1e-4, atol=1e-4)
    cosines = torch.einsum("bdhw,kd->bkhw", F.normalize(codes, dim=1), F.normalize(content[CLUSTER]["clusters"], dim=1))
    assert (segmenter.similarities(segmenter(images)).argmax(1) == cosines.argmax(1)).float().mean() > 0.99
    assert segmenter.predict(paint(60, 40, 0), size=64).shape == (40, 60)


def test_an_imported_run_is_scored_and_probed(tmp_path):
    _, content = checkpoint(tmp_path / "ckpt.pth", dim=16, classes=3)
    import_hp(tmp_path / "ckpt.pth", tmp_path / "run")
    for part in ("images", "labels"):
        (tmp_path / "data" / part).mkdir(parents=True)
    for i in range(2):
        paint(60, 40, i).save(tmp_path / "data" / "images" / f"{i}.png")
        labels = Image.fromarray(np.arange(60, dtype=np.uint8)[None].repeat(40, 0) // 20)
        labels.save(tmp_path / "data" / "labels" / f"{i}.png")
    data = str(tmp_path / "data")
    assert main(["eval", str(tmp_path / "run"), data, "--linear", "--device", "cpu"]) == 0
    scores = json.loads((tmp_path / "run" / "eval.json").read_text())["linear"]
    assert scores["cluster_of"] == [0, 1, 2]  # classes, not clusters to be matched
    segmenter, hits = hpseg.load(tmp_path / "run", device="cpu"), 0
    for image in sorted((tmp_path / "data" / "images").iterdir()):
        logits = F.conv2d(segmenter(segmenter.prepare(image)[0]), **content[LINEAR])
        logits = F.interpolate(logits, (40, 60), mode="bilinear", align_corners=False)
        hits += int((logits[0].argmax(0) == torch.arange(60) // 20).sum())
    assert scores["accuracy"] == pytest.approx(100 * hits / 4800, abs=0.1)
    assert main(["probe", str(tmp_path / "run"), data, "--score-on", data, "--steps", "1", "--device", "cpu"]) == 0


def test_a_backbone_of_ones_own_must_be_the_same(tmp_path):
    net, _ = checkpoint(tmp_path / "ckpt.pth", width=384, depth=12, dim=8)
    torch.save(net.model.state_dict(), tmp_path / "vit.pth")
    name = "vit_small_patch8_224"
    facts = import_hp(tmp_path / "ckpt.pth", tmp_path / "run", backbone=name, weights=tmp_path / "vit.pth")
    assert facts["patch"] == 8 and not (tmp_path / "run" / "backbone.safetensors").exists()
    assert hpseg.load(tmp_path / "run", device="cpu").backbone.name == name
    state = net.model.state_dict()
    state["blocks.3.attn.qkv.bias"] = state["blocks.3.attn.qkv.bias"] + 1e-6
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"holds other weights than the ViT in .*blocks.3.attn.qkv.bias differs"):
        import_hp(tmp_path / "ckpt.pth", tmp_path / "other", backbone=name, weights=tmp_path / "other.pth")
    assert not (tmp_path / "other").exists()


def test_what_is_no_such_checkpoint_is_named(tmp_path, run):
    path, out = tmp_path / "ckpt.pth", tmp_path / "run"
    _, good = checkpoint(path, dim=8, classes=3)

    def refused(text, change, **options):
        content = {name: dict(value) if isinstance(value, dict) else value for name, value in good.items()}
        change(content)
        torch.save(content, path)
        with pytest.raises(UsageError, match=text):
            import_hp(path, out, **options)
        assert not out.exists()

    refused("expected net_model_state_dict, found epoch, ", lambda c: c.pop(NET))
    refused("lacks ema_model1.0.bias; besides model.* it has nothing else", lambda c: c[NET].pop("ema_model1.0.bias"))
    refused("lacks nothing; .* it has cluster3.0.bias", lambda c: c[NET].update({"cluster3.0.bias": torch.ones(1)}))
    shape = r"cluster2.0.weight: expected shape \(384, 384, 1, 1\), found \(8, 384, 1, 1\)"
    refused(shape, lambda c: c[NET].update({"cluster2.0.weight": torch.ones(8, 384, 1, 1)}))
    shape = r"clusters: expected shape \(3, 8\), found \(3, 9\)"
    refused(shape, lambda c: c[CLUSTER].update(clusters=torch.ones(3, 9)))
    lost = torch.full((3, 8), float("nan"))
    refused("clusters: expected finite numbers, found NaN", lambda c: c[CLUSTER].update(clusters=lost))
    refused("expected clusters, found weight", lambda c: c.update({CLUSTER: {"weight": torch.ones(1)}}))
    refused("expected weight and bias, found weight", lambda c: c[LINEAR].pop("bias"))

    def without_vit(content):
        content[NET] = {name: tensor for name, tensor in content[NET].items() if not name.startswith("model.")}

    refused("holds no tensors model.*; name the ViT", without_vit)
    refused("has 192 channels, the head in .* 384", without_vit, backbone="embedded")
    refused("does not fit VisionTransformer", lambda c: c[NET].pop("model.blocks.0.norm1.bias"))
    refused("expected the name of a backbone with it", lambda c: None, weights="x.pth")
    path.write_bytes(b"PK nothing")
    with pytest.raises(UsageError, match="is not a torch file of plain tensors"):
        import_hp(path, out)
    with pytest.raises(UsageError, match="file: no file"):
        import_hp(tmp_path / "none.pth", out)
    checkpoint(path, dim=8, classes=3)
    out.mkdir()
    (out / "mine.txt").touch()
    with pytest.raises(UsageError, match="is not empty"):
        import_hp(path, out)


def test_a_run_that_was_not_probed_exports_without_a_probe(run, tmp_path, capsys):
    assert export_hp(run, tmp_path / "a.pth")["linear"] is False
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    assert LINEAR not in content and content[NET]["cluster2.2.weight"].shape == (16, 32, 1, 1)
    momentum, head = content[NET]["ema_model2.0.weight"], content[NET]["cluster2.0.weight"]
    assert momentum.shape == head.shape and not torch.equal(momentum, head)
    with pytest.raises(UsageError, match="a.pth is already there"):
        export_hp(run, tmp_path / "a.pth")
    assert main(["export", str(run), "--out", str(tmp_path / "b.pth"), "--format", "hp", "--input", "uint8"]) == 2
    assert "input: goes with --format pt2" in capsys.readouterr().err
