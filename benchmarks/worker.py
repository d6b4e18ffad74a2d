"""A training process driven over its pipes, so that processes with different memory regimes can take turns.

Started by `bench_memory`: reads a line, does one step, answers with one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .harness import minor_faults
from .steps import Step

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_megabytes() -> float:
    """Resident memory now (not its peak), 1e6 bytes; 0 where /proc is missing."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE * 1e-6
    except OSError:
        return 0.0


def main() -> None:
    settings: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    if settings["reuse"]:
        from fusedres import reuse_host_memory

        refused = reuse_host_memory()
        if refused:
            raise SystemExit(refused)
    step = Step(settings["model"], settings["kind"], settings["dtype"], settings["batch"])
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        faults, start = minor_faults(), time.process_time()
        loss = step()
        seconds = time.process_time() - start
        answer = {"seconds": seconds, "fault_mb": (minor_faults() - faults) * PAGE * 1e-6, "loss": loss}
        print(json.dumps(answer | {"resident_mb": resident_megabytes()}), flush=True)


if __name__ == "__main__":
    main()
