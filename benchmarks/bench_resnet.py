"""Whole training steps: eager, torch.compile and fusedres, alternating in one process, channels_last."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.harness import Comparison, compare
from benchmarks.steps import KINDS, Step, gate

_measured: dict[tuple[str, str], Comparison] = {}


def measure_steps(
    model: str, dtype: str, *, batch: int = 8, kinds: tuple[str, ...] = KINDS, clock: str = "cpu", **options: Any
) -> Comparison:
    """Gate, then time whole steps against each other."""
    steps = {kind: Step(model, kind, dtype, batch) for kind in kinds}
    gate(model, dtype, steps)
    options = {"min_rounds": 13, "max_rounds": 41, "max_seconds": 90.0, "precision": 0.004} | options
    return compare(dict(steps), warmup=2, clock=clock, lead_in=False, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["resnet50", "resnet18"])
def test_training_step(record: Any, settings: Any, model: str, dtype: str, kind: str) -> None:
    if settings.quick and (model != "resnet50" or kind == "compile"):
        pytest.skip("--quick: resnet50, eager and fusedres")
    if (model, dtype) not in _measured:
        _measured.clear()
        quick = {"kinds": ("eager", "fusedres"), "min_rounds": 5, "max_rounds": 5} if settings.quick else {}
        _measured[model, dtype] = measure_steps(model, dtype, batch=settings.batch, clock=settings.clock, **quick)
    done = _measured[model, dtype]
    timing, ratio = done.timings[kind], done.ratio(kind)
    record(
        timing.seconds,
        group=f"{model} {dtype} batch {settings.batch}",
        kind=kind,
        step_ms=timing.median * 1e3,
        images_per_s=settings.batch / timing.median,
        ratio_to_eager=ratio.value,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        faults_per_step=timing.faults_per_call,
    )
