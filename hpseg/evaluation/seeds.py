"""`hpseg eval RUNS DATA --seeds`: mean and standard deviation over runs that differ in their seed alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hpseg.evaluation.evaluate import SCORES, TITLES, evaluate_runs
from hpseg.run.config import MACHINE_FIELDS, Config
from hpseg.run.errors import UsageError
from hpseg.run.files import write_json


def evaluate_seeds(run: str | Path, data: str | Path, **options) -> dict:
    """Scores of all runs in folder `run`, from one pass over DATA; also written to RUN/eval.json.

    options: see `hpseg.evaluation.evaluate.evaluate_runs`.
    In the place of a run's scores stand the means over the runs, beside them "sd", the sample standard deviations
    (n - 1), and in "runs" the scores of each, with its confusion matrices and pictures. k-means, too, is repeated with
    another seed for each run.
    """
    names, seeds = zip(*find_seeds(Path(run)), strict=True)
    per_run = evaluate_runs([Path(run) / name for name in names], data, **options)
    results = {name: value for name, value in per_run[0].items() if name not in (*TITLES, "seed", "pictures")}
    results |= {"run_seeds": list(seeds), "seeds": [scores["seed"] for scores in per_run]}
    for method in (name for name in TITLES if name in per_run[0]):
        values = {
            key: np.array([scores[method][key] for scores in per_run])
            for key in (*SCORES.values(), "iou")
            if key in per_run[0][method]
        }
        results[method] = {key: value.mean(0).tolist() for key, value in values.items()}
        results[method]["sd"] = {key: value.std(0, ddof=1).tolist() for key, value in values.items()}
    results["runs"] = dict(zip(names, per_run, strict=True))
    write_json(Path(run) / "eval.json", results)
    return results


def find_seeds(folder: Path) -> list[tuple[str, int]]:
    """(name, seed) of the finished runs in `folder`, by seed. UsageError unless they are two or more, differ in their
    seed and agree in all else."""
    if (folder / "config.json").is_file():
        raise UsageError(f"seeds: {folder} is one run, expected the folder that holds the runs of several seeds")
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    names = [name for name in held if (folder / name / "config.json").is_file()]
    if len(names) < 2:
        found = ", ".join(held[:5]) or "nothing"
        raise UsageError(f"seeds: expected two or more folders made by `hpseg train` in {folder}, which holds: {found}")
    configs = {name: Config.load(folder / name / "config.json") for name in names}
    first, seeds = names[0], {}
    for name, config in configs.items():
        if not (folder / name / "results.json").is_file():
            raise UsageError(f"seeds: {folder / name} is not finished; go on with it by `hpseg train ... --resume`")
        for field, value in vars(configs[first]).items():
            if field not in (*MACHINE_FIELDS, "seed") and getattr(config, field) != value:
                raise UsageError(
                    f"seeds: the runs in {folder} differ in {field}: {value!r} in {first}, {getattr(config, field)!r} "
                    f"in {name}; expected the same settings but for the seed"
                )
        if config.seed in seeds:
            raise UsageError(f"seeds: {seeds[config.seed]} and {name} in {folder} both have the seed {config.seed}")
        seeds[config.seed] = name
    return [(name, seed) for seed, name in sorted(seeds.items())]
