"""``max_pool(act(bn(x)))`` and its backward: the un-pooled activation is never written.

Forward: the statistics of kernels/batch_norm_act.py, then one pass over the windows. Backward: a pass over the windows
finds each one's winner again, leaves it as one byte (or an int32, of large windows) and adds up the sums; a pass over
the pixels collects from the windows that they won. Winners are torch's: the first of equals, and the last NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm_act import Norm, SavedNorm, check_saved, launch_backward_finalise, launch_statistics
from .common import (
    SCALARS,
    apply_plan,
    channel_of,
    check,
    chunk_of,
    geometry,
    in_reverse,
    layout_of,
    locate,
    normalised,
    reduce_plan,
    round_to,
    running_statistics,
    saved_statistics,
    scale_of,
    shift_of,
    split_program,
    total,
    wide_dtype,
)

Pair = tuple[int, int]

MAX_UNROLLED = 16  # positions of a window, up to which the loop over them is unrolled

# nor do the sizes of images make new variants
SIZES = [*SCALARS, "height", "image_width", "out_height", "out_width"]


@triton.jit
def _pixels(
    slab,
    col_tile,
    row,
    t,
    height,
    image_width,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Sample (int64), vertical and horizontal position of a tile's elements: [ROWS, 1] of a channels_last tensor; of a
    contiguous one the sample is [ROWS, 1] and the positions are [1, COLS]."""
    size = height * image_width
    r = t * ROWS + tl.arange(0, ROWS)[:, None]
    if LAYOUT == "channels_last":
        q = (row % size).to(tl.int32) + r
        n = row // size + q // size
        position = q % size
    else:
        n = row + r
        position = col_tile * COLS + tl.arange(0, COLS)[None, :]
    return n, position // image_width, position % image_width


@triton.jit
def _element(
    n, vertical, horizontal, slab, channels, width, height, image_width, LAYOUT: tl.constexpr, COLS: tl.constexpr
):
    """Offsets of pixels of another image than the one that is walked."""
    if LAYOUT == "channels_last":
        pixel = (n * height + vertical) * image_width + horizontal
        return pixel * width + (slab * COLS + tl.arange(0, COLS)[None, :])
    else:
        return (n * channels + slab) * height * image_width + (vertical * image_width + horizontal)


@triton.jit
def _winners(
    x_ptr,
    n,
    oh,
    ow,
    inside,
    mean,
    low,
    scale,
    shift,
    slab,
    channels,
    width,
    height,
    image_width,
    RELU: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    UNROLL: tl.constexpr,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """(greatest rounded activation, its place in the window, its centred x) of a tile of windows."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    best = tl.full([ROWS, COLS], -float("inf"), mean.dtype)
    place = tl.full([ROWS, COLS], -1, tl.int32)
    best_centred = tl.zeros([ROWS, COLS], mean.dtype)
    for k in tl.range(0, KH * KW, loop_unroll_factor=UNROLL):
        ih = oh * SH - PH + (k // KW) * DH
        iw = ow * SW - PW + (k % KW) * DW
        exists = inside & (ih >= 0) & (ih < height) & (iw >= 0) & (iw < image_width)
        at = _element(n, ih, iw, slab, channels, width, height, image_width, LAYOUT, COLS)
        x = tl.load(x_ptr + at, mask=exists, other=0.0).to(mean.dtype)
        centred, y = normalised(x, mean, low, scale, shift)
        if RELU:
            y = tl.where(y <= 0.0, 0.0, y)  # NaN passes
        y = round_to(y, dtype).to(mean.dtype)
        wins = exists & ((y > best) | (y != y) | (place < 0))
        best = tl.where(wins, y, best)
        place = tl.where(wins, k, place)
        best_centred = tl.where(wins, centred, best_centred)
    return best, place, best_centred


@triton.jit(do_not_specialize=SIZES)
def _pool_kernel(
    x_ptr,
    weight_ptr,  # [C] or None
    bias_ptr,
    stats_ptr,  # [3, C]: read in training, written in evaluation
    running_mean_ptr,
    running_var_ptr,
    eps: tl.float64,
    out_ptr,
    height,
    image_width,
    out_height,
    out_width,
    channels,
    rows,
    units,
    slabs,
    col_tiles,
    chunk_rows,
    reverse,
    TRAINING: tl.constexpr,
    RELU: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    UNROLL: tl.constexpr,
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
    width = units * VEC
    channel = channel_of(slab, col_tile, channels, LAYOUT, COLS, WIDE)
    if TRAINING:
        mean, rstd, low = saved_statistics(stats_ptr, channel, channels)
    else:
        writes = (channel < channels) & (tl.zeros_like(channel) + (chunk + col_tile) == 0)
        mean, rstd, low = running_statistics(
            stats_ptr, running_mean_ptr, running_var_ptr, eps, channel, channels, writes
        )
    scale = scale_of(weight_ptr, rstd, channel, channels)
    shift = shift_of(bias_ptr, rstd, channel, channels)
    first, stride, offset, exists = locate(slab, col_tile, row, channels, width, LAYOUT, ROWS, COLS, WIDE)
    tiles = tl.cdiv(count, ROWS)
    for i in range(tiles):
        t = i + reverse * (tiles - 1 - 2 * i)
        inside = (t * ROWS + tl.arange(0, ROWS)[:, None] < count) & exists
        n, oh, ow = _pixels(slab, col_tile, row, t, out_height, out_width, LAYOUT, ROWS, COLS)
        best, _, _ = _winners(
            x_ptr,
            n,
            oh,
            ow,
            inside,
            mean,
            low,
            scale,
            shift,
            slab,
            channels,
            width,
            height,
            image_width,
            RELU,
            KH,
            KW,
            SH,
            SW,
            PH,
            PW,
            DH,
            DW,
            UNROLL,
            LAYOUT,
            ROWS,
            COLS,
        )
        at = first + t * ROWS * stride
        tl.store(out_ptr + at + offset, round_to(best, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _pool_reduce_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,  # [3, C]
    winner_ptr,  # like dy: place in the window, or all ones where the activation was cut; None: not wanted
    partial_ptr,  # [2, parts, C]: sums of g, g * centred x; None: not wanted
    height,
    image_width,
    out_height,
    out_width,
    channels,
    rows,
    units,
    slabs,
    col_tiles,
    chunk_rows,
    reverse,
    parts,
    RELU: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    UNROLL: tl.constexpr,
    LAYOUT: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    SUB: tl.constexpr = ROWS // 4  # the state is large
    slab, col_tile, chunk = split_program(tl.program_id(0), slabs, col_tiles)
    row, count = chunk_of(chunk, chunk_rows, rows)
    width = units * VEC
    channel = channel_of(slab, col_tile, channels, LAYOUT, COLS, WIDE)
    mean, rstd, low = saved_statistics(stats_ptr, channel, channels)
    scale = scale_of(weight_ptr, rstd, channel, channels)
    shift = shift_of(bias_ptr, rstd, channel, channels)
    first, stride, offset, exists = locate(slab, col_tile, row, channels, width, LAYOUT, SUB, COLS, WIDE)
    s = tl.zeros([SUB, COLS], mean.dtype)
    s1 = tl.zeros([SUB, COLS], mean.dtype)
    for t in range(tl.cdiv(count, SUB)):
        inside = (t * SUB + tl.arange(0, SUB)[:, None] < count) & exists
        n, oh, ow = _pixels(slab, col_tile, row, t, out_height, out_width, LAYOUT, SUB, COLS)
        best, place, centred = _winners(
            x_ptr,
            n,
            oh,
            ow,
            inside,
            mean,
            low,
            scale,
            shift,
            slab,
            channels,
            width,
            height,
            image_width,
            RELU,
            KH,
            KW,
            SH,
            SW,
            PH,
            PW,
            DH,
            DW,
            UNROLL,
            LAYOUT,
            SUB,
            COLS,
        )
        keep = place >= 0
        if RELU:
            keep = keep & ((best <= 0.0) == 0)
        at = first + t * SUB * stride
        if partial_ptr is not None:
            dy = tl.load(dy_ptr + at + offset, mask=inside, other=0.0).to(mean.dtype)
            g = tl.where(keep, dy, 0.0)
            s += g
            s1 += g * centred
        if winner_ptr is not None:
            place = tl.where(keep, place, -1)
            tl.store(winner_ptr + at + offset, place.to(winner_ptr.dtype.element_ty), mask=inside)
    if partial_ptr is not None:
        dtype: tl.constexpr = partial_ptr.dtype.element_ty
        to = partial_ptr + (chunk * col_tiles + col_tile).to(tl.int64) * channels + channel
        tl.store(to, total(s, LAYOUT).to(dtype), mask=channel < channels)
        tl.store(to + parts.to(tl.int64) * channels, total(s1, LAYOUT).to(dtype), mask=channel < channels)


@triton.jit(do_not_specialize=SIZES)
def _pool_apply_kernel(
    dy_ptr,
    winner_ptr,
    x_ptr,
    weight_ptr,
    stats_ptr,  # [3, C]
    coefficient_ptr,  # [2, C]: mean of g, slope; None: evaluation
    dx_ptr,
    height,
    image_width,
    out_height,
    out_width,
    channels,
    rows,
    units,
    slabs,
    col_tiles,
    chunk_rows,
    reverse,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    OVER_H: tl.constexpr,  # windows one above the other that a pixel may lie in
    OVER_W: tl.constexpr,
    UNROLL: tl.constexpr,
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
    width = units * VEC
    channel = channel_of(slab, col_tile, channels, LAYOUT, COLS, WIDE)
    channel_exists = channel < channels
    mean, rstd, low = saved_statistics(stats_ptr, channel, channels)
    scale = scale_of(weight_ptr, rstd, channel, channels)
    if coefficient_ptr is not None:
        mean_g = tl.load(coefficient_ptr + channel, mask=channel_exists, other=0.0)
        slope = tl.load(coefficient_ptr + channels + channel, mask=channel_exists, other=0.0)
    first, stride, offset, exists = locate(slab, col_tile, row, channels, width, LAYOUT, ROWS, COLS, WIDE)
    tiles = tl.cdiv(count, ROWS)
    for i in range(tiles):
        t = i + reverse * (tiles - 1 - 2 * i)
        inside = (t * ROWS + tl.arange(0, ROWS)[:, None] < count) & exists
        at = first + t * ROWS * stride
        n, ih, iw = _pixels(slab, col_tile, row, t, height, image_width, LAYOUT, ROWS, COLS)
        g = tl.zeros([ROWS, COLS], mean.dtype)
        for k in tl.range(0, OVER_H * OVER_W, loop_unroll_factor=UNROLL):
            oh = (ih + PH) // SH - (OVER_H - 1 - k // OVER_W)
            ow = (iw + PW) // SW - (OVER_W - 1 - k % OVER_W)
            kh = ih + PH - oh * SH
            kw = iw + PW - ow * SW
            covers = (oh >= 0) & (oh < out_height) & (kh < KH * DH) & (kh % DH == 0)
            covers = covers & ((ow >= 0) & (ow < out_width) & (kw < KW * DW) & (kw % DW == 0))
            from_ = _element(n, oh, ow, slab, channels, width, out_height, out_width, LAYOUT, COLS)
            winner = tl.load(winner_ptr + from_, mask=inside & covers, other=0).to(tl.int32)
            dy = tl.load(dy_ptr + from_, mask=inside & covers, other=0.0).to(mean.dtype)
            won = covers & (winner == (kh // DH) * KW + kw // DW)
            g += tl.where(won, dy, 0.0)
        if coefficient_ptr is not None:
            x = tl.load(x_ptr + at + offset, mask=inside, other=0.0).to(mean.dtype)
            g = tl.fma((x - mean) - low, -slope, g - mean_g)
        tl.store(dx_ptr + at + offset, round_to(scale * g, dx_ptr.dtype.element_ty), mask=inside)


def _window(kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> dict[str, int]:
    names = ("KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW")
    return dict(zip(names, (*kernel_size, *stride, *padding, *dilation), strict=True))


def _unroll(positions: int) -> int:
    return positions if positions <= MAX_UNROLLED else 1


def _pooled_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """The size that max_pool2d gives; a last window that would begin in the padding is left out."""
    reach = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (reach + (stride - 1 if ceil_mode else 0)) // stride + 1
    return count - (ceil_mode and (count - 1) * stride >= size + padding)


def _sizes(x: Tensor, out: Tensor) -> dict[str, int]:
    return {"height": x.size(2), "image_width": x.size(3), "out_height": out.size(2), "out_width": out.size(3)}


def batch_norm_act_max_pool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    relu: bool,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    """out (N, C, OH, OW) and stats (3, C); arguments and results of ``torch.ops.fusedres.batch_norm_act_max_pool``.

    Raises:
        RuntimeError: tensors that do not fit together; nothing is written then.
    """
    norm = Norm(x, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps)
    check(x, (), norm.vectors)
    window = zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    size = [_pooled_size(*sizes, ceil_mode) for sizes in window]
    layout = torch.channels_last if layout_of(x) == "channels_last" else torch.contiguous_format
    out = torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=layout)
    with torch.cuda.device_of(x):
        if training:
            launch_statistics([norm])
        plan = apply_plan(out, layout_of(x))
        _pool_kernel[plan.grid](
            x,
            *norm.coefficients,
            eps,
            out,
            **_sizes(x, out),
            **geometry(out, plan, training and in_reverse(x, 1)),
            **_window(kernel_size, stride, padding, dilation),
            TRAINING=training,
            RELU=relu,
            UNROLL=_unroll(kernel_size[0] * kernel_size[1]),
        )
    return out, norm.stats


def batch_norm_act_max_pool_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    training: bool,
    relu: bool,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    need_dx: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias; arguments and results of ``torch.ops.fusedres.batch_norm_act_max_pool_backward``.

    Raises:
        RuntimeError: tensors that do not fit together.
    """
    check(x, (), (weight, bias))
    check_saved(x, stats, None)
    window = zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    size = [_pooled_size(*sizes, ceil_mode) for sizes in window]
    if list(dy.shape) != [*x.shape[:2], *size] or dy.dtype != x.dtype or dy.device != x.device:
        raise RuntimeError("dy must have the shape of the pooled output, and the dtype and device of x")
    layout = layout_of(x)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    dy = dy.contiguous(memory_format=memory_format)
    norm = SavedNorm(x, weight, bias, stats, training, need_dx, need_affine)
    sums = need_affine or (training and need_dx)
    if not (need_dx or sums):
        return norm.dx, norm.dweight, norm.dbias
    positions = kernel_size[0] * kernel_size[1]
    winner_dtype = torch.uint8 if positions < 256 else torch.int32
    winners = torch.empty_like(dy, dtype=winner_dtype, memory_format=memory_format) if need_dx else None
    constants = _window(kernel_size, stride, padding, dilation)
    over = [-(-(d * (k - 1) + 1) // s) for k, s, d in zip(kernel_size, stride, dilation, strict=True)]
    with torch.cuda.device_of(x):
        plan = reduce_plan(dy, layout)
        partial = x.new_empty((2, plan.parts, x.size(1)), dtype=wide_dtype(x)) if sums else None
        coefficients = x.new_empty((2, x.size(1)), dtype=wide_dtype(x)) if training and need_dx else None
        _pool_reduce_kernel[plan.grid](
            dy,
            *norm.inputs,
            winners,
            partial,
            parts=plan.parts,
            **_sizes(x, dy),
            **geometry(dy, plan),
            **constants,
            RELU=relu,
            UNROLL=_unroll(positions),
        )
        if sums:
            launch_backward_finalise(plan, partial, [norm], coefficients, x.numel() // max(1, x.size(1)))
        if need_dx:
            plan = apply_plan(x)
            _pool_apply_kernel[plan.grid](
                dy,
                winners,
                x,
                weight,
                stats,
                coefficients,
                norm.dx,
                **_sizes(x, dy),
                **geometry(x, plan, in_reverse(x, 2)),
                **constants,
                OVER_H=over[0],
                OVER_W=over[1],
                UNROLL=_unroll(over[0] * over[1]),
            )
    return norm.dx, norm.dweight, norm.dbias
