"""`hpseg report`: what the page says of runs with and without labels, whole and interrupted, alone and compared."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import train_until, train_words
from tiny import DGCL, SMALL, paint

import hpseg
from hpseg.cli.main import main
from hpseg.inference.pictures import label_image
from hpseg.methods.hp import HiddenPositives
from hpseg.reporting.images import SMALLEST, embedded
from hpseg.reporting.page import MAX_BYTES, PICTURE_BYTES
from hpseg.reporting.scores import about
from hpseg.run.errors import UsageError

CPU = {"device": "cpu"}


class Page(HTMLParser):
    """Tags with their attributes, and the words between them by section."""

    def __init__(self, path):
        super().__init__()
        self.html, self.tags, self.words, self.section, self._inside = path.read_text(), [], {"": ""}, "", []
        self.feed(self.html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "section":
            self.section = dict(attributes)["id"]
            self.words[self.section] = ""
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if tag == "section":
            self.section = ""
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.words[self.section] += data

    def all(self, tag, **wanted):
        wanted = {name.rstrip("_"): value for name, value in wanted.items()}
        return [held for name, held in self.tags if name == tag and wanted.items() <= held.items()]


def report(run, *arguments, **options):
    return Page(hpseg.write_report(run, *arguments, **{**CPU, "n": 3, "overwrite": True, **options}))


@pytest.fixture(scope="module")
def scored(run, data, tmp_path_factory):
    """A run with eval.json about twelve labelled pictures, and the page about it."""
    out = shutil.copytree(run, tmp_path_factory.mktemp("scored") / "scored")
    assert main(["eval", str(out), str(data), "--device", "cpu"]) == 0
    return out


def test_without_labels(run, photos, tmp_path):
    page = report(run, out=tmp_path / "page.html")
    assert set(page.words) == {"", "photographs", "clusters", "training", "settings"}
    assert len(page.all("input", type="range")) == 3 == len(page.all("img", class_="picture"))
    shown = {image["alt"] for image in page.all("img", class_="picture")}
    assert len(shown) == 3 and shown <= {"a.jpg", "b.png", "c.JPG", "more/d.webp", "e.bmp"}
    assert "Hidden Positives sorted the patches of 5 photographs into 3 clusters" in page.words[""]
    assert "its share of 5 photographs" in page.words["clusters"]
    shares = [float(text) for text in re.findall(r"cluster \d([\d.]+) %", page.words["clusters"])]
    assert shares == sorted(shares, reverse=True) and 99 <= sum(shares) <= 101
    for term in ("loss", "contrastive", "cluster", "consistency"):
        assert term in page.words["training"]
    assert "--pool-size32 instead of 2048" in page.words["settings"].replace("\n", "")
    assert re.search(r"labels looked at\s*none in this run", page.words["settings"])
    assert str(photos) not in page.html and str(tmp_path) not in page.html  # no folders of this machine


def test_the_colours_are_those_of_the_label_maps(scored, tmp_path):
    page = report(scored, out=tmp_path / "page.html")
    key = hpseg.load(scored, device="cpu").key()
    chips = {
        (name.strip(), colour)
        for colour, name in re.findall(r'style="background: (#\w{6})"></span>([^<]+)<small>', page.html)
    }
    assert chips == {
        (key.names[cluster], "#{:02x}{:02x}{:02x}".format(*key.colours[3 * cluster :][:3]))
        for cluster in range(3)
        if key.names[cluster] in {name for name, _ in chips}
    }


def test_what_is_shown_is_what_predict_finds(run, photos, tmp_path):
    """The label map in the page, brought back to numbers, against `Segmenter.predict`; pictures are small enough to be
    shown at their own size."""
    page = report(run, out=tmp_path / "page.html", n=5)
    segmenter = hpseg.load(run, device="cpu")
    names = [image["alt"] for image in page.all("img", class_="picture")]
    maps = [image["src"] for image in page.all("img", class_="clusters")]
    assert len(names) == 5
    for name, uri in zip(names, maps, strict=True):
        assert uri.startswith("data:image/png;base64,")
        labels = np.array(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
        assert np.array_equal(labels, segmenter.predict(photos / name)), name


def test_with_labels(scored, data, tmp_path):
    results = json.loads((scored / "eval.json").read_text())
    page = report(scored, out=tmp_path / "page.html")
    words = " ".join(page.words["scores"].split())
    for method, title in (("trained", "trained head"), ("kmeans_features", "k-means, frozen features")):
        scores = results[method]
        assert f"{title} {scores['accuracy']:.1f} {scores['miou']:.1f}" in words
    ious = sorted(zip(results["trained"]["iou"], results["classes"], strict=True), reverse=True)
    assert " ".join(f"{name} {iou:.1f}" for iou, name in ious) in re.sub(r"(\d)([.]\d)(\d )", r"\1\2 \3", words)
    counts, matched = np.array(results["trained"]["confusion"]), results["trained"]["cluster_of"]
    for name, column, cluster in zip(results["classes"], counts.T, matched, strict=True):
        share = 100 * column[cluster] / column.sum()
        if share >= 10:
            assert f"{name}: {share:.0f} % found as {name}" in words
    assert "Best pictures" in words and "Worst pictures" in words
    accuracies = sorted(entry["accuracy"] for entry in results["pictures"])
    assert [f"{value:.1f}" for value in accuracies[:-5:-1] + accuracies[:4]] == re.findall(
        r"([\d.]+) % accuracy", words
    )
    assert "more/d.webp" in report(scored, n=5).words["photographs"]  # training photographs, as DATA was not given


def test_data_that_was_not_scored_yet_is_scored(run, data, tmp_path):
    out = shutil.copytree(run, tmp_path / "run")
    page = report(out, data)
    assert json.loads((out / "eval.json").read_text())["data"] == str(data) and "scores" in page.words
    before = (out / "eval.json").stat().st_mtime_ns
    report(out, data)
    assert (out / "eval.json").stat().st_mtime_ns == before  # once is enough


def test_scores_on_other_data_are_for_the_page_alone(scored, data, tmp_path):
    out, other = shutil.copytree(scored, tmp_path / "run"), tmp_path / "other"
    shutil.copytree(data, other)
    (other / "classes.json").write_text('["rock", "scissors", "paper"]')
    before = {name: (out / name).read_bytes() for name in ("eval.json", "labels.json")}
    page = report(out, other)
    assert "labelled pictures of other" in page.words["scores"] and "rock" in page.words["scores"]
    assert "rock" in page.words["clusters"] + page.words["photographs"]  # by the match on the same data
    assert {name: (out / name).read_bytes() for name in before} == before
    assert "rock" not in report(out).html


def test_scores_by_an_older_version(scored, data, tmp_path):
    """They have no counts: what is asked for is counted anew, and the file stays as it is."""
    out = shutil.copytree(scored, tmp_path / "run")
    old = json.loads((out / "eval.json").read_text())
    for name in ("trained", "kmeans_features"):
        del old[name]["confusion"]
    (out / "eval.json").write_text(json.dumps(old))
    assert "Confusion matrix" not in report(out).words["scores"]
    assert "Confusion matrix" in report(out, data).words["scores"]
    assert json.loads((out / "eval.json").read_text()) == old


def test_photographs_without_labels(run, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    paint(40, 400, 0).save(folder / "tall.png")
    paint(400, 40, 1).save(folder / "wide.png")
    (folder / "broken.jpg").write_bytes(b"no")
    page = report(run, folder, out=tmp_path / "page.html", n=60)
    assert [image["alt"] for image in page.all("img", class_="picture")] == ["tall.png", "wide.png"]
    assert "scores" not in page.words


def test_odd_names_are_words_and_nothing_else(scored, tmp_path):
    odd = '<script>alert("1")</script> & \'"{{ 7 * 7 }}'
    run = shutil.copytree(scored, tmp_path / "<b>run & 'co'")
    for name in ("eval.json", "labels.json"):
        text = (run / name).read_text()
        (run / name).write_text(text.replace('"0"', json.dumps(odd)))
    folder = tmp_path / "odd"
    folder.mkdir()
    paint(40, 40, 0).save(folder / "<img src=x onerror=alert(1)>.png")
    page = report(run, folder, out=tmp_path / "page.html")
    assert len(page.all("script")) == 2  # the numbers of the curves, and the page's own
    assert {image["alt"] for image in page.all("img", class_="picture")} == {"<img src=x onerror=alert(1)>.png"}
    assert not any("onerror" in held or held.get("src") == "x" for _, held in page.tags)
    assert odd in page.words["scores"] and odd in page.words["clusters"] and "<b>run & 'co'" in page.words[""]


def test_nothing_from_elsewhere(scored, data, tmp_path):
    page = report(scored, data, out=tmp_path / "page.html", compare=scored)
    for tag, held in page.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset", "xlink:href"):
            assert name not in held or held[name].startswith(("data:image/", "#")), (tag, held)
    assert not re.search(r"https?://|@import|url\((?!#)", re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page.html))
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'; img-src data:;") and "script-src 'sha256-" in policy


def noise(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_a_page_of_the_worst_pictures_fits_into_a_mail(scored, tmp_path):
    """Noise is what takes most room."""
    folder = tmp_path / "noise"
    folder.mkdir()
    for number in range(6):
        noise(750, 500, number).save(folder / f"{number}.jpg", quality=50)
    path = hpseg.write_report(scored, folder, out=tmp_path / "page.html", n=6, seconds=0, compare=scored, **CPU)
    uris = re.findall(r'src="(data:[^"]+)"', path.read_text())
    assert sum(len(uri) for uri in dict.fromkeys(uris)) < PICTURE_BYTES
    assert 200_000 < path.stat().st_size < MAX_BYTES


@pytest.mark.parametrize("most", [200_000, 20_000, 2_000, 500])
def test_a_picture_takes_no_more_room_than_it_may(most):
    labels = label_image(np.random.default_rng(0).integers(0, 256, (400, 600), np.uint8))
    for picture in (noise(600, 400, 0), labels, paint(600, 400, 0)):
        shown = embedded(picture, 500, most)
        assert len(shown.uri) <= most or max(shown.width, shown.height) == SMALLEST
        assert shown.width <= 500 and shown.height <= 500
        opened = Image.open(io.BytesIO(base64.b64decode(shown.uri.partition(",")[2])))
        assert opened.size == (shown.width, shown.height) and (opened.mode == "P") == (picture.mode == "P")
    assert embedded(paint(60, 40, 0), 500, 10**6)[1:] == (60, 40)  # nothing is enlarged


def test_a_run_that_learns_classes(data, vit_file, tmp_path):
    hpseg.train(data, tmp_path / "run", weights=vit_file, steps=2, **DGCL)
    page = report(tmp_path / "run", data)
    assert "into 3 classes" in page.words[""] and "Labels were trained on: 1/4." in page.words[""]
    assert page.words["clusters"].lstrip().startswith("Classes") and "matched" not in page.words["scores"]
    assert "labels looked at" not in page.words["settings"]


def test_an_interrupted_run(photos, vit_file, tmp_path):
    out = tmp_path / "cut"
    train_until(7, HiddenPositives, photos, out, weights=vit_file, steps=20, save_every=5, **SMALL)
    with open(out / "log.csv", "a") as file:
        file.write("6,not a number,,\n7,1.")  # the last line of a run that was killed
    page = report(out)
    assert set(page.words) == {"", "training", "settings"}
    assert re.search(r"This run is not finished: \d+ of 20 steps are logged", page.words[""])
    assert main(["report", str(out)]) == 0


def test_what_is_missing_is_left_out(run, photos, tmp_path):
    out = shutil.copytree(run, tmp_path / "run")
    (out / "log.csv").unlink()
    (out / "results.json").unlink()
    assert set(report(out).words) == {"", "photographs", "clusters", "settings"}
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "images": str(tmp_path / "gone")}))
    page = report(out)
    assert set(page.words) == {"", "settings"} and "are not where they were" in page.words[""]
    assert "photographs" in report(out, photos).words


def test_two_runs_side_by_side(scored, photos, vit_file, data, tmp_path):
    other = tmp_path / "other"
    hpseg.train(photos, other, weights=vit_file, steps=5, **{**SMALL, "classes": 4, "seed": 1})
    page = report(scored, compare=other, out=tmp_path / "page.html")
    assert len(page.all("input", type="range")) == 3 and len(page.all("img", class_="clusters")) == 6
    assert len(page.all("path", class_="smooth run1")) == len(page.all("path", class_="smooth run0"))
    assert "other has no scores on these pictures" in page.words["scores"]
    assert "scored and other" in " ".join(page.words[""].split())
    assert len(page.all("svg", class_="matrix run0")) == 1 and not page.all("svg", class_="matrix run1")
    assert [held["value"] for held in page.all("input", name="run of the clusters")] == ["0", "1"]
    assert "Those of scored." in page.words["clusters"] and "Those of other." in page.words["clusters"]
    both = report(scored, data, compare=other, out=tmp_path / "page.html")
    assert [held["data-run"] for _, held in both.tags if "data-run" in held] == ["0", "1"] * 2
    theirs = json.loads((other / "eval.json").read_text())["trained"]
    assert len(both.all("svg", class_="matrix run0")) == len(both.all("svg", class_="matrix run1")) == 1
    assert f"{theirs['miou']:.1f}" in both.words["scores"] and "other, trained head" in both.words["scores"]


def test_mistakes_are_named(run, photos, tmp_path):
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    for folder, options, text in (
        (tmp_path, {}, "holds no config.json; expected a folder made by `hpseg train`"),
        (run, {"compare": tmp_path}, "holds no config.json"),
        (run, {"out": mine}, "mine.html is already there; pass --overwrite"),
        (run, {"out": tmp_path / "page.pdf"}, "out: expected a name that ends in .html"),
        (run, {"out": mine / "page.html"}, "is a file, expected a folder"),
        (run, {"n": 0}, "n: expected 1 to 60 photographs, got 0"),
        (run, {"n": 61}, "n: expected 1 to 60 photographs, got 61"),
        (run, {"data": tmp_path / "none"}, "data: expected a folder or one of cocostuff, "),
        (run, {"data": "cityscapes"}, "root: expected the folder of cityscapes"),
    ):
        with pytest.raises(UsageError, match=re.escape(text)):
            hpseg.write_report(folder, **{**CPU, "out": tmp_path / "page.html", **options})
    assert mine.read_text() == "mine" and not (tmp_path / "page.html").exists()


def test_scores_are_about_a_split_and_a_void():
    named = {"data": "cityscapes", "split": "val", "void": 255}
    assert about(named, "cityscapes", "val") and not about(named, "cityscapes", "train")
    folder = {"data": "somewhere", "split": "val", "void": 255}
    assert about(folder, Path("somewhere").resolve()) and not about(folder, "somewhere", void=0)
    assert not about({}, "somewhere") and not about({"data": "somewhere"}, "somewhere")  # an older version's


def test_train_and_eval_leave_the_page(photos, vit_file, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(train_words(photos, out, vit_file)) == 0
    assert not (out / "report.html").exists()
    words = [word for word in train_words(photos, out, vit_file) if word != "--no-report"]
    assert main([*words, "--overwrite"]) == 0
    assert f"the page about it is {out / 'report.html'}" in capsys.readouterr().err.splitlines()
    before = (out / "report.html").read_bytes()
    assert b'id="scores"' not in before
    assert main([*words, "--resume"]) == 0
    assert main(["eval", str(out), str(data), "--device", "cpu", "--no-report"]) == 0
    assert b'id="scores"' not in (out / "report.html").read_bytes()
    assert main(["eval", str(out), str(data), "--device", "cpu"]) == 0
    assert b'id="scores"' in (out / "report.html").read_bytes()
    hpseg.train(photos, out, weights=vit_file, steps=2, overwrite=True, **SMALL)
    assert not (out / "report.html").exists()  # of the old model


def test_a_run_outlives_its_page(photos, vit_file, tmp_path, monkeypatch, capsys):
    def fails(*arguments, **options):
        raise OSError(28, "No space left on device")

    words = [word for word in train_words(photos, tmp_path / "run", vit_file) if word != "--no-report"]
    monkeypatch.setattr("hpseg.reporting.report.write_atomically", fails)
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "no page about the run was written" in said and "No space left on device" in said and "Traceback" not in said
    assert (tmp_path / "run" / "results.json").is_file() and not (tmp_path / "run" / "report.html").exists()


def test_the_first_rank_alone_writes_it(run, tmp_path, monkeypatch):
    from hpseg.cli.report import leave_page

    out = shutil.copytree(run, tmp_path / "run")
    monkeypatch.setenv("RANK", "1")
    leave_page(out, device="cpu")
    assert not (out / "report.html").exists()
    monkeypatch.setenv("RANK", "0")
    leave_page(out, device="cpu")
    assert (out / "report.html").exists()


def test_cached_features_are_used(photos, vit_file, tmp_path, monkeypatch):
    out = tmp_path / "run"
    settings = {**SMALL, "consistency_weight": 0.0, "cache_features": True, "predict_size": 32}
    hpseg.train(photos, out, weights=vit_file, steps=4, **settings)
    cached = report(out, n=1)
    assert "its share of 5 photographs" in cached.words["clusters"]
    shutil.rmtree(out / "features")
    computed = report(out, n=1)
    assert computed.words["clusters"] == cached.words["clusters"]
    looks = [len(page.all("img")) for page in (cached, computed)]
    assert looks[0] == looks[1]
