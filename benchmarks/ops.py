"""`python -m benchmarks.ops`: ops against eager, one line per shape. What to run while tuning a kernel.

python -m benchmarks.ops --op batch_norm_act --dtype bfloat16 --shape 64x56x56 --rounds 31
python -m benchmarks.ops --layout contiguous --worst 10 --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from .cases import DTYPES, FORMATS, OPS, Case, Measurement, measure
from .environment import environment
from .harness import CacheEvictor, geometric_mean, set_memory_regime
from .shapes import Shape, resnet_shapes

HEADER = (
    f"{'case':<54}{'dtype':>9} {'layout':>13} {'eager ms':>9} {'fused ms':>9} {'ratio':>7} {'95 % interval':>16}"
    f" {'fwd':>6} {'bwd':>6} {'GB/s':>6} {'of copy':>8} {'faults':>7}"
)


def measure_all(
    shapes: Sequence[Shape], dtypes: Iterable[str], layouts: Iterable[str], *, gate: bool = True, **options: Any
) -> Iterator[Measurement]:
    for layout in layouts:
        for dtype in dtypes:
            for shape in shapes:
                yield measure(Case(shape, dtype, layout), gate=gate, **options)[0]


def line(m: Measurement) -> str:
    return (
        f"{m.key:<54}{m.dtype:>9} {m.layout:>13} {m.eager_ms:9.3f} {m.fused_ms:9.3f} {m.ratio:6.2f}x"
        f" [{m.ratio_low:6.2f}, {m.ratio_high:6.2f}] {m.forward_ratio:6.2f} {m.backward_ratio:6.2f}"
        f" {m.fused_gb_per_s:6.1f} {m.share_of_copy:8.0%} {m.fused_faults:7.1f}"
    )


def summary(measurements: Sequence[Measurement]) -> list[str]:
    """Geometric mean and worst shape by dtype and layout, and by op within them."""
    lines = []
    for layout in FORMATS:
        for dtype in DTYPES:
            of = [m for m in measurements if (m.layout, m.dtype) == (layout, dtype)]
            for op in (None, *OPS) if len({m.op for m in of}) > 1 else (None,):
                chosen = [m for m in of if op in (None, m.op)]
                if chosen:
                    worst = min(chosen, key=lambda m: m.ratio)
                    mean = geometric_mean([m.ratio for m in chosen])
                    lines.append(
                        f"{layout:>13} {dtype:>9} {op or 'all ops':<30} geometric mean {mean:5.2f}x,"
                        f" worst {worst.ratio:5.2f}x {worst.key} ({len(chosen)} shapes)"
                    )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", choices=OPS, help="repeatable; all by default")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES), help="default float32, bfloat16")
    parser.add_argument("--layout", action="append", choices=tuple(FORMATS), help="default channels_last")
    parser.add_argument("--shape", action="append", help="CxHxW; default every one of ResNet-18 and -50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, help="exactly this many rounds")
    parser.add_argument("--threads", type=int, default=1, help="above 1 the clock is wall time")
    parser.add_argument("--memory", choices=("recycled", "default"), default="recycled")
    parser.add_argument("--evict", action="store_true", help="empty the last-level cache before every call")
    parser.add_argument("--no-gate", action="store_true", help="skip the comparison of values (tuning only)")
    parser.add_argument("--worst", type=int, metavar="N", help="print only the N slowest ratios")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(arguments)

    torch.set_num_threads(args.threads)
    regime = set_memory_regime(args.memory)
    shapes = [s for s in resnet_shapes(batch=args.batch) if not args.op or s.op in args.op]
    if args.shape:
        shapes = [s for s in shapes if f"{s.c}x{s.h}x{s.w}" in args.shape]
    if not shapes:
        parser.error("no ResNet shape matches --op and --shape")
    options: dict[str, Any] = {"clock": "cpu" if args.threads == 1 else "wall", "gate": not args.no_gate}
    if args.rounds:
        options |= {"min_rounds": args.rounds, "max_rounds": args.rounds}
    if args.evict:
        options |= {"before": CacheEvictor(), "min_sample_seconds": 0.0}

    env = environment(regime)
    live = not args.json and not args.worst
    if not args.json:
        served = ", ".join(sorted(set(env["served_by"].values())))
        print(f"# {env['cpu']}, {args.threads} thread(s), memory {regime}, torch {env['torch']}, served by {served}")
        print(HEADER)
    measurements = []
    for m in measure_all(shapes, args.dtype or ("float32", "bfloat16"), args.layout or ("channels_last",), **options):
        measurements.append(m)
        if live:
            print(line(m), flush=True)
    if args.worst:
        measurements.sort(key=lambda m: m.ratio)
    if args.json:
        print(json.dumps({"environment": env, "results": [m.as_dict() for m in measurements[: args.worst]]}, indent=1))
        return 0
    if args.worst:
        print("\n".join(line(m) for m in measurements[: args.worst]))
    print("\n".join(summary(measurements)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
