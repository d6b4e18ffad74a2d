"""The end of a Bottleneck in training, forward + backward: a 1x1 convolution folded into its batch norm, and not.

    python -m benchmarks.bench_conv1x1_bn_act      # every layer of ResNet-50, about 4 minutes; writes results/<device>/

`never` is the library's convolution and the fused batch norm, `always` one GEMM, `auto` what the cost model of
`fusedres/ops/folding.py` chooses, `eager` convolution, batch norm, addition and ReLU of PyTorch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fusedres
from benchmarks.cases import DTYPES
from benchmarks.environment import environment, write_result
from benchmarks.harness import Comparison, compare, set_memory_regime

# input channels, side of the image; the output has four times as many channels
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))
BATCHES = (8, 32)


@dataclass(frozen=True)
class Layer:
    """A last 1x1 convolution of a Bottleneck with its batch norm, shortcut and ReLU; or with a projection shortcut."""

    batch: int
    channels: int
    side: int
    projection: bool = False

    @property
    def key(self) -> str:
        shortcut = "projection" if self.projection else "identity"
        return f"{self.batch}x{self.channels}x{self.side}x{self.side}->{4 * self.channels} {shortcut}"


def layers(batches: tuple[int, ...] = BATCHES) -> list[Layer]:
    return [Layer(n, c, side, projection) for n in batches for c, side in STAGES for projection in (False, True)]


def _image(n: int, c: int, side: int, dtype: torch.dtype) -> Tensor:
    image = torch.randn(n, c, side, side).relu().to(dtype)
    return image.contiguous(memory_format=torch.channels_last).requires_grad_()


def _norm(channels: int) -> list[Tensor]:
    return [
        *(v(channels) for v in (torch.zeros, torch.ones)),
        *(v(channels, requires_grad=True) for v in (torch.ones, torch.zeros)),
    ]


def candidates(layer: Layer, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """One call of forward and backward for each way."""
    n, c, side, k = layer.batch, layer.channels, layer.side, 4 * layer.channels
    stride = 1 if c == 64 else 2
    y, inputs = _image(n, c, side, dtype), c if c == 64 else 2 * c
    other = _image(n, inputs, side * stride, dtype) if layer.projection else _image(n, k, side, dtype)
    w, w2 = (
        (torch.randn(k, i, 1, 1) / i**0.5).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        for i in (c, inputs)
    )
    bn, bn2 = _norm(k), _norm(k)
    leaves = [y, w, *bn[2:], other, *((w2, *bn2[2:]) if layer.projection else ())]
    dy = torch.randn(n, k, side, side).to(dtype).contiguous(memory_format=torch.channels_last)

    def folded(mode: str) -> Tensor:
        if layer.projection:
            return fusedres.functional.conv1x1_bn_add_conv1x1_bn_act(
                y, w, *bn, other, w2, *bn2, stride2=stride, training=True, folding=mode
            )
        return fusedres.functional.conv1x1_bn_act(y, w, *bn, other, training=True, folding=mode)

    def eager(_: str) -> Tensor:
        x = F.batch_norm(F.conv2d(y, w), *bn, training=True)
        shortcut = F.batch_norm(F.conv2d(other, w2, None, stride), *bn2, training=True) if layer.projection else other
        return x.add_(shortcut).relu_()

    def step(forward: Callable[[str], Tensor], mode: str) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward(mode), leaves, dy)

    return {"eager": step(eager, ""), **{mode: step(folded, mode) for mode in ("never", "always", "auto")}}


def measure(layer: Layer, dtype: str, **options: Any) -> tuple[dict[str, Any], Comparison]:
    """Ratios of medians to `never`, and milliseconds."""
    done = compare(candidates(layer, DTYPES[dtype]), baseline="never", **options)
    row: dict[str, Any] = asdict(layer) | {"dtype": dtype}
    for name, timing in done.timings.items():
        row[f"{name}_ms"] = timing.median * 1e3
    for name in ("always", "auto"):
        ratio = done.ratio(name)
        row |= {name: ratio.value, f"{name}_low": ratio.low, f"{name}_high": ratio.high}
    return row, done


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", layers(), ids=lambda layer: layer.key)
def test_conv1x1_bn_act(record: Any, settings: Any, layer: Layer, dtype: str) -> None:
    """`auto`; the ratios to `never` are in extra_info."""
    if settings.quick and (layer.batch > 8 or layer.channels not in (64, 256)):
        pytest.skip("--quick: two layers")
    row, done = measure(layer, dtype, **settings.rounds)
    record(done.timings["auto"].seconds, group=f"{layer.key} {dtype}", **row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, action="append", help=f"batch sizes (default {BATCHES})")
    batches = tuple(parser.parse_args().batch or BATCHES)
    torch.set_num_threads(1)
    env = environment(set_memory_regime("recycled"))
    rows = []
    print(f"{'layer':42s} {'dtype':9s} {'eager':>8s} {'never':>8s} {'always':>8s} {'auto':>8s} ms   always   auto")
    for dtype in ("float32", "bfloat16"):
        for layer in layers(batches):
            row, _ = measure(layer, dtype, min_rounds=7, max_rounds=25, max_seconds=2.0)
            rows.append(row)
            times = " ".join(f"{row[f'{name}_ms']:8.2f}" for name in ("eager", "never", "always", "auto"))
            print(f"{layer.key:42s} {dtype:9s} {times}     {row['always']:5.2f}x {row['auto']:5.2f}x", flush=True)
    print("written:", write_result("conv1x1_bn_act", env, rows))


if __name__ == "__main__":
    main()
