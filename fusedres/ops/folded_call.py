"""A call that may be folded: its operands, who serves it, and whether it is exact enough."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import choices, registry
from .checks import pair
from .conv1x1_bn_act import FoldingOps, conditioning, folding_ops, output_moments, pixels, strided_size
from .folding import FoldingDecision, folding_choice, never_gains, numerically_safe, safe_unseen
from .layout import is_channels_last
from .tracing import autocast_dtype, is_blind, is_traced


def can_move(*statistics: Tensor | None) -> bool:
    """Whether every one can be written by ATen, so that writing one does not fail after another was written."""
    for t in statistics:
        if t is not None and (not isinstance(t, Tensor) or 0 in t.stride()):
            return False
        if t is not None and not is_compiling() and t.is_inference() and not torch.is_inference_mode_enabled():
            return False
    return True


class Conv1x1:
    """The operands of a 1x1 convolution, and how it would be folded.

    ``dtype`` is what autocast makes of y; a float32 weight stays as it is, to be rounded after it was folded.
    """

    __slots__ = ("conv_weight", "dtype", "fits", "stride", "y")

    def __init__(self, y: Tensor, conv_weight: Tensor, stride: int | tuple[int, int], name: str = "stride") -> None:
        rows, columns = pair(name, stride)
        amp = autocast_dtype(y)
        self.y, self.conv_weight, self.stride = y, conv_weight, rows
        self.dtype = amp or y.dtype
        self.fits = (
            rows == columns
            and rows > 0
            and conv_weight.numel() > 0
            and (conv_weight.dtype == self.dtype or (amp is not None and conv_weight.dtype == torch.float32))
        )

    @property
    def pixels(self) -> int:
        return pixels(self.y, self.stride)

    def output(self) -> Tensor:
        """One value in the shape of what the convolution would write: for checks."""
        n, _, h, w = self.y.shape
        shape = (n, self.conv_weight.size(0), strided_size(h, self.stride), strided_size(w, self.stride))
        return torch.empty((), dtype=self.dtype, device=self.y.device).expand(shape)

    def matches(self, other: Tensor) -> bool:
        """Whether ``other`` can be added to the output as it is."""
        x = self.output()
        return (
            isinstance(other, Tensor)
            and other.shape == x.shape
            and other.dtype == x.dtype
            and other.device == x.device
            and other.layout == torch.strided
        )

    def moments(self, ops: FoldingOps) -> tuple[Tensor, Tensor, Tensor, int]:
        """y as the kernels take it; its mean, covariance and count."""
        y = self.y.to(self.dtype).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            return y, *ops.moments(y, None, self.stride), self.pixels


def sums_of(device: str) -> str:
    """How what serves a device adds products of float32 numbers up, see ``SUMS``."""
    if registry.backend() == "reference":
        return "float64"
    return "shifted" if device == "cpu" and registry.backend() != "triton" else "plain"


def folding_ops_for(
    folding: str,
    convolutions: tuple[Conv1x1, ...],
    training: bool,
    fits: bool,
    decision: FoldingDecision | None = None,
) -> FoldingOps | None:
    """Who serves a folded call; None if it is not folded."""
    y = convolutions[0].y
    blind = any(is_blind(t) for c in convolutions for t in (c.y, c.conv_weight))
    if not blind and torch.is_grad_enabled() and any(c.y.is_inference() for c in convolutions):
        fits = False  # autograd would have to save it
    return folding_ops_of(
        folding,
        y,
        convolutions[0].dtype,
        [c.y.size(1) for c in convolutions],
        convolutions[0].conv_weight.size(0),
        min(c.pixels for c in convolutions) if fits else 0,
        blind=blind,
        training=training,
        channels_last=is_traced() or all(is_channels_last(c.y) for c in convolutions),  # vmap cannot say
        fits=fits,
        decision=decision,
    )


def folding_ops_of(
    folding: str,
    y: Tensor,
    dtype: torch.dtype,
    channels: list[int],
    outputs: int,
    pixels: int,
    *,
    blind: bool,
    training: bool,
    channels_last: bool,
    fits: bool,
    decision: FoldingDecision | None,
) -> FoldingOps | None:
    """Who serves a call that is described by numbers, for tensors like ``y``; arguments as of ``folding_choice``."""
    known = True if safe_unseen(dtype, sums_of(y.device.type)) else None if decision is None else decision.known(y)
    folds, _ = folding_choice(
        folding,
        dtype,
        y.device.type,
        channels,
        outputs,
        pixels,
        image=pixels // max(1, y.size(0)),
        capability=registry.CPU_CAPABILITY,
        training=training,
        traced=is_traced() or (blind and not known),
        channels_last=channels_last,
        fits=fits,
        measured=_measured(y, channels, outputs, pixels, dtype),
    )
    if not folds:
        return None
    if decision is not None and not blind:
        decision.asked(y, known)
    return None if known is False else folding_ops(y)


def _measured(y: Tensor, channels: Sequence[int], outputs: int, pixels: int, dtype: torch.dtype) -> str | None:
    """What the table of a GPU says of folding a layer."""
    if not y.is_cuda or is_compiling():  # sizes may be symbols there
        return None
    return registry.table_of(y.get_device()).folding.get(choices.folding_key(channels, outputs, pixels, dtype))


def may_gain(folding: str, y: Tensor, channels: Sequence[int], outputs: int) -> bool:
    """Whether a layer may be folded that makes ``y``, or what a stride leaves of it: a question that costs little."""
    if folding == "auto" and y.is_cuda and not is_compiling() and not registry.table_of(y.get_device()).folding:
        return False
    dtype = autocast_dtype(y) or y.dtype
    most = y.numel() // max(1, y.size(1))
    return never_gains(folding, dtype, y.device.type, channels, outputs, most, registry.CPU_CAPABILITY) is None


def checked_moments(
    measured: Sequence[tuple[Conv1x1, Tensor, Tensor, int, float]],
    decision: FoldingDecision | None = None,
    asked: Tensor | None = None,
) -> list[Tensor | None] | None:
    """The moments of the outputs, None where they were not needed to decide; or None if they are not exact enough.

    Looks at values where it can and must.

    Args:
        measured: convolutions, mean, covariance and count of what they read, eps of their norms.
        asked: by which ``folding_ops_of`` was asked, if not by what the first convolution reads.
    """
    y = measured[0][0].y if asked is None else asked
    known = None if decision is None else decision.known(y)
    if is_blind(y) or known is True:  # in the first case folding_ops_of has asked
        return [None] * len(measured)
    if known is False:
        return None
    with torch.no_grad():
        found = []
        for convolution, mean, cov, count, eps in measured:
            moments = output_moments(convolution.conv_weight, mean, cov, count)
            found.append(moments)
            terms = conditioning(convolution.conv_weight, mean, cov, count, moments, eps)
            sums = sums_of(y.device.type)
            safe, why = numerically_safe(terms, convolution.dtype, convolution.conv_weight.dtype, sums)
            if not safe:
                break
    if decision is not None:
        decision.found(safe, why, y)
    return found if safe else None
