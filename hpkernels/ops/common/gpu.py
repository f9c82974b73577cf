"""Whether the user accepts TF32 in matrix products of fp32 tensors."""

from __future__ import annotations

import torch


def tf32_accepted() -> bool:
    """torch.backends.cuda.matmul.fp32_precision (torch >= 2.9) or allow_tf32: reading both would mix two interfaces."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32
