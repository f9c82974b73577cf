"""The correspondence loss against the published code's stored numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import SMALL, paint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hpseg
from hpseg.methods import stego
from hpseg.methods.stego import Stego, correspondence_loss, other_images, sample_points
from hpseg.models.backbone import Tokens
from hpseg.run.config import make_config
from hpseg.run.errors import UsageError
from hpseg.runtime.distributed import ALONE, Share

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


@pytest.mark.parametrize("name", ("pointwise", "stabilize"))
def test_loss_and_gradients_are_those_of_the_published_code(name):
    stored = np.load(GOLDEN / f"stego_{name}.npz")
    features = [torch.tensor(stored[f"features_{i}"]) for i in (1, 2)]
    codes = [torch.tensor(stored[f"code_{i}"]).requires_grad_() for i in (1, 2)]
    loss = correspondence_loss(*features, *codes, float(stored["shift"]), **json.loads(str(stored["meta"])))
    loss.backward()
    assert loss.item() == pytest.approx(float(stored["loss_mean"]), rel=1e-6)
    for code, i in zip(codes, (1, 2), strict=True):
        torch.testing.assert_close(code.grad, torch.tensor(stored[f"grad_{i}"]), rtol=1e-5, atol=1e-9)


FEATURES, CODES = torch.randn(2, 5, 3, 3), torch.randn(2, 4, 3, 3)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"features_1": None}, TypeError, r"features_1: expected a floating-point tensor \(B, channels, h, w\)"),
        ({"codes_2": CODES.int()}, TypeError, r"codes_2: expected a floating-point tensor .* got .* torch.int32"),
        ({"codes_1": CODES[0]}, ValueError, r"codes_1: expected \(B, channels, h, w\)"),
        ({"features_2": FEATURES[:0]}, ValueError, "features_2: expected .* none of them 0"),
        ({"features_2": FEATURES[:1]}, ValueError, r"features_2: expected the images, .* of features_1, \(2,"),
        ({"features_2": FEATURES.double()}, ValueError, "features_2: expected the images, channels and dtype"),
        ({"features_1": FEATURES.to("meta")}, ValueError, "features_2: expected .* on meta, got .* on cpu"),
        ({"codes_1": CODES[..., :2]}, ValueError, "codes_1: expected the images and points of features_1"),
        ({"shift": float("nan")}, ValueError, "shift: expected a finite number, got nan"),
        ({"shift": "0.1"}, ValueError, "shift: expected a finite number, got '0.1'"),
        ({"shift": torch.zeros(2)}, ValueError, "shift: expected a float or a 0-dim floating-point tensor on cpu, got"),
        ({"reduction": "sum"}, ValueError, "reduction: expected 'mean' or 'none', got 'sum'"),
    ],
)  # fmt: skip
def test_maps_that_cannot_be_compared_are_refused(change, error, message):
    arguments = dict(features_1=FEATURES, features_2=FEATURES, codes_1=CODES, codes_2=CODES, shift=0.1) | change
    with pytest.raises(error, match=message):
        correspondence_loss(**arguments)


@pytest.mark.parametrize("pointwise", [True, False])
@pytest.mark.parametrize("zero_clamp, stabilize", [(True, False), (False, False), (True, True)])
def test_gradients_and_pairs_a_few_points_at_a_time(pointwise, zero_clamp, stabilize, monkeypatch):
    """Exact in fp64 whatever number of points is taken at a time; the mean is that of the pairs."""
    generator = torch.Generator().manual_seed(3)
    features, codes = (
        [torch.randn(2, c, 3, 2 + i, generator=generator, dtype=torch.float64) for i in (0, 1)] for c in (5, 4)
    )
    shift = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    options = dict(pointwise=pointwise, zero_clamp=zero_clamp, stabilize=stabilize)

    def loss(one, other, b, **more):
        return correspondence_loss(*features, one, other, b, **options, **more)

    whole = loss(*codes, 0.3)
    pairs = loss(*codes, shift, reduction="none")
    assert pairs.shape == (2, 6, 9)
    torch.testing.assert_close(pairs.mean(), whole)
    f, s = ([torch.nn.functional.normalize(x.flatten(2), dim=1) for x in maps] for maps in (features, codes))
    similarity, agreement = (one.mT @ other for one, other in (f, s))
    if pointwise:
        centred = similarity - similarity.mean(2, keepdim=True)
        similarity = centred - centred.mean() + similarity.mean()
    expected = -agreement.clamp(0 if zero_clamp else -2, 0.8 if stabilize else 2) * (similarity - 0.3)
    torch.testing.assert_close(pairs, expected)
    for points in (1, 4):
        monkeypatch.setattr(stego, "PAIRS", points * 2 * 9)
        assert torch.autograd.gradcheck(loss, (codes[0].requires_grad_(), codes[1].requires_grad_(), shift))
        torch.testing.assert_close(loss(*codes, 0.3), whole)


def test_memory_grows_with_points_not_with_pairs():
    """64 x 64 points: 16.8 million pairs, of which PAIRS are held at a time."""
    maps = [torch.randn(1, 8, 64, 64) for _ in range(4)]
    held = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            held.extend(x.numel() for x in tree_leaves(found) if isinstance(x, torch.Tensor))
            return found

    with Largest():
        correspondence_loss(*maps[:2], *(codes.requires_grad_() for codes in maps[2:]), 0.1).backward()
    assert max(held) <= stego.PAIRS


def test_points_are_bilinear_with_the_corners_at_one():
    maps = torch.arange(12.0).view(1, 1, 3, 4)
    points = torch.tensor([[[[-1.0, -1.0], [1.0, -1.0]], [[-1.0, 1.0], [0.0, 0.0]]]])
    assert sample_points(maps, points).flatten().tolist() == [0.0, 3.0, 8.0, 5.5]


def test_one_picture_has_no_neighbour(vit_file, tmp_path):
    (tmp_path / "photos").mkdir()
    paint(40, 40, 0).save(tmp_path / "photos" / "a.png")
    settings = {**SMALL, "preset": "stego-small", "consistency_weight": 0.0}
    with pytest.raises(UsageError, match="images: STEGO .* expected two pictures or more, got one"):
        hpseg.train(tmp_path / "photos", tmp_path / "run", weights=vit_file, **settings)
    assert not (tmp_path / "run").exists()


def test_an_image_is_never_its_own_negative():
    generator = torch.Generator().manual_seed(0)
    for count in (2, 3, 8):
        for _ in range(50):
            drawn = other_images(count, generator)
            assert (drawn != torch.arange(count)).all() and drawn.min() >= 0 and drawn.max() < count


def test_training_finds_neighbours_and_repeats(photos, vit_file, tmp_path):
    settings = SMALL | dict(preset="stego-small", weights=vit_file, consistency_weight=0.0, steps=6, neighbors=2)
    for out in ("a", "b"):
        hpseg.train(photos, tmp_path / out, **settings)
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in ("a", "b"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    log = (tmp_path / "a" / "log.csv").read_text().splitlines()
    assert log[0].startswith("step,loss,self,knn,random,cluster") and len(log) == 7
    state = torch.load(tmp_path / "a" / "state.pt", weights_only=True)
    neighbours = state["extra"]["neighbors"]
    assert neighbours.shape == (5, 2) and (neighbours != torch.arange(5)[:, None]).all()
    assert hpseg.load(tmp_path / "a", device="cpu").predict(photos / "a.jpg").max() < 3


def test_resumed_training_is_the_uninterrupted_one(photos, vit_file, tmp_path):
    settings = SMALL | dict(preset="stego-small", weights=vit_file, consistency_weight=0.0, steps=6, save_every=3)
    hpseg.train(photos, tmp_path / "whole", **settings)
    state = torch.load(tmp_path / "whole" / "state.pt", weights_only=True)
    with pytest.MonkeyPatch.context() as patch:  # stop after the checkpoint of step 3
        from hpseg.training import loop as training

        class Stopped(Exception):
            pass

        def save_and_stop(out, content, save=training.save_state):
            save(out, content)
            raise Stopped

        patch.setattr(training, "save_state", save_and_stop)
        with pytest.raises(Stopped):
            hpseg.train(photos, tmp_path / "cut", **settings)
    hpseg.train(photos, tmp_path / "cut", resume=True, **settings)
    resumed = torch.load(tmp_path / "cut" / "state.pt", weights_only=True)
    assert all(torch.equal(state["method"][name], resumed["method"][name]) for name in state["method"])


def test_shifts_are_quantiles_of_the_similarities(photos, vit_file, tmp_path):
    """Of a set of one colour all patches are alike; of the photographs, those of a view are more alike than others'."""
    quantiles = dict(shifts="quantiles", self_shift=0.5, knn_shift=0.5, random_shift=0.5, mining_dropout=0.0)
    settings = SMALL | dict(preset="stego-small", weights=vit_file, consistency_weight=0.0, steps=1, **quantiles)

    def found(name: str, **change) -> list[float]:
        hpseg.train(change.pop("images", photos), tmp_path / name, **(settings | change))
        return torch.load(tmp_path / name / "state.pt", weights_only=True)["extra"]["shifts"].tolist()

    medians = found("medians")
    assert all(-1 <= shift <= 1 for shift in medians) and len(set(medians)) == 3
    lowest, highest = (found(str(end), self_shift=end, knn_shift=end, random_shift=end) for end in (0.0, 1.0))
    assert all(low < middle < high for low, middle, high in zip(lowest, medians, highest, strict=True))
    assert found("given", shifts="similarities") == [0.5] * 3
    (tmp_path / "grey").mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (90, 90, 90)).save(tmp_path / "grey" / f"{number}.png")
    grey = found("alike", images=tmp_path / "grey")
    assert grey == pytest.approx([grey[0]] * 3, abs=0.01)  # other points of the same view
    with pytest.raises(UsageError, match=r"random_shift: expected a number in \[0, 1\] with shifts quantiles, got 1.2"):
        found("beyond", random_shift=1.2)


def test_losses_are_those_of_the_equations():
    """One step against the terms written out, with the same points and partners."""
    shifts = dict(shifts="similarities", self_shift=0.08, knn_shift=0.02, random_shift=0.46)
    settings = dict(classes=3, dim=6, dropout=0.0, mining_dropout=0.0, feature_samples=3, seed=1)
    config = make_config("stego-small", **settings, **shifts)
    torch.manual_seed(0)
    method = Stego(10, config)
    features = torch.randn(8, 12, 10)
    share = Share(ALONE, 8, torch.Generator().manual_seed(7))
    found = method.losses(Tokens(features, None, (3, 4)), None, 0, 5, share)
    generator, partners = torch.Generator().manual_seed(7), torch.Generator().manual_seed(5)
    points, others = (torch.rand(4, 3, 3, 2, generator=generator) * 2 - 1 for _ in range(2))
    f, s = (x.transpose(1, 2).unflatten(2, (3, 4)) for x in (features, method.head(features)))

    def term(rows, at, shift):
        parts = (sample_points(f[:4], points), sample_points(f[rows], at), sample_points(s[:4], points))
        return correspondence_loss(*parts, sample_points(s[rows], at), shift)

    drawn = [other_images(4, partners) for _ in range(5)]
    expected = {
        "self": 0.67 * term(torch.arange(4), points, 0.08),
        "knn": 0.25 * term(torch.arange(4, 8), others, 0.02),
        "random": 0.63 * sum(term(rows, others, 0.46) for rows in drawn) / 5,
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
