"""--finetune: gradients into the backbone, its weights in the run folder, and what reads them there."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from runs import assert_same, state_of, train_until
from safetensors.torch import load_file, save_file
from tiny import DGCL, DGCL_SETTINGS, make_vit

import hpseg
from hpseg.cli.main import main
from hpseg.evaluation.evaluate import evaluate
from hpseg.methods.dgcl.method import Dgcl
from hpseg.models.backbone import Backbone, load_backbone
from hpseg.models.finetune import parameter_groups, predicting, trainable
from hpseg.run.config import make_config
from hpseg.run.errors import UsageError

TUNED = {**DGCL, "finetune": True, "backbone_lr": 0.05}


@pytest.fixture(scope="module")
def tuned(data, vit_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "run"
    hpseg.train(data, out, weights=vit_file, steps=12, save_every=6, **TUNED)
    return out


def config(**changes):
    return make_config(**{**DGCL_SETTINGS, "finetune": True, **changes})


def test_a_trainable_copy_has_gradients_of_every_weight(vit_file):
    frozen = load_backbone(weights=vit_file)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert not frozen(images, with_neighbors=True).features.requires_grad
    gradients = []
    for checkpointing in (False, True):
        trained = trainable(frozen, config(grad_checkpointing=checkpointing))
        features = trained(images).features
        torch.testing.assert_close(features.detach(), frozen(images).features, rtol=0, atol=0)
        features.square().sum().backward()
        gradients.append({name: p.grad for name, p in trained.named_parameters()})
        assert not trained.vit.training and not any(p.requires_grad for p in frozen.parameters())
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    assert_same(*gradients)


def test_rates_fall_by_layer(vit_file):
    trained = trainable(load_backbone(weights=vit_file), config())
    groups = parameter_groups(trained, config(backbone_lr=0.8, layer_decay=0.5, weight_decay=0.1))
    names = {id(p): name for name, p in trained.vit.named_parameters()}
    rates = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert rates.keys() == set(names.values())
    assert rates["norm.weight"] == (0.8, 0)
    assert rates["blocks.1.mlp.fc1.weight"] == (0.8, 0.1) and rates["blocks.0.attn.qkv.bias"] == (0.4, 0)
    assert rates["patch_embed.proj.weight"] == (0.2, 0.1)


def test_the_backbone_learns_and_the_teacher_follows(tuned, vit_file):
    state, model, start = state_of(tuned)["method"], load_file(tuned / "model.safetensors"), load_file(vit_file)
    for name, first in start.items():
        student, teacher = (state[f"{part}backbone.vit.{name}"] for part in ("student.", ""))
        assert torch.equal(model[f"backbone.vit.{name}"], teacher)
        assert not torch.equal(student, first) and not torch.equal(teacher, first), name
        assert not torch.equal(student, teacher), name
    assert (
        hpseg.load(tuned).backbone.fingerprint
        == Backbone(_loaded(model), "", (0.5,) * 3, (0.25,) * 3).fingerprint
        != load_backbone(weights=vit_file).fingerprint
    )


def _loaded(model):
    vit = make_vit(1)
    vit.load_state_dict({name.removeprefix("backbone.vit."): x for name, x in model.items() if name[:9] == "backbone."})
    return vit


def test_prediction_is_of_the_trained_backbone(tuned, data, tmp_path):
    segmenter, model = hpseg.load(tuned), load_file(tuned / "model.safetensors")
    images = torch.randint(256, (1, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    features = Backbone(_loaded(model), "", (0.5,) * 3, (0.25,) * 3)(images).features
    expected = features @ model["head.linear.weight"].T + model["head.linear.bias"]
    hidden = (features @ model["head.hidden.weight"].T + model["head.hidden.bias"]).relu()
    expected += hidden @ model["head.out.weight"].T + model["head.out.bias"]
    found = segmenter(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert evaluate(tuned, data, device="cpu")["trained"]["miou"] > 0
    assert main(["predict", str(tuned), str(data / "images"), "--out", str(tmp_path / "maps")]) == 0
    assert main(["show", str(tuned), str(data / "images"), "--n", "2", "--out", str(tmp_path / "sheet.png")]) == 0
    assert main(["export", str(tuned), "--out", str(tmp_path / "run.pt2"), "--size", "32", "32"]) == 0
    program = torch.export.load(tmp_path / "run.pt2").module()
    pixels = images[..., :32].float() / 255
    torch.testing.assert_close(program(pixels), segmenter.similarities(segmenter(pixels)), rtol=1e-4, atol=1e-4)


def test_other_weights_in_the_run_are_an_error(tuned, vit_file, tmp_path):
    from safetensors import safe_open

    run = shutil.copytree(tuned, tmp_path / "run")
    with safe_open(run / "model.safetensors", "pt") as file:
        facts = file.metadata()
    model = load_file(run / "model.safetensors")
    save_file(model | {"backbone.vit.norm.bias": torch.ones(32)}, run / "model.safetensors", facts)
    with pytest.raises(UsageError, match="was trained on"):
        hpseg.load(run)
    del model["backbone.vit.norm.bias"]
    save_file(model, run / "model.safetensors", facts)
    with pytest.raises(UsageError, match="^backbone: .* is not what the run trained"):
        hpseg.load(run)


def test_a_timm_name_needs_no_weights_to_predict(tuned, vit_file, monkeypatch):
    """Those of the run are all that is read: neither the network nor the cache is asked."""
    asked = []
    monkeypatch.setattr("hpseg.models.backbone.require_reachable", asked.append)
    started = load_backbone("vit_tiny_patch16_224", pretrained=False)
    trained = trainable(started, config())
    with torch.no_grad():
        trained.vit.norm.bias += 1
    tensors = {f"backbone.{name}": x for name, x in trained.state_dict().items()}
    found = predicting(load_backbone("vit_tiny_patch16_224", pretrained=False), tensors, config())
    assert not asked and found.fingerprint not in ("", started.fingerprint)
    assert torch.equal(found.vit.norm.bias, trained.vit.norm.bias.detach()) and not found.vit.norm.bias.requires_grad


def test_resumes_bitwise(tuned, data, vit_file, tmp_path):
    settings = dict(weights=vit_file, steps=12, save_every=6, **TUNED)
    train_until(8, Dgcl, data, tmp_path / "cut", **settings)
    assert state_of(tmp_path / "cut")["step"] == 6
    # Checkpointing changes memory and time only, and may be asked for on the way.
    hpseg.train(data, tmp_path / "cut", resume=True, grad_checkpointing=True, **settings)
    assert_same(state_of(tuned), state_of(tmp_path / "cut"))
    assert_same(*(load_file(run / "model.safetensors") for run in (tuned, tmp_path / "cut")))


def test_bf16_trains_in_fp32_weights(data, vit_file, tmp_path):
    hpseg.train(data, tmp_path / "run", weights=vit_file, steps=3, dtype="bf16", **TUNED)
    model = load_file(tmp_path / "run" / "model.safetensors")
    assert all(x.dtype == torch.float32 for name, x in model.items() if name.startswith("backbone."))
    labels = hpseg.load(tmp_path / "run").predict(np.zeros((48, 48, 3), np.uint8))
    assert labels.shape == (48, 48)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(method="hp", labeled=None), "finetune: expected with method dgcl"),
        (dict(cache_features=True), "cache_features: a backbone that is trained gives other features after every step"),
        (dict(finetune=False, grad_checkpointing=True), "grad_checkpointing: .*--finetune"),
        (dict(layer_decay=1.5), "layer_decay: "),
        (dict(backbone_lr=-1.0), "backbone_lr: "),
    ],
)
def test_errors_name_the_setting(change, said):
    with pytest.raises(UsageError, match=f"^{said}"):
        config(**change)
