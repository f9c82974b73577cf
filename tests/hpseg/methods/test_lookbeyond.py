"""Cross-image contrast with auxiliary labels: labels, sampling, loss, and training with and without true labels."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import DRIVER, TORCHRUN, finish, needs_gloo, spawn
from runs import TOLERANCE, assert_same, moments, state_of, train_until
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

import hpseg
from hpseg.data.few_labels import VOID
from hpseg.evaluation.evaluate import evaluate
from hpseg.methods.lookbeyond.auxiliary_labels import FILE, AuxiliaryLabels
from hpseg.methods.lookbeyond.method import Batch, LookBeyond, sample_balanced
from hpseg.models.backbone import Tokens, load_backbone
from hpseg.models.extractor import ConvExtractor, load_extractor
from hpseg.run.config import make_config
from hpseg.run.errors import UsageError
from hpseg.runtime.distributed import ALONE, Share

TINY = dict(
    method="lookbeyond", labeled="1/4", classes=3, batch_size=4, size=32, predict_size=48, dim=16, contrast_dim=12,
    auxiliary_clusters=6, contrast_pixels=60, contrast_cap=8, dropout=0.0, lr=1e-2, fine_tune_lr=1e-2, workers=0,
    device="cpu", quiet=True,
)  # fmt: skip
UNLABELLED = {**TINY, "labeled": None}
SETTINGS = {name: value for name, value in TINY.items() if name != "quiet"} | {"images": "x", "steps": 10}


def test_sampling_is_balanced_and_capped():
    random = torch.Generator().manual_seed(0)
    labels = torch.full((3, 100), -1)
    labels[0, :90], labels[1, :50], labels[1, 50:55], labels[2, :3] = 0, 0, 1, 2
    rows = sample_balanced(labels, 30, 20, random)
    assert len(rows.unique()) == 30 and (labels.flatten()[rows] >= 0).all()
    assert labels.flatten()[rows].bincount().tolist() == [22, 5, 3]  # all of the rare ones, the rest of the other
    everything = sample_balanced(labels, 1000, 20, random)
    assert labels.flatten()[everything].bincount().tolist() == [40, 5, 3]  # 20 in each of the two images
    assert (everything // 100).bincount().tolist() == [20, 25, 3]
    drawn = torch.zeros(300)
    for seed in range(300):  # any patch of a label and image, at one rate; of many labels any is cut off
        drawn[sample_balanced(labels, 1000, 20, torch.Generator().manual_seed(seed))] += 1
    assert (drawn[:90] > 30).all() and (drawn[:90] < 110).all()  # 300 * 20 / 90 = 67 expected
    many = torch.arange(40).view(2, 20)
    cut = torch.stack([sample_balanced(many, 10, 9, torch.Generator().manual_seed(seed)) for seed in range(200)])
    assert cut.flatten().bincount(minlength=40).min() > 20  # 50 expected
    assert len(sample_balanced(torch.full((2, 5), -1), 10, 9, random)) == 0


def expected_contrast(z, labels, images, temperature, form, across):
    """The loss pair by pair in fp64."""
    z = F.normalize(z.double(), dim=1)
    logits, losses = z @ z.T / temperature, []
    for i in range(len(z)):
        same = labels == labels[i]
        positive = same & (images != images[i]) if across else same & (torch.arange(len(z)) != i)
        negative = ~same
        if not positive.any() or not negative.any():
            continue
        if form == "supcon":
            losses.append(logits[i, positive | negative].logsumexp(0) - logits[i, positive].mean())
        else:
            losses.append(F.softplus(logits[i, negative].logsumexp(0) - logits[i, positive]).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("form", ("per_positive", "supcon"))
@pytest.mark.parametrize("across", (False, True))
def test_contrast_and_its_gradient_are_the_formula(form, across):
    config = make_config(**{**SETTINGS, "contrast_form": form, "cross_image_only": across, "contrast_pixels": 1000})
    torch.manual_seed(0)
    method = LookBeyond(8, config).double()
    codes = torch.randn(3, 10, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(-1, 3, (3, 10))
    share = Share(ALONE, 3, torch.Generator())
    found = method.contrast(codes, labels, 5, share)
    rows = (labels.flatten() >= 0).nonzero()[:, 0]
    z = method.projection(codes.flatten(0, 1)[rows])
    expected = expected_contrast(z, labels.flatten()[rows], rows // 10, 0.07, form, across)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    one, other = (torch.autograd.grad(loss, codes, retain_graph=True)[0] for loss in (found, expected))
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)
    assert torch.equal(one[labels < 0], torch.zeros_like(one[labels < 0]))


def test_losses_of_both_stages():
    method = LookBeyond(8, make_config(**SETTINGS))
    assert method.contrast_steps == 5
    random = torch.Generator().manual_seed(0)
    features, share = torch.randn(2, 16, 8, generator=random), Share(ALONE, 2, random)
    backbone = SimpleNamespace(backbone=lambda images: Tokens(features, None, (4, 4)))
    method.source = SimpleNamespace(encoder=backbone)
    labels = torch.randint(-2, 3, (2, 32, 32), generator=random)
    batch = Batch(torch.empty(0), labels)
    first, last = (method.losses(batch, None, step, 1, share) for step in (4, 5))
    assert first["contrast"] > 0 and first["supervised"] == 0 and last["contrast"] == 0
    centres = labels[:, 4::8, 4::8].flatten(1).clamp_min(VOID)
    torch.testing.assert_close(first["contrast"], method.contrast(method.head(features), centres, 1, share))
    logits = method.clusters(method.head(features)).transpose(1, 2).unflatten(2, (4, 4))
    logits = F.interpolate(logits, (32, 32), mode="bilinear").movedim(1, -1)[labels >= 0]
    torch.testing.assert_close(last["supervised"], F.cross_entropy(logits, labels[labels >= 0]))
    nothing = Batch(torch.empty(0), torch.full((2, 32, 32), -2))
    for step in (4, 5):
        loss = sum(method.losses(nothing, None, step, 1, share).values())
        loss.backward()
        assert loss == 0 and not any(p.grad is not None and p.grad.any() for p in method.parameters())


def test_rates_fall_in_both_stages():
    method = LookBeyond(8, make_config(**{**SETTINGS, "lr": 1.0, "fine_tune_lr": 0.1, "fine_tune_share": 0.6}))
    (optimizer,) = method.optimizers().values()
    found = []
    for step in (0, 2, 4, 7):
        method.renew(step, None)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([1, 0.5**0.9, 0.1, 0.1 * 0.5**0.9])


def test_auxiliary_labels_are_the_clusters_of_the_features(data, vit_file, tmp_path):
    """From whole photographs, with the right share of outliers; a damaged or foreign file is made anew."""
    settings = {**UNLABELLED, "weights": vit_file, "steps": 1, "outliers": 0.25, "outlier_scope": "global"}
    hpseg.train(data, tmp_path / "run", **settings)
    tensors = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["extra"]
    with safe_open(tmp_path / "run" / FILE, "pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found = AuxiliaryLabels.open(tmp_path / "run" / FILE, recipe)
    assert found.digest == tensors["auxiliary"] and len(found) == 12 and found[11].shape == (4, 4)
    labels = stored["labels"]
    assert (labels == -1).sum() == 12 * 16 // 4 and set(labels.tolist()) == {-1, *range(6)}
    backbone = hpseg.load(tmp_path / "run", device="cpu").backbone
    photograph = Image.open(sorted((data / "images").iterdir())[3]).resize((32, 32), Image.Resampling.BILINEAR)
    features = backbone(torch.from_numpy(np.array(photograph)).movedim(2, 0)[None]).features[0]
    similarity = F.normalize(features, dim=1) @ stored["centroids"].T
    expected = torch.where(2 - 2 * similarity.amax(1) > stored["thresholds"][0], -1, similarity.argmax(1))
    assert (torch.from_numpy(found[3]).flatten() == expected).float().mean() > 0.9  # all, up to rounding at thresholds
    assert AuxiliaryLabels.open(tmp_path / "run" / FILE, {**recipe, "seed": 9}) is None
    content = bytearray((tmp_path / "run" / FILE).read_bytes())
    content[-1] ^= 1
    (tmp_path / "bad").write_bytes(content)
    assert AuxiliaryLabels.open(tmp_path / "bad", recipe) is None
    (tmp_path / "bad").write_bytes(content[:100])
    assert AuxiliaryLabels.open(tmp_path / "bad", recipe) is None


def test_labels_are_learned_and_scored_without_matching(data, vit_file, tmp_path):
    hpseg.train(data, tmp_path / "run", weights=vit_file, steps=80, **TINY)
    log = [line.split(",") for line in (tmp_path / "run" / "log.csv").read_text().splitlines()]
    contrast, supervised = ([float(row[log[0].index(name)]) for row in log[1:]] for name in LookBeyond.TERMS)
    assert min(contrast[:40]) > 0 and max(contrast[40:]) == 0 == max(supervised[:40]) and min(supervised[40:]) > 0
    assert np.mean(contrast[30:40]) < np.mean(contrast[:10])
    results = evaluate(tmp_path / "run", data, device="cpu")
    assert results["trained"]["cluster_of"] == [0, 1, 2] and results["trained"]["accuracy"] > 60  # chance: 33
    scores = json.loads((tmp_path / "run" / "label_quality.json").read_text())
    assert scores["images"] == 3 and scores["positive_precision"] > 0.4 and scores["labels_used"] == 6


def test_without_labels_kmeans_makes_the_clusters(data, vit_file, tmp_path):
    hpseg.train(data / "images", tmp_path / "run", weights=vit_file, steps=20, **UNLABELLED)
    assert not (tmp_path / "run" / "label_quality.json").exists()
    assert hpseg.load(tmp_path / "run", device="cpu").config.labels_used is None
    results = evaluate(tmp_path / "run", data, device="cpu")
    assert sorted(results["trained"]["cluster_of"]) == [0, 1, 2] and results["trained"]["accuracy"] > 50


@pytest.mark.parametrize("stop", (3, 9, 20))
def test_resumes_bitwise(stop, data, vit_file, tmp_path, monkeypatch):
    """Stopped before the first checkpoint, in the first stage, in the second; labels are not made a second time."""
    settings = dict(weights=vit_file, steps=24, save_every=6, **TINY)
    hpseg.train(data, tmp_path / "straight", **settings)

    train_until(stop, LookBeyond, data, tmp_path / "cut", **settings)
    before = (tmp_path / "cut" / FILE).stat().st_mtime_ns
    hpseg.train(data, tmp_path / "cut", resume=True, **settings)
    assert (tmp_path / "cut" / FILE).stat().st_mtime_ns == before
    assert_same(state_of(tmp_path / "straight"), state_of(tmp_path / "cut"))


def test_labels_that_were_lost_are_made_again_or_refused(data, vit_file, tmp_path):
    settings = dict(weights=vit_file, save_every=2, **TINY)
    hpseg.train(data, tmp_path / "run", steps=4, **settings)
    (tmp_path / "run" / FILE).unlink()
    hpseg.train(data, tmp_path / "run", steps=4, resume=True, **settings)  # the same ones again
    content = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    torch.save({**content, "extra": {"auxiliary": "other"}}, tmp_path / "run" / "state.pt")
    with pytest.raises(UsageError, match=f"images: {FILE} was lost"):
        hpseg.train(data, tmp_path / "run", steps=4, resume=True, **settings)


def test_the_backbone_is_trained_and_resumed(data, vit_file, tmp_path, monkeypatch):
    """Auxiliary labels stay those of the backbone as it was."""
    settings = dict(weights=vit_file, steps=8, save_every=3, finetune=True, backbone_lr=1e-3, **TINY)
    hpseg.train(data, tmp_path / "straight", **settings)

    train_until(6, LookBeyond, data, tmp_path / "cut", **settings)
    (tmp_path / "cut" / FILE).unlink()
    hpseg.train(data, tmp_path / "cut", resume=True, **settings)
    assert_same(state_of(tmp_path / "straight"), state_of(tmp_path / "cut"))
    one, other = (hpseg.load(tmp_path / run, device="cpu") for run in ("straight", "cut"))
    plain = load_backbone("embedded", vit_file)
    assert one.backbone.fingerprint == other.backbone.fingerprint != plain.fingerprint
    hpseg.train(data, tmp_path / "frozen", weights=vit_file, steps=2, **TINY)
    assert state_of(tmp_path / "frozen")["extra"] == state_of(tmp_path / "cut")["extra"]


@needs_gloo
def test_two_ranks_make_the_gradients_of_one_process(data, vit_file, tmp_path):
    """Of both stages, with dropout and a trained backbone; auxiliary labels from features that the ranks shared."""
    common = {**TINY, "weights": str(vit_file), "dropout": 0.2, "steps": 1, "finetune": True}
    cases = {
        "contrast": {**common, "labeled": None, "clusters": "kmeans"},
        "labels": {**common, "fine_tune_share": 1.0},
    }
    odd = shutil.copytree(data / "images", tmp_path / "odd")  # one rank describes a photograph less
    (odd / "11.png").unlink()
    for name, settings in cases.items():
        hpseg.train(odd if name == "contrast" else data, tmp_path / "one" / name, **settings)
    (tmp_path / "driver.py").write_text(DRIVER)
    halves = {
        name: (str(odd if name == "contrast" else data), {**settings, "batch_size": 2})
        for name, settings in cases.items()
    }
    (tmp_path / "cases.json").write_text(json.dumps(halves))
    status, said = finish(spawn([*TORCHRUN, tmp_path / "driver.py", tmp_path / "cases.json", tmp_path / "two"]))
    assert status == 0, said
    one, two = (load_file(tmp_path / folder / "contrast" / FILE) for folder in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one) and len(one["labels"]) == 11 * 16
    for name in cases:
        one, two = (moments(tmp_path / folder / name) for folder in ("one", "two"))  # of Adam after one step
        assert one.keys() == two.keys() and len(one) > 40
        for kind in ("exp_avg", "exp_avg_sq"):
            keys = [key for key in one if key.endswith(kind)]
            least = 1e-2 * max(one[key].abs().max() for key in keys)  # some gradients are zero but for rounding
            for key in keys:
                allowed = TOLERANCE * torch.maximum(one[key].abs().max(), least)
                assert (one[key] - two[key]).abs().max() <= allowed, (name, key)


def test_labels_alone_need_no_clusters(data, vit_file, tmp_path):
    hpseg.train(data, tmp_path / "run", weights=vit_file, steps=3, fine_tune_share=1.0, **TINY)
    assert not (tmp_path / "run" / FILE).exists()


@pytest.mark.parametrize("stride", (0, 16))
def test_a_convolutional_extractor(stride, data, vit_file, tmp_path):
    import timm

    torch.manual_seed(0)
    network = timm.create_model("test_resnet", pretrained=False)
    torch.save(network.state_dict(), tmp_path / "resnet.pth")
    settings = dict(extractor="test_resnet", extractor_weights=tmp_path / "resnet.pth", extractor_stride=stride)
    settings |= dict(weights=vit_file, steps=2, extractor_size=64, auxiliary_clusters=4)
    hpseg.train(data, tmp_path / "run", **{**TINY, **settings})
    with pytest.raises(UsageError, match="extractor_weights: .* does not fit"):
        hpseg.train(data, tmp_path / "bad", **{**TINY, **settings, "extractor": "test_convnext"})


def test_extractors_that_cannot_be(tmp_path, monkeypatch):
    import timm

    def saved(name, change=lambda tensors: tensors):
        torch.save(change(timm.create_model(name, pretrained=False).state_dict()), tmp_path / "weights.pth")
        return tmp_path / "weights.pth"

    other_shape = saved("test_resnet", lambda tensors: {name: torch.zeros(2, 3) for name in tensors})
    with pytest.raises(UsageError, match=r"extractor_weights: .*weights.pth does not fit \("):
        load_extractor("test_resnet", other_shape, 0, "fp32", "timm")
    with pytest.raises(UsageError, match="extractor: timm cannot make 'test_resnet' with {'output_stride': 3}"):
        load_extractor("test_resnet", saved("test_resnet"), 3, "fp32", "timm")
    with pytest.raises(UsageError, match="extractor: 'gmixer_12_224' makes no feature maps of pictures of any size"):
        load_extractor("gmixer_12_224", saved("gmixer_12_224"), 0, "fp32", "timm")
    monkeypatch.setattr(ConvExtractor, "forward", lambda self, images: Tokens(torch.zeros(1, 6, 2), None, (2, 3)))
    with pytest.raises(UsageError, match=r"extractor: 'test_resnet' makes \(2, 3\) features of .*, expected \(2, 4\)"):
        load_extractor("test_resnet", saved("test_resnet"), 0, "fp32", "timm")


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(labeled=None, clusters="probe"), "clusters"),
        (dict(fine_tune_share=0.0), "fine_tune_share"),
        (dict(labeled="0/4"), "labeled"),
        (dict(classes=2), "classes"),
        (dict(cache_features=True), "cache_features"),
        (dict(auxiliary_clusters=1000), "clusters"),
        (dict(auxiliary_clusters=1), "auxiliary_clusters"),
        (dict(outliers=1.0), "outliers"),
        (dict(contrast_form="other"), "contrast_form"),
        (dict(extractor="nosuchnet"), "backbone"),
        (dict(extractor_stride=8, extractor="embedded"), "extractor_stride"),
    ],
)
def test_errors_name_the_setting(change, named, data, vit_file, tmp_path):
    with pytest.raises(UsageError, match=f"^{named}"):
        hpseg.train(data, tmp_path / "run", weights=vit_file, steps=2, **{**TINY, **change})
