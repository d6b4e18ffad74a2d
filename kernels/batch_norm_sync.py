"""``act(bn(x) + residual)`` of a batch that is spread over processes, cut as fusedres/ops/batch_norm_sync.py says.

The passes over tensors are those of kernels/batch_norm_act.py. What is per channel has kernels here: the processes
exchange float64, and how many values they have together only the device knows. Each op is two launches. As there, the
statistics of channels that hold an infinity are NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm_act import (
    BLOCK_C,
    Gradients,
    Norm,
    SavedNorm,
    block_of_parts,
    check_saved,
    launch_apply,
    launch_backward_apply,
    launch_backward_reduce,
    launch_partial_statistics,
    mask_bytes,
    merged,
    merging,
    slope_of,
    store_affine,
    sum_of_parts,
)
from .common import (
    SCALARS,
    check,
    in_reverse,
    laid_out_like,
    launch_options,
    reduce_plan,
    save_statistics,
    wide_dtype,
)

# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SCALARS)
def _finalise_part_kernel(
    partial_ptr,  # [3, parts, C]
    out_ptr,  # [2C + 1]: mean, M2, number of values
    channels,
    rows,
    units,
    col_tiles,
    chunk_rows,
    parts,
    LAYOUT: tl.constexpr,
    VEC: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mean, m2, count = merged(
        partial_ptr, channel, channels, rows, units * VEC, col_tiles, chunk_rows, parts, LAYOUT, COLS, BLOCK_P, BLOCK_C
    )
    tl.store(out_ptr + channel, mean, mask=channel < channels)
    tl.store(out_ptr + channels + channel, tl.where(m2 < 0.0, 0.0, m2), mask=channel < channels)  # NaN passes
    if tl.program_id(0) == 0:
        tl.store(out_ptr + 2 * channels, count)


@triton.jit
def _own_counts(partials_ptr, p, width, parts, BLOCK_P: tl.constexpr):
    """Of some parts: their numbers, and how many values each of them has."""
    part = p + tl.arange(0, BLOCK_P)[:, None]
    return part, tl.load(partials_ptr + part.to(tl.int64) * width + (width - 1), mask=part < parts, other=0.0)


@triton.jit
def _whole_batch(partials_ptr, channel, channels, parts, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """(mean, M2, number of values) of all parts, relative to the first one that is not empty."""
    width = 2 * channels + 1
    exists = channel < channels
    count = tl.zeros([1, 1], tl.float64)
    first = tl.full([1, 1], 2**31 - 1, tl.int32)
    for p in range(0, parts, BLOCK_P):
        part, own = _own_counts(partials_ptr, p, width, parts, BLOCK_P)
        count += tl.sum(own, 0, keep_dims=True)
        first = tl.minimum(first, tl.min(tl.where(own > 0.0, part, 2**31 - 1), 0, keep_dims=True))
    first = tl.where(first < parts, first, 0)
    origin = tl.load(partials_ptr + first.to(tl.int64) * width + channel, mask=exists, other=0.0)
    away = tl.zeros([1, BLOCK_C], tl.float64)
    plain = tl.zeros([1, BLOCK_C], tl.float64)
    for p in range(0, parts, BLOCK_P):
        part, own = _own_counts(partials_ptr, p, width, parts, BLOCK_P)
        share = own / tl.maximum(count, 1.0)
        mean = tl.load(partials_ptr + part.to(tl.int64) * width + channel, mask=(part < parts) & exists, other=0.0)
        away += tl.sum(tl.where(part < parts, (mean - origin) * share, 0.0), 0, keep_dims=True)
        plain += tl.sum(mean * share, 0, keep_dims=True)
    average = origin + away
    average = tl.where(average - average == 0.0, average, plain)  # about an infinite mean there are no distances
    m2 = tl.zeros([1, BLOCK_C], tl.float64)
    for p in range(0, parts, BLOCK_P):
        part, own = _own_counts(partials_ptr, p, width, parts, BLOCK_P)
        at = partials_ptr + part.to(tl.int64) * width + channel
        mean = tl.load(at, mask=(part < parts) & exists, other=0.0)
        own_m2 = tl.load(at + channels, mask=(part < parts) & exists, other=0.0)
        of_part = own_m2 + own * (mean - average) * (mean - average)
        m2 += tl.sum(tl.where(own > 0.0, of_part, 0.0), 0, keep_dims=True)
    return average, m2, count


@triton.jit(do_not_specialize=SCALARS)
def _merge_parts_kernel(
    partials_ptr,  # [parts, 2C + 1] float64
    stats_ptr,  # [3, C]
    running_mean_ptr,  # [C] or None
    running_var_ptr,
    counter_ptr,  # one int64, or None; with the cumulative average an earlier launch has moved it
    momentum: tl.float64,
    eps: tl.float64,
    channels,
    parts,
    CUMULATIVE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mean, m2, count = _whole_batch(partials_ptr, channel, channels, parts, BLOCK_P, BLOCK_C)
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
    if counter_ptr is not None and not CUMULATIVE and tl.program_id(0) == 0:
        tl.store(counter_ptr, tl.load(counter_ptr) + 1)


@triton.jit(do_not_specialize=SCALARS)
def _finalise_sums_kernel(
    partial_ptr,  # [2, parts, C]
    stats_ptr,  # [3, C]
    dweight_ptr,  # [C] or None
    dbias_ptr,
    sums_ptr,  # [2C + 1]: of g, of g * centred x, number of values
    channels,
    rows,  # values per channel
    parts,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    exists = channel < channels
    stride = parts.to(tl.int64) * channels
    s = sum_of_parts(partial_ptr, channel, channels, parts, BLOCK_P, BLOCK_C)
    s1 = sum_of_parts(partial_ptr + stride, channel, channels, parts, BLOCK_P, BLOCK_C)
    if dweight_ptr is not None:
        rstd = tl.load(stats_ptr + channels + channel, mask=exists, other=0.0)
        store_affine(dweight_ptr, dbias_ptr, s, s1, rstd, channel, channels)
    tl.store(sums_ptr + channel, s, mask=exists)
    tl.store(sums_ptr + channels + channel, s1, mask=exists)
    if tl.program_id(0) == 0:
        tl.store(sums_ptr + 2 * channels, rows.to(tl.float64))


@triton.jit(do_not_specialize=SCALARS)
def _coefficients_kernel(
    sums_ptr,  # [2C + 1], of the whole batch
    stats_ptr,  # [3, C]
    coefficient_ptr,  # [2, C]: mean of g, slope
    channels,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = channel < channels
    dtype: tl.constexpr = coefficient_ptr.dtype.element_ty
    values = tl.load(sums_ptr + 2 * channels)
    s = tl.load(sums_ptr + channel, mask=exists, other=0.0)
    s1 = tl.load(sums_ptr + channels + channel, mask=exists, other=0.0)
    rstd = tl.load(stats_ptr + channels + channel, mask=exists, other=0.0)
    tl.store(coefficient_ptr + channel, (s / values).to(dtype), mask=exists)
    tl.store(coefficient_ptr + channels + channel, slope_of(s1, rstd, values, dtype), mask=exists)


# ---- launchers -------------------------------------------------------------------------------------------------------

COEFFICIENTS = 128  # channels of a program


def _check_exchanged(x: Tensor, name: str, exchanged: Tensor, dimensions: int) -> None:
    """Refuse what is not 2C + 1 float64 numbers, of one part or of several."""
    if (
        exchanged.dim() != dimensions
        or exchanged.size(-1) != 2 * x.size(1) + 1
        or exchanged.size(0) < 1
        or exchanged.dtype != torch.float64
        or exchanged.device != x.device
        or not exchanged.is_contiguous()
    ):
        raise RuntimeError(
            f"{name} must be 2C + 1 dense float64 numbers on the device of x, in {dimensions} dimensions"
        )


def batch_norm_statistics(x: Tensor) -> Tensor:
    """Mean, M2 and number of values of the own part, (2C + 1) in float64.

    Raises:
        RuntimeError: x is neither contiguous nor channels_last.
    """
    check(x, (), ())
    channels = x.size(1)
    if not x.numel():
        return x.new_zeros(2 * channels + 1, dtype=torch.float64)
    out = x.new_empty(2 * channels + 1, dtype=torch.float64)
    with torch.cuda.device_of(x):
        plan = reduce_plan(x)
        (partial,) = launch_partial_statistics([x], [None], plan)
        _finalise_part_kernel[(triton.cdiv(channels, BLOCK_C),)](partial, out, **merging(plan, channels))
    return out


def batch_norm_act_apply(
    x: Tensor,
    residual: Tensor | None,
    partials: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, stats (3, C) and, if asked, the mask; as ``torch.ops.fusedres.batch_norm_act_apply``.

    The cumulative average is one launch more.

    Raises:
        RuntimeError: tensors that do not fit together, or no momentum and no counter; nothing is written then.
    """
    norm = Norm(x, weight, bias, running_mean, running_var, num_batches_tracked, True, momentum, eps)
    check(x, (residual,), norm.vectors)
    _check_exchanged(x, "partials", partials, 2)
    counter = norm.counter
    if counter is not None and (counter.dtype != torch.int64 or counter.numel() != 1 or counter.device != x.device):
        raise RuntimeError("num_batches_tracked must be one int64 on the device of x")
    if norm.cumulative and counter is None:
        raise RuntimeError("momentum=None needs num_batches_tracked")
    channels = x.size(1)
    out = torch.empty_like(x)
    mask = x.new_empty(mask_bytes(x) if save_mask else 0, dtype=torch.uint8)
    if residual is not None:
        residual = laid_out_like(residual, x)
    with torch.cuda.device_of(x):
        if norm.cumulative:
            counter.add_(1)
        _merge_parts_kernel[(max(1, triton.cdiv(channels, BLOCK_C)),)](
            partials,
            norm.stats,
            *norm.running,
            counter,
            norm.momentum,
            eps,
            channels=channels,
            parts=partials.size(0),
            CUMULATIVE=norm.cumulative,
            BLOCK_P=block_of_parts(partials.size(0)),
            BLOCK_C=BLOCK_C,
            **launch_options(128),
        )
        if x.numel():
            launch_apply([norm], residual, out, mask if save_mask else None, relu, in_reverse(x, 1))
    return out, norm.stats, mask


def batch_norm_act_backward_reduce(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    mask: Tensor | None,
    relu: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (2C + 1) of the own part, dweight and dbias, as ``torch.ops.fusedres.batch_norm_act_backward_reduce``.

    Raises:
        RuntimeError: tensors that do not fit together.
    """
    check(x, (dy,), (weight, bias))
    check_saved(x, stats, mask)
    norm = SavedNorm(x, weight, bias, stats, True, False, need_affine)
    channels = x.size(1)
    sums = x.new_empty(2 * channels + 1, dtype=torch.float64)
    if not x.numel():
        return sums.zero_(), norm.dweight.zero_(), norm.dbias.zero_()
    with torch.cuda.device_of(x):
        plan = reduce_plan(x)
        partial = x.new_empty((2, plan.parts, channels), dtype=wide_dtype(x))
        launch_backward_reduce(laid_out_like(dy, x), [norm], mask, relu, Gradients(), partial, plan)
        _finalise_sums_kernel[(triton.cdiv(channels, BLOCK_C),)](
            partial,
            stats,
            *norm.affine,
            sums,
            channels=channels,
            rows=x.numel() // channels,
            parts=plan.parts,
            BLOCK_P=block_of_parts(plan.parts),
            BLOCK_C=BLOCK_C,
            **launch_options(128),
        )
    return sums, norm.dweight, norm.dbias


def batch_norm_act_backward_apply(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    mask: Tensor | None,
    sums: Tensor,
    relu: bool,
    need_dx: bool,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor]:
    """dx and dresidual, empty where not asked for; as ``torch.ops.fusedres.batch_norm_act_backward_apply``.

    Without dx there is one launch, and sums are not read.

    Raises:
        RuntimeError: tensors that do not fit together.
    """
    check(x, (dy,), (weight, bias))
    check_saved(x, stats, mask)
    if need_dx:
        _check_exchanged(x, "sums", sums, 1)
    norm = SavedNorm(x, weight, bias, stats, True, need_dx, False)
    dresidual = torch.empty_like(x) if need_dresidual else x.new_empty(0)
    if not x.numel() or not (need_dx or need_dresidual):
        return norm.dx, dresidual
    gradients = Gradients(norm.dx if need_dx else None, None, dresidual if need_dresidual else None)
    channels = x.size(1)
    dy = laid_out_like(dy, x)
    with torch.cuda.device_of(x):
        if need_dx:
            coefficients = x.new_empty((2, channels), dtype=wide_dtype(x))
            _coefficients_kernel[(triton.cdiv(channels, COEFFICIENTS),)](
                sums, stats, coefficients, channels=channels, BLOCK=COEFFICIENTS, **launch_options(128)
            )
            launch_backward_apply(dy, [norm], mask, relu, gradients, coefficients)
        else:
            launch_backward_reduce(dy, [norm], mask, relu, gradients, None, reduce_plan(x))
    return norm.dx, dresidual
