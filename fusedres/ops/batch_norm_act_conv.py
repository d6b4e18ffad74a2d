r"""A convolution of a normalised activation, ``conv(relu(bn(x)))``: training keeps ``x``, not the activation.

Eager PyTorch saves both ``x``, for the gradient of the norm, and ``y = relu(bn(x))``, for that of the convolution. Here
``y`` is computed again in backward, from ``x`` and the same statistics, by the same pass and so to the same bits::

    forward    statistics of x;  y = max((x - mean) * scale + shift, 0);  out = conv(y)         y is dropped
    backward   y again (reads x, writes y);  dy, dw = convolution's backward;  dx, dweight, dbias = norm's backward

which costs one pass over ``x`` and ``y``, and saves what ``y`` takes in memory. The passes are those of
``batch_norm_sync``, so a norm may have its statistics from all processes of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from .batch_norm_act import BATCH_NORM_ACT_BACKWARD
from .batch_norm_sync import check_count, differentiable_batch_norm, gathered, implementations, move_running
from .registry import serve


class Passes(NamedTuple):
    """Who serves the passes of a normalisation."""

    statistics: Callable[..., Any]
    apply: Callable[..., Any]
    backward_reduce: Callable[..., Any]
    backward_apply: Callable[..., Any]
    backward: Callable[..., Any]  # both, where no other process is met


def passes(x: Tensor) -> Passes:
    """Who serves the passes for tensors like ``x``.

    Raises:
        RuntimeError: a forced backend cannot serve.
    """
    return Passes(*implementations(x), serve(BATCH_NORM_ACT_BACKWARD, x) or BATCH_NORM_ACT_BACKWARD.reference)


class Norm(NamedTuple):
    """A batch normalisation with ReLU, in training, without what is differentiable."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    eps: float
    group: Any = None  # of processes, or None for this one alone

    def statistics(self, x: Tensor, by: Passes) -> Tensor:
        """(parts, 2C + 1): mean, M2 and count of the batch's parts; raises where they are of one value in all."""
        own = by.statistics(x)
        if self.group is None:
            return own.view(1, -1)
        partials = gathered(own, self.group)
        check_count(partials)
        return partials

    def move_running(self, partials: Tensor) -> None:
        """The last step of a forward, when nothing can fail any more."""
        move_running(self.running_mean, self.running_var, self.num_batches_tracked, self.momentum, partials)


def activation(
    x: Tensor, partials: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool, by: Passes
) -> tuple[Tensor, Tensor]:
    """``relu(bn(x))`` and its (3, C) statistics, the same bits at every call."""
    y, stats, _ = by.apply(x, None, partials, weight, bias, None, None, None, 0.0, eps, relu, False)
    return y, stats


def norm_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    relu: bool,
    group: Any,
    by: Passes,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias of ``relu(bn(x))``, None for what is not needed."""
    need_dx, need_affine = needs[0], needs[1] or needs[2]
    saved = (dy, x, weight, bias, stats, None)
    if group is None:
        dx, _, dweight, dbias = by.backward(*saved, True, relu, need_dx, False, need_affine)
    else:
        sums, dweight, dbias = by.backward_reduce(*saved, relu, need_affine)
        dx = None
        if need_dx:
            dist.all_reduce(sums, group=group)
            dx, _ = by.backward_apply(*saved, sums, relu, True, False)
    return tuple(t if need else None for t, need in zip((dx, dweight, dbias), needs, strict=True))


class Convolution(NamedTuple):
    """What a convolution is, but for its operands."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def __call__(self, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.conv2d(y, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def backward(
        self, dout: Tensor, y: Tensor, weight: Tensor, bias: bool, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dy, dweight, dbias."""
        return torch.ops.aten.convolution_backward(
            dout,
            y,
            weight,
            [weight.size(0)] if bias else None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0, 0],
            self.groups,
            needs,
        )


CONV1X1 = Convolution((1, 1), (0, 0), (1, 1), 1)


class BatchNormActConvFunction(Function):
    """``conv(act(bn(x)))`` in training of a dense ``x``; of the activation nothing is kept.

    ``config`` is ``(norm, relu, convolution, dtype, memory_format, passes)``; ``dtype`` is what the convolution
    computes in, for autocast.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        config: tuple[Norm, bool, Convolution, torch.dtype, torch.memory_format, Passes],
    ) -> Tensor:
        norm, relu, convolution, dtype, _, by = config
        partials = norm.statistics(x, by)
        y, stats = activation(x, partials, weight, bias, norm.eps, relu, by)
        cast = conv_weight.to(dtype)
        out = convolution(y.to(dtype), cast, None if conv_bias is None else conv_bias.to(dtype))
        norm.move_running(partials)
        ctx.save_for_backward(x, weight, bias, conv_weight, conv_bias, partials, stats, cast)
        ctx.config = config
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, conv_weight, conv_bias, partials, stats, cast = ctx.saved_tensors
        norm, relu, convolution, dtype, memory_format, by = ctx.config
        needs = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            with torch.enable_grad():
                leaves = [None if t is None else t.view_as(t) for t in (x, weight, bias, conv_weight, conv_bias)]
                y = differentiable_batch_norm(*leaves[:3], norm.eps, norm.group)
                y = (torch.relu(y) if relu else y).to(dtype)
                out = convolution(y, *(None if t is None else t.to(dtype) for t in leaves[3:]))
                return *gradients_of(out, leaves, dout, needs), None
        x = x.contiguous(memory_format=memory_format)
        dy = dconv_weight = dconv_bias = None
        need_norm = any(needs[:3])
        if need_norm or needs[3] or needs[4]:
            y = activation(x, partials, weight, bias, norm.eps, relu, by)[0] if need_norm or needs[3] else x
            wanted = (need_norm, needs[3], needs[4])
            dy, dconv_weight, dconv_bias = convolution.backward(dout, y.to(dtype), cast, conv_bias is not None, wanted)
            del y
        of_norm = (None, None, None)
        if need_norm:
            dy = dy.to(x.dtype).contiguous(memory_format=memory_format)
            of_norm = norm_gradients(dy, x, weight, bias, stats, relu, norm.group, by, needs[:3])
        return (
            *of_norm,
            dconv_weight.to(conv_weight.dtype) if needs[3] else None,
            dconv_bias.to(conv_bias.dtype) if needs[4] else None,
            None,
        )


def gradients_of(
    out: Tensor, inputs: list[Tensor | None], dout: Tensor, needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of ``out`` for the inputs that need one, which can be differentiated again."""
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, dout, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]
