"""256 colours: any first few of them can be told apart, also without one kind of cones."""

import numpy as np
import pytest

from hpseg.inference import palette as colours
from hpseg.inference.palette import chosen, colour_blind, difference, lab, linear, palette, spread

TABLE = np.array(palette()).reshape(256, 3)


def smallest(rgb, seen=lambda light: light, measure=difference):
    points = lab(seen(linear(rgb)))
    one, other = np.triu_indices(len(points), 1)
    return measure(points[one], points[other]).min()


def cie76(one, other):
    return np.linalg.norm(one - other, axis=-1)


def test_the_table_is_what_the_rule_chooses():
    assert chosen() == [tuple(colour) for colour in TABLE[:255].tolist()]
    assert TABLE[255].tolist() == [255] * 3 and len(np.unique(TABLE, axis=0)) == 256


@pytest.mark.parametrize(
    "first, in_cie76, in_ciede2000, deuteranopia, protanopia",
    [(6, 55.3, 37.6, 20.3, 16.6), (12, 33.8, 23.0, 10.1, 12.2), (27, 23.3, 13.8, 7.1, 6.6)],
)
def test_the_smallest_difference_is_what_the_table_in_the_module_says(
    first, in_cie76, in_ciede2000, deuteranopia, protanopia
):
    rgb = TABLE[:first]
    found = [smallest(rgb, measure=cie76), smallest(rgb)]
    found += [smallest(rgb, lambda light, cones=cones: colour_blind(light, cones)) for cones in ("green", "red")]
    assert np.round(found, 1).tolist() == [in_cie76, in_ciede2000, deuteranopia, protanopia]
    row = f"| {first:2} |  {in_cie76} |      {in_ciede2000} | {deuteranopia:12} | {protanopia:10} |"
    assert row in colours.__doc__.splitlines()


def test_no_colour_is_lost_on_white_on_dark_or_in_gray():
    points = lab(linear(TABLE[:255]))
    assert points[:, 0].min() > 30 and points[:, 0].max() < 93  # of 0, black, to 100, white
    assert np.hypot(points[:, 1], points[:, 2]).min() > 12


def test_ciede2000_is_that_of_its_authors():
    """Pairs of Sharma, Wu and Dalal's table of test data; some are there for the turn of the hue."""
    pairs = [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
        ((50, 2.49, -0.001), (50, -2.49, 0.0011), 7.2195),
        ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
        ((50, 0, 0), (50, -1, 2), 2.3669),
        ((90.8027, -2.0831, 1.4410), (91.1528, -1.6435, 0.0447), 1.4441),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
    ]
    for one, other, expected in pairs:
        one, other = np.array(one, float), np.array(other, float)
        assert difference(one, other) == pytest.approx(expected, abs=1e-4)
        assert difference(other, one) == pytest.approx(expected, abs=1e-4)


def test_colours_beside_those_of_a_data_set_keep_away_from_them():
    taken = [(128, 64, 128), (70, 130, 180), (0, 0, 142)]
    others = spread(taken, 9)
    assert others == spread(taken, 9) and set(others) < {tuple(colour) for colour in TABLE[:255].tolist()}
    assert smallest(np.array(taken + others)) > 15
    assert spread([], 4) == [tuple(colour) for colour in TABLE[:4].tolist()]
    table = [tuple(colour) for colour in TABLE[:5].tolist()]
    assert spread(table, 250) and not set(spread(table, 250)) & set(table)
