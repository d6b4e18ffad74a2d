r"""A Bottleneck in training as one Function, its last convolution folded into its norm.

``relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut)``, where conv1 and conv3 are 1x1 and the shortcut
is ``x`` or, with a 1x1 convolution too, ``bn_d(conv_d(x))``. In the letters of ``conv1x1_bn_act``, where ``G`` is the
masked gradient of the output::

    forward                                                                  reads             writes (and keeps *)
    x1 = conv1(x), statistics of x1                                          x                 x1 *
    y1 = relu(bn1(x1))                                                       x1                y1
    x2 = conv2(y1), statistics of x2                                         y1, x2            x2 *
    moments of y2 = relu(bn2(x2)), which is never written                    x2
    out = relu(y2 w~^T + t + shortcut)                                       x2, x             out, mask *

    backward
    P = G^T y2, s1 = G^T 1                                                   dout, mask, x2
    dy2 = G w~ + y2 M~ + v where y2 > 0, and its sums                        dout, mask, x2    dy2
    dx2 = gradient of bn2                                                    dy2, x2           dx2
    y1 again, where it was not kept; gradients of conv2                      x1; dx2, y1       y1; dy1
    dx1 = gradient of bn1                                                    dy1, x1           dx1
    dx = dx1 w1 + G, or + the shortcut's gradient; gradient of w1            dx1, dout, mask   dx

Of the tensors as wide as the output only ``out`` and ``dx`` are written: not what bn3 normalises, nor its gradient, nor
``G``. Kept are x, x1, x2, one bit per element of ``out``, and small matrices; and y1, unless it is to be recomputed.

Under ``create_graph`` the gradients are those of the block computed anew from ``x`` by ATen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling
from torch.overrides import has_torch_function_variadic

from .batch_norm_act_conv import CONV1X1, Convolution, Norm, Passes, activation, gradients_of, norm_gradients, passes
from .batch_norm_sync import differentiable_batch_norm, pixels_of, saved_statistics
from .conv1x1_bn_act import FoldingOps, strided_size, wide_dtype
from .folded_call import Conv1x1, can_move, checked_moments, folding_ops_of
from .folding import FoldingDecision
from .layout import is_channels_last
from .tracing import autocast_dtype, is_blind, is_traced


class Refused(Exception):
    """The fold would not be exact enough. Nothing has been updated."""


class Block(NamedTuple):
    """What is not differentiable. ``norms`` are those of conv1, conv2, conv3 and, of a projection, the shortcut's."""

    norms: tuple[Norm, ...]
    conv2: Convolution
    stride: int  # of the shortcut's convolution
    dtype: torch.dtype  # what convolutions compute in
    keep_y1: bool
    decision: FoldingDecision | None
    passes: Passes
    folding: FoldingOps


def _mean_and_variance(partial: Tensor, pixels: int) -> Tensor:
    """(2, C), the biased variance, from (2C + 1) statistics of as many pixels."""
    mean, m2 = partial[:-1].view(2, -1)
    return torch.stack([mean, m2 / pixels])


def _input_norm(stats: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """(3, C), mean, scale and shift, of a norm's statistics; see ``conv1x1_bn_act``."""
    _, rstd, mean_low = stats.double()
    scale = rstd if weight is None else rstd * weight.double()
    scale = scale.to(stats.dtype)
    shift = -mean_low * scale.double()
    if bias is not None:
        shift = shift + bias.double()
    return torch.stack([stats[0], scale, shift.to(stats.dtype)])


def _sums_about_mean(sums: Tensor, stats: Tensor, pixels: int) -> Tensor:
    """What a norm's backward takes, ``(2C + 1)``, from the sums of ``conv1x1_bn_act_backward_apply``."""
    of_g, of_gx = sums
    return torch.cat([of_g, of_gx - stats[2].double() * of_g, of_g.new_full((1,), pixels)])


class FoldedBottleneckFunction(Function):
    """A block of channels_last tensors in one dtype.

    ``parameters`` are conv weight, norm weight and norm bias of conv1, conv2, conv3 and, of a projection, the
    shortcut's; ``block`` comes first.
    """

    @staticmethod
    def forward(ctx: Any, block: Block, x: Tensor, *parameters: Tensor | None) -> Tensor:
        by, folding, dtype = block.passes, block.folding, block.dtype
        groups = [parameters[i : i + 3] for i in range(0, len(parameters), 3)]
        (w1, weight1, bias1), (w2, weight2, bias2), (w3, weight3, bias3), *shortcut = groups
        norm1, norm2, *outer = block.norms
        casts = w1.to(dtype), w2.to(dtype)

        x1, partial1 = folding.statistics(x, casts[0].flatten(1))
        partials1 = partial1.view(1, -1)
        y1, stats1 = activation(x1, partials1, weight1, bias1, norm1.eps, True, by)
        inner = [_mean_and_variance(partial1, pixels_of(x1))]
        x2 = block.conv2(y1, casts[1], None).contiguous(memory_format=torch.channels_last)
        pixels = pixels_of(x2)
        inner.append(_mean_and_variance(by.statistics(x2), pixels))
        stats2 = saved_statistics(*inner[1], norm2.eps, wide_dtype(dtype))
        of_y2 = _input_norm(stats2, weight2, bias2)

        rows = [(x2, of_y2, 1, w3, weight3, bias3)]
        if shortcut:
            rows.append((x, None, block.stride, *shortcut[0]))
        measured = [
            (Conv1x1(y, w, stride), *folding.moments(y, norm, stride), pixels, outer_norm.eps)
            for (y, norm, stride, w, *_), outer_norm in zip(rows, outer, strict=True)
        ]
        known = checked_moments(measured, block.decision, x)
        if known is None:
            raise Refused

        shift, folded, of_outer = None, [], []
        for (*_, w, weight, bias), (_, mean, cov, _, eps), moments in zip(rows, measured, known, strict=True):
            of_row, shift, stats, covariance = folding.fold(
                w, weight, bias, mean, cov, moments, eps, pixels, shift, dtype
            )
            folded.append(of_row)
            of_outer += [mean, covariance, stats]
        second = (x, folded[1], block.stride) if shortcut else (None, None, 1)
        residual = None if shortcut else x
        out, mask = folding.apply(x2, of_y2, folded[0], shift, 1, *second, residual, None, True, True)

        for norm, stats, count in zip(
            block.norms, (*inner, *of_outer[2::3]), (pixels_of(x1), *[pixels] * 3), strict=False
        ):
            folding.update_running(*norm[:4], stats, count)
        kept = (partials1, stats1, stats2, of_y2, mask, *casts, y1 if block.keep_y1 else None, x1, x2, *of_outer)
        ctx.save_for_backward(x, *parameters, *kept)
        ctx.block = block
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        block: Block = ctx.block
        by, folding, dtype = block.passes, block.folding, block.dtype
        count = 3 * len(block.norms)
        x, *saved = ctx.saved_tensors
        parameters, kept = saved[:count], saved[count:]
        if torch.is_grad_enabled():
            return None, *_differentiable_gradients(block, x, parameters, dout, ctx.needs_input_grad[1:])
        partials1, stats1, stats2, of_y2, mask, w1, w2, y1, x1, x2, *of_outer = kept
        channels_last = {"memory_format": torch.channels_last}
        dout, x, x1, x2 = (t.contiguous(**channels_last) for t in (dout, x, x1, x2))
        _, weight1, bias1, _, weight2, _, w3, weight3, _, *shortcut = parameters
        needs = ctx.needs_input_grad[1:]
        pixels = pixels_of(x2)

        # conv3 and the shortcut's convolution
        second = (x, block.stride) if shortcut else (None, 1)
        _, sum_g, *products = folding.reduce(dout, mask, x2, of_y2, 1, *second, False, True)
        outer = [(w3, weight3), (shortcut[0], shortcut[1])] if shortcut else [(w3, weight3)]
        unfolded = [
            folding.unfold(w, weight, *of_outer[3 * i : 3 * i + 3], sum_g, products[i], pixels, dtype, True, True)
            for i, (w, weight) in enumerate(outer)
        ]
        of_second = (x, *unfolded[1][2:], block.stride) if shortcut else (None, None, None, None, 1)
        need_shortcut = bool(shortcut) and needs[0]
        dy2, dx_shortcut, sums = folding.backward_apply(
            dout, mask, x2, of_y2, *unfolded[0][2:], 1, *of_second, True, need_shortcut
        )

        # bn2 and conv2
        sums = _sums_about_mean(sums, stats2, pixels)
        dx2, _ = by.backward_apply(dy2, x2, weight2, None, stats2, None, sums, False, True, False)
        del dy2
        of_g, of_gx = sums[:-1].view(2, -1)
        dweight2, dbias2 = of_gx * stats2[1].double(), of_g
        if y1 is None:
            y1, _ = activation(x1, partials1, weight1, bias1, block.norms[0].eps, True, by)
        dy1, dw2, _ = block.conv2.backward(dx2, y1, w2, False, (True, True, False))
        del dx2, y1

        # bn1 and conv1
        dx1, dweight1, dbias1 = norm_gradients(
            dy1.contiguous(**channels_last), x1, weight1, bias1, stats1, True, None, by, (True, True, True)
        )
        del dy1
        dw1 = CONV1X1.backward(dx1, x, w1, False, (False, True, False))[1]
        dx = None
        if needs[0]:
            matrix = w1.flatten(1).t().contiguous()  # (K, C)
            no_shift = torch.zeros(matrix.size(0), dtype=wide_dtype(dtype), device=x.device)
            residual = (dx_shortcut, None) if shortcut else (dout, mask)
            dx, _ = folding.apply(dx1, None, matrix, no_shift, 1, None, None, 1, *residual, False, False)

        gradients = [dx, dw1, dweight1, dbias1, dw2, dweight2, dbias2]
        for dw, dweight, *_ in unfolded:
            gradients += [dw, dweight, sum_g]
        inputs = (x, *parameters)
        return None, *(g.to(t.dtype) if need else None for g, t, need in zip(gradients, inputs, needs, strict=True))


def _differentiable_gradients(
    block: Block, x: Tensor, parameters: list[Tensor | None], dout: Tensor, needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """What autograd can differentiate again: the gradients of the block written with ATen ops."""
    with torch.enable_grad():
        leaves = [None if t is None else t.view_as(t) for t in (x, *parameters)]
        x, *rest = leaves
        (w1, *affine1), (w2, *affine2), (w3, *affine3), *shortcut = [rest[i : i + 3] for i in range(0, len(rest), 3)]
        dtype, norms = block.dtype, block.norms

        def normalise(v: Tensor, affine: list[Tensor | None], norm: Norm) -> Tensor:
            return differentiable_batch_norm(v, *affine, norm.eps, None)

        y = normalise(CONV1X1(x, w1.to(dtype), None), affine1, norms[0]).relu()
        y = normalise(block.conv2(y, w2.to(dtype), None), affine2, norms[1]).relu()
        y = normalise(CONV1X1(y, w3.to(dtype), None), affine3, norms[2])
        beside = x
        if shortcut:
            wd, *affine = shortcut[0]
            strided = CONV1X1._replace(stride=(block.stride, block.stride))
            beside = normalise(strided(x, wd.to(dtype), None), affine, norms[3])
        return gradients_of((y + beside).relu(), leaves, dout, needs)


# ---- calls -----------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A convolution without bias and its norm: conv1, conv2, conv3 or the shortcut's."""

    conv_weight: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    eps: float

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.conv_weight, self.weight, self.bias

    @property
    def norm(self) -> Norm:
        return Norm(self.running_mean, self.running_var, self.num_batches_tracked, self.momentum, self.eps)

    def fits(self, x: Tensor, dtype: torch.dtype, inputs: int, kernel: int | None) -> bool:
        """Whether it reads ``inputs`` channels, every tensor is as it ought to be, and every parameter is trained."""
        w = self.conv_weight
        if w.dim() != 4 or w.size(1) != inputs or (kernel and (w.size(2), w.size(3)) != (kernel, kernel)):
            return False
        if w.dtype != dtype and not (w.dtype == torch.float32 and autocast_dtype(x) is not None):
            return False
        vectors = (self.running_mean, self.running_var, self.weight, self.bias)
        present = [v for v in vectors if v is not None]
        return (
            (self.running_mean is None) == (self.running_var is None)
            and all(v.dim() == 1 and v.numel() == w.size(0) for v in present)
            and len({v.dtype for v in present}) <= 1
            and all(v.dtype == dtype or (v.dtype == torch.float32 and dtype.itemsize == 2) for v in present)
            and all(t.device == x.device and not t.is_inference() for t in (w, *present))
            and all(p is None or p.requires_grad for p in self.parameters)
            and not any(v is not None and v.requires_grad for v in vectors[:2])
            and can_move(self.running_mean, self.running_var, self.num_batches_tracked)
            and (self.momentum is not None or self.num_batches_tracked is not None)
            and self.eps > 0
        )


def folded_bottleneck(
    x: Tensor,
    parts: Sequence[Part],
    conv2: Convolution,
    stride: int,
    folding: str,
    recompute: bool,
    decision: FoldingDecision,
) -> Tensor | bool | None:
    """The output of a Bottleneck in training, by one Function; None where the block must run in pieces.

    False where, besides, its pieces would not fold either.

    It runs in pieces where its end would not be folded (see ``folding.py``), where a parameter is not trained, without
    grad mode, while traced or compiled, and where anything is not as it ought to be: the pieces then say what.

    Args:
        parts: conv1, conv2, conv3 and, of a projection, the shortcut's convolution, each with its norm.
        stride: of the shortcut's convolution.
        folding: as ``folding_asked`` gave it.
        recompute: whether not to keep what conv2 reads; ``folding="always"`` does not either.
    """
    if folding == "never" or is_compiling() or is_traced():
        return None
    if not torch.is_grad_enabled():
        decision.expect(x)
        return None
    parameters = [p for part in parts for p in part.parameters]
    if has_torch_function_variadic(x, *parameters) or x.dim() != 4 or not is_channels_last(x) or x.is_inference():
        return None
    first, second, third, *shortcut = parts
    dtype = autocast_dtype(x) or x.dtype
    channels, width, outputs = x.size(1), second.conv_weight.size(0), third.conv_weight.size(0)
    inputs = (channels, first.conv_weight.size(0) // conv2.groups, width, channels)
    if x.dtype != dtype or not all(
        part.fits(x, dtype, of_part, kernel)
        for part, of_part, kernel in zip(parts, inputs, (1, None, 1, 1), strict=False)
    ):
        return None
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            x.shape[2:], second.conv_weight.shape[2:], conv2.stride, conv2.padding, conv2.dilation, strict=True
        )
    ]
    taken = [strided_size(size, stride if shortcut else 1) for size in x.shape[2:]]
    fits = sizes == taken and min(sizes) > 0 and outputs == (shortcut[0].conv_weight.size(0) if shortcut else channels)
    ops = folding_ops_of(
        folding,
        x,
        dtype,
        [width, channels] if shortcut else [width],
        outputs,
        x.size(0) * sizes[0] * sizes[1] if fits else 0,
        blind=any(is_blind(t) for t in (x, *parameters) if t is not None),
        training=True,
        channels_last=True,
        fits=fits,
        decision=decision,
    )
    if ops is None:
        return None if shortcut and decision.safe is not False else False
    try:
        by = passes(x)
    except RuntimeError:  # a forced backend serves the pieces only
        return None
    norms = tuple(part.norm for part in parts)
    keep_y1 = not recompute and folding != "always"
    try:
        return FoldedBottleneckFunction.apply(
            Block(norms, conv2, stride, dtype, keep_y1, decision, by, ops), x, *parameters
        )
    except Refused:
        return False
