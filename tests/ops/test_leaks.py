"""Memory that is taken is given back: 2,000 steps with a flat resident set."""

from __future__ import annotations

import gc
import os
import weakref

import pytest
import torch

from fusedres import functional as F
from fusedres import verification
from fusedres.verification import Case


def _resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
@pytest.mark.parametrize("op", verification.OPS)
def test_resident_set_is_flat(op, backend) -> None:
    case = Case(op, shape=(2, 16, 24, 24), layout="channels_last")
    tensors = verification.make_inputs(case)
    values = [tensors[n].requires_grad_() for n in verification.differentiable(tensors)]

    def steps(count: int) -> int:
        for _ in range(count):
            torch.autograd.grad(verification.ours(case, tensors).sum(), values)
        gc.collect()
        return _resident()

    steps(200)
    start = steps(100)
    end = steps(1700)
    assert end - start < 2 * 2**20, f"grew by {(end - start) / 2**20:.1f} MiB in 1,700 steps"


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_resident_set_is_flat_when_calls_fail(backend) -> None:
    x, mean, var = torch.randn(2, 16, 24, 24, requires_grad=True), torch.zeros(16), torch.ones(16)

    def steps(count: int) -> int:
        for _ in range(count):
            with pytest.raises(RuntimeError):
                F.batch_norm_act(x, mean, var, torch.ones(15), training=True)
        gc.collect()
        return _resident()

    steps(200)
    start = steps(100)
    assert steps(1700) - start < 2 * 2**20


@pytest.mark.parametrize("name", ["forward only", "backward", "double backward", "error"])
def test_nothing_keeps_tensors_alive(main_call, name, backend) -> None:
    """No reference cycle and no cache holds the input once the result is gone, without the garbage collector."""
    gc.disable()
    try:
        tensors = main_call.tensors()
        values = [tensors[n] for n in main_call.names(tensors)]
        x = values[0] * 1
        watch = weakref.ref(x)
        out = main_call.function("ours", tensors)(x, *values[1:])
        if name == "backward":
            torch.autograd.grad(out.sum(), values, retain_graph=True)
        elif name == "double backward":
            first = torch.autograd.grad(out.square().sum(), values, create_graph=True)
            torch.autograd.grad(first[0].square().sum(), values, allow_unused=True)
            del first
        elif name == "error":
            with pytest.raises(RuntimeError):
                torch.autograd.grad(out.sum(), torch.ones(1, requires_grad=True))
        del x, out
        assert watch() is None
    finally:
        gc.enable()
