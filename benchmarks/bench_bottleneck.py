"""A whole Bottleneck in training, forward + backward: its end folded, and not.

    python -m benchmarks.bench_bottleneck      # every block of ResNet-50, about 6 minutes; writes results/<device>/

`eager` is the block of PyTorch modules, `never` with fused batch norms, `recompute` the same without keeping what conv2
and conv3 read, `always` one Function with the last convolution folded, `auto` what `fusedres/ops/folding.py` chooses.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from torch import nn

import fusedres
from benchmarks.cases import DTYPES
from benchmarks.environment import environment, write_result
from benchmarks.harness import Comparison, compare, set_memory_regime
from benchmarks.plain_resnet import PlainBottleneck

# inner channels, side of the output
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))
BATCHES = (8, 32)
WAYS = {
    "never": {"folding": "never"},
    "recompute": {"folding": "never", "recompute": True},
    "always": {"folding": "always"},
    "auto": {"folding": "auto"},
}


@dataclass(frozen=True)
class Block:
    """The first block of a stage, which has a projection shortcut, or one of the others."""

    batch: int
    channels: int
    side: int
    projection: bool

    @property
    def key(self) -> str:
        return f"{self.batch}x{self.channels}x{self.side}x{self.side} {'first' if self.projection else 'other'}"

    @property
    def stride(self) -> int:
        return 2 if self.projection and self.channels > 64 else 1

    @property
    def inputs(self) -> int:
        first = 64 if self.channels == 64 else 2 * self.channels
        return first if self.projection else 4 * self.channels


def blocks(batches: tuple[int, ...] = BATCHES) -> list[Block]:
    return [Block(n, c, side, projection) for n in batches for c, side in STAGES for projection in (True, False)]


def candidates(block: Block, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """One call of forward and backward for each way, on the same weights."""
    outputs = 4 * block.channels
    downsample = None
    if block.projection:
        conv = nn.Conv2d(block.inputs, outputs, 1, block.stride, bias=False)
        downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))
    ours = fusedres.Bottleneck(block.inputs, block.channels, block.stride, downsample)
    plain = PlainBottleneck(block.inputs, block.channels, block.stride)
    plain.load_state_dict(ours.state_dict())
    size = (block.batch, block.inputs, block.side * block.stride, block.side * block.stride)
    x = torch.randn(size).relu().to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn(block.batch, outputs, block.side, block.side).to(dtype)
    dy = dy.contiguous(memory_format=torch.channels_last)

    def step(module: nn.Module, settings: dict[str, Any]) -> Callable[[], Any]:
        module = copy.deepcopy(module).to(memory_format=torch.channels_last)
        for conv in module.modules():
            if isinstance(conv, nn.Conv2d):
                conv.to(dtype)
        for name, value in settings.items():
            setattr(module, name, value)
        leaves = [x, *module.parameters()]
        return lambda: torch.autograd.grad(module(x), leaves, dy)

    return {"eager": step(plain, {}), **{way: step(ours, settings) for way, settings in WAYS.items()}}


def measure(block: Block, dtype: str, **options: Any) -> tuple[dict[str, Any], Comparison]:
    """Ratios of medians to `never`, and milliseconds."""
    done = compare(candidates(block, DTYPES[dtype]), baseline="never", **options)
    row: dict[str, Any] = asdict(block) | {"dtype": dtype}
    for name, timing in done.timings.items():
        row[f"{name}_ms"] = timing.median * 1e3
    for name in ("eager", "recompute", "always", "auto"):
        ratio = done.ratio(name)
        row |= {name: ratio.value, f"{name}_low": ratio.low, f"{name}_high": ratio.high}
    return row, done


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.key)
def test_bottleneck(record: Any, settings: Any, block: Block, dtype: str) -> None:
    """`auto`; the ratios to `never` are in extra_info."""
    if settings.quick and (block.batch > 8 or block.channels not in (64, 256)):
        pytest.skip("--quick: two stages")
    row, done = measure(block, dtype, **settings.rounds)
    record(done.timings["auto"].seconds, group=f"{block.key} {dtype}", **row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, action="append", help=f"batch sizes (default {BATCHES})")
    batches = tuple(parser.parse_args().batch or BATCHES)
    torch.set_num_threads(1)
    env = environment(set_memory_regime("recycled"))
    rows = []
    print(f"{'block':24s} {'dtype':9s} {'never ms':>9s}   eager  recompute  always    auto  (speed against never)")
    for dtype in ("float32", "bfloat16"):
        for block in blocks(batches):
            row, _ = measure(block, dtype, min_rounds=5, max_rounds=15, max_seconds=6.0)
            rows.append(row)
            ratios = "  ".join(f"{row[name]:6.3f}" for name in ("eager", "recompute", "always", "auto"))
            print(f"{block.key:24s} {dtype:9s} {row['never_ms']:9.1f}  {ratios}", flush=True)
    print("written:", write_result("bottleneck", env, rows))


if __name__ == "__main__":
    main()
