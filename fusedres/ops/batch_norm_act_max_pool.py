"""The stem of a ResNet: ``max_pool(act(bn(x)))``, without the un-pooled activation ever being written.

Forward: the statistics of ``batch_norm_act``, then one pass that normalises and pools. The winner of a window is the
one that ``torch.max_pool2d`` picks from the rounded activations: the first of equals, and the last NaN.

Backward: only ``x`` and the per-channel statistics are saved; the winners are found again from ``x`` by the forward's
own arithmetic. With ``g`` the gradient that the windows send to each pixel (zero where the activation was cut),
dweight, dbias and dx follow as in ``batch_norm_act``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .batch_norm_act import (
    _NORM,
    _backward_params,
    _differentiable_backward,
    _fake_affine_grad,
    _fake_stats,
    _reference_backward,
    _reference_normalise,
    _reference_statistics,
    _statistics_dtype_of,
)
from .checks import pooled_size
from .layout import is_channels_last
from .registry import define
from .traffic import COEFFICIENTS, COUNTER, PARTIALS, STATS, SUMS, Sizes, Traffic, backward_traffic, forward_traffic

Pair = tuple[int, int]


def _activation(x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, relu: bool) -> Tensor:
    """The rounded activation that is pooled, in the dtype and layout of ``x``."""
    y = _reference_normalise(x, weight, bias, stats)
    return torch.empty_like(x).copy_(y.relu() if relu else y)


def _batch_norm_act_max_pool_reference(
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
    stats = _reference_statistics(x, running_mean, running_var, num_batches_tracked, training, momentum, eps)
    pooled = F.max_pool2d(_activation(x, weight, bias, stats, relu), kernel_size, stride, padding, dilation, ceil_mode)
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty(pooled.shape, dtype=x.dtype, device=x.device, memory_format=layout).copy_(pooled), stats


def _batch_norm_act_max_pool_backward_reference(
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
    y = _activation(x, weight, bias, stats, relu)
    window = (kernel_size, stride, padding, dilation, ceil_mode)
    winners = F.max_pool2d(y, *window, return_indices=True)[1]
    g = torch.ops.aten.max_pool2d_with_indices_backward(dy.double(), y.double(), *window, winners)
    if relu:
        g = torch.where(y <= 0, 0.0, g)
    return _reference_backward(g, x, weight, stats, training, need_dx, need_affine)


def _batch_norm_act_max_pool_fake(
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
    size = [
        pooled_size(*args, ceil_mode) for args in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    ]
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    out = torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=layout)
    return out, _fake_stats(x)


def _batch_norm_act_max_pool_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_dx, need_affine = args[-2:]
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dweight, dbias = (_fake_affine_grad(stats, weight, need_affine) for _ in range(2))
    return dx, dweight, dbias


def _triton_batch_norm_act_max_pool() -> Any:
    from ..kernels.batch_norm_act_max_pool import batch_norm_act_max_pool

    return batch_norm_act_max_pool


def _triton_batch_norm_act_max_pool_backward() -> Any:
    from ..kernels.batch_norm_act_max_pool import batch_norm_act_max_pool_backward

    return batch_norm_act_max_pool_backward


_WINDOW = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode"

BATCH_NORM_ACT_MAX_POOL = define(
    "batch_norm_act_max_pool",
    f"(Tensor x, {_NORM.format('', 'a', 'b', 'c')}, bool relu, {_WINDOW}) -> (Tensor out, Tensor stats)",
    _batch_norm_act_max_pool_reference,
    _batch_norm_act_max_pool_fake,
    cuda=True,
    triton=_triton_batch_norm_act_max_pool,
)

BATCH_NORM_ACT_MAX_POOL_BACKWARD = define(
    "batch_norm_act_max_pool_backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, bool training, bool relu,"
    f" {_WINDOW}, bool need_dx, bool need_affine) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _batch_norm_act_max_pool_backward_reference,
    _batch_norm_act_max_pool_backward_fake,
    cuda=True,
    triton=_triton_batch_norm_act_max_pool_backward,
)


def _pooled(shape: Sequence[int], window: tuple[Pair, Pair, Pair, Pair, bool]) -> tuple[int, int, int, int]:
    *sizes, ceil_mode = window
    height, width = (pooled_size(*args, ceil_mode) for args in zip(shape[2:], *sizes, strict=True))
    return (*shape[:2], height, width)


def _covered(shape: Sequence[int], window: tuple[Pair, Pair, Pair, Pair, bool]) -> int:
    """Elements of x that lie in some window; a stride larger than the kernel leaves some out."""
    rows_and_columns = []
    for size, out, kernel, stride, padding, dilation in zip(
        shape[2:], _pooled(shape, window)[2:], *window[:4], strict=True
    ):
        positions = {o * stride - padding + k * dilation for o in range(out) for k in range(kernel)}
        rows_and_columns.append(len(positions & set(range(size))))
    return shape[0] * shape[1] * rows_and_columns[0] * rows_and_columns[1]


_STEM = ((3, 3), (2, 2), (1, 1), (1, 1), False)


def batch_norm_act_max_pool_traffic(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    layout: str = "channels_last",
    training: bool = True,
    relu: bool = True,
    affine: bool = True,
    running: bool = True,
    counter: bool = False,
    cumulative: bool = False,
    param_dtype: torch.dtype | None = None,
    window: tuple[Pair, Pair, Pair, Pair, bool] = _STEM,
    tiles: int = 1,
) -> Traffic:
    """Bytes of the forward; arguments as in :func:`~fusedres.ops.batch_norm_act.batch_norm_act_traffic`.

    Args:
        window: kernel_size, stride, padding, dilation, each a pair, and ceil_mode.
    """
    s = Sizes(shape, dtype, layout, param_dtype)
    return forward_traffic(
        normed=s.x,
        inputs=_covered(shape, window) * dtype.itemsize,
        outputs=Sizes(_pooled(shape, window), dtype, layout).x,
        params=2 * s.param * affine,
        running=2 * s.param * running,
        counters=COUNTER * counter,
        cumulative=cumulative,
        stats=STATS * s.wide,
        partials=PARTIALS * s.wide * tiles,
        training=training,
        form="two_pass",
    )


def batch_norm_act_max_pool_backward_traffic(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    layout: str = "channels_last",
    training: bool = True,
    relu: bool = True,
    affine: bool = True,
    need_dx: bool = True,
    need_affine: bool | None = None,
    param_dtype: torch.dtype | None = None,
    window: tuple[Pair, Pair, Pair, Pair, bool] = _STEM,
    tiles: int = 1,
) -> Traffic:
    """Bytes of the backward; arguments as in :func:`batch_norm_act_max_pool_traffic`. ReLU costs nothing."""
    s = Sizes(shape, dtype, layout, param_dtype)
    need_affine = affine if need_affine is None else need_affine
    return backward_traffic(
        inputs=s.x + Sizes(_pooled(shape, window), dtype, layout).x,
        gradients=need_dx * s.x,
        early=0,
        params=_backward_params(s, affine, True, True),
        stats=STATS * s.wide,
        affine_grads=2 * need_affine * (s.param if affine else s.wide),
        partials=SUMS * s.wide * tiles,
        coefficients=COEFFICIENTS * s.wide,
        training=training,
        form="two_pass",
    )


class BatchNormActMaxPoolFunction(Function):
    """``max_pool(act(bn(x)))`` of a dense tensor; ``window`` is max_pool2d's.

    ``config`` is ``(statistics, relu, window, memory_format, forward_op, backward_op)``, as in
    :class:`~.batch_norm_act.BatchNormActFunction`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        config: tuple[tuple[Any, ...], bool, tuple[Pair, Pair, Pair, Pair, bool], torch.memory_format, Any, Any],
    ) -> Tensor:
        statistics, relu, window, memory_format, forward_op, backward_op = config
        out, stats = forward_op(x, weight, bias, *statistics, relu, *window)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.config = (statistics[3], statistics[5], relu, window, memory_format, backward_op)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, stats = ctx.saved_tensors
        training, eps, relu, window, memory_format, backward_op = ctx.config
        x = x.contiguous(memory_format=memory_format)
        need_dx, need_dweight, need_dbias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            with torch.no_grad():
                y = _activation(x, weight, bias, stats, relu)
                winners = F.max_pool2d(y, *window, return_indices=True)[1]
            g = torch.ops.aten.max_pool2d_with_indices_backward(dy, y, *window, winners)
            if relu:
                g = g * ~(y <= 0)
            saved = _statistics_dtype_of(x, weight, stats)
            dx, dweight, dbias = _differentiable_backward(g, x, weight, saved, training, eps)
        else:
            dx, dweight, dbias = backward_op(
                dy.contiguous(memory_format=memory_format),
                x,
                weight,
                bias,
                stats,
                training,
                relu,
                *window,
                need_dx,
                need_dweight or need_dbias,
            )
        return dx if need_dx else None, dweight if need_dweight else None, dbias if need_dbias else None, None
