"""Residual addition and activation: ``act(x + residual)``.

Forward reads two tensors and writes one; with a gradient to come it also writes one bit per element, ``!(out <= 0)``,
from which the backward makes the one gradient that both inputs share: ``dx = dresidual = dout * mask``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .layout import LANES
from .registry import define
from .traffic import Launch, Traffic, mask_size


def _memory_order(x: Tensor) -> Tensor:
    """A dense tensor as the flat sequence of its elements in memory."""
    return x.as_strided((x.numel(),), (1,))


def _mask_bytes(x: Tensor) -> int:
    return 2 * ((x.numel() + LANES - 1) // LANES)


def _add_act_reference(x: Tensor, residual: Tensor, relu: bool, save_mask: bool) -> tuple[Tensor, Tensor]:
    y = x.double() + residual.double()
    out = torch.empty_like(x).copy_(y.relu() if relu else y)
    mask = x.new_empty(0, dtype=torch.uint8)
    if save_mask:
        bits = torch.nn.functional.pad((~(_memory_order(out) <= 0)).to(torch.uint8), (0, -x.numel() % LANES))
        weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=x.device)
        mask = (bits.view(-1, 8) * weights).sum(1, dtype=torch.uint8)
    return out, mask


def _add_act_backward_reference(dy: Tensor, mask: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    keep = (mask.unsqueeze(1) >> shifts & 1).view(-1)[: dy.numel()].to(torch.bool)
    dx = torch.empty_like(dy)
    _memory_order(dx).copy_(torch.where(keep, _memory_order(dy), 0.0))
    return dx


def _add_act_fake(x: Tensor, residual: Tensor, relu: bool, save_mask: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(_mask_bytes(x) if save_mask else 0, dtype=torch.uint8)


def _triton_add_act() -> Any:
    from ..kernels.add_act import add_act

    return add_act


def _triton_add_act_backward() -> Any:
    from ..kernels.add_act import add_act_backward

    return add_act_backward


ADD_ACT = define(
    "add_act",
    "(Tensor x, Tensor residual, bool relu, bool save_mask) -> (Tensor out, Tensor mask)",
    _add_act_reference,
    _add_act_fake,
    cuda=True,
    triton=_triton_add_act,
)

ADD_ACT_BACKWARD = define(
    "add_act_backward",
    "(Tensor dy, Tensor mask) -> Tensor",
    _add_act_backward_reference,
    lambda dy, mask: torch.empty_like(dy),
    cuda=True,
    triton=_triton_add_act_backward,
)


def add_act_traffic(
    shape: Sequence[int], dtype: torch.dtype, *, layout: str = "channels_last", save_mask: bool = True
) -> Traffic:
    """Bytes of the forward: x and residual in, out and one bit per element out. The mask is in memory order, so that
    ``layout`` makes no difference."""
    elements = math.prod(shape)
    t, mask = elements * dtype.itemsize, mask_size(elements) if save_mask else 0
    return Traffic(3 * t + mask, (Launch("apply", 2 * t, t + mask),))


def add_act_backward_traffic(shape: Sequence[int], dtype: torch.dtype, *, layout: str = "channels_last") -> Traffic:
    """Bytes of the backward: dy and mask in, the one gradient of both inputs out."""
    elements = math.prod(shape)
    t, mask = elements * dtype.itemsize, mask_size(elements)
    return Traffic(2 * t + mask, (Launch("apply", t + mask, t),))


class AddActFunction(Function):
    """``relu(x + residual)`` of two dense tensors with the same shape, dtype and strides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, forward_op: Any, backward_op: Any) -> Tensor:
        out, mask = forward_op(x, residual, True, True)
        ctx.save_for_backward(mask)
        ctx.like = (x.shape, x.stride())
        ctx.backward_op = backward_op
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        shape, strides = ctx.like
        if torch.is_grad_enabled():
            ones = torch.empty_strided(shape, strides, dtype=dy.dtype, device=dy.device).fill_(1)
            g = dy * ctx.backward_op(ones, mask)
        else:
            if dy.stride() != strides:
                dy = torch.empty_strided(shape, strides, dtype=dy.dtype, device=dy.device).copy_(dy)
            g = ctx.backward_op(dy, mask)
        return (g if ctx.needs_input_grad[0] else None), (g if ctx.needs_input_grad[1] else None), None, None
