"""Segmentation quality on MSRC v2: k-means on RGB, k-means on frozen features, the trained head.

    python -m benchmarks.quality.msrc MSRCV2 --out OUT [--extra-weights FILE] [--seeds 3] [settings of hpseg train]

MSRCV2 holds images/, labels/ (class ids, 255 is void) and classes.json. Of the images sorted by name every 4th is test;
the others train, without labels. All three methods see the training images only and are scored on the test images, all
with as many clusters as there are classes. The embedded backbone is always measured, each --extra-weights FILE as well.
Writes OUT/quality_msrc.json and OUT/quality_msrc.md: mean and standard deviation over the seeds. Backbones measured
earlier stay in the two files.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import hpseg
from hpseg.cli import add_setting_flags
from hpseg.config import make_config
from hpseg.data.folder import find_images
from hpseg.data.labelled import open_folder
from hpseg.evaluation.evaluate import TITLES, evaluate_runs


def make_split(source: Path, target: Path, dev: bool = False) -> None:
    """TARGET/train and TARGET/test with images/, labels/ and classes.json as links into SOURCE.

    dev: leaves the test images out altogether and splits the training images in the same way, for choosing settings.
    """
    labels = {path.stem: path for path in find_images(source / "labels")}
    images = find_images(source / "images")
    if dev:
        images = [image for number, image in enumerate(images) if number % 4 != 3]
    for number, image in enumerate(images):
        part = target / ("test" if number % 4 == 3 else "train")
        for folder, path in (("images", image), ("labels", labels[image.stem])):
            (part / folder).mkdir(parents=True, exist_ok=True)
            (part / folder / path.name).symlink_to(path.resolve())
    for part in ("train", "test"):
        (target / part / "classes.json").symlink_to((source / "classes.json").resolve())


def measure(split: Path, weights: str | None, seeds: int, settings: dict) -> dict:
    """Trains one run per seed on the backbone and scores all of them and their baselines."""
    runs, seconds = [], []
    for seed in range(seeds):
        runs.append(Path(tempfile.mkdtemp(dir=split)) / "run")
        began = time.perf_counter()
        hpseg.train(split / "train" / "images", runs[-1], weights=weights, seed=seed, **settings)
        seconds.append(round(time.perf_counter() - began, 1))
    per_seed = evaluate_runs(runs, split / "test", rgb=True)
    summary = {}
    for method in TITLES:
        summary[method] = {}
        for score in ("miou", "accuracy"):
            values = [results[method][score] for results in per_seed]
            summary[method][score] = {
                "mean": statistics.mean(values),
                "sd": statistics.stdev(values) if seeds > 1 else 0.0,
                "values": values,
            }
    return {
        "backbone": Path(weights).stem if weights else "embedded",
        "train_seconds": seconds,
        "summary": summary,
        "clusters": per_seed[0]["clusters"],
        "images": per_seed[0]["images"],
        "iou_per_class": {
            name: [results["trained"]["iou"][row] for results in per_seed]
            for row, name in enumerate(per_seed[0]["classes"])
        },
    }


def table(results: list[dict]) -> str:
    lines = ["| backbone | method | mIoU | accuracy |", "|---|---|---|---|"]
    for result in results:
        for method in ("kmeans_rgb", "kmeans_features", "trained"):
            cells = (
                "{mean:.1f} ± {sd:.1f}".format(**result["summary"][method][score]) for score in ("miou", "accuracy")
            )
            lines.append(f"| {result['backbone']} | {TITLES[method]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("msrcv2", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--extra-weights", action="append", default=[], metavar="FILE", help="measure this ViT too")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only-extra", action="store_true", default=False, help="leave the embedded backbone out")
    parser.add_argument(
        "--dev",
        action="store_true",
        default=False,
        help="split the training images once more and never touch the test images",
    )
    add_setting_flags(parser, leave_out=("images", "classes", "weights", "seed"))
    settings = vars(parser.parse_args())
    source, out, extra, seeds, only_extra, dev = (
        settings.pop(name) for name in ("msrcv2", "out", "extra_weights", "seeds", "only_extra", "dev")
    )
    settings["classes"] = len(open_folder(source).classes)
    command = f"python -m benchmarks.quality.msrc {shlex.join(sys.argv[1:])}"
    for path in [str(source), str(out), *extra]:
        command = command.replace(path, Path(path).name)
    facts = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "settings": vars(make_config(**settings)),
    }
    out.mkdir(parents=True, exist_ok=True)
    report = out / "quality_msrc.json"
    results = json.loads(report.read_text())["results"] if report.is_file() else []
    with tempfile.TemporaryDirectory() as folder:
        make_split(source, Path(folder), dev)
        for weights in ([] if only_extra else [None]) + extra:
            new = {**measure(Path(folder), weights, seeds, settings), **facts}
            results = [old for old in results if old["backbone"] != new["backbone"]] + [new]
            report.write_text(json.dumps({"results": results}, indent=1) + "\n")
            commands = "\n".join(
                f"{result['backbone']}: `{result['command']}`, {result['date']}\n" for result in results
            )
            (out / "quality_msrc.md").write_text(f"{table(results)}\n\n{commands}")
            print(table([new]), flush=True)


def processor() -> str:
    """The processor's name where the system tells it."""
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
