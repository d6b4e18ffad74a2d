"""Memory layouts and bit masks: what the native kernels assume, in plain ATen."""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 16  # bits per mask word; also the vector width, in elements, of every CPU kernel


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor) -> tuple[Tensor, torch.memory_format]:
    """``x`` itself where it is contiguous or channels_last, or not 4-D; otherwise one copy in the nearer of the two.

    With it its memory format. Where both fit (one channel, one pixel), that is channels_last.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        return x, torch.channels_last
    if x.is_contiguous() or x.dim() != 4:
        return x, torch.contiguous_format
    strides = x.stride()
    wants_channels_last = 0 < strides[1] <= min(strides[0], strides[2], strides[3])
    memory_format = torch.channels_last if wants_channels_last else torch.contiguous_format
    return x.contiguous(memory_format=memory_format), memory_format


def mask_bytes(x: Tensor) -> int:
    """Size of the mask of a dense 4-D tensor: one bit per element, in 16-bit words.

    channels_last: the words run through memory. contiguous: every (n, c) plane starts a new word.
    """
    if is_channels_last(x):
        return 2 * ((x.numel() + LANES - 1) // LANES)
    n, c, h, w = x.shape
    return 2 * n * c * ((h * w + LANES - 1) // LANES)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a dense 4-D bool tensor to bits as :func:`mask_bytes` describes: uint8, bit ``i % 8`` of byte ``i // 8``."""
    if is_channels_last(mask):
        rows = mask.permute(0, 2, 3, 1).reshape(1, mask.numel())
    else:
        rows = mask.reshape(mask.size(0) * mask.size(1), mask.size(2) * mask.size(3))
    rows = torch.nn.functional.pad(rows.to(torch.uint8), (0, -rows.size(1) % LANES))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (rows.reshape(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack_mask(bits: Tensor, x: Tensor) -> Tensor:
    """The bool tensor with the shape and layout of the dense 4-D tensor ``x`` that :func:`pack_mask` packed."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = (bits.unsqueeze(1) >> shifts & 1).to(torch.bool).reshape(-1)
    n, c, h, w = x.shape
    if is_channels_last(x):
        return flat[: x.numel()].reshape(n, h, w, c).permute(0, 3, 1, 2)
    return flat.reshape(n * c, -(-h * w // LANES) * LANES)[:, : h * w].reshape(n, c, h, w)
