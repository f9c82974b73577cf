"""Writes docs/results.md from the committed results of benchmarks.quality.

python -m benchmarks.quality.page
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from benchmarks.quality import choices, few_labels, fs4, msrc

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


def difference(one: dict, other: dict, paired: bool = False) -> str:
    """How far `one` is from `other`, {"mean", "sd", "values"}, and whether that is more than their spreads explain.

    paired: a seed is the same problem for both, and its two scores are compared.
    """
    gain, spread = one["mean"] - other["mean"], (one["sd"] ** 2 + other["sd"] ** 2) ** 0.5
    if paired:
        spread = statistics.stdev(mine - theirs for mine, theirs in zip(one["values"], other["values"], strict=True))
    return f"{gain:+.1f}" if abs(gain) > BEYOND * spread else f"{gain:+.1f} (within the spread)"


def table(result: dict, rows: dict[str, str]) -> str:
    """mIoU and accuracy of a backbone, a row per method, with the difference of mIoU from its base.

    The base is k-means on the frozen features or, from few labels, the method's own labels alone.
    """
    summary = result["summary"]
    few = "kmeans_features" not in summary
    title = "its labels alone" if few else rows["kmeans_features"]
    lines = [f"| `{result['backbone']}` | mIoU | accuracy | mIoU against {title} |", "|---|---|---|---|"]
    for name, row in rows.items():
        if name in summary:
            base = few_labels.base(name) if few else "kmeans_features"
            cells = ["{mean:.1f} ± {sd:.1f}".format(**summary[name][score]) for score in msrc.SCORES]
            compared = name != base and not name.endswith("_rgb")
            cells.append(difference(summary[name]["miou"], summary[base]["miou"], few) if compared else "")
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measured(result: dict) -> str:
    return "\n\n".join(
        f"`{run['command']}`, {run['date']}, {run['seconds'] / 60:.0f} minutes, {msrc.threads(run)} of {run['machine']}"
        for run in msrc.commands(result)
    )


def read(name: str) -> list[dict]:
    return json.loads((RESULTS / f"quality_{name}.json").read_text())["results"]


def what_helps() -> list[str]:
    """The bullets above the tables; every number in them is read from the results."""
    on = {name: {result["backbone"]: result["summary"] for result in read(name)} for name in (*SETS, "choices")}
    few = {(result["backbone"], result["methods"][0]): result["summary"] for result in read("few_labels")}

    def miou(name: str, row: str, backbone: str = "embedded") -> str:
        return "{mean:.1f}".format(**on[name][backbone][row]["miou"])

    def against(name: str, row: str, base: str = "kmeans_features") -> str:
        scores = on[name]["embedded"]
        return difference(scores[row]["miou"], scores[base]["miou"])

    def from_labels(method: str) -> str:
        scores = few["embedded", method]
        return difference(scores[method]["miou"], scores[few_labels.base(method)]["miou"], paired=True)

    return [
        "**The backbone decides.** k-means on frozen features has "
        f"{miou('msrc', 'kmeans_features')} on `embedded` and "
        f"{miou('msrc', 'kmeans_features', 'embedded-selfsup')} on `embedded-selfsup`.",
        "**STEGO wants shifts fitted to the features**: `--shifts quantiles`, without labels. Against k-means it has "
        f"{against('msrc', 'stego')} on MSRC v2 and {against('coco27', 'stego')} on the 84 photographs of COCO. With "
        f"the shifts published for Potsdam it has {miou('choices', 'stego_values')} mIoU on MSRC v2.",
        f"**Hidden Positives** against k-means: {against('msrc', 'hp')} on MSRC v2, {against('coco27', 'hp')} on "
        f"COCO. With task-agnostic positives alone it has {miou('msrc', 'agnostic')} and "
        f"{miou('coco27', 'agnostic')}: its other two parts are not shown to help here.",
        "**More steps need a higher temperature.** Hidden Positives for 200 steps has "
        f"{miou('choices', 'hp')}. For 2,000 steps it has {miou('choices', 'hp_long')} at the small preset's 0.2 and "
        f"{miou('choices', 'hp_long_warm')} at the published 0.8. STEGO for 2,000 has {miou('choices', 'stego_long')}.",
        "**Fit the last clusters by k-means.** With the trained probe Hidden Positives has "
        f"{miou('choices', 'hp_probe')}, STEGO {miou('choices', 'stego_probe')}.",
        f"**Code width.** Hidden Positives with 64 numbers: {against('choices', 'hp_narrow', 'hp')}, with 512: "
        f"{against('choices', 'hp_wide', 'hp')}, against 128. STEGO with 512: "
        f"{against('choices', 'stego_wide', 'stego')} against 70.",
        f"**A dense CRF** changes Hidden Positives by {against('choices', 'hp_crf', 'hp')}, STEGO by "
        f"{against('choices', 'stego_crf', 'stego')}.",
        "**From few labels.** Cross-image contrast for 800 steps, against labels alone: "
        f"{from_labels('lookbeyond')}. DGCL for 300 steps: {from_labels('dgcl')}.",
    ]


def page() -> str:
    parts = [
        "# Results",
        "What each method finds on real photographs, and what helps. Scores are in percent, mean ± standard deviation "
        "over seeds. Clusters are matched to classes one to one when they are scored; training sees no labels. A "
        "difference is called one where it is more than two spreads.",
        "![Six photographs, and what k-means and each method make of them](images/methods.jpg)",
        "Each method trained for 200 steps on the 53 photographs in this package, 12 clusters; FS^4 on the backbone "
        "that has seen no labels. Made by `python -m benchmarks.quality.pictures`.",
        "## What helps, and what does not",
        "On the default backbone, mIoU:",
        "\n".join(f"- {bullet}" for bullet in what_helps()),
    ]
    for name, (title, about) in SETS.items():
        parts += [f"## {title}", f"{about[0].upper()}{about[1:]}. Three seeds. Every method takes 200 steps."]
        for result in sorted(read(name), key=lambda result: result["backbone"]):
            parts += [table(result, msrc.ROWS), measured(result)]
    parts += [
        "`embedded` is the default backbone. It has seen ImageNet's labels indirectly, through its teacher. "
        "`embedded-selfsup` has seen none. A probe is fitted to the labels of the training photographs: it says what "
        "the features or codes hold, not what a method finds without labels.",
        "## What a choice is worth",
        "MSRC v2, two seeds. A row changes one thing of its method.",
        *[part for result in read("choices") for part in (table(result, choices.rows()), measured(result))],
        "## FS^4 and its parts",
        "Three seeds.",
        *[part for result in read("fs4") for part in (table(result, fs4.ROWS), measured(result))],
        "## From few labels",
        "An eighth of the training photographs have labels. Each method stands beside as many steps on labels alone, "
        "from the same labels: a seed draws them, so scores of two seeds differ far more than two methods of one seed. "
        "Differences are within a seed. Three seeds; two of cross-image contrast on `embedded`.",
    ]
    for result in read("few_labels"):
        parts += [table(result, few_labels.ROWS), measured(result)]
    parts += [
        "![Mosaics, their truth, what labels alone find, and DGCL](images/dgcl.jpg)",
        "Mosaics of six textures; 8 of 64 have labels, 200 steps.",
        "## How to repeat it",
        "Each table has its command. `benchmarks/quality/README.md` says how settings were found and what did not "
        "help. This page is made by `python -m benchmarks.quality.page` from `benchmarks/results/quality_*.json`.",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
