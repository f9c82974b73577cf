"""What the differentiable ops share: what can be differentiated, how often and by what, and words for the rest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_SECOND = (
    "hpkernels: a second backward through the fused kernels is not available; "
    'pass backend="reference", which supports it (the losses: in one process, with the bits of all pairs at once)'
)
_TRANSFORM = (
    "hpkernels: the kernels have a backward pass alone, not the derivatives of torch.func and of forward mode; "
    'pass backend="reference", which supports them'
)


def refuse_second_backward(gradient_op) -> None:
    """Make differentiating a gradient op an error that says what does support it."""

    def backward(ctx, *grads):
        raise RuntimeError(_SECOND)

    gradient_op.register_autograd(backward)


def refuse_transforms(*tensors: Tensor) -> None:
    """Raise where torch.func or forward mode differentiates by one of the tensors: of an op that knows neither, the one
    fails deep inside of torch, and the other takes the derivative to be zero."""
    if torch.compiler.is_compiling():
        return
    functorch = torch._C._functorch
    for x in tensors:
        followed = forward_ad.unpack_dual(x).tangent is not None
        while not followed and functorch.is_functorch_wrapped_tensor(x):
            followed = functorch.is_gradtrackingtensor(x) and x.requires_grad
            x = functorch.get_unwrapped(x)
        if followed:
            raise RuntimeError(_TRANSFORM)


class _Gradient(torch.autograd.Function):
    """A gradient that cannot be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None: ...

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError(_SECOND)


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None: ...

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Gradient.apply(gradient)


def differentiable_once(x: Tensor) -> Tensor:
    """x, for torch ops that have no second backward: theirs would say so in words of their own."""
    return _Once.apply(x)
