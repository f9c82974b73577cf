"""DGCL: its bank, its quantiles and masks, and training from few labels to scores without any matching."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import assert_same, state_of, train_until
from tiny import DGCL, DGCL_SETTINGS
from torch.nn import functional as F
from trees import COLOURS, halves, save_ids, save_photo

import hpkernels
import hpseg
from hpseg.data.datasets import LabelledSet, training_images
from hpseg.data.few_labels import PADDING, VOID, SemiFolder, listed
from hpseg.data.sets import cityscapes19
from hpseg.evaluation.evaluate import evaluate
from hpseg.interop.released_checkpoints import export_hp
from hpseg.methods.dgcl.bank import Bank
from hpseg.methods.dgcl.method import Dgcl
from hpseg.methods.teacher_labels import cross_entropy, cutmix_masks, entropy, hard_pixels, pseudo_labels
from hpseg.run.config import make_config
from hpseg.run.errors import UsageError

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


@pytest.mark.parametrize("number", [0, 1])
def test_bank_gives_golden_densities(number):
    golden = np.load(GOLDEN / f"dgcl_density_{number}.npz")
    queries, memory, expected = (torch.from_numpy(golden[name]) for name in ("features", "memory", "density"))
    bank = Bank(2, len(memory), memory.shape[1])
    bank.insert(1, memory, memory, torch.zeros(len(memory)))
    found = bank.densities(queries, torch.ones(len(queries), dtype=torch.int64), 0)
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)


def test_bank_overwrites_the_oldest_and_keeps_densities():
    bank = Bank(2, 5, 3)
    rows = torch.arange(7.0)[:, None].expand(-1, 3)
    bank.insert(1, rows[:4], rows[:4] * 10, torch.arange(4.0))
    assert bank.count(1) == 4 and bank.count(0) == 0 and not bank.full
    bank.insert(1, rows[4:], rows[4:] * 10, torch.arange(4.0, 7.0))
    assert bank.features[1, :, 0].tolist() == [5, 6, 2, 3, 4]
    assert bank.projections[1, :, 0].tolist() == [50, 60, 20, 30, 40] and bank.density[1].tolist() == [5, 6, 2, 3, 4]
    bank.insert(0, rows[:5], rows[:5], torch.zeros(5))
    assert bank.full


def test_densities_of_short_classes_are_zero():
    bank = Bank(3, 50, 4)
    random = torch.Generator().manual_seed(0)
    for label, count in ((0, 40), (1, 20)):
        bank.insert(
            label,
            *(torch.randn(count, 4, generator=random) for _ in range(2)),
            torch.zeros(count),
        )
    features, labels = (
        torch.randn(6, 4, generator=random),
        torch.tensor([0, 1, 2, 0, 1, 2]),
    )
    density = bank.densities(features, labels, 20)
    assert density[[1, 2, 4, 5]].tolist() == [0] * 4
    expected = hpkernels.neighbor_density(features[[0, 3]], bank.features[0, :40])
    torch.testing.assert_close(density[[0, 3]], expected)


def test_pseudo_labels_leave_out_the_uncertain_and_the_padding():
    random = torch.Generator().manual_seed(1)
    probabilities = torch.randn(2, 4, 8, 8, generator=random).mul(3).softmax(1)
    padding = torch.zeros(2, 8, 8, dtype=torch.bool)
    padding[1, :, 4:] = True
    found = pseudo_labels(probabilities, padding, 20)
    uncertainty = entropy(probabilities)
    threshold = torch.quantile(uncertainty[~padding].double(), 0.8)
    expected = torch.where(padding | (uncertainty.double() >= threshold), -1, probabilities.argmax(1))
    assert torch.equal(found, expected)
    assert (found[~padding] < 0).sum() == 20  # of 96, with the one at the threshold


def test_cutmix_pastes_half_of_the_picture_half_of_the_time():
    masks = [cutmix_masks(2, 64, torch.Generator().manual_seed(seed)) for seed in range(200)]
    mixed = [pair for pair in masks if pair.any()]
    assert 70 < len(mixed) < 130
    for mask in torch.cat(mixed):
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum()  # one rectangle
        assert columns.sum() > 32 and abs(int(mask.sum()) - 2048) <= 32


def test_contrast_is_the_published_formula():
    """One class, everything in the anchors: against the formula in fp64."""
    config = make_config(**{**DGCL_SETTINGS, "dim": 6, "temperature": 0.5})
    method = Dgcl(8, config)
    random = torch.Generator().manual_seed(2)
    for label in range(3):
        rows = torch.randn(60, 6, generator=random)
        method.bank.insert(
            label,
            rows,
            torch.randn(60, 6, generator=random),
            torch.rand(60, generator=random),
        )
    features, projections = (torch.randn(60, 6, generator=random) for _ in range(2))
    labels = torch.tensor([1] * 40 + [0] * 20)
    found = method.contrast(features, projections, labels, seed=3)
    density = hpkernels.neighbor_density(features[:40], method.bank.features[1])
    order = density.argsort()
    bank = method.bank.projections[1, method.bank.density[1].argsort(descending=True)[:8]]
    prototype = torch.cat([projections[order[-8:]], bank]).mean(0)
    anchors, negatives = projections[order[:10]], projections[40:]
    unit = [F.normalize(x.double(), dim=-1) for x in (anchors, prototype, negatives)]
    near, far = unit[0] @ unit[1] / 0.5, unit[0] @ unit[2].T / 0.5
    expected = (torch.cat([near[:, None], far], 1).logsumexp(1) - near).mean()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_teacher_copies_then_averages():
    config = make_config(**{**DGCL_SETTINGS, "steps": 100})
    method = Dgcl(8, config)
    teacher, student = method.clusters.weight, method.student["clusters"].weight
    torch.nn.init.ones_(student)
    method.follow_up(0)
    assert torch.equal(teacher, student)
    torch.nn.init.zeros_(student)
    method.follow_up(29)  # 10 supervised steps, 10 of copies, then t = 19 with momentum 1 - 1/20
    torch.testing.assert_close(teacher.detach(), torch.full_like(teacher, 0.95))


def test_lists(tmp_path):
    def pairs(*names):
        return LabelledSet(
            "set",
            [(Path(name), Path(f"{name}.label")) for name in names],
            [],
            lambda ids: ids,
        )

    voc = pairs("/voc/JPEGImages/2007_01.jpg", "/voc/JPEGImages/2007_02.jpg")
    city = pairs(
        "/c/leftImg8bit/train/ulm/ulm_1_leftImg8bit.png",
        "/c/leftImg8bit/train/bonn/bonn_1_leftImg8bit.png",
    )
    folder = pairs("/f/images/a/1.jpg", "/f/images/b/1.jpg")
    for data, line, chosen in (
        (voc, "2007_02", 1),
        (city, "leftImg8bit/train/bonn/bonn_1_leftImg8bit.png", 1),
        (city, "/images/train/ulm_1.png\t/segmentation/train/ulm_1_gtFine.png", 0),
        (folder, "b/1.jpg", 1),
    ):
        (tmp_path / "list.txt").write_text(line + "\n")
        assert listed(data, str(tmp_path / "list.txt"), 0) == [data.pairs[chosen]]
    many = pairs(*(f"/f/{i}.jpg" for i in range(32)))
    assert len(listed(many, "1/8", 0)) == 4 and listed(many, "1/8", 0) == listed(many, "1/8", 0)
    assert listed(many, "1/8", 0) != listed(many, "1/8", 1)


@pytest.mark.parametrize("text", ["nobody\n", "1\n", "", None])
def test_bad_lists_are_named(text, tmp_path):
    data = LabelledSet(
        "set",
        [(Path("/f/a/1.jpg"), Path("x")), (Path("/f/b/1.jpg"), Path("y"))],
        [],
        lambda ids: ids,
    )
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UsageError, match="labeled"):
        listed(data, str(tmp_path / "list.txt"), 0)


def test_views_have_their_labels(data):
    folder = SemiFolder(str(data), None, "1/4", 3, 32, 0)
    assert len(folder) == 9 and len(folder.files) == 12
    for epoch in range(6):
        pixels, labels, _ = folder[epoch, 10]
        assert (pixels[:, labels == PADDING] == 0).all()
        inside = labels >= 0
        nearest = (pixels.permute(1, 2, 0)[inside][:, None].float() - torch.from_numpy(COLOURS).float()).norm(dim=2)
        assert (nearest.argmin(1) == labels[inside]).float().mean() > 0.85
        assert (folder[epoch, 0][1] < 0).all()  # no label of the others


def test_only_listed_labels_are_opened(data, vit_file, tmp_path):
    """The other label files hold no picture at all, and training is none the wiser."""
    root = shutil.copytree(data, tmp_path / "data")
    (tmp_path / "list").write_text("3\n7\n")
    for path in (root / "labels").iterdir():
        if path.stem not in ("3", "7"):
            path.write_bytes(b"no picture")
    settings = {**DGCL, "labeled": str(tmp_path / "list")}
    hpseg.train(root, tmp_path / "run", weights=vit_file, steps=3, **settings)
    assert len(training_images(str(root), None)[0]) == 12  # label maps are no photographs


def test_beats_chance_without_matching(data, vit_file, tmp_path):
    hpseg.train(data, tmp_path / "run", weights=vit_file, steps=60, **DGCL)
    log = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert float(log[-1].split(",")[log[0].split(",").index("contrast")]) > 0
    with pytest.raises(UsageError, match="run: .* has a classifier learned from labels"):
        export_hp(tmp_path / "run", tmp_path / "run.pth")
    results = evaluate(tmp_path / "run", data, device="cpu", crf=True)
    assert results["trained"]["cluster_of"] == [0, 1, 2] == results["trained_crf"]["cluster_of"]
    assert results["trained"]["accuracy"] > 60  # chance: 33


def test_resumes_bitwise(data, vit_file, tmp_path):
    """Stopped between two checkpoints with a bank in use; the state, bank and teacher in it, ends the same."""
    settings = dict(weights=vit_file, steps=24, save_every=6, **DGCL)
    hpseg.train(data, tmp_path / "straight", **settings)

    train_until(20, Dgcl, data, tmp_path / "cut", **settings)
    assert state_of(tmp_path / "cut")["step"] == 18
    hpseg.train(data, tmp_path / "cut", resume=True, **settings)
    assert state_of(tmp_path / "cut")["extra"]["inserted"].min() >= 60
    assert_same(state_of(tmp_path / "straight"), state_of(tmp_path / "cut"))


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(labeled=None), "labeled"),
        (dict(labeled="0/4"), "labeled"),
        (dict(labeled="4/4"), "labeled"),
        (dict(classes=2), "classes"),
        (dict(cache_features=True), "cache_features"),
        (dict(method="hp"), "labeled"),
        (dict(entropy_drop=120.0), "entropy_drop"),
    ],
)
def test_errors_name_the_setting(change, named, data, vit_file, tmp_path):
    with pytest.raises(UsageError, match=f"^{named}"):
        hpseg.train(data, tmp_path / "run", weights=vit_file, steps=2, **{**DGCL, **change})


def test_lists_of_both_families_on_disk(tmp_path):
    """VOC: bare ids, labels from SegmentationClassAug. Cityscapes: paths, and the tab-separated form, which name labels
    of train ids that the published archives lack: the image counts, the label is the archive's own."""
    voc, city = tmp_path / "voc", tmp_path / "city"
    (voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    names = ["2007_000032", "2007_000039", "2010_001195"]
    (voc / "ImageSets" / "Segmentation" / "train_aug.txt").write_text("\n".join(names))
    for seed, name in enumerate(names):
        save_photo(voc / "JPEGImages" / f"{name}.jpg", seed)
        save_ids(voc / "SegmentationClassAug" / f"{name}.png", halves(20, 255))
    stems = ["ulm_000000_000019", "ulm_000001_000019", "bonn_000000_000019"]
    for seed, stem in enumerate(stems):
        town = stem.split("_")[0]
        save_photo(city / "leftImg8bit" / "train" / town / f"{stem}_leftImg8bit.png", seed)
        save_ids(city / "gtFine" / "train" / town / f"{stem}_gtFine_labelIds.png", halves(33, 9))
    tabs = [f"/images/train/{stem}.png\t/segmentation/train/{stem}_gtFine.png" for stem in stems]
    cases = (
        ("voc", voc, "2010_001195", "2010_001195", 20, 21),
        ("cityscapes19", city, "leftImg8bit/train/ulm/ulm_000001_000019_leftImg8bit.png", stems[1], 18, 19),
        ("cityscapes19", city, tabs[2], stems[2], 18, 19),
        ("cityscapes", city, tabs[0], stems[0], 26, 27),
    )
    for name, root, line, stem, left, classes in cases:
        (tmp_path / "list.txt").write_text(line + "\n")
        folder = SemiFolder(name, str(root), str(tmp_path / "list.txt"), classes, 32, 0)
        assert len(folder) == 2 and len(folder.label_files) == 1 and stem in str(folder.files[2])
        found = {int(x) for epoch in range(4) for x in folder[epoch, 2][1].unique()}
        # What the list leaves out has no labels: neither classes nor void of its own (here parking, or 255).
        others = {int(x) for epoch in range(4) for index in range(2) for x in folder[epoch, index][1].unique()}
        right = {2} if name == "cityscapes" else {VOID}
        assert found - {PADDING} == {left} | right and others - {PADDING} == {VOID}, (name, found, others)


def test_hard_pixels_are_those_of_small_probability():
    """The formula as published, pixel by pixel in fp64."""
    random = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 5, 9, 9, generator=random) * 2
    labels = torch.randint(-1, 5, (2, 9, 9), generator=random)
    own = logits.double().softmax(1).gather(1, labels.clamp_min(0)[:, None])[:, 0]
    ordered = own[labels >= 0].sort().values
    for pixels, probability in ((1, 0.7), (1, 0.3), (100, 0.3), (len(ordered), 0.0)):
        found = hard_pixels(logits, labels, pixels, probability)
        threshold = max(probability, float(ordered[pixels - 1]) + 1e-7)
        assert torch.equal(found, torch.where((labels >= 0) & (own <= threshold), labels, -1))
        assert (found >= 0).sum() >= pixels
        expected = -own[found >= 0].log().mean()
        torch.testing.assert_close(cross_entropy(logits, found).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(hard_pixels(logits, labels, len(ordered) + 1, 0.0), labels)
    assert cross_entropy(logits, torch.full_like(labels, -1)) == 0


def test_classes_of_the_cityscapes_benchmark():
    names = (
        "road sidewalk building wall fence pole light sign vegetation terrain sky person rider car truck bus train "
        "motorcycle bicycle"
    ).split()
    assert [name.split()[-1] for name in cityscapes19.CLASSES] == names
    assert len(cityscapes19.COLOURS) == 19 and cityscapes19.COLOURS[13] == (0, 0, 142)


def test_contrast_begins_with_the_classes_that_are_full():
    config = make_config(**{**DGCL_SETTINGS, "dim": 6, "contrast_by_class": True, "contrast_background": -1})
    method, random = Dgcl(8, config), torch.Generator().manual_seed(5)
    features, projections = (torch.randn(80, 6, generator=random) for _ in range(2))
    labels = torch.tensor([1] * 40 + [2] * 40)

    def fill(label, count):
        rows = (torch.randn(count, 6, generator=random) for _ in range(2))
        method.bank.insert(label, *rows, torch.rand(count, generator=random))

    fill(1, 59)
    assert method.contrast(features, projections, labels, seed=0) == 0
    fill(1, 1)
    alone = method.contrast(features, projections, labels, seed=0)
    assert alone > 0
    fill(2, 60)
    both = method.contrast(features, projections, labels, seed=0)
    assert both > 0 and both != alone and not method.bank.full
