"""Linear layers of a network that is only read, in fp32 on an x86 processor, by oneDNN instead of MKL.

torch takes fp32 matrix products from MKL, which leaves AVX-512 unused on AMD's processors, and convolutions from
oneDNN, which uses it everywhere. A linear layer is a convolution by one pixel, and equal to it up to rounding. On a
2-core AMD EPYC it takes half the time (1,015 rows, 192 to 768 channels, one thread: 2.9 ms by MKL, 1.5 ms by oneDNN;
2026-11-30).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

FEWEST_ROWS = 64  # fewer are not worth the call


class LinearByConvolution(TorchFunctionMode):
    """Inside, torch.nn.functional.linear is a convolution where that is as good: see `_suits`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.linear:
            return _linear(function, *args, **kwargs)
        return function(*args, **kwargs)


def _linear(linear, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _suits(input, weight):
        return linear(input, weight, bias)
    channels = input.shape[-1]
    rows = input.reshape(1, -1, 1, channels).permute(0, 3, 1, 2)
    # Of one pixel dilation changes nothing, but torch gives every dilated convolution to oneDNN, and others to MKL
    # where it has one thread.
    found = F.conv2d(rows, weight[:, :, None, None], bias, dilation=2)
    return found.permute(0, 2, 3, 1).reshape(*input.shape[:-1], len(weight))


def _suits(input: Tensor, weight: Tensor) -> bool:
    """Many rows in fp32 on a CPU with both libraries, without a gradient, and not while torch compiles or exports."""
    return (
        not torch.compiler.is_compiling()  # first: an exported program's sizes are free, and a look at them binds them
        and input.device.type == weight.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and input.shape[:-1].numel() >= FEWEST_ROWS
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad))
    )
