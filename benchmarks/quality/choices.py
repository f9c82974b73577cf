"""What a choice is worth on MSRC v2: the number of steps, the width of codes, how the last clusters are found, a CRF.

    python -m benchmarks.quality.choices MSRCV2 --out OUT [--choices hp hp_long] [settings of hpseg train]

The split and the scores are those of benchmarks.quality.msrc; no label is seen in training. Each choice changes one
thing of the method above it.
Writes OUT/quality_choices.json and OUT/quality_choices.md: mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.quality import msrc
from hpseg.cli.train import add_setting_flags
from hpseg.data.datasets import open_folder

LONG = 2000
CHOICES: dict[str, tuple[str, dict]] = {
    "hp": ("Hidden Positives", {}),
    "hp_long": ("2,000 steps", {"steps": LONG}),
    "hp_long_warm": ("2,000 steps at the published temperature, 0.8", {"steps": LONG, "temperature": 0.8}),
    "hp_narrow": ("codes of 64 numbers", {"dim": 64}),
    "hp_wide": ("codes of 512 numbers", {"dim": 512}),
    "hp_probe": ("the trained cluster probe, no k-means at the end", {"clusters": "probe"}),
    "stego": ("STEGO", {"preset": "stego-small"}),
    "stego_long": ("2,000 steps", {"preset": "stego-small", "steps": LONG}),
    "stego_wide": ("codes of 512 numbers", {"preset": "stego-small", "dim": 512}),
    "stego_probe": ("the trained cluster probe, no k-means at the end", {"preset": "stego-small", "clusters": "probe"}),
    "stego_values": (
        "the shifts published for Potsdam",
        {
            "preset": "stego-small",
            "shifts": "similarities",
            "self_shift": 0.08,
            "knn_shift": 0.02,
            "random_shift": 0.46,
        },
    ),
}
METHODS = ("hp", "stego")  # a row of its own; the others change one thing of theirs


def rows() -> dict[str, str]:
    """Titles of the table's rows, in order; those of a choice name their method."""
    titles = {name: msrc.ROWS[name] for name in ("kmeans_rgb", "kmeans_features")}
    for name, (title, _) in CHOICES.items():
        method = CHOICES[name.split("_")[0]][0]
        titles[name] = title if name in METHODS else f"{method}: {title}"
        if name in METHODS:
            titles[f"{name}_crf"] = f"{method}: maps refined by a dense CRF"
    return titles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("msrcv2", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--choices", nargs="+", choices=list(CHOICES), default=list(CHOICES))
    parser.add_argument("--dev", action="store_true", default=False, help="split the training images, no test")
    fixed = {name for _, own in CHOICES.values() for name in own} - {"steps"}
    add_setting_flags(parser, leave_out=("images", "classes", "method", "seed", "cache_dir", *fixed))
    settings = vars(parser.parse_args())
    source, out, seeds, choices, dev = (settings.pop(name) for name in ("msrcv2", "out", "seeds", "choices", "dev"))
    weights = settings.pop("weights", None)
    settings = {"classes": len(open_folder(source).classes), "steps": 200, **settings}
    facts = msrc.circumstances("choices", [str(source), str(out), *([weights] if weights else [])])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        msrc.make_split(source, Path(folder), dev)
        chosen = {name: CHOICES[name][1] for name in choices}
        result = {**msrc.measure(Path(folder), weights, seeds, chosen, settings, False, METHODS), **facts}
    (out / "quality_choices.json").write_text(json.dumps({"results": [result]}, indent=1) + "\n")
    (out / "quality_choices.md").write_text(msrc.page([result], rows()))
    print(msrc.table([result], rows()), flush=True)


if __name__ == "__main__":
    main()
