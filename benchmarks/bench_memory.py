"""Memory: MB saved for backward, page faults and resident memory of training, with and without `reuse_host_memory`."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.steps import saved_megabytes

SAVED = (("resnet50", 8, "float32"), ("resnet50", 8, "bfloat16"), ("cifar_resnet20", 128, "float32"))
WARM_STEPS = 10  # what a user may wait for before the faults have to be gone


class Worker:
    """A training process that steps when asked."""

    def __init__(self, **settings: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(settings)],
            cwd=Path(__file__).resolve().parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.steps: list[dict[str, float]] = []
        self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the training process ended with code {self.process.wait()}")
        return json.loads(line)

    def step(self) -> None:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.steps.append(self._answer())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def median(self, key: str) -> float:
        return statistics.median(step[key] for step in self.steps[WARM_STEPS:])


def measure_faults(
    kinds: tuple[str, ...] = ("eager", "fusedres"),
    *,
    model: str = "resnet50",
    dtype: str = "float32",
    batch: int = 8,
    threads: int = 1,
    steps: int = 11,
) -> list[dict[str, Any]]:
    """One process for each kind and memory regime, stepping in turn; medians of the steps after the first ten."""
    settings = {"model": model, "dtype": dtype, "batch": batch, "threads": threads}
    workers = {(kind, reuse): Worker(kind=kind, reuse=reuse, **settings) for kind in kinds for reuse in (False, True)}
    try:
        for _ in range(WARM_STEPS + steps):
            for worker in workers.values():
                worker.step()
    finally:
        for worker in workers.values():
            worker.close()
    rows = []
    for (kind, reuse), worker in workers.items():
        rows.append(
            settings
            | {
                "kind": kind,
                "memory": "recycled" if reuse else "default",
                "step_ms": worker.median("seconds") * 1e3,
                "fault_mb_per_step": worker.median("fault_mb"),
                "resident_mb": worker.median("resident_mb"),
                "default_over_recycled": workers[kind, False].median("seconds") / workers[kind, True].median("seconds"),
                "seconds": [step["seconds"] for step in worker.steps[WARM_STEPS:]],
            }
        )
    return rows


def measure_saved(model: str, batch: int, dtype: str) -> dict[str, Any]:
    eager, fused = (saved_megabytes(model, kind, dtype, batch) for kind in ("eager", "fusedres"))
    return {
        "model": model,
        "batch": batch,
        "dtype": dtype,
        "eager_mb": eager,
        "fused_mb": fused,
        "ratio": fused / eager,
    }


@pytest.mark.parametrize(("model", "batch", "dtype"), SAVED)
def test_saved_for_backward(record: Any, settings: Any, model: str, batch: int, dtype: str) -> None:
    """The table shows no time worth reading: the numbers are in extra_info."""
    record([0.0], group="saved for backward", **measure_saved(model, batch, dtype))


@pytest.fixture(scope="module")
def fault_rows(settings: Any) -> list[dict[str, Any]]:
    dtype = "bfloat16" if settings.quick else "float32"
    return measure_faults(dtype=dtype, threads=settings.threads, steps=3 if settings.quick else 11)


@pytest.mark.parametrize("memory", ["default", "recycled"])
@pytest.mark.parametrize("kind", ["eager", "fusedres"])
def test_step_faults(record: Any, fault_rows: list[dict[str, Any]], kind: str, memory: str) -> None:
    (row,) = (r for r in fault_rows if (r["kind"], r["memory"]) == (kind, memory))
    record(row["seconds"], group=f"{row['model']} {row['dtype']} step by memory regime", **row)
