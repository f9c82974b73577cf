"""PairMask: a packed N x M bit matrix of chosen pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from hpkernels import dispatch
from hpkernels.common.bits import clear_diagonal, list_pairs, unpack, words
from hpkernels.common.checks import (
    check_dense,
    check_flag,
    check_float_tensor,
    check_ignore_index,
    check_int,
    check_int_tensor,
    check_rate,
    describe,
    plain,
    takes_part,
)
from hpkernels.ops.pair_bits import op


class PairMask:
    """Chosen pairs (i, j) of N rows and M columns, one bit each: N * M / 8 bytes where a float mask takes 4 * N * M.

    A matrix of zeros and ones: `mask @ x` sums the chosen rows of x, `mask.mean(x)` averages them, with a gradient.
    torch.save writes it, and torch.load reads it (with weights_only, too) once hpkernels is imported. The mean code of
    the patches that look like each one:

        mask = hk.hidden_positives(features, pool)
        proxies = mask.mean(code)

    Attributes:
        bits: int32 (N, words); bit (i, j) is bit j % 32 of word j // 32 of row i. Padding bits are zero.
        shape: (N, M).
        symmetric: True when the mask is known to equal its transpose (never computed from the data).
    """

    def __init__(self, bits: Tensor, columns: int, *, symmetric: bool = False) -> None:
        if not isinstance(bits, Tensor) or bits.dtype != torch.int32 or bits.ndim != 2:
            raise TypeError(f"bits: expected an int32 tensor of 2 dimensions, got {describe(bits)}")
        check_dense("bits", bits)
        columns = check_int("columns", columns, least=0)
        check_flag("symmetric", symmetric)
        if bits.shape[1] != words(columns):
            raise ValueError(f"bits: expected {words(columns)} words a row for {columns} columns, got {describe(bits)}")
        if symmetric and bits.shape[0] != columns:
            raise ValueError(f"symmetric: expected False for a mask of shape {(bits.shape[0], columns)}, got True")
        if bits.is_cpu and not torch.compiler.is_compiling():
            op.check_padding(bits, columns)
        self.bits = bits
        self.columns = columns
        self.symmetric = symmetric

    @classmethod
    def from_dense(cls, dense: Tensor, *, symmetric: bool = False) -> PairMask:
        """Pack a bool tensor (N, M). Pass `symmetric=True` only for a mask that equals its transpose."""
        if not isinstance(dense, Tensor) or dense.dtype != torch.bool or dense.ndim != 2:
            raise TypeError(f"dense: expected a bool tensor of 2 dimensions, got {describe(dense)}{as_bools(dense)}")
        check_dense("dense", dense)
        return cls(op.pack_bits(dense), dense.shape[1], symmetric=symmetric)

    @classmethod
    def from_labels(cls, labels: Tensor, *, ignore_index: int | None = -1) -> PairMask:
        """Pairs i != j with equal labels, (N, N), symmetric; rows labelled `ignore_index` have none (None: all count).

        labels: integers or bools (N,). Numbers are compared, so that -1 ignores no row of a uint8 tensor.
        """
        if not isinstance(labels, Tensor) or labels.ndim != 1:
            raise TypeError(f"labels: expected an integer tensor of 1 dimension, got {describe(labels)}")
        check_int_tensor("labels", labels, labels.shape, labels.device)
        kept = takes_part(labels, check_ignore_index(ignore_index))
        return cls(op.pairs_of_labels(labels, kept), labels.shape[0], symmetric=True)

    @classmethod
    def from_coo(cls, indices: Tensor, shape: tuple[int, int]) -> PairMask:
        """The pairs (indices[0, e], indices[1, e]), int64 (2, E), in any order, as `torch.sparse_coo_tensor` has them.

        A pair that is named twice is there once. Looks at the indices, which waits for a GPU.
        """
        rows, columns = _check_shape(shape)
        _check_indices("indices", indices, 2)
        if indices.shape[0] != 2:
            raise ValueError(f"indices: expected shape (2, E), got {describe(indices)}")
        return cls(op.pairs_from_coo(indices, rows, columns), columns)

    @classmethod
    def from_csr(cls, crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int]) -> PairMask:
        """Row i's columns are col_indices[crow_indices[i] : crow_indices[i + 1]], int64 (N + 1,) and (E,), as
        `torch.sparse_csr_tensor` has them, in any order. Looks at the indices, which waits for a GPU."""
        rows, _ = _check_shape(shape)
        _check_indices("crow_indices", crow_indices, 1)
        _check_indices("col_indices", col_indices, 1, crow_indices.device)
        if crow_indices.shape[0] != rows + 1:
            raise ValueError(f"crow_indices: expected {rows + 1} numbers, got {describe(crow_indices)}")
        lengths = crow_indices.diff()
        if int(crow_indices[0]) != 0 or int(crow_indices[-1]) != len(col_indices) or bool((lengths < 0).any()):
            raise ValueError(
                f"crow_indices: expected numbers from 0 to {len(col_indices)} (the number of col_indices), none below "
                f"the one before, got {describe(crow_indices)}"
            )
        row = torch.arange(rows, device=lengths.device).repeat_interleave(lengths)
        return cls.from_coo(torch.stack([row, col_indices]), shape)

    @classmethod
    def random(
        cls, rate: float, shape: tuple[int, int], seed: int | Tensor, *, device=None, backend: str | None = None
    ) -> PairMask:
        """Independent bits set with probability `rate` (to 2^-32), a function of (seed, row, column) alone:
        the same on every backend, device and thread count. `seed`: int or 0-dim int64 tensor."""
        rate = check_rate("rate", rate)
        shape = _check_shape(shape)
        seed = as_seed(seed, device)
        chosen = dispatch.choose(seed.device, backend)
        return cls(op.random_bits(seed, shape[0], shape[1], rate, chosen), shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        return self.bits.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of the packed bits."""
        return self.bits.numel() * self.bits.element_size()

    @property
    def device(self) -> torch.device:
        return self.bits.device

    @property
    def T(self) -> PairMask:
        """The transposed mask (itself when symmetric)."""
        if self.symmetric:
            return self
        chosen = dispatch.choose(self.device)
        return PairMask(op.transpose_bits(self.bits, self.columns, chosen), self.bits.shape[0])

    def sum(self, dim: int | None = None) -> Tensor:
        """Number of pairs: int32 (N,) for dim 1, (M,) for dim 0, a 0-dim int64 tensor for None."""
        if dim not in (None, 0, 1):
            raise ValueError(f"dim: expected None, 0 or 1, got {dim!r}")
        mask = self.T if dim == 0 else self
        counts = op.count_bits([mask.bits], dispatch.choose(self.device))[0]
        return counts.sum() if dim is None else counts

    def off_diagonal(self) -> PairMask:
        """The mask without pairs (i, i)."""
        return PairMask(clear_diagonal(self.bits.clone(), self.columns), self.columns, symmetric=self.symmetric)

    def to_dense(self) -> Tensor:
        """bool (N, M): one byte a pair, for small masks."""
        return unpack(self.bits, self.columns)

    def to_coo(self) -> Tensor:
        """The pairs, int64 (2, E), by rows and then by columns. Their number is looked at, which waits for a GPU."""
        return torch.stack(list_pairs(self.bits))

    def to_csr(self) -> tuple[Tensor, Tensor]:
        """(crow_indices (N + 1,), col_indices (E,)), int64, as `torch.sparse_csr_tensor` has them. Waits for a GPU."""
        ends = self.sum(1).cumsum(0, dtype=torch.int64)
        return torch.nn.functional.pad(ends, (1, 0)), self.to_coo()[1]

    def to(self, device: torch.device | str) -> PairMask:
        """The mask on another device; itself where it is there already."""
        bits = self.bits.to(torch.device(device))
        return self if bits is self.bits else PairMask(bits, self.columns, symmetric=self.symmetric)

    def __getitem__(self, rows: slice) -> PairMask:
        """mask[a:b]: some of the rows, which share the memory of the whole."""
        if not isinstance(rows, slice):
            raise TypeError(f"rows: expected a slice, as in mask[2:5], got {describe(rows)}")
        if rows.step not in (None, 1):
            raise ValueError(f"rows: expected a slice without a step, got {rows}")
        bits = self.bits[rows]
        return PairMask(bits, self.columns, symmetric=self.symmetric and bits.shape[0] == self.columns)

    def __matmul__(self, x: Tensor) -> Tensor:
        """mask @ x, as `matmul`."""
        return self.matmul(x)

    def matmul(self, x: Tensor) -> Tensor:
        """mask @ x: the sum over the columns j of each row of x_j. Never N x M numbers.

        torch.compile needs this name: it takes `mask @ x` for an operator of tensors alone.

        Args:
            x: (M, D) or (M,), any floating dtype. The gradient flows to it, a second one, too.

        Returns:
            (N, D) or (N,) in x's dtype, summed in fp32 (fp64 for fp64); 0 for a row without a pair.

        Raises:
            TypeError, ValueError: x, its value and what was expected. Non-finite x on the CPU.
        """
        return self._sums(x).to(x.dtype)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the columns j of each row of x_j, as `matmul`; 0 for a row without a pair."""
        sums = self._sums(x)
        counts = self.sum(1).clamp_min(1).to(sums.dtype)
        return (sums / (counts if x.ndim == 1 else counts[:, None])).to(x.dtype)

    def _sums(self, x: Tensor) -> Tensor:
        check_float_tensor("x", x, ndim=(1, 2))
        if x.shape[0] != self.columns or x.device != self.device:
            raise ValueError(f"x: expected {self.columns} rows on {self.device}, got {describe(x)}")
        vectors = x[:, None] if x.ndim == 1 else x
        if x.dtype != torch.float64:
            vectors = vectors.float()
        sums = op.pair_sum(self.bits, self.symmetric, vectors, dispatch.choose(x.device, None, vectors))
        return sums[:, 0] if x.ndim == 1 else sums

    def __getstate__(self) -> dict[str, object]:
        """What torch.save writes: of a slice its own rows only."""
        bits = self.bits
        if bits.untyped_storage().nbytes() > bits.numel() * bits.element_size():
            bits = bits.clone()
        return {"bits": bits, "columns": self.columns, "symmetric": self.symmetric}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Checked, as it may come out of a file."""
        self.__init__(state["bits"], state["columns"], symmetric=state["symmetric"])  # type: ignore[misc]

    def __and__(self, other: PairMask) -> PairMask:
        self._check_same(other)
        return PairMask(self.bits & other.bits, self.columns, symmetric=self.symmetric and other.symmetric)

    def __or__(self, other: PairMask) -> PairMask:
        self._check_same(other)
        return PairMask(self.bits | other.bits, self.columns, symmetric=self.symmetric and other.symmetric)

    def __invert__(self) -> PairMask:
        valid = op.pack_bits(torch.ones(1, self.columns, dtype=torch.bool, device=self.device))
        return PairMask(~self.bits & valid, self.columns, symmetric=self.symmetric)

    def _check_same(self, other: PairMask) -> None:
        if not isinstance(other, PairMask):
            raise TypeError(f"other: expected a PairMask, got {type(other).__name__}")
        if other.shape != self.shape or other.device != self.device:
            raise ValueError(f"other: expected {self!r}'s shape and device, got {other!r}")

    def __repr__(self) -> str:
        return f"PairMask(shape={self.shape}, symmetric={self.symmetric}, device='{self.device}')"


# For torch.load with weights_only, its default: what it makes is checked as any other mask.
torch.serialization.add_safe_globals([PairMask])


def _check_shape(shape: object) -> tuple[int, int]:
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise TypeError(f"shape: expected a pair of ints (N, M), got {shape!r}")
    rows, columns = (check_int("shape", length, least=0) for length in shape)
    if rows * words(columns) >= 2**61:
        raise ValueError(f"shape: expected a mask of less than 2^63 bytes, got {tuple(shape)}")
    return rows, columns


def _check_indices(name: str, indices: object, ndim: int, device: torch.device | None = None) -> None:
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.ndim != ndim:
        dimensions = "1 dimension" if ndim == 1 else f"{ndim} dimensions"
        raise TypeError(f"{name}: expected an int64 tensor of {dimensions}, got {describe(indices)}")
    check_int_tensor(name, indices, indices.shape, indices.device if device is None else device)


def as_bools(mask: object) -> str:
    """What to write in the place of numbers, for an error."""
    numbers = isinstance(mask, Tensor) and mask.dtype != torch.bool
    return "; write mask.bool() where all numbers but 0 mean yes" if numbers else ""


def as_seed(seed: int | Tensor | None, device: torch.device | str | None) -> Tensor:
    """A 0-dim int64 seed tensor on `device`; None draws one from torch's default generator of that device."""
    try:
        device = None if device is None else torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device: expected a torch.device, the name of one, or None, got {device!r}") from error
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.ndim != 0:
            raise TypeError(f"seed: expected an int or a 0-dim int64 tensor, got {describe(seed)}")
        if seed.is_meta and device is not None and device.type != "meta":
            raise ValueError(f"seed: expected a tensor on {device}, got {describe(seed)}")
        return seed if device is None else seed.to(device)
    seed = plain(seed)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int or a 0-dim int64 tensor, got {seed!r}")
    check_int("seed", seed)
    # Filled on the device: a copy from the host would wait for it, and cannot be captured in a CUDA graph.
    return torch.full((), seed, dtype=torch.int64, device=device)
