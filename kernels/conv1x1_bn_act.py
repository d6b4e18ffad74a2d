"""A 1x1 convolution whose batch norm is folded into its weight while it trains: four passes, two GEMM kernels.

Rows are pixels: y (N, C, H, W), channels_last, is a matrix of N*H*W rows of which a stride takes some. Both kernels are
made of the same pieces: rows at a stride, a bit mask over the left operand, a second pair of operands.

``_rows_kernel`` multiplies rows by a small matrix: ``A B [+ A2 B2] + shift [+ residual]``, ReLU and bit mask. It is
``apply`` (A, A2 = y, y2), ``backward_apply`` (A = masked dy, A2 = y, one output for y and one for y2) and
``conv1x1_statistics``: the product alone, whose epilogue leaves statistics of the tile for ``_merge_tiles_kernel``.

``_columns_kernel`` multiplies columns over all rows: ``A^T [B | B2]`` and the column sums of A, by chunks of rows whose
results ``_combine_kernel`` adds in float64 in a fixed order. It is ``moments`` (A = B = y, upper tiles only) and
``backward_reduce`` (A = masked dy, B = y, B2 = y2). The tensor cores' own sums run over at most 128 rows.

Where y has a norm, ``_activated`` makes of a tile of it, between its load and its product, what the convolution reads.
The epilogue of ``backward_apply`` does so once more: dx is 0 where that is not active, and its sums, those of a tile at
first, are added by ``_combine_kernel``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import INTERPRET, clear_padding, kept, launch_options, normalised, pack, round_to, unpack, wide_dtype

# Launch arguments that must not make a new variant of a kernel: what divides a width is told by ALIGN.
SCALARS = [
    "rows",
    "chunk_rows",
    "splits",
    "group",
    "units",
    "units2",
    "units_other",
    "tiles",
    "tiles2",
    "out_height",
    "out_width",
    "height",
    "width",
    "stride",
    "height2",
    "width2",
    "stride2",
    "height_other",
    "width_other",
    "stride_other",
    "m",
]

# ---- pieces of kernels -----------------------------------------------------------------------------------------------


@triton.jit
def _pixels_of(first, local, height, width, stride, out_height, out_width, STRIDED: tl.constexpr):
    """Rows of y that output rows ``first + local`` stand on: one (int64), and the others relative to it."""
    if STRIDED:
        row = first + local
        line = row // out_width
        image = (line // out_height).to(tl.int64)
        return tl.zeros([], tl.int64), (image * height + line % out_height * stride) * width + row % out_width * stride
    else:
        return first.to(tl.int64), local


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRET and acc.dtype == tl.float32:  # the interpreter multiplies bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _activated(
    y,
    norm_ptr,  # [3, cols]: mean, scale, shift
    col,
    cols,
    plain,  # y is not normalised; None: never
    EVEN: tl.constexpr,
):
    """(y - mean, y normalised and rounded) of columns ``col``, 0 of those outside. The one expression of all passes."""
    at = norm_ptr + col
    least = 0.0
    if EVEN and plain is None:
        mean, scale, shift = tl.load(at), tl.load(at + cols), tl.load(at + 2 * cols)
    else:
        exists = col < cols
        if plain is not None:  # as the identity, which leaves nothing to choose per element
            exists = col < tl.where(plain, 0, cols)
            least = tl.where(plain, float("-inf"), 0.0)
        mean = tl.load(at, mask=exists, other=0.0)
        scale = tl.load(at + cols, mask=exists, other=1.0)
        shift = tl.load(at + 2 * cols, mask=exists, other=0.0)
    centred, a = normalised(y.to(mean.dtype), mean[None, :], 0.0, scale[None, :], shift[None, :])
    return centred, round_to(tl.where(a <= least, least, a), y.dtype)  # NaN passes


@triton.jit
def _masked(
    a,
    mask_ptr,
    first,
    local,
    inside,
    col,
    units,
    ALIGN: tl.constexpr,
    EVEN: tl.constexpr,  # all rows and columns are inside
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """a where its bit is set, else 0: rows ``first + local``, columns ``col`` and on, of ``units * ALIGN`` columns."""
    if ALIGN % 8 == 0:
        width = units * (ALIGN // 8)
        byte = col // 8 + tl.arange(0, COLS // 8)[None, :]
        at = (mask_ptr + first.to(tl.int64) * width) + (local[:, None] * width + byte)
        bytes = tl.load(at) if EVEN else tl.load(at, mask=inside & (byte < width), other=0)
        keep = unpack(bytes, ROWS, COLS)
    else:  # rows begin inside bytes
        width = units * ALIGN
        cols = col + tl.arange(0, COLS)[None, :]
        bit = (first.to(tl.int64) + local)[:, None] * width + cols
        bytes = tl.load(mask_ptr + bit // 8, mask=inside & (cols < width), other=0).to(tl.int32)
        keep = (bytes >> (bit % 8).to(tl.int32)) & 1 != 0
    return tl.where(keep, a, 0.0).to(a.dtype)


@triton.jit
def _multiply_rows(
    acc,
    a_ptr,
    norm_ptr,
    plain,
    mask_ptr,
    b_ptr,
    first,  # rows of the mask: first + local
    local,
    pixel,  # rows of a
    pixels,
    col,
    cols,
    units,
    ALIGN: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_COLS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """acc + a b for some rows of a and columns of b; b is stored as [cols, inner] if TRANSPOSED, else [inner, cols]."""
    inner = units * ALIGN
    i = tl.arange(0, BLOCK_I)
    a_at = (a_ptr + pixel * inner) + (pixels[:, None] * inner + i[None, :])
    b_at = b_ptr + (i[:, None] + col[None, :] * inner if TRANSPOSED else i[:, None] * cols + col[None, :])
    for done in range(0, inner, BLOCK_I):
        exists = done + i < inner
        a = tl.load(a_at) if EVEN else tl.load(a_at, mask=exists[None, :], other=0.0)
        if EVEN and EVEN_COLS:
            b = tl.load(b_at)
        else:
            b = tl.load(b_at, mask=exists[:, None] & (col < cols)[None, :], other=0.0)
        if norm_ptr is not None:
            _, a = _activated(a, norm_ptr, done + i, inner, plain, EVEN)
        if mask_ptr is not None:
            a = _masked(a, mask_ptr, first, local, True, done, units, ALIGN, EVEN, BLOCK_M, BLOCK_I)
        acc = _dot(a, b, acc, PRECISION)
        a_at += BLOCK_I
        b_at += BLOCK_I if TRANSPOSED else BLOCK_I * cols
    return acc


@triton.jit
def _store_statistics(
    statistics_ptr,
    out,
    left,
    c,
    cols,
    compute: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """(shift, mean - shift, M2) of the first ``left`` rows, in compute; the shift is the mean of a few."""
    # by twos in a thread, which takes the rows off the lanes: there each sum would be up to five shuffles a column
    even, odd = out.reshape(ROWS // 2, 2, COLS).permute(0, 2, 1).split()
    even, odd = even.to(compute), odd.to(compute)
    row = 2 * tl.arange(0, ROWS // 2)[:, None]
    few = tl.where(left < 4, 1, 4)  # whose sum is exact where they are equal
    shift = tl.sum(tl.where(row < few, even, 0.0) + tl.where(row + 1 < few, odd, 0.0), 0) * (1.0 / few.to(compute))
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)  # an infinity is in the mean, not NaN
    even = tl.where(row < left, even - shift[None, :], 0.0)
    odd = tl.where(row + 1 < left, odd - shift[None, :], 0.0)
    rest = tl.sum(even + odd, 0)
    average = rest * (1.0 / left.to(compute))
    m2 = tl.sum(even * even + odd * odd, 0) - rest * average
    m2 = tl.where(m2 < 0.0, 0.0, m2)  # NaN passes
    at = statistics_ptr + c
    tl.store(at, shift, mask=c < cols)
    tl.store(at + cols, average, mask=c < cols)
    tl.store(at + 2 * cols, m2, mask=c < cols)


@triton.jit
def _finish(
    acc,
    shift_ptr,
    residual_ptr,
    residual_mask_ptr,
    y_ptr,  # of the shape of out: out is 0 where this is not active
    norm_ptr,
    plain,
    out_ptr,
    mask_ptr,
    sums_ptr,  # of the tile: [2, cols]
    statistics_ptr,  # of the tile: [3, cols]
    first,  # rows of the masks: first + local
    to,  # where the tile's first row begins, in out, residual and y
    local,
    out_rows,  # rows of out relative to the first
    left,
    col,
    cols,
    units,
    ALIGN: tl.constexpr,
    RELU: tl.constexpr,
    EVEN_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Shift, residual, ReLU, bit mask, sums, statistics and store of some columns of a tile, from ``col`` on."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    c = col + tl.arange(0, COLS)
    exists = (local < left)[:, None]
    inside = exists if EVEN_COLS else exists & (c < cols)[None, :]
    at = out_rows[:, None] * cols + c[None, :]
    if shift_ptr is not None:
        acc += tl.load(shift_ptr + c, mask=c < cols, other=0.0)[None, :]
    if residual_ptr is not None:
        residual = tl.load((residual_ptr + to) + at, mask=inside, other=0.0)
        if residual_mask_ptr is not None:
            residual = _masked(residual, residual_mask_ptr, first, local, exists, col, units, ALIGN, False, ROWS, COLS)
        acc += residual.to(acc.dtype)
    if norm_ptr is not None:
        counts = inside if plain is None else exists & (c < tl.where(plain, 0, cols))[None, :]
        y = tl.load((y_ptr + to) + at, mask=counts, other=0.0)
        centred, a = _activated(y, norm_ptr, c, cols, plain, EVEN_COLS)
        acc = tl.where((a <= 0.0) & counts, 0.0, acc)  # NaN passes
    if RELU:
        acc = tl.where(acc <= 0.0, 0.0, acc)  # NaN passes
    out = round_to(acc, dtype)
    tl.store((out_ptr + to) + at, out, mask=inside)
    if statistics_ptr is not None:
        _store_statistics(statistics_ptr, out, left, c, cols, acc.dtype, ROWS, COLS)
    if sums_ptr is not None:
        out = out.to(acc.dtype)
        stored = c < (cols if plain is None else tl.where(plain, 0, cols))
        tl.store(sums_ptr + c, tl.sum(tl.where(counts, out, 0.0), 0), mask=stored)
        tl.store(sums_ptr + cols + c, tl.sum(tl.where(counts, out * centred, 0.0), 0), mask=stored)
    if mask_ptr is not None:
        mask_width = units * (ALIGN // 8)
        byte = col // 8 + tl.arange(0, COLS // 8)
        bytes = pack(inside & kept(acc, dtype), ROWS, COLS)
        byte_at = (mask_ptr + first.to(tl.int64) * mask_width) + (local[:, None] * mask_width + byte[None, :])
        tl.store(byte_at, bytes, mask=exists & (byte < mask_width)[None, :])


@triton.jit
def _halves(acc):
    """The left and the right columns."""
    return acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()


# ---- rows times a small matrix ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SCALARS)
def _rows_kernel(
    a_ptr,  # [rows, inner]
    norm_ptr,  # [3, inner], or None: how a is normalised
    mask_ptr,  # bits over a, or None
    b_ptr,
    a2_ptr,  # [rows, inner2], or None
    norm2_ptr,  # [3, inner2], or None: how a2 of the first output is normalised, which is 0 where that is not active
    b2_ptr,
    shift_ptr,  # [cols], or None
    residual_ptr,  # [rows, cols], or None
    residual_mask_ptr,  # bits over residual, or None
    out_ptr,  # [rows, cols]
    out_mask_ptr,  # bits over out, or None
    sums_ptr,  # [tiles of rows, 2, cols], or None: sums of the first output, and of it times a2 less its mean
    statistics_ptr,  # [tiles of rows, 3, cols], or None: shift, mean - shift and M2 of the first output
    other_b_ptr,  # of the second output, which shares a and its mask; all None without it
    other_a2_ptr,
    other_b2_ptr,
    other_shift_ptr,
    other_out_ptr,
    rows,
    units,  # inner = units * ALIGN
    units2,  # inner2 = units2 * ALIGN2
    units_out,  # cols = units_out * ALIGN_OUT
    units_other,  # inner2 and cols of the second output, in ALIGN2
    tiles,  # across the output
    tiles2,  # across the second
    out_height,
    out_width,
    height,  # of a
    width,
    stride,
    height2,  # of a2 and, where that is strided, of out
    width2,
    stride2,
    height_other,  # of the second output
    width_other,
    stride_other,
    RELU: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    STRIDED: tl.constexpr,
    STRIDED2: tl.constexpr,
    STRIDED_OUT: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN2: tl.constexpr,
    ALIGN_OUT: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN2: tl.constexpr,
    EVEN_COLS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PIECES: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    compute: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    # tiles that share rows are neighbours in time
    tile = tl.program_id(0) % (tiles + tiles2)
    block = tl.program_id(0) // (tiles + tiles2)
    cols = units_out * ALIGN_OUT
    second = None
    if other_out_ptr is not None:
        second = tile >= tiles
        tile = tl.where(second, tile - tiles, tile)
        b_ptr = tl.where(second, other_b_ptr, b_ptr)
        a2_ptr = tl.where(second, other_a2_ptr, a2_ptr)
        b2_ptr = tl.where(second, other_b2_ptr, b2_ptr)
        shift_ptr = tl.where(second, other_shift_ptr, shift_ptr)
        out_ptr = tl.where(second, other_out_ptr, out_ptr)
        units2 = tl.where(second, units_other, units2)
        cols = units2 * ALIGN2
        height2 = tl.where(second, height_other, height2)
        width2 = tl.where(second, width_other, width2)
        stride2 = tl.where(second, stride_other, stride2)
    if out_mask_ptr is not None and tl.program_id(0) == 0:
        clear_padding(out_mask_ptr, rows, cols)
    first = (block.to(tl.int64) if WIDE else block) * BLOCK_M
    left = tl.minimum(rows - first, BLOCK_M).to(tl.int32)
    local = tl.arange(0, BLOCK_M)
    col = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    clamped = tl.minimum(local, left - 1)  # instead of a mask over loads: what it multiplies is not stored
    acc = tl.zeros([BLOCK_M, BLOCK_N], compute)
    pixel, pixels = _pixels_of(first, clamped, height, width, stride, out_height, out_width, STRIDED)
    acc = _multiply_rows(
        acc,
        a_ptr,
        norm_ptr,
        None,
        mask_ptr,
        b_ptr,
        first,
        clamped,
        pixel,
        pixels,
        col,
        cols,
        units,
        ALIGN,
        EVEN,
        EVEN_COLS,
        TRANSPOSED,
        PRECISION,
        BLOCK_M,
        BLOCK_I,
    )
    pixel, pixels = _pixels_of(first, clamped, height2, width2, stride2, out_height, out_width, STRIDED2)
    if a2_ptr is not None:
        acc = _multiply_rows(
            acc,
            a2_ptr,
            norm2_ptr,
            second,
            None,
            b2_ptr,
            first,
            clamped,
            pixel,
            pixels,
            col,
            cols,
            units2,
            ALIGN2,
            EVEN2,
            EVEN_COLS,
            TRANSPOSED,
            PRECISION,
            BLOCK_M,
            BLOCK_I,
        )
    to = (pixel if STRIDED_OUT else first.to(tl.int64)) * cols
    if sums_ptr is not None:
        sums_ptr += block.to(tl.int64) * (2 * cols)
    if statistics_ptr is not None:
        statistics_ptr += block.to(tl.int64) * (3 * cols)
    out_rows = pixels if STRIDED_OUT else local
    # a tile in pieces, where all of it at once would take too many registers
    pieces = (acc,)
    if PIECES >= 2:
        pieces = _halves(acc)
    if PIECES == 4:
        pieces = _halves(pieces[0]) + _halves(pieces[1])
    for piece in tl.static_range(PIECES):
        first_col = tile * BLOCK_N + piece * (BLOCK_N // PIECES)
        _finish(
            pieces[piece],
            shift_ptr,
            residual_ptr,
            residual_mask_ptr,
            a2_ptr,
            norm2_ptr,
            second,
            out_ptr,
            out_mask_ptr,
            sums_ptr,
            statistics_ptr,
            first,
            to,
            local,
            out_rows,
            left,
            first_col,
            cols,
            units_out,
            ALIGN_OUT,
            RELU,
            EVEN_COLS,
            BLOCK_M,
            BLOCK_N // PIECES,
        )
    if STRIDED_OUT:
        # a pixel's program also clears the pixels that the stride leaves out beside and below it
        at = out_rows[:, None] * cols + col[None, :]
        inside = (local < left)[:, None] & (col < cols)[None, :]
        line = (first + clamped) // out_width % out_height * stride2
        column = (first + clamped) % out_width * stride2
        zeros = tl.zeros([BLOCK_M, BLOCK_N], dtype)
        for d in range(1, stride2 * stride2):
            down, right = d // stride2, d % stride2
            there = (line + down < height2) & (column + right < width2)
            by = (down * width2 + right).to(tl.int64) * cols
            tl.store((out_ptr + to + by) + at, zeros, mask=inside & there[:, None])


@triton.jit
def _mask_kernel(out_ptr, mask_ptr, elements, mask_bytes, BLOCK: tl.constexpr):
    """Bits of ``out`` where its rows do not end with bytes."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    element = first + tl.arange(0, BLOCK)
    compute: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    out = tl.load(out_ptr + element, mask=element < elements, other=0.0).to(compute)
    keep = (element < elements) & ((out <= 0.0) == 0)
    bits = keep.to(tl.int32).reshape(BLOCK // 8, 8) << tl.arange(0, 8)[None, :]
    byte = first // 8 + tl.arange(0, BLOCK // 8)
    tl.store(mask_ptr + byte, tl.sum(bits, axis=1).to(tl.uint8), mask=byte < mask_bytes)


@triton.jit(do_not_specialize=SCALARS)
def _merge_tiles_kernel(
    partial_ptr,  # [parts, 3, C]: shift, mean - shift, M2
    out_ptr,  # float64: [groups, 3, C], or of the LAST launch, of one group, mean, M2 (C each) and count
    rows,
    chunk_rows,  # of a part
    splits,  # parts
    group,  # parts that a program merges
    units,  # C = units * ALIGN
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merges statistics (Chan), in order, relative to the mean of the first part of the group."""
    channels = units * ALIGN
    blocks = tl.cdiv(channels, BLOCK_C)
    i = tl.program_id(0) // blocks
    col = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    exists = col < channels
    before = i * group
    parts = tl.minimum(splits, before + group)
    first = partial_ptr + before.to(tl.int64) * (3 * channels) + col
    origin = tl.load(first, mask=exists, other=0.0).to(tl.float64)
    origin += tl.load(first + channels, mask=exists, other=0.0).to(tl.float64)
    count = tl.zeros([1, 1], tl.float64)
    plain = tl.zeros([1, BLOCK_C], tl.float64)
    s1 = tl.zeros([1, BLOCK_C], tl.float64)
    s2 = tl.zeros([1, BLOCK_C], tl.float64)
    for p in range(before, parts, BLOCK_P):
        part = p + tl.arange(0, BLOCK_P)[:, None]
        here = part < parts
        n = tl.where(here, tl.minimum(rows - part.to(tl.int64) * chunk_rows, chunk_rows), 0).to(tl.float64)
        at = partial_ptr + part.to(tl.int64) * (3 * channels) + col
        shift = tl.load(at, mask=here & exists, other=0.0).to(tl.float64)
        average = tl.load(at + channels, mask=here & exists, other=0.0).to(tl.float64)
        m2 = tl.load(at + 2 * channels, mask=here & exists, other=0.0).to(tl.float64)
        away = (shift - origin) + average
        count += tl.sum(n, 0, keep_dims=True)
        plain += tl.sum(n * (shift + average), 0, keep_dims=True)
        s1 += tl.sum(n * away, 0, keep_dims=True)
        s2 += tl.sum(m2 + n * away * away, 0, keep_dims=True)
    away = s1 / count
    m2 = s2 - s1 * away
    finite = tl.abs(origin + away) < float("inf")  # else away is NaN where the mean may be an infinity
    origin = tl.where(finite, origin, plain / count)
    away = tl.where(finite, away, 0.0)
    if LAST:
        tl.store(out_ptr + col, origin + away, mask=exists)
        tl.store(out_ptr + channels + col, m2, mask=exists)
        zero = tl.zeros([1, 1], tl.int32)
        tl.store(out_ptr + 2 * channels + zero, count, mask=tl.program_id(0) == zero)
    else:
        to = out_ptr + i.to(tl.int64) * (3 * channels) + col
        tl.store(to, origin, mask=exists)
        tl.store(to + channels, away, mask=exists)
        tl.store(to + 2 * channels, m2, mask=exists)


# ---- columns over all rows -------------------------------------------------------------------------------------------


@triton.jit
def _tile_of(tile, tiles):
    """Row and column of a tile of the upper triangle of tiles x tiles."""
    i = tile * 0
    while tile >= tiles - i:
        tile -= tiles - i
        i += 1
    return i, i + tile


@triton.jit
def _load_rows(
    ptr,
    norm_ptr,
    plain,
    first,
    local,
    inside,
    col,
    units,
    height,
    width,
    stride,
    out_height,
    out_width,
    ALIGN: tl.constexpr,
    STRIDED: tl.constexpr,
    EVEN_COLS: tl.constexpr,
):
    cols = units * ALIGN
    pixel, pixels = _pixels_of(first, local, height, width, stride, out_height, out_width, STRIDED)
    at = (ptr + pixel * cols) + (pixels[:, None] * cols + col[None, :])
    y = tl.load(at, mask=inside[:, None] if EVEN_COLS else inside[:, None] & (col < cols)[None, :], other=0.0)
    if norm_ptr is not None:
        _, y = _activated(y, norm_ptr, col, cols, plain, EVEN_COLS)
        y = tl.where(inside[:, None], y, 0.0).to(y.dtype)
    return y


@triton.jit(do_not_specialize=SCALARS)
def _columns_kernel(
    a_ptr,  # [rows, M]
    mask_ptr,  # bits over a, or None
    b_ptr,  # [rows, N]; None: column sums only
    norm_ptr,  # [3, N], or None: how b is normalised, and a where SYMMETRIC
    b2_ptr,  # [rows, N2], or None
    origin_ptr,  # [M], or None: what is subtracted from a and b
    g_ptr,  # [rows, M], or None: masked a
    partial_ptr,  # [splits, M, N + N2]
    sums_ptr,  # [splits, M] float64
    rows,
    chunk_rows,
    units,  # M = units * ALIGN
    units2,  # N = units2 * ALIGN2
    units_other,  # N2 = units_other * ALIGN2
    tiles,  # across [B | B2], or of the upper triangle
    tiles2,  # across B
    out_height,
    out_width,
    height,  # of b, and of a where SYMMETRIC
    width,
    stride,
    height2,  # of b2
    width2,
    stride2,
    SYMMETRIC: tl.constexpr,
    SINGLE: tl.constexpr,  # one tile, whose a is its b
    STRIDED: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN2: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN2: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,  # of column sums
):
    if SYMMETRIC:
        split = tl.program_id(0) // tiles
        i, j = _tile_of(tl.program_id(0) % tiles, tiles2)
        first = i == j
    else:
        j = tl.program_id(0) % tiles
        i = tl.program_id(0) // tiles % tl.cdiv(units * ALIGN, BLOCK_M)
        split = tl.program_id(0) // tiles // tl.cdiv(units * ALIGN, BLOCK_M)
        first = j == 0
    m = units * ALIGN
    width_all = units2 * ALIGN2  # of the partial results
    before = 0
    second = None
    if b2_ptr is not None:
        width_all += units_other * ALIGN2
        second = j >= tiles2
        before = tl.where(second, units2 * ALIGN2, 0)
        j = tl.where(second, j - tiles2, j)
        b_ptr = tl.where(second, b2_ptr, b_ptr)
        units2 = tl.where(second, units_other, units2)
        height = tl.where(second, height2, height)
        width = tl.where(second, width2, width)
        stride = tl.where(second, stride2, stride)
    n = units2 * ALIGN2
    col_m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    col_n = j * BLOCK_N + tl.arange(0, BLOCK_N)
    if origin_ptr is not None:
        origin_m = tl.load(origin_ptr + col_m, mask=col_m < m, other=0.0)[None, :]
        origin_n = tl.load(origin_ptr + col_n, mask=col_n < n, other=0.0)[None, :]
    begin = (split.to(tl.int64) if WIDE else split) * chunk_rows
    count = tl.minimum(rows - begin, chunk_rows).to(tl.int32)
    compute: tl.constexpr = ACCUMULATE
    sum_dtype: tl.constexpr = tl.float64 if SYMMETRIC else compute
    total = tl.zeros([BLOCK_M, BLOCK_N], compute)
    sums = tl.zeros([LANES, BLOCK_M], sum_dtype)
    for done in range(0, count, ROWS):
        local = done + tl.arange(0, ROWS)
        inside = local < count
        a = _load_rows(
            a_ptr,
            norm_ptr if SYMMETRIC else None,
            None,
            begin,
            local,
            inside,
            col_m,
            units,
            height,
            width,
            stride,
            out_height,
            out_width,
            ALIGN,
            STRIDED and SYMMETRIC,
            EVEN,
        )
        if b_ptr is not None and not SINGLE:
            b = _load_rows(
                b_ptr,
                norm_ptr,
                second,
                begin,
                local,
                inside,
                col_n,
                units2,
                height,
                width,
                stride,
                out_height,
                out_width,
                ALIGN2,
                STRIDED,
                EVEN2,
            )
        if mask_ptr is not None:
            a = _masked(a, mask_ptr, begin, local, inside[:, None], i * BLOCK_M, units, ALIGN, False, ROWS, BLOCK_M)
        if origin_ptr is not None:
            a = tl.where(inside[:, None], a - origin_m, 0.0)
            if not SINGLE:
                b = tl.where(inside[:, None], b - origin_n, 0.0)
        if compute == tl.float64:
            a = a.to(tl.float64)
            if b_ptr is not None and not SINGLE:
                b = b.to(tl.float64)
        if first:
            # lanes by rows, so that no threads need to exchange anything here
            part = tl.sum(a.to(compute).reshape(ROWS // LANES, LANES, BLOCK_M), 0)
            sums += part.to(sum_dtype)
            if g_ptr is not None:
                at = local[:, None] * m + col_m[None, :]
                tl.store(
                    (g_ptr + begin.to(tl.int64) * m) + at,
                    a.to(g_ptr.dtype.element_ty),
                    mask=inside[:, None] & (col_m < m)[None, :],
                )
        if b_ptr is not None:
            if SINGLE:
                b = a
            if compute == tl.float64:
                total = _dot(tl.trans(a), b, total, PRECISION)
            else:
                product = _dot(tl.trans(a), b, tl.zeros([BLOCK_M, BLOCK_N], compute), PRECISION)
                # not `+`, which the compiler would move into the accumulator of the tensor cores
                total = tl.fma(product, 1.0, total)
    if first:
        to = sums_ptr + split.to(tl.int64) * m + col_m
        tl.store(to, tl.sum(sums.to(tl.float64), 0), mask=col_m < m)
    if b_ptr is not None:
        to = (split.to(tl.int64) * m + i * BLOCK_M) * width_all + before
        at = tl.arange(0, BLOCK_M)[:, None] * width_all + col_n[None, :]
        tl.store((partial_ptr + to) + at, total, mask=(col_m < m)[:, None] & (col_n < n)[None, :])


@triton.jit
def _origin_kernel(
    y_ptr,
    norm_ptr,  # [3, C], or None
    origin_ptr,  # [C]
    rows,
    channels,
    height,
    width,
    stride,
    out_height,
    out_width,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The mean of the first rows, in few bits."""
    local = tl.arange(0, ROWS)
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = local < rows
    y = _load_rows(
        y_ptr,
        norm_ptr,
        None,
        tl.program_id(0) * 0,
        local,
        inside,
        col,
        channels,
        height,
        width,
        stride,
        out_height,
        out_width,
        1,
        True,
        False,
    )
    mean = tl.sum(y, 0) / tl.minimum(rows, ROWS).to(tl.float32)
    tl.store(origin_ptr + col, round_to(mean, tl.bfloat16).to(tl.float32), mask=col < channels)


@triton.jit(do_not_specialize=SCALARS)
def _combine_kernel(
    partial_ptr,  # [splits, M, N + N2], or None
    sums_ptr,  # [splits, M]
    origin_ptr,  # [M], or None
    vector_ptr,  # [M] float64: the column sums, or the means where SYMMETRIC; without products [groups, M]
    out_ptr,  # [M, N]
    out2_ptr,  # [M, N2], or None
    rows,
    splits,
    group,  # parts that a program adds, without products
    m,
    units,  # N = units * ALIGN
    units2,  # N2 = units2 * ALIGN
    SYMMETRIC: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds partial results, each program a part of a row; or, without products, the column sums of a group of them."""
    n = units * ALIGN
    n2 = units2 * ALIGN
    width = (units + units2) * ALIGN
    blocks = tl.cdiv(width, BLOCK_N)
    i = tl.program_id(0) // blocks
    col = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    part = tl.arange(0, BLOCK_P)[:, None]
    exists = col < width
    parts = splits
    before = 0
    if partial_ptr is None:
        before = i * group
        parts = tl.minimum(splits, before + group)
    if SYMMETRIC:
        exists = exists & (col >= i)
        parts = tl.where(tl.program_id(0) % blocks * BLOCK_N + BLOCK_N > i, splits, 0)
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float64)
    sum_i = tl.zeros([BLOCK_P, 1], tl.float64)
    sum_j = tl.zeros([BLOCK_P, BLOCK_N], tl.float64)
    for p in range(before, parts, BLOCK_P):
        here = p + part < parts
        at = (p + part).to(tl.int64) * m
        if partial_ptr is not None:
            partial = tl.load(partial_ptr + (at + i) * width + col, mask=here & exists, other=0.0)
            total += partial.to(tl.float64)
            sum_i += tl.load(sums_ptr + at + i, mask=here, other=0.0)
        if SYMMETRIC or partial_ptr is None:
            sum_j += tl.load(sums_ptr + at + col, mask=here & exists, other=0.0)
    total = tl.sum(total, 0, keep_dims=True)
    sum_i = tl.sum(sum_i, 0, keep_dims=True)
    sum_j = tl.sum(sum_j, 0, keep_dims=True)
    values = rows.to(tl.float64)
    if SYMMETRIC:
        total -= sum_i * sum_j / values
        mean = sum_j / values
        if origin_ptr is not None:
            mean += tl.load(origin_ptr + col, mask=exists, other=0.0).to(tl.float64)
        tl.store(out_ptr + i.to(tl.int64) * n + col, total, mask=exists)
        tl.store(out_ptr + col.to(tl.int64) * n + i, total, mask=exists & (col > i))
        tl.store(vector_ptr + col, mean, mask=exists & (col == i))
    elif partial_ptr is None:
        tl.store(vector_ptr + i.to(tl.int64) * width + col, sum_j, mask=exists)
    else:
        total = total.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + i.to(tl.int64) * n + col, total, mask=col < n)
        if out2_ptr is not None:
            tl.store(out2_ptr + i.to(tl.int64) * n2 + (col - n), total, mask=exists & (col >= n))
        zero = tl.zeros([1, 1], tl.int32)
        tl.store(vector_ptr + i + zero, sum_i, mask=tl.program_id(0) % blocks == zero)


# ---- launch plans ----------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """``inner`` is the step of the reduction: of rows in ``_columns_kernel``, where it is at most 128."""

    m: int
    n: int
    inner: int
    threads: int
    stages: int
    pieces: int = 1  # of the epilogue of ``_rows_kernel``: 1, 2 or 4
    resident: int = 1  # programs per processor, which decide how many chunks of rows there are


# What runs for a pass: (arch, bytes of an element) -> tile where memory decides, tile where arithmetic does. Chosen so
# that nothing spills, that several programs or several stages of loads are in flight, and that what is shared between
# tiles is not read from L2 too often.
APPLY_TILES = {
    ("sm80", 2): (Tile(128, 64, 64, 128, 3, 2), Tile(128, 128, 32, 256, 4, 2)),
    ("sm90", 2): (Tile(128, 64, 64, 128, 3, 2), Tile(128, 128, 64, 256, 3, 2)),
    ("sm100", 2): (Tile(128, 64, 64, 128, 3, 2), Tile(128, 128, 64, 256, 3, 2)),
    ("gfx9", 2): (Tile(128, 64, 64, 256, 2), Tile(128, 128, 32, 256, 2, 2)),
    ("other", 2): (Tile(128, 64, 32, 128, 3, 2),) * 2,
    ("sm80", 4): (Tile(128, 64, 16, 256, 4, 2),) * 2,
    ("sm90", 4): (Tile(128, 64, 32, 256, 3, 2),) * 2,
    ("sm100", 4): (Tile(128, 64, 32, 256, 3, 2),) * 2,
    ("gfx9", 4): (Tile(64, 64, 32, 256, 2),) * 2,
    ("other", 4): (Tile(64, 64, 16, 128, 3),) * 2,
    ("gfx9", 8): (Tile(64, 32, 16, 256, 2),) * 2,
    ("other", 8): (Tile(64, 32, 16, 128, 3),) * 2,
}
BACKWARD_TILES = APPLY_TILES | {
    ("sm80", 2): (Tile(128, 64, 64, 256, 3), Tile(128, 128, 32, 256, 4, 2)),
    ("sm90", 2): (Tile(128, 64, 64, 256, 3), Tile(128, 256, 64, 256, 4, 2)),
    ("sm100", 2): (Tile(128, 64, 64, 256, 3), Tile(128, 256, 64, 256, 3, 2)),
}
# For an output of at most NARROW columns, and a wider one. In one piece, whose sums exchange least between threads.
STATISTICS_TILES = APPLY_TILES | {
    ("sm80", 2): (Tile(128, 64, 64, 128, 3), Tile(128, 128, 32, 256, 4)),
    ("sm90", 2): (Tile(128, 64, 64, 128, 3), Tile(128, 128, 64, 256, 3)),
    ("sm100", 2): (Tile(128, 64, 64, 128, 3), Tile(128, 128, 64, 256, 3)),
}
MOMENTS_TILES = {
    ("sm80", 2): (Tile(64, 64, 64, 128, 4, resident=3), Tile(128, 128, 32, 256, 4)),
    ("sm90", 2): (Tile(64, 64, 128, 128, 4, resident=3), Tile(128, 128, 64, 256, 4)),
    ("sm100", 2): (Tile(64, 64, 64, 128, 4, resident=3), Tile(128, 128, 64, 256, 3)),
    ("gfx9", 2): (Tile(64, 64, 64, 256, 2, resident=2), Tile(128, 128, 32, 256, 2)),
    ("other", 2): (Tile(64, 64, 32, 128, 3, resident=2),) * 2,
    ("other", 4): (Tile(64, 64, 16, 128, 3, resident=2),) * 2,
    ("sm80", 8): (Tile(64, 64, 32, 256, 3, resident=2),) * 2,
    ("sm90", 8): (Tile(64, 64, 32, 256, 3, resident=2),) * 2,
    ("sm100", 8): (Tile(64, 64, 32, 256, 3, resident=2),) * 2,
    ("gfx9", 8): (Tile(64, 64, 16, 256, 2),) * 2,
    ("other", 8): (Tile(32, 32, 16, 128, 3, resident=2),) * 2,
}
REDUCE_TILES = {
    ("sm80", 2): (Tile(128, 64, 64, 256, 3), Tile(128, 128, 32, 256, 4)),
    ("sm90", 2): (Tile(128, 64, 64, 256, 4), Tile(128, 128, 64, 256, 4)),
    ("sm100", 2): (Tile(128, 64, 64, 256, 4), Tile(128, 128, 64, 256, 3)),
    ("gfx9", 2): (Tile(128, 64, 64, 256, 2), Tile(128, 128, 32, 256, 2)),
    ("other", 2): (Tile(64, 64, 32, 128, 3, resident=2),) * 2,
    ("sm80", 4): (Tile(64, 64, 32, 256, 3),) * 2,
    ("sm90", 4): (Tile(128, 64, 32, 256, 3),) * 2,
    ("sm100", 4): (Tile(128, 64, 32, 256, 3),) * 2,
    ("gfx9", 4): (Tile(128, 64, 32, 256, 2),) * 2,
    ("other", 4): (Tile(64, 64, 16, 128, 3, resident=2),) * 2,
    ("gfx9", 8): (Tile(64, 32, 16, 256, 2),) * 2,
    ("other", 8): (Tile(32, 32, 16, 128, 3, resident=2),) * 2,
}
# With a norm, whose vectors and wide values take registers.
NORM_APPLY_TILES = APPLY_TILES | {
    ("sm80", 2): (Tile(128, 64, 64, 256, 3), Tile(128, 128, 32, 256, 4, 2)),
    ("sm90", 2): (Tile(128, 64, 64, 256, 3), Tile(128, 128, 64, 256, 3, 2)),
    ("sm100", 2): (Tile(128, 64, 64, 256, 3), Tile(128, 128, 64, 256, 3, 2)),
    ("gfx9", 2): (Tile(128, 64, 32, 256, 2), Tile(128, 128, 32, 256, 2, 2)),
}
NORM_BACKWARD_TILES = BACKWARD_TILES | {
    ("sm90", 2): (Tile(128, 64, 64, 256, 3), Tile(128, 256, 64, 256, 4, 4)),
    ("sm100", 2): (Tile(128, 64, 64, 256, 3), Tile(128, 256, 64, 256, 3, 4)),
    ("gfx9", 2): (Tile(128, 64, 32, 256, 2), Tile(128, 128, 32, 256, 2, 2)),
}
NORM_MOMENTS_TILES = MOMENTS_TILES | {
    ("sm80", 2): (Tile(64, 64, 64, 128, 4, resident=2), Tile(128, 128, 32, 256, 4)),
    ("sm90", 2): (Tile(64, 64, 64, 256, 4, resident=2), Tile(128, 128, 32, 256, 6)),
}
BALANCE = 128  # products per element moved, from which arithmetic decides the time of ``_rows_kernel``
NARROW = 64  # columns of y, up to which memory decides that of ``_columns_kernel``; of an output with statistics
FLOAT64_TENSOR_CORES = (
    "80",
    "90",
    "100",
    "gfx90a",
    "gfx940",
    "gfx941",
    "gfx942",
)  # at half the rate of float32 or more
ODD_TILE = Tile(64, 64, 32, 256, 2)
# Of a program that reduces: how much a float32 accumulator gets to add. Statistics are differences of large sums;
# products have large partial results.
MOMENTS_CHUNK_ROWS, REDUCE_CHUNK_ROWS = 4096, 8192
WIDE_ROWS = 2**31  # from which rows are counted in 64 bits
ORIGIN_ROWS = 128
COMBINE_PARTS, COMBINE_ELEMENTS = 32, 2048  # of a block that a program adds
COMBINE_AT_ONCE, COMBINE_GROUP = 256, 64  # sums of tiles: from how many on they are first added in groups
MERGE_PARTS, MERGE_COLUMNS = 64, 16  # of a block of statistics that a program merges
MASK_BLOCK = 2048

Tiles = dict[tuple[str, int], tuple[Tile, Tile]]


def _arch(device: common.Device) -> str:
    if device.arch.startswith("gfx9"):
        return "gfx9"
    return {"80": "sm80", "90": "sm90", "100": "sm100", "103": "sm100"}.get(device.arch, "other")


def _tile(table: Tiles, device: common.Device, itemsize: int, computes: bool, align: int) -> Tile:
    """``align``: elements that loads can take at once; asynchronous ones take at least 4 bytes."""
    if align * itemsize < 4:
        return ODD_TILE
    return (table.get((_arch(device), itemsize)) or table["other", itemsize])[computes]


def _computes(inner: int, cols: int) -> bool:
    return inner * cols >= BALANCE * (inner + cols)


def _lanes(tile: Tile, itemsize: int) -> int:
    """Rows that a program's threads hold at once, so that each thread sums what it holds itself."""
    return max(16, min(tile.inner, tile.threads * (16 // itemsize) // tile.m))


def _align(*widths: int) -> int:
    """The largest power of two, up to 128, that divides all widths."""
    align = 128
    while any(width % align for width in widths):
        align //= 2
    return align


def matrix_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of covariances and products over all pixels of ``dtype``."""
    return torch.float64 if dtype.itemsize > 2 else torch.float32


def _precision(device: common.Device, dtype: torch.dtype) -> str:
    """Of products of float32: three TF32 products on NVIDIA, which are 2^-21 exact; AMD's matrix cores are IEEE."""
    return "tf32x3" if dtype == torch.float32 and not device.arch.startswith("gfx") else "ieee"


class Operand(NamedTuple):
    """Pixels of a channels_last tensor."""

    tensor: Tensor
    stride: int

    @property
    def channels(self) -> int:
        return self.tensor.size(1)

    @property
    def geometry(self) -> tuple[int, int, int]:
        return self.tensor.size(2), self.tensor.size(3), self.stride

    @property
    def out_size(self) -> tuple[int, int, int]:
        n, _, h, w = self.tensor.shape
        return n, -(-h // self.stride), -(-w // self.stride)

    @property
    def rows(self) -> int:
        n, h, w = self.out_size
        return n * h * w


def _geometry(suffix: str, operand: Operand | None) -> dict[str, int]:
    height, width, stride = operand.geometry if operand else (1, 1, 1)
    return {f"height{suffix}": height, f"width{suffix}": width, f"stride{suffix}": stride}


def _strided(*operands: Operand | None) -> bool:
    return any(operand is not None and operand.stride != 1 for operand in operands)


def _empty(like: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    return like.new_empty((n, h, w, c)).permute(0, 3, 1, 2)


def _mask_bytes(elements: int) -> int:
    return 2 * triton.cdiv(elements, 16)


def _check_y(y: Tensor, stride: int, name: str = "y") -> None:
    if y.dim() != 4 or not y.is_contiguous(memory_format=torch.channels_last):
        raise RuntimeError(f"{name} must be 4-D and channels_last")
    if stride < 1:
        raise RuntimeError("stride must be positive")


def _check(y: Tensor, other: Tensor | None, shape: tuple[int, ...], name: str) -> None:
    """Refuse, before anything is launched, what would read or write out of bounds."""
    dense = other is None or (
        other.is_contiguous(memory_format=torch.channels_last) if other.dim() == 4 else other.is_contiguous()
    )
    if other is not None and (tuple(other.shape) != shape or other.device != y.device or not dense):
        raise RuntimeError(f"{name} must have shape {shape}, be dense and on the device of y")


def _check_dtype(dtype: torch.dtype, *others: Tensor | None) -> None:
    if any(other is not None and other.dtype != dtype for other in others):
        raise RuntimeError(f"tensors must be {dtype}")


def _check_pair(y: Operand, y2: Operand | None) -> None:
    _check_y(y.tensor, y.stride)
    if y2 is not None:
        _check_y(y2.tensor, y2.stride)
        _check_dtype(y.tensor.dtype, y2.tensor)
        if y2.out_size != y.out_size or y2.tensor.device != y.tensor.device:
            raise RuntimeError("y and y2 must have the same pixels")


def _check_norm(y: Tensor, norm: Tensor | None, stride: int) -> None:
    _check(y, norm, (3, y.size(1)), "norm")
    _check_dtype(wide_dtype(y), norm)
    if norm is not None and stride != 1:
        raise RuntimeError("norm goes with stride 1")


def _operand(y: Tensor | None, stride: int) -> Operand | None:
    return None if y is None else Operand(y, stride)


def _options(tile: Tile, device: common.Device, dtype: torch.dtype, inner: int) -> dict[str, Any]:
    """``inner``: of the longer of the two reductions, which may need fewer stages than the tile has."""
    return {
        "PRECISION": _precision(device, dtype),
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_I": tile.inner,
        "PIECES": tile.pieces,
        "num_stages": min(tile.stages, 1 + triton.cdiv(inner, tile.inner)),
        **launch_options(tile.threads),
    }


# ---- launchers -------------------------------------------------------------------------------------------------------


def conv1x1_bn_act_apply(
    y: Tensor,
    norm: Tensor | None,
    folded: Tensor,
    shift: Tensor,
    stride: int,
    y2: Tensor | None,
    folded2: Tensor | None,
    stride2: int,
    residual: Tensor | None,
    residual_mask: Tensor | None,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    """``act(Y folded^T [+ Y2 folded2^T] + shift [+ residual])`` and its mask, empty unless asked for.

    With ``norm`` (mean, scale, shift), Y is y normalised, also in the other three. The residual counts where its bit in
    ``residual_mask`` is set.

    Raises:
        RuntimeError: tensors that do not fit together.
    """
    a, a2 = Operand(y, stride), _operand(y2, stride2)
    _check_pair(a, a2)
    _check_norm(y, norm, stride)
    (n, h, w), k = a.out_size, folded.size(0)
    _check(y, folded, (k, a.channels), "folded")
    _check(y, folded2, (k, a2.channels if a2 else 0), "folded2")
    _check(y, shift, (k,), "shift")
    _check(y, residual, (n, k, h, w), "residual")
    _check(y, residual_mask, (_mask_bytes(n * k * h * w),), "residual_mask")
    _check_dtype(y.dtype, folded, folded2, residual)
    _check_dtype(torch.uint8, residual_mask)
    _check_dtype(wide_dtype(y), shift)
    if (y2 is None) != (folded2 is None):
        raise RuntimeError("y2 and folded2 go together")
    if residual is None and residual_mask is not None:
        raise RuntimeError("residual_mask goes with residual")
    out = _empty(y, n, k, h, w)
    mask = y.new_empty(_mask_bytes(out.numel()) if save_mask else 0, dtype=torch.uint8)
    if not out.numel():
        return out, mask
    in_kernel = save_mask and k % 8 == 0
    with torch.cuda.device_of(y):
        device = common.device_of(y)
        inner = a.channels + (a2.channels if a2 else 0)
        align, align2, align_out = _align(a.channels), _align(a2.channels if a2 else 0), _align(k)
        narrowest = min(align, align2, align_out)
        table = APPLY_TILES if norm is None else NORM_APPLY_TILES
        tile = _tile(table, device, y.element_size(), _computes(inner, k), narrowest)
        tiles = triton.cdiv(k, tile.n)
        _rows_kernel[(triton.cdiv(a.rows, tile.m) * tiles,)](
            y,
            norm,
            None,
            folded,
            y2,
            None,
            folded2,
            shift,
            residual,
            residual_mask,
            out,
            mask if in_kernel else None,
            *[None] * 7,
            rows=a.rows,
            units=a.channels // align,
            units2=(a2.channels if a2 else 0) // align2,
            units_out=k // align_out,
            units_other=0,
            tiles=tiles,
            tiles2=0,
            out_height=h,
            out_width=w,
            **_geometry("", a),
            **_geometry("2", a2),
            **_geometry("_other", None),
            RELU=relu,
            TRANSPOSED=True,
            STRIDED=_strided(a),
            STRIDED2=_strided(a2),
            STRIDED_OUT=False,
            WIDE=a.rows + tile.m >= WIDE_ROWS,
            ALIGN=align,
            ALIGN2=align2,
            ALIGN_OUT=align_out,
            EVEN=a.channels % tile.inner == 0,
            EVEN2=a2 is None or a2.channels % tile.inner == 0,
            EVEN_COLS=k % tile.n == 0,
            **_options(tile, device, y.dtype, max(a.channels, a2.channels if a2 else 0)),
        )
        if save_mask and not in_kernel:
            _mask_kernel[(triton.cdiv(out.numel(), MASK_BLOCK),)](
                out, mask, out.numel(), mask.numel(), BLOCK=MASK_BLOCK, **launch_options(128)
            )
    return out, mask


def _merge(parts: Tensor, chunk_rows: int, rows: int) -> Tensor:
    """Mean, M2 and count, (2C + 1,) float64, of the statistics of parts of ``chunk_rows``; in groups as sums."""
    channels = parts.size(2)
    align = _align(channels)
    while True:
        last = parts.size(0) <= COMBINE_AT_ONCE
        group = parts.size(0) if last else COMBINE_GROUP
        groups = triton.cdiv(parts.size(0), group)
        shape = (2 * channels + 1,) if last else (groups, 3, channels)
        merged = parts.new_empty(shape, dtype=torch.float64)
        _merge_tiles_kernel[(groups * triton.cdiv(channels, MERGE_COLUMNS),)](
            parts,
            merged,
            rows=rows,
            chunk_rows=chunk_rows,
            splits=parts.size(0),
            group=group,
            units=channels // align,
            LAST=last,
            ALIGN=align,
            BLOCK_P=min(MERGE_PARTS, triton.next_power_of_2(group)),
            BLOCK_C=MERGE_COLUMNS,
            **launch_options(128),
        )
        if last:
            return merged
        parts, chunk_rows = merged, chunk_rows * group


def conv1x1_statistics(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``X weight^T`` and, of it as it is stored, mean, M2 and count: (2K + 1,) in float64.

    Raises:
        RuntimeError: tensors that do not fit together, or without elements.
    """
    a, k = Operand(x, 1), weight.size(0)
    _check_y(x, 1, "x")
    _check(x, weight, (k, a.channels), "weight")
    _check_dtype(x.dtype, weight)
    if not (x.numel() and k):
        raise RuntimeError("x and weight must have elements")
    n, h, w = a.out_size
    out = _empty(x, n, k, h, w)
    with torch.cuda.device_of(x):
        device = common.device_of(x)
        align, align_out = _align(a.channels), _align(k)
        tile = _tile(STATISTICS_TILES, device, x.element_size(), k > NARROW, min(align, align_out))
        blocks, tiles = triton.cdiv(a.rows, tile.m), triton.cdiv(k, tile.n)
        parts = x.new_empty((blocks, 3, k), dtype=wide_dtype(x))
        _rows_kernel[(blocks * tiles,)](
            x,
            None,
            None,
            weight,
            *[None] * 6,
            out,
            None,
            None,
            parts,
            *[None] * 5,
            rows=a.rows,
            units=a.channels // align,
            units2=0,
            units_out=k // align_out,
            units_other=0,
            tiles=tiles,
            tiles2=0,
            out_height=h,
            out_width=w,
            **_geometry("", a),
            **_geometry("2", None),
            **_geometry("_other", None),
            RELU=False,
            TRANSPOSED=True,
            STRIDED=False,
            STRIDED2=False,
            STRIDED_OUT=False,
            WIDE=a.rows + tile.m >= WIDE_ROWS,
            ALIGN=align,
            ALIGN2=1,
            ALIGN_OUT=align_out,
            EVEN=a.channels % tile.inner == 0,
            EVEN2=True,
            EVEN_COLS=k % tile.n == 0,
            **_options(tile, device, x.dtype, a.channels),
        )
        return out, _merge(parts, tile.m, a.rows)


def conv1x1_bn_act_backward_apply(
    dy: Tensor,
    mask: Tensor | None,
    y: Tensor,
    norm: Tensor | None,
    folded: Tensor,
    mixing: Tensor,
    offset: Tensor,
    stride: int,
    y2: Tensor | None,
    folded2: Tensor | None,
    mixing2: Tensor | None,
    offset2: Tensor | None,
    stride2: int,
    need_dx: bool,
    need_dx2: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``g folded + Y mixing + offset`` at the pixels of the stride, 0 elsewhere; the same of y2. Empty: not asked for.

    With ``norm``, dx is 0 where Y is not positive, and the third result, else empty, has the sums per channel of dx and
    of ``dx * (y - mean)``, (2, C) in float64.

    Raises:
        RuntimeError: tensors that do not fit together.
    """
    first, second = Operand(y, stride), _operand(y2, stride2)
    _check_pair(first, second)
    _check_norm(y, norm, stride)
    (n, h, w), k = first.out_size, folded.size(0)
    _check(y, dy, (n, k, h, w), "dy")
    _check(y, mask, (_mask_bytes(dy.numel()),), "mask")
    _check_dtype(torch.uint8, mask)
    _check_dtype(y.dtype, dy)
    outputs: list[tuple[Operand, Tensor | None, Tensor, Tensor, Tensor, Tensor]] = []
    results = []
    for operand, needed, of_operand, matrices in (
        (first, need_dx, norm, (folded, mixing, offset)),
        (second, need_dx2, None, (folded2, mixing2, offset2)),
    ):
        if operand is None or not needed:
            results.append(y.new_empty(0))
            continue
        if any(matrix is None for matrix in matrices):
            raise RuntimeError("y2, folded2, mixing2 and offset2 go together")
        c = operand.channels
        _check(y, matrices[0], (k, c), "folded")
        _check(y, matrices[1], (c, c), "mixing")
        _check(y, matrices[2], (c,), "offset")
        _check_dtype(y.dtype, *matrices[:2])
        _check_dtype(wide_dtype(y), matrices[2])
        results.append(_empty(y, operand.tensor.size(0), c, *operand.tensor.shape[2:]))
        outputs.append((operand, of_operand, *matrices, results[-1]))
    outputs = [output for output in outputs if output[-1].numel()]
    wants_sums = norm is not None and need_dx
    sums = y.new_empty((2, first.channels) if wants_sums else 0, dtype=torch.float64)
    if not results[0].numel():
        sums.zero_()
    if not outputs:
        return results[0], results[1], sums
    (operand, norm, *matrices, dx), other = outputs[0], outputs[1] if len(outputs) == 2 else None
    operands = [output[0] for output in outputs]
    widths = [o.channels for o in operands]
    with torch.cuda.device_of(y):
        device = common.device_of(y)
        c = min(widths)  # a tile wider than an output is wasted on it
        align, align2 = _align(k), _align(*widths)
        table = BACKWARD_TILES if norm is None else NORM_BACKWARD_TILES
        tile = _tile(table, device, y.element_size(), _computes(k + c, c), min(align, align2))
        tiles = [triton.cdiv(width, tile.n) for width in widths]
        strided = _strided(*operands)
        blocks = triton.cdiv(operand.rows, tile.m)
        of_tiles = None if norm is None else y.new_empty((blocks, 2 * widths[0]), dtype=wide_dtype(y))
        _rows_kernel[(blocks * sum(tiles),)](
            dy,
            None,
            mask,
            matrices[0],
            operand.tensor,
            norm,
            matrices[1],
            matrices[2],
            None,
            None,
            dx,
            None,
            of_tiles,
            None,
            *((other[2], other[0].tensor, *other[3:]) if other else [None] * 5),
            rows=operand.rows,
            units=k // align,
            units2=widths[0] // align2,
            units_out=widths[0] // align2,
            units_other=widths[-1] // align2,
            tiles=tiles[0],
            tiles2=sum(tiles[1:]),
            out_height=h,
            out_width=w,
            **_geometry("", None),
            **_geometry("2", operand),
            **_geometry("_other", other[0] if other else None),
            RELU=False,
            TRANSPOSED=False,
            STRIDED=False,
            STRIDED2=strided,
            STRIDED_OUT=strided,
            WIDE=operand.rows + tile.m >= WIDE_ROWS,
            ALIGN=align,
            ALIGN2=align2,
            ALIGN_OUT=align2,
            EVEN=k % tile.inner == 0,
            EVEN2=all(width % tile.inner == 0 for width in widths),
            EVEN_COLS=all(width % tile.n == 0 for width in widths),
            **_options(tile, device, y.dtype, max(k, *widths)),
        )
        if of_tiles is not None:
            _add_sums(of_tiles, sums)
    return results[0], results[1], sums


@functools.lru_cache(maxsize=4096)
def _chunk_rows(rows: int, tiles: int, tile: Tile, processors: int, most: int) -> int:
    """Rows per program: one wave of programs where no accumulator gets too many."""
    splits = max(1, processors * tile.resident // tiles)
    wanted = min(triton.cdiv(rows, splits), most)
    return triton.cdiv(wanted, tile.inner) * tile.inner


def _combine(
    partial: Tensor | None,
    sums: Tensor,
    origin: Tensor | None,
    vector: Tensor,
    out: Tensor | None,
    out2: Tensor | None,
    rows: int,
    widths: list[int],  # of out and out2; without them, of vector
    symmetric: bool,
    group: int | None = None,
) -> None:
    """Launches ``_combine_kernel``, which fills vector, out and out2."""
    parts, m = sums.shape
    group = group or parts
    align = _align(*widths)
    block_p = min(COMBINE_PARTS, triton.next_power_of_2(group))
    block_n = min(COMBINE_ELEMENTS // block_p, max(16, triton.next_power_of_2(sum(widths))))
    blocks = triton.cdiv(sum(widths), block_n) * (triton.cdiv(parts, group) if partial is None else m)
    _combine_kernel[(blocks,)](
        partial,
        sums,
        origin,
        vector,
        out,
        out2,
        rows=rows,
        splits=parts,
        group=group,
        m=m,
        units=widths[0] // align,
        units2=sum(widths[1:]) // align,
        SYMMETRIC=symmetric,
        ALIGN=align,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        **launch_options(128),
    )


def _add_sums(parts: Tensor, total: Tensor) -> None:
    """Adds the rows of parts, in groups while they are many: one program would wait for one load after the other."""
    m = parts.size(1)
    while parts.size(0) > COMBINE_AT_ONCE:
        groups = parts.new_empty((triton.cdiv(parts.size(0), COMBINE_GROUP), m), dtype=torch.float64)
        _combine(None, parts, None, groups, None, None, 0, [m], False, COMBINE_GROUP)
        parts = groups
    _combine(None, parts, None, total, None, None, 0, [m], False)


def _columns(
    a: Tensor,
    a_width: int,
    mask: Tensor | None,
    b: Operand,
    norm: Tensor | None,
    b2: Operand | None,
    g: Tensor | None,
    vector: Tensor,
    out: Tensor | None,
    out2: Tensor | None,
    symmetric: bool,
) -> None:
    """Launches ``_columns_kernel`` and ``_combine_kernel``, which fill g, vector, out and out2."""
    y = b.tensor
    rows, (_, h, w) = b.rows, b.out_size
    widths = ([b.channels] if out is not None else []) + ([b2.channels] if b2 and out2 is not None else [])
    device = common.device_of(y)
    exact = y.dtype == torch.float64 or (
        symmetric and y.dtype == torch.float32 and device.arch.split(":")[0] in FLOAT64_TENSOR_CORES
    )
    of_moments = MOMENTS_TILES if norm is None else NORM_MOMENTS_TILES
    table = of_moments if symmetric else REDUCE_TILES
    align, align2 = _align(a_width), _align(*widths)
    itemsize = 8 if exact else y.element_size()
    tile = _tile(table, device, itemsize, b.channels > NARROW, min(align, align2))
    across = [triton.cdiv(width, tile.n) for width in widths]
    tiles = across[0] * (across[0] + 1) // 2 if symmetric else max(1, sum(across)) * triton.cdiv(a_width, tile.m)
    most = MOMENTS_CHUNK_ROWS if symmetric else REDUCE_CHUNK_ROWS
    chunk_rows = _chunk_rows(rows, tiles, tile, device.processors, most)
    splits = triton.cdiv(rows, chunk_rows)
    wide = torch.float64 if exact else torch.float32
    partial = y.new_empty((splits, a_width, sum(widths)), dtype=wide) if widths else None
    sums = y.new_empty((splits, a_width), dtype=torch.float64)
    shifted = symmetric and not exact and y.dtype == torch.float32
    origin = y.new_empty(a_width, dtype=torch.float32) if shifted else None
    if origin is not None:
        _origin_kernel[(triton.cdiv(a_width, 32),)](
            y, norm, origin, rows, a_width, *b.geometry, h, w, ROWS=ORIGIN_ROWS, BLOCK_C=32, **launch_options(128)
        )
    second = b2 if len(widths) == 2 else None
    _columns_kernel[(tiles * splits,)](
        a,
        mask,
        y if widths else None,
        norm if widths else None,
        second.tensor if second else None,
        origin,
        g,
        partial,
        sums,
        rows=rows,
        chunk_rows=chunk_rows,
        units=a_width // align,
        units2=(widths[0] if widths else 0) // align2,
        units_other=(widths[1] if second else 0) // align2,
        tiles=tiles if symmetric else max(1, sum(across)),
        tiles2=across[0] if widths else 0,
        out_height=h,
        out_width=w,
        **_geometry("", b),
        **_geometry("2", second),
        SYMMETRIC=symmetric,
        # elsewhere the compiler keeps only one use of a load asynchronous, which is enough with a norm
        SINGLE=symmetric and tiles == 1 and not exact and (norm is not None or _arch(device) in ("sm90", "sm100")),
        STRIDED=_strided(b, second),
        WIDE=rows + chunk_rows >= WIDE_ROWS,
        ALIGN=align,
        ALIGN2=align2,
        EVEN=a_width % tile.m == 0,
        EVEN2=all(width % tile.n == 0 for width in widths),
        ACCUMULATE=tl.float64 if exact else tl.float32,
        PRECISION="ieee" if exact else _precision(device, y.dtype),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        ROWS=tile.inner,
        LANES=_lanes(tile, y.element_size()),
        num_stages=tile.stages,
        **launch_options(tile.threads),
    )
    _combine(partial, sums, origin, vector, out, out2, rows, widths or [a_width], symmetric)


def conv1x1_moments(y: Tensor, norm: Tensor | None, stride: int) -> tuple[Tensor, Tensor]:
    """Mean (C,) and the sum of products of centred channels (C, C), float64, over the pixels of the stride.

    Raises:
        RuntimeError: y is not channels_last, or norm does not fit it.
    """
    _check_y(y, stride)
    _check_norm(y, norm, stride)
    operand = Operand(y, stride)
    c = operand.channels
    mean, cov = y.new_empty(c, dtype=torch.float64), y.new_empty((c, c), dtype=torch.float64)
    if not operand.rows:
        return mean.fill_(float("nan")), cov.zero_()
    if c:
        with torch.cuda.device_of(y):
            _columns(y, c, None, operand, norm, None, None, mean, cov, None, True)
    return mean, cov


def conv1x1_bn_act_backward_reduce(
    dy: Tensor,
    mask: Tensor | None,
    y: Tensor,
    norm: Tensor | None,
    stride: int,
    y2: Tensor | None,
    stride2: int,
    need_g: bool,
    need_products: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g, its column sums in float64, ``g^T Y`` and ``g^T Y2``; what is not asked for is empty.

    The products are summed in float64 too, and float32 where y has 16 bits.

    Raises:
        RuntimeError: tensors that do not fit together.
    """
    operand, second = Operand(y, stride), _operand(y2, stride2)
    _check_pair(operand, second)
    _check_norm(y, norm, stride)
    (n, h, w), k = operand.out_size, dy.size(1)
    _check(y, dy, (n, k, h, w), "dy")
    _check(y, mask, (_mask_bytes(dy.numel()),), "mask")
    _check_dtype(torch.uint8, mask)
    _check_dtype(y.dtype, dy)
    g = torch.empty_like(dy) if need_g else y.new_empty(0)
    sum_g = y.new_empty(k, dtype=torch.float64)
    c, c2 = operand.channels, second.channels if second else 0
    products = y.new_empty((k, c) if need_products else 0, dtype=matrix_dtype(y.dtype))
    products2 = y.new_empty((k, c2) if need_products and second else 0, dtype=matrix_dtype(y.dtype))
    if not dy.numel() or not c:
        return g, sum_g.zero_(), products.zero_(), products2.zero_()
    with torch.cuda.device_of(y):
        _columns(
            dy,
            k,
            mask,
            operand,
            norm,
            second,
            g if need_g else None,
            sum_g,
            products if need_products else None,
            products2 if need_products and second else None,
            False,
        )
    return g, sum_g, products, products2
