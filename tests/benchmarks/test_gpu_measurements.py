"""The measuring code of `make gpu`, run on the CPU: what is checked, timed and written, with a clock that is given."""

from __future__ import annotations

import contextlib
import itertools
import json
import types

import pytest
import torch

import fusedres
from benchmarks import cases, plain_resnet, steps
from benchmarks.gpu import device as device_module
from benchmarks.gpu import host, kernels, models, ops
from benchmarks.gpu.device import HostDevice, Replay
from benchmarks.shapes import Shape
from fusedres.ops import choices, registry
from fusedres.ops import conv1x1_bn_act as folded
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


@pytest.fixture
def tiny(monkeypatch):
    """The name of a model of four Bottlenecks, one for each stage, on small images."""
    fused = steps._fused
    layers = [1, 1, 1, 1]
    monkeypatch.setitem(
        steps.PLAIN, "tiny", lambda: plain_resnet.PlainResNet(plain_resnet.PlainBottleneck, layers, num_classes=10)
    )
    monkeypatch.setitem(steps.INPUTS, "tiny", (3, 64, 64))
    monkeypatch.setattr(
        steps,
        "_fused",
        lambda name: (
            fusedres.models.ResNet(fusedres.Bottleneck, layers, num_classes=10) if name == "tiny" else fused(name)
        ),
    )
    return "tiny"


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

    def test_matmul_rate_is_measured_once(self, device):
        assert device.matmul_rate(torch.float32) == pytest.approx(2 * device.matmul_size**3 / 1e-3)
        assert device.matmul_rate(torch.float32) == device.matmul_rate(torch.float32)

    def test_pieces_lie_between_marks(self, device):
        def marked(mark):
            for _ in range(2):
                mark()

        assert device.pieces(marked) == [[("call", pytest.approx(1e-3))]] * 3
        assert device.launched(lambda: None) == []

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

    def test_pieces_between_marks_on_the_stream(self, cuda, monkeypatch):
        device, fake = cuda
        ran = []
        monkeypatch.setattr(fake, "_sleep", lambda cycles: ran.append("at::cuda::spin_kernel(long)"), raising=False)

        def profile(function, rounds):
            ran.clear()
            for _ in range(rounds):
                function()
            return [(name, float(i), 1e-6) for i, name in enumerate(ran)]

        monkeypatch.setattr(device, "_profile", profile)

        def step(mark=lambda: None):
            for names in (["before"], ["gemm", "combine"], [], ["apply"]):
                ran.extend(names)
                mark()

        of = [[name for name, _ in piece] for piece in device.pieces(step)]
        assert of == [["before"], ["gemm", "combine"], [], ["apply"], []]
        assert device.launched(step) == [(name, 1e-6) for name in ("before", "gemm", "combine", "apply")]
        names = itertools.count()
        assert device.launched(lambda: ran.append(f"another {next(names)}")) == []

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
        monkeypatch.setitem(models.FOLDING, "cpu", "never")
        rows = list(models.measure_kind("cifar_resnet20", "cpu", 32, device, graphs=(False,)))
        assert "error" not in rows[0], rows
        assert len(rows[0]["losses"]) == 3
        assert rows[0]["folded_blocks"] == 0

    def test_folded_steps_are_folded(self, device, tiny):
        counts = {}
        for kind in ("fusedres", "folded"):
            (row,) = models.measure_kind(tiny, kind, 16, device, graphs=(False,))
            assert "error" not in row, row
            counts[kind] = row["folded_blocks"]
        assert counts == {"fusedres": 0, "folded": 2}  # those with enough pixels

    def test_auto_only_with_a_table(self, device, monkeypatch):
        assert not models.is_tuned(device)
        monkeypatch.setattr(device, "kind", "cuda")
        device.device = torch.device("cuda", 5)
        for table, tuned in ((choices.Table({}, ""), False), (choices.Table({}, "", {(): "fold"}), True)):
            monkeypatch.setitem(registry._tables, 5, table)
            assert models.is_tuned(device) == tuned

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


class TestKernels:
    @pytest.mark.parametrize("kind", ["folded", "fusedres", "eager"])
    def test_every_call_is_in_a_group(self, device, tiny, kind):
        """On the CPU a call is its kernel, of a millisecond from one mark to the next."""
        row = kernels.measure(tiny, kind, 16, device)
        assert "error" not in row, row
        json.dumps(row)
        groups = {group["group"]: group for group in row["groups"]}
        assert row["kernels_ms"] == pytest.approx(sum(group["ms"] for group in groups.values()))
        assert row["kernels_ms"] == pytest.approx(row["kernels"])
        assert row["between_ms"] == pytest.approx(row["ms"] - row["kernels_ms"])
        assert row["kernels_timed"] == "calls"
        assert [name for name in kernels.GROUPS if name in groups] == list(groups)
        for group in groups.values():
            assert group["kernels"] == sum(of["kernels"] for of in group["ops"].values())
        assert groups["3x3 convolutions"]["ops"]["convolution_backward"]["calls"] == 4
        assert "convolution" in groups["stem"]["ops"]
        assert any("max_pool" in op for op in groups["stem"]["ops"])
        folds = [name for name in groups if name.startswith("folded")]
        shapes = {(p["group"], p["shape"]) for p in row["passes"]}
        if kind != "folded":
            assert folds == []
            assert shapes == set()
            assert "small matrices" not in groups
            assert groups["1x1 convolutions"]["ops"]["convolution"]["calls"] == 12
            return
        assert folds == [name for name in kernels.GROUPS if name.startswith("folded")]
        assert groups["1x1 convolutions"]["ops"]["convolution"]["calls"] == 6  # two blocks are not folded
        assert groups["small matrices"]["ops"]["conv1x1_bn_unfold"]["calls"] == 4
        assert shapes == {
            ("folded: conv1", "4096x64->64"),
            ("folded: conv1", "4096x256->128"),
            ("folded: moments", "4096x64"),
            ("folded: moments", "1024x128"),
            ("folded: moments", "1024x256"),
            ("folded: output", "4096x64+64->256"),
            ("folded: output", "1024x128+256->512"),
            ("folded: products", "4096x64+64->256"),
            ("folded: products", "1024x128+256->512"),
            ("folded: input gradient", "4096x64+64->256"),
            ("folded: input gradient", "1024x128+256->512"),
            ("folded: gradient of conv1's input", "4096x64->64"),
            ("folded: gradient of conv1's input", "4096x128->256"),
        }
        (of_output,) = [p for p in row["passes"] if p["shape"] == "1024x128+256->512" and "output" in p["group"]]
        moved = folded.conv1x1_bn_act_apply_traffic(
            (16, 128, 8, 8), 512, torch.bfloat16, norm=True, shape2=(16, 256, 16, 16), stride2=2
        )
        assert of_output["bytes"] == moved.floor
        assert of_output["flops"] == 2 * 1024 * (128 + 256) * 512
        floors = {"bandwidth": moved.floor / device.copy_bandwidth()}
        floors["products"] = of_output["flops"] / device.matmul_rate(torch.bfloat16)
        assert of_output["bound"] == max(floors, key=floors.get)
        assert of_output["floor_us"] == pytest.approx(max(floors.values()) * 1e6)
        assert of_output["share_of_floor"] == pytest.approx(max(floors.values()) / 1e-3)

    def test_nothing_is_left_behind(self, device, tiny):
        block = fusedres.ops.folded_bottleneck.FoldedBottleneckFunction
        before = dict(vars(block)), {name: op._launcher for name, op in registry.OPS.items()}
        kernels.measure(tiny, "folded", 16, device)
        assert (dict(vars(block)), {name: op._launcher for name, op in registry.OPS.items()}) == before

    def test_launchers_are_calls(self, monkeypatch):
        """What the launchers of Triton allocate and launch is theirs."""
        calls = []

        def launcher(x, *arguments):
            calls.append(torch.zeros(3))
            return x

        op = registry.OPS["add_act"]
        monkeypatch.setattr(registry.Op, "why_not", lambda self, backend: None if self is op else "not here")
        monkeypatch.setattr(op, "_launcher", launcher)
        recorder = kernels.Recorder(lambda: None, 2, ())
        with recorder.everywhere():
            op.triton(torch.ones(2, 3, 4, 5), None, True, False)
        assert [(c.group, c.op) for c in recorder.calls[-1:]] == [("batch norm and elementwise", "add_act")]
        assert op._launcher is launcher
        assert len(calls) == 1

    def test_times_are_those_of_the_graph(self):
        pieces = [[("a", 9.0)], [], [("b", 9.0), ("a", 9.0)]]
        graph = [("a", 1.0), ("b", 2.0), ("a", 3.0)]
        assert kernels.timed(pieces, graph) == ([[("a", 1.0)], [], [("b", 2.0), ("a", 3.0)]], True)
        assert kernels.timed(pieces, graph[:2]) == (pieces, False)
        assert kernels.timed(pieces, [("a", 1.0), ("a", 2.0), ("b", 3.0)]) == (pieces, False)

    def test_a_kind_that_cannot_run_is_a_row(self, device, tiny):
        assert "cannot serve" in kernels.measure(tiny, "cuda", 4, device)["error"]


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
