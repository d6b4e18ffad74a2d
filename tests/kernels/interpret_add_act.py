"""The Triton kernels of kernels/add_act.py in Triton's interpreter, against the reference op: bit for bit.

Not collected by name: test_add_act_triton.py runs it in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch

import fusedres
from fusedres.kernels.add_act import BLOCK, add_act, add_act_backward

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [0, 1, 7, 8, 9, 16, 17, BLOCK - 1, BLOCK, 3 * BLOCK + 5]
SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40, 6e-8, 1e-30]
TINY_BFLOAT16 = 1e-37  # the interpreter misreads subnormal bfloat16


@pytest.fixture(autouse=True)
def _poison():
    torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN
    yield
    torch.use_deterministic_algorithms(False)


def inputs(n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x, residual = (torch.randn(n, dtype=torch.float64).to(dtype) for _ in range(2))
    for i, value in enumerate(SPECIAL):
        x[i * 3 : n : 41] = value
        residual[i * 2 : n : 37] = value
    if dtype == torch.bfloat16:
        for t in (x, residual):
            t[(t.abs() < TINY_BFLOAT16) & (t != 0)] = TINY_BFLOAT16
    return x, residual


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward(dtype, n, relu):
    x, residual = inputs(n, dtype)
    out, mask = add_act(x, residual, relu, True)
    assert_same(out, (x + residual).relu() if relu else x + residual)
    assert_same(mask, torch.ops.fusedres.add_act_reference(x, residual, relu, True)[1])
    assert_same(add_act_backward(residual, mask), torch.where(~(out <= 0), residual, 0))
    assert_same(add_act(x, residual, relu, False)[0], out)


def test_channels_last():
    x, residual = (torch.randn(2, 5, 3, 7).to(memory_format=torch.channels_last) for _ in range(2))
    out, mask = add_act(x, residual, True, True)
    assert_same(out, (x + residual).relu())
    assert_same(add_act_backward(x, mask), torch.where(out > 0, x, 0))


def test_differentiable_through_the_public_function():
    x, residual = (torch.randn(2, 4, 3, 5, requires_grad=True) for _ in range(2))
    with fusedres.use_backend("triton"):
        fusedres.functional.add_act(x, residual).square().sum().backward()
    wanted = 2 * (x + residual).relu().detach()
    assert_same(x.grad, wanted)
    assert_same(residual.grad, wanted)
