"""`python -m benchmarks.tune`: measures which backend is fastest on this GPU, shape by shape, and stores it.

What it stores is what `auto` uses from the next process on: see `fusedres/ops/choices.py` for where, and for what makes
a table count. `fusedres info` shows it. To undo, delete the file.

    python -m benchmarks.tune                                   # about ten minutes
    python -m benchmarks.tune --batch 64 --dtype bfloat16 --layout channels_last
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fusedres.ops import choices
from fusedres.ops.choices import Choice

from .cases import DTYPES, FORMATS, OPS
from .gpu.device import CudaDevice, HostDevice
from .gpu.env import gpu_environment
from .gpu.ops import OpMeasurement
from .shapes import Shape, resnet_shapes

Say = Callable[[str], None]

ORDER = ("cuda", "triton", "eager")  # of what is tried without a table
MARGIN = 1.03  # how much faster a backend must be than those before it to displace them
BATCHES = (1, 8, 32, 64, 128, 256)


@dataclass(frozen=True)
class Timing:
    """Seconds of forward and backward by backend; those that cannot run a shape are missing."""

    shape: Shape
    dtype: str
    layout: str
    seconds: Mapping[str, float]

    def choice(self, backend: str) -> Choice:
        elements, channels = self.shape.numel.bit_length(), self.shape.c.bit_length()
        return Choice(self.shape.op, self.dtype, self.layout, elements, channels, backend)


def fastest(seconds: Mapping[str, float]) -> str:
    """The backend with the least time; one later in the order must be faster by the margin."""
    best = next(backend for backend in ORDER if backend in seconds)
    for backend in ORDER:
        if backend in seconds and seconds[backend] * MARGIN < seconds[best]:
            best = backend
    return best


def decide(timings: Iterable[Timing]) -> list[Choice]:
    """One choice per key: of the shapes that share it, by the geometric mean of their times."""
    groups: dict[Choice, list[Timing]] = defaultdict(list)
    for timing in timings:
        if timing.seconds:
            groups[timing.choice("eager")].append(timing)
    decided = []
    for of in groups.values():
        everywhere = [b for b in ORDER if all(b in t.seconds for t in of)]
        if everywhere:
            means = {b: math.exp(sum(math.log(t.seconds[b]) for t in of) / len(of)) for b in everywhere}
            decided.append(of[0].choice(fastest(means)))
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
                seconds: dict[str, float] = {}
                for backend in ORDER:
                    time_backend(measurement, backend, seconds, say)
                device.free()
                if seconds:
                    times = ", ".join(f"{b} {s * 1e6:.0f} us" for b, s in seconds.items())
                    say(f"{shape.key} {dtype} {layout}: {times}: {fastest(seconds)}")
                yield Timing(shape, dtype, layout, seconds)


def time_backend(measurement: OpMeasurement, backend: str, seconds: dict[str, float], say: Say) -> None:
    """Enter the time of a backend into ``seconds``, or say why there is none."""
    try:
        seconds[backend] = measurement.pipelined_seconds(backend)
    except Exception as error:
        say(f"{measurement.case.key}: {backend}: {type(error).__name__}: {str(error).splitlines()[0]}")


def main(arguments: Sequence[str] | None = None, device: HostDevice | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", choices=OPS, help="repeatable; all by default")
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
    shapes = [s for batch in args.batch or BATCHES for s in resnet_shapes(batch=batch)]
    shapes = sorted({s for s in shapes if not args.op or s.op in args.op}, key=lambda s: s.numel)
    timings = measure(
        shapes, args.dtype or tuple(DTYPES), args.layout or tuple(FORMATS), device, lambda text: print(text, flush=True)
    )
    decided = decide(timings)
    if not decided:
        print("benchmarks.tune: nothing could be measured", file=sys.stderr)
        return 1
    counts = {b: sum(c.backend == b for c in decided) for b in ORDER}
    print(", ".join(f"{b}: {n}" for b, n in counts.items()))
    if not args.dry_run:
        print("written:", choices.save(device.name, decided, gpu_environment()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
