"""The log-sum-exp over a denominator that groups describe, as a torch op: four bytes a row instead of bits for pairs.

Row i meets every column of another group: E_ij = [g_i >= 0][h_j >= 0][g_i != h_j]. With a group for each row that is
"all others"; with a group for each label, "the other labels"; with a group for each label and image, "all but what has
this label in this image". Rows of group -1 take no part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels.ops.common.autograd import refuse_second_backward
from hpkernels.ops.group_lse import reference
from hpkernels.ops.group_lse.rows import Grouped

_ROWS = "Tensor x, Tensor groups, Tensor? keys, Tensor? key_groups"  # Grouped, flat, as torch wants it


def group_lse(rows: Grouped, temperature: float, backend: str) -> Tensor:
    """lse_i = log sum_{j in E_i} exp(<x_i, k_j> / temperature), 0 for an empty E_i; differentiable in x and keys."""
    if backend == "reference":  # plain autograd, so that a second backward works
        return reference.group_lse(rows, temperature)
    return _group_lse(*rows, temperature, backend)


@torch.library.custom_op(
    "hpkernels::group_lse", mutates_args=(), schema=f"({_ROWS}, float temperature, str backend) -> Tensor"
)
def _group_lse(*rows_temperature_backend):
    *rows, temperature, backend = rows_temperature_backend
    return dispatch.function("group_lse", "group_lse", backend, rows[0])(Grouped(*rows), temperature)


@_group_lse.register_fake
def _(x, *_):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty(x.shape[:1], dtype=dtype, device=x.device)


@torch.library.custom_op(
    "hpkernels::group_lse_grad",
    mutates_args=(),
    schema=f"({_ROWS}, float temperature, Tensor lse, Tensor grad_lse, bool of_keys, str backend) -> Tensor",
)
def _group_lse_grad(*rows_temperature_tables_backend):
    *rows, temperature, lse, grad_lse, of_keys, backend = rows_temperature_tables_backend
    grad = dispatch.function("group_lse", "group_lse_grad", backend, rows[0])
    return grad(Grouped(*rows), temperature, lse, grad_lse, of_keys)


@_group_lse_grad.register_fake
def _(x, groups, keys, key_groups, temperature, lse, grad_lse, of_keys, backend):
    return torch.empty((keys if of_keys else x).shape, dtype=(keys if of_keys else x).dtype, device=x.device)


refuse_second_backward(_group_lse_grad)


def _setup(ctx, inputs, output):
    *tensors, ctx.temperature, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx, grad_lse):
    *tensors, lse = ctx.saved_tensors
    grads = [
        _group_lse_grad(*tensors, ctx.temperature, lse, grad_lse, of_keys, ctx.backend) if needed else None
        for of_keys, needed in ((False, ctx.needs_input_grad[0]), (True, ctx.needs_input_grad[2]))
    ]
    return grads[0], None, grads[1], None, None, None


_group_lse.register_autograd(_backward, setup_context=_setup)
