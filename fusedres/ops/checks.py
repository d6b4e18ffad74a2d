"""Argument checks: the error eager PyTorch would raise, naming the argument, what it got and what was wanted.

They run before anything is written. On the hot path the C++ ops make the same checks tersely; the functions here then
run only to find the words (see ``registry.native_ops``).
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LOW_PRECISION = (torch.bfloat16, torch.float16)


def _name(value: Any) -> str:
    return type(value).__name__


def check_tensor(name: str, value: Any, *, optional: bool = False) -> None:
    if not isinstance(value, Tensor) and not (optional and value is None):
        raise TypeError(f"{name} must be a Tensor{' or None' if optional else ''}, but got {_name(value)}")


def check_act(act: Any) -> None:
    if act is not None and act != "relu":
        raise ValueError(f'act must be "relu" or None, but got {act!r}')


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be bool, but got {_name(value)}")


def check_real_number(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a float, but got {_name(value)}")


def check_floating(name: str, x: Tensor) -> None:
    if x.layout != torch.strided or x.is_quantized:
        kind = "quantized" if x.is_quantized else str(x.layout)
        raise NotImplementedError(f"{name} must be a dense strided tensor, but got {kind}")
    if x.dtype not in _FLOATING:
        wanted = "float32, bfloat16, float16 or float64"
        raise NotImplementedError(f"{name} must have dtype {wanted}, but got {x.dtype}")


def _check_same_device(x: Tensor, named: dict[str, Tensor | None]) -> None:
    for name, value in named.items():
        if value is not None and value.device != x.device:
            raise RuntimeError(f"{name} must be on the device of x, {x.device}, but got {value.device}")


def check_batch_norm(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    training: bool,
    momentum: Any,
    eps: Any,
    num_batches_tracked: Any = None,
    suffix: str = "",
    whole_batch: bool = True,
) -> None:
    """Check one batch normalisation.

    Args:
        suffix: appended to argument names ("2" for the second of a pair).
        whole_batch: False where other processes have more of it, so that one value per channel may be enough.
    """
    x_name, mean_name, var_name = f"x{suffix}", f"running_mean{suffix}", f"running_var{suffix}"
    weight_name, bias_name, counter_name = f"weight{suffix}", f"bias{suffix}", f"num_batches_tracked{suffix}"
    check_tensor(x_name, x)
    statistics = {mean_name: running_mean, var_name: running_var}
    vectors = {**statistics, weight_name: weight, bias_name: bias}
    for name, value in {**vectors, counter_name: num_batches_tracked}.items():
        check_tensor(name, value, optional=True)
    check_bool(f"training{suffix}", training)
    check_real_number(f"eps{suffix}", eps)
    if momentum is not None or num_batches_tracked is None:
        check_real_number(f"momentum{suffix}", momentum)
    check_floating(x_name, x)
    if x.dim() < 2:
        raise RuntimeError(f"{x_name} must have at least 2 dimensions (N, C, ...), but got shape {tuple(x.shape)}")

    if training:
        if eps <= 0:
            raise ValueError(f"eps{suffix} must be positive during training, but got {eps}")
        if (running_mean is None) != (running_var is None):
            raise ValueError(f"{mean_name} and {var_name} must either both be None or neither be None")
        if whole_batch and x.numel() == x.size(1):
            raise ValueError(
                f"Expected more than 1 value per channel when training, got {x_name} of size {tuple(x.shape)}"
            )
    else:
        if eps < 0:
            raise ValueError(f"eps{suffix} must be non-negative, but got {eps}")
        for name, value in statistics.items():
            if value is None:
                raise RuntimeError(f"{name} must be defined in evaluation mode, but got None")

    channels = x.size(1)
    for name, value in vectors.items():
        if value is None:
            continue
        if value.dim() != 1 or value.numel() != channels:
            raise RuntimeError(
                f"{name} should contain {channels} elements in one dimension, one per channel of {x_name}, "
                f"but got shape {tuple(value.shape)}"
            )
        if value.layout != torch.strided:
            raise NotImplementedError(f"{name} must be a dense strided tensor, but got {value.layout}")
    _check_same_device(x, {**vectors, counter_name: num_batches_tracked})
    for name, value in statistics.items():
        if value is not None and value.requires_grad:
            raise RuntimeError(f"{name} cannot have requires_grad=True: statistics are not differentiable")
    dtypes = {name: value.dtype for name, value in vectors.items() if value is not None}
    mixed = x.dtype in _LOW_PRECISION and torch.float32 in dtypes.values()
    wanted = torch.float32 if mixed else x.dtype
    for name, dtype in dtypes.items():
        if dtype != wanted:
            raise RuntimeError(f"mixed dtype: with {x_name} of {x.dtype}, {name} should be {wanted}, but got {dtype}")
    if num_batches_tracked is not None and (
        num_batches_tracked.dtype != torch.int64 or num_batches_tracked.numel() != 1
    ):
        raise RuntimeError(
            f"{counter_name} must be one int64 value, but got shape {tuple(num_batches_tracked.shape)} "
            f"of {num_batches_tracked.dtype}"
        )


def check_not_inference(named: dict[str, Tensor | None]) -> None:
    """Refuse inference tensors where autograd would have to save them."""
    if torch.compiler.is_compiling():  # there are none in a traced graph
        return
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in named.values()):
        for name, value in named.items():
            if value is not None and value.is_inference():
                raise RuntimeError(f"{name} is an inference tensor, which cannot be saved for backward; clone it first")


def check_addend(name: str, addend: Any, x: Tensor) -> None:
    """Check the second operand of an addition to (a normalisation of) ``x``."""
    check_tensor(name, addend)
    if addend.device != x.device and addend.dim() > 0:
        raise RuntimeError(f"{name} must be on the device of x, {x.device}, but got {addend.device}")
    if addend.layout != torch.strided:
        raise NotImplementedError(f"{name} must be a dense strided tensor, but got {addend.layout}")
    if addend.is_quantized:
        raise NotImplementedError(f"{name} must not be quantized, but got {addend.dtype}")
    if addend.is_complex():
        raise NotImplementedError(f"{name} must be real, but got {addend.dtype}")
    torch.promote_types(x.dtype, addend.dtype)  # raises what the addition would, before anything is written
    if x.shape == addend.shape:
        return
    try:
        torch.broadcast_shapes(x.shape, addend.shape)
    except RuntimeError:
        raise RuntimeError(
            f"{name} must have a shape that broadcasts with x, {tuple(x.shape)}, but got {tuple(addend.shape)}"
        ) from None


def pair(name: str, value: Any) -> tuple[int, int]:
    """An int or a pair of ints, as ``nn.MaxPool2d`` takes them."""
    values = (value, value) if isinstance(value, int) else value
    if not isinstance(values, (tuple, list)) or not all(isinstance(v, int) for v in values):
        raise TypeError(f"{name} must be an int or a pair of ints, but got {value!r}")
    if len(values) == 1:
        values = (values[0], values[0])
    if len(values) != 2:
        raise RuntimeError(f"{name} must be an int or a pair of ints, but got {value!r}")
    return values[0], values[1]


def check_conv1x1(y: Any, conv_weight: Any, suffix: str = "") -> None:
    """Check the operands of a 1x1 convolution, as far as ``torch.conv2d`` does not; ``suffix`` as above."""
    y_name, weight_name = f"y{suffix}", f"conv_weight{suffix}"
    for name, value in ((y_name, y), (weight_name, conv_weight)):
        check_tensor(name, value)
        check_floating(name, value)
        if value.dim() != 4:
            raise RuntimeError(f"{name} must have 4 dimensions, but got shape {tuple(value.shape)}")
    if conv_weight.size(2) != 1 or conv_weight.size(3) != 1 or conv_weight.size(1) != y.size(1):
        raise RuntimeError(
            f"{weight_name} must be (K, C, 1, 1) with the {y.size(1)} channels of {y_name}, "
            f"but got shape {tuple(conv_weight.shape)}"
        )
    if conv_weight.device != y.device:
        raise RuntimeError(f"{weight_name} must be on the device of {y_name}, {y.device}, but got {conv_weight.device}")


def pooled_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Output size of one dimension of a pooling, as ``torch.nn.MaxPool2d`` defines it."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    steps = -(-span // stride) if ceil_mode else span // stride
    # The last window must start inside the input or its left padding.
    if ceil_mode and steps * stride >= size + padding:
        steps -= 1
    return steps + 1


def check_max_pool(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
) -> None:
    if x.dim() != 4:
        raise RuntimeError(f"x must have 4 dimensions (N, C, H, W) to be pooled, but got shape {tuple(x.shape)}")
    for name, values, least in (
        ("kernel_size", kernel, 1),
        ("stride", stride, 1),
        ("dilation", dilation, 1),
        ("padding", padding, 0),
    ):
        if min(values) < least:
            bound = "greater than zero" if least else "non-negative"
            raise RuntimeError(f"{name} must be {bound}, but got {values}")
    for k, p, d in zip(kernel, padding, dilation, strict=True):
        if p > ((k - 1) * d + 1) // 2:
            raise RuntimeError(
                f"padding should be at most half of the effective kernel size, but got padding={padding}, "
                f"kernel_size={kernel} and dilation={dilation}"
            )
    if x.size(1) == 0 or x.size(2) == 0 or x.size(3) == 0:
        raise RuntimeError(f"x must have non-zero size in C, H and W to be pooled, but got shape {tuple(x.shape)}")
    out = [pooled_size(*args, ceil_mode) for args in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)]
    if min(out) < 1:
        raise RuntimeError(
            f"x of shape {tuple(x.shape)} is too small for kernel_size={kernel} with padding={padding} and "
            f"dilation={dilation}: the output size would be {tuple(out)}"
        )
