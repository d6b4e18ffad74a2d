"""Bytes that an op moves: what it must, and what our passes do, launch by launch.

Each family has a function ``<op>_traffic`` beside each of its ops that returns a :class:`Traffic`. Speed is argued with
these numbers: a batch norm computes next to nothing, so its time is its bytes over the bandwidth of the memory. The
tests count what the kernels touch in Triton's interpreter and compare.

Counted are distinct bytes per launch: a vector that every block reads counts once. Launches of the ops with statistics:

- two-pass form, training: ``statistics`` (partial sums per tile), ``finalise`` (merges them, running statistics),
  ``apply``; backward ``reduce``, ``finalise``, ``apply``;
- one-pass form: everything in one launch, for the values of a channel stay on the chip;
- evaluation: forward ``apply``; backward ``apply`` and, for gradients of weight and bias, ``finalise``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .layout import LANES

FORMS = ("two_pass", "one_pass")
LAYOUTS = ("channels_last", "contiguous")

COUNTER = 8  # bytes of num_batches_tracked
STATS = 3  # vectors of saved statistics: mean, rstd, mean_low
PARTIALS = 3  # numbers per tile and channel of a forward: shift, mean - shift, M2
SUMS = 2  # of a backward: of g, and of g times the centred x
COEFFICIENTS = 2  # per channel, from the backward's finalise to its apply


@dataclass(frozen=True)
class Launch:
    """Distinct bytes that one kernel launch loads and stores."""

    name: str
    loads: int
    stores: int

    @property
    def total(self) -> int:
        return self.loads + self.stores


@dataclass(frozen=True)
class Traffic:
    """What a call moves.

    Attributes:
        floor: bytes that any implementation of this form moves: activations and masks once for each pass over them,
            vectors per channel once in and once out.
        launches: what ours move, in order; partial sums and vectors that a later launch reads again included.
    """

    floor: int
    launches: tuple[Launch, ...]

    @property
    def loads(self) -> int:
        return sum(launch.loads for launch in self.launches)

    @property
    def stores(self) -> int:
        return sum(launch.stores for launch in self.launches)

    @property
    def total(self) -> int:
        return self.loads + self.stores

    def __add__(self, other: Traffic) -> Traffic:
        """Of two calls, one after the other."""
        return Traffic(self.floor + other.floor, self.launches + other.launches)


class Sizes:
    """Bytes of what the formulas are made of, for one (N, C, H, W) tensor.

    Attributes:
        x: the tensor. mask: one bit per element, in whole words.
        param: one vector per channel in the dtype of weight, bias and running statistics.
        wide: one in the dtype of the saved statistics: float32, or float64 with float64 tensors.

    Raises:
        ValueError: a shape that is not four sizes, or an unknown layout.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, layout: str, param_dtype: torch.dtype | None = None
    ) -> None:
        if len(shape) != 4 or min(shape) < 0:
            raise ValueError(f"shape must be (N, C, H, W), but got {tuple(shape)}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, but got {layout!r}")
        n, c, h, w = shape
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.x = n * c * h * w * dtype.itemsize
        self.mask = mask_size(n * c * h * w) if layout == "channels_last" else n * c * mask_size(h * w)
        self.param = c * (param_dtype or wide).itemsize
        self.wide = c * wide.itemsize


def mask_size(elements: int) -> int:
    """Bytes of one bit per element in 16-bit words."""
    return 2 * ((elements + LANES - 1) // LANES)


def check_form(form: str) -> bool:
    """Whether ``form`` is the one-pass form.

    Raises:
        ValueError: an unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, but got {form!r}")
    return form == "one_pass"


def forward_traffic(
    *,
    normed: int,
    inputs: int,
    outputs: int,
    params: int,
    running: int,
    counters: int,
    cumulative: bool,
    stats: int,
    partials: int,
    training: bool,
    form: str,
) -> Traffic:
    """The traffic of a forward with statistics, from the bytes of its pieces.

    Args:
        normed: tensors that are normalised. inputs: all that the last pass reads. outputs: what it writes.
        params: weight and bias. running: running statistics. counters: ``num_batches_tracked``, in training.
        cumulative: whether ``finalise`` reads them. stats: what is saved.
        partials: what the first pass leaves for ``finalise``.
    """
    one_pass = check_form(form)
    updated = running + counters if training else 0
    read, written = inputs + params + running + (counters if training else 0), outputs + stats + updated
    if not training or one_pass:
        return Traffic(read + written, (Launch("one_pass" if training else "apply", read, written),))
    return Traffic(
        normed + read + written,
        (
            Launch("statistics", normed + counters, partials + counters),
            Launch("finalise", partials + running + counters * cumulative, stats + running),
            Launch("apply", inputs + params + stats, outputs),
        ),
    )


def backward_traffic(
    *,
    inputs: int,
    gradients: int,
    early: int,
    params: int,
    stats: int,
    affine_grads: int,
    partials: int,
    coefficients: int,
    training: bool,
    form: str,
) -> Traffic:
    """The traffic of a backward with sums per channel, from the bytes of its pieces.

    Args:
        inputs: dy, the normalised tensors and the mask: what each pass reads. gradients: dx, zero where not wanted.
        early: gradients that need no sums (of the residual); written by the last pass.
        params: weight and bias. stats: the saved statistics. affine_grads: dweight and dbias, zero where not wanted.
        partials: what the first pass leaves for ``finalise``. coefficients: what that leaves for ``apply``.
    """
    one_pass = check_form(form)
    sums = affine_grads > 0 or (training and gradients > 0)
    read, written = inputs + params + stats, gradients + early + affine_grads
    if one_pass or not sums:
        return Traffic(read + written, (Launch("one_pass" if sums else "apply", read, written),))
    if not training or not gradients:
        # nothing waits for the sums but the gradients of weight and bias
        first = Launch("apply" if gradients else "reduce", read, gradients + early + partials)
        return Traffic(read + written, (first, Launch("finalise", partials + stats, affine_grads)))
    return Traffic(
        inputs + read + written,
        (
            Launch("reduce", read, partials),
            Launch("finalise", partials + stats + params, affine_grads + coefficients),
            Launch("apply", read + coefficients, gradients + early),
        ),
    )
