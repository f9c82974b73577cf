"""Options and states that pre-training refuses."""

from __future__ import annotations

import io

import torch

from hpseg.cli.main import main


def test_options_of_pretrain(photos, tmp_path, refused, tally):
    for option, value in (
        *(("--patch-size", "0"), ("--heads", "0"), ("--width", "-3"), ("--crop", "0"), ("--lr", "nan")),
        *(("--minutes", "inf"), ("--small-crops", "-1"), ("--device", "xyz")),
    ):
        name = option.removeprefix("--") if option == "--device" else option
        refused(f"{name}: expected", "pretrain", photos, "--out", tmp_path / "a.safetensors", option, value)
        tally("options that cannot be")
    assert not list(tmp_path.iterdir())


def test_states_of_pretrain(photos, tmp_path, refused, tally):
    out = tmp_path / "vit.safetensors"
    state = out.with_suffix(".state.pt")
    words = ["pretrain", photos, "--out", out, "--batch-size", "2", "--width", "24", "--heads", "3", "--depth", "1"]
    words += ["--crop", "32", "--prototypes", "16", "--device", "cpu"]
    assert main([str(word) for word in [*words, "--steps", "1"]]) == 0
    whole, before = state.read_bytes(), out.read_bytes()
    parts = torch.load(state, weights_only=True)

    def saved(changed):
        content = io.BytesIO()
        torch.save(changed, content)
        return content.getvalue()

    for content in (
        *(b"", b"text", whole[:1000], whole[: len(whole) // 2], bytes(len(whole))),
        *map(saved, ([1, 2], torch.zeros(3))),
        *(saved({name: part for name, part in parts.items() if name != gone}) for gone in parts),
        saved({**parts, "student": {**parts["student"], "vit.norm.bias": torch.zeros(7)}}),
        saved({**parts, "optimizer": parts["student"]}),
        *(saved({**parts, name: value}) for name, value in (("step", "two"), ("step", -1), ("seconds", None))),
    ):
        state.write_bytes(content)
        refused("resume: ", *words, "--steps", "2", "--resume")
        assert state.read_bytes() == content and out.read_bytes() == before
        tally("damaged files of a run")
