"""The stateless API: like ``torch.nn.functional``, with the fused kernels underneath.

Every function accepts what its eager composition accepts and raises what that raises. A call goes to the native kernels
where they serve it, and to plain ATen otherwise: other devices, tracers (fx, ``jit.trace``, ONNX, ``torch.export``),
``torch.func`` transforms, forward-mode AD, and shapes for which eager is the faster.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .ops import registry
from .ops.add_act import ADD_ACT, ADD_ACT_BACKWARD, AddActFunction
from .ops.batch_norm_act import (
    BATCH_NORM_ACT,
    BATCH_NORM_ACT_BACKWARD,
    BATCH_NORM_ADD_BATCH_NORM_ACT,
    BATCH_NORM_ADD_BATCH_NORM_ACT_BACKWARD,
    BatchNormActFunction,
    BatchNormAddBatchNormActFunction,
    eager_batch_norm,
)
from .ops.batch_norm_act_conv import BatchNormActConvFunction, Convolution, Norm, passes
from .ops.batch_norm_act_max_pool import (
    BATCH_NORM_ACT_MAX_POOL,
    BATCH_NORM_ACT_MAX_POOL_BACKWARD,
    BatchNormActMaxPoolFunction,
)
from .ops.batch_norm_sync import memory_format_of
from .ops.checks import (
    check_act,
    check_addend,
    check_batch_norm,
    check_bool,
    check_conv1x1,
    check_max_pool,
    check_not_inference,
    check_tensor,
    pair,
    pooled_size,
)
from .ops.conv1x1_bn_act import (
    Conv1x1BNActFunction,
    Conv1x1BNAddConv1x1BNActFunction,
    Input,
    folded_forward,
)
from .ops.folded_call import Conv1x1, can_move, checked_moments, folding_ops_for
from .ops.folding import FoldingDecision, folding_asked
from .ops.layout import dense
from .ops.tracing import autocast_dtype, is_traced, wants_gradients

__all__ = [
    "add_act",
    "batch_norm_act",
    "batch_norm_act_conv",
    "batch_norm_act_max_pool",
    "batch_norm_add_batch_norm_act",
    "conv1x1_bn_act",
    "conv1x1_bn_add_conv1x1_bn_act",
    "conv_bn_act",
]

# Elements below which ATen's own kernels serve on a CPU, for there the fixed cost of a call decides. As measured: of a
# channels_last tensor and of a contiguous one, without a residual and with one, for forward and backward together.
_SMALL_TRAINING = ((4 * 1024, 10 * 1024), (0, 4 * 1024))
_SMALL_EVALUATION = ((12 * 1024, 24 * 1024), (4 * 1024, 12 * 1024))
_SMALL_POOL = 24 * 1024  # of a contiguous tensor only
_SMALL_ADD = 8 * 1024  # of any dtype
_SMALL_WIDE_ADD = 256 * 1024  # of more than 16 bits: from a CPU's caches ATen's two passes are as fast as one
_WINDOW = ("kernel_size", "stride", "padding", "dilation")
_MOST_TAPS = 255  # elements of a pooling window that the native kernels can number

# What a native op or the way to it raises when it refuses arguments; nothing has been updated then.
_REFUSED = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)
# RuntimeErrors that are no matter of arguments. After them there is no second try: memory would run out again, and a
# device that failed may have moved the statistics.
_FAILED = (torch.OutOfMemoryError, torch.AcceleratorError)

_ONE = torch.ones((), dtype=torch.int64, device="cpu")  # adding a tensor costs less than adding a number

_functorch_is_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead


def _is_plain(act: str | None) -> bool:
    """Whether a call may run at once, unchecked: nothing records or transforms it.

    If what it runs refuses the arguments, the way through the checks says why in words, or finds what serves the call.
    """
    return (
        not is_compiling()
        and not _functorch_is_active()
        and forward_ad._current_level < 0
        and _tracing_state() is None
        # One that packs saved tensors may raise after the statistics have moved: no second try then.
        and _saved_tensors_hooks(False) is None
        and (act == "relu" or act is None)
    )


def _aten_batch_norm(
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
) -> Tensor | None:
    """``torch.batch_norm`` of a plain call, the counter, the residual; None where checks are needed.

    They are where something might fail after something else was updated. What ATen checks before it writes is not
    checked here: sizes, and that the dtypes of ``weight`` and the statistics go with that of ``x``.
    """
    if (weight is not None and weight.dim() != 1) or (bias is not None and bias.dim() != 1):
        return None
    if residual is not None and (residual.dtype is not x.dtype or residual.layout is not torch.strided):
        return None
    if training is False:
        if not eps >= 0:
            return None
        y = torch.batch_norm(x, weight, bias, running_mean, running_var, False, momentum, eps, False)
        return y if residual is None else y.add_(residual)
    if training is not True or type(momentum) is not float or not eps > 0:
        return None
    if running_mean is None or running_var is None:
        if running_mean is not running_var or x.numel() <= x.size(1):
            return None
    elif (
        x.numel() <= running_mean.numel()
        or not running_var.is_cpu
        or (weight is not None and not weight.is_cpu)
        or (bias is not None and (not bias.is_cpu or bias.dtype is not running_mean.dtype))
    ):
        return None
    if residual is not None and (residual.shape != x.shape or not residual.is_cpu):
        return None
    n = num_batches_tracked
    if n is not None and (n.dtype is not torch.int64 or n.numel() != 1 or not n.is_cpu or n.is_inference()):
        return None
    y = torch.batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps, False)
    if n is not None:
        n.add_(_ONE)
    return y if residual is None else y.add_(residual)


def _distinct(t: Tensor, x: Tensor) -> Tensor:
    """``t``; while compiling a view of it if it is ``x``: Dynamo refuses a Function that is given one tensor twice."""
    return t.view_as(t) if t is x and is_compiling() else t


def _applied(function: type[Function]) -> Any:
    """``function.apply`` without what it does, in Python and for 2 us, for transforms that are not active here.

    A tensor that leaked from one still has to go through ``_unwrap_if_dead``.
    """
    return super(Function, function).apply


def _check_saved(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Before the kernels run: a tensor that autograd could not save would fail after the statistics have moved.

    It is an inference tensor, and reading its version is the cheapest way to have it refused.
    """
    x._version  # noqa: B018
    if weight is not None:
        weight._version  # noqa: B018
    if bias is not None:
        bias._version  # noqa: B018


def _check_statistics(training: Any, running_mean: Tensor | None, running_var: Tensor | None) -> None:
    """What the native ops cannot see."""
    if training is not True and training is not False:
        raise TypeError("training must be bool")
    if (running_mean is not None and running_mean.requires_grad) or (
        running_var is not None and running_var.requires_grad
    ):
        raise RuntimeError("statistics are not differentiable")


_APPLY_NORM = _applied(BatchNormActFunction)
_APPLY_PAIR = _applied(BatchNormAddBatchNormActFunction)
_APPLY_POOL = _applied(BatchNormActMaxPoolFunction)
_APPLY_ADD = _applied(AddActFunction)
_APPLY_FOLDED = _applied(Conv1x1BNActFunction)
_APPLY_FOLDED_PAIR = _applied(Conv1x1BNAddConv1x1BNActFunction)


@functools.lru_cache(maxsize=64)
def _pools(
    kernel: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int | tuple[int, int],
    batch: int,
    channels: int,
    height: int,
    width: int,
) -> bool:
    """Whether ATen pools by these windows: they fit, and none may lie in the padding altogether."""
    pairs = (v if isinstance(v, tuple) else (v, v) for v in (kernel, stride, padding, dilation))
    for size, k, s, p, d in zip((height, width), *pairs, strict=True):
        if not 1 <= min(k, s, d) <= max(k, s) < 2**31 or not 0 <= p <= ((k - 1) * d + 1) // 2 or d > size:
            return False
        if pooled_size(size, k, s, p, d, False) < 1:
            return False
    return channels > 0


def _activated(y: Tensor, act: str | None) -> Tensor:
    return torch.relu(y) if act == "relu" else y


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    act: str | None = "relu",
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    r"""Batch normalisation, residual addition and activation: ``act(batch_norm(x) + residual)``.

    Args:
        x: (N, C, H, W), contiguous or channels_last (other strides are copied once; other ranks run as eager PyTorch);
            float32, float64, or bfloat16/float16 with float32 parameters and statistics, or all in one dtype.
        running_mean, running_var: (C,), updated in place when training; None uses the batch's statistics only.
        weight, bias: (C,) or None.
        residual: added before the activation. The shape and dtype of ``x`` is the fused case; anything that
            broadcasts or promotes in ``batch_norm(x) + residual`` works as it does there.
        training: normalise by the batch (and update the running statistics) instead of by the running statistics.
        momentum: weight of the new statistics; None, with ``num_batches_tracked``, means a cumulative average.
        eps: added to the variance.
        act: ``"relu"`` or None.
        num_batches_tracked: int64 counter, incremented in place when training.

    Returns:
        The shape, dtype and memory format of ``x``.

    Raises:
        TypeError: an argument of the wrong type; ``momentum=None`` without a counter.
        ValueError: ``eps``, ``act``, only one running statistic, or one value per channel in training.
        NotImplementedError: ``x`` that is integer, bool, complex, sparse or quantized.
        RuntimeError: wrong sizes, dtypes or devices. Nothing has been updated when an error is raised.

    The formula is that of :func:`torch.nn.functional.batch_norm`; see ``fusedres/ops/batch_norm_act.py``.
    """
    if has_torch_function_variadic(x, running_mean, running_var, weight, bias, residual, num_batches_tracked):
        return handle_torch_function(
            batch_norm_act,
            (x, running_mean, running_var, weight, bias, residual, num_batches_tracked),
            x,
            running_mean,
            running_var,
            weight,
            bias,
            residual,
            training=training,
            momentum=momentum,
            eps=eps,
            act=act,
            num_batches_tracked=num_batches_tracked,
        )
    try:
        if _is_plain(act):
            numel = x.numel()
            small, small_contiguous = (_SMALL_TRAINING if training else _SMALL_EVALUATION)[residual is not None]
            if (
                (numel < small or (numel < small_contiguous and not x.is_contiguous(memory_format=torch.channels_last)))
                and x.is_cpu
                and not registry.forced()
            ):
                y = _aten_batch_norm(
                    x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps
                )
                if y is not None:
                    return y if act is None else y.relu_()
            native = registry.native_ops(BATCH_NORM_ACT, BATCH_NORM_ACT_BACKWARD, x)
            if native is not None:
                op, backward_op = native
                statistics = (running_mean, running_var, num_batches_tracked, training, momentum, eps)
                return _batch_norm_act(x, residual, weight, bias, statistics, act == "relu", op, backward_op)
    except _FAILED:
        raise
    except _REFUSED:
        pass

    check_act(act)
    check_batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    if residual is not None:
        check_addend("residual", residual, x)
    op = None if is_traced() or x.dim() != 4 or x.numel() == 0 else registry.serve(BATCH_NORM_ACT, x)
    if op is None:
        check_not_inference({"x": x, "weight": weight})
        y = eager_batch_norm(x, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps)
        return _activated(y if residual is None else y + residual, act)
    if residual is not None and (residual.dtype != x.dtype or residual.shape != x.shape):
        y = batch_norm_act(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            training=training,
            momentum=momentum,
            eps=eps,
            act=None,
            num_batches_tracked=num_batches_tracked,
        )
        return _activated(y + residual, act)

    check_not_inference({"x": x, "weight": weight, "bias": bias})
    statistics = (running_mean, running_var, num_batches_tracked, training, momentum, eps)
    backward_op = registry.serve(BATCH_NORM_ACT_BACKWARD, x)
    return _batch_norm_act(x, residual, weight, bias, statistics, act == "relu", op, backward_op)


def _batch_norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Any, ...],
    relu: bool,
    op: Any,
    backward_op: Any,
) -> Tensor:
    """The fused op, or its Function where a gradient will be wanted; ``statistics`` as the Function has them."""
    _check_statistics(statistics[3], statistics[0], statistics[1])
    x, memory_format = dense(x)
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format)
    if not torch.is_grad_enabled() or not (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return op(x, residual, weight, bias, *statistics, relu, False)[0]
    config = (statistics, relu, memory_format, op, backward_op)
    if is_compiling():
        return BatchNormActFunction.apply(x, None if residual is None else _distinct(residual, x), weight, bias, config)
    _check_saved(x, weight, bias)
    return _APPLY_NORM(
        _unwrap_if_dead(x),
        residual if residual is None else _unwrap_if_dead(residual),
        weight if weight is None else _unwrap_if_dead(weight),
        bias if bias is None else _unwrap_if_dead(bias),
        config,
    )


def batch_norm_add_batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    x2: Tensor,
    running_mean2: Tensor | None,
    running_var2: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    *,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    training2: bool | None = None,
    momentum2: float | None | str = "same",
    eps2: float | None = None,
    act: str | None = "relu",
    num_batches_tracked: Tensor | None = None,
    num_batches_tracked2: Tensor | None = None,
) -> Tensor:
    r"""The tail of a block with a projection shortcut: ``act(batch_norm(x) + batch_norm(x2))``.

    Args:
        x, x2: (N, C, H, W), as in :func:`batch_norm_act`. The same shape and dtype is the fused case; otherwise the
            sum broadcasts and promotes as in eager PyTorch.
        running_mean .. bias, running_mean2 .. bias2: (C,) or None, for each.
        training, momentum, eps, num_batches_tracked: of the first; those ending in 2, of the second. ``training2``,
            ``momentum2`` and ``eps2`` default to the first's.
        act: ``"relu"`` or None.

    Returns:
        The shape, dtype and memory format of ``x``.

    Raises:
        As :func:`batch_norm_act`; arguments of the second are named with a 2.
    """
    training2 = training if training2 is None else training2
    momentum2 = momentum if momentum2 == "same" else momentum2
    eps2 = eps if eps2 is None else eps2
    if has_torch_function_variadic(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        num_batches_tracked,
        x2,
        running_mean2,
        running_var2,
        weight2,
        bias2,
        num_batches_tracked2,
    ):
        return handle_torch_function(
            batch_norm_add_batch_norm_act,
            (
                x,
                running_mean,
                running_var,
                weight,
                bias,
                num_batches_tracked,
                x2,
                running_mean2,
                running_var2,
                weight2,
                bias2,
                num_batches_tracked2,
            ),
            x,
            running_mean,
            running_var,
            weight,
            bias,
            x2,
            running_mean2,
            running_var2,
            weight2,
            bias2,
            training=training,
            momentum=momentum,
            eps=eps,
            training2=training2,
            momentum2=momentum2,
            eps2=eps2,
            act=act,
            num_batches_tracked=num_batches_tracked,
            num_batches_tracked2=num_batches_tracked2,
        )
    statistics = (running_mean, running_var, num_batches_tracked, training, momentum, eps)
    statistics2 = (running_mean2, running_var2, num_batches_tracked2, training2, momentum2, eps2)
    try:
        if _is_plain(act):
            native = registry.native_ops(BATCH_NORM_ADD_BATCH_NORM_ACT, BATCH_NORM_ADD_BATCH_NORM_ACT_BACKWARD, x)
            if native is not None:
                op, backward_op = native
                return _batch_norm_add_batch_norm_act(
                    x, weight, bias, statistics, x2, weight2, bias2, statistics2, act == "relu", op, backward_op
                )
    except _FAILED:
        raise
    except _REFUSED:
        pass

    check_act(act)
    check_batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    check_batch_norm(
        x2, running_mean2, running_var2, weight2, bias2, training2, momentum2, eps2, num_batches_tracked2, suffix="2"
    )
    check_addend("x2", x2, x)
    unfused = is_traced() or x.dim() != 4 or x.numel() == 0 or x2.shape != x.shape or x2.dtype != x.dtype
    if is_compiling():  # Dynamo refuses a Function that is given one tensor twice
        first = (weight, bias, running_mean, running_var, num_batches_tracked)
        second = (weight2, bias2, running_mean2, running_var2, num_batches_tracked2)
        unfused = unfused or any(b is not None and b is a for a, b in zip(first, second, strict=True))
    op = None if unfused else registry.serve(BATCH_NORM_ADD_BATCH_NORM_ACT, x)
    if op is None:
        check_not_inference({"x": x, "weight": weight, "x2": x2, "weight2": weight2})
        y = eager_batch_norm(x, weight, bias, *statistics)
        return _activated(y + eager_batch_norm(x2, weight2, bias2, *statistics2), act)

    check_not_inference({"x": x, "weight": weight, "bias": bias, "x2": x2, "weight2": weight2, "bias2": bias2})
    backward_op = registry.serve(BATCH_NORM_ADD_BATCH_NORM_ACT_BACKWARD, x)
    return _batch_norm_add_batch_norm_act(
        x, weight, bias, statistics, x2, weight2, bias2, statistics2, act == "relu", op, backward_op
    )


def _batch_norm_add_batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Any, ...],
    x2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    statistics2: tuple[Any, ...],
    relu: bool,
    op: Any,
    backward_op: Any,
) -> Tensor:
    """The fused op, or its Function where a gradient will be wanted."""
    _check_statistics(statistics[3], statistics[0], statistics[1])
    _check_statistics(statistics2[3], statistics2[0], statistics2[1])
    x, memory_format = dense(x)
    x2 = x2.contiguous(memory_format=memory_format)
    if not torch.is_grad_enabled() or not (
        x.requires_grad
        or x2.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (weight2 is not None and weight2.requires_grad)
        or (bias2 is not None and bias2.requires_grad)
    ):
        return op(x, weight, bias, *statistics, x2, weight2, bias2, *statistics2, relu)[0]
    config = (statistics, statistics2, relu, memory_format, op, backward_op)
    if is_compiling():
        return BatchNormAddBatchNormActFunction.apply(x, weight, bias, _distinct(x2, x), weight2, bias2, config)
    _check_saved(x, weight, bias)
    _check_saved(x2, weight2, bias2)
    return _APPLY_PAIR(
        _unwrap_if_dead(x),
        weight if weight is None else _unwrap_if_dead(weight),
        bias if bias is None else _unwrap_if_dead(bias),
        _unwrap_if_dead(x2),
        weight2 if weight2 is None else _unwrap_if_dead(weight2),
        bias2 if bias2 is None else _unwrap_if_dead(bias2),
        config,
    )


def batch_norm_act_max_pool(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kernel_size: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] | None = 2,
    padding: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    act: str | None = "relu",
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    r"""The stem of a ResNet: ``max_pool2d(act(batch_norm(x)))``, without writing the un-pooled activation.

    Args:
        x .. bias, training .. num_batches_tracked: as in :func:`batch_norm_act`; ``x`` is (N, C, H, W).
        kernel_size, stride, padding, dilation, ceil_mode: as in :func:`torch.nn.functional.max_pool2d`; ``stride=None``
            means ``kernel_size``. Ties go where they go there.

    Returns:
        (N, C, H', W') in the dtype and memory format of ``x``.

    Raises:
        As :func:`batch_norm_act`; RuntimeError for a window that does not fit, TypeError for one that is not integer.
    """
    if has_torch_function_variadic(x, running_mean, running_var, weight, bias, num_batches_tracked):
        return handle_torch_function(
            batch_norm_act_max_pool,
            (x, running_mean, running_var, weight, bias, num_batches_tracked),
            x,
            running_mean,
            running_var,
            weight,
            bias,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            ceil_mode=ceil_mode,
            training=training,
            momentum=momentum,
            eps=eps,
            act=act,
            num_batches_tracked=num_batches_tracked,
        )
    window = (kernel_size, stride, padding, dilation)
    if not type(kernel_size) is type(stride) is type(padding) is type(dilation) is int:
        kernel_size = pair("kernel_size", kernel_size)
        stride = kernel_size if stride is None else pair("stride", stride)
        window = (kernel_size, stride, pair("padding", padding), pair("dilation", dilation))
    statistics = (running_mean, running_var, num_batches_tracked, training, momentum, eps)
    try:
        if _is_plain(act) and (ceil_mode is True or ceil_mode is False):
            if (
                x.numel() < _SMALL_POOL
                and not x.is_contiguous(memory_format=torch.channels_last)
                and x.is_cpu
                and not registry.forced()
                and _pools(*window, *x.shape)
                and (y := _aten_batch_norm(x, None, weight, bias, *statistics)) is not None
            ):
                return torch.max_pool2d(y if act is None else y.relu_(), *window, ceil_mode)
            native = registry.native_ops(BATCH_NORM_ACT_MAX_POOL, BATCH_NORM_ACT_MAX_POOL_BACKWARD, x)
            if native is not None:
                op, backward_op = native
                return _batch_norm_act_max_pool(
                    x, weight, bias, statistics, act == "relu", (*window, ceil_mode), op, backward_op
                )
    except _FAILED:
        raise
    except _REFUSED:
        pass

    check_act(act)
    check_batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    check_bool("ceil_mode", ceil_mode)
    window = tuple(pair(name, value) for name, value in zip(_WINDOW, window, strict=True))
    check_max_pool(x, *window, ceil_mode)
    op = registry.serve(BATCH_NORM_ACT_MAX_POOL, x)
    if x.size(2) < window[3][0] or x.size(3) < window[3][1]:
        y = _activated(eager_batch_norm(x, weight, bias, *statistics), act)
        return _max_pool_of_padding(y, *window, ceil_mode)
    if op is None or window[0][0] * window[0][1] > _MOST_TAPS or is_traced() or x.numel() == 0:
        check_not_inference({"x": x, "weight": weight})
        y = _activated(eager_batch_norm(x, weight, bias, *statistics), act)
        return F.max_pool2d(y, *window, ceil_mode)

    check_not_inference({"x": x, "weight": weight, "bias": bias})
    backward_op = registry.serve(BATCH_NORM_ACT_MAX_POOL_BACKWARD, x)
    return _batch_norm_act_max_pool(x, weight, bias, statistics, act == "relu", (*window, ceil_mode), op, backward_op)


def _max_pool_of_padding(
    y: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
) -> Tensor:
    """``max_pool2d`` for windows that may lie in the padding altogether, where ATen's backward writes out of bounds."""
    size = [pooled_size(*args, ceil_mode) for args in zip(y.shape[2:], kernel, stride, padding, dilation, strict=True)]
    padded = F.pad(y, (padding[1], padding[1], padding[0], padding[0]), value=-float("inf"))
    return F.max_pool2d(padded, kernel, stride, 0, dilation, ceil_mode)[:, :, : size[0], : size[1]]


def _batch_norm_act_max_pool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Any, ...],
    relu: bool,
    window: tuple[Any, ...],
    op: Any,
    backward_op: Any,
) -> Tensor:
    """The fused op, or its Function where a gradient will be wanted."""
    _check_statistics(statistics[3], statistics[0], statistics[1])
    x, memory_format = dense(x)
    if not torch.is_grad_enabled() or not (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        return op(x, weight, bias, *statistics, relu, *window)[0]
    config = (statistics, relu, window, memory_format, op, backward_op)
    if is_compiling():
        return BatchNormActMaxPoolFunction.apply(x, weight, bias, config)
    _check_saved(x, weight, bias)
    return _APPLY_POOL(
        _unwrap_if_dead(x),
        weight if weight is None else _unwrap_if_dead(weight),
        bias if bias is None else _unwrap_if_dead(bias),
        config,
    )


def add_act(x: Tensor, residual: Tensor, *, act: str | None = "relu") -> Tensor:
    r"""Residual addition and activation: ``act(x + residual)``.

    Args:
        x, residual: tensors of one shape, dtype and set of dense strides are the fused case; anything else that
            ``x + residual`` accepts runs as eager PyTorch.
        act: ``"relu"`` or None.

    Returns:
        What ``relu(x + residual)`` returns, in the memory format of ``x``.

    Raises:
        TypeError: an argument that is not a tensor. ValueError: ``act``. RuntimeError: shapes that do not broadcast,
        different devices, bool. NotImplementedError: complex or sparse tensors.
    """
    if (
        type(x) is Tensor
        and type(residual) is Tensor
        and act == "relu"
        and not is_compiling()
        and (x.numel() < _SMALL_ADD or (x.numel() < _SMALL_WIDE_ADD and x.element_size() > 2))
        and x.is_cpu
        and residual.layout is torch.strided
        and not registry.forced()
    ):
        try:
            return (x + residual).relu_()
        except RuntimeError:
            pass
    if has_torch_function_variadic(x, residual):
        return handle_torch_function(add_act, (x, residual), x, residual, act=act)
    try:
        if act == "relu" and _is_plain(act):
            native = registry.native_ops(ADD_ACT, ADD_ACT_BACKWARD, x)
            if native is not None:
                op, backward_op = native
                return _add_act(x, residual, op, backward_op)
    except _FAILED:
        raise
    except _REFUSED:
        pass

    check_act(act)
    op = _fused_add(x, residual, act)
    if op is None:
        _check_add(x, residual)
        return _activated(x + residual, act)
    return _add_act(x, residual, op, registry.serve(ADD_ACT_BACKWARD, x))


def _add_act(x: Tensor, residual: Tensor, op: Any, backward_op: Any) -> Tensor:
    """The fused op, or its Function where a gradient will be wanted."""
    if not torch.is_grad_enabled() or not (x.requires_grad or residual.requires_grad):
        return op(x, residual, True, False)[0]
    if is_compiling():
        return AddActFunction.apply(x, _distinct(residual, x), op, backward_op)
    return _APPLY_ADD(_unwrap_if_dead(x), _unwrap_if_dead(residual), op, backward_op)


def _check_add(x: Any, residual: Any) -> None:
    for name, value in (("x", x), ("residual", residual)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, but got {type(value).__name__}")
        if value.is_complex() or value.layout != torch.strided:
            raise NotImplementedError(f"{name} must be a dense real tensor, but got {value.dtype}, {value.layout}")
    check_addend("residual", residual, x)


def _fused_add(x: Any, residual: Any, act: str | None) -> Any:
    """The op that serves this addition, or None where it is eager's."""
    if not isinstance(x, Tensor) or not isinstance(residual, Tensor) or act is None or is_traced():
        return None
    if x.shape != residual.shape or x.dtype != residual.dtype or x.device != residual.device or x.numel() == 0:
        return None
    if x.layout != torch.strided or residual.layout != torch.strided or not x.is_floating_point():
        return None
    is_dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    if x.stride() != residual.stride() or not is_dense:
        return None
    op = registry.serve(ADD_ACT, x)
    limit = _SMALL_WIDE_ADD if x.element_size() > 2 else _SMALL_ADD
    return op if registry.forced() or not x.is_cpu or x.numel() >= limit else None


def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    conv_bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    act: str | None = "relu",
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    r"""Convolution, batch normalisation, residual addition, activation.

    The convolution is the library's; what follows is :func:`batch_norm_act`.

    Args:
        x: (N, C_in, H, W). conv_weight: (C, C_in / groups, kH, kW). conv_bias: (C,) or None.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`.
        The others: as in :func:`batch_norm_act`, over the C channels of the convolution's output.

    Returns:
        (N, C, H', W').

    Raises:
        As :func:`torch.nn.functional.conv2d` and :func:`batch_norm_act`.
    """
    check_tensor("x", x)
    check_tensor("conv_weight", conv_weight)
    check_tensor("conv_bias", conv_bias, optional=True)
    y = F.conv2d(x, conv_weight, conv_bias, stride, padding, dilation, groups)
    return batch_norm_act(
        y,
        running_mean,
        running_var,
        weight,
        bias,
        residual,
        training=training,
        momentum=momentum,
        eps=eps,
        act=act,
        num_batches_tracked=num_batches_tracked,
    )


def batch_norm_act_conv(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    act: str | None = "relu",
    num_batches_tracked: Tensor | None = None,
    process_group: Any = None,
) -> Tensor:
    r"""Batch normalisation, activation, convolution, where backward computes the activation again.

    For the gradients ``x`` is kept, and of the activation nothing: it costs a pass over memory and saves as much memory
    as ``x`` takes. Where nothing is to be kept (evaluation, no gradients), and while traced, compiled or transformed,
    it is :func:`batch_norm_act` and the library's convolution.

    Args:
        conv_weight: (K, C / groups, kH, kW). conv_bias: (K,) or None.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`.
        process_group: of ``torch.distributed``: in training the statistics are those of the batch of all its processes,
            as in :class:`fusedres.SyncBatchNormAct2d`. None: of this process's batch.
        The others: as in :func:`batch_norm_act`.

    Returns:
        (N, K, H', W').

    Raises:
        As :func:`batch_norm_act` and :func:`torch.nn.functional.conv2d`.
    """
    tensors = (x, running_mean, running_var, weight, bias, conv_weight, conv_bias, num_batches_tracked)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            batch_norm_act_conv,
            tensors,
            *tensors[:-1],
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            training=training,
            momentum=momentum,
            eps=eps,
            act=act,
            num_batches_tracked=num_batches_tracked,
            process_group=process_group,
        )
    check_act(act)
    check_batch_norm(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        num_batches_tracked,
        whole_batch=process_group is None,
    )
    check_tensor("conv_weight", conv_weight)
    check_tensor("conv_bias", conv_bias, optional=True)
    convolution = Convolution(pair("stride", stride), pair("padding", padding), pair("dilation", dilation), groups)
    amp = autocast_dtype(x)
    if not isinstance(groups, int):
        raise TypeError(f"groups must be int, but got {type(groups).__name__}")
    if groups < 1 or conv_weight.size(0) % groups:
        raise RuntimeError(f"groups must be positive and divide conv_weight's channels, but got groups={groups}")
    if conv_weight.dim() != x.dim() or (x.dim() == 4 and conv_weight.size(1) * groups != x.size(1)):
        raise RuntimeError(
            f"conv_weight must be (K, C / groups, kH, kW) for x of shape {tuple(x.shape)} and groups={groups}, "
            f"but got shape {tuple(conv_weight.shape)}"
        )
    for name, parameter in (("conv_weight", conv_weight), ("conv_bias", conv_bias)):
        if amp is None and parameter is not None and parameter.dtype != x.dtype:
            raise RuntimeError(f"{name} must have the dtype of x, {x.dtype}, but got {parameter.dtype}")
    keeps = training and wants_gradients(x, weight, bias, conv_weight, conv_bias)
    visible = not is_compiling() and not is_traced() and can_move(running_mean, running_var, num_batches_tracked)
    keeps = keeps and x.dim() == 4 and (x.numel() > 0 or process_group is not None)
    by = passes(x) if keeps and visible else None
    if by is None and process_group is not None:
        raise RuntimeError("process_group is for training with gradients, and not while traced or compiled")
    if by is None:
        y = batch_norm_act(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            training=training,
            momentum=momentum,
            eps=eps,
            act=act,
            num_batches_tracked=num_batches_tracked,
        )
        return convolution(y, conv_weight, conv_bias)
    check_not_inference({"x": x, "weight": weight, "bias": bias, "conv_weight": conv_weight, "conv_bias": conv_bias})
    memory_format = memory_format_of(x)
    x = x.contiguous(memory_format=memory_format)
    dtype = amp or x.dtype
    norm = Norm(running_mean, running_var, num_batches_tracked, momentum, eps, process_group)
    config = (norm, act == "relu", convolution, dtype, memory_format, by)
    return BatchNormActConvFunction.apply(x, weight, bias, conv_weight, conv_bias, config)


def conv1x1_bn_act(
    y: Tensor,
    conv_weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    act: str | None = "relu",
    num_batches_tracked: Tensor | None = None,
    folding: str = "auto",
    decision: FoldingDecision | None = None,
) -> Tensor:
    r"""A 1x1 convolution, batch normalisation, residual addition, activation, in training as one GEMM.

    Folded, the convolution's output is never written: its statistics are computed from the second moments of ``y``, and
    the normalisation goes into the weights. See ``fusedres/ops/conv1x1_bn_act.py`` for the algebra. What cannot be
    folded, or not without a loss of accuracy, is :func:`torch.nn.functional.conv2d` and :func:`batch_norm_act`, with
    the same result: evaluation, fewer than ``4 C`` output pixels, a residual that broadcasts or promotes, tracers and
    ``torch.func`` transforms, devices without kernels.

    Args:
        y: (N, C, H, W), best in channels_last. conv_weight: (K, C, 1, 1), in the dtype of ``y``; under autocast it
            may stay float32, and is then rounded once, together with what is folded into it.
        stride: of the convolution.
        residual: (N, K, H', W'), added before the activation.
        folding: ``"auto"`` folds where that is faster, as far as measured: a channels_last ``y`` on a CPU with few
            channels. ``"always"`` folds wherever it can, for the memory it saves; a ``y`` in another memory format is
            copied once. ``"never"``. The environment's ``FUSEDRES_FOLDING`` is what ``"auto"`` stands for.
        decision: what is kept between the calls of one layer of whether a fold is exact enough, so that not every
            call waits for the device to look, and calls that cannot look (compiled, captured) know; see
            :class:`fusedres.ops.folding.FoldingDecision`. None looks at every call.
        The others: as in :func:`batch_norm_act`, over the K channels of the convolution's output.

    Returns:
        (N, K, H', W') in the dtype of ``y``, channels_last where folded.

    Raises:
        RuntimeError: a kernel that is not 1x1 or has not the channels of ``y``. ValueError: ``folding``.
        The rest as :func:`torch.nn.functional.conv2d` and :func:`batch_norm_act`.
    """
    if has_torch_function_variadic(
        y, conv_weight, running_mean, running_var, weight, bias, residual, num_batches_tracked
    ):
        return handle_torch_function(
            conv1x1_bn_act,
            (y, conv_weight, running_mean, running_var, weight, bias, residual, num_batches_tracked),
            y,
            conv_weight,
            running_mean,
            running_var,
            weight,
            bias,
            residual,
            stride=stride,
            training=training,
            momentum=momentum,
            eps=eps,
            act=act,
            num_batches_tracked=num_batches_tracked,
            folding=folding,
            decision=decision,
        )
    check_act(act)
    folding = folding_asked(folding)
    check_conv1x1(y, conv_weight)
    convolution = Conv1x1(y, conv_weight, stride)
    fits = convolution.fits and can_move(running_mean, running_var, num_batches_tracked)
    fits = fits and (residual is None or convolution.matches(residual))
    ops = folding_ops_for(folding, (convolution,), training is True, fits, decision)
    if ops is not None:
        x = convolution.output()
        check_batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
        check_not_inference({"y": y, "conv_weight": conv_weight, "weight": weight, "bias": bias})
        rows, *moments = convolution.moments(ops)
        known = checked_moments([(convolution, *moments, eps)], decision)
        if known is not None:
            running = (running_mean, running_var, num_batches_tracked, momentum)
            config = (*moments, known[0], running, eps, convolution.stride, act == "relu", ops)
            return conv1x1_bn_act_of_moments(rows, conv_weight, weight, bias, residual, config)
    return batch_norm_act(
        F.conv2d(y, conv_weight, None, stride),
        running_mean,
        running_var,
        weight,
        bias,
        residual,
        training=training,
        momentum=momentum,
        eps=eps,
        act=act,
        num_batches_tracked=num_batches_tracked,
    )


def conv1x1_bn_add_conv1x1_bn_act(
    y: Tensor,
    conv_weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    y2: Tensor,
    conv_weight2: Tensor,
    running_mean2: Tensor | None,
    running_var2: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    *,
    stride: int | tuple[int, int] = 1,
    stride2: int | tuple[int, int] = 1,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    training2: bool | None = None,
    momentum2: float | None | str = "same",
    eps2: float | None = None,
    act: str | None = "relu",
    num_batches_tracked: Tensor | None = None,
    num_batches_tracked2: Tensor | None = None,
    folding: str = "auto",
    decision: FoldingDecision | None = None,
) -> Tensor:
    r"""The tail of a bottleneck with a projection shortcut: ``act(bn(conv(y)) + bn2(conv2(y2)))``, 1x1 convolutions.

    In training one GEMM over the channels of both; neither convolution's output is written. What does not fold is two
    convolutions and :func:`batch_norm_add_batch_norm_act`.

    Args:
        y, conv_weight, stride, folding: as in :func:`conv1x1_bn_act`; ``y2``, ``conv_weight2`` and ``stride2`` are of
            the second, whose output has the shape of the first's.
        The others: as in :func:`batch_norm_add_batch_norm_act`.

    Returns:
        (N, K, H', W') in the dtype of ``y``, channels_last where folded.

    Raises:
        As :func:`conv1x1_bn_act`; arguments of the second are named with a 2.
    """
    training2 = training if training2 is None else training2
    momentum2 = momentum if momentum2 == "same" else momentum2
    eps2 = eps if eps2 is None else eps2
    first = (y, conv_weight, running_mean, running_var, weight, bias)
    second = (y2, conv_weight2, running_mean2, running_var2, weight2, bias2)
    if has_torch_function_variadic(*first, num_batches_tracked, *second, num_batches_tracked2):
        return handle_torch_function(
            conv1x1_bn_add_conv1x1_bn_act,
            (*first, num_batches_tracked, *second, num_batches_tracked2),
            *first,
            *second,
            stride=stride,
            stride2=stride2,
            training=training,
            momentum=momentum,
            eps=eps,
            training2=training2,
            momentum2=momentum2,
            eps2=eps2,
            act=act,
            num_batches_tracked=num_batches_tracked,
            num_batches_tracked2=num_batches_tracked2,
            folding=folding,
            decision=decision,
        )
    check_act(act)
    folding = folding_asked(folding)
    check_conv1x1(y, conv_weight)
    check_conv1x1(y2, conv_weight2, "2")
    both = (Conv1x1(y, conv_weight, stride), Conv1x1(y2, conv_weight2, stride2, "stride2"))
    fits = both[0].fits and both[1].fits and both[0].matches(both[1].output())
    fits = fits and can_move(*first[2:4], num_batches_tracked, *second[2:4], num_batches_tracked2)
    if is_compiling():  # Dynamo refuses a Function that is given one tensor twice
        parameters = zip((*first[1:], num_batches_tracked), (*second[1:], num_batches_tracked2), strict=True)
        fits = fits and not any(b is not None and b is a for a, b in parameters)
    ops = folding_ops_for(folding, both, training is True and training2 is True, fits, decision)
    if ops is not None:
        check_batch_norm(both[0].output(), *first[2:], training, momentum, eps, num_batches_tracked)
        check_batch_norm(both[1].output(), *second[2:], training2, momentum2, eps2, num_batches_tracked2, suffix="2")
        check_not_inference({"y": y, "conv_weight": conv_weight, "weight": weight, "bias": bias})
        check_not_inference({"y2": y2, "conv_weight2": conv_weight2, "weight2": weight2, "bias2": bias2})
        (rows, *moments), (rows2, *moments2) = (c.moments(ops) for c in both)
        known = checked_moments([(both[0], *moments, eps), (both[1], *moments2, eps2)], decision)
        if known is not None:
            running = (running_mean, running_var, num_batches_tracked, momentum)
            running2 = (running_mean2, running_var2, num_batches_tracked2, momentum2)
            of_second = (*moments2, known[1], running2, eps2, both[1].stride)
            config = (*moments, known[0], running, eps, both[0].stride, *of_second, act == "relu", ops)
            of_first, of_second = (rows, conv_weight, weight, bias), (rows2, conv_weight2, weight2, bias2)
            return _conv1x1_bn_add_conv1x1_bn_act(of_first, of_second, config)
    return batch_norm_add_batch_norm_act(
        F.conv2d(y, conv_weight, None, stride),
        *first[2:],
        F.conv2d(y2, conv_weight2, None, stride2),
        *second[2:],
        training=training,
        momentum=momentum,
        eps=eps,
        training2=training2,
        momentum2=momentum2,
        eps2=eps2,
        act=act,
        num_batches_tracked=num_batches_tracked,
        num_batches_tracked2=num_batches_tracked2,
    )


def _unwrapped(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Without the wrappers of transforms that have ended."""
    return tuple(t if t is None else _unwrap_if_dead(t) for t in tensors)


def conv1x1_bn_act_of_moments(
    y: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    config: tuple[Any, ...],
) -> Tensor:
    """:func:`conv1x1_bn_act` after its decision to fold.

    Args:
        y: channels_last, in the dtype of the convolution; residual likewise, in any layout.
        config: as ``Conv1x1BNActFunction`` has it.
    """
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    if not wants_gradients(y, conv_weight, weight, bias, residual):
        *of_branch, relu, ops = config
        return folded_forward((Input(y, conv_weight, weight, bias, *of_branch),), residual, relu, False, ops)[0]
    if is_compiling():
        residual = None if residual is None else _distinct(residual, y)
        return Conv1x1BNActFunction.apply(y, conv_weight, weight, bias, residual, config)
    _check_saved(y, weight, conv_weight)
    return _APPLY_FOLDED(*_unwrapped(y, conv_weight, weight, bias, residual), config)


def _conv1x1_bn_add_conv1x1_bn_act(
    first: tuple[Tensor | None, ...], second: tuple[Tensor | None, ...], config: tuple[Any, ...]
) -> Tensor:
    """The folded op, or its Function where a gradient will be wanted; ``config`` as the Function has it.

    ``first`` and ``second`` are y, conv_weight, weight, bias.
    """
    if not wants_gradients(*first, *second):
        *of_branches, relu, ops = config
        half = len(of_branches) // 2
        inputs = (Input(*first, *of_branches[:half]), Input(*second, *of_branches[half:]))
        return folded_forward(inputs, None, relu, False, ops)[0]
    if is_compiling():
        second = (_distinct(second[0], first[0]), *second[1:])
        return Conv1x1BNAddConv1x1BNActFunction.apply(*first, *second, config)
    _check_saved(*first[:3])
    _check_saved(*second[:3])
    return _APPLY_FOLDED_PAIR(*_unwrapped(*first, *second), config)
