"""The loop that trains a ViT from scratch, whatever it learns from: schedule, progress, saving and going on.

The result is FILE (fp16 safetensors with timm's key names), FILE's .json (how to build the ViT and how it was made) and
FILE's .state.pt, from which `--resume` goes on.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hpseg.models.backbone import pick_device
from hpseg.run.errors import RunStopped, UsageError
from hpseg.run.files import read_torch, require_file, write_atomically, write_json, write_torch
from hpseg.run.folder import explaining_state
from hpseg.runtime.interruption import Stop
from hpseg.runtime.messages import Pace

logger = logging.getLogger(__name__)
WEIGHT_DECAY = 0.05


class Recipe(ABC):
    """What a ViT learns from. A subclass sets the attributes and defines the methods.

    name          of the verb, for the progress bar
    architecture  what builds the ViT again: the entries of the .json that load_backbone reads
    fixed         what else a training must find as it was when it goes on, by name
    parts         modules whose state is saved, by name
    learner       the module whose parameters are trained
    """

    name: str
    architecture: dict[str, Any]
    fixed: dict[str, Any]
    parts: dict[str, nn.Module]
    learner: nn.Module

    def __init__(self, photos: list[Path], options: Any):
        self.photos, self.options = photos, options
        self.device = pick_device(options.device)

    @abstractmethod
    def batches(self, start: int) -> Iterator[Any]:
        """Endless batches, from that of step `start`."""

    def begin(self) -> None:  # noqa: B027 (nothing, unless a subclass says otherwise)
        """Called before the first step of a training that is not resumed."""

    @abstractmethod
    def losses(self, batch: Any, step: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the terms to show. progress: the fraction of the training that is done."""

    def rate(self, name: str) -> float:
        """What the learning rate of the learner's parameter `name` is multiplied by."""
        return 1.0

    def after_step(self, progress: float) -> None:  # noqa: B027 (the same)
        """Called after each step of the optimizer."""

    @abstractmethod
    def result(self) -> dict[str, Tensor]:
        """The weights of the ViT as they are now."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What the .json says beside the architecture, the steps and the options."""


def require_output(out: Path, resume: bool, overwrite: bool) -> None:
    """UsageError where the weights cannot be written to `out`, or there is nothing to go on from."""
    if out.suffix != ".safetensors":
        raise UsageError(f"--out: expected a name that ends in .safetensors, got {out}")
    if resume and not out.with_suffix(".state.pt").is_file():
        raise UsageError(f"--resume: there is no {out.with_suffix('.state.pt')}")
    for file in (out, out.with_suffix(".json"), out.with_suffix(".state.pt")):
        if file.is_file() and not (resume or overwrite):
            raise UsageError(f"--out: {file} exists; give --resume to go on or --overwrite to start again")
        require_file("--out", file, overwrite=True)


def learning_rate(peak: float, progress: float) -> float:
    """Warm-up over the first 5 % of the training, then half a cosine down to 2 % of the peak."""
    return peak * min(1, progress / 0.05 + 0.01) * (0.51 + 0.49 * math.cos(math.pi * progress))


class Training:
    """One training of a recipe, saved to `out`: now and then, when it is interrupted, and at its end."""

    def __init__(self, recipe: Recipe, out: Path, stop: Stop):
        self.recipe, self.out, self.stop = recipe, out, stop
        self.options = recipe.options
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in recipe.learner.named_parameters():
            groups.setdefault((recipe.rate(name), parameter.ndim > 1), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": parameters, "rate": rate, "weight_decay": WEIGHT_DECAY * decays}
                for (rate, decays), parameters in groups.items()
            ],
            lr=self.options.lr,
            betas=(0.9, 0.98),
        )
        self.step, self.seconds = 0, 0.0

    @property
    def progress(self) -> float:
        """The fraction of the training that is done."""
        if self.options.steps:
            return self.step / self.options.steps
        return self.seconds / (60 * self.options.minutes)

    def resume(self) -> None:
        """Goes on from the saved state; UsageError where it is damaged or that of another training."""
        file, recipe = self.out.with_suffix(".state.pt"), self.recipe
        state = read_torch("--resume", file)
        with explaining_state(file):
            if not isinstance(state, dict):
                raise TypeError(f"a {type(state).__name__}")
            before, now = {**state["architecture"], **state["fixed"]}, {**recipe.architecture, **recipe.fixed}
            changed = [name for name in now if before.get(name) != now[name]]
            if changed:
                was, is_now = (", ".join(f"{n} {values.get(n)}" for n in changed) for values in (before, now))
                raise UsageError(f"--resume: {self.out} was started with {was}; expected the same, got {is_now}")
            for name, part in recipe.parts.items():
                part.load_state_dict(state[name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            if self.step < 0 or not 0 <= self.seconds < math.inf:
                raise ValueError(f"step {self.step} after {self.seconds} seconds")

    def save(self) -> None:
        """Writes weights, description and state, each all at once."""
        recipe, options = self.recipe, {n: v for n, v in vars(self.options).items() if v is not None}
        options = {name: value.name if isinstance(value, Path) else value for name, value in options.items()}
        weights = {name: _halved(value.detach()) for name, value in recipe.result().items()}
        done = {"steps": self.step, "seconds": round(self.seconds, 1), "options": options}
        write_atomically(self.out, safetensors.torch.save(weights))
        write_json(self.out.with_suffix(".json"), {**recipe.architecture, **recipe.description(), **done})
        state = {name: part.state_dict() for name, part in recipe.parts.items()}
        state |= {"optimizer": self.optimizer.state_dict(), "step": self.step, "seconds": self.seconds}
        state |= {"architecture": recipe.architecture, "fixed": recipe.fixed}
        write_torch(self.out.with_suffix(".state.pt"), state)

    def run(self) -> None:
        """Trains to the end; a signal that asks the program to end stops it after a step, which is saved."""
        recipe, options = self.recipe, self.options
        batches = recipe.batches(self.step)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        title = f"{recipe.name}: {len(recipe.photos)} photographs"
        bar = tqdm(desc=title, initial=self.step, total=options.steps, mininterval=1, disable=None)
        pace = Pace()
        saved = last = time.monotonic()
        self.stop.later = True
        with bar:
            while (progress := self.progress) < 1:
                for group in self.optimizer.param_groups:
                    group["lr"] = group["rate"] * learning_rate(options.lr, progress)
                loss, terms = recipe.losses(next(batches), self.step, progress)
                if not math.isfinite(loss.item()):
                    raise RunStopped(
                        f"the loss is {loss.item()} at step {self.step}; lower --lr, and --resume from the last save"
                    )
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(recipe.learner.parameters(), 1.0)
                self.optimizer.step()
                recipe.after_step(progress)
                now = time.monotonic()
                self.step, self.seconds, last = self.step + 1, self.seconds + now - last, now
                bar.update()
                if not bar.disable:
                    bar.set_postfix(self._shown(terms), refresh=False)
                elif pace.due():
                    told = ", ".join(f"{name} {value}" for name, value in self._shown(terms).items())
                    logger.info(f"{title}: step {self.step}, {told}")
                if now - saved > options.save_every or self.stop.number:
                    self.save()
                    saved = now
                if self.stop.number:
                    bar.close()
                    raise self.stop.interrupted(f"after step {self.step}, which is saved; --resume goes on from there")
            self.save()

    def _shown(self, terms: dict[str, Tensor]) -> dict[str, str]:
        left = self.seconds * (1 / max(self.progress, 1e-9) - 1) / 60
        shown = {name: f"{term.item():.3f}" for name, term in terms.items()}
        return shown | {"minutes": f"{self.seconds / 60:.1f}", "left": f"{max(left, 0):.1f}"}


def _halved(tensor: Tensor) -> Tensor:
    """In fp16, unless it counts."""
    return (tensor.half() if tensor.is_floating_point() else tensor).contiguous().cpu()


def train_recipe(recipe: Recipe, out: Path, stop: Stop, resume: bool) -> tuple[int, float]:
    """Trains and saves to `out`; returns the steps made and the seconds spent, those before a resumption among them."""
    training = Training(recipe, out, stop)
    if resume:
        training.resume()
    else:
        recipe.begin()
    training.run()
    return training.step, training.seconds
