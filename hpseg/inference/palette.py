"""256 colours for numbers: whatever the first n of them are, the eye can tell them apart.

`python -m hpseg.inference.palette` chooses them again and prints the table below. Each colour is the one farthest from
all before it: by the CIEDE2000 difference, by the CIE76 difference, and by CIEDE2000 as people without "green" cones
(deuteranopia) or "red" ones (protanopia) see the two. Candidates are neither black, white nor near gray, so that they
read on white, on dark and over a photograph. Smallest difference among the first n:

|  n | CIE76 | CIEDE2000 | deuteranopia | protanopia |
|---:|------:|----------:|-------------:|-----------:|
|  6 |  55.3 |      37.6 |         20.3 |       16.6 |
| 12 |  33.8 |      23.0 |         10.1 |       12.2 |
| 27 |  23.3 |      13.8 |          7.1 |        6.6 |
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

RGB = tuple[int, int, int]
VOID = (255, 255, 255)  # the last one
LIGHTNESS, CHROMA = (0.45, 0.9), (0.06, 0.2)  # of candidates, in OKLCh
FIRST: RGB = (32, 96, 224)
# What differences count for beside CIEDE2000: CIE76 is the larger number by nature, and few people lack cones.
CIE76, COLOUR_BLIND = 0.6, 2.0
WITHOUT = {
    "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}
TABLE = """
2060e0 d0e820 c85000 00e8ff ff78b0 086850 f8c8a8 00b860 784870 40a8ff a01028 808050 c09000 0080a0 b07878 40ffd8 00b0a0
b080c8 ff9080 6830a8 f8d880 d8b0d0 c840a0 108810 c03060 80d040 a0b0e8 886040 9068f0 a0d0b8 c08040 981060 488888 505088
804848 88b880 a03810 b06888 ffa000 90f0e8 1878c0 48e098 d06058 70b8b8 70a088 78a8c0 e07888 c0c870 ffc0ff 987838 8088e8
f0b0b0 289070 f08858 e090d0 a8f0c0 506890 60c098 6050b8 a058b8 78ff98 98d0e0 307848 086070 8088b0 406030 a04880 906070
e85070 a08810 c090a0 10a8b0 e0d858 c0a070 98a838 e080ff a098e0 609060 e05090 d8a8ff 487828 9068a0 a07898 f8b0c8 c82840
487860 70d0c0 c83008 b00040 982880 7848a0 d8c090 a06050 f0b850 c868d8 3840c0 689838 c88878 ff6060 207068 f098a8 984858
8078b0 8048d0 c8b8e8 4898c0 5870d8 b82078 d84030 a0c000 d8a898 10b8d0 c05080 b8d888 48e8d8 983860 58a850 e868b8 e07098
984030 6088ff 98e8f0 88e8c8 b8e0b0 10d8b0 e85800 905090 48a098 a01810 88c068 c05870 48c8ff f078d8 a86030 78d088 e09038
40a068 d088a8 686018 6880c8 98e870 68c8e0 d87030 a8d820 883890 ff98c0 58d0d0 d89090 08b888 9060c8 983040 28b0f0 b05860
a8e898 a00850 788848 0080f0 98d8d0 6868a8 c8f068 c870a8 883868 107078 60b870 d08050 209080 5060b0 c87878 a8d058 802098
509880 c0b858 d0e8a8 d8a0b8 10c0c8 4090a8 b06878 f088c0 e0b880 78f8e0 b82018 906088 a85078 987040 008890 d08898 985860
0090d8 ffa040 087858 7098e8 68a078 f8b8a0 e8c0f0 5898a0 d89800 e06068 50c0a8 00f8b8 b80028 707098 b05048 c03878 986868
ff88a0 00b090 b87060 804058 68ffb0 b04050 d8a048 109898 903030 b0d8ff a82850 609890 786098 985068 50d8f0 d8e890 d84820
ffc8c8 40d868 a070c0 685080 f8c0d8 00e8f0 d05880 f86888 907828 78d8a0 1050c8 e87868 ff6828 b068d0 00a088 38b8b0 900880
ffb0a8 a05028 8038a8 00d0b8 6898b8 909048 ff70c8 48e8b8 d0a8d8 a86818 806838 106838 80c090 80f080 308880 008050 f0d848
"""


def palette() -> list[int]:
    """256 RGB colours, flat, every number another; white last, for what has no class."""
    return [value for colour in (*_table(), VOID) for value in colour]


def spread(taken: Iterable[RGB], count: int) -> list[RGB]:
    """`count` colours of the table, each as far as can be from `taken` and from those before it."""
    table, taken = np.array(_table()), list(taken)
    if not taken:
        return _table()[:count]
    return [as_rgb(colour) for colour in _farthest(table, np.array(taken), count)]


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """CIEDE2000 of CIELAB colours (..., 3) (Sharma, Wu and Dalal, Color Research and Application 30, 2005)."""
    (l1, a1, b1), (l2, a2, b2) = np.moveaxis(one, -1, 0), np.moveaxis(other, -1, 0)
    mean7 = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    stretch = 1.5 - 0.5 * np.sqrt(mean7 / (mean7 + 25.0**7))
    c1, c2 = np.hypot(stretch * a1, b1), np.hypot(stretch * a2, b2)
    h1, h2 = np.arctan2(b1, stretch * a1), np.arctan2(b2, stretch * a2)
    turn = np.where(c1 * c2 == 0, 0, (h2 - h1 + math.pi) % (2 * math.pi) - math.pi)
    lightness, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    hue = np.where(c1 * c2 == 0, h1 + h2, h1 + turn / 2) % (2 * math.pi)
    t = (
        1
        - 0.17 * np.cos(hue - math.radians(30))
        + 0.24 * np.cos(2 * hue)
        + 0.32 * np.cos(3 * hue + math.radians(6))
        - 0.20 * np.cos(4 * hue - math.radians(63))
    )
    blue = math.radians(60) * np.exp(-(((np.degrees(hue) - 275) / 25) ** 2))
    rotation = -np.sin(blue) * 2 * np.sqrt(chroma**7 / (chroma**7 + 25.0**7))
    dl = (l2 - l1) / (1 + 0.015 * (lightness - 50) ** 2 / np.sqrt(20 + (lightness - 50) ** 2))
    dc = (c2 - c1) / (1 + 0.045 * chroma)
    dh = 2 * np.sqrt(c1 * c2) * np.sin(turn / 2) / (1 + 0.015 * chroma * t)
    return np.sqrt(dl**2 + dc**2 + dh**2 + rotation * dc * dh)


def linear(rgb: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) in 0..255 -> linear light in 0..1."""
    x = np.asarray(rgb) / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def lab(light: np.ndarray) -> np.ndarray:
    """Linear sRGB -> CIELAB under D65."""
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    x = light @ np.array(to_xyz).T / (0.95047, 1, 1.08883)
    x, y, z = np.moveaxis(np.where(x > (6 / 29) ** 3, np.cbrt(x), x / (3 * (6 / 29) ** 2) + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def colour_blind(light: np.ndarray, cones: str) -> np.ndarray:
    """Linear sRGB as people without "green" or "red" cones see it (Machado, Oliveira and Fernandes, IEEE TVCG 15,
    2009, severity 1)."""
    return np.clip(light @ np.array(WITHOUT[cones]).T, 0, 1)


def _oklch(light: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lightness and chroma in OKLCh, in which equal numbers look alike for every hue."""
    to_lms = [
        [0.41222147, 0.53633254, 0.05144599],
        [0.2119035, 0.6806995, 0.10739696],
        [0.08830246, 0.28171884, 0.6299787],
    ]
    to_oklab = [
        [0.21045426, 0.79361779, -0.00407205],
        [1.9779985, -2.4285922, 0.4505937],
        [0.02590404, 0.78277177, -0.80867577],
    ]
    x = np.cbrt(light @ np.array(to_lms).T) @ np.array(to_oklab).T
    return x[..., 0], np.hypot(x[..., 1], x[..., 2])


def _farthest(among: np.ndarray, taken: np.ndarray, count: int) -> np.ndarray:
    """`count` of the colours `among` (N, 3), each the one farthest from `taken` (M, 3) and those before it."""

    def views(colours: np.ndarray) -> list[np.ndarray]:
        light = linear(colours)
        return [lab(light), *(lab(colour_blind(light, cones)) for cones in WITHOUT)]

    all_views = views(among)
    nearest, chosen = np.full(len(among), np.inf), []

    def keep_away(colour: np.ndarray) -> None:
        own = views(colour)
        np.minimum(nearest, CIE76 * np.linalg.norm(all_views[0] - own[0], axis=-1), out=nearest)
        for weight, one, other in zip((1, COLOUR_BLIND, COLOUR_BLIND), all_views, own, strict=True):
            np.minimum(nearest, weight * difference(one, other), out=nearest)

    for colour in taken:
        keep_away(colour)
    for _ in range(count):
        chosen.append(among[nearest.round(6).argmax()])  # rounded: processors differ in the last bits
        keep_away(chosen[-1])
    return np.array(chosen).reshape(-1, 3)


def chosen() -> list[RGB]:
    """The 255 colours of the table, chosen again."""
    steps = np.r_[0:256:8, 255]
    among = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    lightness, chroma = _oklch(linear(among))
    inside = (lightness >= LIGHTNESS[0]) & (lightness <= LIGHTNESS[1]) & (chroma >= CHROMA[0]) & (chroma <= CHROMA[1])
    return [FIRST, *map(as_rgb, _farthest(among[inside], np.array([FIRST]), 254))]


def _table() -> list[RGB]:
    return [as_rgb(bytes.fromhex(colour)) for colour in TABLE.split()]


def as_rgb(values: Iterable[int]) -> RGB:
    """Three numbers as a colour; ValueError for more or fewer."""
    red, green, blue = (int(value) for value in values)
    return red, green, blue


if __name__ == "__main__":
    words = [bytes(colour).hex() for colour in chosen()]
    for start in range(0, len(words), 17):
        print(" ".join(words[start : start + 17]))
