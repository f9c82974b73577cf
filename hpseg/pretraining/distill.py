"""Train a small ViT to see what a large network sees: `hpseg distill PHOTOS --teacher NAME --out FILE`.

Student and teacher look at the same crop, the teacher at `teacher_scale` times the student's resolution. The student's
patch tokens after the final norm are trained towards the teacher's features on the student's grid, centred, weighted
by level and rotated to the student's width (see `Lesson`):

    loss = |t - y|^2 / C + 1 - cos(t, y), averaged over patches, for tokens t and targets y of C numbers

No labels are read; what labels the teacher has seen, the student has seen through it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpseg.data.attribution import attributed
from hpseg.data.folder import find_images
from hpseg.models.architecture import ConvStem, build_vit, fold_batch_norms
from hpseg.models.backbone import Backbone
from hpseg.pretraining.crops import MEAN, STD, change_colours, made_ahead
from hpseg.pretraining.options import DistillOptions
from hpseg.pretraining.teacher import ConvTeacher, Lesson, Teacher, load_teacher
from hpseg.pretraining.trainer import Recipe, require_output, train_recipe
from hpseg.pretraining.views import Views, mixed
from hpseg.run.errors import UsageError
from hpseg.runtime.interruption import Stop
from hpseg.runtime.messages import progress

VIT = {"patch_size": 8, "embed_dim": 192, "num_heads": 3}
STUDENTS: dict[str, dict[str, Any]] = {
    "vit_tiny8": {"arch": {**VIT, "depth": 6}},
    "hybrid_tiny8": {"arch": {**VIT, "depth": 5}, "stem": {"strides": [8, 16]}},  # on stages of the teacher
}
FIT_BATCHES = 24  # of crops, from which the lesson's mean and rotation are taken
FIXED = ("student", "levels", "teacher_scale", "batch_size", "sides", "mix", "seed", "dtype")
STEM_RATE = 0.3  # of the learning rate, for what the teacher has learned already


def build_student(name: str, side: int, teacher: Teacher) -> tuple[nn.Module, dict[str, Any]]:
    """The ViT that is trained, and what builds it again: one of STUDENTS, or any ViT of timm from random weights."""
    facts = STUDENTS.get(name, {"model": name, "arch": {}})
    facts = {**facts, "arch": {"img_size": side, **facts["arch"]}}
    if "stem" in facts:
        if not isinstance(teacher, ConvTeacher):
            raise UsageError(f"--student: {name} begins with stages of a convolutional teacher, got {teacher.name!r}")
        facts["stem"] = {"network": teacher.name.split(".")[0], **facts["stem"]}
    try:
        vit = build_vit({**facts, "stem": {**facts["stem"], "folded": False}} if "stem" in facts else facts)
        embedding = vit.patch_embed
        used = Backbone(copy.deepcopy(vit), name, MEAN, STD)
        used(torch.zeros(1, 3, 2 * used.patch, 3 * used.patch, dtype=torch.uint8), with_neighbors=True)
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        known = ", ".join(STUDENTS)
        raise UsageError(f"--student: expected {known} or a ViT of timm, got {name!r} ({error})") from None
    if isinstance(embedding, ConvStem):
        known = teacher.network.state_dict()
        embedding.network.load_state_dict({key: known[key] for key in embedding.network.state_dict()})
        _require_foldable(embedding, teacher.name)
    return vit, facts


@torch.no_grad()
def _require_foldable(stem: ConvStem, name: str) -> None:
    """UsageError where a batch norm does not follow the convolution before it in its module."""
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    folded = copy.deepcopy(stem)
    fold_batch_norms(folded.network)
    one, other = folded(pixels), stem(pixels)
    if not torch.allclose(one, other, atol=1e-2 * float(other.abs().max())):
        raise UsageError(f"--student: the batch norms of {name!r} cannot be folded; expected a student without a stem")


class Distillation(Recipe):
    name = "distill"

    def __init__(self, photos: list[Path], options: DistillOptions, folder: Path):
        super().__init__(photos, options)
        teacher = load_teacher(options.teacher, options.teacher_weights, options.levels, options.dtype)
        self.teacher = teacher.to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.vit, self.architecture = build_student(options.student, max(options.sides), self.teacher)
        self.vit.to(self.device).train()
        self.patch = self.vit.patch_embed.patch_size[0]
        for side in options.sides:
            if side % self.patch:
                raise UsageError(f"--sides: expected multiples of the student's patch, {self.patch} pixels, got {side}")
        self.normalisation = {"mean": MEAN, "std": STD}
        if "stem" in self.architecture:
            self.normalisation = self.teacher.normalisation
        large = [round(side * options.teacher_scale) for side in options.sides]
        self.side_of = dict(zip(large, options.sides, strict=True))
        if min(large) < 1 or len(self.side_of) < len(set(options.sides)):
            raise UsageError(f"--teacher-scale: expected larger crops for the teacher, got {large} pixels a side")
        for side in large:
            channels = self._channels(side)
        self.lesson = Lesson(list(self.teacher.levels.values()), channels, self.vit.embed_dim).to(self.device)
        self.parts, self.learner = {"student": self.vit, "lesson": self.lesson}, self.vit
        self.fixed = {name: getattr(options, name) for name in FIXED}
        self.fixed |= {"teacher": self.teacher.fingerprint, "photographs": len(photos)}
        self.record = attributed(folder, photos)
        self.views = Views(photos, large, options.batch_size, options.seed)

    def rate(self, name: str) -> float:
        return STEM_RATE if name.startswith("patch_embed.network.") else 1.0

    def arithmetic(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.dtype == "bf16")

    def _channels(self, side: int) -> list[int]:
        """Channels of the teacher's levels; UsageError where it cannot see pictures of that side."""
        blank = torch.zeros(1, 3, side, side, device=self.device)
        try:
            with self.arithmetic():
                maps = self.taught(blank)
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(
                f"--teacher: {self.teacher.name!r} makes no feature maps of {side} x {side} pixels "
                f"({type(error).__name__}: {str(error)[:200]}); expected a network that takes pictures of any size"
            ) from None
        return [values.shape[1] for values in maps]

    def taught(self, pixels: Tensor) -> list[Tensor]:
        """The teacher's maps of crops (B, 3, s, s) in [0, 1], at the teacher's resolution."""
        side = max(1, round(pixels.shape[-1] / self.teacher.stride)) * self.teacher.stride
        if side != pixels.shape[-1]:
            pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        return self.teacher.maps(pixels)

    def batches(self, start: int) -> Iterator[Tensor]:
        self.views.start = start
        return made_ahead(self.views)

    def coloured(self, batch: Tensor, step: int) -> Tensor:
        """A batch of uint8 crops as student and teacher see it: mixed, in other colours, in [0, 1]."""
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + step)
        pixels = mixed(batch.to(self.device).float() / 255, generator, self.options.mix)
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return (change_colours(pixels, generator) * std + mean).clamp(0, 1)

    def seen(self, pixels: Tensor) -> Tensor:
        """Crops (B, 3, s, s) in [0, 1], at the teacher's resolution, as the student gets them."""
        side = self.side_of[pixels.shape[-1]]
        small = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        mean, std = (pixels.new_tensor(self.normalisation[name]).view(3, 1, 1) for name in ("mean", "std"))
        return (small - mean) / std

    def begin(self) -> None:
        """Sets the lesson's statistics, and those of a stem, by the first crops."""
        numbers = progress(range(FIT_BATCHES), f"{self.name}: statistics", FIT_BATCHES, "batch")
        with self.arithmetic():
            crops = (self.coloured(self.views.batch(step), step) for step in numbers)
            self.lesson.fit((self.taught(pixels) for pixels in crops), (self.options.sides[0] // self.patch,) * 2)
            if "stem" in self.architecture:
                crops = (self.coloured(self.views.batch(step), step) for step in range(FIT_BATCHES))
                self.vit.patch_embed.calibrate(self.seen(pixels) for pixels in crops)

    def losses(self, batch: Tensor, step: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = self.coloured(batch, step)
        with self.arithmetic():
            maps = self.taught(pixels)
            tokens = self.vit.forward_features(self.seen(pixels))
        tokens = tokens[:, self.vit.num_prefix_tokens :].float()
        side = math.isqrt(tokens.shape[1])
        target = self.lesson(maps, (side, side))
        square = F.mse_loss(tokens, target)
        cosine = 1 - F.cosine_similarity(tokens, target, dim=-1).mean()
        return square + cosine, {"square": square, "cosine": cosine}

    def result(self) -> dict[str, Tensor]:
        vit = self.vit
        if "stem" in self.architecture:
            vit = copy.deepcopy(vit)
            fold_batch_norms(vit.patch_embed.network)
        return vit.state_dict()

    def description(self) -> dict[str, Any]:
        teacher = self.teacher
        facts = {"name": teacher.name, "source": teacher.source, "licence": teacher.licence}
        facts |= {"fingerprint": teacher.fingerprint, "levels": teacher.levels}
        note = {"note": self.options.note} if self.options.note else {}
        return {**self.normalisation, **note, "teacher": facts, "photographs": self.record}


def distill(photos, out, *, resume=False, overwrite=False, **settings) -> tuple[int, float]:
    """Train on the folder `photos` as the settings, fields of `DistillOptions`, say, and save to `out` now and then,
    when interrupted, and at the end; returns the steps made and the seconds spent, those before a resumption among
    them."""
    out = Path(out)
    with Stop() as stop:
        options = DistillOptions(**settings)
        require_output(out, resume, overwrite)
        return train_recipe(Distillation(find_images(photos), options, Path(photos)), out, stop, resume)
