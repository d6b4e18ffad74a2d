"""`python -m benchmarks.tune`: measures which backend is fastest on this GPU, shape by shape, and stores it.

And of the 1x1 convolutions of a ResNet-50's blocks in training, whether they are faster folded into their batch norms.

What it stores is what `auto` uses from the next process on: see `fusedres/ops/choices.py` for where, and for what makes
a table count. `fusedres info` shows it. To undo, delete the file.

    python -m benchmarks.tune                                   # about ten minutes
    python -m benchmarks.tune --batch 64 --dtype bfloat16 --layout channels_last
    python -m benchmarks.tune --op conv1x1_bn_act               # folding only; the rest then has no entries
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fusedres.ops import choices
from fusedres.ops.choices import Choice, FoldingChoice

from .bench_conv1x1_bn_act import Layer, layers
from .cases import DTYPES, FORMATS, OPS
from .gpu.device import CudaDevice, HostDevice
from .gpu.env import gpu_environment
from .gpu.folding import WAYS, FoldingCase
from .gpu.ops import OpMeasurement
from .shapes import Shape, resnet_shapes

Say = Callable[[str], None]

ORDER = ("cuda", "triton", "eager")  # of what is tried without a table
FOLDED_OP = "conv1x1_bn_act"
MARGIN = 1.03  # how much faster one must be than those before it to displace them
BATCHES = (1, 8, 32, 64, 128, 256)


@dataclass(frozen=True)
class Timing:
    """Seconds of forward and backward by backend; those that cannot run a shape are missing."""

    shape: Shape
    dtype: str
    layout: str
    seconds: Mapping[str, float]

    order = ORDER

    def choice(self, backend: str) -> Choice:
        elements, channels = self.shape.numel.bit_length(), self.shape.c.bit_length()
        return Choice(self.shape.op, self.dtype, self.layout, elements, channels, backend)


@dataclass(frozen=True)
class FoldingTiming:
    """Seconds of forward and backward of a layer, folded and not; a way that cannot run it is missing."""

    channels: tuple[int, ...]
    outputs: int
    pixels: int
    dtype: str
    seconds: Mapping[str, float]

    order = tuple(WAYS)

    def choice(self, way: str) -> FoldingChoice:
        channels = tuple(c.bit_length() for c in self.channels)
        return FoldingChoice(self.dtype, channels, self.outputs.bit_length(), self.pixels.bit_length(), way)


def fastest(seconds: Mapping[str, float], order: Sequence[str] = ORDER) -> str:
    """The one with the least time; one later in the order must be faster by the margin."""
    best = next(name for name in order if name in seconds)
    for name in order:
        if name in seconds and seconds[name] * MARGIN < seconds[best]:
            best = name
    return best


def decide(timings: Iterable[Timing | FoldingTiming]) -> list[Any]:
    """One choice per key: of the shapes that share it, by the geometric mean of their times."""
    groups: dict[Hashable, list[Timing | FoldingTiming]] = defaultdict(list)
    for timing in timings:
        if timing.seconds:
            groups[timing.choice(timing.order[0]).key].append(timing)
    decided = []
    for of in groups.values():
        order = of[0].order
        everywhere = [name for name in order if all(name in t.seconds for t in of)]
        if everywhere:
            means = {name: math.exp(sum(math.log(t.seconds[name]) for t in of) / len(of)) for name in everywhere}
            decided.append(of[0].choice(fastest(means, order)))
    return decided


def measure(
    shapes: Iterable[Shape],
    dtypes: Sequence[str],
    layouts: Sequence[str],
    device: HostDevice,
    say: Callable[[str], None],
) -> Iterator[Timing]:
    """Times of every backend; one that fails or is wrong on a shape is not among them."""
    for shape in shapes:
        for dtype in dtypes:
            for layout in layouts:
                try:
                    measurement = OpMeasurement(shape, dtype, layout, device)
                except torch.OutOfMemoryError:
                    say(f"{shape.key} {dtype} {layout}: does not fit this device")
                    continue
                seconds = time_each(ORDER, measurement.pipelined_seconds, measurement.case.key, say)
                device.free()
                yield Timing(shape, dtype, layout, seconds)


def measure_folding(
    of: Iterable[Layer], dtypes: Sequence[str], device: HostDevice, say: Say
) -> Iterator[FoldingTiming]:
    """Times of layers folded and not, in channels_last; a way that fails or is wrong is not among them."""
    for layer in of:
        for dtype in dtypes:
            try:
                case = FoldingCase(layer, dtype, device)
            except torch.OutOfMemoryError:
                say(f"{FOLDED_OP}[{layer.key}] {dtype}: does not fit this device")
                continue
            seconds = time_each(tuple(WAYS), case.seconds, case.key, say)
            device.free()
            pixels = layer.batch * layer.side**2
            yield FoldingTiming(case.channels, 4 * layer.channels, pixels, dtype, seconds)


def time_each(order: Sequence[str], measure: Callable[[str], float], key: str, say: Say) -> dict[str, float]:
    """Seconds of those that run, said in words too; and why there are none of the others."""
    seconds: dict[str, float] = {}

    def enter(name: str) -> None:
        try:
            seconds[name] = measure(name)
        except Exception as error:
            say(f"{key}: {name}: {type(error).__name__}: {str(error).splitlines()[0]}")

    for name in order:
        enter(name)
    if seconds:
        times = ", ".join(f"{name} {s * 1e6:.0f} us" for name, s in seconds.items())
        say(f"{key}: {times}: {fastest(seconds, order)}")
    return seconds


def main(arguments: Sequence[str] | None = None, device: HostDevice | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", choices=(*OPS, FOLDED_OP), help="repeatable; all by default")
    parser.add_argument("--batch", action="append", type=int, help=f"repeatable; default {BATCHES}")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="repeatable; all by default")
    parser.add_argument("--layout", action="append", choices=tuple(FORMATS), help="repeatable; both by default")
    parser.add_argument("--dry-run", action="store_true", help="store nothing")
    args = parser.parse_args(arguments)
    if device is None:
        if not torch.cuda.is_available():
            print(f"benchmarks.tune: torch {torch.__version__} sees no GPU", file=sys.stderr)
            return 2
        device = CudaDevice()
    batches, dtypes, layouts = args.batch or BATCHES, args.dtype or tuple(DTYPES), args.layout or tuple(FORMATS)

    def say(text: str) -> None:
        print(text, flush=True)

    shapes = [s for batch in batches for s in resnet_shapes(batch=batch)]
    shapes = sorted({s for s in shapes if not args.op or s.op in args.op}, key=lambda s: s.numel)
    decided = decide(measure(shapes, dtypes, layouts, device, say))
    folding: list[FoldingChoice] = []
    if "channels_last" in layouts and (not args.op or FOLDED_OP in args.op):
        of = sorted(layers(tuple(batches)), key=lambda layer: layer.batch * layer.channels * layer.side**2)
        # float16 has not the range for it
        folding = decide(measure_folding(of, [d for d in dtypes if d != "float16"], device, say))
    if not decided and not folding:
        print("benchmarks.tune: nothing could be measured", file=sys.stderr)
        return 1
    counts = {b: sum(c.backend == b for c in decided) for b in ORDER}
    counts |= {way: sum(c.choice == way for c in folding) for way in WAYS}
    print(", ".join(f"{name}: {n}" for name, n in counts.items()))
    if not args.dry_run:
        print("written:", choices.save(device.name, decided, gpu_environment(), folding))
    return 0


if __name__ == "__main__":
    sys.exit(main())
