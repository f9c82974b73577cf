"""Options and states that distillation refuses."""

from __future__ import annotations

import pytest
import torch

from hpseg.cli.main import main
from hpseg.pretraining.distill import distill
from hpseg.run.errors import UsageError


def test_options_of_distill(photos, vit_file, tmp_path, refused, tally):
    words = ["distill", photos, "--teacher", vit_file, "--out", tmp_path / "a.safetensors"]
    for option, value, message in (
        *((option, "0", f"{option}: expected a positive") for option in ("--steps", "--batch-size", "--teacher-scale")),
        *((option, "nan", f"{option}: expected a positive") for option in ("--minutes", "--lr", "--save-every")),
        ("--mix", "1.5", "--mix: expected a probability"),
        ("--mix", "nan", "--mix: expected a probability"),
        ("--sides", "0", "--sides: expected numbers of pixels"),
        ("--sides", "30", "--sides: expected multiples of the student's patch, 8 pixels, got 30"),
        ("--levels", "32", "--levels: "),
        ("--student", "resnet18", "--student: expected"),
        ("--student", "nothing_of_timm", "--student: expected"),
        ("--student", "hybrid_tiny8", "--student: hybrid_tiny8 begins with stages of a convolutional teacher"),
        ("--device", "xyz", "device: expected"),
        ("--out", tmp_path / "a.pt", "--out: expected a name that ends in .safetensors"),
    ):
        refused(message, *words, option, value)
        tally("options that cannot be")
    refused("--teacher-scale: expected larger crops", *words, "--teacher-scale", "0.001")
    for words_of_teacher, message in (
        (["no_such_net"], "--teacher: timm cannot make"),
        (["resnet18.no_such_tag"], "--teacher: "),
        (["test_efficientnet", "--teacher-weights", vit_file], "--teacher-weights: "),
        (["test_efficientnet", "--teacher-weights", tmp_path / "none.pth"], "--teacher-weights: no file"),
        (["vit_small_patch16_224", "--teacher-weights", tmp_path / "none.pth"], "--teacher-weights: no file"),
        ([vit_file, "--teacher-weights", vit_file], "--teacher-weights: .* holds weights itself"),
    ):
        said = message.split(" .* ")
        refused(said[-1], *words[:3], *words_of_teacher, *words[4:])
        tally("teachers that cannot be")
    assert not list(tmp_path.iterdir())


def test_networks_that_take_one_size_only(photos, vit_file, tmp_path, monkeypatch):
    """They are refused before anything is trained, as teachers and as students."""
    import timm

    create = timm.create_model
    monkeypatch.setattr("hpseg.pretraining.teacher.require_reachable", lambda name: None)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    small = dict(steps=1, batch_size=1, sides=(32,), device="cpu")
    with pytest.raises(UsageError, match="--teacher: 'mixer_s32_224' makes no feature maps of 64 x 64 pixels"):
        distill(photos, tmp_path / "a.safetensors", teacher="mixer_s32_224", **small)
    with pytest.raises(UsageError, match="--student: expected .* got 'vit_tiny_r_s16_p8_224'"):
        distill(photos, tmp_path / "a.safetensors", teacher=str(vit_file), student="vit_tiny_r_s16_p8_224", **small)


def test_files_of_others_are_kept(photos, vit_file, tmp_path, refused):
    for name in ("a.json", "a.state.pt", "a.safetensors"):
        (tmp_path / name).write_text("mine")
        refused(
            f"--out: {tmp_path / name} exists",
            "distill",
            photos,
            "--teacher",
            vit_file,
            "--out",
            tmp_path / "a.safetensors",
        )
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


def test_a_table_of_photographs_that_cannot_be_read(photos, vit_file, tmp_path, refused):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "b.png").write_bytes((photos / "b.png").read_bytes())
    (folder / "ATTRIBUTION.tsv").write_bytes("file\tauthor\nb.png\tMüller\n".encode("latin-1"))
    refused("photos: ", "distill", folder, "--teacher", vit_file, "--out", tmp_path / "a.safetensors", "--sides", "32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_what_was_started_otherwise_does_not_go_on(photos, vit_file, tmp_path, refused):
    out = tmp_path / "vit.safetensors"
    words = ["distill", photos, "--teacher", vit_file, "--out", out, "--batch-size", "2", "--sides", "32"]
    words += ["--student", "test_vit", "--device", "cpu"]
    assert main([str(word) for word in [*words, "--steps", "1"]]) == 0
    refused("--out: ", *words, "--steps", "2")
    for option, value in (("--seed", "1"), ("--batch-size", "3"), ("--mix", "0.1"), ("--sides", "64")):
        refused("--resume: ", *words, "--steps", "2", option, value, "--resume")
    state = torch.load(out.with_suffix(".state.pt"), weights_only=True)
    for gone in state:
        torch.save({name: part for name, part in state.items() if name != gone}, out.with_suffix(".state.pt"))
        refused("resume: ", *words, "--steps", "2", "--resume")
