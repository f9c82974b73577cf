"""The losses as modules: a module holds the temperature and the options, the call takes the tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hpkernels.losses.by_label import supervised_contrastive_loss
from hpkernels.losses.hidden_positive import hidden_positive_loss
from hpkernels.losses.masked import masked_contrastive_loss
from hpkernels.losses.statistics import LossStats
from hpkernels.pairs import PairMask

__all__ = ["HiddenPositiveLoss", "MaskedContrastiveLoss", "SupervisedContrastiveLoss"]


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
        head_in_denominator: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "positives_per_anchor": positives_per_anchor,
            "temperature": temperature,
            "base_temperature": base_temperature,
            "negative_rate": negative_rate,
            "weighting": weighting,
            "head_in_denominator": head_in_denominator,
            "backend": backend,
        }

    def forward(
        self, z: Tensor, features: Tensor, pool: Tensor | None = None, **inputs: Any
    ) -> Tensor | tuple[Tensor, LossStats]:
        return hidden_positive_loss(z, features, pool, **self.options, **inputs)

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
        extra_in_denominator: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "base_temperature": base_temperature,
            "weighting": weighting,
            "extra_in_denominator": extra_in_denominator,
            "backend": backend,
        }

    def forward(self, z: Tensor, positives: PairMask, **inputs: Any) -> Tensor:
        return masked_contrastive_loss(z, positives, **self.options, **inputs)

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.options.items() if value is not None)


class SupervisedContrastiveLoss(nn.Module):
    """`hpkernels.supervised_contrastive_loss` with its options fixed. No parameters.

    Call: loss(z, labels, *, keys, key_labels, image_ids).
    """

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        ignore_index: int = -1,
        form: str = "supcon",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "ignore_index": ignore_index,
            "form": form,
            "backend": backend,
        }

    def forward(self, z: Tensor, labels: Tensor, **inputs: Any) -> Tensor:
        return supervised_contrastive_loss(z, labels, **self.options, **inputs)

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.options.items() if value is not None)
