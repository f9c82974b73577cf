"""Settings: presets, and what is saved of them."""

from __future__ import annotations

from hpseg.run.config import Config, make_config
from hpseg.run.presets import PRESETS


def test_config_round_trip_and_presets(tmp_path):
    for name in PRESETS:
        config = make_config(name, seed=3)
        config.save(tmp_path / "c.json")
        assert Config.load(tmp_path / "c.json") == config and config.preset == name
    assert make_config("potsdam").negative_rate == 1.0
