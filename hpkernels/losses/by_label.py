"""The contrastive loss whose pairs come from labels: all derived from a few integers a row, never bits for pairs.

Three parts, composed in plain torch: a log-sum-exp over the rows of other groups (the only part that meets all pairs),
the positive term from sums over classes, and a mean over the anchors that have both kinds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels.common.checks import (
    check_choice,
    check_columns,
    check_float_tensor,
    check_int,
    check_int_tensor,
    check_positive,
    describe,
    poison,
    witness,
)
from hpkernels.common.sums import sum_all
from hpkernels.ops.group_lse.op import group_lse
from hpkernels.ops.group_lse.rows import Grouped
from hpkernels.ops.label_positives.op import logit_mean, softplus_mean
from hpkernels.ops.label_positives.rows import Labelled
from hpkernels.ops.normalize.op import normalize_rows

FORMS = ("supcon", "per_positive")


def supervised_contrastive_loss(
    z: Tensor,
    labels: Tensor,
    *,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    image_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    temperature: float = 0.07,
    ignore_index: int = -1,
    form: str = "supcon",
    backend: str | None = None,
) -> Tensor:
    """Contrastive loss with positives by label, in memory linear in the number of rows.

    With s_ij = <z_i, k_j> / temperature of unit rows, P_i the keys of the anchor's label and N_i those of other labels:

        "supcon"        l_i = log sum_{a in P_i or N_i} exp(s_ia) - (1/|P_i|) sum_{p in P_i} s_ip
        "per_positive"  l_i = (1/|P_i|) sum_{p in P_i} log(1 + exp(log sum_{n in N_i} exp(s_in) - s_ip))
        L = mean of l_i over the anchors that have a positive and a negative

    "supcon" is L_out of Khosla et al., "Supervised Contrastive Learning" (2020). "per_positive" has one positive at a
    time against negatives alone, as in pixel contrast (Zhao et al. 2021; Wang et al. 2021). Not scaled by a base
    temperature. Rows are normalised inside, in fp32; gradients flow to z and, if they require one, to the keys.

    Args:
        z: (N, D) or (B, T, D), any floating dtype. labels: integers of z's shape without D.
        keys: (M, D), with key_labels (M,): the anchors meet these rows only, as a memory bank. None: z itself, without
            the pairs (i, i).
        image_ids: integers like labels; with keys a pair (of z's rows, of the keys). Positives then come from other
            images only; a row of the anchor's label and image is neither positive nor negative.
        temperature: > 0. ignore_index: rows and keys of this label take no part.
        form: "supcon" or "per_positive".
        backend: see `python -m hpkernels.info`; None chooses.

    Returns:
        0-dim fp32 loss (fp64 if z is fp64); 0 with zero gradients if no anchor has a positive and a negative.

    Raises:
        TypeError, ValueError: the argument, its value and what was expected; non-finite z or keys on the CPU. On a GPU
        non-finite input makes the loss NaN (HPKERNELS_CHECK=1 raises instead).
    """
    check_float_tensor("z", z, ndim=(2, 3))
    check_int_tensor("labels", labels, z.shape[:-1], z.device)
    own_images, key_images = _check_keys(z, keys, key_labels, image_ids)
    temperature = check_positive("temperature", temperature)
    check_int("ignore_index", ignore_index)
    check_choice("form", form, FORMS)
    chosen = dispatch.choose(z.device, backend, z, keys)

    rows = z.flatten(0, -2)
    x = normalize_rows(rows, "z", chosen)
    k = None if keys is None else normalize_rows(keys, "keys", chosen)
    own, theirs, counts = _ids(labels.flatten(), key_labels, own_images, key_images, ignore_index)
    of_keys = (None, None) if theirs is None else theirs
    labelled = Labelled(x, counts.positives, own.classes, own.groups, k, of_keys[0], of_keys[1])
    if form == "supcon":
        kinds = (own.singles, None if theirs is None else theirs.singles)
        lse = group_lse(Grouped(x, kinds[0], k, kinds[1]), temperature, chosen)
        of_anchor = lse - logit_mean(labelled, temperature, chosen)
    else:
        lse = group_lse(Grouped(x, own.classes, k, of_keys[0]), temperature, chosen)
        of_anchor = softplus_mean(labelled, lse, temperature, chosen)
    kept = (counts.positives > 0) & (counts.negatives > 0)
    loss = sum_all(torch.where(kept, of_anchor, 0.0)) / kept.sum().clamp_min(1)
    return loss if z.is_cpu else loss + poison(*[witness(rows) for rows in (x, k) if rows is not None])


class _Ids(NamedTuple):
    """Of each row: its label's number, that of (label, image) where images count, else None, and the group of rows that
    an anchor of supcon leaves out. -1 for ignored rows."""

    classes: Tensor
    groups: Tensor | None
    singles: Tensor


class _Counts(NamedTuple):
    positives: Tensor  # |P_i|, int64
    negatives: Tensor


def _ids(
    labels: Tensor, key_labels: Tensor | None, images: Tensor | None, key_images: Tensor | None, ignore_index: int
) -> tuple[_Ids, _Ids | None, _Counts]:
    """Labels and images of any values as numbers below N + M; by sorting, so that no shape depends on the values."""
    n = labels.shape[0]
    every = labels.long() if key_labels is None else torch.cat([labels.long(), key_labels.long()])
    ignored = every == ignore_index
    total = every.shape[0]
    classes = _ranks(every).masked_fill(ignored, -1)
    groups = None
    if images is not None:
        every_image = images.long() if key_images is None else torch.cat([images.long(), key_images.long()])
        groups = _ranks(classes * total + _ranks(every_image)).masked_fill(ignored, -1)
    if groups is not None:
        singles = groups
    elif key_labels is None:
        singles = torch.arange(total, device=labels.device).masked_fill(ignored, -1)
    else:  # an anchor leaves out no key: the anchors are one group, the keys another
        singles = (torch.arange(total, device=labels.device) >= n).long().masked_fill(ignored, -1)

    columns = slice(n, None) if key_labels is not None else slice(None)
    same = _members(classes[columns], classes[:n], total)
    if groups is not None:
        positives = same - _members(groups[columns], groups[:n], total)
    else:
        positives = same if key_labels is not None else (same - 1).clamp_min(0)
    negatives = torch.where(classes[:n] < 0, 0, (classes[columns] >= 0).sum() - same)

    def part(rows: slice) -> _Ids:
        return _Ids(classes[rows], None if groups is None else groups[rows], singles[rows])

    theirs = None if key_labels is None else part(slice(n, None))
    return part(slice(None, n)), theirs, _Counts(positives, negatives)


def _ranks(values: Tensor) -> Tensor:
    """Equal numbers for equal values, 0, 1, .. in their order."""
    ordered, order = values.sort(stable=True)
    steps = torch.nn.functional.pad((ordered[1:] != ordered[:-1]).long(), (1, 0))[: values.shape[0]]
    return torch.empty_like(values).scatter_(0, order, steps.cumsum(0))


def _members(ids: Tensor, at: Tensor, total: int) -> Tensor:
    """How many of ids equal at_i; 0 for -1."""
    table = torch.zeros(total + 1, dtype=torch.int64, device=ids.device)
    table = table.scatter_add(0, torch.where(ids < 0, total, ids), torch.ones_like(ids))
    return torch.where(at < 0, 0, table[at.clamp_min(0)])


def _check_keys(
    z: Tensor, keys: Tensor | None, key_labels: Tensor | None, image_ids: Tensor | tuple[Tensor, Tensor] | None
) -> tuple[Tensor | None, Tensor | None]:
    """The image ids of z's rows, (N,), and of the keys."""
    if (keys is None) != (key_labels is None):
        name, other = ("key_labels", "keys") if key_labels is None else ("keys", "key_labels")
        raise ValueError(f"{name}: expected together with {other}, got None")
    if keys is not None:
        check_float_tensor("keys", keys, like=z)
        check_columns("keys", keys, "z", z)
        check_int_tensor("key_labels", key_labels, keys.shape[:1], z.device)
    if image_ids is None:
        return None, None
    if keys is None:
        return check_int_tensor("image_ids", image_ids, z.shape[:-1], z.device).flatten(), None
    if not isinstance(image_ids, (tuple, list)) or len(image_ids) != 2:
        raise TypeError(f"image_ids: expected with keys a pair (ids of z, ids of keys), got {describe(image_ids)}")
    own = check_int_tensor("image_ids[0]", image_ids[0], z.shape[:-1], z.device).flatten()
    return own, check_int_tensor("image_ids[1]", image_ids[1], keys.shape[:1], z.device)
