"""The exported program agrees with the run, at sizes it was not traced with, and needs nothing but torch."""

import json
import subprocess
import sys

import pytest
import torch
from tiny import paint

import hpseg
from hpseg.cli.main import main
from hpseg.data.transforms import to_tensor
from hpseg.interop import torch_export as exporting
from hpseg.run.errors import UsageError


@pytest.fixture(scope="module")
def program(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "deep" / "model.pt2"
    assert main(["export", str(run), "--out", str(path)]) == 0
    return path


def test_similarities_at_free_sizes(run, program):
    segmenter, facts = hpseg.load(run, device="cpu"), {exporting.FACTS: ""}
    model = torch.export.load(program, extra_files=facts).module()
    for height, width in ((16, 16), (32, 32), (48, 200), (136, 24)):  # 32 x 32 is the position embedding's own grid
        images = torch.rand(1, 3, height, width)
        expected = segmenter.similarities(segmenter(images))
        assert expected.shape == (1, 3, height // 8, width // 8)
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    facts = json.loads(facts[exporting.FACTS])
    assert facts["patch"] == 8 and facts["classes"] == 3 and facts["names"] == ["cluster 0", "cluster 1", "cluster 2"]
    assert facts["input"] == {"shape": [1, 3, "H", "W"], "dtype": "float", "range": [0, 1]}
    assert len(facts["palette"]) == 768 and facts["predict_size"] == 48


def test_labels_of_a_photograph(run, tmp_path):
    exporting.export(run, tmp_path / "m.pt2", input="uint8", output="labels")
    picture = paint(64, 48, 7)
    labels = torch.export.load(tmp_path / "m.pt2").module()(to_tensor(picture)[None])
    assert labels.dtype == torch.uint8 and labels.shape == (1, 48, 64)
    assert (labels[0].numpy() != hpseg.load(run, device="cpu").predict(picture)).mean() < 1e-3


def test_the_program_needs_torch_only(program):
    code = (
        "import sys, torch\n"
        f"out = torch.export.load({str(program)!r}).module()(torch.zeros(1, 3, 16, 24))\n"
        "assert out.shape == (1, 3, 2, 3)\n"
        "print([m for m in ('hpseg', 'hpkernels', 'timm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_fixed_size_and_mistakes(run, tmp_path):
    facts = exporting.export(run, tmp_path / "m.pt2", size=(48, 64))
    assert facts["input"]["shape"] == [1, 3, 48, 64]
    model = torch.export.load(tmp_path / "m.pt2").module()
    assert model(torch.rand(1, 3, 48, 64)).shape == (1, 3, 6, 8)
    for name, options, text in (
        ("m.pt2", {}, "m.pt2 is already there; pass --overwrite"),
        ("m.pt", {}, "out: expected a name that ends in .pt2, got"),
        ("n.pt2", {"size": (50, 64)}, r"size: expected .* in multiples of 8, at least 16, got \(50, 64\)"),
        ("n.pt2", {"output": "codes"}, "output: expected one of similarities, labels, got 'codes'"),
        ("n.pt2", {"input": "half"}, "input: expected one of float, uint8, got 'half'"),
    ):
        with pytest.raises(UsageError, match=text):
            exporting.export(run, tmp_path / name, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]


def test_a_program_that_disagrees_is_not_kept(run, tmp_path, monkeypatch):
    forward, traced = exporting.Deployed.forward, []
    monkeypatch.setattr(exporting.Deployed, "forward", lambda self, images: forward(self, images) + len(traced) * 1e-3)
    trace = exporting._trace
    monkeypatch.setattr(exporting, "_trace", lambda *given: traced.append(trace(*given)) or traced[0])
    with pytest.raises(RuntimeError, match="is off by .* of the largest similarity; nothing was written"):
        exporting.export(run, tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, free", [("vit_small_patch14_reg4_dinov2", True), ("vit_small_patch16_dinov3", False)])
def test_other_families(name, free):
    """Register tokens export at free sizes, rotary position embeddings at a fixed one, and say so."""
    import timm

    from hpseg.inference.segmenter import Segmenter
    from hpseg.models.backbone import Backbone
    from hpseg.models.heads import ClusterProbe, SegmentationHead
    from hpseg.run.config import Config

    torch.manual_seed(0)
    small = {"depth": 1, "embed_dim": 48, "num_heads": 2, "num_classes": 0, "dynamic_img_size": True}
    backbone = Backbone(timm.create_model(name, pretrained=False, **small), name, (0.5,) * 3, (0.5,) * 3)
    segmenter = Segmenter(backbone, SegmentationHead(48, 8), ClusterProbe(8, 4), Config(classes=4))
    model, patch = exporting.Deployed(segmenter, "similarities").eval(), backbone.patch
    images, others = torch.rand(1, 3, 5 * patch, 7 * patch), torch.rand(1, 3, 9 * patch, 4 * patch)
    program = exporting._trace(model, images, patch, None)
    if free:
        exporting._require_agreement(exporting._answer(program, others), model(others))
    else:
        with pytest.raises(UsageError, match="exports for one size only .*; pass --size HEIGHT WIDTH"):
            exporting._answer(program, others)
        fixed = exporting._trace(model, images, patch, (5 * patch, 7 * patch))
        exporting._require_agreement(exporting._answer(fixed, images), model(images))
