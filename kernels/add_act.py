"""``act(x + residual)`` and its backward: one pass over dense tensors in memory order.

Bytes per element of size s: forward reads 2s, writes s + 1/8; backward reads s + 1/8, writes s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import round_to

BLOCK = 4096  # elements per program: per thread and tensor at least two 16-byte accesses, also in waves of 64 threads
WARPS = 4


@triton.jit
def _add_act_kernel(
    x_ptr,  # [n]
    residual_ptr,  # [n]
    out_ptr,  # [n]
    mask_ptr,  # [mask_bytes]
    n,
    mask_bytes,
    RELU: tl.constexpr,
    SAVE_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    compute: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    first = tl.program_id(0).to(tl.int64) * BLOCK
    element = first + tl.arange(0, BLOCK)
    inside = element < n
    x = tl.load(x_ptr + element, mask=inside, other=0.0)  # [BLOCK]
    residual = tl.load(residual_ptr + element, mask=inside, other=0.0)
    y = x.to(compute) + residual.to(compute)
    if RELU:
        y = tl.where(y <= 0.0, 0.0, y)  # NaN passes
    out = round_to(y, dtype)
    tl.store(out_ptr + element, out, mask=inside)
    if SAVE_MASK:
        keep = inside & ((out.to(compute) <= 0.0) == 0)  # of the rounded value
        bits = keep.to(tl.int32).reshape(BLOCK // 8, 8) << tl.arange(0, 8)[None, :]
        byte = first // 8 + tl.arange(0, BLOCK // 8)
        tl.store(mask_ptr + byte, tl.sum(bits, axis=1).to(tl.uint8), mask=byte < mask_bytes)


@triton.jit
def _add_act_backward_kernel(
    dy_ptr,  # [n]
    mask_ptr,  # [mask_bytes]
    dx_ptr,  # [n]
    n,
    mask_bytes,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    element = first + tl.arange(0, BLOCK)
    inside = element < n
    byte = first // 8 + tl.arange(0, BLOCK // 8)
    bits = tl.load(mask_ptr + byte, mask=byte < mask_bytes, other=0).to(tl.int32)  # [BLOCK / 8]
    keep = ((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1).reshape(BLOCK)
    dy = tl.load(dy_ptr + element, mask=inside, other=0.0)
    tl.store(dx_ptr + element, tl.where(keep != 0, dy, 0.0).to(dy.dtype), mask=inside)


def _mask_bytes(numel: int) -> int:
    return 2 * triton.cdiv(numel, 16)


def add_act(x: Tensor, residual: Tensor, relu: bool, save_mask: bool) -> tuple[Tensor, Tensor]:
    """Sum, activation and, if asked, the mask ``!(out <= 0)``: one bit per element in memory order.

    x and residual are dense with the same shape, dtype and strides; so is the result.
    """
    n = x.numel()
    out = torch.empty_like(x)
    mask = x.new_empty(_mask_bytes(n) if save_mask else 0, dtype=torch.uint8)
    if n:
        # the padding of the mask ends within the last block: BLOCK is a multiple of 16
        with torch.cuda.device_of(x):
            _add_act_kernel[(triton.cdiv(n, BLOCK),)](
                x,
                residual,
                out,
                mask,
                n,
                mask.numel(),
                RELU=relu,
                SAVE_MASK=save_mask,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return out, mask


def add_act_backward(dy: Tensor, mask: Tensor) -> Tensor:
    """The gradient of both inputs: dy where the mask has a one, else zero."""
    n = dy.numel()
    dx = torch.empty_like(dy)
    if n:
        with torch.cuda.device_of(dy):
            grid = (triton.cdiv(n, BLOCK),)
            _add_act_backward_kernel[grid](dy, mask, dx, n, mask.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return dx
