"""The traffic of a call as a dispatcher saw it: from an op and its arguments to its launches.

:func:`call_traffic` knows every op of this package, by whatever backend it is called; how it is cut is that of one tile
for each channel and, in training, two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from .add_act import add_act_backward_traffic, add_act_traffic
from .batch_norm_act import (
    batch_norm_act_backward_traffic,
    batch_norm_act_traffic,
    batch_norm_add_batch_norm_act_backward_traffic,
    batch_norm_add_batch_norm_act_traffic,
)
from .batch_norm_act_max_pool import batch_norm_act_max_pool_backward_traffic, batch_norm_act_max_pool_traffic
from .batch_norm_sync import (
    batch_norm_act_apply_traffic,
    batch_norm_act_backward_apply_traffic,
    batch_norm_act_backward_reduce_traffic,
    batch_norm_statistics_traffic,
)
from .conv1x1_bn_act import (
    conv1x1_bn_act_apply_traffic,
    conv1x1_bn_act_backward_apply_traffic,
    conv1x1_bn_act_backward_reduce_traffic,
    conv1x1_bn_fold_traffic,
    conv1x1_bn_unfold_traffic,
    conv1x1_bn_update_running_traffic,
    conv1x1_moments_traffic,
    conv1x1_statistics_traffic,
)
from .layout import is_channels_last
from .traffic import Traffic

Call = SimpleNamespace  # the arguments of a call by the names of the schema


def _tensor(x: Tensor) -> dict[str, Any]:
    return {
        "shape": tuple(x.shape),
        "dtype": x.dtype,
        "layout": "channels_last" if is_channels_last(x) else "contiguous",
    }


def _affine(a: Call) -> dict[str, Any]:
    return {"affine": a.weight is not None, "param_dtype": None if a.weight is None else a.weight.dtype}


def _forward_norm(a: Call) -> dict[str, Any]:
    """What the forwards of one or two norms share."""
    return {
        **_tensor(a.x),
        **_affine(a),
        "running": a.running_mean is not None,
        "counter": a.num_batches_tracked is not None,
    }


def _whole_norm(a: Call) -> dict[str, Any]:
    return {**_forward_norm(a), "training": a.training, "cumulative": a.momentum is None, "relu": a.relu}


def _backward_norm(a: Call) -> dict[str, Any]:
    return {**_tensor(a.x), **_affine(a), "relu": a.relu}


def _window(a: Call) -> tuple[Any, ...]:
    sizes = (a.kernel_size, a.stride, a.padding, a.dilation)
    return *(tuple(v) if len(v) == 2 else (v[0], v[0]) for v in sizes), a.ceil_mode


def _folded(a: Call) -> dict[str, Any]:
    """What the passes over the pixels of one convolution or two share."""
    y2 = a.y2 is not None
    found = {"shape": tuple(a.y.shape), "dtype": a.y.dtype, "norm": a.norm is not None, "stride": a.stride}
    return found | ({"shape2": tuple(a.y2.shape), "stride2": a.stride2} if y2 else {})


def _matrices(a: Call) -> dict[str, Any]:
    return {
        "shape": tuple(a.conv_weight.shape[:2]),
        "dtype": a.dtype,
        "weight_dtype": a.conv_weight.dtype,
        "param_dtype": None if a.weight is None else a.weight.dtype,
    }


_TRAFFIC: dict[str, Callable[[Call], Traffic]] = {
    "add_act": lambda a: add_act_traffic(**_tensor(a.x), save_mask=a.save_mask),
    "add_act_backward": lambda a: add_act_backward_traffic(**_tensor(a.dy)),
    "batch_norm_act": lambda a: batch_norm_act_traffic(
        **_whole_norm(a), residual=a.residual is not None, save_mask=a.save_mask
    ),
    "batch_norm_act_backward": lambda a: batch_norm_act_backward_traffic(
        **_backward_norm(a),
        training=a.training,
        residual=a.mask is not None,
        need_dx=a.need_dx,
        need_dresidual=a.need_dresidual,
        need_affine=a.need_affine,
    ),
    "batch_norm_add_batch_norm_act": lambda a: batch_norm_add_batch_norm_act_traffic(**_whole_norm(a)),
    "batch_norm_add_batch_norm_act_backward": lambda a: batch_norm_add_batch_norm_act_backward_traffic(
        **_backward_norm(a),
        training=a.training,
        need_dx=a.need_dx,
        need_dx2=a.need_dx2,
        need_affine=a.need_affine or a.need_affine2,
    ),
    "batch_norm_act_max_pool": lambda a: batch_norm_act_max_pool_traffic(**_whole_norm(a), window=_window(a)),
    "batch_norm_act_max_pool_backward": lambda a: batch_norm_act_max_pool_backward_traffic(
        **_backward_norm(a), training=a.training, need_dx=a.need_dx, need_affine=a.need_affine, window=_window(a)
    ),
    "batch_norm_statistics": lambda a: batch_norm_statistics_traffic(**_tensor(a.x)),
    "batch_norm_act_apply": lambda a: batch_norm_act_apply_traffic(
        **_forward_norm(a),
        residual=a.residual is not None,
        relu=a.relu,
        save_mask=a.save_mask,
        parts=a.partials.size(0),
    ),
    "batch_norm_act_backward_reduce": lambda a: batch_norm_act_backward_reduce_traffic(
        **_backward_norm(a), mask=a.mask is not None, need_affine=a.need_affine
    ),
    "batch_norm_act_backward_apply": lambda a: batch_norm_act_backward_apply_traffic(
        **_backward_norm(a), mask=a.mask is not None, need_dx=a.need_dx, need_dresidual=a.need_dresidual
    ),
    "conv1x1_moments": lambda a: conv1x1_moments_traffic(
        tuple(a.y.shape), a.y.dtype, norm=a.norm is not None, stride=a.stride
    ),
    "conv1x1_statistics": lambda a: conv1x1_statistics_traffic(tuple(a.x.shape), a.weight.size(0), a.x.dtype),
    "conv1x1_bn_act_apply": lambda a: conv1x1_bn_act_apply_traffic(
        **_folded(a),
        channels=a.folded.size(0),
        residual=a.residual is not None,
        residual_mask=a.residual_mask is not None,
        save_mask=a.save_mask,
    ),
    "conv1x1_bn_act_backward_reduce": lambda a: conv1x1_bn_act_backward_reduce_traffic(
        **_folded(a),
        channels=a.dy.size(1),
        relu=a.mask is not None,
        need_g=a.need_g,
        need_products=a.need_products,
    ),
    "conv1x1_bn_act_backward_apply": lambda a: conv1x1_bn_act_backward_apply_traffic(
        **_folded(a), channels=a.dy.size(1), relu=a.mask is not None, need_dx=a.need_dx, need_dx2=a.need_dx2
    ),
    "conv1x1_bn_fold": lambda a: conv1x1_bn_fold_traffic(
        **_matrices(a), moments=a.moments is not None, shift0=a.shift0 is not None
    ),
    "conv1x1_bn_unfold": lambda a: conv1x1_bn_unfold_traffic(
        **_matrices(a), need_dconv_weight=a.need_dconv_weight, need_dy=a.need_dy
    ),
    "conv1x1_bn_update_running": lambda a: conv1x1_bn_update_running_traffic(
        a.stats.size(1),
        param_dtype=None if a.running_mean is None else a.running_mean.dtype,
        counter=a.num_batches_tracked is not None,
    ),
}


def op_of(func: Any) -> str | None:
    """The op of this package that an overload is, whoever serves it; None for the ops of others."""
    namespace, _, name = func._schema.name.partition("::")
    return name.removesuffix("_reference").removesuffix("_triton") if namespace == "fusedres" else None


def arguments_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Call:
    """The arguments of a call of an op by the names of its schema."""
    names = [argument.name for argument in func._schema.arguments]
    return Call(**dict(zip(names, args, strict=False)), **(kwargs or {}))


def call_traffic(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Traffic:
    """What a call of an op of this package moves; looks at shapes, dtypes and strides only.

    Args:
        func: the overload, ``torch.ops.fusedres.<op>.default`` or that of one of its backends.

    Raises:
        LookupError: the op has no traffic function.
    """
    name = op_of(func)
    if name not in _TRAFFIC:
        raise LookupError(f"{func._schema.name} has no traffic function in fusedres/ops/calls.py")
    return _TRAFFIC[name](arguments_of(func, args, kwargs))
