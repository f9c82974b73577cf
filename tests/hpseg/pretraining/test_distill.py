"""Distillation of small teachers into smaller students."""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest
import torch
from processes import finish, needs_proc, spawn, wait_for
from safetensors.torch import load_file, save_file

from hpseg.cli.main import main
from hpseg.models.backbone import load_backbone
from hpseg.pretraining import crops, distill
from hpseg.pretraining.options import DistillOptions
from hpseg.pretraining.teacher import ConvTeacher, Lesson, VitTeacher, load_teacher, parse_levels
from hpseg.pretraining.views import Views, mixed
from hpseg.run.errors import UsageError

SIDES = (32, 48)
SMALL = dict(steps=4, batch_size=2, sides=SIDES, device="cpu")


@pytest.fixture(scope="module")
def conv_file(tmp_path_factory):
    """Weights of timm's test_efficientnet, whose stages have strides 2 to 32."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("test_efficientnet", pretrained=False)
    path = tmp_path_factory.mktemp("conv") / "conv.safetensors"
    save_file(network.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def tiny_students(monkeypatch):
    vit = {"patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 1}
    monkeypatch.setitem(distill.STUDENTS, "vit_tiny8", {"arch": vit})
    monkeypatch.setitem(distill.STUDENTS, "hybrid_tiny8", {"arch": vit, "stem": {"strides": [8, 16]}})


@pytest.fixture(params=["vit", "conv", "hybrid"])
def lesson(request, vit_file, conv_file):
    """Settings of a distillation from a ViT, from a convolutional network, and into a student on stages of that."""
    conv = {"teacher": "test_efficientnet", "teacher_weights": conv_file, "levels": "16:0.5,32"}
    return {
        "vit": {"teacher": str(vit_file)},
        "conv": conv,
        "hybrid": {**conv, "student": "hybrid_tiny8", "dtype": "bf16"},
    }[request.param]


def test_an_interrupted_training_ends_as_one_that_was_not(lesson, photos, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    assert distill.distill(photos, whole, **lesson, **SMALL)[0] == 4
    losses, made = distill.Distillation.losses, []

    def interrupted(recipe, batch, step, progress):
        made.append(step)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return losses(recipe, batch, step, progress)

    with monkeypatch.context() as patch:
        patch.setattr(distill.Distillation, "losses", interrupted)
        with pytest.raises(KeyboardInterrupt, match="SIGTERM after step 2, which is saved"):
            distill.distill(photos, cut, **lesson, **SMALL)
    assert made == [0, 1] and cut.read_bytes() != whole.read_bytes()
    monkeypatch.setattr(crops, "HELD_BYTES", 0)  # nor does it matter where photographs are held
    distill.distill(photos, cut, resume=True, **lesson, **SMALL)
    assert whole.read_bytes() == cut.read_bytes()

    tensors = load_file(whole)
    assert {x.dtype for x in tensors.values()} <= {torch.float16, torch.int64}
    assert all(x.isfinite().all() for x in tensors.values())
    pixels = torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8)
    tokens = load_backbone("embedded", whole)(pixels, with_neighbors=True)
    assert tokens.grid == (5, 7) and tokens.features.shape == (1, 35, 24) and tokens.features.isfinite().all()
    assert tokens.neighbors.shape == (1, 35, 9)


@needs_proc
def test_a_killed_training_ends_as_one_that_was_not(vit_file, photos, tmp_path):
    cut, whole = tmp_path / "cut.safetensors", tmp_path / "whole.safetensors"
    words = ["distill", photos, "--teacher", vit_file, "--batch-size", "2", "--sides", "32", "--teacher-scale", "1"]
    words += ["--student", "test_vit", "--device", "cpu", "--steps", "30"]
    words = [str(word) for word in words]
    saving = ["--out", cut, "--save-every", "0.001"]
    process = spawn([sys.executable, "-m", "hpseg", *words, *saving], env={"OMP_NUM_THREADS": "1"})
    wait_for(cut.with_suffix(".state.pt"), process)
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    assert 1 <= torch.load(cut.with_suffix(".state.pt"), weights_only=True)["step"] <= 30
    assert main([*words, "--out", str(whole)]) == main([*words, "--out", str(cut), "--resume"]) == 0
    assert whole.read_bytes() == cut.read_bytes()


def test_a_student_comes_to_see_what_its_teacher_sees(vit_file, photos):
    options = DistillOptions(teacher=str(vit_file), **{**SMALL, "mix": 0.0})
    recipe = distill.Distillation(sorted(photos.glob("*.png")), options, photos)
    recipe.begin()
    optimizer, seen = torch.optim.AdamW(recipe.vit.parameters(), lr=3e-3), []
    for step in range(60):
        loss, terms = recipe.losses(recipe.views.batch(step % 4), step % 4, step / 60)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert set(terms) == {"square", "cosine"} and sum(seen[-8:]) < 0.7 * sum(seen[:8])


def test_a_stem_is_the_teachers_and_stays_in_evaluation(conv_file, photos):
    options = DistillOptions(teacher="test_efficientnet", teacher_weights=conv_file, student="hybrid_tiny8", **SMALL)
    recipe = distill.Distillation(sorted(photos.glob("*.png")), options, photos)
    stem, teacher = recipe.vit.patch_embed, recipe.teacher.network.state_dict()
    assert all(torch.equal(x, teacher[name]) for name, x in stem.network.state_dict().items())
    recipe.begin()
    recipe.vit.train()
    assert recipe.vit.training and not any(module.training for module in stem.modules())
    pixels = recipe.seen(recipe.coloured(recipe.views.batch(0), 0))
    before = [norm.running_var.clone() for norm in stem.standardise]
    assert stem(pixels).shape == (len(pixels), pixels.shape[2] // 8, pixels.shape[3] // 8, 24)
    assert all(torch.equal(norm.running_var, x) for norm, x in zip(stem.standardise, before))
    rates = {recipe.rate(name) for name, _ in recipe.vit.named_parameters()}
    assert rates == {1.0, distill.STEM_RATE} and recipe.rate("patch_embed.project.weight") == 1.0
    recipe.losses(recipe.views.batch(0), 0, 0.0)[0].backward()
    assert [name for name, p in recipe.vit.named_parameters() if p.grad is None] == []


def test_teachers_and_their_levels(vit_file, conv_file):
    assert isinstance(load_teacher(str(vit_file), None, None), VitTeacher)
    teacher = load_teacher("test_efficientnet", conv_file, "32,8:0.25")
    assert isinstance(teacher, ConvTeacher) and teacher.levels == {8: 0.25, 32: 1.0}
    assert [tuple(x.shape) for x in teacher.maps(torch.rand(2, 3, 64, 96))] == [(2, 32, 8, 12), (2, 64, 2, 3)]
    assert load_teacher("test_efficientnet", conv_file, None).levels == {32: 1.0}
    for levels in ("8:x", "8:0", "x", "8:-1"):
        with pytest.raises(UsageError, match="--levels: expected STRIDE:WEIGHT"):
            parse_levels(levels)
    with pytest.raises(UsageError, match=r"--levels: .* expected strides of stages, 2, 4, 8, 16, 32, got 7"):
        load_teacher("test_efficientnet", conv_file, "7")
    with pytest.raises(UsageError, match="--levels: .* is a ViT"):
        load_teacher(str(vit_file), None, "8")
    with pytest.raises(UsageError, match="--teacher-weights: .* does not fit"):
        load_teacher("test_efficientnet", vit_file, None)


def test_a_lesson_is_centred_weighted_and_turned():
    torch.manual_seed(0)
    fine, deep = 3 + torch.randn(8, 5, 8, 8), -2 + 10 * torch.randn(8, 6, 4, 4)
    lesson = Lesson([0.5, 1.0], [5, 6], 16)
    lesson.fit([[fine[:4], deep[:4]], [fine[4:], deep[4:]]], (4, 4))
    y = lesson([fine, deep], (4, 4)).flatten(0, 1).double()
    assert y.shape == (128, 16) and y[:, 11:].abs().max() == 0
    torch.testing.assert_close(y.mean(0), torch.zeros(16).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.square().sum(1).mean(), torch.tensor(16.0).double(), rtol=1e-4, atol=0)
    covariance = y.T @ y / len(y)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-4  # principal directions, longest first
    assert (covariance.diag().diff() <= 1e-9).all()
    rows = Lesson.joined([fine, deep], (4, 4)).flatten(0, 1).double()
    rows = torch.cat([0.5 * _unit(rows[:, :5]), _unit(rows[:, 5:])], 1)
    expected = rows @ rows.T * 16 / rows.square().sum(1).mean()
    torch.testing.assert_close(y @ y.T, expected, atol=1e-3, rtol=1e-3)


def _unit(rows):
    rows = rows - rows.mean(0)
    return rows / rows.square().sum(1).mean().sqrt()


def test_a_batch_of_views_is_a_function_of_its_step(photos):
    views, again = (Views(sorted(photos.glob("*.png")), (64, 96), 4, 0) for _ in range(2))
    batches = [views.batch(step) for step in range(8)]
    assert {x.shape[-1] for x in batches} == {64, 96} and {len(x) for x in batches} == {4, 2}
    again.start = 5
    assert torch.equal(next(iter(again)), batches[5])


def test_an_album_holds_what_fits_and_reads_the_rest_again(photos, tmp_path, monkeypatch, caplog):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    files = [*sorted(photos.glob("*.*")), tmp_path / "broken.png"]
    whole = crops.Album(files, 40)
    sizes = [4 * image.width * image.height for image in whole.held]
    assert len(whole) == len(whole.held) == 4 and "broken.png" in caplog.text
    assert max(max(image.size) for image in whole.held) == 40
    for budget, held in ((sum(sizes), 4), (sum(sizes[:2]) + 1, 2), (sizes[0] - 1, 0), (0, 0)):
        monkeypatch.setattr(crops, "HELD_BYTES", budget)
        part = crops.Album(files, 40)
        assert len(part) == 4 and len(part.held) == held
        assert [part[n].tobytes() for n in range(4)] == [whole[n].tobytes() for n in range(4)]


def test_a_photograph_that_is_gone_ends_the_training_in_a_sentence(vit_file, photos, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "b.png").write_bytes((photos / "b.png").read_bytes())
    monkeypatch.setattr(crops, "HELD_BYTES", 0)
    begin = distill.Distillation.begin

    def lost(recipe):
        begin(recipe)
        (folder / "b.png").unlink()

    monkeypatch.setattr(distill.Distillation, "begin", lost)
    words = ["distill", folder, "--teacher", vit_file, "--out", tmp_path / "a.safetensors", "--steps", "3"]
    assert main([str(word) for word in [*words, "--sides", "32", "--device", "cpu"]]) == 2
    said = capsys.readouterr().err
    assert "hpseg distill: error: photos: a picture cannot be read any more" in said and "Traceback" not in said


def test_mixed_pictures_hold_a_box_of_the_next():
    pixels = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 32, 48)
    mix = mixed(pixels, torch.Generator().manual_seed(0), 1.0)
    shares = (mix != pixels).float().mean((1, 2, 3))
    assert ((shares > 0.05) & (shares < 0.6)).all()
    assert torch.equal(torch.where(mix == pixels, pixels, pixels.roll(1, 0)), mix)
    assert torch.equal(mixed(pixels, torch.Generator().manual_seed(0), 0.0), pixels)


def test_the_record_names_teacher_and_photographs(vit_file, photos, tmp_path):
    folder = tmp_path / "folder"
    for name, part in (("a.png", "one"), ("b.png", "one"), ("c.png", "two/deep")):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / name).write_bytes((photos / "b.png").read_bytes())
    (folder / "one" / "ATTRIBUTION.tsv").write_text("file\tsource\tlicence\na.png\there\tCC0\n")
    (folder / "two" / "ATTRIBUTION.tsv").write_text("file\tauthor\nc.png\tM. Müller\n", encoding="utf-8")
    out = tmp_path / "student.safetensors"
    distill.distill(folder, out, teacher=str(vit_file), note="seen it all", **{**SMALL, "steps": 1})
    assert load_backbone(weights=out).facts()["note"] == "seen it all"
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["photographs"] == [
        {"file": "one/a.png", "source": "here", "licence": "CC0"},
        {"file": "one/b.png"},
        {"file": "two/deep/c.png", "author": "M. Müller"},
    ]
    assert record["teacher"]["source"] == vit_file.name and record["steps"] == 1 and record["seconds"] >= 0
    assert record["options"]["sides"] == list(SIDES)
