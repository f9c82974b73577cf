"""The losses as modules: a module holds the temperature and the options, the call takes the tensors."""

from __future__ import annotations

from torch import Tensor, nn

from hpkernels import losses
from hpkernels.pairs import PairMask


class HiddenPositiveLoss(nn.Module):
    """`hpkernels.hidden_positive_loss` with its options fixed. No parameters.

    Call: loss(z, features, pool=None, *, z_local, head_features, head_pool, head_weight, tokens_per_image,
    negative_mask, seed, process_group, return_stats).
    """

    def __init__(
        self,
        *,
        positives_per_anchor: int | None = None,
        temperature: float = 0.8,
        base_temperature: float = 0.07,
        negative_rate: float = 0.02,
        weighting: str = "pairs",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.options = {
            "positives_per_anchor": positives_per_anchor,
            "temperature": temperature,
            "base_temperature": base_temperature,
            "negative_rate": negative_rate,
            "weighting": weighting,
            "backend": backend,
        }

    def forward(self, z: Tensor, features: Tensor, pool: Tensor | None = None, **inputs) -> Tensor:
        return losses.hidden_positive_loss(z, features, pool, **self.options, **inputs)

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.options.items() if value is not None)


class MaskedContrastiveLoss(nn.Module):
    """`hpkernels.masked_contrastive_loss` with its options fixed. No parameters.

    Call: loss(z, positives, *, extra_positives, extra_weight, negatives, tokens_per_image).
    """

    def __init__(
        self,
        *,
        temperature: float = 0.8,
        base_temperature: float = 0.07,
        weighting: str = "pairs",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.options = {
            "temperature": temperature,
            "base_temperature": base_temperature,
            "weighting": weighting,
            "backend": backend,
        }

    def forward(self, z: Tensor, positives: PairMask, **inputs) -> Tensor:
        return losses.masked_contrastive_loss(z, positives, **self.options, **inputs)

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.options.items() if value is not None)
