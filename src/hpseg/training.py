"""Training, top to bottom: `hpseg train PHOTOS --out RUN --classes K`, or `hpseg.train(...)`.

Reads images only, never labels; the last step is the result.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import hpkernels
from hpseg.backbones import load_backbone, pick_device
from hpseg.checkpoints import Log, open_run, save_model, save_state, write_json
from hpseg.clustering import spherical_kmeans
from hpseg.config import UsageError, make_config
from hpseg.data.folder import PhotoFolder, epoch_batches, hash_seed
from hpseg.data.labelled import NAMES, training_images
from hpseg.encoder import Encoder
from hpseg.methods import Source, make_method
from hpseg.methods.hp import lambda_at
from hpseg.pools import draw_tokens

CLUSTERING_ROWS = 65_536


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

    images: a folder, searched recursively, or the name of a data set (hpseg.data.labelled.NAMES) found in `root`.
    settings: fields of `hpseg.config.Config`, for example classes=8, steps=400, backbone="vit_small_patch8_224.dino".
    """
    out = Path(out)
    if settings.get("weights") is not None:
        settings["weights"] = str(Path(settings["weights"]).resolve())
    if settings.get("root") is not None:
        settings["root"] = str(Path(settings["root"]).resolve())
    if str(images) not in NAMES:
        images = Path(images).resolve()
    config = make_config(**{**settings, "images": str(images)})
    files, read = training_images(config.images, config.root)
    device = pick_device(config.device)
    backbone = load_backbone(config.backbone, config.weights, dtype=config.dtype).to(device)
    state = open_run(out, config, resume, overwrite)

    with_jitter = config.consistency_weight > 0
    dataset = PhotoFolder(files, backbone.snap(config.size), config.crop, config.seed, with_jitter, read)
    batch_size = min(config.batch_size, len(dataset))
    say = (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr, flush=True))
    say(
        f"{len(files)} photographs, {config.classes} classes, {config.backbone} on {device}, batches of {batch_size} "
        f"at {dataset.size} x {dataset.size} pixels"
    )
    encoder = Encoder(backbone, dataset, config, device)
    if config.cache_features and not encoder.cache:
        say(f"features are not cached: {encoder.cache_bytes() / 2**30:.0f} GiB would be too much")

    # Random numbers come from these two generators only, so that their states are all there is to save.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash_seed("init", config.seed))
        method = make_method(backbone.channels, config).to(device)
    dropout_rng = torch.Generator(device).manual_seed(hash_seed("dropout", config.seed))
    pool_rng = torch.Generator().manual_seed(hash_seed("pools", config.seed))
    optimizers = method.optimizers()
    source = Source(len(dataset), encoder.features, batch_size, dropout_rng, pool_rng)
    if state is None:
        step = 0
        method.start(source)
    else:
        step = state["step"]
        if state["fingerprint"] != backbone.fingerprint:
            raise UsageError(f"backbone: {config.backbone!r} holds other weights than those {out} was started with")
        method.load_state_dict(state["method"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        method.load_extra_state(state["extra"])
        dropout_rng.set_state(state["dropout_rng"])
        pool_rng.set_state(state["pool_rng"])
        encoder.unreadable.update(state["unreadable"])
        say(f"going on from step {step} of {config.steps}")

    def checkpoint() -> None:
        log.flush()
        save_state(
            out,
            {
                "step": step,
                "fingerprint": backbone.fingerprint,
                "method": method.state_dict(),
                "extra": method.extra_state(),
                "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
                "dropout_rng": dropout_rng.get_state(),
                "pool_rng": pool_rng.get_state(),
                "unreadable": sorted(encoder.unreadable),
            },
        )

    log = Log(out / "log.csv", step, method.TERMS)
    started, first_step = time.perf_counter(), step
    keys = epoch_batches(len(dataset), batch_size, config.seed, step, config.steps)
    bar = tqdm(total=config.steps, initial=step, desc="train", unit="step", disable=True if quiet else None)
    for tokens, jittered in encoder(method.keys(batch, config.seed) for batch in keys):
        if step:
            method.renew(step, source)
        terms = method.losses(tokens, jittered, step, hash_seed("negatives", config.seed, step), dropout_rng)
        loss = sum(terms.values())
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(method.head.parameters(), config.clip_norm or math.inf)
        for optimizer in optimizers.values():
            optimizer.step()

        numbers = torch.stack([loss, grad_norm, *terms.values()]).tolist()  # one synchronisation for all of them
        values = dict(zip(("loss", "grad_norm", *terms), numbers, strict=True))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss: {values} at step {step}; the last checkpoint in {out} is from before")
        seconds = time.perf_counter() - started
        rate = (step + 1 - first_step) * batch_size / seconds
        log.write({"step": step, "lambda": lambda_at(step, config), "images_per_s": rate, "seconds": seconds, **values})
        step += 1
        bar.update()
        bar.set_postfix_str(f"loss {values['loss']:.3f}, {rate:.1f} images/s", refresh=False)
        if step % config.save_every == 0 or step == config.steps:
            checkpoint()
            if bar.disable:
                left = seconds / (step - first_step) * (config.steps - step)
                say(f"step {step}/{config.steps}  loss {values['loss']:.4f}  {rate:.1f} images/s  {left:.0f} s left")
    bar.close()
    log.close()

    tensors = method.state_dict()
    if config.clusters == "kmeans":
        codes = training_codes(encoder, method, batch_size, config.seed)
        tensors["clusters.centroids"], _ = spherical_kmeans(codes, config.classes, seed=config.seed)
    save_model(out, tensors, backbone.fingerprint)
    results = {
        "steps": step,
        "photographs": len(files),
        "unreadable": sorted(encoder.unreadable),
        "seconds": round(time.perf_counter() - started, 2),
        "device": str(device),
        "torch": torch.__version__,
        "hpkernels": hpkernels.__version__,
        "threads": torch.get_num_threads(),
    }
    write_json(out / "results.json", results)
    if encoder.unreadable:
        say(f"{len(encoder.unreadable)} unreadable pictures were skipped: {', '.join(sorted(encoder.unreadable)[:5])}")
    say(f"trained; the run is in {out}")
    return results


@torch.no_grad()
def training_codes(encoder: Encoder, method: nn.Module, batch_size: int, seed: int) -> Tensor:
    """Codes (at most CLUSTERING_ROWS, D) of random patches of the training images, without dropout."""
    images, rng = len(encoder.dataset), torch.Generator().manual_seed(hash_seed("clustering", seed))
    return draw_tokens(
        images,
        CLUSTERING_ROWS,
        images,
        lambda batches: (method.head(f) for f in encoder.features(batches, 0)),
        batch_size,
        rng,
    )
