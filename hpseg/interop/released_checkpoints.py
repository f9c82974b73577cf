"""The released Hidden Positives checkpoints as runs, and runs as such checkpoints.

A checkpoint is a torch file with

    net_model_state_dict      model.* (a DINO ViT by DINO's key names), and 1 x 1 convolutions with bias:
                              cluster1.0 (C -> D), cluster2.0 (C -> C), cluster2.2 (C -> D): the segmentation head,
                              ema_model1.0, ema_model2.0, ema_model2.2: the momentum head
    cluster_model_state_dict  clusters (K, D)
    linear_model_state_dict   weight (classes, D, 1, 1), bias (classes,): the linear probe

and with counters and optimiser states, which are not read. The projection head is not in it, so that an imported run
can be used, scored and probed, but not trained further.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from hpseg.inference.segmenter import load
from hpseg.models.backbone import Backbone, load_backbone
from hpseg.run.config import make_config
from hpseg.run.errors import UsageError
from hpseg.run.files import RunLock, read_torch, require_file, write_atomically, write_json, write_torch
from hpseg.run.folder import begin_run, load_model, load_tensors, save_model

NET, CLUSTER, LINEAR = "net_model_state_dict", "cluster_model_state_dict", "linear_model_state_dict"
LAYERS = {  # of the checkpoint -> of a run
    "cluster1.0": "head.linear",
    "cluster2.0": "head.hidden",
    "cluster2.2": "head.out",
    "ema_model1.0": "momentum_head.linear",
    "ema_model2.0": "momentum_head.hidden",
    "ema_model2.2": "momentum_head.out",
}
BACKBONE = "model."
BACKBONE_FILE = "backbone.safetensors"
PLAIN_VIT = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.\w+|norm\.\w+"
    r"|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
)


def import_hp(
    file: str | Path,
    out: str | Path,
    *,
    backbone: str | None = None,
    weights: str | Path | None = None,
    preset: str | None = None,
    overwrite: bool = False,
) -> dict:
    """Makes the run folder `out` of a released checkpoint; returns what it held.

    backbone: a timm name, with `weights` if given, in the place of the ViT in the checkpoint, which is otherwise copied
    to OUT/backbone.safetensors. Where the checkpoint holds a ViT, the two must be the same: the ViT-S/8 that was
    published with is not timm's.
    preset: the published configuration that config.json starts from; None takes "potsdam" for 3 clusters, else
    "cocostuff" (for a checkpoint of Cityscapes say so).
    """
    file, out = Path(file), Path(out)
    head, vit, centroids, linear, facts = _read(file)
    dim, channels = head["head.linear.weight"].shape
    if backbone is None and weights is not None:
        raise UsageError(f"weights: expected the name of a backbone with it, got {str(weights)!r} alone")
    if backbone is None and not vit:
        raise UsageError(f"backbone: {file} holds no tensors {BACKBONE}*; name the ViT it was trained on")
    config = make_config(
        preset or ("potsdam" if len(centroids) == 3 else "cocostuff"),
        classes=len(centroids),
        dim=dim,
        backbone=backbone or "embedded",
        weights=BACKBONE_FILE if backbone is None else None if weights is None else os.path.realpath(weights),
        cache_features=False,
    )
    content = None
    if backbone is None:
        content = save({name: tensor.contiguous() for name, tensor in vit.items()})
        with tempfile.TemporaryDirectory() as folder:  # a file that is no ViT must not cost an older run
            (Path(folder) / BACKBONE_FILE).write_bytes(content)
            found = load_backbone("embedded", Path(folder) / BACKBONE_FILE)
    else:
        found = load_backbone(backbone, weights)
        if vit:
            _require_same(found, vit, file)
    if found.channels != channels:
        raise UsageError(f"backbone: {backbone!r} has {found.channels} channels, the head in {file} {channels}")

    facts |= {"classes": len(centroids), "dim": dim, "channels": channels, "patch": found.patch, "linear": bool(linear)}
    with RunLock(out) as lock:
        begin_run(out, config, overwrite, lock)
        if content is not None:
            write_atomically(out / BACKBONE_FILE, content)
        save_model(out, {**head, "clusters.centroids": centroids}, found.fingerprint)
        if linear:
            probe = {f"linear.{name}": tensor.contiguous() for name, tensor in linear.items()}
            probe["cluster.centroids"] = centroids
            write_atomically(out / "probe.safetensors", save(probe, {"classes": ""}))
        write_json(out / "results.json", {"imported": file.name, **facts})
    return facts


def export_hp(run: str | Path, out: str | Path, *, overwrite: bool = False) -> dict:
    """Writes a run in the form of a released checkpoint, for the published code; returns what went in.

    The momentum head of a run that has none (STEGO) is its head. The linear probe is that of `hpseg probe`, and left
    out where the run was not probed; the published evaluation asks for one.
    """
    run, out = Path(run), Path(out)
    require_file("out", out, overwrite)
    vit = load(run, "cpu").backbone.vit.state_dict()
    strange = [name for name in vit if not PLAIN_VIT.fullmatch(name)]
    if strange:
        raise UsageError(f"run: {run} is on a ViT that the published code does not know (it has {strange[0]})")
    tensors, _ = load_model(run)
    if "clusters.centroids" not in tensors:
        raise UsageError(f"run: {run} has a classifier learned from labels, the published code expects clusters")
    net = {BACKBONE + name: tensor for name, tensor in vit.items()}
    for theirs, ours in LAYERS.items():
        for kind in ("weight", "bias"):
            tensor = tensors.get(f"{ours}.{kind}", tensors[f"head.{ours.split('.')[1]}.{kind}"])
            net[f"{theirs}.{kind}"] = tensor[:, :, None, None] if kind == "weight" else tensor
    content = {"epoch": 0, "iter": 0, "best_epoch": 0, "best_iter": 0, "best": 0.0, NET: net}
    content[CLUSTER] = {"clusters": tensors["clusters.centroids"]}
    probed = (run / "probe.safetensors").is_file()
    if probed:
        probe = load_tensors(run / "probe.safetensors")[0]
        content[LINEAR] = {"weight": probe["linear.weight"][:, :, None, None], "bias": probe["linear.bias"]}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_torch(out, content)
    return {"tensors": len(net), "linear": probed}


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, dict[str, Tensor], dict]:
    """Both heads by a run's names, the ViT, centroids (K, D), the linear probe or nothing, and the counters."""
    if not file.is_file():
        raise UsageError(f"file: no file {file}")
    content = read_torch("file", file)
    entries = content if isinstance(content, dict) else {}
    for name in (NET, CLUSTER):
        if not isinstance(entries.get(name), dict):
            held = ", ".join(map(str, entries)) or f"a {type(content).__name__}"
            raise UsageError(f"file: {file} is no Hidden Positives checkpoint: expected {name}, found {held}")
    net, clusters, linear = (
        {str(key).removeprefix("module."): value for key, value in (entries.get(name) or {}).items()}
        for name in (NET, CLUSTER, LINEAR)
    )
    known = {f"{layer}.{kind}": f"{ours}.{kind}" for layer, ours in LAYERS.items() for kind in ("weight", "bias")}
    heads = {key: tensor for key, tensor in net.items() if not key.startswith(BACKBONE)}
    if heads.keys() != known.keys():
        missing, others = sorted(known.keys() - heads.keys()), sorted(heads.keys() - known.keys())
        raise UsageError(
            f"file: {file}: {NET} lacks {', '.join(missing) or 'nothing'}; besides {BACKBONE}* it has "
            f"{', '.join(others[:8]) or 'nothing else'}"
        )
    dim, channels = heads["cluster1.0.weight"].shape[:2]
    for key, tensor in heads.items():
        rows = channels if "2.0." in key else dim
        _require_tensor(file, key, tensor, (rows, channels, 1, 1) if key.endswith("weight") else (rows,))
    count = clusters["clusters"].shape[0] if "clusters" in clusters else 0
    if set(clusters) != {"clusters"}:
        raise UsageError(f"file: {file}: {CLUSTER}: expected clusters, found {', '.join(clusters) or 'nothing'}")
    _require_tensor(file, "clusters", clusters["clusters"], (count, dim))
    if linear:
        if set(linear) != {"weight", "bias"}:
            raise UsageError(f"file: {file}: {LINEAR}: expected weight and bias, found {', '.join(linear)}")
        _require_tensor(file, "weight", linear["weight"], (len(linear["bias"]), dim, 1, 1))
        linear = {"weight": linear["weight"].flatten(1), "bias": linear["bias"]}
    vit = {key.removeprefix(BACKBONE): tensor for key, tensor in net.items() if key.startswith(BACKBONE)}
    run_heads = {known[key]: tensor.flatten(1) if tensor.ndim == 4 else tensor for key, tensor in heads.items()}
    counters = {name: entries[name] for name in ("epoch", "iter") if isinstance(entries.get(name), int)}
    return run_heads, vit, clusters["clusters"], linear, counters


def _require_tensor(file: Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise UsageError(f"file: {file}: {name}: expected shape {shape}, found {tuple(tensor.shape)}")
    if not tensor.isfinite().all():
        raise UsageError(f"file: {file}: {name}: expected finite numbers, found NaN or infinity")


def _require_same(found: Backbone, vit: dict[str, Tensor], file: Path) -> None:
    """A head fits the very weights it was trained on."""
    mine = found.vit.state_dict()
    if mine.keys() != vit.keys():
        odd = sorted(mine.keys() ^ vit.keys())
        raise UsageError(f"backbone: {found.name!r} is another ViT than the one in {file} (they differ in {odd[0]})")
    for name, tensor in vit.items():
        if mine[name].shape != tensor.shape or not torch.equal(mine[name].cpu(), tensor.to(mine[name])):
            raise UsageError(
                f"backbone: {found.name!r} holds other weights than the ViT in {file} ({name} differs); leave "
                "--backbone out to use the one in the file"
            )
