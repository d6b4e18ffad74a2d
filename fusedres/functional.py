"""The stateless API: like ``torch.nn.functional``, with the fused kernels underneath.

Every function accepts what its eager composition accepts and raises what that raises. A call goes to the native kernels
where they serve it, and to plain ATen otherwise: other devices, tracers (fx, ``jit.trace``, ONNX, ``torch.export``),
``torch.func`` transforms, forward-mode AD, and shapes for which eager is the faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

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
from .ops.batch_norm_act_max_pool import (
    BATCH_NORM_ACT_MAX_POOL,
    BATCH_NORM_ACT_MAX_POOL_BACKWARD,
    BatchNormActMaxPoolFunction,
)
from .ops.checks import (
    check_act,
    check_addend,
    check_batch_norm,
    check_bool,
    check_max_pool,
    check_not_inference,
    check_tensor,
    pair,
    pooled_size,
)
from .ops.layout import dense, laid_out_like

__all__ = [
    "add_act",
    "batch_norm_act",
    "batch_norm_act_max_pool",
    "batch_norm_add_batch_norm_act",
    "conv_bn_act",
]

_SMALL_ADD = 16 * 1024  # elements; below this the fixed cost of a call decides, and eager's relu(x + residual) has less
_SMALL_NORM = 8 * 1024  # likewise, for batch normalisation
_MOST_TAPS = 255  # elements of a pooling window that the native kernels can number

# What a native op or the way to it raises when it refuses arguments; nothing has been updated then.
_REFUSED = (RuntimeError, TypeError, ValueError, AttributeError)


def _is_traced() -> bool:
    """Whether something records or transforms this call, so that it must see plain ATen ops."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._get_tracing_state() is not None


def _requires_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _natively(op: registry.Op, x: Any, act: str | None) -> bool:
    """Whether a call may go straight to the native CPU op, which checks its arguments itself.

    If it refuses them, the way through the checks says why in words, or finds that eager PyTorch serves the call.
    """
    return (
        op.cpu is not None
        and not registry.forced_elsewhere("cpu")
        and (act == "relu" or act is None)
        and not torch.compiler.is_compiling()
        and not _is_traced()
        # A hook that packs saved tensors may raise after the statistics have moved: no second try then.
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and x.is_cpu
    )


def _distinct(t: Tensor, x: Tensor) -> Tensor:
    """``t``; while compiling a view of it if it is ``x``: Dynamo refuses a Function that is given one tensor twice."""
    return t.view_as(t) if t is x and torch.compiler.is_compiling() else t


def _small_batch_norm(x: Tensor, residual: Tensor | None, norm: tuple[Any, ...]) -> Tensor | None:
    """Eager's batch normalisation of a tensor so small that the cost of a call decides; None where checks are needed.

    The conditions are those under which ``torch.batch_norm`` cannot fail half-way, with one statistic updated.
    """
    weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps = norm
    if not training or x.numel() >= _SMALL_NORM or registry.forced():
        return None
    if weight is None or bias is None or running_mean is None or running_var is None:
        return None
    if residual is not None:
        alike = residual.shape == x.shape and residual.dtype == x.dtype
        if not alike or not residual.is_cpu or residual.layout != torch.strided:
            return None
    n = num_batches_tracked
    if n is not None and (not n.is_cpu or n.dtype != torch.int64 or n.numel() != 1 or n.is_inference()):
        return None
    channels, dtype = x.size(1), weight.dtype
    for v in (weight, bias, running_mean, running_var):
        if v.dim() != 1 or v.numel() != channels or v.dtype != dtype or not v.is_cpu:
            return None
    wrong_dtype = dtype != x.dtype and (dtype != torch.float32 or x.dtype == torch.float64)
    if wrong_dtype or x.dim() != 4 or x.numel() <= channels or type(momentum) is not float or not eps > 0:
        return None
    _check_statistics(training, running_mean, running_var)
    _check_saved(x, weight, bias)
    y = torch.batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps, False)
    if n is not None:
        n.add_(1)
    return y


def _check_saved(x: Tensor, *others: Tensor | None) -> None:
    """Before the kernels run: a tensor that autograd could not save would fail after the statistics have moved."""
    if x.is_inference() or any(t is not None and t.is_inference() for t in others):
        raise RuntimeError("inference tensors cannot be saved for backward")


def _check_statistics(training: Any, *statistics: Tensor | None) -> None:
    """What the native ops cannot see."""
    if training is not True and training is not False:
        raise TypeError("training must be bool")
    for t in statistics:
        if t is not None and t.requires_grad:
            raise RuntimeError("statistics are not differentiable")


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
    tensors = (x, running_mean, running_var, weight, bias, residual, num_batches_tracked)
    if has_torch_function(tensors):
        return handle_torch_function(
            batch_norm_act,
            tensors,
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
    norm = (weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps)
    try:
        if _natively(BATCH_NORM_ACT, x, act):
            y = _small_batch_norm(x, residual, norm)
            if y is not None:
                y = y if residual is None else y + residual
                return y.relu_() if act == "relu" else y
            return _batch_norm_act(x, residual, norm, act, BATCH_NORM_ACT.cpu, BATCH_NORM_ACT_BACKWARD.cpu)
    except _REFUSED:
        pass

    check_act(act)
    check_batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    if residual is not None:
        check_addend("residual", residual, x)
    op = None if _is_traced() or x.dim() != 4 or x.numel() == 0 else registry.serve(BATCH_NORM_ACT, x)
    if op is None:
        check_not_inference({"x": x, "weight": weight})
        y = eager_batch_norm(x, *norm)
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
    return _batch_norm_act(x, residual, norm, act, op, registry.serve(BATCH_NORM_ACT_BACKWARD, x))


def _batch_norm_act(
    x: Tensor, residual: Tensor | None, norm: tuple[Any, ...], act: str | None, op: Any, backward_op: Any
) -> Tensor:
    """The fused op, or its Function where a gradient will be wanted; ``norm`` as the op's schema has it."""
    weight, bias, running_mean, running_var, _, training = norm[:6]
    _check_statistics(training, running_mean, running_var)
    x = dense(x)
    if residual is not None:
        residual = _distinct(laid_out_like(residual, x), x)
    if not _requires_grad(x, residual, weight, bias):
        return op(x, residual, *norm, act == "relu", False)[0]
    if not torch.compiler.is_compiling():
        _check_saved(x, weight, bias)
    return BatchNormActFunction.apply(x, residual, *norm, act == "relu", op, backward_op)


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
    first = (weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps)
    second = (weight2, bias2, running_mean2, running_var2, num_batches_tracked2, training2, momentum2, eps2)
    tensors = (x, x2, *first[:5], *second[:5])
    if has_torch_function(tensors):
        return handle_torch_function(
            batch_norm_add_batch_norm_act,
            tensors,
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
    try:
        if _natively(BATCH_NORM_ADD_BATCH_NORM_ACT, x, act):
            backward_op = BATCH_NORM_ADD_BATCH_NORM_ACT_BACKWARD.cpu
            return _batch_norm_add_batch_norm_act(
                x, first, x2, second, act, BATCH_NORM_ADD_BATCH_NORM_ACT.cpu, backward_op
            )
    except _REFUSED:
        pass

    check_act(act)
    check_batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    check_batch_norm(
        x2, running_mean2, running_var2, weight2, bias2, training2, momentum2, eps2, num_batches_tracked2, suffix="2"
    )
    check_addend("x2", x2, x)
    unfused = _is_traced() or x.dim() != 4 or x.numel() == 0 or x2.shape != x.shape or x2.dtype != x.dtype
    if torch.compiler.is_compiling():  # Dynamo refuses a Function that is given one tensor twice
        unfused = unfused or any(b is not None and b is a for a, b in zip(first[:5], second[:5], strict=True))
    op = None if unfused else registry.serve(BATCH_NORM_ADD_BATCH_NORM_ACT, x)
    if op is None:
        check_not_inference({"x": x, "weight": weight, "x2": x2, "weight2": weight2})
        return _activated(eager_batch_norm(x, *first) + eager_batch_norm(x2, *second), act)

    check_not_inference({"x": x, "weight": weight, "bias": bias, "x2": x2, "weight2": weight2, "bias2": bias2})
    backward_op = registry.serve(BATCH_NORM_ADD_BATCH_NORM_ACT_BACKWARD, x)
    return _batch_norm_add_batch_norm_act(x, first, x2, second, act, op, backward_op)


def _batch_norm_add_batch_norm_act(
    x: Tensor, first: tuple[Any, ...], x2: Tensor, second: tuple[Any, ...], act: str | None, op: Any, backward_op: Any
) -> Tensor:
    """The fused op, or its Function where a gradient will be wanted."""
    _check_statistics(first[5], *first[2:4], *second[2:4])
    _check_statistics(second[5])
    x = dense(x)
    x2 = _distinct(laid_out_like(x2, x), x)
    arguments = (x, *first, x2, *second, act == "relu")
    saved = (*first[:2], x2, *second[:2])
    if not _requires_grad(x, *saved):
        return op(*arguments)[0]
    if not torch.compiler.is_compiling():
        _check_saved(x, *saved)
    return BatchNormAddBatchNormActFunction.apply(*arguments, op, backward_op)


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
    tensors = (x, running_mean, running_var, weight, bias, num_batches_tracked)
    if has_torch_function(tensors):
        return handle_torch_function(
            batch_norm_act_max_pool,
            tensors,
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
    kernel = pair("kernel_size", kernel_size)
    window = (
        kernel,
        kernel if stride is None else pair("stride", stride),
        pair("padding", padding),
        pair("dilation", dilation),
    )
    norm = (weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps)
    try:
        if _natively(BATCH_NORM_ACT_MAX_POOL, x, act):
            check_bool("ceil_mode", ceil_mode)
            backward_op = BATCH_NORM_ACT_MAX_POOL_BACKWARD.cpu
            return _batch_norm_act_max_pool(
                x, norm, act, (*window, ceil_mode), BATCH_NORM_ACT_MAX_POOL.cpu, backward_op
            )
    except _REFUSED:
        pass

    check_act(act)
    check_batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    check_bool("ceil_mode", ceil_mode)
    check_max_pool(x, *window, ceil_mode)
    op = registry.serve(BATCH_NORM_ACT_MAX_POOL, x)
    if x.size(2) < window[3][0] or x.size(3) < window[3][1]:
        y = _activated(eager_batch_norm(x, *norm), act)
        return _max_pool_of_padding(y, *window, ceil_mode)
    if op is None or kernel[0] * kernel[1] > _MOST_TAPS or _is_traced() or x.numel() == 0:
        check_not_inference({"x": x, "weight": weight})
        return F.max_pool2d(_activated(eager_batch_norm(x, *norm), act), *window, ceil_mode)

    check_not_inference({"x": x, "weight": weight, "bias": bias})
    backward_op = registry.serve(BATCH_NORM_ACT_MAX_POOL_BACKWARD, x)
    return _batch_norm_act_max_pool(x, norm, act, (*window, ceil_mode), op, backward_op)


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
    x: Tensor, norm: tuple[Any, ...], act: str | None, window: tuple[Any, ...], op: Any, backward_op: Any
) -> Tensor:
    """The fused op, or its Function where a gradient will be wanted."""
    weight, bias, running_mean, running_var, _, training = norm[:6]
    _check_statistics(training, running_mean, running_var)
    x = dense(x)
    if not _requires_grad(x, weight, bias):
        return op(x, *norm, act == "relu", *window)[0]
    if not torch.compiler.is_compiling():
        _check_saved(x, weight, bias)
    return BatchNormActMaxPoolFunction.apply(x, *norm, act == "relu", window, op, backward_op)


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
    plain = type(x) is Tensor and type(residual) is Tensor and act == "relu" and not registry.forced()
    small = plain and x.numel() < _SMALL_ADD and x.is_floating_point()
    if small and x.dtype == residual.dtype and x.shape == residual.shape:
        return (x + residual).relu_()
    if has_torch_function((x, residual)):
        return handle_torch_function(add_act, (x, residual), x, residual, act=act)
    check_act(act)
    op = _fused_add(x, residual, act)
    if op is None:
        _check_add(x, residual)
        return _activated(x + residual, act)
    if not _requires_grad(x, residual):
        return op(x, residual, True, False)[0]
    return AddActFunction.apply(x, _distinct(residual, x), op, registry.serve(ADD_ACT_BACKWARD, x))


def _check_add(x: Any, residual: Any) -> None:
    for name, value in (("x", x), ("residual", residual)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, but got {type(value).__name__}")
        if value.is_complex() or value.layout != torch.strided:
            raise NotImplementedError(f"{name} must be a dense real tensor, but got {value.dtype}, {value.layout}")
    check_addend("residual", residual, x)


def _fused_add(x: Any, residual: Any, act: str | None) -> Any:
    """The op that serves this addition, or None where it is eager's."""
    if not isinstance(x, Tensor) or not isinstance(residual, Tensor) or act is None or _is_traced():
        return None
    if x.shape != residual.shape or x.dtype != residual.dtype or x.device != residual.device or x.numel() == 0:
        return None
    if x.layout != torch.strided or residual.layout != torch.strided or not x.is_floating_point():
        return None
    is_dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    if x.stride() != residual.stride() or not is_dense:
        return None
    op = registry.serve(ADD_ACT, x)
    return op if registry.forced() or x.numel() >= _SMALL_ADD else None


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
