"""The end of a Bottleneck in training on the device, its 1x1 convolution folded into the batch norm and not."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as tnf
from torch import Tensor

from fusedres import functional as F
from fusedres.ops.folding import FoldingDecision

from ..bench_conv1x1_bn_act import Layer
from ..cases import DTYPES, EPS, MOMENTUM, Case
from .device import HostDevice

WAYS = {"plain": "never", "fold": "always"}  # what they are as the argument `folding`


class FoldingCase(Case):
    """One layer on one device, channels_last: each way is checked and timed."""

    def __init__(self, layer: Layer, dtype: str, device: HostDevice) -> None:
        self.layer, self.dtype, self.device = layer, dtype, device
        n, c, k, side = layer.batch, layer.channels, 4 * layer.channels, layer.side
        self.stride = 1 if not layer.projection or c == 64 else 2
        self.channels = (c, c if self.stride == 1 else 2 * c) if layer.projection else (c,)
        generator = torch.Generator(device.device).manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device.device)

        def image(channels: int, side: int) -> Tensor:
            return draw(n, channels, side, side).relu().to(DTYPES[dtype]).contiguous(memory_format=torch.channels_last)

        def branch(channels: int, side: int) -> list[Tensor]:
            """What a convolution reads, its weight, and weight and bias of its norm."""
            weight = (draw(k, channels, 1, 1) / channels**0.5).to(DTYPES[dtype])
            return [image(channels, side), weight, draw(k) * 0.1 + 1, draw(k) * 0.1]

        self.inputs = branch(c, side)
        self.inputs += branch(self.channels[1], side * self.stride) if layer.projection else [image(k, side)]
        for t in self.inputs:
            t.requires_grad_()
        self.grad_out = draw(n, k, side, side).to(DTYPES[dtype]).contiguous(memory_format=torch.channels_last)
        self._expected = self.expected()

    @property
    def key(self) -> str:
        return f"conv1x1_bn_act[{self.layer.key}] {self.dtype}"

    def forward(self, way: str, inputs: Sequence[Tensor], stats: Sequence[Tensor], decision: Any = None) -> Tensor:
        """The output by "eager" or by one of ``WAYS``, which moves ``stats``."""
        norms = [(*stats[i : i + 2], *inputs[2 * i + 2 : 2 * i + 4]) for i in range(0, len(stats), 2)]
        y, w, other = inputs[0], inputs[1], inputs[4]
        if way == "eager":
            x = tnf.batch_norm(tnf.conv2d(y, w), *norms[0], True, MOMENTUM, EPS)
            if self.layer.projection:
                other = tnf.batch_norm(tnf.conv2d(other, inputs[5], None, self.stride), *norms[1], True, MOMENTUM, EPS)
            return x.add_(other).relu_()
        options = {"training": True, "momentum": MOMENTUM, "eps": EPS, "folding": WAYS[way], "decision": decision}
        if not self.layer.projection:
            return F.conv1x1_bn_act(y, w, *norms[0], other, **options)
        second = (other, inputs[5], *norms[1])
        return F.conv1x1_bn_add_conv1x1_bn_act(y, w, *norms[0], *second, stride2=self.stride, **options)

    def running(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Running statistics that have not been moved."""
        k, norms = 4 * self.layer.channels, len(self.channels)
        return [f(k, dtype=dtype, device=self.device.device) for _ in range(norms) for f in (torch.zeros, torch.ones)]

    def results(self, peer: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in self.inputs]
        stats = self.running(dtype)
        out = self.forward(peer, inputs, stats)
        return self.named(out, torch.autograd.grad(out, inputs, self.grad_out.to(out.dtype)), stats)

    def seconds(self, way: str) -> float:
        """Forward and backward called back to back, as in a training step. The values of a call are checked first.

        Raises:
            Exception: whatever keeps the way from running, or AssertionError for wrong values.
        """
        self.check(self.results(way), self._expected)
        stats, decision = self.running(), FoldingDecision()  # kept, as a layer keeps it

        def step() -> None:
            torch.autograd.grad(self.forward(way, self.inputs, stats, decision), self.inputs, self.grad_out)

        return statistics.median(self.device.step_times(step))
