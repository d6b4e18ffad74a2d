"""`fusedres verify`: are the numbers right on this machine?"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict

BACKENDS = ("reference", "cpu", "cuda", "triton", "auto")


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Declare the command and its options."""
    from .. import verification

    parser = subparsers.add_parser(
        "verify",
        help="check every op and block against eager PyTorch and float64 on this machine",
        description="Check every op and block against eager PyTorch and float64, on every backend this machine has. "
        "An error is a multiple of eager's own at the same dtype and layout; the limit is 2. Exit code 0 if all hold.",
    )
    parser.add_argument(
        "--backend", default="all", choices=("all", *BACKENDS), help="default: all that this machine has"
    )
    parser.add_argument(
        "--op",
        default="all",
        choices=("all", *verification.OPS, *verification.BLOCKS),
        help="default: all ops and blocks",
    )
    parser.add_argument("--device", default="all", choices=("all", "cpu", "cuda"), help="default: all there are")
    parser.add_argument("--quick", action="store_true", help="a third of the cases")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the table (or JSON); 0 if the rule holds everywhere, 1 if not, 2 if nothing could be checked."""
    import torch

    from .. import verification

    devices = [d for d in verification.devices() if args.device in ("all", d)]
    if not devices:
        print(f"fusedres verify: this machine has no {args.device} device that torch can use", file=sys.stderr)
        return 2
    unavailable = {}
    for device in devices:
        unavailable |= {
            f"{name} on {device}": reason for name, reason in verification.backends(device).items() if reason
        }
    if args.backend != "all":
        served = [d for d in devices if verification.backends(d).get(args.backend, "") is None]
        if not served:
            reasons = [reason for key, reason in unavailable.items() if key.startswith(args.backend)]
            why = reasons[0] if reasons else f"no device for it; this machine has {', '.join(devices)}"
            print(f"fusedres verify: backend {args.backend!r} cannot run here: {why}", file=sys.stderr)
            return 2
    ops = verification.OPS + verification.BLOCKS if args.op == "all" else (args.op,)
    names = None if args.backend == "all" else (args.backend,)
    start = time.perf_counter()
    rows = verification.verify(ops, names, args.quick, _progress(sys.stderr), tuple(devices))
    seconds = time.perf_counter() - start
    ok = bool(rows) and all(row.failed == 0 for row in rows)
    if args.json:
        table = [asdict(row) | {"multiple": row.multiple if math.isfinite(row.multiple) else None} for row in rows]
        print(
            json.dumps(
                {
                    "ok": ok,
                    "limit": verification.LIMIT,
                    "seconds": round(seconds, 1),
                    "torch": torch.__version__,
                    "unavailable": unavailable,
                    "rows": table,
                }
            )
        )
        return 0 if ok else 1
    _print_table(rows)
    for key, reason in unavailable.items():
        print(f"not checked: {key}: {reason}")
    count, failed = sum(row.cases for row in rows), sum(row.failed for row in rows)
    verdict = "every error is within 2 times eager's own" if ok else f"{failed} of them FAILED"
    print(f"{count} cases in {seconds:.0f} s: {verdict}")
    return 0 if ok else 1


def _progress(stream):
    """One line that rewrites itself on a terminal, nothing elsewhere."""
    if not stream.isatty():
        return lambda text: None
    shown = ""

    def show(text: str) -> None:
        nonlocal shown
        if text != shown:
            stream.write(f"\r\033[K{text}" if text else "\r\033[K")
            stream.flush()
            shown = text

    return show


def _print_table(rows) -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    header = ("op", "backend", "device", "dtype", "layout", "cases", "x eager", "", "worst case")
    body = []
    for row in rows:
        state = "ok" if row.failed == 0 else "FAIL"
        worst = row.worst if row.failed == 0 else f"{row.worst}: {row.detail}"
        body.append(
            (
                row.op,
                row.backend,
                row.device,
                row.dtype,
                row.layout,
                str(row.cases),
                f"{row.multiple:.2f}",
                state,
                worst,
            )
        )
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header) - 1)]
    for line in [header, *body]:
        cells = [
            cell.rjust(width) if i in (5, 6) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=False))
        ]
        print("  ".join([*cells, line[-1]]).rstrip())
