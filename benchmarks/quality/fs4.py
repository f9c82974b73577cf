"""FS^4 on MSRC v2, with each part switched off in turn, beside k-means on the same frozen features.

    python -m benchmarks.quality.fs4 MSRCV2 --out OUT [--weights FILE] [settings of hpseg train]

The split, the scores and the options are those of benchmarks.quality.msrc; no label is seen in training.
Writes OUT/quality_fs4.json and OUT/quality_fs4.md: mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.quality import msrc
from hpseg.cli.train import add_setting_flags
from hpseg.data.datasets import open_folder
from hpseg.run.config import make_config

PARTS = {
    "fs4": {},
    "no_context": {"context_attention": False},
    "no_pyramid": {"pyramid_weight": 0.0},
    "no_pixel": {"pixel_weight": 0.0, "clusters": "kmeans"},
}
ROWS = {
    "kmeans_rgb": "k-means, RGB",
    "kmeans_features": "k-means, frozen features",
    "fs4": "FS^4",
    "no_context": "without context",
    "no_pyramid": "without pyramid labels",
    "no_pixel": "without pixel clustering",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("msrcv2", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--dev", action="store_true", default=False, help="split the training images, no test")
    fixed = {name for own in PARTS.values() for name in own} - {"clusters"}
    add_setting_flags(parser, leave_out=("images", "classes", "method", "preset", "seed", "cache_dir", *fixed))
    settings = vars(parser.parse_args())
    source, out, seeds, parts, dev = (settings.pop(name) for name in ("msrcv2", "out", "seeds", "parts", "dev"))
    weights = settings.pop("weights", None)
    settings = {"method": "fs4", "classes": len(open_folder(source).classes), **settings}
    settings = {"cache_features": make_config(**settings).cache_features, **settings}
    facts = msrc.circumstances("fs4", [str(source), str(out), *([weights] if weights else [])])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        msrc.make_split(source, Path(folder), dev)
        chosen = {name: PARTS[name] for name in parts}
        result = {**msrc.measure(Path(folder), weights, seeds, chosen, settings), **facts}
    (out / "quality_fs4.json").write_text(json.dumps({"results": [result]}, indent=1) + "\n")
    (out / "quality_fs4.md").write_text(msrc.page([result], ROWS))
    print(msrc.table([result], ROWS), flush=True)


if __name__ == "__main__":
    main()
