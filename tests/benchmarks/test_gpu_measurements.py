"""The measuring code of `make gpu`, run on the CPU: what is checked, timed and written, with a clock that is given."""

from __future__ import annotations

import contextlib
import itertools
import json
import types

import pytest
import torch

from benchmarks import cases
from benchmarks.gpu import device as device_module
from benchmarks.gpu import host, models, ops
from benchmarks.gpu.device import HostDevice, Replay
from benchmarks.shapes import Shape
from fusedres.ops.traffic import Launch

SMALL = [
    Shape("batch_norm_act", True, 4, 8, 6, 6),
    Shape("batch_norm_act", False, 4, 8, 6, 6),
    Shape("batch_norm_add_batch_norm_act", False, 4, 8, 6, 6),
    Shape("batch_norm_act_max_pool", False, 2, 8, 8, 8),
    Shape("add_act", True, 4, 8, 6, 6),
]


@pytest.fixture
def device():
    """A CPU whose clock advances by one millisecond whenever it is read."""
    ticks = itertools.count()
    device = HostDevice(clock=lambda: next(ticks) * 1e-3)
    device.step_seconds = 0.01
    return device


class TestDevice:
    def test_stages_pass_values_on(self, device):
        seen = []
        replays = device.capture(lambda: 20, lambda v: v + 1, seen.append, warmup=3)
        assert [r.result for r in replays] == [20, 21, None]
        assert seen == [21] * 4
        assert device.times(replays, 5) == [[pytest.approx(1e-3)] * 5] * 3
        assert seen == [21] * 9

    def test_rounds_fit_the_time(self, device):
        count = itertools.count()
        replay = Replay(lambda: next(count))
        assert device.median_times([replay], seconds=0.02, rounds=(3, 50)) == [pytest.approx(1e-3)]
        assert next(count) == 1 + 1 + 20
        device.median_times([replay], seconds=0.0, rounds=(3, 50))
        assert next(count) == 23 + 1 + 3

    def test_caches_are_emptied_before_every_timing(self, device, monkeypatch):
        order = []
        monkeypatch.setattr(device, "flush", lambda: order.append("flush"))
        replays = device.capture(lambda: order.append("first"), lambda _: order.append("second"), warmup=0)
        order.clear()
        device.times(replays, 2)
        assert order == ["flush", "first", "flush", "second"] * 2

    def test_steps_are_timed_back_to_back(self, device):
        calls = []
        seconds = device.step_times(lambda: calls.append(1), rounds=5)
        assert len(seconds) == 5
        assert len(calls) == 1 + 5 * 2

    def test_copy_bandwidth_is_measured_once(self, device):
        assert device.copy_bandwidth() == pytest.approx(2 * device.copy_bytes / 1e-3)
        assert device.copy_bandwidth() == device.copy_bandwidth()


class FakeCuda:
    """What `CudaDevice` calls of torch.cuda, on the CPU; a replay takes two milliseconds and does nothing."""

    def __init__(self) -> None:
        self.now = 0.0
        self.capturing = self.refuses = False
        self.log: list[str] = []

    def __getattr__(self, name):  # synchronize, empty_cache, reset_peak_memory_stats
        return lambda *arguments: self.log.append(name)

    def current_device(self):
        return 0

    def get_device_properties(self, device):
        return types.SimpleNamespace(name="Fake GPU", L2_cache_size=1 << 20)

    def max_memory_allocated(self, device):
        return 3_000_000

    def Stream(self, device=None):
        return types.SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def stream(self, stream):
        return contextlib.nullcontext()

    def graph_pool_handle(self):
        return "pool"

    def CUDAGraph(self):
        return types.SimpleNamespace(replay=lambda: self.tick(2.0))

    @contextlib.contextmanager
    def graph(self, graph, pool, stream):
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.log.append(f"graph in {pool}")
        yield

    def tick(self, milliseconds):
        self.now += milliseconds

    def Event(self, enable_timing):
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.at = self.cuda.now

    def elapsed_time(self, end):
        return end.at - self.at


class FakeTorch:
    """torch with another torch.cuda, whose device is the CPU."""

    def __init__(self) -> None:
        self.cuda = FakeCuda()
        self.device = lambda *arguments: torch.device("cpu")

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeTorch()
    monkeypatch.setattr(device_module, "torch", fake)
    return device_module.CudaDevice(), fake.cuda


class TestCudaDevice:
    """As far as it goes without one."""

    def test_stages_are_captured_in_one_pool_and_timed_by_events(self, cuda, monkeypatch):
        device, fake = cuda
        monkeypatch.setattr(device, "flush", lambda: fake.tick(50.0))
        seen = []
        replays = device.capture(lambda: 20, seen.append)
        assert [type(r).__name__ for r in replays] == ["GraphReplay"] * 2
        assert fake.log.count("graph in pool") == 2
        assert seen == [20] * 3
        assert device.median_times(replays) == [pytest.approx(2e-3)] * 2  # without the 50 ms of emptying the cache

    def test_what_cannot_be_captured_is_called(self, cuda):
        device, fake = cuda
        fake.refuses = True
        replays = device.capture(lambda: 20, lambda v: v + 1)
        assert [(r.timed, r.result) for r in replays] == [("calls", 20), ("calls", 21)]

    def test_kernels_without_those_that_empty_the_cache(self, cuda, monkeypatch):
        device, _ = cuda
        ran = []
        monkeypatch.setattr(device, "flush", lambda: ran.append(("flush", 9e-6)))

        def profile(function, rounds):
            ran.clear()
            for _ in range(rounds):
                function()
            return [(name, float(i), seconds) for i, (name, seconds) in enumerate(ran)]

        monkeypatch.setattr(device, "_profile", profile)
        replays = [lambda: ran.append(("statistics", 1e-6)), lambda: ran.extend([("reduce", 2e-6), ("apply", 3e-6)])]
        assert device.kernels(replays) == [("statistics", 1e-6), ("reduce", 2e-6), ("apply", 3e-6)]

    def test_the_rest(self, cuda):
        device, fake = cuda
        device.flush()
        device.free()
        assert device.peak_megabytes() == 3.0
        assert (device.name, device.kind) == ("Fake GPU", "cuda")
        assert {"synchronize", "empty_cache", "reset_peak_memory_stats"} <= set(fake.log)


class TestOps:
    @pytest.mark.parametrize("shape", SMALL, ids=lambda s: s.key)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_row(self, device, shape, dtype):
        measurement = ops.OpMeasurement(shape, dtype, "channels_last", device)
        for peer, call in (("eager", None), ("fusedres", cases.PEERS["fusedres"])):
            row = measurement.measure(peer, call)
            assert "error" not in row
            assert row["ms"] == pytest.approx(2.0)
            floor = cases.case_traffic(shape, cases.DTYPES[dtype]).floor
            assert row["floor_bytes"] == floor
            assert row["gb_per_s"] == pytest.approx(floor / 2e-3 * 1e-9)
            assert row["share_of_copy"] == pytest.approx(floor / 2e-3 / device.copy_bandwidth())
            json.dumps(row)

    def test_the_call_that_is_timed_is_the_one_that_is_checked(self, device):
        """Right while it is captured, wrong when it is replayed."""
        measurement = ops.OpMeasurement(SMALL[0], "float32", "channels_last", device)
        count = itertools.count()

        def call(*arguments):
            out = cases.PEERS["eager"](*arguments)
            return out if next(count) < 3 else out * 1.5

        row = measurement.measure("drifts", call)
        assert "out is off by" in row["error"]
        assert "ms" not in row

    def test_what_a_replay_does_not_write_is_seen(self, device):
        measurement = ops.OpMeasurement(SMALL[4], "float32", "channels_last", device)
        captured = []

        def call(*arguments):
            out = cases.PEERS["eager"](*arguments)
            if len(captured) == 3:  # a replay that leaves its memory as it was
                out.data.copy_(captured[-1])
            else:
                captured.append(out.detach())
            return out

        assert "out is off by nan" in measurement.measure("lazy", call)["error"]

    def test_running_statistics_are_checked(self, device):
        measurement = ops.OpMeasurement(SMALL[0], "float32", "channels_last", device)

        def call(op, inputs, stats, training):
            return cases.PEERS["eager"](op, inputs, [s.clone() for s in stats], training)

        assert "stat0 is off by" in measurement.measure("forgetful", call)["error"]

    def test_a_peer_that_raises_is_a_row(self, device):
        measurement = ops.OpMeasurement(SMALL[0], "float32", "channels_last", device)

        def call(*arguments):
            raise RuntimeError("not for this\nmachine")

        assert measurement.measure("broken", call)["error"] == "RuntimeError: not for this"
        assert (
            "has nothing for add_act"
            in ops.OpMeasurement(SMALL[4], "float32", "channels_last", device).measure("cudnn")["error"]
        )

    @pytest.mark.parametrize("shape", SMALL[:4], ids=lambda s: s.key)
    def test_cudnn_peer_composes_as_eager_does(self, device, shape, monkeypatch):
        def cudnn(x, weight, bias, mean, var, training, momentum, eps):
            return (torch.nn.functional.batch_norm(x, mean, var, weight, bias, training, momentum, eps),)

        monkeypatch.setattr(torch.ops.aten, "cudnn_batch_norm", cudnn)
        row = ops.OpMeasurement(shape, "float32", "channels_last", device).measure("cudnn")
        assert "error" not in row, row

    def test_compiled_peers(self, device, monkeypatch):
        modes = []

        def compile(function, mode, dynamic, fullgraph):
            modes.append((mode, dynamic, fullgraph))
            return function

        monkeypatch.setattr(torch, "compile", compile)
        measurement = ops.OpMeasurement(SMALL[1], "float32", "channels_last", device)
        for peer in ops.COMPILE_MODES:
            assert "error" not in measurement.measure(peer)
        assert modes == [(None, False, True), ("max-autotune-no-cudagraphs", False, True)]

    def test_shapes_of_the_bars_come_first(self):
        shapes = ops.headline_shapes()
        assert [s.residual for s in shapes if s.op == "batch_norm_act"] == [True] * 4 + [False] * 7
        assert shapes[0].key == "batch_norm_act+residual[256x256x56x56]"
        assert [s.op for s in shapes].index("batch_norm_act_max_pool") == 11
        assert {s.op for s in shapes} == set(cases.OPS)

    def test_all_rows_and_no_memory(self, device, monkeypatch):
        rows = list(ops.measure_all(SMALL[:2], "float32", "channels_last", device))
        assert [(r["peer"], r["residual"]) for r in rows] == [("eager", True), ("eager", False)]
        assert ops.peers_for(SMALL[0], "cuda") == ops.ALL_PEERS
        assert "cudnn" not in ops.peers_for(SMALL[4], "cuda")

        def full(*arguments, **options):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

        monkeypatch.setattr(ops, "Case", full)
        (row,) = ops.measure_all(SMALL[:1], "float32", "channels_last", device)
        assert row["error"] == "CUDA out of memory."

    def test_kernels_beside_launches(self):
        launches = [Launch("statistics", 900, 100), Launch("apply", 2000, 1000)]
        rows = ops.kernel_rows([("stats_kernel", 1e-6), ("apply_kernel", 2e-6)], launches, copy=2e9)
        assert [r["launch"] for r in rows] == ["statistics", "apply"]
        assert [r["gb_per_s"] for r in rows] == [pytest.approx(1.0), pytest.approx(1.5)]
        assert [r["share_of_copy"] for r in rows] == [pytest.approx(0.5), pytest.approx(0.75)]
        assert ops.kernel_rows([("one_kernel", 1e-6)], launches, copy=2e9) == [
            {"name": "one_kernel", "us": pytest.approx(1.0)}
        ]


class TestModels:
    def test_rows_with_and_without_graph(self, device):
        rows = list(models.measure_kind("cifar_resnet20", "eager", 4, device))
        assert [r["graph"] for r in rows] == [False, True]
        for row in rows:
            assert row["images_per_s"] == pytest.approx(4 / (row["ms"] * 1e-3))
            assert len(row["rounds_ms"]) == 7
            assert len(row["losses"]) == 1
            json.dumps(row)

    def test_a_kind_that_cannot_run_is_a_row(self, device):
        (row,) = models.measure_kind("cifar_resnet20", "cuda", 4, device)
        assert "cannot serve" in row["error"]

    def test_fused_steps_are_gated_against_eager(self, device, monkeypatch):
        monkeypatch.setattr(models, "FUSED", ("cpu",))
        rows = list(models.measure_kind("cifar_resnet20", "cpu", 32, device, graphs=(False,)))
        assert "error" not in rows[0], rows
        assert len(rows[0]["losses"]) == 3

    def test_other_losses_are_refused(self, device, monkeypatch):
        real = models.make_step

        def wrong(model, kind, batch, device):
            step = real(model, "eager", batch, device)
            if kind != "eager":
                step.target = step.target.flip(0) * 0
            return step

        monkeypatch.setattr(models, "make_step", wrong)
        (row,) = models.measure_kind("cifar_resnet20", "compile", 4, device)
        assert "are not eager's" in row["error"]


class TestHost:
    def test_rows(self, device, monkeypatch):
        monkeypatch.setattr(host, "CALLS", 2)
        monkeypatch.setattr(host, "ROUNDS", 3)
        monkeypatch.setattr(host, "SIZES", (host.TINY, (2, 8, 6, 6)))
        rows = list(host.measure_host(device, peers=("eager", "cuda", "auto")))
        assert len(rows) == len(host.FORMS) * 2 * 2 * 3
        assert {tuple(row["shape"]) for row in rows} == set(host.SIZES)
        for row in rows:
            if row["peer"] == "cuda":
                assert "error" in row
            else:
                assert row["forward_us"] > 0
                assert row["train_us"] > 0

    def test_microseconds(self, device, monkeypatch):
        ticks = itertools.count()
        assert host.host_microseconds(lambda: None, device, clock=lambda: next(ticks) * 1e-3) == pytest.approx(
            1e3 / host.CALLS
        )
