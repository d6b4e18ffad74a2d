"""`python -m benchmarks.report [DIR]`: Markdown tables from the JSON that `benchmarks.bars` wrote.

Nothing is measured here; every number, and the line that says where it comes from, is read from the files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .environment import RESULTS, device_slug
from .harness import geometric_mean


def _read(directory: Path, name: str) -> tuple[dict[str, Any], Any] | None:
    path = directory / f"{name}.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    return content["environment"], content["results"]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _where(env: dict[str, Any]) -> str:
    return (
        f"{env['cpu']}, {env['threads']} thread, memory {env['memory_regime']}, torch {env['torch']},"
        f" fusedres {env['fusedres']} ({env['fusedres_cpu_capability']}), commit {env['commit']},"
        f" load average {env['load_average']}"
    )


def ops_summary(results: list[dict[str, Any]]) -> str:
    """One row for each op, layout and dtype: geometric mean, worst and best shape, share of copy bandwidth."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for m in results:
        op = m["op"] + ("+residual" if m["residual"] and m["op"] == "batch_norm_act" else "")
        groups.setdefault((op, m["layout"], m["dtype"]), []).append(m)
    rows = []
    for (op, layout, dtype), of in sorted(groups.items()):
        ratios, shares = [m["ratio"] for m in of], sorted(m["share_of_copy"] for m in of)
        spread = f"{min(ratios):.2f} .. {max(ratios):.2f}"
        share = f"{shares[0]:.0%} .. {shares[-1]:.0%}"
        rows.append((f"`{op}`", layout, dtype, f"**{geometric_mean(ratios):.2f}x**", spread, share, str(len(of))))
    return _table(("Op", "Layout", "dtype", "Speed against eager", "Range", "Share of copy bandwidth", "Shapes"), rows)


def ops_detail(results: list[dict[str, Any]]) -> str:
    """Every shape."""
    rows = [
        (
            f"`{m['op']}{'+residual' if m['residual'] and m['op'] == 'batch_norm_act' else ''}`",
            "x".join(map(str, m["shape"])),
            m["layout"],
            m["dtype"],
            f"{m['eager_ms']:.3f}",
            f"{m['fused_ms']:.3f}",
            f"{m['ratio']:.2f}x [{m['ratio_low']:.2f}, {m['ratio_high']:.2f}]",
            f"{m['fused_gb_per_s']:.0f}",
            f"{m['share_of_copy']:.0%}",
        )
        for m in results
    ]
    return _table(("Op", "x", "Layout", "dtype", "eager ms", "fused ms", "Ratio", "GB/s", "of copy"), rows)


def steps(results: list[dict[str, Any]]) -> str:
    rows = [
        (
            m["model"],
            "bfloat16 autocast" if m["dtype"] == "bfloat16" else m["dtype"],
            m["kind"],
            f"{m['step_ms']:.0f}",
            f"{m['images_per_s']:.1f}",
            f"{m['ratio_to_eager']:.3f}x [{m['ratio_low']:.3f}, {m['ratio_high']:.3f}]",
        )
        for m in results
    ]
    return _table(("Model", "dtype", "", "ms a step", "images/s", "Speed against eager"), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument(
        "directory", type=Path, nargs="?", default=RESULTS / device_slug(), help="default: this machine's"
    )
    parser.add_argument("--shapes", action="store_true", help="every shape as well")
    args = parser.parse_args(arguments)

    bars, ops, resnet = (_read(args.directory, name) for name in ("bars", "ops", "resnet50"))
    if bars is None and ops is None and resnet is None:
        parser.error(f"no results in {args.directory.name}: run python -m benchmarks.bars first")
    if bars is not None:
        env, results = bars
        rows = [(b["what"], b["bar"], b["measured"], "yes" if b["met"] else "**no**", b["note"]) for b in results]
        print(f"{_where(env)}\n\n{_table(('Bar', 'Wanted', 'Measured', 'Met', 'Remarks'), rows)}\n")
    if ops is not None:
        print(f"{_where(ops[0])}\n\n{ops_summary(ops[1])}\n")
        if args.shapes:
            print(f"{ops_detail(ops[1])}\n")
    if resnet is not None:
        print(f"{_where(resnet[0])}\n\n{steps(resnet[1])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
