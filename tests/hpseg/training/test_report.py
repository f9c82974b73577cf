"""What a run reports while it trains: stage times, previews, TensorBoard, and a checkpoint chosen by labels."""

import csv
import json
import sys
import time
import types
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_same, state_of
from safetensors.torch import load_file
from tiny import SMALL, paint

import hpseg
from hpseg.inference.segmenter import assemble
from hpseg.run.errors import UsageError
from hpseg.run.folder import Log
from hpseg.runtime import profile
from hpseg.runtime.profile import STAGES, Profile, each, stage

STAGE_COLUMNS = [f"seconds_{name}" for name in STAGES]


def rows_of(run):
    with open(run / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def previews_of(run):
    return sorted(path.name for path in (run / "preview").iterdir())


# -- Profile ----------------------------------------------------------------------------------------------------------


def test_a_stage_has_its_own_time_and_not_that_of_stages_inside(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def spend(seconds):
        clock[0] += seconds

    with Profile(torch.device("cpu")) as running:
        spend(100)
        running.restart()
        spend(1)
        with stage("head"):
            spend(2)
            with stage("loss"):
                spend(4)
            spend(8)
        with stage("periodic"):
            spend(16)
            with stage("backbone"):
                spend(32)
        for _ in each("data", iter([spend(0), None])):
            spend(64)
        seconds = running.step()
    assert seconds == dict.fromkeys(STAGES, 0.0) | {"other": 1 + 2 * 64, "head": 10, "loss": 4, "periodic": 48}
    assert sum(seconds.values()) == clock[0] - 100
    assert profile._running is None
    with stage("head"):  # nothing runs, so nothing is charged
        spend(1)
    assert running.step()["head"] == 0


def test_the_table_leaves_the_first_steps_out_and_adds_up_search_and_loss():
    running = Profile(torch.device("cpu"))
    zeros = dict.fromkeys(STAGES, 0.0)
    step = zeros | {"backbone": 0.006, "search": 0.001, "loss": 0.001, "loss_gradient": 0.002}
    running.steps = [zeros | {"data": 9.0}] * profile.WARM_UP + [step] * 3
    summary = running.summary()
    assert summary["search and loss"]["median_ms"] == pytest.approx(4)
    assert summary["step"]["median_ms"] == pytest.approx(10) and summary["data"]["mean_ms"] == 0
    line = next(line for line in running.table().splitlines() if line.startswith("search and loss"))
    assert "40.0%" in line


def test_a_failure_ends_the_profile(photos, vit_file, tmp_path, monkeypatch):
    monkeypatch.setattr("hpseg.training.loop.save_state", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hpseg.train(photos, tmp_path / "run", weights=vit_file, steps=2, profile=True, **SMALL)
    assert profile._running is None


def test_profiled_run(run, photos, vit_file, tmp_path, news):
    settings = {**SMALL, "weights": vit_file, "quiet": False}
    results = hpseg.train(photos, tmp_path / "run", steps=20, profile=True, **settings)
    assert any("search and loss" in line for line in news())
    assert set(STAGES) < set(results["profile"])
    assert json.loads((tmp_path / "run" / "results.json").read_text())["profile"] == results["profile"]
    rows = rows_of(tmp_path / "run")
    for row in rows[1:]:
        seconds = {name: float(row[f"seconds_{name}"]) for name in STAGES}
        busy = ("data", "backbone", "head", "search", "loss", "loss_gradient", "backward", "optimizer")
        assert all(seconds[name] > 0 for name in busy), seconds
    # Stages add up to the time of the steps, up to what a logged number is rounded by.
    whole = sum(float(row[name]) for row in rows[1:] for name in STAGE_COLUMNS)
    assert whole == pytest.approx(float(rows[-1]["seconds"]) - float(rows[0]["seconds"]), abs=0.1)
    assert_same(state_of(run), state_of(tmp_path / "run"))  # looking changes nothing
    assert not set(STAGE_COLUMNS) & set(rows_of(run)[0])


def test_profile_on_the_command_line(photos, vit_file, tmp_path, capsys):
    from hpseg.cli.main import main

    command = ["train", photos, "--out", tmp_path / "run", "--weights", vit_file, "--classes", 3, "--steps", 3]
    options = ["--batch-size", 2, "--size", 32, "--predict-size", 32, "--dim", 8, "--pool-size", 16, "--workers", 0]
    assert main([str(word) for word in [*command, *options, "--profile", "--preview-every", 2, "--device", "cpu"]]) == 0
    assert "search and loss" in capsys.readouterr().err
    assert previews_of(tmp_path / "run") == ["step_000002.png", "step_000003.png"]
    # Pools are renewed every 50 steps: the first preview is all that is periodic, and counts for the step after it.
    first, _, last = (float(row["seconds_periodic"]) for row in rows_of(tmp_path / "run"))
    assert first == 0 and last > 0.001


def test_profiled_run_of_stego(photos, vit_file, tmp_path):
    settings = {**SMALL, "weights": vit_file, "preset": "stego-small", "neighbors": 2, "steps": 3}
    hpseg.train(photos, tmp_path / "run", profile=True, **settings)
    assert all(float(row["seconds_loss"]) > 0 for row in rows_of(tmp_path / "run"))


def test_stage_times_survive_a_resumption_without_profile(tmp_path):
    path, row = tmp_path / "log.csv", {"step": 0, "loss": 1.5, "seconds_data": 0.25}
    log = Log(path, 0, ("cluster",), ["seconds_data"])
    log.write(row)
    log.write({**row, "step": 1})
    log.close()
    log = Log(path, 1, ("cluster",))
    log.write({"step": 1, "loss": 2.5})
    log.close()
    first, second = rows_of(tmp_path)
    assert first["seconds_data"] == "0.25" and second["seconds_data"] == "" and second["loss"] == "2.5"


# -- Data: one decode, two views --------------------------------------------------------------------------------------


def test_a_picture_is_decoded_once_for_both_views(photos):
    from hpseg.data.folder import PhotoFolder, find_images
    from hpseg.data.transforms import load_image

    decoded = []

    def read(path):
        decoded.append(path)
        return load_image(path)

    dataset = PhotoFolder(find_images(photos), 32, "random", 0, True, read)
    view, twin, _ = dataset[0, 3]
    assert view.shape == twin.shape == (3, 32, 32) and not torch.equal(view, twin)
    assert decoded == [dataset.files[3]]


# -- Previews ---------------------------------------------------------------------------------------------------------


def test_previews_show_the_clusters_and_change_nothing(run, photos, vit_file, tmp_path):
    settings = {**SMALL, "weights": vit_file}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    hpseg.train(photos, tmp_path / "run", steps=20, preview_every=8, **settings)
    assert torch.equal(torch.rand(3), expected)
    hpseg.train(photos, tmp_path / "without", steps=20, preview_every=0, **settings)
    assert not (tmp_path / "without" / "preview").exists()
    for other in (run, tmp_path / "without"):
        assert_same(state_of(tmp_path / "run"), state_of(other))
        assert_same(load_file(tmp_path / "run" / "model.safetensors"), load_file(other / "model.safetensors"))
    assert previews_of(tmp_path / "run") == ["step_000008.png", "step_000016.png", "step_000020.png"]
    assert previews_of(run) == ["step_000020.png"]
    last, same = (Image.open(folder / "preview" / "step_000020.png") for folder in (tmp_path / "run", run))
    assert last.tobytes() == same.tobytes()


def test_the_last_preview_is_what_predict_gives(run, photos):
    from hpseg.data.transforms import load_image, short_side
    from hpseg.inference.pictures import GAP, fitted_map, label_image

    segmenter = hpseg.load(run)
    picture = short_side(load_image(sorted(photos.rglob("*.*"))[0]), segmenter.config.predict_size, 8)
    colours = np.asarray(label_image(fitted_map(segmenter.predict(picture), 160)).convert("RGB"))
    sheet = np.asarray(Image.open(run / "preview" / "step_000020.png"))
    rows, columns = colours.shape[:2]
    below, places = GAP + 160 + GAP, range(sheet.shape[1] - columns)  # below the photograph
    assert any(np.array_equal(sheet[below : below + rows, x : x + columns], colours) for x in places)


def test_previews_after_kmeans_show_its_centroids(photos, vit_file, tmp_path, monkeypatch):
    seen, settings = [], {**SMALL, "weights": vit_file, "clusters": "kmeans"}

    def watched(backbone, tensors, config):
        seen.append(tensors["clusters.centroids"].clone())
        return assemble(backbone, tensors, config)

    monkeypatch.setattr("hpseg.training.report.assemble", watched)
    hpseg.train(photos, tmp_path / "run", steps=4, preview_every=2, **settings)
    final = load_file(tmp_path / "run" / "model.safetensors")["clusters.centroids"]
    assert len(seen) == 2 and torch.equal(seen[1], final) and not torch.equal(seen[0], final)


def test_unreadable_pictures_are_passed_over(tmp_path):
    from hpseg.data.transforms import load_image
    from hpseg.training.preview import Previews

    files = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(files):
        paint(60, 50, i).save(path)
    files[0].write_bytes(b"not a picture")
    assert len(Previews(tmp_path, files, load_image, 32, 8).pictures) == 4
    assert len(Previews(tmp_path, files[:2], load_image, 32, 8).pictures) == 1
    assert Previews(tmp_path, files[:1], load_image, 32, 8).write(1, None) is None
    paint(400, 30, 9).save(files[0])
    assert Previews(tmp_path, files[:1], load_image, 32, 8).pictures[0].size == (64, 32)


def test_overwrite_and_resume_leave_the_users_files_alone(photos, vit_file, tmp_path):
    out, settings = tmp_path / "run", {**SMALL, "weights": vit_file}
    hpseg.train(photos, out, steps=4, preview_every=1, **settings)
    (out / "preview" / "favourite.png").write_text("kept")
    hpseg.train(photos, out, steps=4, preview_every=1, resume=True, **settings)
    assert len(previews_of(out)) == 5
    hpseg.train(photos, out, steps=2, preview_every=1, overwrite=True, **settings)
    assert previews_of(out) == ["favourite.png", "step_000001.png", "step_000002.png"]
    assert (out / "preview" / "favourite.png").read_text() == "kept"
    (out / "preview" / "favourite.png").unlink()
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "preview").write_text("a file")
    with pytest.raises(UsageError, match="preview is a file, expected a folder"):
        hpseg.train(photos, tmp_path / "file", steps=2, overwrite=True, **settings)
    hpseg.train(photos, out, steps=2, preview_every=0, overwrite=True, **settings)
    assert not (out / "preview").exists()


# -- TensorBoard ------------------------------------------------------------------------------------------------------


class StubWriter:
    made: ClassVar[list] = []

    def __init__(self, folder, **options):
        self.folder, self.options, self.scalars, self.images, self.closed = folder, options, [], [], False
        StubWriter.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def add_image(self, name, picture, step, dataformats):
        assert picture.dtype == np.uint8 and picture.ndim == 3 and dataformats == "HWC"
        self.images.append((name, step))

    def flush(self):
        pass

    def close(self):
        self.closed = True


def test_tensorboard_gets_what_the_log_gets(photos, vit_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=StubWriter))
    StubWriter.made = []
    hpseg.train(photos, tmp_path / "run", steps=3, tensorboard=True, preview_every=2, **{**SMALL, "weights": vit_file})
    (writer,) = StubWriter.made
    assert writer.folder == str(tmp_path / "run" / "tensorboard") and writer.options["purge_step"] == 0
    assert writer.closed
    rows = rows_of(tmp_path / "run")
    for name in rows[0].keys() - {"step"}:
        values = [value for of, value, _ in writer.scalars if of == name]
        assert [f"{value:.6g}" for value in values] == [row[name] for row in rows], name
    assert writer.images == [("preview", 2), ("preview", 3)]


def test_tensorboard_files_can_be_read_back(photos, vit_file, tmp_path):
    pytest.importorskip("tensorboard", reason='tensorboard is not installed: pip install ".[tensorboard]"')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, settings = tmp_path / "run", {**SMALL, "weights": vit_file, "tensorboard": True}
    hpseg.train(photos, out, steps=3, **settings)
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2]
    assert [event.step for event in events.Images("preview")] == [3]
    (out / "tensorboard" / "mine.txt").write_text("kept")
    hpseg.train(photos, out, steps=2, overwrite=True, **{**settings, "tensorboard": False})
    assert [path.name for path in (out / "tensorboard").iterdir()] == ["mine.txt"]


def test_tensorboard_without_the_package(photos, vit_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r'tensorboard: .*pip install "hpkernels\[tensorboard\]"'):
        hpseg.train(photos, tmp_path / "run", steps=2, tensorboard=True, **{**SMALL, "weights": vit_file})
    assert not (tmp_path / "run").exists()


# -- A checkpoint chosen by labels ------------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path):
    root = tmp_path / "labelled"
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for i in range(3):
        paint(56, 48, i).save(root / "images" / f"{i}.png")
        Image.fromarray(np.random.default_rng(i).integers(0, 3, (48, 56), np.uint8)).save(root / "labels" / f"{i}.png")
    return root


def fake_scores(monkeypatch, scores):
    left = iter(scores)
    monkeypatch.setattr("hpseg.training.selection.mean_iou", lambda *_: next(left))


@pytest.mark.parametrize("clusters", ["probe", "kmeans"])
def test_the_best_on_labels_is_kept_and_said(photos, vit_file, labelled, tmp_path, monkeypatch, news, clusters):
    settings = {**SMALL, "weights": vit_file, "clusters": clusters, "lambda_warmup": 100}
    fake_scores(monkeypatch, [10.0, 30.0, 30.0, 20.0])
    out = tmp_path / "run"
    results = hpseg.train(photos, out, steps=7, select_every=2, select_on_labels=labelled, **settings)
    assert (results["selected_step"], results["selected_miou"]) == (4, 30.0)
    assert "best of 4" in results["selection"]
    assert "Labels chose this checkpoint" in results["selection"] and str(labelled) in results["selection"]
    # The kept one is what a run without labels gives that ends there (no step knows how many will follow).
    hpseg.train(photos, tmp_path / "short", steps=4, **settings)
    kept, short = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "short"))
    assert_same(kept, short)
    assert_same(state_of(out)["selection"]["tensors"], kept)
    news()
    hpseg.load(out)
    assert f"Labels chose this checkpoint: the one of highest mIoU on {labelled}" in "".join(news())
    hpseg.load(tmp_path / "short")
    assert news() == []


def test_selection_goes_on_after_an_interruption(photos, vit_file, labelled, tmp_path, monkeypatch):
    settings = {**SMALL, "weights": vit_file, "steps": 6, "save_every": 2}
    settings |= {"select_on_labels": labelled, "select_every": 2}
    fake_scores(monkeypatch, [30.0, 10.0])

    class Stop(Exception):
        pass

    def stop_after_four(out, state, save=hpseg.run.folder.save_state):
        save(out, state)
        if state["step"] == 4:
            raise Stop

    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr("hpseg.training.loop.save_state", stop_after_four)
        hpseg.train(photos, tmp_path / "run", **settings)
    fake_scores(monkeypatch, [20.0])
    results = hpseg.train(photos, tmp_path / "run", resume=True, **settings)
    assert (results["selected_step"], results["selected_miou"]) == (2, 30.0)
    assert "the best of 3" in results["selection"]
    with pytest.raises(UsageError, match="select_every: .* started with 2, got 3"):
        hpseg.train(photos, tmp_path / "run", resume=True, **{**settings, "select_every": 3})


def test_the_score_is_that_of_eval(photos, vit_file, labelled, tmp_path):
    from hpseg.evaluation.evaluate import evaluate, format_table

    out = tmp_path / "run"
    results = hpseg.train(photos, out, steps=3, select_on_labels=labelled, **{**SMALL, "weights": vit_file})
    scores = evaluate(out, labelled, device="cpu")
    assert scores["trained"]["miou"] == pytest.approx(results["selected_miou"], rel=1e-12)
    assert "Labels chose this checkpoint" in scores["labels_used"]
    assert "Labels chose this checkpoint" in format_table(scores)


def test_eval_of_a_run_without_labels_says_nothing(run, labelled, scored_run):
    from hpseg.evaluation.evaluate import evaluate, format_table

    scores = evaluate(scored_run, labelled, device="cpu")
    assert scores["labels_used"] is None and "abels chose" not in format_table(scores)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"select_on_labels": "nowhere"}, "expected folders images/ and labels/ in .*nowhere"),
        ({"select_on_labels": "voc"}, "root: expected the folder of voc"),
        ({"select_root": "somewhere"}, "select_root: expected select_on_labels with it"),
        ({"select_every": 0}, "select_every: expected at least 1, got 0"),
        ({"preview_every": -1}, "preview_every: expected at least 0, got -1"),
    ],
)
def test_settings_that_cannot_be(photos, vit_file, tmp_path, setting, message):
    with pytest.raises(UsageError, match=message):
        hpseg.train(photos, tmp_path / "run", **{"weights": vit_file, **SMALL, **setting})
    assert not (tmp_path / "run").exists()
