"""Time on a device: events around graph replays, the L2 cache emptied before each, medians.

`CudaDevice` is what measures. `HostDevice` has the same methods on the CPU, so that everything above them runs, and is
tested, without a GPU.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROUNDS = 5  # that kernels are profiled for
MARK = "spin_kernel"  # what torch.cuda._sleep runs


class Replay:
    """A call that runs the same kernels on the same memory every time; `result` is what it returned."""

    timed = "calls"

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self.result: Any = function()

    def __call__(self) -> Any:
        self.result = self._function()
        return self.result


class GraphReplay(Replay):
    """A captured CUDA graph: replays cost the host one call, so that the device is what is timed."""

    timed = "graph"

    def __init__(self, function: Callable[[], Any], stream: torch.cuda.Stream, pool: Any) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=stream):
            self.result = function()

    def __call__(self) -> Any:
        self.graph.replay()
        return self.result


class HostDevice:
    """The CPU, called as the GPU is: for tests of what is built on top."""

    kind = "cpu"
    name = "host"
    step_seconds = 1.0  # that `step_times` takes, about
    copy_bytes = 1 << 20  # of each of the two buffers of the copy that counts as the ceiling
    matmul_size = 64  # of the square matrices whose product does

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = torch.device("cpu")
        self._clock = clock
        self._copy: float | None = None
        self._matmul: dict[torch.dtype, float] = {}

    def synchronize(self) -> None:
        """Wait for what was launched."""

    def free(self) -> None:
        """Give back memory that nothing uses."""

    def flush(self) -> None:
        """Empty the last-level cache."""

    def peak_megabytes(self) -> float | None:
        """Most memory that tensors held since the last time this was asked, 1e6 bytes; None where nothing can tell."""
        return None

    def capture(self, *stages: Callable[..., Any], warmup: int = 2) -> list[Replay]:
        """One replay per stage; each stage is called with what the one before it returned."""
        for _ in range(warmup):
            _run(stages)
        replays: list[Replay] = []
        for stage in stages:
            before = replays[-1] if replays else None
            replays.append(Replay(stage if before is None else lambda s=stage, b=before: s(b.result)))
        return replays

    def times(self, replays: list[Replay], rounds: int) -> list[list[float]]:
        """Seconds of each replay, round by round; they run in order, for the later ones need what the earlier left."""
        seconds: list[list[float]] = [[] for _ in replays]
        for _ in range(rounds):
            for of, replay in zip(seconds, replays, strict=True):
                self.flush()
                start = self._clock()
                replay()
                of.append(self._clock() - start)
        return seconds

    def median_times(
        self, replays: list[Replay], *, seconds: float = 0.15, rounds: tuple[int, int] = (7, 50)
    ) -> list[float]:
        """Median seconds of each replay, over as many rounds as fit `seconds`, within the bounds."""
        first = sum(of[0] for of in self.times(replays, 1))
        count = max(rounds[0], min(rounds[1], int(seconds / max(first, 1e-6))))
        return [statistics.median(of) for of in self.times(replays, count)]

    def kernels(self, replays: list[Replay]) -> list[tuple[str, float]]:
        """(name, seconds) of the kernels of one round, in order; empty where nothing can tell."""
        return []

    def launched(self, function: Callable[[], Any]) -> list[tuple[str, float]]:
        """(name, median seconds) of the kernels of calls back to back, in order; empty where nothing can tell."""
        return []

    def pieces(self, function: Callable[[Callable[[], None]], Any]) -> list[list[tuple[str, float]]]:
        """(name, seconds) of the kernels between the marks of ``function(mark)``, those before the first mark first."""
        at = [self._clock()]
        function(lambda: at.append(self._clock()))
        at.append(self._clock())
        return [[("call", end - start)] for start, end in itertools.pairwise(at)]

    def step_times(self, step: Callable[[], Any], *, rounds: int = 7) -> list[float]:
        """Wall seconds per call of long calls back to back, one entry per round; caches are left as the calls do."""

        def block(calls: int) -> float:
            self.synchronize()
            start = self._clock()
            for _ in range(calls):
                step()
            self.synchronize()
            return (self._clock() - start) / calls

        calls = max(1, min(100, int(self.step_seconds / rounds / max(block(1), 1e-6))))
        return [block(calls) for _ in range(rounds)]

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """Floating point operations per second of a large square product of ``dtype``; measured once."""
        if dtype not in self._matmul:
            n = self.matmul_size
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            product = torch.empty_like(a)
            (replay,) = self.capture(lambda: torch.mm(a, b, out=product))
            self._matmul[dtype] = 2 * n**3 / self.median_times([replay])[0]
        return self._matmul[dtype]

    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written, of a large copy, timed as everything is; measured once."""
        if self._copy is None:
            source = torch.ones(self.copy_bytes, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            (replay,) = self.capture(lambda: target.copy_(source))
            self._copy = 2 * self.copy_bytes / self.median_times([replay])[0]
        return self._copy


def _medians(events: list[tuple[str, float]], rounds: int) -> list[tuple[str, float]]:
    """Of the kernels of as many rounds, each the same; empty if they are not."""
    count = len(events) // rounds
    if count * rounds != len(events) or any(name != events[i % count][0] for i, (name, _) in enumerate(events)):
        return []
    return [(events[i][0], statistics.median(s for _, s in events[i::count])) for i in range(count)]


def _run(stages: tuple[Callable[..., Any], ...]) -> None:
    value = stages[0]()
    for stage in stages[1:]:
        value = stage(value)


class CudaDevice(HostDevice):
    """The current CUDA device."""

    kind = "cuda"
    copy_bytes = 1 << 30
    matmul_size = 8192

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.name = properties.name
        self._stream = torch.cuda.Stream(self.device)
        l2 = getattr(properties, "L2_cache_size", 0)
        # more than the cache; read, not written: dirty lines would be written back on the candidate's time
        self._evictor: Tensor = torch.zeros(max(4 * l2, 64 << 20) // 4, device=self.device)
        self._sum = torch.empty((), device=self.device)
        self._flushing: set[str] | None = None  # names of the kernels that empty the cache

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def free(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def flush(self) -> None:
        torch.sum(self._evictor, dim=0, out=self._sum)

    def peak_megabytes(self) -> float | None:
        peak = torch.cuda.max_memory_allocated(self.device) * 1e-6
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def capture(self, *stages: Callable[..., Any], warmup: int = 2) -> list[Replay]:
        """As a graph per stage where the stages can be captured, else as plain calls."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(max(1, warmup)):
                _run(stages)
        torch.cuda.current_stream().wait_stream(self._stream)
        self.synchronize()
        replays: list[Replay] = []
        try:
            pool = torch.cuda.graph_pool_handle()
            for stage in stages:
                before = replays[-1] if replays else None
                function = stage if before is None else lambda s=stage, b=before: s(b.result)
                replays.append(GraphReplay(function, self._stream, pool))
        except RuntimeError:
            self.synchronize()
            return super().capture(*stages, warmup=0)
        for replay in replays:
            replay()  # a capture runs nothing
        self.synchronize()
        return replays

    def times(self, replays: list[Replay], rounds: int) -> list[list[float]]:
        events = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)] for _ in replays]
        for i in range(rounds):
            for of, replay in zip(events, replays, strict=True):
                self.flush()
                of[i][0].record()
                replay()
                of[i][1].record()
        self.synchronize()
        return [[start.elapsed_time(end) * 1e-3 for start, end in of] for of in events]

    def kernels(self, replays: list[Replay]) -> list[tuple[str, float]]:
        def flushed() -> None:
            for replay in replays:
                self.flush()
                replay()

        if self._flushing is None:
            self._flushing = {name for name, _, _ in self._profile(self.flush, 1)}
        events = [(name, s) for name, _, s in self._profile(flushed, ROUNDS) if name not in self._flushing]
        return _medians(events, ROUNDS)

    def launched(self, function: Callable[[], Any]) -> list[tuple[str, float]]:
        return _medians([(name, seconds) for name, _, seconds in self._profile(function, ROUNDS)], ROUNDS)

    def pieces(self, function: Callable[[Callable[[], None]], Any]) -> list[list[tuple[str, float]]]:
        found: list[list[tuple[str, float]]] = [[]]
        # a kernel of its own is the mark: what follows it on the stream was launched after it
        for name, _, seconds in self._profile(lambda: function(lambda: torch.cuda._sleep(1)), 1):
            if MARK in name:
                found.append([])
            else:
                found[-1].append((name, seconds))
        return found

    def _profile(self, function: Callable[[], Any], rounds: int) -> list[tuple[str, float, float]]:
        """(name, start, seconds) of every kernel, in order."""
        from torch.profiler import ProfilerActivity, profile

        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(rounds):
                function()
            self.synchronize()
        on_device = (e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA)
        # ranges that an optimizer or a user names cover kernels, and are none
        events = [e for e in on_device if not getattr(e, "is_user_annotation", False)]
        return sorted(
            ((e.name, e.time_range.start, e.time_range.elapsed_us() * 1e-6) for e in events), key=lambda e: e[1]
        )
