"""`python -m benchmarks.bars`: every CPU bar of the project in one table, measured on this machine.

    python -m benchmarks.bars                      # about 20 minutes on one core; writes benchmarks/results/<device>/
    python -m benchmarks.bars --quick              # under 3 minutes; writes nothing
    python -m benchmarks.bars --only ops --only overhead

A shape that misses its bar is measured again, for longer, and the second measurement counts. Sections that are not run
keep their lines of an earlier run; every line names its commit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .bench_memory import SAVED, WARM_STEPS, measure_faults, measure_saved
from .bench_overhead import FORMS, SmallCall, measure_overhead, measure_small, small_cases
from .bench_resnet import measure_steps
from .cases import Case, Measurement, measure
from .environment import RESULTS, device_slug, environment, write_result
from .harness import geometric_mean, set_memory_regime
from .ops import HEADER, line
from .shapes import Shape, resnet_shapes

OP_BARS = {  # (layout, dtype): (geometric mean, its goal, worst shape)
    ("channels_last", "float32"): (1.40, 1.6, 1.10),
    ("channels_last", "bfloat16"): (2.3, 2.8, 1.6),
    ("contiguous", "float32"): (1.15, None, 1.0),
    ("contiguous", "bfloat16"): (1.8, None, 1.0),
}
STEP_BARS = {"float32": 1.02, "bfloat16": 1.10}
SAVED_BARS = {"resnet50": 0.95, "cifar_resnet20": 1.03}
FAULT_BAR_MB, OVERHEAD_BAR_US = 1.0, 8.0
SECTIONS = ("ops", "threads", "resnet", "memory", "overhead")


@dataclass(frozen=True)
class Bar:
    """One line of the table."""

    section: str
    what: str
    bar: str
    measured: str
    met: bool
    note: str = ""
    commit: str | None = None


class Run:
    """What the sections share: how much to measure, where to report."""

    def __init__(self, quick: bool, regime: str, say: Callable[[str], None]) -> None:
        self.quick, self.regime, self.say = quick, regime, say
        self.results: dict[str, Any] = {}

    def shapes(self) -> list[Shape]:
        shapes = resnet_shapes()
        if not self.quick:
            return shapes
        kept: dict[tuple[str, bool], list[Shape]] = {}
        for shape in shapes:
            kept.setdefault((shape.op, shape.residual), []).append(shape)
        return [
            s for of in kept.values() for s in {of[0]: 0, of[len(of) // 2]: 0, of[-1]: 0}
        ]  # largest, middle, smallest


def ops_bars(run: Run) -> list[Bar]:
    bars, every = [], []
    options: dict[str, Any] = {"max_seconds": 0.4, "max_rounds": 21} if run.quick else {}
    run.say(HEADER)
    for (layout, dtype), (mean_bar, goal, worst_bar) in OP_BARS.items():
        if run.quick and layout == "contiguous":
            continue
        measured: list[Measurement] = []
        for shape in run.shapes():
            case = Case(shape, dtype, layout)
            m = measure(case, **options)[0]
            if m.ratio < worst_bar and not run.quick:
                m = measure(case, gate=False, min_rounds=25, max_rounds=120, max_seconds=6.0)[0]
            measured.append(m)
            run.say(line(m))
        every += measured
        mean, worst = geometric_mean([m.ratio for m in measured]), min(measured, key=lambda m: m.ratio)
        goal_note = "" if goal is None else f"goal {goal}x {'reached' if mean >= goal else 'not reached'}"
        where = f"{layout} {dtype}"
        bars += [
            Bar("ops", f"{where}: geometric mean", f">= {mean_bar:.2f}x", f"{mean:.2f}x", mean >= mean_bar, goal_note),
            Bar(
                "ops",
                f"{where}: worst shape",
                f">= {worst_bar:.2f}x",
                f"{worst.ratio:.2f}x",
                worst.ratio >= worst_bar,
                f"{worst.key} [{worst.ratio_low:.2f}, {worst.ratio_high:.2f}],"
                f" {worst.share_of_copy:.0%} of copy bandwidth",
            ),
        ]
    run.results["ops"] = [m.as_dict() for m in every]
    return bars


def threads_bars(run: Run) -> list[Bar]:
    """The same shapes on two threads; wall clock, so only a quiet machine gives a number worth keeping."""
    if (os.cpu_count() or 1) < 2:
        return []
    bars, rows = [], []
    shapes = [s for s in run.shapes() if s.op != "add_act" or s.numel > 1 << 20]
    load = os.getloadavg()[0]
    for layout, dtype in (("channels_last", "float32"), ("channels_last", "bfloat16")):
        ratios = {}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            of = [measure(Case(s, dtype, layout), gate=threads == 2, clock="wall", max_seconds=1.5)[0] for s in shapes]
            ratios[threads] = geometric_mean([m.ratio for m in of])
            rows += [m.as_dict() | {"threads": threads, "clock": "wall"} for m in of]
        torch.set_num_threads(1)
        bars.append(
            Bar(
                "threads",
                f"{layout} {dtype}: geometric mean on 2 threads",
                f">= {ratios[1]:.2f}x (1 thread)",
                f"{ratios[2]:.2f}x",
                ratios[2] >= 0.97 * ratios[1],
                f"wall clock, within 3 % counts; load average before {load:.2f}",
            )
        )
        run.say(f"{bars[-1].what}: {bars[-1].measured}, wanted {bars[-1].bar}")
    run.results["threads"] = rows
    return bars


def resnet_bars(run: Run) -> list[Bar]:
    bars, rows = [], []
    for dtype, bar in STEP_BARS.items():
        options: dict[str, Any] = {"min_rounds": 7, "max_rounds": 7} if run.quick else {}
        kinds = ("eager", "fusedres") if run.quick else ("eager", "compile", "fusedres")
        if run.quick and dtype == "float32":
            options = {"min_rounds": 5, "max_rounds": 5}
        done = measure_steps("resnet50", dtype, kinds=kinds, **options)
        ratio = done.ratio("fusedres")
        for kind, timing in done.timings.items():
            to_eager = done.ratio(kind)
            rows.append(
                {
                    "model": "resnet50",
                    "batch": 8,
                    "dtype": dtype,
                    "kind": kind,
                    "step_ms": timing.median * 1e3,
                    "mad_ms": timing.mad * 1e3,
                    "images_per_s": 8 / timing.median,
                    "ratio_to_eager": to_eager.value,
                    "ratio_low": to_eager.low,
                    "ratio_high": to_eager.high,
                    "fault_mb_per_step": timing.faults_per_call * 4096e-6,
                    "rounds": done.rounds,
                    "seconds": timing.seconds,
                }
            )
            run.say(f"resnet50 {dtype} {kind}: {timing.median * 1e3:.1f} ms, {to_eager} of eager, {done.rounds} rounds")
        what = f"ResNet-50 step, batch 8, {'bfloat16 autocast' if dtype == 'bfloat16' else dtype}"
        bars.append(Bar("resnet", f"{what}: against eager", f">= {bar:.2f}x", str(ratio), ratio.value >= bar))
        if "compile" in kinds:
            done.baseline = "compile"
            against = done.ratio("fusedres")
            bars.append(Bar("resnet", f"{what}: against torch.compile", ">= 1.00x", str(against), against.value >= 1.0))
        torch.compiler.reset()
    run.results["resnet50"] = rows
    return bars


def memory_bars(run: Run) -> list[Bar]:
    bars = []
    saved = [measure_saved(*at) for at in SAVED]
    for row in saved:
        bar = SAVED_BARS[row["model"]]
        bars.append(
            Bar(
                "memory",
                f"{row['model']} {row['dtype']} batch {row['batch']}: saved for backward",
                f"<= {bar:.2f}x",
                f"{row['ratio']:.3f}x",
                row["ratio"] <= bar,
                f"{row['fused_mb']:.1f} MB, eager {row['eager_mb']:.1f} MB",
            )
        )
        run.say(f"{bars[-1].what}: {bars[-1].measured}, wanted {bars[-1].bar}")
    kinds = ("fusedres",) if run.quick else ("eager", "fusedres")
    faults = measure_faults(kinds, dtype="bfloat16" if run.quick else "float32", steps=3 if run.quick else 11)
    for row in faults:
        run.say(
            f"{row['kind']} {row['memory']}: {row['step_ms']:.0f} ms, {row['fault_mb_per_step']:.2f} MB faulted a step,"
            f" {row['resident_mb']:.0f} MB resident"
        )
    by = {(row["kind"], row["memory"]): row for row in faults}
    for kind in kinds:
        kept, default = by[kind, "recycled"], by[kind, "default"]
        resident = kept["resident_mb"] / default["resident_mb"]
        bars += [
            Bar(
                "memory",
                f"{kind}: faulted per step with reuse_host_memory, after {WARM_STEPS} steps",
                f"< {FAULT_BAR_MB:.0f} MB",
                f"{kept['fault_mb_per_step']:.3f} MB",
                kept["fault_mb_per_step"] < FAULT_BAR_MB,
                f"{default['fault_mb_per_step']:.0f} MB without; resident memory {resident:.2f}x",
            ),
            Bar(
                "memory",
                f"{kind}: step with reuse_host_memory against without",
                ">= 1.00x",
                f"{kept['default_over_recycled']:.2f}x",
                kept["default_over_recycled"] >= 1.0,
                f"{kept['step_ms']:.0f} ms, {default['step_ms']:.0f} ms without",
            ),
        ]
    run.results["memory"] = {"saved": saved, "steps": faults}
    return bars


def env_serves_natively() -> bool:
    """Whether the native CPU kernels are there: without them there is no overhead of theirs to measure."""
    import fusedres

    return all(row["cpu"]["served_by"] == "cpu" for row in fusedres.info()["ops"].values())


def overhead_bars(run: Run) -> list[Bar]:
    bars, calls = [], []
    if env_serves_natively():
        calls = [measure_overhead(form, dtype)[0] for form in FORMS for dtype in ("float32", "bfloat16")]
        worst_call = max(calls, key=lambda c: c["overhead_us"])
        overhead = worst_call["overhead_us"]
        bars.append(
            Bar(
                "overhead",
                "call with grad on 64 values less its raw op, slowest op",
                f"<= {OVERHEAD_BAR_US:.0f} us",
                f"{overhead:.1f} us",
                overhead <= OVERHEAD_BAR_US,
                f"{worst_call['op']} {worst_call['dtype']}: {worst_call['fused_us']:.1f} us in all,"
                f" eager {worst_call['eager_us']:.1f} us",
            )
        )
        for c in calls:
            run.say(
                f"{c['op']:<30}{'+residual' if c['residual'] else '':<10}{c['dtype']:>9} fused {c['fused_us']:5.1f} us,"
                f" raw op {c['raw_us']:5.1f} us, overhead {c['overhead_us']:5.1f} us, eager {c['eager_us']:5.1f} us"
            )
    small: list[SmallCall] = []
    for form, size, dtype, mode in small_cases(("float32",) if run.quick else ("float32", "bfloat16", "float16")):
        if run.quick and size[0] * size[1] * size[2] * size[3] not in (64, 2048):
            continue
        for layout in ("channels_last",) if run.quick else ("channels_last", "contiguous"):
            call = measure_small(form, size, dtype, mode, layout, max_seconds=0.15)[0]
            if call.ratio < 1.0 and not run.quick:
                call = measure_small(form, size, dtype, mode, layout, min_rounds=41, max_rounds=81, max_seconds=1.0)[0]
            small.append(call)
    worst = min(small, key=lambda c: c.ratio)
    slower = [c for c in small if c.ratio_high < 1.0]
    bars.append(
        Bar(
            "overhead",
            f"tensors under 64 KiB, worst of {len(small)}",
            ">= 1.00x",
            f"{worst.ratio:.2f}x",
            not slower,
            f"{worst.op} {'x'.join(map(str, worst.shape))} {worst.dtype} {worst.layout} {worst.mode}"
            f" [{worst.ratio_low:.2f}, {worst.ratio_high:.2f}]; {len(slower)} slower beyond their interval;"
            f" geometric mean {geometric_mean([c.ratio for c in small]):.2f}x",
        )
    )
    for call in sorted(small, key=lambda c: c.ratio)[:12]:
        run.say(
            f"{call.op:<30}{'x'.join(map(str, call.shape)):>12} {call.dtype:>9} {call.layout:>13} {call.mode:>7}"
            f" {call.eager_us:8.1f} us {call.fused_us:8.1f} us {call.ratio:5.2f}x"
            f" [{call.ratio_low:.2f}, {call.ratio_high:.2f}]"
        )
    run.results["overhead"] = {"calls": calls, "small": [c.as_dict() for c in small]}
    return bars


MEASURE = {
    "ops": ops_bars,
    "threads": threads_bars,
    "resnet": resnet_bars,
    "memory": memory_bars,
    "overhead": overhead_bars,
}


def table(bars: Sequence[Bar]) -> str:
    """The bars as a Markdown table."""
    lines = ["| Bar | Wanted | Measured | Met | Remarks |", "|---|---|---|---|---|"]
    lines += [f"| {b.what} | {b.bar} | {b.measured} | {'yes' if b.met else '**no**'} | {b.note} |" for b in bars]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bars", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds, under 3 minutes; writes nothing")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="repeatable; every section by default")
    parser.add_argument("--out", type=Path, help=f"where to write JSON (default {RESULTS.name}/{device_slug()})")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a bar is missed")
    args = parser.parse_args(arguments)

    torch.set_num_threads(1)
    regime = set_memory_regime("recycled")
    env = environment(regime)
    run = Run(args.quick, regime, lambda text: print(text, flush=True))
    sections = args.only or [s for s in SECTIONS if not (args.quick and s == "threads")]
    bars: list[Bar] = []
    start = time.perf_counter()
    for section in sections:
        run.say(f"\n== {section} ({time.perf_counter() - start:.0f} s)")
        bars += MEASURE[section](run)

    print(
        f"\n{env['cpu']}, one thread unless said, memory {regime}, torch {env['torch']}, fusedres {env['fusedres']}"
        f" ({env['fusedres_cpu_capability']}), commit {env['commit']}, {time.perf_counter() - start:.0f} s\n"
    )
    print(table(bars))
    missed = [b for b in bars if not b.met]
    print(f"\n{len(bars) - len(missed)} of {len(bars)} bars met")
    if not (args.quick or args.no_write) or args.out:
        for name, body in run.results.items():
            write_result(name, env, body, args.out)
        directory = args.out or RESULTS / device_slug()
        earlier = (
            json.loads((directory / "bars.json").read_text())["results"] if (directory / "bars.json").exists() else []
        )
        lines = [b for b in earlier if b["section"] not in sections]
        lines += [asdict(replace(b, commit=env["commit"])) for b in bars]
        lines.sort(key=lambda b: SECTIONS.index(b["section"]))
        print("written:", write_result("bars", env, lines, directory).parent.name)
    return 1 if missed and args.strict else 0


if __name__ == "__main__":
    sys.exit(main())
