"""Training, top to bottom: `hpseg train PHOTOS --out RUN --classes K`, or `hpseg.train(...)`.

Reads images only, never labels, unless `labeled` or `select_on_labels` asks for them. Without the latter the last step
is the result. Under `torchrun` every rank runs this file on its share of each batch (hpseg.runtime.distributed): two
ranks with batches of b do what one does with batches of 2 b.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import os
import time
from collections.abc import Iterator
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import hpkernels
from hpseg.data.datasets import NAMES
from hpseg.data.folder import epoch_batches, hash_seed
from hpseg.features.pools import draw_tokens
from hpseg.methods.base import Method, Source, lambda_at
from hpseg.models.backbone import pick_device
from hpseg.models.finetune import predicting
from hpseg.models.heads import fit_centroids
from hpseg.run.config import make_config
from hpseg.run.errors import ReportedElsewhere, UsageError
from hpseg.run.files import RunLock, write_json
from hpseg.run.folder import open_run, resumed, save_model, save_state
from hpseg.run.presets import PRESETS
from hpseg.runtime.distributed import Share, explained, joined, own_device
from hpseg.runtime.interruption import Stop
from hpseg.runtime.messages import Pace, Stopwatch, muted, waiting
from hpseg.runtime.profile import Profile, each, profiling, stage
from hpseg.training.report import Report
from hpseg.training.setup import Setup, find_inputs, set_up
from hpseg.training.state import collect, restore

logger = logging.getLogger(__name__)
CLUSTERING_ROWS = 65_536
PATHS = ("weights", "extractor_weights", "root", "cache_dir", "select_on_labels", "select_root")


def train(
    images: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    **settings,
) -> dict:
    """Trains on the photographs in `images` and writes the run folder `out`; returns its results.

    images: a folder, searched recursively, or the name of a data set (hpseg.data.datasets.NAMES) found in `root`.
    quiet: no progress bar and no news. News are INFO records of the loggers below "hpseg"; a program sees them after
    `logging.basicConfig(level=logging.INFO)`, and warnings in any case.
    settings: fields of `hpseg.run.config.Config`, for example classes=8, steps=400.
    resume: goes on with the run in `out`, if there is one. Settings that decide the result may then be left out, and
    must be the run's own if given.
    """
    out, watch = Path(out), Stopwatch("loading")
    for name in PATHS:
        if settings.get(name) is not None and str(settings[name]) not in NAMES:
            settings[name] = os.path.realpath(settings[name])
    if settings.get("labeled") is not None and Path(settings["labeled"]).is_file():  # and no share as "1/8"
        settings["labeled"] = os.path.realpath(settings["labeled"])
    if str(images) not in NAMES:
        images = os.path.realpath(images)
    _require_own_preset(**settings)
    settings["images"] = str(images)
    config = make_config(**settings)
    device = own_device(pick_device(config.device))
    with (
        joined(device) as ranks,
        explained(ranks, out),
        RunLock(out) as lock,
        Stop() as stop,
        profiling(config.profile and ranks.writes, device) as profile,
        muted(quiet := quiet or not ranks.writes),
    ):
        config = dataclasses.replace(config, batch_size=config.batch_size * ranks.size)
        if resume:
            config = ranks.from_first(lambda: resumed(out, config, settings))
        with waiting("loading"):
            inputs = find_inputs(config, out, device, ranks)
        state = ranks.from_first(lambda: open_run(out, config, resume, overwrite, lock))
        watch.phase("features")
        return _train(set_up(inputs, quiet), state, stop, profile, watch, quiet)


def _require_own_preset(method: str | None = None, preset: str | None = None, **_) -> None:
    """A method named with another one's preset would train it with settings that are not its own."""
    if method is None or preset is None or preset not in PRESETS:
        return
    owner = PRESETS[preset].get("method", "hp")
    if method != owner:
        fitting = [name for name, values in PRESETS.items() if values.get("method", "hp") == method]
        raise UsageError(f"preset: {preset!r} is one of method {owner}; for {method} expected {', '.join(fitting)}")


def _train(
    setup: Setup, state: dict[str, Any] | None, stop: Stop, profile: Profile | None, watch: Stopwatch, quiet: bool
) -> dict:
    """From a checkpoint's state, or from none, to the results of a finished run, on one of the ranks."""
    config, out, ranks, selection = setup.config, setup.out, setup.ranks, setup.selection
    step = first_step = restore(setup, state)
    terms = setup.method.TERMS
    report = Report(out, config, step, terms, setup.backbone, setup.dataset, profile) if ranks.writes else None
    share = Share(ranks, setup.method.VIEWS * setup.batch_size, setup.source.dropout_rng)
    batches = _batches(setup, step, share)
    watch.phase("steps")
    started, pace = time.perf_counter(), Pace()
    bar = tqdm(total=config.steps, initial=step, desc="train", unit="step", disable=True if quiet else None)
    stop.later = True
    while step < config.steps:
        values, asked = _step(setup, step, batches, share, stop)
        seconds = time.perf_counter() - started
        rate = (step + 1 - first_step) * config.accumulate * setup.batch_size / seconds
        row = {"step": step, "lambda": lambda_at(step, config), "images_per_s": rate, "seconds": seconds, **values}
        step += 1
        bar.update()
        bar.set_postfix_str(f"loss {values['loss']:.3f}, {rate:.1f} images/s", refresh=False)
        if report:
            report.row(row)
            report.after(step, setup.method.state_dict)
        if selection and selection.due(step):
            with stage("periodic"):
                miou = selection.consider(step, _result(setup), setup.backbone)
            logger.info(f"step {step}: mIoU {miou:.1f} on {config.select_on_labels}")
        saves = step % config.save_every == 0 or step == config.steps
        if saves or asked:
            with stage("periodic"):
                _checkpoint(setup, step, report)
            if asked:
                bar.close()
                text = f"after step {step} of {config.steps}, which is saved; --resume goes on from there"
                raise stop.interrupted(text) if ranks.writes else ReportedElsewhere(text)
        if bar.disable and (pace.due() or saves):
            left = seconds / (step - first_step) * (config.steps - step)
            told = f"{rate:.1f} images/s  {left:.0f} s left"
            logger.info(f"step {step}/{config.steps}  loss {values['loss']:.4f}  {told}")
    stop.later = False
    bar.close()
    return _finish(setup, step, report, profile, watch, quiet)


def _batches(setup: Setup, step: int, share: Share) -> Iterator[tuple[int, Any]]:
    """From `step` on, the number of each batch in the run and its views, as `Method.losses` takes them."""
    config, method = setup.config, setup.method
    first, last = step * config.accumulate, config.steps * config.accumulate
    keys = epoch_batches(len(setup.dataset), setup.batch_size, config.seed, first, last)
    steps = (number // config.accumulate for number in itertools.count(first))
    own = (method.keys(batch, of)[share.rows] for batch, of in zip(keys, steps, strict=False))
    return enumerate(each("data", method.views(setup.encoder, own)), first)


def _step(
    setup: Setup, step: int, batches: Iterator[tuple[int, Any]], share: Share, stop: Stop
) -> tuple[dict[str, float], float]:
    """One optimiser step: its numbers for the log, and whether any rank was asked to end after it."""
    config, ranks, method, optimizers = setup.config, setup.ranks, setup.method, setup.optimizers.values()
    if step:
        with stage("periodic"):
            method.renew(step, setup.source)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    sums = []
    for batch, (tokens, jittered) in itertools.islice(batches, config.accumulate):
        with stage("head"):
            terms = method.losses(tokens, jittered, step, hash_seed("negatives", config.seed, batch), share)
            loss = reduce(add, terms.values()) / config.accumulate
        with stage("backward"):
            loss.backward()
        sums.append(torch.stack([loss, *(term / config.accumulate for term in terms.values())]).detach())
    with stage("backward"):
        ranks.sum_gradients(method.parameters())
    with stage("optimizer"):
        grad_norm = nn.utils.clip_grad_norm_(method.trained(), config.clip_norm or math.inf)
        method.follow()
        for optimizer in optimizers:
            optimizer.step()
        method.follow_up(step)

    asked = ranks.sum(grad_norm.new_tensor([float(stop.number > 0)]))  # any of the ranks: all stop at one step
    numbers = torch.cat([reduce(add, sums), grad_norm[None], asked]).tolist()  # one synchronisation for all of them
    asked = numbers.pop()
    values = dict(zip(("loss", *terms, "grad_norm"), numbers, strict=True))
    for name in ("loss", "grad_norm"):  # a finite loss may have a gradient that is not: the parameters are then lost
        if not math.isfinite(values[name]):
            raise ValueError(f"expected finite numbers, got {name} {values[name]} at step {step}")
    return values, asked


def _checkpoint(setup: Setup, step: int, report: Report | None) -> None:
    for name, tensor in setup.method.state_dict().items():  # the last step's parameters have met no loss yet
        if not tensor.isfinite().all():
            raise ValueError(f"expected finite numbers, found NaN or infinity in {name} after step {step}")
    setup.encoder.unreadable.update(*setup.ranks.collect(setup.encoder.unreadable))
    if report is None:
        return
    report.flush()
    save_state(setup.out, collect(setup, step))


def _result(setup: Setup) -> dict[str, Tensor]:
    """What the run gives if it ends here, the same on every rank."""
    config, tensors = setup.config, setup.method.state_dict()
    if config.clusters == "kmeans" and not config.learns_classes:
        codes = training_codes(setup.source, setup.method, config.seed)
        with waiting(f"k-means of {len(codes):,} codes"):
            fitted = setup.ranks.from_first(lambda: fit_centroids(codes, config.classes, config.seed).cpu())
        tensors["clusters.centroids"] = fitted.to(setup.device)
    return tensors


def _finish(
    setup: Setup, step: int, report: Report | None, profile: Profile | None, watch: Stopwatch, quiet: bool
) -> dict:
    """Writes what prediction reads, and returns the results that stand in results.json."""
    config, out, ranks, backbone, selection = setup.config, setup.out, setup.ranks, setup.backbone, setup.selection
    watch.phase("clustering")
    tensors = selection.tensors if selection else _result(setup)
    watch.phase("writing")
    unreadable = sorted(set().union(*ranks.collect(setup.encoder.unreadable)))
    results = {
        "steps": step,
        "photographs": len(setup.dataset.files),
        "backbone": backbone.facts(),
        "unreadable": unreadable,
        "device": str(setup.device),
        "torch": torch.__version__,
        "hpkernels": hpkernels.__version__,
        "threads": torch.get_num_threads(),
        "ranks": ranks.size,
        **(selection.results() if selection else {}),
        **({"profile": profile.summary()} if profile else {}),
    }
    if report:
        save_model(out, tensors, predicting(backbone, tensors, config).fingerprint)
        with waiting("previews"):
            report.finish(step, tensors)
    results |= watch.results()
    if report:
        write_json(out / "results.json", results)
    ranks.collect(None)  # what this returns on any rank is about a finished run folder
    if unreadable and not quiet:
        logger.warning(f"{len(unreadable)} unreadable pictures were skipped: {', '.join(unreadable[:5])}")
    if selection:
        logger.info(results["selection"])
    if profile:
        logger.info(profile.table())
    logger.info(f"trained; the run is in {out}")
    return results


@torch.no_grad()
def training_codes(source: Source, method: Method, seed: int) -> Tensor:
    """Codes (at most CLUSTERING_ROWS, D) of random patches of the training images, without dropout."""
    rng = torch.Generator().manual_seed(hash_seed("clustering", seed))

    def encode(batches: list[list[int]]) -> Iterator[tuple[Tensor, Share]]:
        for (view,), share in source.tokens(batches, 0):
            yield method.head.codes_of(view), share

    return draw_tokens(source.images, CLUSTERING_ROWS, source.images, encode, source.batch_size, rng, "codes")
