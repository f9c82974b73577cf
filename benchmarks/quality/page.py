"""Writes docs/results.md from the committed results of benchmarks.quality.

python -m benchmarks.quality.page
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.quality import few_labels, fs4, msrc

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
SETS = {
    "msrc": ("MSRC v2", "444 photographs to train on, 147 others to score, 23 classes"),
    "coco27": (
        "COCO, 27 coarse classes",
        "84 photographs to train on, 84 others to score; the ViTs were trained on none of them",
    ),
}
BEYOND = 2.0  # spreads, from where on a difference is called one


def difference(one: dict, other: dict) -> str:
    """How far `one` is from `other`, {"mean", "sd"}, and whether that is more than their spreads explain."""
    gain, spread = one["mean"] - other["mean"], (one["sd"] ** 2 + other["sd"] ** 2) ** 0.5
    return f"{gain:+.1f}" if abs(gain) > BEYOND * spread else f"{gain:+.1f} (within the spread)"


def table(result: dict, rows: dict[str, str], base: str) -> str:
    """mIoU and accuracy of a backbone, a row per method, with the difference of mIoU from the row `base`."""
    lines = [f"| `{result['backbone']}` | mIoU | accuracy | mIoU against {rows[base]} |", "|---|---|---|---|"]
    for name, title in rows.items():
        if name in result["summary"]:
            scores = result["summary"][name]
            cells = ["{mean:.1f} ± {sd:.1f}".format(**scores[score]) for score in msrc.SCORES]
            compared = name != base and not name.endswith("_rgb")
            cells.append(difference(scores["miou"], result["summary"][base]["miou"]) if compared else "")
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measured(result: dict) -> str:
    return "\n\n".join(
        f"`{run['command']}`, {run['date']}, {run['seconds'] / 60:.0f} minutes, {msrc.threads(run)} of {run['machine']}"
        for run in msrc.commands(result)
    )


def read(name: str) -> list[dict]:
    return json.loads((RESULTS / f"quality_{name}.json").read_text())["results"]


def page() -> str:
    parts = [
        "# Results",
        "What each method finds on real photographs, and what helps. Scores are in percent, mean ± standard deviation "
        "of three seeds. Clusters are matched to classes one to one when they are scored; training sees no labels. A "
        "difference is called one where it is more than two spreads.",
        "![Photographs, k-means on the frozen features, the trained head, and its overlay](images/demo.jpg)",
        "The picture is that of `hpseg demo`: 200 steps on the 53 photographs in this package, 12 clusters.",
    ]
    for name, (title, about) in SETS.items():
        parts += [f"## {title}", f"{about[0].upper()}{about[1:]}. Every method takes 200 steps."]
        for result in sorted(read(name), key=lambda result: result["backbone"]):
            parts += [table(result, msrc.ROWS, "kmeans_features"), measured(result)]
    parts += [
        "`embedded` is the default backbone. It has seen ImageNet's labels indirectly, through its teacher. "
        "`embedded-selfsup` has seen none. A probe is fitted to the labels of the training photographs: it says what "
        "the features or codes hold, not what a method finds without labels.",
        "## FS^4 and its parts",
        *[part for result in read("fs4") for part in (table(result, fs4.ROWS, "kmeans_features"), measured(result))],
        "## From few labels",
        "An eighth of the training photographs have labels. Each method stands beside as many steps on labels alone.",
    ]
    for result in read("few_labels"):
        parts += [table(result, few_labels.ROWS, "labels"), measured(result)]
    parts += [
        "## How to repeat it",
        "Each table has its command. `benchmarks/quality/README.md` says how settings were found and what did not "
        "help. This page is made by `python -m benchmarks.quality.page` from `benchmarks/results/quality_*.json`.",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
