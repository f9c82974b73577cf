"""Parts of a page: curves, the confusion matrix, the choice of patches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import paint

from hpseg.data.transforms import load_image
from hpseg.reporting.curves import HEIGHT, POINTS, WIDTH, charts, read_log, smoothed, text_of, ticks
from hpseg.reporting.gallery import APART, Patch, Seen, crop
from hpseg.reporting.page import share
from hpseg.reporting.photographs import Photographs, scattered
from hpseg.reporting.scores import VISIBLE, bars, matrix


def test_a_log_is_read_as_far_as_it_goes(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss,aux,seconds\n0,2.5,,1\n1,nan,0.5,2\n2,1.5,0.25,3\n3,1.2")
    log = read_log(path)
    assert {name: (steps.tolist(), values.tolist()) for name, (steps, values) in log.items()} == {
        "step": ([0, 1, 2], [0, 1, 2]),
        "loss": ([0, 2], [2.5, 1.5]),
        "aux": ([1, 2], [0.5, 0.25]),
        "seconds": ([0, 1, 2], [1, 2, 3]),
    }
    for content in (b"", b"step,loss\n", b"\xff\x00\n", b'"'):
        path.write_bytes(content)
        assert charts([read_log(path)]) == []
    assert read_log(tmp_path / "none.csv") == {}


def test_lines_stay_on_the_chart_and_say_where_they_end():
    steps = np.arange(1000)
    log = {"loss": (steps, np.where(steps == 500, 1e6, np.cos(steps / 100))), "seconds": (steps, 1.0 * steps)}
    log |= {"lambda": (steps, 0.0 * steps), "self": (steps, 1.0 + 0 * steps), "seconds_data": (steps, 1.0 * steps)}
    (chart,) = charts([log])
    assert chart.name == "loss" and len(chart.lines[0].steps) == POINTS == len(chart.lines[0].places)
    inside = [(0 <= x <= WIDTH and 0 <= y <= HEIGHT) for x, y in chart.lines[0].places]
    assert sum(inside) > POINTS - 15  # all but those around the lone outlier
    assert {text for _, text in chart.up} <= {"-1", "-0.5", "0", "0.5", "1", "1.5", "2", "2.5", "3"}
    assert [text for _, text in chart.across] == ["0", "200", "400", "600", "800"]
    assert float(chart.lines[0].last) == pytest.approx(np.cos(9.98), abs=0.02)
    one = charts([{"loss": (np.array([0]), np.array([3.0]))}, {"loss": (steps, 1.0 * steps)}, {}])
    assert [line.run for line in one[0].lines] == [0, 1] and charts([{}]) == []


def test_smoothing_keeps_what_is_straight():
    line = 3.0 - 2.0 * np.arange(200)
    assert np.allclose(smoothed(line), line)
    noise = np.random.default_rng(0).normal(size=200)
    assert smoothed(noise)[20:-20].std() < noise.std() / 2
    assert smoothed(np.array([1.0, 5.0])).tolist() == [1.0, 5.0]


def test_numbers_as_people_write_them():
    for value, text in ((0, "0"), (13.6, "13.6"), (0.5, "0.5"), (-0.0269, "-0.0269"), (12345.6, "12346")):
        assert text_of(value) == text
    assert text_of(2.5e-5) == "2.5e-5" and text_of(1.2e6) == "1.2e6" and text_of(1.0) == "1"
    assert ticks(0, 199, 5) == [0, 50, 100, 150] and ticks(-0.37, 1.1, 4) == [0, 0.5, 1.0] and ticks(2, 2, 4) == [2]
    assert [share(value) for value in (0, 0.0004, 0.012, 0.0994, 0.3333, 1)] == [
        *("0.0 %", "< 0.1 %", "1.2 %", "9.9 %", "33 %", "100 %")
    ]


def test_the_matrix_is_the_confusion_after_matching():
    """Four clusters, three classes that occur, a class without a cluster."""
    counts = [[10, 0, 0, 5], [0, 80, 0, 5], [90, 0, 0, 0], [0, 20, 0, 0]]
    trained = {"confusion": counts, "cluster_of": [2, 1, 3, -1], "iou": [90, 76.2, float("nan"), 0]}
    results = {"classes": ["a", "b", "absent", "d"], "trained": trained}
    found = matrix(results)
    assert found.names == ["a", "b", "d"] and found.columns == ["a", "b", "d", "others"]
    assert {(cell.row, cell.column): cell.share for cell in found.cells} == {
        **{(0, 0): 0.9, (0, 3): 0.1},
        **{(1, 1): 0.8, (1, 3): 0.2},
        **{(2, 1): 0.5, (2, 3): 0.5},
    }
    assert [(bar.name, bar.values) for bar in bars([results])] == [
        *(("a", [90]), ("b", [76.2]), ("d", [0])),
        ("absent", [None]),
    ]
    del trained["confusion"]
    assert matrix(results) is None


def test_of_many_classes_the_largest_are_in_the_matrix():
    counts = np.diag(np.arange(1, 151))
    found = matrix(
        {
            "classes": [f"c{i}" for i in range(150)],
            "trained": {"confusion": counts.tolist(), "cluster_of": list(range(150))},
        }
    )
    assert found.names == [f"c{i}" for i in range(102, 150)] and found.left_out == 102
    assert len(found.cells) == 48 and all(cell.share == 1 > VISIBLE for cell in found.cells)


def test_typical_patches_are_the_nearest_and_from_many_photographs():
    seen = Seen(2)
    for number in range(4):
        likeness = torch.zeros(2, 20, 20)
        likeness[0, 3, 3], likeness[0, 3, 4], likeness[0, 15, 15] = 0.9 - number / 100, 0.8, 0.5
        likeness[1] = 0.1
        seen.add(Path(f"{number}.png"), likeness)
    assert seen.photographs == 4 and seen.patches.tolist() == [4 * 3, 4 * 397]
    best = seen.best(0, 6)
    assert [patch.path.stem for patch in best[:4]] == ["0", "1", "2", "3"]  # before a second of any
    assert [patch.likeness for patch in best] == pytest.approx([0.9, 0.89, 0.88, 0.87, 0.5, 0.5])
    assert (best[0].y, best[0].x) == (3.5 / 20, 3.5 / 20) and best[4].y == 15.5 / 20 and 15 - 3 > APART


def test_a_crop_lies_around_its_patch_and_inside_of_the_picture():
    picture = paint(200, 100, 0)
    assert crop(picture, Patch(1.0, Path(), 0.5, 0.5)).size == (24, 24)
    middle = np.asarray(crop(picture, Patch(1.0, Path(), 0.5, 0.25)))
    assert np.array_equal(middle, np.asarray(picture)[38:62, 38:62])
    corner = np.asarray(crop(picture, Patch(1.0, Path(), 0.99, 0.0)))
    assert np.array_equal(corner, np.asarray(picture)[76:, :24])
    assert crop(paint(9, 5, 0), Patch(1.0, Path(), 0.5, 0.5)).size == (5, 5)


def test_photographs_are_spread_over_the_files(tmp_path):
    assert sorted(scattered(10)) == list(range(10)) and max(scattered(100)[:3]) - min(scattered(100)[:3]) > 30
    files = [tmp_path / f"{number}.png" for number in range(8)]
    for number, file in enumerate(files):
        paint(20, 20, number).save(file)
    photographs = Photographs(files, load_image, tmp_path)
    assert sorted(path.name for path, _ in photographs.spread(4)) == ["0.png", "2.png", "4.png", "6.png"]
    files[4].write_bytes(b"no")
    assert len({path for path, _ in photographs.spread(4)}) == 4 and len(list(photographs.spread(60))) == 7
    assert photographs.name(tmp_path / "deep" / "a.png") == "deep/a.png" and photographs.name(Path("/b.png")) == "b.png"
