"""Pre-train a small ViT from scratch on unlabelled photographs: `hpseg pretrain PHOTOS --out FILE`.

A student ViT learns from a teacher, the moving average of its own weights (DINO, iBOT). Three terms, no labels:

image    two large and a few small crops of one image; the student's class token on any crop predicts the prototype
         assignment the teacher gives to the other large crop.
patch    the student sees a large crop with blocks of patches masked and its colours changed; at the masked patches
         (and a few visible ones) it predicts the teacher's assignment of the same patch in the teacher's colours.
texture  at every patch, hidden or not, it predicts hand-made texture and colour statistics (in the spirit of MaskFeat),
         which gives a small model on few photographs a useful signal from the first minutes.

Assignments are made even over prototypes by Sinkhorn iterations, so neither term can collapse to one prototype.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hpseg.data.folder import find_images
from hpseg.pretraining.crops import (
    MEAN,
    STATISTICS,
    STD,
    Crops,
    change_colours,
    made_ahead,
    random_masks,
    texture_statistics,
)
from hpseg.pretraining.options import Options
from hpseg.pretraining.trainer import Recipe, require_output, train_recipe
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


class SelfDistillation(Recipe):
    """The three terms above; what is kept is the teacher."""

    name = "pretrain"

    def __init__(self, photos, options):
        super().__init__(photos, options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            vit, arch = build_vit(options)
            self.student = Learner(vit, options.prototypes, STATISTICS).to(self.device)
            self.teacher = Learner(build_vit(options)[0], options.prototypes, STATISTICS).to(self.device)
        self.teacher.requires_grad_(False).load_state_dict(self.student.state_dict())
        self.architecture, self.learner = {"arch": arch}, self.student
        self.fixed = {"prototypes": options.prototypes}
        self.parts = {"student": self.student, "teacher": self.teacher}
        self.crops = Crops(photos, options, 0)

    def batches(self, start):
        self.crops.start = start
        return made_ahead(self.crops)

    def begin(self):
        large, _ = next(iter(self.crops))
        views = change_colours(large.to(self.device).flatten(0, 1) / 255, self.draws(0))
        self.student.fit_statistics(texture_statistics(views, self.options.patch_size))

    def losses(self, batch, step, progress):
        options = self.options
        large, small = (crops.to(self.device) for crops in batch)
        texture_only = progress < options.texture_first and options.texture_weight > 0
        with torch.autocast(self.device.type, torch.bfloat16):
            terms = losses(self.student, self.teacher, large, small, options.patch_size, self.draws(step), texture_only)
        return sum(terms.values()) + (options.texture_weight - 1) * terms["texture"], terms

    def draws(self, step):
        """The random numbers of a step."""
        return torch.Generator().manual_seed(self.options.seed * 1_000_003 + step)

    @torch.no_grad()
    def after_step(self, progress):
        momentum = 0.998 - 0.018 * 0.5 * (1 + math.cos(math.pi * progress))
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum)

    def result(self):
        """The teacher. The mean patch token comes off the final norm's bias, so that cosines between patches see what
        differs among them."""
        weights = {name: value.detach().clone() for name, value in self.teacher.vit.state_dict().items()}
        weights["norm.bias"] -= self.mean_patch()
        return weights

    @torch.no_grad()
    def mean_patch(self, count=16):
        """The mean patch token (width,) over the large crops of `count` batches."""
        batches, total = iter(self.crops), 0
        for _ in range(count):
            views = next(batches)[0].to(self.device).flatten(0, 1) / 255
            views = (views - views.new_tensor(MEAN).view(3, 1, 1)) / views.new_tensor(STD).view(3, 1, 1)
            total = total + self.teacher(views)[:, 1:].mean((0, 1))
        return total / count

    def description(self):
        return {"mean": MEAN, "std": STD}


def pretrain(photos, out, *, resume=False, overwrite=False, **settings):
    """Train on the folder `photos` as the settings, fields of `Options`, say, and save to `out` now and then, when
    interrupted, and at the end; returns the steps made and the seconds spent, those before a resumption among them."""
    out = Path(out)
    with Stop() as stop:
        options = Options(**settings)
        require_output(out, resume, overwrite)
        return train_recipe(SelfDistillation(find_images(photos), options), out, stop, resume)
