"""Segmentation of MSRC v2 from the labels of an eighth of the training pictures: what methods add to the labels alone.

    python -m benchmarks.quality.few_labels MSRCV2 --out OUT [--methods lookbeyond dgcl] [--weights FILE] [--finetune]

The split and the scores are those of benchmarks.quality.msrc; classes are compared directly. Which pictures have labels
is drawn by the seed, the same for every row; the test pictures take no part in training. Each method stands beside its
own network trained on the labels alone: for as many steps in all, and where a method has steps without labels also for
as many steps on labels. Settings of hpseg train apply to all rows.
Writes OUT/quality_few_labels.json and .md: mean and standard deviation over the seeds. Results of other backbones and
of other choices of methods stay.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import hpseg
from benchmarks.quality import msrc
from hpseg.cli.train import add_setting_flags
from hpseg.data.datasets import open_folder
from hpseg.evaluation.evaluate import evaluate_runs
from hpseg.run.config import make_config


def lookbeyond(settings: dict) -> dict[str, dict]:
    """Rows of settings beside those given."""
    config = make_config(**settings)
    on_labels = {"fine_tune_share": 1.0}
    return {
        "labels_short": {**on_labels, "steps": round(config.steps * config.fine_tune_share)},
        "labels": on_labels,
        "lookbeyond": {},
        "across": {"cross_image_only": True},
        "supcon": {"contrast_form": "supcon"},
    }


def dgcl(settings: dict) -> dict[str, dict]:
    """The first row sees the same labelled views in the same steps; its result is the student at the last of them."""
    return {"dgcl_labels": {"supervised_share": 1.0}, "dgcl_teacher": {"contrast_weight": 0.0}, "dgcl": {}}


METHODS = {"lookbeyond": lookbeyond, "dgcl": dgcl}  # method -> its rows
ROWS = {
    "labels_short": "labels alone, as many steps on labels",
    "labels": "labels alone, as many steps in all",
    "lookbeyond": "cross-image contrast, then labels",
    "across": "the same, positives from other pictures only",
    "supcon": 'the same, form "supcon"',
    "dgcl_labels": "labels alone, DGCL's network and optimiser",
    "dgcl_teacher": "DGCL without its contrast: self-training on the teacher's labels",
    "dgcl": "DGCL",
}


def base(row: str) -> str:
    """The row of the same network and optimiser on labels alone, for as many steps."""
    return "dgcl_labels" if row.startswith("dgcl") else "labels"


def measure(split: Path, weights: str | None, seeds: int, methods: list[str], rows: list[str], settings: dict) -> dict:
    """Trains a run per row and seed on SPLIT/train and scores it on SPLIT/test."""
    began, folder = time.perf_counter(), Path(tempfile.mkdtemp(dir=split))
    settings = settings | {"weights": weights, "preview_every": 0}
    scored, seconds, used, quality = {}, {}, {}, {}
    for method in methods:
        shared = settings | {"method": method}
        for name, own in METHODS[method](shared).items():
            if name not in rows:
                continue
            runs = []
            for seed in range(seeds):
                run, started = folder / f"{name}_{seed}", time.perf_counter()
                hpseg.train(split / "train", run, seed=seed, **(shared | own))
                seconds.setdefault(name, []).append(round(time.perf_counter() - started, 1))
                runs.append(run)
                if (run / "label_quality.json").is_file():
                    quality.setdefault(name, []).append(json.loads((run / "label_quality.json").read_text()))
            parts = [[run] for run in runs] if settings.get("finetune") else [runs]  # one pass for one backbone
            results = [result for part in parts for result in evaluate_runs(part, split / "test", baselines=False)]
            scored[name] = [result["trained"] for result in results]
            used[name] = msrc.deciding(shared | own)
            print(name, [round(scores["miou"], 1) for scores in scored[name]], flush=True)
    backbone = Path(weights).stem if weights else make_config(**shared).backbone
    return {
        "backbone": f"{backbone}, trained" if settings.get("finetune") else backbone,
        "methods": methods,
        "seconds": round(time.perf_counter() - began, 1),
        "train_seconds": seconds,
        "settings": used,
        "summary": {name: {score: msrc.spread(of, score) for score in msrc.SCORES} for name, of in scored.items()},
        "images": results[0]["images"],
        "label_quality": quality,
        "iou_per_class": {
            name: dict(zip(results[0]["classes"], zip(*(scores["iou"] for scores in of), strict=True), strict=True))
            for name, of in scored.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("msrcv2", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--dev", action="store_true", default=False, help="split the training images instead")
    fixed = ("method", "preset", "fine_tune_share", "cross_image_only", "contrast_form")
    fixed += ("supervised_share", "contrast_weight")
    add_setting_flags(parser, leave_out=("images", "classes", "seed", "cache_dir", *fixed))
    settings = vars(parser.parse_args())
    names = ("msrcv2", "out", "seeds", "methods", "rows", "dev")
    source, out, seeds, methods, rows, dev = (settings.pop(name) for name in names)
    weights = settings.pop("weights", None)
    settings = {"classes": len(open_folder(source).classes), "labeled": "1/8", **settings}
    facts = msrc.circumstances("few_labels", [str(source), str(out), *([weights] if weights else [])])
    out.mkdir(parents=True, exist_ok=True)
    report = out / "quality_few_labels.json"
    kept = json.loads(report.read_text())["results"] if report.is_file() else []
    with tempfile.TemporaryDirectory() as folder:
        msrc.make_split(source, Path(folder), dev)
        new = {**measure(Path(folder), weights, seeds, methods, rows, settings), **facts}
    same = ("backbone", "methods")
    results = [old for old in kept if any(old[name] != new[name] for name in same)] + [new]
    report.write_text(json.dumps({"results": results}, indent=1) + "\n")
    report.with_suffix(".md").write_text("\n".join(msrc.page([result], ROWS) for result in results))
    print(msrc.table([new], ROWS), flush=True)


if __name__ == "__main__":
    main()
