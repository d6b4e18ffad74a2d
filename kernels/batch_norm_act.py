"""``act(bn(x) + residual)`` and ``act(bn(x) + bn2(x2))``, forward and backward.

Training: a pass that leaves partial statistics (or sums) per chunk of rows, a small launch that merges them in float64
in a fixed order and does all that is per channel, and a pass that applies the result. Where a slab of channels is small
one launch does all three. Evaluation applies at once. The bits of the results depend on shapes and on the device's
number of processors, not on the run.

Statistics of channels that hold an infinity are NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    SCALARS,
    Plan,
    apply_plan,
    channel_of,
    check,
    chunk_of,
    clear_padding,
    geometry,
    in_reverse,
    kept,
    laid_out_like,
    launch_options,
    layout_of,
    locate,
    mask_width,
    normalised,
    one_pass_plan,
    pack,
    reduce_plan,
    round_to,
    running_statistics,
    save_statistics,
    saved_statistics,
    scale_of,
    shift_of,
    split_program,
    statistics_of_rows,
    total,
    unpack,
    wide_dtype,
)

# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _store_partial(
    partial_ptr, shift, average, m2, slab, col_tile, chunk, channels, col_tiles, parts, LAYOUT, COLS: tl.constexpr
):
    channel = channel_of(slab, 0, channels, LAYOUT, COLS, False)
    to = partial_ptr + (chunk * col_tiles + col_tile).to(tl.int64) * channels + channel
    stride = parts.to(tl.int64) * channels
    tl.store(to, shift, mask=channel < channels)
    tl.store(to + stride, average.to(shift.dtype), mask=channel < channels)
    tl.store(to + 2 * stride, m2.to(shift.dtype), mask=channel < channels)


@triton.jit(do_not_specialize=SCALARS)
def _statistics_kernel(
    x_ptr,
    partial_ptr,  # [3, parts, C]: shift, mean - shift, M2
    counter_ptr,  # one int64, or None
    x2_ptr,  # None: one norm
    partial2_ptr,
    counter2_ptr,
    channels,
    rows,
    units,
    slabs,
    col_tiles,
    chunk_rows,
    reverse,
    parts,
    LAYOUT: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    slab, col_tile, chunk = split_program(tl.program_id(0), slabs, col_tiles)
    width = units * VEC
    row, count = chunk_of(chunk, chunk_rows, rows)
    shift, average, m2, _ = statistics_of_rows(
        x_ptr, slab, col_tile, row, count, channels, width, LAYOUT, ROWS, COLS, WIDE
    )
    _store_partial(partial_ptr, shift, average, m2, slab, col_tile, chunk, channels, col_tiles, parts, LAYOUT, COLS)
    if counter_ptr is not None and tl.program_id(0) == 0:
        tl.store(counter_ptr, tl.load(counter_ptr) + 1)
    if x2_ptr is not None:
        shift, average, m2, _ = statistics_of_rows(
            x2_ptr, slab, col_tile, row, count, channels, width, LAYOUT, ROWS, COLS, WIDE
        )
        _store_partial(
            partial2_ptr, shift, average, m2, slab, col_tile, chunk, channels, col_tiles, parts, LAYOUT, COLS
        )
        if counter2_ptr is not None and tl.program_id(0) == 0:
            tl.store(counter2_ptr, tl.load(counter2_ptr) + 1)


@triton.jit
def _values_of_parts(part, parts, rows, width, col_tiles, chunk_rows, LAYOUT: tl.constexpr, COLS: tl.constexpr):
    """Number of values that each partial result stands for, float64; zero past the last."""
    chunk = (part // col_tiles).to(tl.int64)
    n = tl.minimum(rows - chunk * chunk_rows, chunk_rows)
    if LAYOUT == "contiguous":
        n *= tl.minimum(width - (part % col_tiles) * COLS, COLS)
    return tl.where(part < parts, n, 0).to(tl.float64)


@triton.jit
def merged(
    partial_ptr,
    channel,
    channels,
    rows,
    width,
    col_tiles,
    chunk_rows,
    parts,
    LAYOUT: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(mean, M2, number of values) in float64, from the partial results in order, relative to the first's mean."""
    stride = parts.to(tl.int64) * channels
    exists = channel < channels
    origin = tl.load(partial_ptr + channel, mask=exists, other=0.0).to(tl.float64)
    origin += tl.load(partial_ptr + stride + channel, mask=exists, other=0.0).to(tl.float64)
    s1 = tl.zeros([1, BLOCK_C], tl.float64)
    s2 = tl.zeros([1, BLOCK_C], tl.float64)
    for p in range(0, parts, BLOCK_P):
        part = p + tl.arange(0, BLOCK_P)[:, None]
        n = _values_of_parts(part, parts, rows, width, col_tiles, chunk_rows, LAYOUT, COLS)
        at = partial_ptr + part.to(tl.int64) * channels + channel
        inside = (part < parts) & exists
        shift = tl.load(at, mask=inside, other=0.0).to(tl.float64)
        average = tl.load(at + stride, mask=inside, other=0.0).to(tl.float64)
        m2 = tl.load(at + 2 * stride, mask=inside, other=0.0).to(tl.float64)
        away = (shift - origin) + average
        s1 += tl.sum(n * away, 0, keep_dims=True)
        s2 += tl.sum(m2 + n * away * away, 0, keep_dims=True)
    count = rows.to(tl.float64)
    if LAYOUT == "contiguous":
        count *= width.to(tl.float64)
    away = s1 / count
    return origin + away, s2 - s1 * away, count


@triton.jit(do_not_specialize=SCALARS)
def _finalise_kernel(
    partial_ptr,  # [3, parts, C]
    stats_ptr,  # [3, C]
    running_mean_ptr,  # [C] or None
    running_var_ptr,
    counter_ptr,  # read for the cumulative average only
    momentum: tl.float64,
    eps: tl.float64,
    partial2_ptr,  # None: one norm
    stats2_ptr,
    running_mean2_ptr,
    running_var2_ptr,
    counter2_ptr,
    momentum2: tl.float64,
    eps2: tl.float64,
    channels,
    rows,
    units,
    col_tiles,
    chunk_rows,
    parts,
    CUMULATIVE: tl.constexpr,
    CUMULATIVE2: tl.constexpr,
    LAYOUT: tl.constexpr,
    VEC: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    width = units * VEC
    mean, m2, count = merged(
        partial_ptr, channel, channels, rows, width, col_tiles, chunk_rows, parts, LAYOUT, COLS, BLOCK_P, BLOCK_C
    )
    save_statistics(
        stats_ptr,
        running_mean_ptr,
        running_var_ptr,
        counter_ptr,
        mean,
        m2,
        count,
        momentum,
        eps,
        channel,
        channels,
        CUMULATIVE,
    )
    if partial2_ptr is not None:
        mean, m2, count = merged(
            partial2_ptr, channel, channels, rows, width, col_tiles, chunk_rows, parts, LAYOUT, COLS, BLOCK_P, BLOCK_C
        )
        save_statistics(
            stats2_ptr,
            running_mean2_ptr,
            running_var2_ptr,
            counter2_ptr,
            mean,
            m2,
            count,
            momentum2,
            eps2,
            channel,
            channels,
            CUMULATIVE2,
        )


@triton.jit
def _apply_rows(
    x_ptr,
    x2_ptr,
    out_ptr,
    mask_ptr,
    mean,
    low,
    scale,
    shift,
    mean2,
    low2,
    scale2,
    shift2,
    slab,
    col_tile,
    row,
    count,
    reverse,
    channels,
    width,
    SECOND: tl.constexpr,
    RELU: tl.constexpr,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Normalises, adds, cuts and stores the rows of a chunk; vectors per channel are [1, COLS] or [1, 1]."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    compute: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    first, stride, offset, exists = locate(slab, col_tile, row, channels, width, LAYOUT, ROWS, COLS, WIDE)
    if mask_ptr is not None:
        byte_width = mask_width(width, LAYOUT)
        first_byte, byte_stride, byte_offset, byte_exists = locate(
            slab, col_tile, row, channels, byte_width, LAYOUT, ROWS, COLS // 8, WIDE
        )
    tiles = tl.cdiv(count, ROWS)
    r = tl.arange(0, ROWS)[:, None]
    for i in range(tiles):
        t = i + reverse * (tiles - 1 - 2 * i)
        row_exists = t * ROWS + r < count
        inside = row_exists & exists
        at = first + t * ROWS * stride
        x = tl.load(x_ptr + at + offset, mask=inside, other=0.0).to(compute)
        _, y = normalised(x, mean, low, scale, shift)
        if SECOND != "none":
            x2 = tl.load(x2_ptr + at + offset, mask=inside, other=0.0).to(compute)
            if SECOND == "norm":
                _, x2 = normalised(x2, mean2, low2, scale2, shift2)
            y += x2
        if RELU:
            y = tl.where(y <= 0.0, 0.0, y)  # NaN passes
        tl.store(out_ptr + at + offset, round_to(y, dtype), mask=inside)
        if mask_ptr is not None:
            bytes = pack(inside & kept(y, dtype), ROWS, COLS)
            byte_at = first_byte + t * ROWS * byte_stride
            tl.store(mask_ptr + byte_at + byte_offset, bytes, mask=row_exists & byte_exists)


@triton.jit(do_not_specialize=SCALARS)
def _apply_kernel(
    x_ptr,
    weight_ptr,  # [C] or None
    bias_ptr,
    stats_ptr,  # [3, C]: read in training, written in evaluation
    running_mean_ptr,
    running_var_ptr,
    eps: tl.float64,
    x2_ptr,  # of the second norm, or the residual, or None
    weight2_ptr,
    bias2_ptr,
    stats2_ptr,
    running_mean2_ptr,
    running_var2_ptr,
    eps2: tl.float64,
    out_ptr,
    mask_ptr,  # None: not wanted
    channels,
    rows,
    units,
    slabs,
    col_tiles,
    chunk_rows,
    reverse,
    TRAINING: tl.constexpr,
    TRAINING2: tl.constexpr,
    SECOND: tl.constexpr,  # "none", "residual" or "norm"
    RELU: tl.constexpr,
    LAYOUT: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = tl.program_id(0)
    if mask_ptr is not None and LAYOUT == "channels_last" and program == 0:
        clear_padding(mask_ptr, rows, units * VEC)
    program = program + reverse * (tl.num_programs(0) - 1 - 2 * program)
    slab, col_tile, chunk = split_program(program, slabs, col_tiles)
    row, count = chunk_of(chunk, chunk_rows, rows)
    channel = channel_of(slab, col_tile, channels, LAYOUT, COLS, WIDE)
    # who writes the statistics of evaluation
    writes = (channel < channels) & (tl.zeros_like(channel) + (chunk + col_tile) == 0)
    if LAYOUT == "flat":
        writes = col_tile * COLS + tl.arange(0, COLS)[None, :] < channels
    if TRAINING:
        mean, rstd, low = saved_statistics(stats_ptr, channel, channels)
    else:
        mean, rstd, low = running_statistics(
            stats_ptr, running_mean_ptr, running_var_ptr, eps, channel, channels, writes
        )
    scale = scale_of(weight_ptr, rstd, channel, channels)
    shift = shift_of(bias_ptr, rstd, channel, channels)
    mean2, low2, scale2, shift2 = mean, low, scale, shift
    if SECOND == "norm":
        if TRAINING2:
            mean2, rstd2, low2 = saved_statistics(stats2_ptr, channel, channels)
        else:
            mean2, rstd2, low2 = running_statistics(
                stats2_ptr, running_mean2_ptr, running_var2_ptr, eps2, channel, channels, writes
            )
        scale2 = scale_of(weight2_ptr, rstd2, channel, channels)
        shift2 = shift_of(bias2_ptr, rstd2, channel, channels)
    _apply_rows(
        x_ptr,
        x2_ptr,
        out_ptr,
        mask_ptr,
        mean,
        low,
        scale,
        shift,
        mean2,
        low2,
        scale2,
        shift2,
        slab,
        col_tile,
        row,
        count,
        reverse,
        channels,
        units * VEC,
        SECOND,
        RELU,
        LAYOUT,
        ROWS,
        COLS,
        WIDE,
    )


@triton.jit
def _statistics_of_slab(
    x_ptr,
    slab,
    count,
    channels,
    width,
    col_tiles,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(mean, M2, number of values) in float64 of a whole slab; its tiles across are merged in order."""
    row = tl.zeros([], tl.int64)
    shift, average, m2, values = statistics_of_rows(
        x_ptr, slab, 0, row, count, channels, width, LAYOUT, ROWS, COLS, WIDE
    )
    mean = shift.to(tl.float64) + average
    if LAYOUT == "contiguous":
        for col_tile in range(1, col_tiles):
            shift, average, more_m2, more = statistics_of_rows(
                x_ptr, slab, col_tile, row, count, channels, width, LAYOUT, ROWS, COLS, WIDE
            )
            away = (shift.to(tl.float64) - mean) + average
            sum = values + more
            mean += away * (more / sum)
            m2 += more_m2 + away * away * (values * more / sum)
            values = sum
    return mean, m2, values


@triton.jit(do_not_specialize=SCALARS)
def _one_pass_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,
    running_mean_ptr,
    running_var_ptr,
    counter_ptr,
    momentum: tl.float64,
    eps: tl.float64,
    x2_ptr,
    weight2_ptr,
    bias2_ptr,
    stats2_ptr,
    running_mean2_ptr,
    running_var2_ptr,
    counter2_ptr,
    momentum2: tl.float64,
    eps2: tl.float64,
    out_ptr,
    mask_ptr,
    channels,
    rows,
    units,
    slabs,
    col_tiles,
    chunk_rows,
    reverse,
    SECOND: tl.constexpr,
    RELU: tl.constexpr,
    LAYOUT: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A slab per program: statistics, then again from the cache to apply them. All norms are in training."""
    slab = tl.program_id(0)
    width = units * VEC
    count = rows.to(tl.int32)
    channel = channel_of(slab, 0, channels, LAYOUT, COLS, WIDE)
    mean64, m2, values = _statistics_of_slab(x_ptr, slab, count, channels, width, col_tiles, LAYOUT, ROWS, COLS, WIDE)
    mean, rstd, low = save_statistics(
        stats_ptr,
        running_mean_ptr,
        running_var_ptr,
        None,
        mean64,
        m2,
        values,
        momentum,
        eps,
        channel,
        channels,
        False,
    )
    scale = scale_of(weight_ptr, rstd, channel, channels)
    shift = shift_of(bias_ptr, rstd, channel, channels)
    mean2, low2, scale2, shift2 = mean, low, scale, shift
    if SECOND == "norm":
        mean64, m2, values = _statistics_of_slab(
            x2_ptr, slab, count, channels, width, col_tiles, LAYOUT, ROWS, COLS, WIDE
        )
        mean2, rstd2, low2 = save_statistics(
            stats2_ptr,
            running_mean2_ptr,
            running_var2_ptr,
            None,
            mean64,
            m2,
            values,
            momentum2,
            eps2,
            channel,
            channels,
            False,
        )
        scale2 = scale_of(weight2_ptr, rstd2, channel, channels)
        shift2 = shift_of(bias2_ptr, rstd2, channel, channels)
    if slab == 0:
        if counter_ptr is not None:
            tl.store(counter_ptr, tl.load(counter_ptr) + 1)
        if counter2_ptr is not None:
            tl.store(counter2_ptr, tl.load(counter2_ptr) + 1)
        if mask_ptr is not None and LAYOUT == "channels_last":
            clear_padding(mask_ptr, rows, width)
    for i in range(col_tiles):
        col_tile = i + reverse * (col_tiles - 1 - 2 * i)
        _apply_rows(
            x_ptr,
            x2_ptr,
            out_ptr,
            mask_ptr,
            mean,
            low,
            scale,
            shift,
            mean2,
            low2,
            scale2,
            shift2,
            slab,
            col_tile,
            tl.zeros([], tl.int64),
            count,
            reverse,
            channels,
            width,
            SECOND,
            RELU,
            LAYOUT,
            ROWS // 2,
            COLS,
            WIDE,
        )


class Norm:
    """The arguments of one batch norm, and what its forward writes besides the output."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        counter: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
    ) -> None:
        self.x, self.weight, self.bias, self.training, self.eps = x, weight, bias, training, eps
        self.stats = x.new_empty((3, x.size(1)), dtype=wide_dtype(x))
        if training and (running_mean is None or running_var is None):
            running_mean = running_var = None
        self.running = (running_mean, running_var)
        self.counter = counter if training else None
        self.cumulative = training and momentum is None and running_mean is not None
        self.momentum = 0.0 if momentum is None else momentum
        self.vectors = (weight, bias, running_mean, running_var)

    @property
    def coefficients(self) -> tuple[Tensor | float | None, ...]:
        return (self.weight, self.bias, self.stats, *self.running)


_NO_NORM = (None,) * 5


def block_of_parts(parts: int) -> int:
    return 32 if parts <= 32 else 256


BLOCK_C = 8  # channels of a program that merges partial results: one sector of float32


def launch_partial_statistics(xs: list[Tensor], counters: list[Tensor | None], plan: Plan) -> list[Tensor]:
    """Partial statistics of one or two tensors, [3, parts, C] each; moves the counters."""
    x = xs[0]
    partials = [x.new_empty((3, plan.parts, x.size(1)), dtype=wide_dtype(x)) for _ in xs]
    arguments = [a for of_one in zip(xs, partials, counters, strict=True) for a in of_one]
    arguments += [None] * (6 - len(arguments))
    _statistics_kernel[plan.grid](*arguments, parts=plan.parts, **geometry(x, plan))
    return partials


def merging(plan: Plan, channels: int) -> dict[str, Any]:
    """The launch arguments of a kernel that merges what :func:`launch_partial_statistics` left."""
    return {
        "channels": channels,
        "rows": plan.rows,
        "units": plan.width // plan.vec,
        "col_tiles": plan.col_tiles,
        "chunk_rows": plan.chunk_rows,
        "parts": plan.parts,
        "LAYOUT": plan.layout,
        "VEC": plan.vec,
        "COLS": plan.tile_cols,
        "BLOCK_P": block_of_parts(plan.parts),
        "BLOCK_C": BLOCK_C,
        **launch_options(128),
    }


def launch_statistics(norms: list[Norm]) -> None:
    """Two launches: partial statistics of all ``norms``, and what becomes of them."""
    plan = reduce_plan(norms[0].x)
    channels = norms[0].x.size(1)
    partials = launch_partial_statistics([norm.x for norm in norms], [norm.counter for norm in norms], plan)
    merges = []
    for norm, partial in zip(norms, partials, strict=True):
        merges += [
            *(partial, norm.stats, *norm.running),
            *(norm.counter if norm.cumulative else None, norm.momentum, norm.eps),
        ]
    if len(norms) == 1:
        merges += [None] * 5 + [0.0, 0.0]
    _finalise_kernel[(triton.cdiv(channels, BLOCK_C),)](
        *merges,
        CUMULATIVE=norms[0].cumulative,
        CUMULATIVE2=norms[-1].cumulative,
        **merging(plan, channels),
    )


def mask_bytes(x: Tensor) -> int:
    n, c, h, w = x.shape
    if layout_of(x) == "channels_last":
        return 2 * triton.cdiv(x.numel(), 16)
    return 2 * n * c * triton.cdiv(h * w, 16)


def check_saved(x: Tensor, stats: Tensor, mask: Tensor | None) -> None:
    if stats.shape != (3, x.size(1)) or stats.dtype != wide_dtype(x) or not stats.is_contiguous():
        raise RuntimeError("stats must be what the forward returned")
    if mask is not None and (mask.numel() != mask_bytes(x) or mask.dtype != torch.uint8 or not mask.is_contiguous()):
        raise RuntimeError("mask must be what the forward returned")


def has_byte_tiles(x: Tensor) -> bool:
    """Whether the bytes of a mask lie in one tile: of a channels_last tensor they may lie across rows and slabs."""
    return layout_of(x) == "contiguous" or x.size(1) % 8 == 0


def launch_apply(
    norms: list[Norm], residual: Tensor | None, out: Tensor, mask: Tensor | None, relu: bool, reverse: bool
) -> None:
    """The pass that writes ``out`` and, if wanted, its mask; ``residual`` is laid out like x."""
    x = norms[0].x
    second = norms[1] if len(norms) == 2 else None
    plan = apply_plan(x, None if mask is None or has_byte_tiles(x) else "flat")
    _apply_kernel[plan.grid](
        x,
        *norms[0].coefficients,
        norms[0].eps,
        second.x if second else residual,
        *(second.coefficients if second else _NO_NORM),
        second.eps if second else 0.0,
        out,
        mask,
        TRAINING=norms[0].training,
        TRAINING2=second.training if second else False,
        SECOND=_second(norms, residual),
        RELU=relu,
        **geometry(x, plan, reverse),
    )


def _second(norms: list[Norm], residual: Tensor | None) -> str:
    return "norm" if len(norms) == 2 else "none" if residual is None else "residual"


def _forward(norms: list[Norm], residual: Tensor | None, relu: bool, save_mask: bool) -> tuple[Tensor, Tensor]:
    """out and mask; ``norms`` are one or two."""
    x = norms[0].x
    out = torch.empty_like(x)
    mask = x.new_empty(mask_bytes(x) if save_mask else 0, dtype=torch.uint8)
    if residual is not None:
        residual = laid_out_like(residual, x)
    to_mask = mask if save_mask else None
    in_training = [norm for norm in norms if norm.training]
    fits = not save_mask or has_byte_tiles(x)
    with torch.cuda.device_of(x):
        if len(in_training) == len(norms) and fits and not any(norm.cumulative for norm in norms):
            plan = one_pass_plan(x)
            if plan is not None:
                arguments = []
                for norm in norms:
                    arguments += [norm.x, *norm.coefficients, norm.counter, norm.momentum, norm.eps]
                if len(norms) == 1:
                    arguments += [residual, *_NO_NORM, None, 0.0, 0.0]
                _one_pass_kernel[(plan.slabs,)](
                    *arguments, out, to_mask, SECOND=_second(norms, residual), RELU=relu, **geometry(x, plan, True)
                )
                return out, mask
        if in_training:
            launch_statistics(in_training)
        launch_apply(norms, residual, out, to_mask, relu, bool(in_training) and in_reverse(x, len(in_training)))
    return out, mask


def batch_norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, stats (3, C) and, if asked, the mask; arguments and results of ``torch.ops.fusedres.batch_norm_act``.

    x is (N, C, H, W), contiguous or channels_last, of any of four float dtypes; vectors are (C,).

    Raises:
        RuntimeError: tensors that do not fit together; nothing is written then.
    """
    norm = Norm(x, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps)
    check(x, (residual,), norm.vectors)
    out, mask = _forward([norm], residual, relu, save_mask)
    return out, norm.stats, mask


def batch_norm_add_batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    x2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    running_mean2: Tensor | None,
    running_var2: Tensor | None,
    num_batches_tracked2: Tensor | None,
    training2: bool,
    momentum2: float | None,
    eps2: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, stats and stats2 (3, C); arguments and results of ``torch.ops.fusedres.batch_norm_add_batch_norm_act``.

    Raises:
        RuntimeError: tensors that do not fit together; nothing is written then.
    """
    check(x, (x2,), ())
    norms = [
        Norm(x, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps),
        Norm(
            laid_out_like(x2, x),
            *(weight2, bias2, running_mean2, running_var2, num_batches_tracked2, training2, momentum2, eps2),
        ),
    ]
    check(x, (), norms[0].vectors + norms[1].vectors)
    out, _ = _forward(norms, None, relu, False)
    return out, norms[0].stats, norms[1].stats


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _load_tile(
    dy_ptr,
    x_ptr,
    x2_ptr,
    mask_ptr,
    t,
    count,
    slab,
    col_tile,
    row,
    channels,
    width,
    READ_X: tl.constexpr,
    BYTE_TILES: tl.constexpr,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(inside, dy, x, x2, bytes of mask) of the t-th tile of a chunk; dy in the place of what is not read."""
    first, stride, offset, exists = locate(slab, col_tile, row, channels, width, LAYOUT, ROWS, COLS, WIDE)
    row_exists = t * ROWS + tl.arange(0, ROWS)[:, None] < count
    inside = row_exists & exists
    at = first + t * ROWS * stride
    dy = tl.load(dy_ptr + at + offset, mask=inside, other=0.0)
    x = dy
    x2 = dy
    bytes = dy
    if READ_X:
        x = tl.load(x_ptr + at + offset, mask=inside, other=0.0)
        if x2_ptr is not None:
            x2 = tl.load(x2_ptr + at + offset, mask=inside, other=0.0)
    if mask_ptr is not None:
        if BYTE_TILES:
            byte_width = mask_width(width, LAYOUT)
            first_byte, byte_stride, byte_offset, byte_exists = locate(
                slab, col_tile, row, channels, byte_width, LAYOUT, ROWS, COLS // 8, WIDE
            )
            byte_at = first_byte + t * ROWS * byte_stride
            bytes = tl.load(mask_ptr + byte_at + byte_offset, mask=row_exists & byte_exists, other=0)
        else:
            bit = (at & 7).to(tl.int32) + offset
            bytes = tl.load(mask_ptr + (at >> 3) + (bit >> 3), mask=inside, other=0).to(tl.int32)
            bytes = bytes >> (bit & 7).to(tl.int32)
    return inside, dy, x, x2, bytes


@triton.jit
def _gradient(
    inside,
    dy,
    x,
    x2,
    bytes,
    mean,
    low,
    scale,
    shift,
    mean2,
    low2,
    scale2,
    shift2,
    READ_X: tl.constexpr,
    PAIR: tl.constexpr,
    RELU: tl.constexpr,
    MASK: tl.constexpr,
    BYTE_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """(dy where the activation passed, centred x, centred x2) of what :func:`_load_tile` returned."""
    compute: tl.constexpr = mean.dtype
    g = dy.to(compute)
    centred = g
    centred2 = g
    y = g
    if READ_X:
        centred, y = normalised(x.to(compute), mean, low, scale, shift)
        if PAIR:
            centred2, y2 = normalised(x2.to(compute), mean2, low2, scale2, shift2)
            y += y2
            centred2 = tl.where(inside, centred2, 0.0)
        keep = kept(y, x.dtype)
        centred = tl.where(inside, centred, 0.0)
    if MASK:
        g = tl.where(unpack(bytes, ROWS, COLS) if BYTE_TILES else (bytes & 1) != 0, g, 0.0)
    elif RELU:
        g = tl.where(keep, g, 0.0)
    return g, centred, centred2


@triton.jit
def _store_tile(
    to_ptr,
    value,
    t,
    count,
    slab,
    col_tile,
    row,
    channels,
    width,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    first, stride, offset, exists = locate(slab, col_tile, row, channels, width, LAYOUT, ROWS, COLS, WIDE)
    inside = (t * ROWS + tl.arange(0, ROWS)[:, None] < count) & exists
    at = first + t * ROWS * stride
    tl.store(to_ptr + at + offset, round_to(value, to_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _accumulate(
    s,
    s1,
    s2,
    inside,
    dy,
    x,
    x2,
    bytes,
    dx_ptr,
    dx2_ptr,
    dresidual_ptr,
    t,
    mean,
    low,
    scale,
    shift,
    mean2,
    low2,
    scale2,
    shift2,
    slab,
    col_tile,
    row,
    count,
    channels,
    width,
    RELU: tl.constexpr,
    READ_X: tl.constexpr,
    PAIR: tl.constexpr,
    MASK: tl.constexpr,
    BYTE_TILES: tl.constexpr,
    SUMS: tl.constexpr,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The sums with one tile more; stores the gradients of it that need no sums."""
    g, centred, centred2 = _gradient(
        inside,
        dy,
        x,
        x2,
        bytes,
        mean,
        low,
        scale,
        shift,
        mean2,
        low2,
        scale2,
        shift2,
        READ_X,
        PAIR,
        RELU,
        MASK,
        BYTE_TILES,
        ROWS,
        COLS,
    )
    if SUMS:
        s += g
        s1 = tl.fma(g, centred, s1)
        if PAIR:
            s2 = tl.fma(g, centred2, s2)
    if dx_ptr is not None:
        _store_tile(dx_ptr, scale * g, t, count, slab, col_tile, row, channels, width, LAYOUT, ROWS, COLS, WIDE)
    if dx2_ptr is not None:
        _store_tile(dx2_ptr, scale2 * g, t, count, slab, col_tile, row, channels, width, LAYOUT, ROWS, COLS, WIDE)
    if dresidual_ptr is not None:
        _store_tile(dresidual_ptr, g, t, count, slab, col_tile, row, channels, width, LAYOUT, ROWS, COLS, WIDE)
    return s, s1, s2


@triton.jit
def _reduce_rows(
    dy_ptr,
    x_ptr,
    x2_ptr,
    mask_ptr,
    dx_ptr,
    dx2_ptr,
    dresidual_ptr,
    mean,
    low,
    scale,
    shift,
    mean2,
    low2,
    scale2,
    shift2,
    slab,
    col_tile,
    row,
    count,
    channels,
    width,
    RELU: tl.constexpr,
    READ_X: tl.constexpr,
    BYTE_TILES: tl.constexpr,
    SUMS: tl.constexpr,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sums over a chunk of g, g * centred x, g * centred x2, in float64; gradients that need no sums are stored."""
    SUB: tl.constexpr = ROWS // 4
    s = tl.zeros([SUB, COLS], mean.dtype)
    s1 = tl.zeros([SUB, COLS], mean.dtype)
    s2 = tl.zeros([SUB, COLS], mean.dtype)
    for t in range(tl.cdiv(count, ROWS)):
        in0, dy0, u0, v0, b0 = _load_tile(
            dy_ptr,
            x_ptr,
            x2_ptr,
            mask_ptr,
            4 * t + 0,
            count,
            slab,
            col_tile,
            row,
            channels,
            width,
            READ_X,
            BYTE_TILES,
            LAYOUT,
            SUB,
            COLS,
            WIDE,
        )
        in1, dy1, u1, v1, b1 = _load_tile(
            dy_ptr,
            x_ptr,
            x2_ptr,
            mask_ptr,
            4 * t + 1,
            count,
            slab,
            col_tile,
            row,
            channels,
            width,
            READ_X,
            BYTE_TILES,
            LAYOUT,
            SUB,
            COLS,
            WIDE,
        )
        in2, dy2, u2, v2, b2 = _load_tile(
            dy_ptr,
            x_ptr,
            x2_ptr,
            mask_ptr,
            4 * t + 2,
            count,
            slab,
            col_tile,
            row,
            channels,
            width,
            READ_X,
            BYTE_TILES,
            LAYOUT,
            SUB,
            COLS,
            WIDE,
        )
        in3, dy3, u3, v3, b3 = _load_tile(
            dy_ptr,
            x_ptr,
            x2_ptr,
            mask_ptr,
            4 * t + 3,
            count,
            slab,
            col_tile,
            row,
            channels,
            width,
            READ_X,
            BYTE_TILES,
            LAYOUT,
            SUB,
            COLS,
            WIDE,
        )
        s, s1, s2 = _accumulate(
            s,
            s1,
            s2,
            in0,
            dy0,
            u0,
            v0,
            b0,
            dx_ptr,
            dx2_ptr,
            dresidual_ptr,
            4 * t + 0,
            mean,
            low,
            scale,
            shift,
            mean2,
            low2,
            scale2,
            shift2,
            slab,
            col_tile,
            row,
            count,
            channels,
            width,
            RELU,
            READ_X,
            x2_ptr is not None,
            mask_ptr is not None,
            BYTE_TILES,
            SUMS,
            LAYOUT,
            SUB,
            COLS,
            WIDE,
        )
        s, s1, s2 = _accumulate(
            s,
            s1,
            s2,
            in1,
            dy1,
            u1,
            v1,
            b1,
            dx_ptr,
            dx2_ptr,
            dresidual_ptr,
            4 * t + 1,
            mean,
            low,
            scale,
            shift,
            mean2,
            low2,
            scale2,
            shift2,
            slab,
            col_tile,
            row,
            count,
            channels,
            width,
            RELU,
            READ_X,
            x2_ptr is not None,
            mask_ptr is not None,
            BYTE_TILES,
            SUMS,
            LAYOUT,
            SUB,
            COLS,
            WIDE,
        )
        s, s1, s2 = _accumulate(
            s,
            s1,
            s2,
            in2,
            dy2,
            u2,
            v2,
            b2,
            dx_ptr,
            dx2_ptr,
            dresidual_ptr,
            4 * t + 2,
            mean,
            low,
            scale,
            shift,
            mean2,
            low2,
            scale2,
            shift2,
            slab,
            col_tile,
            row,
            count,
            channels,
            width,
            RELU,
            READ_X,
            x2_ptr is not None,
            mask_ptr is not None,
            BYTE_TILES,
            SUMS,
            LAYOUT,
            SUB,
            COLS,
            WIDE,
        )
        s, s1, s2 = _accumulate(
            s,
            s1,
            s2,
            in3,
            dy3,
            u3,
            v3,
            b3,
            dx_ptr,
            dx2_ptr,
            dresidual_ptr,
            4 * t + 3,
            mean,
            low,
            scale,
            shift,
            mean2,
            low2,
            scale2,
            shift2,
            slab,
            col_tile,
            row,
            count,
            channels,
            width,
            RELU,
            READ_X,
            x2_ptr is not None,
            mask_ptr is not None,
            BYTE_TILES,
            SUMS,
            LAYOUT,
            SUB,
            COLS,
            WIDE,
        )
    total_s = total(s, LAYOUT)
    total_s1 = total(s1, LAYOUT)
    if x2_ptr is not None:
        return total_s, total_s1, total(s2, LAYOUT)
    else:
        return total_s, total_s1, total_s1


@triton.jit
def _saved_coefficients(weight_ptr, bias_ptr, stats_ptr, channel, channels, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """(mean, mean_low, rstd, scale, shift); weight and bias are read where they are used."""
    mean, rstd, low = saved_statistics(stats_ptr, channel, channels)
    scale = rstd
    if SCALE:
        scale = scale_of(weight_ptr, rstd, channel, channels)
    shift = rstd
    if SHIFT:
        shift = shift_of(bias_ptr, rstd, channel, channels)
    return mean, low, rstd, scale, shift


@triton.jit(do_not_specialize=SCALARS)
def _backward_reduce_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,  # [3, C]
    x2_ptr,  # None: one norm
    weight2_ptr,
    bias2_ptr,
    stats2_ptr,
    mask_ptr,  # None: the sign is recomputed
    dx_ptr,  # gradients that need no sums, or None
    dx2_ptr,
    dresidual_ptr,
    partial_ptr,  # [2 or 3, parts, C]: sums of g, g * centred x, g * centred x2
    channels,
    rows,
    units,
    slabs,
    col_tiles,
    chunk_rows,
    reverse,
    parts,
    RELU: tl.constexpr,
    READ_X: tl.constexpr,
    BYTE_TILES: tl.constexpr,
    LAYOUT: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    slab, col_tile, chunk = split_program(tl.program_id(0), slabs, col_tiles)
    row, count = chunk_of(chunk, chunk_rows, rows)
    channel = channel_of(slab, col_tile, channels, LAYOUT, COLS, WIDE)
    RECOMPUTE: tl.constexpr = RELU and mask_ptr is None
    SUMS: tl.constexpr = partial_ptr is not None
    mean, low, _, scale, shift = _saved_coefficients(
        weight_ptr, bias_ptr, stats_ptr, channel, channels, RECOMPUTE or dx_ptr is not None, RECOMPUTE
    )
    mean2, low2, scale2, shift2 = mean, low, scale, shift
    if x2_ptr is not None:
        mean2, low2, _, scale2, shift2 = _saved_coefficients(
            weight2_ptr, bias2_ptr, stats2_ptr, channel, channels, RECOMPUTE or dx2_ptr is not None, RECOMPUTE
        )
    s, s1, s2 = _reduce_rows(
        dy_ptr,
        x_ptr,
        x2_ptr,
        mask_ptr,
        dx_ptr,
        dx2_ptr,
        dresidual_ptr,
        mean,
        low,
        scale,
        shift,
        mean2,
        low2,
        scale2,
        shift2,
        slab,
        col_tile,
        row,
        count,
        channels,
        units * VEC,
        RELU,
        READ_X,
        BYTE_TILES,
        SUMS,
        LAYOUT,
        ROWS,
        COLS,
        WIDE,
    )
    if SUMS:
        dtype: tl.constexpr = partial_ptr.dtype.element_ty
        to = partial_ptr + (chunk * col_tiles + col_tile).to(tl.int64) * channels + channel
        stride = parts.to(tl.int64) * channels
        tl.store(to, s.to(dtype), mask=channel < channels)
        tl.store(to + stride, s1.to(dtype), mask=channel < channels)
        if x2_ptr is not None:
            tl.store(to + 2 * stride, s2.to(dtype), mask=channel < channels)


@triton.jit
def sum_of_parts(partial_ptr, channel, channels, parts, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    s = tl.zeros([1, BLOCK_C], tl.float64)
    for p in range(0, parts, BLOCK_P):
        part = p + tl.arange(0, BLOCK_P)[:, None]
        at = partial_ptr + part.to(tl.int64) * channels + channel
        s += tl.sum(
            tl.load(at, mask=(part < parts) & (channel < channels), other=0.0).to(tl.float64), 0, keep_dims=True
        )
    return s


@triton.jit
def store_affine(dweight_ptr, dbias_ptr, s, s1, rstd, channel, channels):
    """dweight and dbias from the float64 sums of g and g * centred x."""
    if dweight_ptr is not None:
        dtype: tl.constexpr = dweight_ptr.dtype.element_ty
        tl.store(dweight_ptr + channel, round_to(s1 * rstd.to(tl.float64), dtype), mask=channel < channels)
        tl.store(dbias_ptr + channel, round_to(s, dtype), mask=channel < channels)


@triton.jit
def slope_of(s1, rstd, values, dtype: tl.constexpr):
    """What the gradient loses per unit of centred x: rstd * dweight / m."""
    wide = rstd.to(tl.float64)
    return (s1 * wide * wide / values).to(dtype)


@triton.jit(do_not_specialize=SCALARS)
def _backward_finalise_kernel(
    partial_ptr,  # [2 or 3, parts, C]
    stats_ptr,  # [3, C]
    dweight_ptr,  # [C] or None
    dbias_ptr,
    stats2_ptr,  # None: one norm
    dweight2_ptr,
    dbias2_ptr,
    coefficient_ptr,  # [2 or 3, C]: mean of g, slopes; or None
    channels,
    rows,  # values per channel
    parts,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    exists = channel < channels
    stride = parts.to(tl.int64) * channels
    values = rows.to(tl.float64)
    s = sum_of_parts(partial_ptr, channel, channels, parts, BLOCK_P, BLOCK_C)
    s1 = sum_of_parts(partial_ptr + stride, channel, channels, parts, BLOCK_P, BLOCK_C)
    rstd = tl.load(stats_ptr + channels + channel, mask=exists, other=0.0)
    store_affine(dweight_ptr, dbias_ptr, s, s1, rstd, channel, channels)
    if coefficient_ptr is not None:
        dtype: tl.constexpr = coefficient_ptr.dtype.element_ty
        tl.store(coefficient_ptr + channel, (s / values).to(dtype), mask=exists)
        tl.store(coefficient_ptr + channels + channel, slope_of(s1, rstd, values, dtype), mask=exists)
    if stats2_ptr is not None:
        s2 = sum_of_parts(partial_ptr + 2 * stride, channel, channels, parts, BLOCK_P, BLOCK_C)
        rstd2 = tl.load(stats2_ptr + channels + channel, mask=exists, other=0.0)
        store_affine(dweight2_ptr, dbias2_ptr, s, s2, rstd2, channel, channels)
        if coefficient_ptr is not None:
            dtype2: tl.constexpr = coefficient_ptr.dtype.element_ty
            tl.store(coefficient_ptr + 2 * channels + channel, slope_of(s2, rstd2, values, dtype2), mask=exists)


@triton.jit
def _backward_apply_rows(
    dy_ptr,
    x_ptr,
    x2_ptr,
    mask_ptr,
    dx_ptr,
    dx2_ptr,
    dresidual_ptr,
    mean,
    low,
    scale,
    shift,
    slope,
    mean2,
    low2,
    scale2,
    shift2,
    slope2,
    mean_g,
    slab,
    col_tile,
    row,
    count,
    reverse,
    channels,
    width,
    TRAINING: tl.constexpr,
    TRAINING2: tl.constexpr,
    RELU: tl.constexpr,
    BYTE_TILES: tl.constexpr,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    tiles = tl.cdiv(count, ROWS)
    for i in range(tiles):
        t = i + reverse * (tiles - 1 - 2 * i)
        inside, dy, x, x2, bytes = _load_tile(
            dy_ptr,
            x_ptr,
            x2_ptr,
            mask_ptr,
            t,
            count,
            slab,
            col_tile,
            row,
            channels,
            width,
            True,
            BYTE_TILES,
            LAYOUT,
            ROWS,
            COLS,
            WIDE,
        )
        g, centred, centred2 = _gradient(
            inside,
            dy,
            x,
            x2,
            bytes,
            mean,
            low,
            scale,
            shift,
            mean2,
            low2,
            scale2,
            shift2,
            True,
            x2_ptr is not None,
            RELU,
            mask_ptr is not None,
            BYTE_TILES,
            ROWS,
            COLS,
        )
        if dx_ptr is not None:
            dx = g
            if TRAINING:
                dx = tl.fma(centred, -slope, g - mean_g)
            _store_tile(dx_ptr, scale * dx, t, count, slab, col_tile, row, channels, width, LAYOUT, ROWS, COLS, WIDE)
        if dx2_ptr is not None:
            dx2 = g
            if TRAINING2:
                dx2 = tl.fma(centred2, -slope2, g - mean_g)
            _store_tile(dx2_ptr, scale2 * dx2, t, count, slab, col_tile, row, channels, width, LAYOUT, ROWS, COLS, WIDE)
        if dresidual_ptr is not None:
            _store_tile(dresidual_ptr, g, t, count, slab, col_tile, row, channels, width, LAYOUT, ROWS, COLS, WIDE)


@triton.jit(do_not_specialize=SCALARS)
def _backward_apply_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,  # [3, C]
    x2_ptr,  # None: one norm
    weight2_ptr,
    bias2_ptr,
    stats2_ptr,
    mask_ptr,  # None: the sign is recomputed
    dx_ptr,  # None: not wanted
    dx2_ptr,
    dresidual_ptr,
    coefficient_ptr,  # [2 or 3, C]
    channels,
    rows,
    units,
    slabs,
    col_tiles,
    chunk_rows,
    reverse,
    TRAINING: tl.constexpr,
    TRAINING2: tl.constexpr,
    RELU: tl.constexpr,
    BYTE_TILES: tl.constexpr,
    LAYOUT: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = tl.program_id(0)
    program = program + reverse * (tl.num_programs(0) - 1 - 2 * program)
    slab, col_tile, chunk = split_program(program, slabs, col_tiles)
    row, count = chunk_of(chunk, chunk_rows, rows)
    channel = channel_of(slab, col_tile, channels, LAYOUT, COLS, WIDE)
    exists = channel < channels
    RECOMPUTE: tl.constexpr = RELU and mask_ptr is None
    mean, low, _, scale, shift = _saved_coefficients(
        weight_ptr, bias_ptr, stats_ptr, channel, channels, RECOMPUTE or dx_ptr is not None, RECOMPUTE
    )
    mean_g = tl.load(coefficient_ptr + channel, mask=exists, other=0.0)
    slope = tl.load(coefficient_ptr + channels + channel, mask=exists, other=0.0)
    mean2, low2, scale2, shift2, slope2 = mean, low, scale, shift, slope
    if x2_ptr is not None:
        mean2, low2, _, scale2, shift2 = _saved_coefficients(
            weight2_ptr, bias2_ptr, stats2_ptr, channel, channels, RECOMPUTE or dx2_ptr is not None, RECOMPUTE
        )
        slope2 = tl.load(coefficient_ptr + 2 * channels + channel, mask=exists, other=0.0)
    _backward_apply_rows(
        dy_ptr,
        x_ptr,
        x2_ptr,
        mask_ptr,
        dx_ptr,
        dx2_ptr,
        dresidual_ptr,
        mean,
        low,
        scale,
        shift,
        slope,
        mean2,
        low2,
        scale2,
        shift2,
        slope2,
        mean_g,
        slab,
        col_tile,
        row,
        count,
        reverse,
        channels,
        units * VEC,
        TRAINING,
        TRAINING2,
        RELU,
        BYTE_TILES,
        LAYOUT,
        ROWS,
        COLS,
        WIDE,
    )


@triton.jit(do_not_specialize=SCALARS)
def _backward_one_pass_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,
    x2_ptr,
    weight2_ptr,
    bias2_ptr,
    stats2_ptr,
    mask_ptr,
    dx_ptr,
    dx2_ptr,
    dresidual_ptr,
    dweight_ptr,
    dbias_ptr,
    dweight2_ptr,
    dbias2_ptr,
    channels,
    rows,
    units,
    slabs,
    col_tiles,
    chunk_rows,
    reverse,
    TRAINING: tl.constexpr,
    TRAINING2: tl.constexpr,
    RELU: tl.constexpr,
    BYTE_TILES: tl.constexpr,
    LAYOUT: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A slab per program: sums, then again from the cache to apply them."""
    slab = tl.program_id(0)
    width = units * VEC
    row = tl.zeros([], tl.int64)
    count = rows.to(tl.int32)
    channel = channel_of(slab, 0, channels, LAYOUT, COLS, WIDE)
    RECOMPUTE: tl.constexpr = RELU and mask_ptr is None
    mean, low, rstd, scale, shift = _saved_coefficients(
        weight_ptr, bias_ptr, stats_ptr, channel, channels, RECOMPUTE or dx_ptr is not None, RECOMPUTE
    )
    mean2, low2, rstd2, scale2, shift2 = mean, low, rstd, scale, shift
    if x2_ptr is not None:
        mean2, low2, rstd2, scale2, shift2 = _saved_coefficients(
            weight2_ptr, bias2_ptr, stats2_ptr, channel, channels, RECOMPUTE or dx2_ptr is not None, RECOMPUTE
        )
    s = tl.zeros_like(mean).to(tl.float64)
    s1 = tl.zeros_like(mean).to(tl.float64)
    s2 = tl.zeros_like(mean).to(tl.float64)
    for col_tile in range(col_tiles):
        more, more1, more2 = _reduce_rows(
            dy_ptr,
            x_ptr,
            x2_ptr,
            mask_ptr,
            None,
            None,
            None,
            mean,
            low,
            scale,
            shift,
            mean2,
            low2,
            scale2,
            shift2,
            slab,
            col_tile,
            row,
            count,
            channels,
            width,
            RELU,
            True,
            BYTE_TILES,
            True,
            LAYOUT,
            ROWS,
            COLS,
            WIDE,
        )
        s += more
        s1 += more1
        s2 += more2
    values = rows.to(tl.float64)
    if LAYOUT == "contiguous":
        values *= width.to(tl.float64)
    store_affine(dweight_ptr, dbias_ptr, s, s1, rstd, channel, channels)
    mean_g = (s / values).to(mean.dtype)
    slope = slope_of(s1, rstd, values, mean.dtype)
    slope2 = slope
    if x2_ptr is not None:
        store_affine(dweight2_ptr, dbias2_ptr, s, s2, rstd2, channel, channels)
        slope2 = slope_of(s2, rstd2, values, mean.dtype)
    for i in range(col_tiles):
        _backward_apply_rows(
            dy_ptr,
            x_ptr,
            x2_ptr,
            mask_ptr,
            dx_ptr,
            dx2_ptr,
            dresidual_ptr,
            mean,
            low,
            scale,
            shift,
            slope,
            mean2,
            low2,
            scale2,
            shift2,
            slope2,
            mean_g,
            slab,
            i + reverse * (col_tiles - 1 - 2 * i),
            row,
            count,
            reverse,
            channels,
            width,
            TRAINING,
            TRAINING2,
            RELU,
            BYTE_TILES,
            LAYOUT,
            ROWS // 2,
            COLS,
            WIDE,
        )


class SavedNorm:
    """What the backward knows of one batch norm, and its results; an unwanted result is an empty tensor."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        stats: Tensor,
        training: bool,
        need_dx: bool,
        need_affine: bool,
    ) -> None:
        self.x, self.weight, self.bias, self.stats = x, weight, bias, stats
        self.training, self.need_dx, self.need_affine = training, need_dx, need_affine
        self.dx = torch.empty_like(x) if need_dx else x.new_empty(0)
        dtype = stats.dtype if weight is None else weight.dtype
        size = x.size(1) if need_affine else 0
        self.dweight, self.dbias = (stats.new_empty(size, dtype=dtype) for _ in range(2))

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return (self.x, self.weight, self.bias, self.stats)

    @property
    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        return (self.dweight, self.dbias) if self.need_affine else (None, None)


def launch_backward_finalise(
    plan: Plan, partial: Tensor, norms: list[SavedNorm], coefficients: Tensor | None, values: int
) -> None:
    """Merges partial sums into the gradients of weight and bias, and what dx needs; ``values`` are of a channel."""
    channels = norms[0].x.size(1)
    arguments = [partial, norms[0].stats, *norms[0].affine]
    arguments += [norms[1].stats, *norms[1].affine] if len(norms) == 2 else [None] * 3
    _backward_finalise_kernel[(triton.cdiv(channels, BLOCK_C),)](
        *arguments,
        coefficients,
        channels=channels,
        rows=values,
        parts=plan.parts,
        BLOCK_P=block_of_parts(plan.parts),
        BLOCK_C=BLOCK_C,
        **launch_options(128),
    )


class Gradients(NamedTuple):
    """What a pass of a backward writes, of which some may be None."""

    dx: Tensor | None = None
    dx2: Tensor | None = None
    dresidual: Tensor | None = None


def _backward_inputs(dy: Tensor, norms: list[SavedNorm], mask: Tensor | None) -> list[Tensor | None]:
    return [dy, *norms[0].inputs, *(norms[1].inputs if len(norms) == 2 else [None] * 4), mask]


def launch_backward_reduce(
    dy: Tensor,
    norms: list[SavedNorm],
    mask: Tensor | None,
    relu: bool,
    gradients: Gradients,
    partial: Tensor | None,
    plan: Plan,
) -> None:
    """Partial sums, if ``partial`` is there, and gradients that need no sums; ``dy`` is laid out like x."""
    x = norms[0].x
    _backward_reduce_kernel[plan.grid](
        *_backward_inputs(dy, norms, mask),
        *gradients,
        partial,
        parts=plan.parts,
        READ_X=partial is not None or (relu and mask is None),
        RELU=relu,
        BYTE_TILES=has_byte_tiles(x),
        **geometry(x, plan),
    )


def launch_backward_apply(
    dy: Tensor, norms: list[SavedNorm], mask: Tensor | None, relu: bool, gradients: Gradients, coefficients: Tensor
) -> None:
    """Gradients that need sums; ``coefficients`` [2 or 3, C] are those of them."""
    x = norms[0].x
    plan = apply_plan(x)
    _backward_apply_kernel[plan.grid](
        *_backward_inputs(dy, norms, mask),
        *gradients,
        coefficients,
        TRAINING=norms[0].training,
        TRAINING2=norms[-1].training,
        RELU=relu,
        BYTE_TILES=has_byte_tiles(x),
        **geometry(x, plan, in_reverse(x, 1 + len(norms))),
    )


def _backward(dy: Tensor, norms: list[SavedNorm], mask: Tensor | None, relu: bool, need_dresidual: bool) -> Tensor:
    """Fills the results of ``norms``, one or two; returns dresidual."""
    x = norms[0].x
    channels = x.size(1)
    dresidual = torch.empty_like(x) if need_dresidual else x.new_empty(0)
    dy = laid_out_like(dy, x)
    dxs = [norm.dx if norm.need_dx else None for norm in norms] + [None] * (2 - len(norms))
    gradients = Gradients(*dxs, dresidual if need_dresidual else None)
    waits = any(norm.training and norm.need_dx for norm in norms)  # a dx that needs sums of the whole batch
    sums = waits or any(norm.need_affine for norm in norms)
    if not (sums or any(g is not None for g in gradients)):
        return dresidual
    with torch.cuda.device_of(x):
        plan = one_pass_plan(x) if waits else None
        if plan is not None:
            affine = [*norms[0].affine, *(norms[1].affine if len(norms) == 2 else (None, None))]
            _backward_one_pass_kernel[(plan.slabs,)](
                *_backward_inputs(dy, norms, mask),
                *gradients,
                *affine,
                TRAINING=norms[0].training,
                TRAINING2=norms[-1].training,
                RELU=relu,
                BYTE_TILES=has_byte_tiles(x),
                **geometry(x, plan, True),
            )
            return dresidual
        plan = reduce_plan(x)
        vectors = len(norms) + 1
        partial = x.new_empty((vectors, plan.parts, channels), dtype=wide_dtype(x)) if sums else None
        coefficients = x.new_empty((vectors, channels), dtype=wide_dtype(x)) if waits else None
        launch_backward_reduce(dy, norms, mask, relu, Gradients() if waits else gradients, partial, plan)
        if sums:
            launch_backward_finalise(plan, partial, norms, coefficients, x.numel() // max(1, channels))
        if waits:
            launch_backward_apply(dy, norms, mask, relu, gradients, coefficients)
    return dresidual


def batch_norm_act_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    mask: Tensor | None,
    training: bool,
    relu: bool,
    need_dx: bool,
    need_dresidual: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual, dweight, dbias; arguments and results of ``torch.ops.fusedres.batch_norm_act_backward``.

    Raises:
        RuntimeError: tensors that do not fit together.
    """
    check(x, (dy,), (weight, bias))
    check_saved(x, stats, mask)
    norm = SavedNorm(x, weight, bias, stats, training, need_dx, need_affine)
    dresidual = _backward(dy, [norm], mask, relu, need_dresidual)
    return norm.dx, dresidual, norm.dweight, norm.dbias


def batch_norm_add_batch_norm_act_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    training: bool,
    x2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    stats2: Tensor,
    training2: bool,
    relu: bool,
    need_dx: bool,
    need_dx2: bool,
    need_affine: bool,
    need_affine2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and those of x2; as ``torch.ops.fusedres.batch_norm_add_batch_norm_act_backward``.

    Raises:
        RuntimeError: tensors that do not fit together.
    """
    check(x, (dy, x2), (weight, bias, weight2, bias2))
    check_saved(x, stats, None)
    check_saved(x, stats2, None)
    norms = [
        SavedNorm(x, weight, bias, stats, training, need_dx, need_affine),
        SavedNorm(laid_out_like(x2, x), weight2, bias2, stats2, training2, need_dx2, need_affine2),
    ]
    _backward(dy, norms, None, relu, False)
    return tuple(v for norm in norms for v in (norm.dx, norm.dweight, norm.dbias))
