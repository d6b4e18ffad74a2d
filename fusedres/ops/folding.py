"""Whether a 1x1 convolution and its batch norm run as one GEMM in training, and in words why not.

Two questions, both answered per call and the same way for the same call. :func:`folding_choice`: is it a call that can
be folded, and under "auto" one that gains by it? :func:`numerically_safe`: would the result be as exact as eager's?
The second needs the moments of the input, and is asked before anything is updated.

``FUSEDRES_FOLDING`` = auto | always | never is what the argument "auto" stands for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .tracing import in_backward, is_blind

FOLDINGS = ("auto", "always", "never")

# The cost model of "auto" on a CPU. The GEMM is as large either way; what folding adds, the moments, two products per
# pixel of C x C and small matrices, grows with C and pays by the passes over a wide output that it saves. By dtype:
# the most input channels, the fewest pixels, and the fewest of images of 28x28 and larger, with which it never lost to
# the convolution and the fused batch norm (benchmarks/bench_bottleneck.py), with AVX-512. Of few pixels in large images
# the library's convolutions are slow: there it gains with more channels beside a convolution that has no more.
_GAINS_ON_CPU = {torch.float32: (128, 24_000, 6_000), torch.bfloat16: (128, 24_000, 24_000)}
_FEW_PIXELS_ON_CPU = {torch.float32: (256, 8_000)}  # most input channels, most pixels
_LARGE_IMAGE = 28 * 28
_OUTPUTS_PER_CHANNEL = 4

# Fewer pixels for each channel, and the small matrices cost as much as the passes over the pixels.
_PIXELS_PER_CHANNEL = 4


class Conditioning(NamedTuple):
    """How much larger terms are than what they add up to.

    Attributes:
        cancellation: max over k of ``sum_c w_kc^2 E[y_c^2] / (var_k + eps)``: what errors of the moments meet.
        rounding: the same with the variance of ``y_c`` for ``E[y_c^2]``: what rounding of the folded weight meets.
    """

    cancellation: float
    rounding: float


# How sums of float32 products are taken: in float64; in float32 about means, in short chains; in float32 from zero.
SUMS = ("float64", "shifted", "plain")

# The most with which errors stay below twice eager's.
#
# cancellation: the relative error of var is about 2^-24 times as large, and 2^-53 times where the sums are float64.
# Beyond 2^40 eager's float32 has no digits left either.
#
# rounding: of 16-bit weights, measured, 2^4 leads to 1.4 times eager's error, 2^5 to 2.4, 2^10 to 13. A float32 weight
# beside 16-bit activations is rounded by eager too, which costs it nearly as much. Float32 sums about means: 2^7 leads
# to 1.7 times, 2^10 to 3.9.
_LIMITS_OF_FLOAT32 = {
    "float64": Conditioning(2.0**40, math.inf),
    "shifted": Conditioning(2.0**40, 2.0**7),
    "plain": Conditioning(2.0**6, math.inf),
}
_LIMITS = {
    torch.float64: Conditioning(2.0**16, math.inf),
    torch.bfloat16: Conditioning(2.0**15, 2.0**4),
}
_MOST_ROUNDING_OF_FLOAT32_WEIGHTS = 2.0**8


# Calls after which a refused fold is looked at again; and, where looking waits for the device, an accepted one.
_LOOK_AGAIN = 256


def _fingerprint(y: Tensor) -> tuple[object, ...] | None:
    """What tells the calls of a layer apart where reading values costs little."""
    if not y.is_cpu or y.numel() == 0:
        return None
    return tuple(y.shape), tuple(y.detach()[-1, :16, y.size(2) // 2, y.size(3) // 2].tolist())


class FoldingDecision:
    """Whether the folds of one layer were exact enough when last looked at.

    A layer keeps it beside its parameters, not in its state_dict: a resumed run looks at its first call. On a CPU every
    call looks, but for the 256 after a refusal; elsewhere, where looking waits for the device, the first call does and
    every 256th. Calls that cannot look (compiled, captured in a CUDA graph) do as was last decided; those that a
    checkpoint repeats in backward do as they did, on a CPU also if the decision has changed since.

    Attributes:
        safe: None before the first look. why: in words.
    """

    _REMEMBERED = 64  # calls

    def __init__(self) -> None:
        self.safe: bool | None = None
        self.why = "not looked at yet"
        self._calls = 0  # since the last look
        self._last: tuple[object, ...] | None = None
        self._outer: tuple[object, ...] | None = None
        self._recent: dict[tuple[object, ...], bool] = {}

    def known(self, y: Tensor) -> bool | None:
        """The decision for a call with ``y``; None where the call has to look."""
        if is_blind(y):
            return self.safe is True
        if self.safe is None:
            return None
        if in_backward():
            return self._recent.get(_fingerprint(y), self.safe)
        looks = self._calls >= _LOOK_AGAIN or (self.safe and y.is_cpu)
        return None if looks else self.safe

    def asked(self, y: Tensor, known: bool | None) -> None:
        """A call begins for which the answer of :meth:`known` was this."""
        if in_backward():
            return
        self._calls += 1
        self._last = _fingerprint(y)
        if known is not None:
            self._remember(known, self._last)

    def found(self, safe: bool, why: str, y: Tensor | None = None) -> None:
        """That call has looked, at ``y``."""
        self.safe, self.why, self._calls = safe, why, 0
        self._remember(safe, self._last, None if y is None else _fingerprint(y))

    def expect(self, x: Tensor) -> None:
        """The next call is part of one that reads ``x``, by which it may be known when it is repeated."""
        self._outer = None if is_blind(x) else _fingerprint(x)

    def _remember(self, safe: bool, *calls: tuple[object, ...] | None) -> None:
        for call in (*calls, self._outer):
            if call is not None:
                self._recent[call] = safe
        self._outer = None
        while len(self._recent) > self._REMEMBERED:
            del self._recent[next(iter(self._recent))]


def _checked(folding: object, source: str) -> str:
    if folding not in FOLDINGS:
        raise ValueError(f"{source} must be one of {', '.join(FOLDINGS)}, but got {folding!r}")
    return str(folding)


_default = _checked(os.environ.get("FUSEDRES_FOLDING") or "auto", "FUSEDRES_FOLDING")


def folding_asked(folding: str) -> str:
    """The argument, or for "auto" the environment's word.

    Raises:
        ValueError: neither of the three words.
    """
    return _default if _checked(folding, "folding") == "auto" else folding


def never_gains(
    folding: str, dtype: torch.dtype, device: str, channels: Sequence[int], outputs: int, pixels: int, capability: str
) -> str | None:
    """Why a layer of at most so many pixels is not folded, in words; None if it may be.

    Arguments as of :func:`folding_choice`.
    """
    if folding == "never":
        return 'folding is "never"'
    if dtype == torch.float16:
        return "float16 has not the range that folded weights and their products need"
    if pixels < _PIXELS_PER_CHANNEL * max(channels):
        return f"{pixels} pixels are fewer than {_PIXELS_PER_CHANNEL} for each of {max(channels)} channels"
    if folding == "always" or device != "cpu":
        return None
    if capability != "avx512":
        return f"nothing has been measured to gain with {capability}"
    if dtype not in _GAINS_ON_CPU:
        return f"nothing has been measured in {dtype}"
    most, (most_channels, fewest, fewest_in_large) = max(channels), _GAINS_ON_CPU[dtype]
    channels_of_few, few = _FEW_PIXELS_ON_CPU.get(dtype, (0, 0))
    beside = pixels <= few and most <= channels_of_few and channels[0] <= most_channels
    widest = channels[0] if beside else most
    if widest > most_channels or outputs < _OUTPUTS_PER_CHANNEL * widest:
        return (
            f"{most} to {outputs} channels, and folding gains up to {most_channels} and to {_OUTPUTS_PER_CHANNEL} times"
            " as many"
        )
    if pixels < min(fewest, fewest_in_large):
        return f"{pixels} pixels of {dtype}, too few for folding to gain"
    return None


def folding_choice(
    folding: str,
    dtype: torch.dtype,
    device: str,
    channels: Sequence[int],
    outputs: int,
    pixels: int,
    *,
    image: int = _LARGE_IMAGE,
    capability: str = "avx512",
    training: bool = True,
    traced: bool = False,
    channels_last: bool = True,
    fits: bool = True,
    measured: str | None = None,
) -> tuple[bool, str]:
    """Whether a call folds, as far as its arguments tell; and the reason, in words.

    Args:
        folding: as :func:`folding_asked` gave it.
        dtype, device: of y as the convolution sees it; "cpu", "cuda", ...
        channels: input channels of the convolution, or of both.
        outputs: output channels.
        pixels: that the convolution writes, per channel; image: of them, those of one image.
        capability: instruction set of the CPU kernels.
        training: every norm uses the statistics of the batch.
        traced: something records or transforms the call, so that it must see plain operators.
        channels_last: y is, or both are.
        fits: dtypes, shapes and strides are those of one GEMM.
        measured: "fold" or "plain", which of them the table of a GPU says is faster; None where it does not know.
    """
    if not training:
        return False, "evaluation has nothing to fold in training"
    if traced:
        return False, "the call is traced or transformed"
    if not fits:
        return False, "dtypes, shapes or strides are not those of one GEMM"
    never = never_gains(folding, dtype, device, channels, outputs, pixels, capability)
    if never is not None:
        return False, never
    if folding == "always":
        return True, 'folding is "always"'
    if not channels_last:
        return False, "y is not channels_last"
    if device != "cpu":
        return measured == "fold", f"measured on {device}: {measured or 'nothing'}"
    _, fewest, fewest_in_large = _GAINS_ON_CPU[dtype]
    if pixels < (fewest_in_large if image >= _LARGE_IMAGE else fewest):
        return False, f"{pixels} pixels of {dtype}, too few for folding to gain"
    return True, f"{max(channels)} to {outputs} channels of {pixels} pixels"


def numerically_safe(found: Conditioning, dtype: torch.dtype, weight_dtype: torch.dtype, sums: str) -> tuple[bool, str]:
    """Whether folding is as exact as the convolution and its batch norm; where NaN is about, it is left to them.

    Args:
        dtype, weight_dtype: of y and of the convolution's weight. sums: one of ``SUMS``.
    """
    limits = _LIMITS_OF_FLOAT32[sums] if dtype == torch.float32 else _LIMITS[dtype]
    if dtype.itemsize == 2 and weight_dtype == torch.float32:
        limits = limits._replace(rounding=_MOST_ROUNDING_OF_FLOAT32_WEIGHTS)
    for name, value, limit in zip(Conditioning._fields, found, limits, strict=True):
        if not value <= limit:
            return False, f"{name} of {value:.3g} is above {limit:.3g}, the limit for {dtype}"
    return True, "exact enough"


def safe_unseen(dtype: torch.dtype, sums: str) -> bool:
    """Whether folding is exact enough for all values, so that a compiled graph need not look at them."""
    return dtype == torch.float32 and sums == "float64"
