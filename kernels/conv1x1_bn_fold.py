"""The small matrices of a 1x1 convolution that is folded into its batch norm, and its running statistics.

Everything is float64 but what the passes over pixels take. K rows of C columns are those of the convolution's weight w.

``_fold_kernel``, one launch. A program has some rows of w: their variance ``w cov w^T``, then ``folded`` and ``shift``.
cov is symmetric, and only its upper blocks are read for it. Further programs write ``cov / count``.

``_slopes_kernel`` and ``_unfold_kernel``, two launches. ``dweight``, the slope and ``folded`` need one row of w, all
else needs all slopes. In the second launch some programs have columns of ``mixing``, with all of their rows, for
``offset`` takes them rounded; the others have tiles of ``dconv_weight``.

``_update_running_kernel``, one program, for the counter is read as well as written.

The floor, with a float32 weight and bfloat16 activations: fold computes K C^2 flops by the symmetry of cov, and none of
them where the variance is known; unfold 4 K C^2. From 512 to 2048 channels that is 0.5 and 2.1 Gflop for 10 and 16 MB,
so the arithmetic decides; from 64 to 256 channels 1 and 4 Mflop for 0.2 and 0.3 MB, so the launches do.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .common import launch_options, round_to, scale_of, shift_of
from .conv1x1_bn_act import _arch, matrix_dtype

# Launch arguments that must not make a new variant of a kernel: what divides a row of w is told by ALIGN.
SCALARS = ["k", "units", "row_blocks", "column_blocks"]

# ---- pieces of kernels -----------------------------------------------------------------------------------------------


@triton.jit
def _dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=tl.float64)


@triton.jit
def _load(ptr, row, col, rows, cols):
    """Rows and columns of a matrix [rows, cols] in float64, 0 outside."""
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    return tl.load(ptr + (row[:, None] * cols + col[None, :]), mask=inside, other=0.0).to(tl.float64)


@triton.jit
def _store(ptr, value, row, col, rows, cols):
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    tl.store(ptr + (row[:, None] * cols + col[None, :]), value, mask=inside)


@triton.jit
def _folded(w, scale, dtype: tl.constexpr):
    """The one expression of fold and unfold, which must have the same bits."""
    return round_to(w * scale[:, None], dtype)


# ---- fold ------------------------------------------------------------------------------------------------------------


@triton.jit
def _quadratic(w_ptr, cov_ptr, row, k, c, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, INNER: tl.constexpr):
    """``w cov w^T`` of some rows of w, from the blocks of cov on its diagonal and above it."""
    blocks = tl.cdiv(c, BLOCK_C)
    i = blocks * 0
    j = blocks * 0
    terms = tl.zeros([BLOCK_K, BLOCK_C], tl.float64)
    product = tl.zeros([BLOCK_K, BLOCK_C], tl.float64)
    for _ in range(blocks * (blocks + 1) // 2 * (BLOCK_C // INNER)):  # one loop, whose loads run ahead all the way
        inner = i + tl.arange(0, INNER)
        col = j + tl.arange(0, BLOCK_C)
        product *= tl.where(i == j, 2.0, 1.0).to(tl.float64)  # what lies above counts twice
        product = _dot(_load(w_ptr, row, inner, k, c), _load(cov_ptr, inner, col, c, c), product)
        i += INNER
        if i == j + BLOCK_C:
            terms += product * _load(w_ptr, row, col, k, c)
            product = tl.zeros([BLOCK_K, BLOCK_C], tl.float64)
            i = i * 0
            j += BLOCK_C
    return tl.sum(terms, 1)


@triton.jit
def _fold_rows(
    w_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    cov_ptr,
    moments_ptr,
    shift0_ptr,
    folded_ptr,
    shift_ptr,
    stats_ptr,
    block,
    k,
    c,
    count,
    eps,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INNER: tl.constexpr,
    COLS: tl.constexpr,
):
    row = block * BLOCK_K + tl.arange(0, BLOCK_K)
    exists = row < k
    if moments_ptr is None:
        var = _quadratic(w_ptr, cov_ptr, row, k, c, BLOCK_K, BLOCK_C, INNER) / count
        var = tl.where(var < 0.0, 0.0, var)  # NaN passes
    else:
        var = tl.load(moments_ptr + k + row, mask=exists, other=0.0)
    rstd = 1.0 / tl.sqrt(var + eps)
    scale = scale_of(weight_ptr, rstd, row, k)
    of_w = tl.zeros([BLOCK_K, COLS], tl.float64)
    of_folded = tl.zeros([BLOCK_K, COLS], tl.float64)
    for done in range(0, c, COLS):
        col = done + tl.arange(0, COLS)
        w = _load(w_ptr, row, col, k, c)
        mean = tl.load(mean_ptr + col, mask=col < c, other=0.0)[None, :]
        folded = _folded(w, scale, folded_ptr.dtype.element_ty)
        _store(folded_ptr, folded, row, col, k, c)
        of_w += w * mean
        of_folded += folded.to(tl.float64) * mean
    own = tl.sum(of_w, 1)
    mu = own
    if moments_ptr is not None:
        mu = tl.load(moments_ptr + row, mask=exists, other=0.0)
    shift = scale * (own - mu) - tl.sum(of_folded, 1)
    shift += shift_of(bias_ptr, rstd, row, k)
    if shift0_ptr is not None:
        shift += tl.load(shift0_ptr + row, mask=exists, other=0.0).to(tl.float64)
    tl.store(shift_ptr + row, shift.to(shift_ptr.dtype.element_ty), mask=exists)
    tl.store(stats_ptr + row, mu, mask=exists)
    tl.store(stats_ptr + k + row, var, mask=exists)
    tl.store(stats_ptr + 2 * k + row, rstd, mask=exists)


@triton.jit(do_not_specialize=SCALARS)
def _fold_kernel(
    w_ptr,  # [K, C]
    weight_ptr,  # [K] or None
    bias_ptr,
    mean_ptr,  # [C]
    cov_ptr,  # [C, C]
    moments_ptr,  # [2, K]: mean and variance, or None
    shift0_ptr,  # [K] or None
    folded_ptr,  # [K, C]
    shift_ptr,  # [K]
    stats_ptr,  # [3, K]: mean, variance, rstd
    covariance_ptr,  # [C, C]
    k,
    units,  # C = units * ALIGN
    row_blocks,
    count: tl.float64,
    eps: tl.float64,
    ALIGN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    INNER: tl.constexpr,
    COLS: tl.constexpr,
    COPY: tl.constexpr,
):
    c = units * ALIGN
    count = tl.full([1], count, tl.float64)
    if tl.program_id(0) < row_blocks:
        _fold_rows(
            w_ptr,
            weight_ptr,
            bias_ptr,
            mean_ptr,
            cov_ptr,
            moments_ptr,
            shift0_ptr,
            folded_ptr,
            shift_ptr,
            stats_ptr,
            tl.program_id(0),
            k,
            c,
            count,
            tl.full([1], eps, tl.float64),
            BLOCK_K,
            BLOCK_C,
            INNER,
            COLS,
        )
    else:
        at = (tl.program_id(0) - row_blocks) * COPY + tl.arange(0, COPY)
        inside = at < c * c
        covariance = tl.load(cov_ptr + at, mask=inside, other=0.0) / count
        tl.store(covariance_ptr + at, covariance.to(covariance_ptr.dtype.element_ty), mask=inside)


# ---- unfold ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SCALARS)
def _slopes_kernel(
    w_ptr,  # [K, C]
    weight_ptr,  # [K] or None
    mean_ptr,  # [C]
    stats_ptr,  # [3, K]
    sum_g_ptr,  # [K]
    products_ptr,  # [K, C]
    dweight_ptr,  # [K]
    slope_ptr,  # [K]
    folded_ptr,  # [K, C], or None: not wanted
    k,
    units,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    c = units * ALIGN
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < k
    rstd = tl.load(stats_ptr + 2 * k + row, mask=exists, other=0.0)
    scale = scale_of(weight_ptr, rstd, row, k)
    sum_g = tl.load(sum_g_ptr + row, mask=exists, other=0.0)
    terms = tl.zeros([ROWS, COLS], tl.float64)
    for done in range(0, c, COLS):
        col = done + tl.arange(0, COLS)
        w = _load(w_ptr, row, col, k, c)
        mean = tl.load(mean_ptr + col, mask=col < c, other=0.0)
        terms += w * (_load(products_ptr, row, col, k, c) - sum_g[:, None] * mean[None, :])
        if folded_ptr is not None:
            _store(folded_ptr, _folded(w, scale, folded_ptr.dtype.element_ty), row, col, k, c)
    dweight = rstd * tl.sum(terms, 1)
    tl.store(dweight_ptr + row, dweight, mask=exists)
    tl.store(slope_ptr + row, -(scale * rstd * dweight), mask=exists)


@triton.jit
def _mix_columns(
    w_ptr,
    weight_ptr,
    mean_ptr,
    stats_ptr,
    sum_g_ptr,
    slope_ptr,
    mixing_ptr,
    offset_ptr,
    block,
    k,
    c,
    count,
    ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    TALL: tl.constexpr,
):
    """Columns of ``w^T diag(slope) w / count``, and of the offset."""
    dtype: tl.constexpr = mixing_ptr.dtype.element_ty
    col = block * BLOCK_J + tl.arange(0, BLOCK_J)
    of_g = tl.zeros([TALL, BLOCK_J], tl.float64)
    for done in range(0, k, TALL):
        row = done + tl.arange(0, TALL)
        rstd = tl.load(stats_ptr + 2 * k + row, mask=row < k, other=0.0)
        sum_g = tl.load(sum_g_ptr + row, mask=row < k, other=0.0)
        folded = _folded(_load(w_ptr, row, col, k, c), scale_of(weight_ptr, rstd, row, k), dtype)
        of_g += folded.to(tl.float64) * sum_g[:, None]
    of_mean = tl.zeros([BLOCK_I, BLOCK_J], tl.float64)
    for first in range(0, c, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        product = tl.zeros([BLOCK_I, BLOCK_J], tl.float64)
        for done in range(0, k, ROWS):
            row = done + tl.arange(0, ROWS)
            slope = tl.load(slope_ptr + row, mask=row < k, other=0.0)
            a = _load(w_ptr, row, i, k, c)
            b = _load(w_ptr, row, col, k, c) * slope[:, None]
            product = _dot(tl.trans(a), b, product)
        mixing = round_to(product / count, dtype)
        _store(mixing_ptr, mixing, i, col, c, c)
        mean = tl.load(mean_ptr + i, mask=i < c, other=0.0)
        of_mean += mixing.to(tl.float64) * mean[:, None]
    offset = -tl.sum(of_g, 0) / count - tl.sum(of_mean, 0)
    tl.store(offset_ptr + col, offset.to(offset_ptr.dtype.element_ty), mask=col < c)


@triton.jit
def _weight_tile(
    w_ptr,
    weight_ptr,
    mean_ptr,
    covariance_ptr,
    stats_ptr,
    sum_g_ptr,
    products_ptr,
    slope_ptr,
    dconv_weight_ptr,
    block,
    k,
    c,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INNER: tl.constexpr,
):
    """``s (products - sum_g mean^T) + diag(slope) w covariance`` of some rows and columns."""
    blocks = tl.cdiv(c, BLOCK_N)
    row = block // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    col = block % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < k
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float64)
    for done in range(0, c, INNER):
        inner = done + tl.arange(0, INNER)
        a = _load(w_ptr, row, inner, k, c)
        b = _load(covariance_ptr, inner, col, c, c)
        product = _dot(a, b, product)
    slope = tl.load(slope_ptr + row, mask=exists, other=0.0)[:, None]
    rstd = tl.load(stats_ptr + 2 * k + row, mask=exists, other=0.0)
    scale = scale_of(weight_ptr, rstd, row, k)[:, None]
    sum_g = tl.load(sum_g_ptr + row, mask=exists, other=0.0)[:, None]
    mean = tl.load(mean_ptr + col, mask=col < c, other=0.0)[None, :]
    d = scale * (_load(products_ptr, row, col, k, c) - sum_g * mean) + slope * product
    _store(dconv_weight_ptr, round_to(d, dconv_weight_ptr.dtype.element_ty), row, col, k, c)


@triton.jit(do_not_specialize=SCALARS)
def _unfold_kernel(
    w_ptr,  # [K, C]
    weight_ptr,  # [K] or None
    mean_ptr,  # [C]
    covariance_ptr,  # [C, C]
    stats_ptr,  # [3, K]
    sum_g_ptr,  # [K]
    products_ptr,  # [K, C]
    slope_ptr,  # [K]
    dconv_weight_ptr,  # [K, C], or None: not wanted
    mixing_ptr,  # [C, C], or None: not wanted
    offset_ptr,  # [C]
    k,
    units,
    column_blocks,  # of mixing
    count: tl.float64,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    TALL: tl.constexpr,
):
    c = units * ALIGN
    program = tl.program_id(0)
    # columns first, which take longest
    if mixing_ptr is not None and program < column_blocks:
        _mix_columns(
            w_ptr,
            weight_ptr,
            mean_ptr,
            stats_ptr,
            sum_g_ptr,
            slope_ptr,
            mixing_ptr,
            offset_ptr,
            program,
            k,
            c,
            tl.full([1], count, tl.float64),
            ROWS,
            BLOCK_I,
            BLOCK_J,
            TALL,
        )
    if dconv_weight_ptr is not None and program >= column_blocks:
        _weight_tile(
            w_ptr,
            weight_ptr,
            mean_ptr,
            covariance_ptr,
            stats_ptr,
            sum_g_ptr,
            products_ptr,
            slope_ptr,
            dconv_weight_ptr,
            program - column_blocks,
            k,
            c,
            BLOCK_M,
            BLOCK_N,
            INNER,
        )


# ---- running statistics ----------------------------------------------------------------------------------------------


@triton.jit
def _move(running_ptr, new, factor, row, k):
    old = tl.load(running_ptr + row, mask=row < k, other=0.0).to(tl.float64)
    moved = old * (1.0 - factor) + new * factor
    tl.store(running_ptr + row, round_to(moved, running_ptr.dtype.element_ty), mask=row < k)


@triton.jit(do_not_specialize=["k"])
def _update_running_kernel(
    running_mean_ptr,  # [K], or None: the counter only
    running_var_ptr,
    counter_ptr,  # one integer, or None
    stats_ptr,  # [3, K]
    momentum: tl.float64,
    unbiased: tl.float64,  # times the variance
    k,
    CUMULATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor = tl.full([1], momentum, tl.float64)
    if counter_ptr is not None:
        batches = tl.load(counter_ptr) + 1
        if CUMULATIVE:
            factor = 1.0 / tl.full([1], batches, tl.float64)
        tl.debug_barrier()  # all threads have read it
        tl.store(counter_ptr, batches)
    if running_mean_ptr is not None:
        for done in range(0, k, BLOCK):
            row = done + tl.arange(0, BLOCK)
            mean = tl.load(stats_ptr + row, mask=row < k, other=0.0)
            var = tl.load(stats_ptr + k + row, mask=row < k, other=0.0)
            _move(running_mean_ptr, mean, factor, row, k)
            _move(running_var_ptr, var * tl.full([1], unbiased, tl.float64), factor, row, k)


# ---- launch plans ----------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Of the kernels that multiply: in what blocks fold takes rows and columns; unfold's tiles of dconv_weight and the
    step of their sum; of its columns of mixing the step over rows of w, and the tile."""

    fold: tuple[int, int, int]
    fold_stages: int
    weight: tuple[int, int, int]
    columns: tuple[int, int, int]
    stages: int


# By architecture: nothing spills, and narrow columns of mixing make more programs.
TILES = {
    "sm80": Tiles((16, 64, 32), 4, (64, 64, 16), (32, 64, 8), 3),
    "sm90": Tiles((16, 64, 32), 4, (64, 64, 16), (32, 64, 8), 3),
    "sm100": Tiles((16, 64, 32), 4, (64, 64, 16), (32, 64, 8), 3),
    "gfx9": Tiles((16, 64, 32), 2, (64, 64, 16), (32, 64, 16), 2),
    "other": Tiles((16, 32, 32), 2, (32, 32, 16), (32, 32, 8), 2),
}
THREADS = 128
FOLD_COLS = 128
COPY = 2048  # elements of ``cov / count`` of a program
SLOPE_ROWS, SLOPE_COLS = 4, 256
TALL = 256  # rows of w whose ``folded`` a program multiplies by sum_g at once
RUNNING = 1024


# ---- launchers -------------------------------------------------------------------------------------------------------


def _tiles(device: common.Device, align: int) -> Tiles:
    """Addresses of elements that are loaded one by one take registers."""
    arch = _arch(device)
    return TILES["other" if align < 4 and arch != "gfx9" else arch]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _matrix(conv_weight: Tensor) -> Tensor:
    """(K, C), dense.

    Raises:
        RuntimeError: it is not the weight of a 1x1 convolution.
    """
    if conv_weight.dim() != 4 or conv_weight.shape[2:] != (1, 1) or not conv_weight.is_floating_point():
        raise RuntimeError("conv_weight must be the (K, C, 1, 1) of a 1x1 convolution")
    if max(conv_weight.numel(), conv_weight.size(1) ** 2) >= 2**31:
        raise RuntimeError("conv_weight must have fewer than 2^31 elements, and so must the square of its columns")
    return conv_weight.flatten(1).contiguous()


def _check(like: Tensor, name: str, other: Tensor | None, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Refuse, before anything is launched, what would read or write out of bounds. Without dtypes, any float."""
    if other is None:
        return
    if tuple(other.shape) != shape or other.device != like.device or not other.is_contiguous():
        raise RuntimeError(f"{name} must have shape {shape}, be dense and on the device of the others")
    if other.dtype not in dtypes if dtypes else not other.is_floating_point():
        raise RuntimeError(f"{name} must be {' or '.join(map(str, dtypes)) or 'of floating point'}")


def _align(c: int) -> int:
    """What a kernel may assume to divide a row: at most 16, for no access is wider."""
    return math.gcd(c, 16)


def conv1x1_bn_fold(
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    cov: Tensor,
    moments: Tensor | None,
    eps: float,
    count: int,
    shift0: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """folded, shift, stats and covariance; arguments and results of ``torch.ops.fusedres.conv1x1_bn_fold``.

    cov is taken to be symmetric.

    Raises:
        RuntimeError: tensors that do not fit together.
    """
    w = _matrix(conv_weight)
    k, c = w.shape
    _check(w, "weight", weight, (k,))
    _check(w, "bias", bias, (k,))
    _check(w, "mean", mean, (c,), torch.float64)
    _check(w, "cov", cov, (c, c), torch.float64)
    _check(w, "moments", moments, (2, k), torch.float64)
    _check(w, "shift0", shift0, (k,))
    folded = mean.new_empty((k, c), dtype=dtype)
    shift = mean.new_empty(k, dtype=_wide(dtype))
    stats = mean.new_empty((3, k))
    covariance = mean.new_empty((c, c), dtype=matrix_dtype(dtype))
    with torch.cuda.device_of(w):
        align = _align(c)
        tiles = _tiles(common.device_of(w), align)
        row_blocks = triton.cdiv(k, tiles.fold[0])
        programs = row_blocks + triton.cdiv(c * c, COPY)
        if programs:
            _fold_kernel[(programs,)](
                w,
                weight,
                bias,
                mean,
                cov,
                moments,
                shift0,
                folded,
                shift,
                stats,
                covariance,
                k=k,
                units=c // align,
                row_blocks=row_blocks,
                count=float(count),
                eps=eps,
                ALIGN=align,
                BLOCK_K=tiles.fold[0],
                BLOCK_C=tiles.fold[1],
                INNER=tiles.fold[2],
                COLS=FOLD_COLS,
                COPY=COPY,
                num_stages=tiles.fold_stages,
                **launch_options(THREADS),
            )
    return folded, shift, stats, covariance


def conv1x1_bn_unfold(
    conv_weight: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    covariance: Tensor,
    stats: Tensor,
    sum_g: Tensor,
    products: Tensor,
    count: int,
    dtype: torch.dtype,
    need_dconv_weight: bool,
    need_dy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dconv_weight, dweight, folded, mixing and offset, as ``torch.ops.fusedres.conv1x1_bn_unfold``.

    What is not asked for is empty.

    Raises:
        RuntimeError: tensors that do not fit together.
    """
    w = _matrix(conv_weight)
    k, c = w.shape
    _check(w, "weight", weight, (k,))
    _check(w, "mean", mean, (c,), torch.float64)
    _check(w, "covariance", covariance, (c, c), torch.float32, torch.float64)
    _check(w, "stats", stats, (3, k), torch.float64)
    _check(w, "sum_g", sum_g, (k,), torch.float64)
    _check(w, "products", products, (k, c), torch.float32, torch.float64)
    dweight, slope = mean.new_empty(k), mean.new_empty(k)
    dconv_weight = torch.empty_like(conv_weight) if need_dconv_weight else conv_weight.new_empty(0)
    # where conv_weight is not dense in its own order, a copy of the result goes into its strides
    d = torch.empty_like(w) if need_dconv_weight and not dconv_weight.is_contiguous() else dconv_weight
    folded = mean.new_empty((k, c) if need_dy else 0, dtype=dtype)
    mixing = mean.new_empty((c, c) if need_dy else 0, dtype=dtype)
    offset = mean.new_empty(c if need_dy else 0, dtype=_wide(dtype))
    with torch.cuda.device_of(w):
        align = _align(c)
        tiles = _tiles(common.device_of(w), align)
        if k:
            _slopes_kernel[(triton.cdiv(k, SLOPE_ROWS),)](
                w,
                weight,
                mean,
                stats,
                sum_g,
                products,
                dweight,
                slope,
                folded if need_dy else None,
                k=k,
                units=c // align,
                ALIGN=align,
                ROWS=SLOPE_ROWS,
                COLS=SLOPE_COLS,
                **launch_options(THREADS),
            )
        (block_m, block_n, inner), (rows, block_i, block_j) = tiles.weight, tiles.columns
        columns = triton.cdiv(c, block_j) if need_dy else 0
        programs = columns + need_dconv_weight * triton.cdiv(k, block_m) * triton.cdiv(c, block_n)
        if programs:
            _unfold_kernel[(programs,)](
                w,
                weight,
                mean,
                covariance,
                stats,
                sum_g,
                products,
                slope,
                d if need_dconv_weight else None,
                mixing if need_dy else None,
                offset,
                k=k,
                units=c // align,
                column_blocks=columns,
                count=float(count),
                ALIGN=align,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                INNER=inner,
                ROWS=rows,
                BLOCK_I=block_i,
                BLOCK_J=block_j,
                TALL=TALL,
                num_stages=tiles.stages,
                **launch_options(THREADS),
            )
        if d is not dconv_weight:
            dconv_weight.copy_(d.view(conv_weight.shape))
    return dconv_weight, dweight, folded, mixing, offset


def conv1x1_bn_update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    stats: Tensor,
    count: int,
) -> None:
    """Moves the running statistics in place, as ``torch.ops.fusedres.conv1x1_bn_update_running``.

    Raises:
        RuntimeError: tensors that do not fit together, or no momentum and no counter; nothing is written then.
    """
    if running_mean is None or running_var is None:
        running_mean = running_var = None
    k = stats.size(-1)
    _check(stats, "stats", stats, (3, k), torch.float64)
    _check(stats, "running_mean", running_mean, (k,))
    _check(stats, "running_var", running_var, (k,))
    counter = None if num_batches_tracked is None else num_batches_tracked.view(-1)
    _check(stats, "num_batches_tracked", counter, (1,), torch.int64)
    if running_mean is not None and momentum is None and counter is None:
        raise RuntimeError("momentum=None needs num_batches_tracked")
    if running_mean is None and counter is None:
        return
    unbiased = 1.0 if running_mean is None else count / (count - 1)
    with torch.cuda.device_of(stats):
        _update_running_kernel[(1,)](
            running_mean,
            running_var,
            counter,
            stats,
            0.0 if momentum is None else momentum,
            unbiased,
            k=k,
            CUMULATIVE=momentum is None,
            BLOCK=RUNNING,
            **launch_options(THREADS),
        )
