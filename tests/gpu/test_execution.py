"""How calls run on the device: graphs, streams, devices, determinism, no waiting for the host."""

from __future__ import annotations

import time

import pytest
import torch

from fusedres import functional, verification

from .conftest import CASES, DEVICE, Call, served_by

pytestmark = pytest.mark.gpu


def test_graph_replays_on_new_inputs(case, forced, make_call, bits, capture):
    """A replay gives what a call gives on the same inputs; statistics and counters move with every replay."""
    call = make_call(case)
    replay, results = capture(call)
    generator = torch.Generator(DEVICE).manual_seed(5)
    for _ in range(3):
        with torch.no_grad():
            for name in ("x", "x2", "residual"):
                if name in call.tensors:
                    t = call.tensors[name]
                    t.copy_(torch.randn(t.shape, generator=generator, device=DEVICE) * 2 + 1)
        want = call.fresh()
        for t in results:
            t.data.fill_(float("nan"))
        replay()
        bits([*(t.detach() for t in results), *call.buffers.values()], want)


def test_same_bits_twenty_times(case, forced, make_call, bits):
    call = make_call(case)
    want = call.fresh()
    for _ in range(19):
        bits(call.fresh(), want)


@pytest.mark.parametrize(
    "shape", [(64, 64, 56, 56), (64, 256, 14, 14), (16, 2048, 7, 7)], ids=lambda s: "x".join(map(str, s))
)
def test_same_bits_with_the_device_full(shape, backend, make_call, bits):
    """Many tiles that end in any order, beside other work."""
    if DEVICE == "cpu":
        shape = (2, *shape[1:])
    with served_by(backend, "batch_norm_act"):
        call = make_call(verification.Case("batch_norm_act", shape, "bf16", "channels_last", residual="channels_last"))
        want = call.fresh()
        noise = torch.randn(512, 512, device=DEVICE)
        for _ in range(5):
            if DEVICE == "cuda":
                with torch.cuda.stream(torch.cuda.Stream()):
                    for _ in range(20):
                        noise @ noise
            bits(call.fresh(), want)


def test_second_stream(case, forced, needs_gpu, make_call, bits):
    """Kernels run on the current stream: behind what it was given, not beside it."""
    call = make_call(case)
    want = call.fresh()
    true = {name: t.detach().clone() for name, t in call.tensors.items() if t.dim() == 4}
    stream = torch.cuda.Stream()
    with torch.no_grad():
        for name in true:
            call.tensors[name].fill_(float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for name, t in true.items():
                call.tensors[name].copy_(t)
        got = call.fresh()
    torch.cuda.synchronize()
    bits(got, want)


def test_second_device(case, forced, needs_gpu, make_call, bits):
    """Tensors of a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    assert torch.cuda.current_device() == 0
    got = make_call(case, "cuda:1").fresh()
    assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in got)
    if torch.cuda.get_device_capability(0) == torch.cuda.get_device_capability(1):
        bits([t.to("cuda:0") for t in got], make_call(case, "cuda:0").fresh())


def test_no_waiting_for_the_host(case, forced, needs_gpu, make_call):
    """A cumulative average reads its counter on the device."""
    call = make_call(case)
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["residual", "plain", "eval", "pair", "stem", "add"])
def test_straight_to_a_native_op(name, backend, make_call, monkeypatch):
    """It checks its arguments itself, so that Python does not, which would take as long as the rest of a call."""
    if backend not in ("cuda", "cpu"):
        pytest.skip("this backend's launchers rely on the checks")
    with served_by(backend, CASES[name].op):
        call = make_call(CASES[name])
        monkeypatch.setattr(functional, "check_act", lambda act: pytest.fail("checked"))
        call()


def test_first_call_on_a_new_shape(backend):
    """Takes no second more than the next one, once kernels are compiled: nothing is tried out at run time."""

    def seconds(x: torch.Tensor, residual: torch.Tensor) -> float:
        start = time.perf_counter()
        weight, bias = (torch.ones(64, device=DEVICE, requires_grad=True) for _ in range(2))
        functional.batch_norm_act(x, None, None, weight, bias, residual, training=True).sum().backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with served_by(backend, "batch_norm_act"):
        for size in ((8, 64, 28, 28), (4, 64, 29, 27)):  # the first compiles
            x, residual = (
                torch.randn(size, device=DEVICE).bfloat16().contiguous(memory_format=torch.channels_last)
                for _ in range(2)
            )
            x.requires_grad_()
            first, second = seconds(x, residual), seconds(x, residual)
    assert first - second < 1


@pytest.mark.parametrize("name", ["residual", "plain", "pair", "stem", "add"])
def test_memory_of_a_call(name, backend, needs_gpu, make_call):
    """Nothing large is allocated but the results: no copies, no un-pooled activation."""
    case = CASES[name]
    with served_by(backend, case.op):
        call = make_call(case)
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    x = call.tensors["x"]
    kept = sum(t.numel() * t.element_size() for t in results)
    assert peak <= 1.25 * kept + x.numel() // 8 + (1 << 20)


def test_call_fixture_sees_wrong_statistics():
    """The tests above compare buffers too: a call that forgets to update them differs."""
    call = Call(verification.Case("batch_norm_act", (2, 3, 4, 5), "f32"))
    before = call.state()
    call()
    assert any(not torch.equal(before[name], t) for name, t in call.buffers.items())
