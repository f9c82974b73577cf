"""The positive terms of label losses in linear memory, in torch on any device but for products on the CPU.

The mean logit needs no pairs: the sum of a class minus that of the own group, one inner product a row. The mean of
softplus goes through the pairs of equal class, a block at a time: on the CPU rows are sorted by class, so that a block
meets only its classes' keys; elsewhere, where finding those would wait for the device, it meets all keys.

Of torch's functions only those are used whose rounding on a CPU does not depend on the number of threads: exp and log1p
do not, logaddexp, sigmoid and products of matrices do.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels.ops.label_positives.reference import positives
from hpkernels.ops.label_positives.rows import Labelled

_BLOCK_PAIRS = 1 << 22  # logits alive at a time
_BLOCK_NUMBERS = 1 << 16  # of rows in fp64 at a time on a CPU: they stay in its caches


class _Sums:
    """Sums of rows by class, less those by group: sum_j [c_j = c_i][g_j != g_i] row_j for any i. fp64, a fixed order.

    groups None: nothing is left out. weights: a factor for each row.
    """

    def __init__(
        self, rows: Tensor, weights: Tensor | None, classes: Tensor, groups: Tensor | None, total: int
    ) -> None:
        self.of_classes = _table(rows, weights, classes, total)
        self.of_groups = None if groups is None else _table(rows, weights, groups, total)

    def at(self, classes: Tensor, groups: Tensor | None) -> Tensor:
        """(len(classes), D); zero for classes below 0."""
        found = _look_up(self.of_classes, classes)
        return found if self.of_groups is None else found - _look_up(self.of_groups, groups)


def _table(rows: Tensor, weights: Tensor | None, ids: Tensor, total: int) -> Tensor:
    """The sum of the rows of each id, fp64, and a last row of zeros. total: more than any id."""
    if ids.is_cpu:  # as many rows as there are ids; elsewhere finding that number would wait for the device
        total = int(ids.max()) + 1 if len(ids) else 0
    table = torch.zeros(total + 1, rows.shape[1], dtype=torch.float64, device=rows.device)
    place = torch.where(ids < 0, total, ids).long()
    for part in _blocks(rows):
        block = rows[part].double()
        if weights is not None:
            block = block * weights[part, None]
        if rows.is_cuda:  # sorts, where index_add_ would take atomics
            table.index_put_((place[part],), block, accumulate=True)
        else:
            table.index_add_(0, place[part], block)
    table[total] = 0
    return table


def _look_up(table: Tensor, ids: Tensor) -> Tensor:
    last = table.shape[0] - 1
    return table.index_select(0, torch.where((ids < 0) | (ids >= last), last, ids).long())


def _blocks(rows: Tensor) -> Iterator[slice]:
    """All rows; on a CPU a few at a time."""
    step = max(1, _BLOCK_NUMBERS // max(1, rows.shape[1]) if rows.is_cpu else rows.shape[0])
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)


def logit_mean(rows: Labelled, temperature: float) -> Tensor:
    x, positives = rows.x, _positives(rows)
    mean = torch.empty(x.shape[0], dtype=torch.float64, device=x.device)
    for part in _blocks(x):
        block = x[part].double()
        mean[part] = (block * _others(positives, block, rows, part)).sum(1)
    mean /= rows.counts.clamp_min(1).double() * temperature
    return mean.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def logit_mean_grad(rows: Labelled, temperature: float, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and, if given, the keys."""
    x, _, classes, groups, keys, key_classes, key_groups = rows
    weight = grad.double() / (rows.counts.clamp_min(1).double() * temperature)
    positives = _positives(rows)
    anchors = _Sums(x, weight, classes, groups, _more_than_ids(rows))
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    for part in _blocks(x):
        block = x[part].double()
        row = _others(positives, block, rows, part) * weight[part, None]
        if keys is None:  # as a positive of the other anchors
            row += _others(anchors, block * weight[part, None], rows, part)
        grad_x[part] = row
    if keys is None:
        return grad_x, None
    grad_keys = torch.empty_like(keys, memory_format=torch.contiguous_format)
    for part in _blocks(keys):
        grad_keys[part] = anchors.at(key_classes[part], None if key_groups is None else key_groups[part])
    return grad_x, grad_keys


def _positives(rows: Labelled) -> _Sums:
    """The sums of the rows that are positives of something: of the keys, or of the rows themselves."""
    x, _, classes, groups, keys, key_classes, key_groups = rows
    total = _more_than_ids(rows)
    return _Sums(x, None, classes, groups, total) if keys is None else _Sums(keys, None, key_classes, key_groups, total)


def _others(sums: _Sums, block: Tensor, rows: Labelled, part: slice) -> Tensor:
    """The sums for a part of the rows; without groups a row among its own keys (block: as it was added) is left out."""
    classes, groups = rows.classes, rows.groups
    found = sums.at(classes[part], None if groups is None else groups[part])
    if rows.keys is None and groups is None:
        found -= torch.where((classes[part] >= 0)[:, None], block, 0.0)
    return found


def _more_than_ids(rows: Labelled) -> int:
    return rows.x.shape[0] + (0 if rows.keys is None else rows.keys.shape[0]) + 1


def softplus_mean(rows: Labelled, lse: Tensor, temperature: float) -> Tensor:
    pairs = _PairsOfClasses(rows, lse, temperature)
    mean = torch.zeros_like(pairs.lse)
    for part, _, above, P in pairs:
        softplus = above.clamp_min(0) + torch.log1p(torch.exp(-above.abs()))
        mean[part] = softplus.masked_fill_(~P, 0.0).sum(1) * pairs.inverse[part]
    return _in_place(mean, pairs.row_order)


def softplus_mean_grad(
    rows: Labelled, lse: Tensor, temperature: float, grad: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x, if given the keys, and lse."""
    pairs = _PairsOfClasses(rows, lse, temperature)
    weight = _ordered(grad.to(lse.dtype), pairs.row_order) * pairs.inverse
    grad_x, grad_lse, grad_keys = (torch.zeros_like(part) for part in (pairs.x, pairs.lse, pairs.keys))
    for part, columns, above, P in pairs:
        small = torch.exp(-above.abs())
        slope = torch.where(above < 0, small, 1.0).div_(1 + small).masked_fill_(~P, 0.0) * weight[part, None]
        grad_lse[part] = slope.sum(1)
        slope /= -temperature
        grad_x[part] = _product(slope, pairs.keys[columns])
        grad_keys[columns] += _product(slope.T, pairs.x[part])
    grad_x, grad_lse = (_in_place(table, pairs.row_order) for table in (grad_x, grad_lse))
    grad_keys = _in_place(grad_keys, pairs.column_order)
    if rows.keys is None:
        return (grad_x + grad_keys).to(rows.x.dtype), None, grad_lse
    return grad_x.to(rows.x.dtype), grad_keys.to(rows.keys.dtype), grad_lse


class _PairsOfClasses:
    """Blocks of pairs that hold all positives of their rows: rows, columns, lse_i - l_ij, P.

    On the CPU rows and columns are sorted by class first (row_order, column_order; None elsewhere).
    """

    def __init__(self, rows: Labelled, lse: Tensor, temperature: float) -> None:
        x, counts, classes, groups, keys, key_classes, key_groups = rows
        if groups is None:  # the row itself is the group, in which a key of another set is not
            groups = torch.arange(x.shape[0], device=x.device)
            key_groups = None if keys is None else torch.full_like(key_classes, -1)
        self.row_order = classes.argsort(stable=True) if classes.is_cpu else None
        self.x, self.lse, self.classes, self.groups = (
            _ordered(part, self.row_order) for part in (x.to(lse.dtype), lse, classes, groups)
        )
        if keys is None:
            self.column_order = self.row_order
            self.keys, self.key_classes, self.key_groups = self.x, self.classes, self.groups
        else:
            self.column_order = key_classes.argsort(stable=True) if key_classes.is_cpu else None
            self.keys, self.key_classes, self.key_groups = (
                _ordered(part, self.column_order) for part in (keys.to(lse.dtype), key_classes, key_groups)
            )
        self.inverse = 1 / _ordered(counts, self.row_order).clamp_min(1).to(lse.dtype)
        self.temperature = temperature

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        total = self.keys.shape[0]
        step = max(1, _BLOCK_PAIRS // max(1, total))
        for start in range(0, self.x.shape[0], step):
            rows, columns = slice(start, start + step), slice(0, total)
            classes = self.classes[rows]
            if self.row_order is not None:
                first = torch.searchsorted(self.key_classes, classes[0])
                columns = slice(int(first), int(torch.searchsorted(self.key_classes, classes[-1], right=True)))
            P = positives(classes, self.groups[rows], self.key_classes[columns], self.key_groups[columns])
            logits = _product(self.x[rows], self.keys[columns].T) / self.temperature
            yield rows, columns, self.lse[rows, None] - logits, P


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cpu and dispatch.MISSING["cpu"] is None:
        return importlib.import_module("hpkernels.ops.common.products").product(a, b)
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x[order]


def _in_place(x: Tensor, order: Tensor | None) -> Tensor:
    """The inverse of _ordered."""
    return x if order is None else torch.empty_like(x).index_copy_(0, order, x)
