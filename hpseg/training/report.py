"""What a run tells about itself while it trains: log.csv always; a profile, previews and TensorBoard when asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hpseg.data.folder import PhotoFolder
from hpseg.inference.segmenter import assemble
from hpseg.models.backbone import Backbone
from hpseg.run.config import Config
from hpseg.run.errors import UsageError
from hpseg.run.folder import EVENTS_SUFFIX, TENSORBOARD, Log
from hpseg.runtime.profile import STAGES, Profile, stage
from hpseg.training.preview import Previews


def tensorboard_writer() -> type:
    """torch's SummaryWriter, which needs a package that is an extra."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            f'tensorboard: {error}; expected the package, install it with: pip install "hpkernels[tensorboard]"'
        ) from None
    return SummaryWriter


class Report:
    """The writer of a run's log, previews and curves from step `step` on.

    In the training loop: `row` with the numbers of a step, then `after` with the steps made so far; after the loop
    `finish` with the tensors of model.safetensors. profile: the running one, or None.
    """

    def __init__(
        self,
        out: Path,
        config: Config,
        step: int,
        terms: tuple[str, ...],
        backbone: Backbone,
        dataset: PhotoFolder,
        profile: Profile | None,
    ):
        self.out, self.config, self.backbone, self.dataset = out, config, backbone, dataset
        self.profile, self.previews, self.curves = profile, None, None
        self.log = Log(out / "log.csv", step, terms, [f"seconds_{name}" for name in STAGES] if profile else [])
        if config.tensorboard:
            self.curves = tensorboard_writer()(str(out / TENSORBOARD), purge_step=step, filename_suffix=EVENTS_SUFFIX)
        if profile:
            profile.restart()

    def row(self, row: dict[str, Any]) -> None:
        """The numbers of one step, which ends here for the profile."""
        if self.profile:
            row = {**row, **{f"seconds_{name}": seconds for name, seconds in self.profile.step().items()}}
        self.log.write(row)
        if self.curves:
            for name in row.keys() - {"step"}:
                self.curves.add_scalar(name, row[name], row["step"])

    def after(self, step: int, tensors: Callable[[], dict[str, Tensor]]) -> None:
        """After `step` steps: a preview if one is due. The one of the last step is left to `finish`."""
        if self.config.preview_every and step % self.config.preview_every == 0 and step < self.config.steps:
            self._preview(step, tensors())

    def finish(self, step: int, tensors: dict[str, Tensor]) -> None:
        """The last preview, of what prediction will read; closes the files."""
        if self.config.preview_every:
            self._preview(step, tensors)
        self.log.close()
        if self.curves:
            self.curves.close()

    def flush(self) -> None:
        self.log.flush()
        if self.curves:
            self.curves.flush()

    def _preview(self, step: int, tensors: dict[str, Tensor]) -> None:
        if self.previews is None:
            files, read, size = self.dataset.files, self.dataset.read, self.config.predict_size
            self.previews = Previews(self.out, files, read, size, self.backbone.patch)
        with stage("periodic"):
            sheet = self.previews.write(step, assemble(self.backbone, tensors, self.config))
        if self.curves and sheet:
            self.curves.add_image("preview", np.asarray(sheet), step, dataformats="HWC")
