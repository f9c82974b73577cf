"""Segmentation quality on MSRC v2, or another labelled folder: k-means, STEGO, Hidden Positives and its parts, all on
the same frozen features.

    python -m benchmarks.quality.msrc MSRCV2 --out OUT [--extra-weights FILE] [--methods hp stego]
        [--name coco27 --test-every 2] [--keep-rows] [settings of hpseg train]

MSRCV2 holds images/, labels/ (class ids, 255 is void) and classes.json. Of the images sorted by name every 4th is test;
the others train, without labels. Every method sees the training images only, takes as many steps, finds as many
clusters as there are classes and is scored on the test images, with one seed after the other. --backbone is measured
unless --only-extra, each --extra-weights FILE as well.
Writes OUT/quality_NAME.json and OUT/quality_NAME.md: mean and standard deviation over the seeds. Backbones measured
earlier stay in the two files, and with --keep-rows so do the rows of this backbone that are not measured anew.
--readme puts the tables into the README beside this file, too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import hpseg
from hpseg.cli.train import add_setting_flags
from hpseg.data.datasets import open_folder
from hpseg.data.folder import find_images
from hpseg.evaluation.evaluate import evaluate_runs
from hpseg.evaluation.probes import probe
from hpseg.run.config import MACHINE_FIELDS, make_config
from hpseg.run.folder import load_model, save_model


def make_split(source: Path, target: Path, dev: bool = False, every: int = 4) -> None:
    """TARGET/train and TARGET/test with images/, labels/ and classes.json as links into SOURCE; every 4th is test.

    dev: leaves the test images out altogether and splits the training images in the same way, for choosing settings.
    """
    labels = {path.stem: path for path in find_images(source / "labels")}
    images = find_images(source / "images")
    if dev:
        images = [image for number, image in enumerate(images) if number % every != every - 1]
    for number, image in enumerate(images):
        part = target / ("test" if number % every == every - 1 else "train")
        for folder, path in (("images", image), ("labels", labels[image.stem])):
            (part / folder).mkdir(parents=True, exist_ok=True)
            (part / folder / path.name).symlink_to(path.resolve())
    for part in ("train", "test"):
        (target / part / "classes.json").symlink_to((source / "classes.json").resolve())


def methods(steps: int) -> dict[str, dict]:
    """Settings of what is trained. Without a local stream and before the warm-up ends, Hidden Positives is reduced to
    its task-agnostic positives."""
    never = {"lambda_warmup": steps}
    return {
        "stego": {"preset": "stego-small"},
        "agnostic": {"local": False, **never},
        "specific": {"local": False},
        "local": never,
        "hp": {},
    }


PROBE_STEPS = 1000
ROWS = {
    "kmeans_rgb": "k-means, RGB",
    "kmeans_features": "k-means, frozen features",
    "stego": "STEGO",
    "hp": "Hidden Positives: all three",
    "agnostic": "task-agnostic positives only",
    "specific": "task-agnostic and task-specific",
    "local": "task-agnostic and local stream",
    "linear_features": "linear probe by labels, frozen features",
    "linear_hp": "linear probe by labels, codes of Hidden Positives",
}
SCORES = ("miou", "accuracy")


def measure(
    split: Path,
    weights: str | None,
    seeds: int,
    chosen: dict[str, dict],
    settings: dict,
    probes: bool = True,
    refined: tuple[str, ...] = (),
) -> dict:
    """Trains one run per method and seed on the backbone and scores all of them and the baselines.

    refined: methods that are scored after a dense CRF, too, as NAME_crf.
    """
    began, runs, seconds = time.perf_counter(), {}, {}
    folder = Path(tempfile.mkdtemp(dir=split))
    settings = settings | {"weights": weights, "preview_every": 0}
    if settings.get("cache_features", True):
        settings["cache_dir"] = str(folder / "features")
    for name, own in chosen.items():
        for seed in range(seeds):
            run, started = folder / f"{name}_{seed}", time.perf_counter()
            hpseg.train(split / "train" / "images", run, seed=seed, **(settings | own))
            runs.setdefault(name, []).append(run)
            seconds.setdefault(name, []).append(round(time.perf_counter() - started, 1))
    scored: dict[str, list[dict]] = {}
    for number, (name, of_method) in enumerate(runs.items()):  # the baselines are the same for all: fitted once
        crf = name in refined
        results = evaluate_runs(of_method, split / "test", rgb=number == 0, baselines=number == 0, crf=crf)
        scored[name] = [scores["trained"] for scores in results]
        if crf:
            scored[f"{name}_crf"] = [scores["trained_crf"] for scores in results]
        if number == 0:
            scored |= {
                baseline: [scores[baseline] for scores in results] for baseline in ("kmeans_rgb", "kmeans_features")
            }
    for number in range(seeds) if probes and "hp" in runs else ():
        for name, run in (("linear_features", frozen(runs["hp"][number], folder)), ("linear_hp", runs["hp"][number])):
            results_of = probe(run, split / "train", score_on=split / "test", steps=PROBE_STEPS, seed=number)
            scored.setdefault(name, []).append(results_of["linear"])
    return {
        "backbone": Path(weights).stem if weights else make_config(**settings).backbone,
        "seconds": round(time.perf_counter() - began, 1),
        "train_seconds": seconds,
        "settings": {name: deciding(settings | own) for name, own in chosen.items()},
        "summary": {name: {score: spread(of_seeds, score) for score in SCORES} for name, of_seeds in scored.items()},
        "clusters": results[0]["clusters"],
        "images": results[0]["images"],
        "iou_per_class": {
            name: dict(
                zip(results[0]["classes"], zip(*(scores["iou"] for scores in of_seeds), strict=True), strict=True)
            )
            for name, of_seeds in scored.items()
        },
    }


def frozen(run: Path, folder: Path) -> Path:
    """A copy of a run whose codes are the frozen features themselves, for a probe of those."""
    copy = Path(shutil.copytree(run, folder / f"{run.name}_frozen"))
    tensors, fingerprint = load_model(copy)
    channels = tensors["head.linear.weight"].shape[1]
    facts = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**facts, "dim": channels}))
    tensors["head.linear.weight"] = torch.eye(channels)
    tensors["head.out.weight"] = torch.zeros(channels, channels)
    for name in ("head.linear.bias", "head.out.bias"):
        tensors[name] = torch.zeros(channels)
    tensors["clusters.centroids"] = torch.zeros(len(tensors["clusters.centroids"]), channels)
    save_model(copy, tensors, fingerprint)
    return copy


def deciding(settings: dict) -> dict:
    """All settings of a run but paths and those of the machine."""
    every = vars(make_config(**settings))
    return {name: value for name, value in every.items() if name not in (*MACHINE_FIELDS, "images", "weights")}


def spread(of_seeds: list[dict], score: str) -> dict:
    values = [scores[score] for scores in of_seeds]
    return {
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
        "values": values,
    }


def table(results: list[dict], rows: dict[str, str] = ROWS) -> str:
    """mIoU and accuracy, a row per method and two columns per backbone."""
    heads = [f"{result['backbone']}, {title}" for result in results for title in ("mIoU", "accuracy")]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name, title in rows.items():
        cells = [
            "{mean:.1f} ± {sd:.1f}".format(**result["summary"][name][score]) if name in result["summary"] else ""
            for result in results
            for score in SCORES
        ]
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


OF_ROWS = ("summary", "settings", "train_seconds", "iou_per_class")  # parts of a result, by the names of rows
OF_COMMAND = ("command", "date", "seconds", "machine", "cores", "threads", "torch")


def with_rows_of(new: dict, old: dict) -> dict:
    """The new result, with the rows of the old one that it lacks and how those were measured."""
    merged = {part: {**old[part], **new[part]} for part in OF_ROWS}
    earlier = [*old.get("earlier", []), {name: old[name] for name in OF_COMMAND}]
    return {**new, **merged, "earlier": earlier}


def commands(result: dict) -> list[dict]:
    """What measured a result's rows, the first command first; a later one replaces rows of an earlier."""
    return [*result.get("earlier", []), result]


def threads(result: dict) -> str:
    return f"{result['threads']} thread{'s' * (result['threads'] > 1)}"


def page(results: list[dict], rows: dict[str, str] = ROWS) -> str:
    """The table and, for each backbone, how it was measured."""
    lines = [
        f"{result['backbone']}: `{run['command']}`, {run['date']}, {run['seconds'] / 60:.0f} minutes, "
        f"{threads(run)} of {run['machine']}, torch {run['torch']}"
        for result in results
        for run in commands(result)
    ]
    return f"{table(results, rows)}\n\n" + "\n\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("msrcv2", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--extra-weights", action="append", default=[], metavar="FILE", help="measure this ViT too")
    parser.add_argument("--name", default="msrc", help="of the data set, for the files in --out")
    parser.add_argument("--test-every", type=int, default=4, metavar="N", help="every Nth image is test")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=list(methods(0)), default=list(methods(0)))
    parser.add_argument("--keep-rows", action="store_true", default=False, help="and the rows measured earlier")
    parser.add_argument("--no-probes", action="store_true", default=False, help="leave the linear probes out")
    parser.add_argument("--only-extra", action="store_true", default=False, help="leave --backbone out")
    parser.add_argument("--readme", action="store_true", default=False, help="renew the table in the README, too")
    parser.add_argument(
        "--dev",
        action="store_true",
        default=False,
        help="split the training images once more and never touch the test images",
    )
    method_fields = ("preset", "method", "local", "lambda_warmup")
    add_setting_flags(parser, leave_out=("images", "classes", "weights", "seed", "cache_dir", *method_fields))
    settings = vars(parser.parse_args())
    source, out, extra, seeds, only_extra, dev, readme, names, data, every, no_probes, keep_rows = (
        settings.pop(name)
        for name in (
            "msrcv2 out extra_weights seeds only_extra dev readme methods name test_every no_probes keep_rows".split()
        )
    )
    settings = {"classes": len(open_folder(source).classes), "steps": make_config().steps, **settings}
    chosen = {name: own for name, own in methods(settings["steps"]).items() if name in names}
    facts = circumstances("msrc", [str(source), str(out), *extra])
    out.mkdir(parents=True, exist_ok=True)
    report = out / f"quality_{data}.json"
    results = json.loads(report.read_text())["results"] if report.is_file() else []
    with tempfile.TemporaryDirectory() as folder:
        make_split(source, Path(folder), dev, every)
        for weights in ([] if only_extra else [None]) + extra:
            new = {**measure(Path(folder), weights, seeds, chosen, settings, not no_probes), **facts}
            same = [old for old in results if old["backbone"] == new["backbone"]]
            if keep_rows and same:
                new = with_rows_of(new, same[0])
            results = [old for old in results if old not in same] + [new]
            report.write_text(json.dumps({"results": results}, indent=1) + "\n")
            report.with_suffix(".md").write_text(page(results))
            if readme:
                put_between(Path(__file__).with_name("README.md"), page(results), data)
            print(table([new]), flush=True)


def circumstances(module: str, paths: list[str]) -> dict:
    """The command line of a benchmark, folders by their names only, and where and when it runs."""
    command = f"python -m benchmarks.quality.{module} {shlex.join(sys.argv[1:])}"
    for path in paths:
        command = command.replace(path, Path(path).name)
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def put_between(path: Path, text: str, name: str) -> None:
    """Replaces what stands between the two marks of that name in the file."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = path.read_text().split(begin)
    path.write_text(f"{before}{begin}\n\n{text}\n{end}{rest.split(end)[1]}")


def processor() -> str:
    """The processor's name where the system tells it."""
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
