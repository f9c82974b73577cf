"""Training, top to bottom: `hpseg train PHOTOS --out RUN --classes K`, or `hpseg.train(...)`.

Reads images only, never labels, unless `labeled` or `select_on_labels` asks for them. Without the latter the last step
is the result. Under `torchrun` every rank runs this file on its share of each batch (hpseg.runtime.distributed): two
ranks with batches of b do what one does with batches of 2 b.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator
from functools import reduce
from operator import add
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import hpkernels
from hpseg.data.datasets import NAMES
from hpseg.data.folder import epoch_batches, hash_seed
from hpseg.features.pools import draw_tokens
from hpseg.features.tokens import Encoder
from hpseg.methods.base import Method, Source, lambda_at, method_class
from hpseg.models.backbone import load_backbone, pick_device
from hpseg.models.finetune import predicting
from hpseg.models.heads import fit_centroids
from hpseg.models.weights import note_on
from hpseg.run.config import Config, make_config
from hpseg.run.errors import ReportedElsewhere, RunStopped, UsageError
from hpseg.run.files import RunLock, write_json
from hpseg.run.folder import explaining_state, open_run, resumed, save_model, save_state
from hpseg.run.presets import PRESETS
from hpseg.runtime.distributed import Ranks, Share, explained, joined, own_device
from hpseg.runtime.interruption import Stop
from hpseg.runtime.profile import Profile, each, profiling, stage
from hpseg.training.compiled import compile_parts, require_compiler
from hpseg.training.report import Report, tensorboard_writer

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
    settings: fields of `hpseg.run.config.Config`, for example classes=8, steps=400.
    resume: goes on with the run in `out`, if there is one. Settings that decide the result may then be left out, and
    must be the run's own if given.
    """
    out = Path(out)
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
    ):
        config = dataclasses.replace(config, batch_size=config.batch_size * ranks.size)
        if resume:
            config = ranks.from_first(lambda: resumed(out, config, settings))
        return _train(config, out, device, ranks, lock, stop, profile, resume, overwrite, quiet or not ranks.writes)


def _require_own_preset(method: str | None = None, preset: str | None = None, **_) -> None:
    """A method named with another one's preset would train it with settings that are not its own."""
    if method is None or preset is None or preset not in PRESETS:
        return
    owner = PRESETS[preset].get("method", "hp")
    if method != owner:
        fitting = [name for name, values in PRESETS.items() if values.get("method", "hp") == method]
        raise UsageError(f"preset: {preset!r} is one of method {owner}; for {method} expected {', '.join(fitting)}")


def _train(
    config: Config,
    out: Path,
    device: torch.device,
    ranks: Ranks,
    lock: RunLock,
    stop: Stop,
    profile: Profile | None,
    resume: bool,
    overwrite: bool,
    quiet: bool,
) -> dict:
    """`train` on one of the ranks; config.batch_size is that of all ranks together."""
    with ranks.agree():
        selection = None
        if config.select_on_labels is not None:
            from hpseg.training.selection import Selection

            selection = Selection(config, ranks)
        if config.tensorboard:
            tensorboard_writer()  # before there is a run folder
        if config.compile:
            require_compiler(device)
        backbone = load_backbone(config.backbone, config.weights, dtype=config.dtype, pos_embed=config.pos_embed)
        backbone = backbone.to(device)
        dataset = method_class(config.method).open_photographs(config, backbone)
        encoder = Encoder(backbone, dataset, config, device, out)
        batch_size = min(config.batch_size, len(dataset))
        for name, rows in (("images", batch_size), ("pool_size", config.pool_size)):
            if rows < ranks.size:
                raise UsageError(f"{name}: expected at least one for each of {ranks.size} ranks, got {rows}")
    held = ranks.collect((len(dataset.files), backbone.fingerprint))
    if len(set(held)) > 1:
        raise UsageError(f"images, weights: expected the same on every rank, got (files, hash of the backbone) {held}")
    state = ranks.from_first(lambda: open_run(out, config, resume, overwrite, lock))

    say = (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr, flush=True))
    say(
        f"{len(dataset.files)} photographs, {config.classes} classes, {config.backbone} on {device}, "
        f"batches of {batch_size} at {dataset.size} x {dataset.size} pixels"
        + (f" on {ranks.size} ranks" if ranks.size > 1 else "")
    )
    if note := note_on(backbone.source):
        say(f"backbone: {note}")
    encoder.fill(say, ranks)

    # Random numbers come from these two generators only, so that their states are all there is to save.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash_seed("init", config.seed))
        method = method_class(config.method)(backbone.channels, config).to(device)
        if config.finetune:
            method.adopt(backbone)
            encoder.backbone = method.backbone
    dropout_rng = torch.Generator(device).manual_seed(hash_seed("dropout", config.seed))
    pool_rng = torch.Generator().manual_seed(hash_seed("pools", config.seed))
    optimizers = method.optimizers()
    if config.compile:
        compile_parts(encoder.backbone, method)
    source = Source(encoder, ranks, batch_size, dropout_rng, pool_rng, out, say)
    method.prepare(source)
    folder = config.root or config.images
    pictures = hash_seed("pictures", *sorted(os.path.relpath(path, folder) for path in dataset.files))
    if state is None:
        step = 0
        method.start(source)
    else:
        with explaining_state(out / "state.pt"):
            step = state["step"]
            if state["fingerprint"] != backbone.fingerprint:
                raise UsageError(f"backbone: {config.backbone!r} holds other weights than those {out} was started with")
            if state.get("pictures", pictures) != pictures:
                raise UsageError(
                    f"images: pictures were added to, removed from or renamed in {config.images} since {out} was "
                    "started; resume with those that were there, or start anew with overwrite"
                )
            method.load_state_dict(state["method"])
            for name, optimizer in optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
            method.load_extra_state(state["extra"])
            dropout_rng.set_state(state["dropout_rng"])
            pool_rng.set_state(state["pool_rng"])
            encoder.unreadable.update(state["unreadable"])
            if selection:
                selection.load_state(state["selection"])
        say(f"going on from step {step} of {config.steps}")

    def checkpoint() -> None:
        encoder.unreadable.update(*ranks.collect(encoder.unreadable))
        if report is None:
            return
        report.flush()
        save_state(
            out,
            {
                "step": step,
                "fingerprint": backbone.fingerprint,
                "pictures": pictures,
                "method": method.state_dict(),
                "extra": method.extra_state(),
                "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
                "dropout_rng": dropout_rng.get_state(),
                "pool_rng": pool_rng.get_state(),
                "unreadable": sorted(encoder.unreadable),
                **({"selection": selection.state()} if selection else {}),
            },
        )

    def result() -> dict[str, Tensor]:
        """What the run gives if it ends here, the same on every rank."""
        tensors = method.state_dict()
        if config.clusters == "kmeans" and not config.learns_classes:
            codes = training_codes(source, method, config.seed)
            fitted = ranks.from_first(lambda: fit_centroids(codes, config.classes, config.seed).cpu())
            tensors["clusters.centroids"] = fitted.to(device)
        return tensors

    report = Report(out, config, step, method.TERMS, backbone, dataset, profile) if ranks.writes else None
    share = Share(ranks, method.VIEWS * batch_size, dropout_rng)
    first_batch, last_batch = step * config.accumulate, config.steps * config.accumulate
    keys = epoch_batches(len(dataset), batch_size, config.seed, first_batch, last_batch)
    steps = (number // config.accumulate for number in itertools.count(first_batch))
    views = method.views(encoder, (method.keys(batch, of)[share.rows] for batch, of in zip(keys, steps, strict=False)))
    batches = enumerate(each("data", views), first_batch)
    started, first_step = time.perf_counter(), step
    bar = tqdm(total=config.steps, initial=step, desc="train", unit="step", disable=True if quiet else None)
    stop.later = True
    while step < config.steps:
        if step:
            with stage("periodic"):
                method.renew(step, source)
        for optimizer in optimizers.values():
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
            for optimizer in optimizers.values():
                optimizer.step()
            method.follow_up(step)

        asked = ranks.sum(grad_norm.new_tensor([float(stop.number > 0)]))  # any of the ranks: all stop at one step
        numbers = torch.cat([reduce(add, sums), grad_norm[None], asked]).tolist()  # one synchronisation for all of them
        asked = numbers.pop()
        values = dict(zip(("loss", *terms, "grad_norm"), numbers, strict=True))
        if not math.isfinite(values["loss"]):
            raise RunStopped(f"loss: {values} at step {step}; the last checkpoint in {out} is from before")
        seconds = time.perf_counter() - started
        rate = (step + 1 - first_step) * config.accumulate * batch_size / seconds
        row = {"step": step, "lambda": lambda_at(step, config), "images_per_s": rate, "seconds": seconds, **values}
        step += 1
        bar.update()
        bar.set_postfix_str(f"loss {values['loss']:.3f}, {rate:.1f} images/s", refresh=False)
        if report:
            report.row(row)
            report.after(step, method.state_dict)
        if selection and selection.due(step):
            with stage("periodic"):
                miou = selection.consider(step, result(), backbone)
            say(f"step {step}: mIoU {miou:.1f} on {config.select_on_labels}")
        if step % config.save_every == 0 or step == config.steps or asked:
            with stage("periodic"):
                checkpoint()
            if asked:
                bar.close()
                text = f"after step {step} of {config.steps}, which is saved; --resume goes on from there"
                raise stop.interrupted(text) if ranks.writes else ReportedElsewhere(text)
            if bar.disable:
                left = seconds / (step - first_step) * (config.steps - step)
                say(f"step {step}/{config.steps}  loss {values['loss']:.4f}  {rate:.1f} images/s  {left:.0f} s left")
    stop.later = False
    bar.close()

    tensors = selection.tensors if selection else result()
    unreadable = sorted(set().union(*ranks.collect(encoder.unreadable)))
    results = {
        "steps": step,
        "photographs": len(dataset.files),
        "backbone": {"name": backbone.name, "weights": backbone.source, "fingerprint": backbone.fingerprint},
        "unreadable": unreadable,
        "seconds": round(time.perf_counter() - started, 2),
        "device": str(device),
        "torch": torch.__version__,
        "hpkernels": hpkernels.__version__,
        "threads": torch.get_num_threads(),
        "ranks": ranks.size,
        **(selection.results() if selection else {}),
        **({"profile": profile.summary()} if profile else {}),
    }
    if report:
        save_model(out, tensors, predicting(backbone, tensors, config).fingerprint)
        report.finish(step, tensors)
        write_json(out / "results.json", results)
    ranks.collect(None)  # what this returns on any rank is about a finished run folder
    if unreadable:
        say(f"{len(unreadable)} unreadable pictures were skipped: {', '.join(unreadable[:5])}")
    if selection:
        say(results["selection"])
    if profile:
        say(profile.table())
    say(f"trained; the run is in {out}")
    return results


@torch.no_grad()
def training_codes(source: Source, method: Method, seed: int) -> Tensor:
    """Codes (at most CLUSTERING_ROWS, D) of random patches of the training images, without dropout."""
    rng = torch.Generator().manual_seed(hash_seed("clustering", seed))

    def encode(batches: list[list[int]]) -> Iterator[tuple[Tensor, Share]]:
        for (view,), share in source.tokens(batches, 0):
            yield method.head.codes_of(view), share

    return draw_tokens(source.images, CLUSTERING_ROWS, source.images, encode, source.batch_size, rng)
