"""What the differentiable ops share."""

from __future__ import annotations


def refuse_second_backward(gradient_op) -> None:
    """Make differentiating a gradient op an error that says what does support it."""

    def backward(ctx, *grads):
        raise RuntimeError(
            "hpkernels: a second backward through the fused kernels is not available; "
            'pass backend="reference", which supports it (the losses: in one process, with the bits of all pairs at once)'
        )

    gradient_op.register_autograd(backward)
