"""Long work says how far it is, and how long everything took is known."""

from __future__ import annotations

import itertools
import json
import re
import time

import pytest
from runs import train_words

from hpseg.cli.main import main
from hpseg.runtime import messages
from hpseg.runtime.messages import Stopwatch, commanded, muted, progress, waiting


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves by `clock.step` seconds whenever it is read."""

    class Clock:
        now, step = 100.0, 0.0

        def perf_counter(self):
            self.now += self.step
            return self.now

    made = Clock()
    monkeypatch.setattr(messages, "time", made)
    return made


def test_lines_off_a_terminal_come_at_first_every_two_seconds_and_then_less_often(clock, news):
    times, said = [], 0
    for _ in progress(range(1000), "work", 1000):
        clock.now += 0.5
        lines = news()
        times += [clock.now] * len(lines)
        said += len(lines)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert gaps[:8] == [2.0] * 8 and gaps == sorted(gaps) and 40 <= gaps[-1] <= 50
    assert 30 < said < 60


def test_a_line_says_how_far_and_how_long_still(clock, news):
    for _ in progress(range(8), "work", 8):
        clock.now += 1.5
    assert news() == ["work: 2 of 8, 9 s left", "work: 4 of 8, 6 s left", "work: 6 of 8, 3 s left"]


def test_quick_work_and_muted_work_say_nothing(clock, news):
    assert list(progress(iter("abc"), "work", 3)) == ["a", "b", "c"] and news() == []
    with muted(True), waiting("silence"):
        for _ in progress(range(8), "work", 8):
            clock.now += 10
    assert news() == []


def test_what_cannot_tell_how_far_it_is_tells_its_seconds(news, monkeypatch):
    monkeypatch.setattr(messages, "LINE_SECONDS", 0.05)
    monkeypatch.setattr(messages, "BAR_SECONDS", 0.01)
    with waiting("k-means"):
        deadline = time.perf_counter() + 20
        while not (lines := news()) and time.perf_counter() < deadline:
            time.sleep(0.01)
    assert re.fullmatch(r"k-means: \d+ s", lines[0])
    with pytest.raises(ZeroDivisionError), waiting("mistakes"):
        1 / 0  # noqa: B018


def test_a_stopwatch_counts_phases_and_the_command_they_are_part_of(clock):
    watch = Stopwatch("loading")
    clock.now += 2
    watch.phase("steps")
    clock.now += 3
    watch.phase("loading")
    clock.now += 1
    assert watch.results() == {"seconds": 6.0, "phases": {"loading": 3.0, "steps": 3.0}}
    clock.now += 1
    assert watch.results()["seconds"] == 7.0
    with commanded():
        clock.now += 4  # imports
        watch = Stopwatch("loading")
        clock.now += 1
        assert watch.results() == {"seconds": 5.0, "phases": {"loading": 5.0}}
        assert Stopwatch("loading").results()["seconds"] == 0.0  # the demo trains several times
    assert Stopwatch("loading").results()["seconds"] == 0.0


def test_the_seconds_of_a_command_are_written(photos, vit_file, data, tmp_path):
    run = tmp_path / "run"
    began = time.perf_counter()
    assert main(train_words(photos, run, vit_file, clusters="kmeans")) == 0
    whole = time.perf_counter() - began
    assert main(["eval", str(run), str(data), "--device", "cpu"]) == 0
    assert main(["probe", str(run), str(data), "--score-on", str(data), "--steps", "2", "--device", "cpu"]) == 0
    phases = {
        "results": ["loading", "features", "steps", "clustering", "writing"],
        "eval": ["loading", "baselines", "scoring"],
        "probe": ["loading", "fitting", "scoring"],
    }
    for name, expected in phases.items():
        found = json.loads((run / f"{name}.json").read_text())
        assert list(found["phases"]) == expected
        assert sum(found["phases"].values()) == pytest.approx(found["seconds"], abs=0.05)
        assert found["seconds"] > 0
    trained = json.loads((run / "results.json").read_text())
    assert whole / 2 < trained["seconds"] <= whole
