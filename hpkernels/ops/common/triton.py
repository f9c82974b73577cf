"""What the Triton kernels of several ops share: bits, ordered keys, tile order, the tile product, launch helpers.

Conventions: matrices are contiguous along their last axis; `rows_*` are index vectors of a tile, clamped to valid rows
so that the loads of a tile need no mask (what a clamped row yields is never stored or counted); offsets of rows are
int64. A pair mask is int32 words, bit j of a row is bit j % 32 of word j // 32.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpkernels.common.bits import words
from hpkernels.ops.common import gpu

LN2 = tl.constexpr(0.6931471805599453)
_TRANSPOSE_ROWS, _TRANSPOSE_WORDS = 128, 4
_COUNT_ROWS, _COUNT_WORDS = 8, 256
_MERGE_ROWS = 512
# Whether Triton multiplies fp32 as six bf16 products; its interpreter does not.
HAS_BF16X6 = torch.torch_version.TorchVersion(triton.__version__) >= (3, 6) and not triton.knobs.runtime.interpret


# ------------------------------------------------------------------ host side


require_supported = functools.partial(gpu.require_supported, "triton")


def same_dtype(*tensors: Tensor) -> list[Tensor]:
    """Contiguous tensors of one dtype: unchanged where they agree, else each promoted to fp32 (exact)."""
    dtype = gpu.common_dtype(*tensors)
    return [tensor.to(dtype).contiguous() for tensor in tensors]


def precision(dtype: torch.dtype, full: bool = False) -> str:
    """`input_precision` of tl.dot for fp32 operands; 16-bit ones ignore it.

    "bf16x6" on NVIDIA GPUs: each operand is split in three bf16 numbers, and the six largest of the nine products run
    on the matrix units. Its error is that of an IEEE product (tests/triton_kernels/test_precision.py). Never plain
    TF32: comparisons of similarities would not be those of fp32. IEEE products where the user asks for them (see
    `gpu.ieee_requested`) and on AMD GPUs, whose matrix units multiply fp32. Triton 3.5 has no "bf16x6": there IEEE, or
    three TF32 products where the user accepts TF32. Kernels whose registers are `full` of what they find take IEEE
    products, too: the parts of the operands would be spilled.

    Every kernel with a product asks here, so that here bf16 is refused under the interpreter: it multiplies the bit
    patterns of bf16 numbers as if they were integers (up to Triton 3.8).
    """
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        raise TypeError(
            "bfloat16: Triton's interpreter multiplies it wrongly; expected float32 or float16, or another backend"
        )
    if dtype != torch.float32 or full or torch.version.hip or gpu.ieee_requested():
        return "ieee"
    if HAS_BF16X6:
        return "bf16x6"
    return "tf32x3" if gpu.tf32_accepted() else "ieee"


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launches inside go to the tensor's device (nothing to do for CPU tensors, under the interpreter)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def split_tiles(programs: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """(splits, tiles per split) of a loop over `tiles`, so that `programs` row panels fill the device twice.

    Depends on shapes and the device only; every split has at least one tile.
    """
    per_split = triton.cdiv(tiles, gpu.splits(programs, tiles, device))
    return triton.cdiv(tiles, per_split), per_split


# ------------------------------------------------------------------ bits


@triton.jit
def popcount(words):
    """Set bits of each int32 word."""
    v = words.to(tl.uint32, bitcast=True)
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    v = v + (v >> 8)
    return ((v + (v >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def expand_words(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int32 words [ROWS, COLUMNS // 32] -> int1 [ROWS, COLUMNS]."""
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bits, [ROWS, COLUMNS]) != 0


@triton.jit
def bit_tile(bits_ptr, rows, first_word, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int1 [ROWS, COLUMNS]: the bits of rows `rows` from word `first_word` on, a multiple of COLUMNS // 32.

    No word lies past the row's end, because rows are padded to four words.
    """
    tl.static_assert(COLUMNS <= 128)
    word = first_word + tl.arange(0, COLUMNS // 32)
    words = tl.load(bits_ptr + rows.to(tl.int64)[:, None] * stride + word[None, :])
    return expand_words(words, ROWS, COLUMNS)


@triton.jit
def turned_bit_tile(bits_ptr, rows, first_word, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int1 [ROWS, COLUMNS]: entry (c, r) is bit c, from word `first_word` on, of row rows[r] (COLUMNS of them).

    `first_word` is any word of the row: past its end the last word is repeated.
    """
    word = tl.minimum(first_word + tl.arange(0, ROWS // 32), stride - 1)
    words = tl.load(bits_ptr + rows.to(tl.int64)[None, :] * stride + word[:, None])
    bits = (words[:, None, :] >> tl.arange(0, 32)[None, :, None]) & 1
    return tl.reshape(bits, [ROWS, COLUMNS]) != 0


@triton.jit
def pack_columns(bits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int1 [ROWS, COLUMNS] -> int32 words [ROWS, COLUMNS // 32]."""
    lanes = tl.reshape(bits.to(tl.int32), [ROWS, COLUMNS // 32, 32]) << tl.arange(0, 32)[None, None, :]
    return tl.sum(lanes, axis=2)


@triton.jit
def pack_rows(bits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int1 [ROWS, COLUMNS] -> words [ROWS // 32, COLUMNS] of the transposed bits (entry [w, c] belongs to row c)."""
    lanes = tl.reshape(bits.to(tl.int32), [ROWS // 32, 32, COLUMNS]) << tl.arange(0, 32)[None, :, None]
    return tl.sum(lanes, axis=1)


@triton.jit
def _transpose_bits_kernel(bits_ptr, out_ptr, N, W, columns, W_out, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """Transposes BLOCK_M rows x 32 BLOCK_W columns of bits."""
    COLUMNS: tl.constexpr = 32 * BLOCK_W
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    word = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = (rows < N)[:, None] & (word < W)[None, :]
    words = tl.load(bits_ptr + rows.to(tl.int64)[:, None] * W + word[None, :], mask=inside, other=0)
    turned = pack_rows(expand_words(words, BLOCK_M, COLUMNS), BLOCK_M, COLUMNS)
    out_rows = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    out_word = tl.program_id(0) * (BLOCK_M // 32) + tl.arange(0, BLOCK_M // 32)
    out_at = out_rows.to(tl.int64)[None, :] * W_out + out_word[:, None]
    tl.store(out_ptr + out_at, turned, mask=(out_rows < columns)[None, :])


def transpose_bits(bits: Tensor, columns: int) -> Tensor:
    """(N, W) -> (columns, words(N)): bit (j, i) of the result is bit (i, j)."""
    bits = bits.contiguous()
    n, width = bits.shape
    out = torch.empty((columns, words(n)), dtype=torch.int32, device=bits.device)
    if out.numel():  # blocks of 128 rows make exactly words(N): padding words are written, as zeros
        with on_device(bits):
            _transpose_bits_kernel[(triton.cdiv(n, _TRANSPOSE_ROWS), triton.cdiv(width, _TRANSPOSE_WORDS))](
                bits, out, n, width, columns, out.stride(0), BLOCK_M=_TRANSPOSE_ROWS, BLOCK_W=_TRANSPOSE_WORDS
            )
    return out


@triton.jit
def _count_bits_kernel(first_ptr, second_ptr, out_ptr, N, W, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """out[m, i] = set bits of row i of the first mask (m = 0) or the second."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    bits_ptr = first_ptr
    if tl.program_id(1) == 1:
        bits_ptr = second_ptr
    row_at = tl.minimum(rows, N - 1).to(tl.int64)[:, None] * W
    counts = tl.zeros([BLOCK_M, BLOCK_W], tl.int32)
    for start in range(0, W, BLOCK_W):
        word = start + tl.arange(0, BLOCK_W)
        counts += popcount(tl.load(bits_ptr + row_at + word[None, :], mask=(word < W)[None, :], other=0))
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * N + rows, tl.sum(counts, 1), mask=rows < N)


def count_bits(*masks: Tensor) -> Tensor:
    """Set bits of each row of masks of one shape, (masks, N) int32."""
    masks = [bits.contiguous() for bits in masks]
    n, width = masks[0].shape
    out = torch.empty((len(masks), n), dtype=torch.int32, device=masks[0].device)
    if masks[0].numel() == 0:
        return out.zero_()
    with on_device(out):
        for first in range(0, len(masks), 2):
            pair = masks[first : first + 2]
            _count_bits_kernel[(triton.cdiv(n, _COUNT_ROWS), len(pair))](
                pair[0], pair[-1], out[first], n, width, BLOCK_M=_COUNT_ROWS, BLOCK_W=_COUNT_WORDS
            )
    return out


# ------------------------------------------------------------------ ordered keys


@triton.jit
def ordered_key(values, indices):
    """int64 keys whose signed order is: larger value first, then lower index. -0.0 counts as 0.0."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - indices.to(tl.int64))


@triton.jit
def key_value(keys):
    """The fp32 value of an ordered key; -inf for the empty keys (below every number's)."""
    ordered = (keys >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return tl.where(ordered < -2139095041, float("-inf"), bits.to(tl.float32, bitcast=True))


# ------------------------------------------------------------------ tiles


@triton.jit
def _triangle_start(column_group, GROUP: tl.constexpr):
    return GROUP * GROUP * (column_group * (column_group - 1) // 2) + column_group * (GROUP * (GROUP + 1) // 2)


@triton.jit
def triangle_tile(p, GROUP: tl.constexpr, tiles=None):
    """Program p -> tile (r, c), r <= c, of the upper triangle.

    Columns go in groups of GROUP; within a group row tiles are walked top down, so that GROUP column tiles stay in
    cache while row tiles stream by. The square root is fp32: one integer correction each way makes it exact.
    With the number of tiles the last group is only as wide as they are: the first tiles (tiles + 1) / 2 programs do.
    """
    root = tl.sqrt(2.0 * p.to(tl.float32)) / GROUP
    g = tl.maximum(root.to(tl.int32), 0)
    g = tl.where(_triangle_start(g, GROUP) > p, g - 1, g)
    g = tl.where(_triangle_start(g + 1, GROUP) <= p, g + 1, g)
    q = p - _triangle_start(g, GROUP)
    width = GROUP if tiles is None else tl.minimum(GROUP, tiles - g * GROUP)
    above = g * GROUP * width  # tiles of the group's full rows; the group's own small triangle comes last
    t = tl.maximum(q - above, 0)
    c = 0
    for step in tl.static_range(1, GROUP):
        c = tl.where(t >= step * (step + 1) // 2, step, c)
    r_corner = g * GROUP + t - c * (c + 1) // 2
    r = tl.where(q < above, q // width, r_corner)
    c = g * GROUP + tl.where(q < above, q % width, c)
    return r, c


def triangle_programs(tiles: int, group: int) -> int:
    """Programs that cover the upper triangle of tiles x tiles (those past the last column have nothing to do)."""
    g = triton.cdiv(tiles, group)
    return group * group * (g * (g - 1) // 2) + g * (group * (group + 1) // 2)


@triton.jit
def tile_product(
    a_ptr, b_ptr, rows_a, rows_b, D, stride_a, stride_b,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_A, BLOCK_B]: inner products of rows rows_a of a with rows rows_b of b; BLOCK_K divides D."""
    a_rows = a_ptr + rows_a.to(tl.int64)[:, None] * stride_a
    b_rows = b_ptr + rows_b.to(tl.int64)[None, :] * stride_b
    acc = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_rows + d[None, :])
        b = tl.load(b_rows + d[:, None])
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


# ------------------------------------------------------------------ parts of sums, as `exponentials.merged`


@triton.jit
def _sum_of_parts(part_ptr, rows, inside, N, parts):
    total = tl.zeros(rows.shape, tl.float32)
    for _ in range(parts):
        total += tl.load(part_ptr + rows, mask=inside, other=0.0)
        part_ptr += N
    return total


@triton.jit
def _merge_parts_kernel(
    totals_ptr, shifts_ptr, pos_ptr, ext_ptr, lse_ptr, pos_out_ptr, ext_out_ptr, N, parts, pos_parts, ext_parts,
    ONE_SHIFT: tl.constexpr, HAS_SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """lse = log sum_p totals_p 2^shifts_p, 0 without any exponential; with HAS_SUMS the sums of pos and of ext."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    if ONE_SHIFT:
        base = tl.zeros([BLOCK], tl.float32) + tl.load(shifts_ptr)
        total = _sum_of_parts(totals_ptr, rows, inside, N, parts)
    else:
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        part_ptr = shifts_ptr
        for _ in range(parts):
            largest = tl.maximum(largest, tl.load(part_ptr + rows, mask=inside, other=0.0))
            part_ptr += N
        base = tl.where(largest == float("-inf"), 0.0, largest)
        total = tl.zeros([BLOCK], tl.float32)
        for _ in range(parts):
            shift = tl.load(shifts_ptr + rows, mask=inside, other=0.0)
            total += tl.load(totals_ptr + rows, mask=inside, other=0.0) * tl.exp2(shift - base)
            totals_ptr += N
            shifts_ptr += N
    lse = tl.where(total == 0.0, 0.0, tl.log(tl.where(total == 0.0, 1.0, total)) + base * LN2)
    tl.store(lse_ptr + rows, lse, mask=inside)
    if HAS_SUMS:
        tl.store(pos_out_ptr + rows, _sum_of_parts(pos_ptr, rows, inside, N, pos_parts), mask=inside)
        tl.store(ext_out_ptr + rows, _sum_of_parts(ext_ptr, rows, inside, N, ext_parts), mask=inside)


def merged(totals: Tensor, shifts: Tensor, pos: Tensor, ext: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(lse, pos, ext), each (S, n), of contiguous parts (parts, S, n): sums of exponentials totals * 2^shifts, and
    logit sums. Each may have its own number of parts; shifts may be a single number."""
    out = tuple(torch.empty_like(totals[0]) for _ in range(3))  # an op's results may not share memory
    _merge(totals, shifts, (pos, ext), *out)
    return out


def merged_lse(totals: Tensor, shifts: Tensor) -> Tensor:
    """log of the sum over parts (the first dimension) of totals * 2^shifts; 0 without any exponential."""
    lse = torch.empty_like(totals[0])
    _merge(totals, shifts, (), lse)
    return lse


def _merge(totals: Tensor, shifts: Tensor, sums: tuple[Tensor, ...], *out: Tensor) -> None:
    n = out[0].numel()
    if n:
        parts = sums or (totals, totals)  # not read where there are none
        with on_device(totals):
            _merge_parts_kernel[(triton.cdiv(n, _MERGE_ROWS),)](
                totals, shifts, *parts, *(out if sums else out * 3), n, len(totals), *map(len, parts),
                ONE_SHIFT=shifts.numel() == 1, HAS_SUMS=bool(sums), BLOCK=_MERGE_ROWS,
            )  # fmt: skip
