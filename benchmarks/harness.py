"""Alternating measurements in one process, and the ceilings they are held against.

How a ratio is made here:

- **One process, alternating.** Every round times each candidate once, in an order that rotates from round to round, so
  drift (frequency, a neighbour's memory traffic) hits all of them alike.
- **Each in its own steady state.** A sample starts with a call that is not counted, so that nobody pays for the cache
  lines that its rival evicted.
- **The process's CPU clock** by default: page faults count, waiting for a busy machine does not.
- **Ratio of medians**, with a 95 % bootstrap interval over rounds (resampled whole, so that the pairing survives).
- **Memory regime stated.** "recycled": glibc keeps freed memory in the process, as `fusedres.reuse_host_memory()` does,
  and a call faults nothing after warm-up. "default": glibc's defaults: every large tensor is faulted in afresh.
- **The ceiling from the same run:** copy bandwidth of this thread at the sizes of the measured case.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch

Stage = Callable[..., Any]
Candidate = Stage | Sequence[Stage]  # a pipeline: each stage receives what the previous one returned, the first nothing

CLOCKS = {"cpu": time.process_time_ns, "wall": time.perf_counter_ns}


def set_memory_regime(regime: str) -> str:
    """Choose how freed memory is treated from here on, for the whole process; returns what is in force.

    "recycled" cannot be fully undone (glibc stops adapting its thresholds once one is set), so a run that compares
    regimes starts a process for each.
    """
    if regime not in ("recycled", "default"):
        raise ValueError(f"regime must be 'recycled' or 'default', got {regime!r}")
    if regime == "default":
        return "default"
    from fusedres import reuse_host_memory

    return "recycled" if reuse_host_memory() is None else "default"  # not glibc: as the system has it


def minor_faults() -> int:
    """Page faults of this process so far that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@dataclass
class Timing:
    """Per-call times of one candidate, one entry per round; `stages[i]` are the times of its i-th stage."""

    seconds: list[float] = field(default_factory=list)
    stages: list[list[float]] = field(default_factory=list)
    faults: list[float] = field(default_factory=list)
    calls_per_round: int = 1

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def mad(self) -> float:
        """Median absolute deviation from the median."""
        middle = self.median
        return statistics.median(abs(s - middle) for s in self.seconds)

    @property
    def stage_medians(self) -> list[float]:
        return [statistics.median(s) for s in self.stages]

    @property
    def faults_per_call(self) -> float:
        return statistics.median(self.faults)


@dataclass(frozen=True)
class Ratio:
    """baseline / candidate: above 1 means the candidate is faster. `low`, `high`: 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f}x [{self.low:.3f}, {self.high:.3f}]"


@dataclass
class Comparison:
    """What `compare` measured."""

    timings: dict[str, Timing]
    baseline: str
    clock: str
    rounds: int

    def ratio(self, name: str, stage: int | None = None) -> Ratio:
        base, other = self.timings[self.baseline], self.timings[name]
        if stage is None:
            return _ratio(base.seconds, other.seconds)
        return _ratio(base.stages[stage], other.stages[stage])


def _ratio(base: Sequence[float], other: Sequence[float], resamples: int = 400) -> Ratio:
    b, o = np.asarray(base), np.asarray(other)
    rounds = np.random.default_rng(0).integers(0, len(b), (resamples, len(b)))
    spread = np.median(b[rounds], axis=1) / np.median(o[rounds], axis=1)
    low, high = np.quantile(spread, (0.025, 0.975))
    return Ratio(float(np.median(b) / np.median(o)), float(low), float(high))


def _measure(stages: Sequence[Stage], calls: int, clock: Callable[[], int]) -> tuple[list[float], float]:
    """Seconds per call of each stage, and faults per call. Freeing what a stage received and returned is timed too."""
    spent = [0] * len(stages)
    faults = minor_faults()
    if len(stages) == 1:  # no clock between the calls: reading it costs a third of a microsecond
        (stage,) = stages
        start = clock()
        for _ in range(calls):
            stage()
        spent[0] = clock() - start
        calls_left = 0
    else:
        calls_left = calls
    for _ in range(calls_left):
        start = clock()
        value = stages[0]()
        for i, stage in enumerate(stages[1:]):
            lap = clock()
            spent[i] += lap - start
            start = lap
            value = stage(value)
        value = None
        spent[-1] += clock() - start
    faults = minor_faults() - faults
    return [s * 1e-9 / calls for s in spent], faults / calls


def compare(
    candidates: Mapping[str, Candidate],
    *,
    baseline: str = "eager",
    min_rounds: int = 15,
    max_rounds: int = 60,
    max_seconds: float = 2.5,
    min_sample_seconds: float = 1e-3,
    warmup: int = 3,
    precision: float = 0.01,
    clock: str = "cpu",
    before: Callable[[], Any] | None = None,
    lead_in: bool = True,
) -> Comparison:
    """Time the candidates against each other, alternating.

    A round calls each candidate as often as makes one sample last `min_sample_seconds` (the same number for all). After
    `min_rounds` rounds it stops when every ratio's interval is within +-`precision`, at `max_rounds`, or after
    `max_seconds` of wall time. `before` (to evict caches) runs ahead of every sample instead of the call that is not
    counted; without `lead_in` nothing does, for candidates that fill the caches many times over.
    """
    if baseline not in candidates:
        raise ValueError(f"baseline {baseline!r} is not among {list(candidates)}")
    pipelines = {n: [c] if callable(c) else list(c) for n, c in candidates.items()}
    names, now = list(pipelines), CLOCKS[clock]

    fastest = float("inf")
    for name in names:
        for _ in range(max(1, warmup)):
            stages, _faults = _measure(pipelines[name], 1, now)
            fastest = min(fastest, sum(stages))
    calls = max(1, min(10_000, round(min_sample_seconds / max(fastest, 1e-7))))
    if calls > 1:  # the first estimate of a microsecond call is far too high
        fastest = min(sum(_measure(pipelines[n], calls, now)[0]) for n in names)
        calls = max(1, min(10_000, round(min_sample_seconds / max(fastest, 1e-7))))

    timings = {n: Timing(stages=[[] for _ in pipelines[n]], calls_per_round=calls) for n in names}
    result = Comparison(timings, baseline, clock, 0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + max_seconds
        while result.rounds < max_rounds:
            turn = result.rounds % len(names)
            for name in names[turn:] + names[:turn]:
                if before is not None:
                    before()
                elif lead_in:
                    _measure(pipelines[name], 1, now)  # not counted: it leaves the caches as this candidate leaves them
                stages, faults = _measure(pipelines[name], calls, now)
                timing = timings[name]
                timing.seconds.append(sum(stages))
                timing.faults.append(faults)
                for kept, seconds in zip(timing.stages, stages, strict=True):
                    kept.append(seconds)
            result.rounds += 1
            if result.rounds < min_rounds:
                continue
            if time.perf_counter() > deadline:
                break
            if result.rounds % 5 == 0 and all(
                r.high - r.value < precision * r.value and r.value - r.low < precision * r.value
                for r in (result.ratio(n) for n in names if n != baseline)
            ):
                break
    finally:
        if collecting:
            gc.enable()
    return result


@lru_cache(maxsize=64)
def _copy_bandwidth(bucket: int, threads: int) -> float:
    source = torch.ones(bucket, dtype=torch.uint8)
    target = torch.empty_like(source).fill_(1)
    a, b = source.data_ptr(), target.data_ptr()
    candidates: dict[str, Candidate] = {
        "memcpy": lambda: ctypes.memmove(b, a, bucket),
        "torch": lambda: target.copy_(source),
    }
    clock = "cpu" if threads == 1 else "wall"
    done = compare(candidates, baseline="torch", min_rounds=11, max_rounds=11, clock=clock)
    return 2 * bucket / min(t.median for t in done.timings.values())


def copy_bandwidth(nbytes: int) -> float:
    """Bytes per second (read + written) of copying `nbytes` between touched buffers on the current threads.

    The better of memcpy and `Tensor.copy_`; measured once per power of two and process. Ordinary stores: a kernel that
    streams its output past the caches moves fewer bytes than a copy does and can exceed it.
    """
    bucket = 1 << max(16, min(28, round(float(np.log2(max(nbytes, 1))))))
    return _copy_bandwidth(bucket, torch.get_num_threads())


class CacheEvictor:
    """Calling it replaces what the last-level cache holds."""

    def __init__(self, nbytes: int = 96 << 20) -> None:
        self._buffer = torch.zeros(nbytes // 4)

    def __call__(self) -> None:
        self._buffer.sum()  # reads only: lines written here would have to be written back on the candidate's time


def geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))
