"""Pre-train a small ViT from scratch on unlabelled photographs: `hpseg pretrain PHOTOS --out FILE`.

A student ViT learns from a teacher, the moving average of its own weights (DINO, iBOT). Three terms, no labels:

image    two large and a few small crops of one image; the student's class token on any crop predicts the prototype
         assignment the teacher gives to the other large crop.
patch    the student sees a large crop with blocks of patches masked and its colours changed; at the masked patches
         (and a few visible ones) it predicts the teacher's assignment of the same patch in the teacher's colours.
texture  at every patch, hidden or not, it predicts hand-made texture and colour statistics (in the spirit of MaskFeat),
         which gives a small model on few photographs a useful signal from the first minutes.

Assignments are made even over prototypes by Sinkhorn iterations, so neither term can collapse to one prototype.
The result is FILE (the teacher, fp16 safetensors with timm's key names), FILE's .json (the architecture) and
FILE's .state.pt, from which `--resume` goes on.
"""

import math
import time
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from hpseg.data.folder import find_images
from hpseg.models.backbone import pick_device
from hpseg.pretraining.crops import MEAN, STATISTICS, STD, Crops, change_colours, random_masks, texture_statistics
from hpseg.pretraining.options import Options
from hpseg.run.errors import RunStopped, UsageError
from hpseg.run.files import read_torch, require_file, write_atomically, write_json, write_torch
from hpseg.run.folder import explaining_state
from hpseg.runtime.interruption import Stop


class Learner(nn.Module):
    """A timm ViT with a mask token, a head of prototypes for images and one for patches, and a texture read-out."""

    def __init__(self, vit, prototypes, statistics, hidden=384, code=96):
        super().__init__()
        width = vit.embed_dim
        self.vit = vit
        self.mask = nn.Parameter(torch.zeros(width))
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, code))
                for name in ("image", "patch")
            }
        )
        self.prototypes = nn.ParameterDict({name: nn.Parameter(torch.randn(prototypes, code)) for name in self.heads})
        self.texture = nn.Linear(width, statistics)
        self.register_buffer("centre", torch.zeros(statistics))
        self.register_buffer("basis", torch.eye(statistics))

    def fit_statistics(self, values):
        """Set the affine map that centres statistics (..., S) and evens out their directions (half-way to white)."""
        values = values.flatten(0, -2)
        self.centre.copy_(values.mean(0))
        spread = values.std(0) + 1e-6
        variance, axes = torch.linalg.eigh(((values - self.centre) / spread).T.cov())
        self.basis.copy_(axes * variance.clamp(min=1e-2) ** -0.25 / spread[:, None])

    def forward(self, x, mask=None):
        """Images (B, 3, H, W), mask bool (B, T) or None -> tokens (B, 1 + T, width) after the final norm."""
        x = self.vit.patch_embed(x)  # (B, h, w, width): dynamic_img_size keeps the grid
        if mask is not None:
            x = torch.where(mask.view(*x.shape[:3], 1), self.mask.to(x.dtype), x)
        return self.vit.norm(self.vit.blocks(self.vit.norm_pre(self.vit._pos_embed(x))))

    def scores(self, name, tokens):
        """Cosine of each token's code with each prototype: (N, width) -> (N, prototypes) fp32."""
        code = F.normalize(self.heads[name](tokens).float(), dim=-1)
        with torch.autocast(code.device.type, enabled=False):  # bf16 cosines are too coarse at temperature 0.06
            return code @ F.normalize(self.prototypes[name], dim=-1).T


def sinkhorn(scores, temperature=0.06, rounds=3):
    """Soft assignments (N, K): rows sum to 1, columns nearly equal."""
    q = torch.exp((scores - scores.max()) / temperature)
    for _ in range(rounds):
        q = q / q.sum(0).clamp(min=1e-12)
        q = q / q.sum(1, keepdim=True).clamp(min=1e-12)
    return q


def cross_entropy(target, scores, temperature=0.1):
    """Mean over rows of the cross-entropy between targets and softmax(scores / temperature), both (N, K)."""
    return -(target * F.log_softmax(scores / temperature, dim=-1)).sum(-1).mean()


def texture_loss(student, views, patch, tokens):
    """How far the read-out of `tokens` (B, 1 + T, width) is from the statistics of `views`, the normalised crops."""
    target = (texture_statistics(views, patch) - student.centre) @ student.basis
    return F.smooth_l1_loss(student.texture(tokens[:, 1:]).float(), target)


def losses(student, teacher, large, small, patch, generator, texture_only):
    """The terms for one batch of uint8 crops -> {name: scalar}; with `texture_only` there is no teacher in it."""
    crops, batch = large.float().flatten(0, 1) / 255, large.shape[1]  # (2B, 3, s, s): first crops, then second crops
    mask = random_masks(len(crops), large.shape[-1] // patch, generator).to(crops.device)
    views = change_colours(crops, generator)
    tokens = student(views, mask)
    terms = {"texture": texture_loss(student, views, patch, tokens)}
    if texture_only:
        return terms

    chosen = (mask | (torch.rand(mask.shape, generator=generator).to(mask.device) < 0.1)).flatten().nonzero()[:, 0]
    with torch.no_grad():
        seen = teacher(change_colours(crops, generator))  # whole, in other colours
        image_target = sinkhorn(teacher.scores("image", seen[:, 0]))
        patch_target = sinkhorn(teacher.scores("patch", seen[:, 1:].flatten(0, 1)[chosen]))
    terms["patch"] = cross_entropy(patch_target, student.scores("patch", tokens[:, 1:].flatten(0, 1)[chosen]))
    first, second = image_target.split(batch)
    targets, predicted = [second, first], [tokens[:, 0]]
    if small.numel():
        predicted.append(student(change_colours(small.float().flatten(0, 1) / 255, generator))[:, 0])
        targets += [(first + second) / 2] * len(small)
    terms["image"] = cross_entropy(torch.cat(targets), student.scores("image", torch.cat(predicted)))
    return terms


def build_vit(options):
    """The timm ViT that is trained, and the keyword arguments that build it again."""
    from timm.models.vision_transformer import VisionTransformer

    arch = dict(
        img_size=options.crop,
        patch_size=options.patch_size,
        embed_dim=options.width,
        depth=options.depth,
        num_heads=options.heads,
        num_classes=0,
        global_pool="",
        dynamic_img_size=True,
    )
    return VisionTransformer(**arch), arch


@torch.no_grad()
def mean_patch(teacher, batches, device, count=16):
    """The mean patch token (width,) over the large crops of `count` batches."""
    total = 0
    for _ in range(count):
        views = next(batches)[0].to(device).flatten(0, 1) / 255
        views = (views - views.new_tensor(MEAN).view(3, 1, 1)) / views.new_tensor(STD).view(3, 1, 1)
        total = total + teacher(views)[:, 1:].mean((0, 1))
    return total / count


def save(out, teacher, mean, arch, state):
    """Write weights, description and resumable state, each all at once.

    The mean patch token comes off the final norm's bias, so that cosines between patches see what differs among them.
    """
    weights = {name: value.detach().clone() for name, value in teacher.vit.state_dict().items()}
    weights["norm.bias"] -= mean
    write_atomically(out, safetensors.torch.save({n: value.half().contiguous().cpu() for n, value in weights.items()}))
    write_json(
        out.with_suffix(".json"),
        {"arch": arch, "mean": MEAN, "std": STD, "steps": state["step"], "options": state["options"]},
    )
    write_torch(out.with_suffix(".state.pt"), state)


def _require_output(out, resume, overwrite):
    """UsageError where the weights cannot be written to `out`, or cannot be gone on from."""
    if out.suffix != ".safetensors":
        raise UsageError(f"--out: expected a name that ends in .safetensors, got {out}")
    if resume and not out.with_suffix(".state.pt").is_file():
        raise UsageError(f"--resume: there is no {out.with_suffix('.state.pt')}")
    if out.is_file() and not (resume or overwrite):
        raise UsageError(f"--out: {out} exists; give --resume to go on or --overwrite to start again")
    for file in (out, out.with_suffix(".json"), out.with_suffix(".state.pt")):
        require_file("--out", file, overwrite=True)


def pretrain(photos, out, *, resume=False, overwrite=False, **settings):
    """Train on the folder `photos` as the settings, fields of `Options`, say, and save to `out` now and then, when
    interrupted, and at the end; returns the steps made and the seconds spent, those before a resumption among them."""
    out = Path(out)
    with Stop() as stop:
        options = Options(**settings)
        _require_output(out, resume, overwrite)
        return _pretrain(find_images(photos), out, options, resume, overwrite, stop)


def _pretrain(photos, out, options, resume, overwrite, stop):
    torch.manual_seed(options.seed)
    device = pick_device(options.device)
    vit, arch = build_vit(options)
    student = Learner(vit, options.prototypes, STATISTICS).to(device)
    teacher = Learner(build_vit(options)[0], options.prototypes, STATISTICS).to(device).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    decay = [p for p in student.parameters() if p.ndim > 1]
    plain = [p for p in student.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=options.lr,
        betas=(0.9, 0.98),
    )
    step, spent = 0, 0.0
    if resume:
        file = out.with_suffix(".state.pt")
        state = read_torch("--resume", file)
        with explaining_state(file):
            if state["arch"] != arch or state["options"]["prototypes"] != options.prototypes:
                raise UsageError(
                    f"--resume: {out} was started with {state['arch']}, "
                    f"{state['options']['prototypes']} prototypes; expected these, got {arch}, "
                    f"{options.prototypes}"
                )
            student.load_state_dict(state["student"])
            teacher.load_state_dict(state["teacher"])
            optimizer.load_state_dict(state["optimizer"])
            step, spent = int(state["step"]), float(state["seconds"])
            if step < 0 or not 0 <= spent < math.inf:
                raise ValueError(f"step {step} after {spent} seconds")
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
    batches = iter(
        torch.utils.data.DataLoader(Crops(photos, options, step), batch_size=None, num_workers=1, prefetch_factor=4)
    )
    chosen = {**vars(options), "resume": resume, "overwrite": overwrite}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    out.parent.mkdir(parents=True, exist_ok=True)

    def snapshot():
        save(
            out,
            teacher,
            mean_patch(teacher, batches, device),
            arch,
            {
                "student": student.state_dict(),
                "teacher": teacher.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "seconds": spent,
                "arch": arch,
                "options": chosen,
            },
        )

    bar = tqdm(desc=f"pretrain on {len(photos)} photographs", total=options.steps, initial=step, mininterval=1)
    saved = last = time.monotonic()
    stop.later = True
    while (progress := step / options.steps if options.steps else spent / (60 * options.minutes)) < 1:
        large, small = (crops.to(device) for crops in next(batches))
        if step == 0:
            views = change_colours(large.flatten(0, 1) / 255, generator)
            student.fit_statistics(texture_statistics(views, options.patch_size))
        for group in optimizer.param_groups:  # warm up over 5 %, then half a cosine
            group["lr"] = options.lr * min(1, progress / 0.05 + 0.01) * (0.51 + 0.49 * math.cos(math.pi * progress))
        texture_only = progress < options.texture_first and options.texture_weight > 0
        with torch.autocast(device.type, torch.bfloat16):
            terms = losses(student, teacher, large, small, options.patch_size, generator, texture_only)
        loss = sum(terms.values()) + (options.texture_weight - 1) * terms["texture"]
        if not math.isfinite(loss.item()):
            raise RunStopped(f"the loss is {loss.item()} at step {step}; lower --lr, and --resume from the last save")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        momentum = 0.998 - 0.018 * 0.5 * (1 + math.cos(math.pi * progress))
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
        step, now = step + 1, time.monotonic()
        spent, last = spent + now - last, now
        bar.update()
        bar.set_postfix(
            {name: f"{term.item():.3f}" for name, term in terms.items()} | {"minutes": f"{spent / 60:.1f}"},
            refresh=False,
        )
        if now - saved > options.save_every or stop.number:
            snapshot()
            saved = now
        if stop.number:
            bar.close()
            raise stop.interrupted(f"after step {step}, which is saved; --resume goes on from there")
    snapshot()
    bar.close()
    return step, spent
