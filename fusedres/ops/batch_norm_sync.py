r"""``act(bn(x) + residual)`` with the statistics of a batch that is spread over the processes of a group.

The same formulas as in ``batch_norm_act``, cut where the processes have to meet. Forward::

    statistics   (mean, M2, count) of the own part, per channel                          reads x
    ---- all-gather of 2C + 1 numbers ----
    apply        merges the parts in the order of the ranks, then normalises             reads x, residual; writes out

With ``n_r`` values on rank r and ``n`` in all, ``mean = sum n_r mean_r / n`` and
``M2 = sum M2_r + n_r (mean_r - mean)^2`` (Chan, Golub and LeVeque 1979). Backward, with ``g = dout`` where ``out > 0``,
else 0::

    reduce       sum g and sum g*(x - mean) of the own part; dweight and dbias from them  reads dy, x, mask
    ---- all-reduce of 2C + 1 numbers ----
    apply        dx by the sums of the whole batch; dresidual = g                         reads dy, x, mask; writes both

``dweight`` and ``dbias`` are those of the own part: whoever adds up the gradients of the processes adds up them too.
What travels is float64, so that neither a large mean nor the number of processes costs accuracy, and every process
computes the same bits from what it receives. A part may be empty. Saved for backward is what ``batch_norm_act`` saves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from .batch_norm_act import (
    _DIMS,
    _backward_params,
    _empty_mask,
    _fake_affine_grad,
    _fake_stats,
    _masked,
    _per_channel,
    _reference_normalise,
)
from .layout import is_channels_last, mask_bytes, pack_mask, unpack_mask
from .registry import define, serve
from .traffic import COEFFICIENTS, COUNTER, PARTIALS, STATS, SUMS, Launch, Sizes, Traffic

# ---- reference -------------------------------------------------------------------------------------------------------


def pixels_of(x: Tensor) -> int:
    """Values per channel."""
    return x.size(0) * x.size(2) * x.size(3)


def batch_norm_statistics_reference(x: Tensor) -> Tensor:
    x64 = x.double()
    count = x64.new_full((1,), pixels_of(x))
    if pixels_of(x) == 0:
        return torch.cat([x64.new_zeros(2 * x.size(1)), count])
    mean = x64.mean(_DIMS)
    rest = (x64 - _per_channel(mean)).mean(_DIMS)
    mean = mean + torch.where(rest.isfinite(), rest, 0.0)  # exact for a constant channel
    return torch.cat([mean, (x64 - _per_channel(mean)).square().sum(_DIMS), count])


def merged(partials: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mean, M2 and count of the whole batch from those of its parts, (parts, 2C + 1)."""
    channels = partials.size(1) // 2
    means, m2s, counts = partials.split([channels, channels, 1], 1)
    count = counts.sum()
    share = counts / count.clamp(min=1)
    first = means.index_select(0, (counts.squeeze(1) > 0).int().argmax().view(1))
    mean = first + ((means - first) * share).sum(0)  # exact where the parts agree
    mean = torch.where(mean.isfinite(), mean, (means * share).sum(0))
    m2 = m2s + counts * (means - mean).square()
    return mean.view(channels), torch.where(counts > 0, m2, 0.0).sum(0), count


def move_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    partials: Tensor,
) -> None:
    """Move the running statistics, unless there is too little to estimate a variance."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if running_mean is None or running_var is None:
        return
    mean, m2, count = merged(partials)
    factor = momentum if momentum is not None else num_batches_tracked.double().reciprocal()
    unbiased = m2 / (count - 1).clamp(min=1)
    for running, new in ((running_mean, mean), (running_var, unbiased)):
        old = running.double()
        running.copy_(torch.where(count > 1, old * (1 - factor) + new * factor, old))


def merged_statistics(partials: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """:func:`saved_statistics` of all parts of a batch."""
    mean, m2, count = merged(partials)
    return saved_statistics(mean, m2 / count.clamp(min=1), eps, dtype)


def saved_statistics(mean: Tensor, var: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The (3, C) statistics of a normalisation in ``dtype``: mean, rstd and the part of the mean below its digits."""
    high = mean.to(dtype)
    low = torch.where(mean.isfinite(), mean - high.double(), 0.0)
    return torch.stack([high, (var + eps).rsqrt().to(dtype), low.to(dtype)])


def _batch_norm_act_apply_reference(
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
    move_running(running_mean, running_var, num_batches_tracked, momentum, partials)
    stats = merged_statistics(partials, eps, torch.float64 if x.dtype == torch.float64 else torch.float32)
    y = _reference_normalise(x, weight, bias, stats)
    if residual is not None:
        y = y + residual.double()
    out = torch.empty_like(x).copy_(y.relu() if relu else y)
    return out, stats, pack_mask(~(out <= 0)) if save_mask else _empty_mask(x)


def _reference_gradient(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, mask: Tensor | None, relu: bool
) -> Tensor:
    """The gradient that reaches the normalisation, in float64."""
    if mask is not None:
        return torch.where(unpack_mask(mask, x), dy.double(), 0.0)
    if relu:
        return _masked(dy, _reference_normalise(x, weight, bias, stats), x.dtype)
    return dy.double()


def _reference_centred(x: Tensor, stats: Tensor) -> Tensor:
    mean, _, mean_low = stats.double()
    return x.double() - _per_channel(mean) - _per_channel(mean_low)


def _batch_norm_act_backward_reduce_reference(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    mask: Tensor | None,
    relu: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    g = _reference_gradient(dy, x, weight, bias, stats, mask, relu)
    of_g, of_gx = g.sum(_DIMS), (g * _reference_centred(x, stats)).sum(_DIMS)
    sums = torch.cat([of_g, of_gx, of_g.new_full((1,), pixels_of(x))])
    dtype = stats.dtype if weight is None else weight.dtype
    affine = (of_gx * stats[1].double(), of_g) if need_affine else (stats.new_empty(0), stats.new_empty(0))
    return sums, *(v.to(dtype, copy=True) for v in affine)


def _batch_norm_act_backward_apply_reference(
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
    g = _reference_gradient(dy, x, weight, bias, stats, mask, relu)
    dx, dresidual = x.new_empty(0), x.new_empty(0)
    if need_dx:
        channels = x.size(1)
        rstd = stats[1].double()
        of_g, of_gx, count = sums.split([channels, channels, 1])
        inner = (
            g - _per_channel(of_g / count) - _reference_centred(x, stats) * _per_channel(rstd * rstd * of_gx / count)
        )
        scale = rstd if weight is None else rstd * weight.double()
        dx = torch.empty_like(x).copy_(inner * _per_channel(scale))
    if need_dresidual:
        dresidual = torch.empty_like(x).copy_(g)
    return dx, dresidual


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _fake_sums(x: Tensor) -> Tensor:
    return x.new_empty(2 * x.size(1) + 1, dtype=torch.float64)


def _batch_norm_act_apply_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    save_mask = args[-1]
    mask = x.new_empty(mask_bytes(x) if save_mask else 0, dtype=torch.uint8)
    return torch.empty_like(x), _fake_stats(x), mask


def _batch_norm_act_backward_reduce_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    mask: Tensor | None,
    relu: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_sums(x), *(_fake_affine_grad(stats, weight, need_affine) for _ in range(2))


def _batch_norm_act_backward_apply_fake(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty_like(x) if wanted else x.new_empty(0) for wanted in args[-2:])


# ---- ops -------------------------------------------------------------------------------------------------------------


def _triton_batch_norm_statistics() -> Any:
    from ..kernels.batch_norm_sync import batch_norm_statistics

    return batch_norm_statistics


def _triton_batch_norm_act_apply() -> Any:
    from ..kernels.batch_norm_sync import batch_norm_act_apply

    return batch_norm_act_apply


def _triton_batch_norm_act_backward_reduce() -> Any:
    from ..kernels.batch_norm_sync import batch_norm_act_backward_reduce

    return batch_norm_act_backward_reduce


def _triton_batch_norm_act_backward_apply() -> Any:
    from ..kernels.batch_norm_sync import batch_norm_act_backward_apply

    return batch_norm_act_backward_apply


BATCH_NORM_STATISTICS = define(
    "batch_norm_statistics",
    "(Tensor x) -> Tensor",
    batch_norm_statistics_reference,
    _fake_sums,
    cuda=True,
    triton=_triton_batch_norm_statistics,
)

BATCH_NORM_ACT_APPLY = define(
    "batch_norm_act_apply",
    "(Tensor x, Tensor? residual, Tensor partials, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, bool relu, bool save_mask)"
    " -> (Tensor out, Tensor stats, Tensor mask)",
    _batch_norm_act_apply_reference,
    _batch_norm_act_apply_fake,
    cuda=True,
    triton=_triton_batch_norm_act_apply,
)

BATCH_NORM_ACT_BACKWARD_REDUCE = define(
    "batch_norm_act_backward_reduce",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, Tensor? mask, bool relu, bool need_affine)"
    " -> (Tensor sums, Tensor dweight, Tensor dbias)",
    _batch_norm_act_backward_reduce_reference,
    _batch_norm_act_backward_reduce_fake,
    cuda=True,
    triton=_triton_batch_norm_act_backward_reduce,
)

BATCH_NORM_ACT_BACKWARD_APPLY = define(
    "batch_norm_act_backward_apply",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, Tensor? mask, Tensor sums, bool relu,"
    " bool need_dx, bool need_dresidual) -> (Tensor dx, Tensor dresidual)",
    _batch_norm_act_backward_apply_reference,
    _batch_norm_act_backward_apply_fake,
    cuda=True,
    triton=_triton_batch_norm_act_backward_apply,
)

_OPS = (
    BATCH_NORM_STATISTICS,
    BATCH_NORM_ACT_APPLY,
    BATCH_NORM_ACT_BACKWARD_REDUCE,
    BATCH_NORM_ACT_BACKWARD_APPLY,
)

# ---- traffic ---------------------------------------------------------------------------------------------------------

_EXCHANGED = 8  # bytes of a number that processes exchange
_USED_STATS = 2  # vectors of the saved statistics that a launch over channels reads: rstd, mean_low


def _exchanged(shape: Sequence[int]) -> int:
    """Bytes of what a process sends: two numbers per channel, and the count."""
    return (2 * shape[1] + 1) * _EXCHANGED


def batch_norm_statistics_traffic(
    shape: Sequence[int], dtype: torch.dtype, *, layout: str = "channels_last", tiles: int = 1
) -> Traffic:
    """Bytes of the statistics of a part; arguments as in :func:`~.batch_norm_act.batch_norm_act_traffic`."""
    s, sent = Sizes(shape, dtype, layout), _exchanged(shape)
    partials = PARTIALS * s.wide * tiles
    return Traffic(s.x + sent, (Launch("statistics", s.x, partials), Launch("finalise", partials, sent)))


def batch_norm_act_apply_traffic(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    layout: str = "channels_last",
    residual: bool = False,
    relu: bool = True,
    save_mask: bool | None = None,
    affine: bool = True,
    running: bool = True,
    counter: bool = False,
    param_dtype: torch.dtype | None = None,
    parts: int = 1,
) -> Traffic:
    """Bytes of the forward from the statistics of all parts.

    Args:
        parts: how many there are.
        The others: as in :func:`~.batch_norm_act.batch_norm_act_traffic`.
    """
    s = Sizes(shape, dtype, layout, param_dtype)
    mask = s.mask if (relu and residual if save_mask is None else save_mask) else 0
    received, params = parts * _exchanged(shape), 2 * s.param * affine
    moved, stats = 2 * s.param * running + COUNTER * counter, STATS * s.wide
    inputs, outputs = (1 + residual) * s.x, s.x + mask
    return Traffic(
        received + moved + inputs + params + moved + stats + outputs,
        (Launch("merge", received + moved, moved + stats), Launch("apply", inputs + params + stats, outputs)),
    )


def batch_norm_act_backward_reduce_traffic(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    layout: str = "channels_last",
    mask: bool = False,
    relu: bool = True,
    affine: bool = True,
    need_affine: bool | None = None,
    param_dtype: torch.dtype | None = None,
    tiles: int = 1,
) -> Traffic:
    """Bytes of the backward's sums of a part.

    Args:
        mask: whether there is one; without, the sign of the activation is recomputed.
        The others: as in :func:`~.batch_norm_act.batch_norm_act_backward_traffic`.
    """
    s, sent = Sizes(shape, dtype, layout, param_dtype), _exchanged(shape)
    need_affine = affine if need_affine is None else need_affine
    params = _backward_params(s, affine, relu and not mask, False)
    inputs, partials, stats = 2 * s.x + mask * s.mask, SUMS * s.wide * tiles, STATS * s.wide
    gradients = 2 * need_affine * (s.param if affine else s.wide)
    return Traffic(
        inputs + params + stats + sent + gradients,
        (
            Launch("reduce", inputs + params + stats, partials),
            Launch("finalise", partials + _USED_STATS * s.wide, sent + gradients),
        ),
    )


def batch_norm_act_backward_apply_traffic(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    layout: str = "channels_last",
    mask: bool = False,
    relu: bool = True,
    affine: bool = True,
    need_dx: bool = True,
    need_dresidual: bool | None = None,
    param_dtype: torch.dtype | None = None,
) -> Traffic:
    """Bytes of the backward from the sums of all parts; arguments as in the other two."""
    s = Sizes(shape, dtype, layout, param_dtype)
    need_dresidual = mask if need_dresidual is None else need_dresidual
    recomputes = relu and not mask
    inputs = (1 + (need_dx or recomputes)) * s.x + mask * s.mask
    params, stats = _backward_params(s, affine, recomputes, need_dx), STATS * s.wide
    outputs = (need_dx + need_dresidual) * s.x
    if not need_dx:
        return Traffic(inputs + params + stats + outputs, (Launch("apply", inputs + params + stats, outputs),))
    received, coefficients = _exchanged(shape), COEFFICIENTS * s.wide
    return Traffic(
        inputs + params + stats + received + outputs,
        (
            Launch("coefficients", received + _USED_STATS * s.wide + affine * s.param, coefficients),
            Launch("apply", inputs + params + stats + coefficients, outputs),
        ),
    )


# ---- across processes ------------------------------------------------------------------------------------------------

# Torch 2.13 renamed it; a torch may be built without.
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def gathered(partial: Tensor, group: Any) -> Tensor:
    """The partial statistics of all ranks, (ranks, 2C + 1)."""
    ranks, size = dist.get_world_size(group), partial.size(0)
    out = partial.new_empty(ranks * size)
    _all_gather(out, partial, group)
    return out.view(ranks, size)


def check_count(partials: Tensor) -> None:
    """Every rank sees the same numbers and raises the same error, before anything is written."""
    if not partials.is_cpu or torch.compiler.is_compiling():  # it would have to be waited for, or break the graph
        return
    if partials[:, -1].sum() == 1:
        raise ValueError("Expected more than 1 value per channel when training, got 1 in all processes together")


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Of a 4-D tensor: the one it is dense in, or the nearer one if its strides are neither."""
    strides = x.stride()
    rows = 0 < strides[1] <= min(strides[0], strides[2], strides[3]) and not x.is_contiguous()
    return torch.channels_last if rows or is_channels_last(x) else torch.contiguous_format


def implementations(x: Tensor) -> tuple[Callable[..., Any], ...]:
    """Who serves the four ops for tensors like ``x``: a kernel, or plain ATen where there is none.

    Raises:
        RuntimeError: a forced backend cannot serve.
    """
    return tuple(serve(op, x) or op.reference for op in _OPS)


def sync_batch_norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    relu: bool,
    save_mask: bool,
    group: Any,
    ops: tuple[Callable[..., Any], ...],
    partials: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward: out, statistics and mask. ``partials`` of all processes, where they have been exchanged already."""
    statistics, apply = ops[:2]
    if partials is None:
        partials = gathered(statistics(x), group)
    check_count(partials)
    norm = (weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
    return apply(x, residual, partials, *norm, relu, save_mask)


class _SumOverRanks(Function):
    """The sum of a tensor over the ranks, of which every rank's loss may depend; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, dt: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(dt, ctx.group), None


def differentiable_batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any) -> Tensor:
    """``bn(x)`` in training from ops that autograd can differentiate twice; two collectives where there is a group."""
    if group is None:
        return torch.batch_norm(x, weight, bias, None, None, True, 0.0, eps, False)
    x64 = x.double()
    total = _SumOverRanks.apply(torch.cat([x64.sum(_DIMS), x64.new_full((1,), pixels_of(x))]), group)
    centred = x64 - _per_channel(total[:-1] / total[-1])
    y = centred * _per_channel((_SumOverRanks.apply(centred.square().sum(_DIMS), group) / total[-1] + eps).rsqrt())
    if weight is not None:
        y = y * _per_channel(weight.double())
    return (y if bias is None else y + _per_channel(bias.double())).to(x.dtype)


def differentiable_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    mask: Tensor | None,
    relu: bool,
    eps: float,
    group: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual, dweight, dbias from ATen ops that autograd can differentiate again; used under ``create_graph``.

    The statistics are computed anew, for they depend on ``x``: three collectives.
    """
    g = dy
    if relu:
        with torch.no_grad():
            keep = _reference_gradient(torch.ones_like(dy), x, weight, bias, stats, mask, relu)
        g = dy * keep.to(dy.dtype)
    channels = x.size(1)
    x64, g64 = x.double(), g.double()
    total = torch.cat([x64.sum(_DIMS), x64.new_full((1,), pixels_of(x))])
    total = _SumOverRanks.apply(total, group)
    mean, count = total[:channels] / total[channels:], total[channels:]
    centred = x64 - _per_channel(mean)
    rstd = (_SumOverRanks.apply(centred.square().sum(_DIMS), group) / count + eps).rsqrt()
    dbias, dweight = g64.sum(_DIMS), (g64 * centred).sum(_DIMS) * rstd
    of_g, of_gx = _SumOverRanks.apply(torch.stack([dbias, dweight]), group)
    dx = g64 - _per_channel(of_g / count) - centred * _per_channel(rstd * of_gx / count)
    dx = dx * _per_channel(rstd if weight is None else rstd * weight.double())
    dtype = stats.dtype if weight is None else weight.dtype
    return dx.to(x.dtype), g, dweight.to(dtype), dbias.to(dtype)


class SyncBatchNormActFunction(Function):
    """``act(bn(x) + residual)`` of dense tensors in one memory format, over a process group.

    Arguments after ``bias`` are not differentiable.

    Backward meets the other processes only if ``x`` needs a gradient, which must be so on all of them or on none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float | None,
        eps: float,
        relu: bool,
        group: Any,
        ops: tuple[Callable[..., Any], ...],
        partials: Tensor | None,
    ) -> Tensor:
        save_mask = relu and residual is not None
        norm = (weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
        out, stats, mask = sync_batch_norm_act(x, residual, *norm, relu, save_mask, group, ops, partials)
        ctx.save_for_backward(x, weight, bias, stats, mask if save_mask else None)
        ctx.config = (relu, eps, memory_format_of(x), group, ops)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, stats, mask = ctx.saved_tensors
        relu, eps, memory_format, group, (_, _, reduce, apply) = ctx.config
        # The mask's bits are in the order that x had; a hook that packs saved tensors may have changed it.
        x = x.contiguous(memory_format=memory_format)
        need_dx, need_dresidual, need_dweight, need_dbias = ctx.needs_input_grad[:4]
        need_affine = need_dweight or need_dbias
        if torch.is_grad_enabled():
            dx, g, dweight, dbias = differentiable_backward(dy, x, weight, bias, stats, mask, relu, eps, group)
            grads = (dx, g, dweight, dbias)
            return *(t if need else None for t, need in zip(grads, ctx.needs_input_grad[:4], strict=True)), *(None,) * 9
        saved = (dy.contiguous(memory_format=memory_format), x, weight, bias, stats, mask)
        sums = stats.new_empty(0, dtype=torch.float64)
        dx = dresidual = dweight = dbias = None
        if need_dx or need_affine:
            sums, dweight, dbias = reduce(*saved, relu, need_affine)
        if need_dx:
            dist.all_reduce(sums, group=group)
        if need_dx or (need_dresidual and relu):
            dx, dresidual = apply(*saved, sums, relu, need_dx, need_dresidual and relu)
        if not relu:
            dresidual = dy
        return (
            dx if need_dx else None,
            dresidual if need_dresidual else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            *(None,) * 9,
        )
