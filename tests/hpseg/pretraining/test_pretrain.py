"""Pre-training on a handful of pictures, and the parts it is made of."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hpseg.cli.main import main
from hpseg.data.procedural import random_image
from hpseg.models.backbone import load_backbone
from hpseg.pretraining import crops, pretrain
from hpseg.pretraining.options import Options
from hpseg.run.errors import UsageError

TINY = dict(steps=2, batch_size=2, width=24, heads=3, depth=1, crop=32, prototypes=16, texture_first=0.5)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(3):
        Image.fromarray(random_image(np.random.default_rng(seed), 96)).save(folder / f"{seed}.png")
    return folder


def test_pretrain_writes_a_backbone_and_resumes(photos, tmp_path):
    out = tmp_path / "vit.safetensors"
    assert pretrain.pretrain(photos, out, **TINY)[0] == 2
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.float16}
    backbone = load_backbone("embedded", out)
    tokens = backbone(torch.zeros(1, 3, 40, 48, dtype=torch.uint8))
    assert tokens.features.shape == (1, 30, 24) and tokens.features.isfinite().all()

    pretrain.pretrain(photos, out, **{**TINY, "steps": 4}, resume=True)
    assert json.loads(out.with_suffix(".json").read_text())["steps"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "vit.json", "vit.safetensors", "vit.state.pt"]
    with pytest.raises(UsageError, match="--resume"):
        pretrain.pretrain(photos, out, **{**TINY, "width": 48}, resume=True)


@pytest.mark.parametrize(
    "argv, name",
    [
        (["--procedural", "1.5"], "--procedural"),
        (["--crop", "36"], "--crop"),
        (["--heads", "5"], "--width"),
        (["--batch-size", "0"], "--batch-size"),
        (["--minutes", "-1"], "--minutes"),
        (["--resume"], "--resume"),
    ],
)
def test_bad_options_are_named(photos, tmp_path, argv, name, capsys):
    assert main(["pretrain", str(photos), "--out", str(tmp_path / "vit.safetensors"), *argv]) == 2
    assert f"hpseg pretrain: error: {name}: " in capsys.readouterr().err


def test_bad_paths_are_named(photos, tmp_path):
    with pytest.raises(UsageError, match="no folder"):
        pretrain.pretrain(tmp_path / "none", tmp_path / "vit.safetensors")
    with pytest.raises(UsageError, match="safetensors"):
        pretrain.pretrain(photos, tmp_path / "vit.pt")
    (tmp_path / "vit.safetensors").write_bytes(b"kept")
    with pytest.raises(UsageError, match="--overwrite"):
        pretrain.pretrain(photos, tmp_path / "vit.safetensors")
    assert (tmp_path / "vit.safetensors").read_bytes() == b"kept"


@pytest.mark.parametrize("procedural", [0.0, 0.5, 1.0])
def test_crops_of_photographs_and_drawn_images(procedural, photos, news):
    """As the loading process makes them; what cannot be decoded is said, and enough if all images are drawn."""
    bad = photos / "bad.png"
    bad.write_bytes(b"no picture")
    options = Options(**TINY, small_crops=3, procedural=procedural)
    batches = [next(iter(crops.Crops([*sorted(photos.glob("?.png")), bad], options, start))) for start in (0, 0, 1)]
    for large, small in batches:
        assert large.shape == (2, 2, 3, 32, 32) and small.shape == (3, 2, 3, 16, 16) and large.dtype == torch.uint8
        assert large.float().std() > 1
    assert torch.equal(batches[0][0], batches[1][0]) and not torch.equal(batches[0][0], batches[2][0])
    assert sum(line.startswith(f"skipped {bad}: ") for line in news()) == 3
    if procedural < 1:
        with pytest.raises(UsageError, match="photos: none of the 1 pictures can be decoded, for example .*bad.png"):
            crops.Crops([bad], options, 0)
    else:
        next(iter(crops.Crops([bad], options, 0)))


def test_every_part_of_the_student_learns_and_the_teacher_does_not():
    options = Options(**TINY)
    vit, _ = pretrain.build_vit(options)
    student = pretrain.Learner(vit, 16, crops.STATISTICS)
    teacher = pretrain.Learner(pretrain.build_vit(options)[0], 16, crops.STATISTICS)
    large = torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8)
    small = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8)
    terms = pretrain.losses(student, teacher, large, small, 8, torch.Generator().manual_seed(0), False)
    sum(terms.values()).backward()
    assert set(terms) == {"texture", "patch", "image"}
    assert [name for name, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert all(p.grad is None for p in teacher.parameters())


def test_sinkhorn_uses_every_prototype():
    q = pretrain.sinkhorn(torch.randn(256, 8).mul(0.1) + torch.linspace(0, 0.3, 8), rounds=10)
    torch.testing.assert_close(q.sum(1), torch.ones(256))
    torch.testing.assert_close(q.sum(0), torch.full((8,), 32.0), rtol=0.02, atol=0)


def test_masks_cover_what_they_should():
    mask = crops.random_masks(64, 12, torch.Generator().manual_seed(0), low=0.1, high=0.5)
    covered = mask.float().mean(1)
    assert mask.shape == (64, 144) and covered.min() >= 0.09 and covered.max() <= 0.51


def test_statistics_tell_textures_apart_and_stand_rotation():
    x = torch.from_numpy(random_image(np.random.default_rng(5), 96)).permute(2, 0, 1)[None].float() / 255
    straight, turned = (crops.texture_statistics(view, 8).mean(1) for view in (x, x.rot90(1, (2, 3))))
    assert straight.shape == (1, crops.STATISTICS)
    torch.testing.assert_close(straight[:, 16:36], turned[:, 16:36], rtol=0.05, atol=0.05)
    stripes = torch.zeros(1, 3, 96, 96)
    stripes[..., ::4] = stripes[..., 1::4] = 1
    noise = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    gap = (crops.texture_statistics(stripes, 8) - crops.texture_statistics(noise, 8)).mean(1)
    assert gap[:, 16:36].abs().max() > 0.5


def test_changed_colours_stay_normalised_and_follow_the_generator():
    x = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    one, same, other = (crops.change_colours(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    low, high = ((value - torch.tensor(crops.MEAN)) / torch.tensor(crops.STD) for value in (0, 1))
    assert (one >= low.view(3, 1, 1) - 1e-6).all() and (one <= high.view(3, 1, 1) + 1e-6).all()
