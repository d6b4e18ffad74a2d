"""What a fused call costs the host: microseconds of the calling thread until its kernels are launched.

Of two sizes: 64 values take one launch each way, and what most layers of a network take is three.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fusedres

from ..bench_overhead import FORMS, TINY
from ..cases import Case
from ..shapes import Shape
from .device import CudaDevice, HostDevice
from .ops import FUSED

SIZES = (TINY, (8, 64, 28, 28))
CALLS, ROUNDS = 40, 25  # launches of one round fit the queue of the device: more would wait for it


def host_microseconds(
    call: Callable[[], Any], device: HostDevice, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median over rounds of the time per call that the host spends before it may go on."""
    for _ in range(CALLS):
        call()
    rounds = []
    for _ in range(ROUNDS):
        device.synchronize()
        start = clock()
        for _ in range(CALLS):
            call()
        rounds.append((clock() - start) / CALLS * 1e6)
    device.synchronize()
    return statistics.median(rounds)


def measure_host(device: HostDevice, peers: Sequence[str] = ("eager", *FUSED, "auto")) -> Iterator[dict[str, Any]]:
    """A row per op, size and peer: a forward with grad, and forward and backward."""
    for form, size, dtype in itertools.product(FORMS, SIZES, ("float32", "bfloat16")):
        case = Case(Shape(*form, *size), dtype, device=device.device)
        expected = case.expected()
        for peer in peers:
            name = "eager" if peer == "eager" else "fusedres"
            row = {"op": form[0], "residual": form[1], "shape": list(size), "dtype": dtype, "peer": peer}
            try:
                with fusedres.use_backend(peer if peer in FUSED else "auto"):
                    case.check(case.results(name), expected)
                    row["forward_us"] = host_microseconds(case.call(name, "forward"), device)
                    row["train_us"] = host_microseconds(case.call(name, "train"), device)
            except Exception as error:  # a peer that fails is a result
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            yield row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.host", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file that rows of JSON are appended to")
    args = parser.parse_args(arguments)
    with args.out.open("a") as file:
        for row in measure_host(CudaDevice()):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(row["op"], row["dtype"], row["peer"], row.get("error") or f"{row['forward_us']:.1f} us", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
