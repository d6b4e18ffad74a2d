"""The CUDA kernels of csrc/cuda/add_act.cu, run on the CPU, against the reference op: bit for bit."""

from __future__ import annotations

import pytest
import torch

import fusedres  # noqa: F401 (declares the ops)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Around one element, one mask byte, one mask word, one vector, one block (8192 elements in 16 bit), several blocks.
SIZES = [0, 1, 7, 8, 9, 15, 16, 17, 1023, 4096, 8192, 8193, 20011]
SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40, 6e-8, 1e-30]


@pytest.fixture(scope="module")
def ops(host_cuda_ops):
    return host_cuda_ops("add_act")


def inputs(n: int, dtype: torch.dtype, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two vectors of n values, special ones among them, that start ``offset`` elements after an aligned address."""
    x, residual = (torch.randn(n + offset, dtype=torch.float64).to(dtype)[offset:] for _ in range(2))
    for i, value in enumerate(SPECIAL):
        x[i * 3 : n : 41] = value
        residual[i * 2 : n : 37] = value
    return x, residual


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def eager(x: torch.Tensor, residual: torch.Tensor, relu: bool) -> torch.Tensor:
    y = x + residual
    return y.relu() if relu else y


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(ops, dtype, n, relu):
    x, residual = inputs(n, dtype)
    out, mask = ops.add_act(x, residual, relu, True)
    assert_same_bits(out, eager(x, residual, relu))
    _, wanted_mask = torch.ops.fusedres.add_act_reference(x, residual, relu, True)
    assert mask.numel() == 2 * -(-n // 16)
    assert_same_bits(mask, wanted_mask)
    out, mask = ops.add_act(x, residual, relu, False)
    assert_same_bits(out, eager(x, residual, relu))
    assert mask.shape == (0,)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(ops, dtype, n):
    x, residual = inputs(n, dtype)
    out, mask = ops.add_act(x, residual, True, True)
    dy, _ = inputs(n, dtype)
    assert_same_bits(ops.add_act_backward(dy, mask), torch.where(~(out <= 0), dy, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offsets", [(1, 0), (0, 1), (3, 3)])
def test_unaligned(ops, dtype, offsets):
    x, residual = inputs(5003, dtype, offsets[0])[0], inputs(5003, dtype, offsets[1])[1]
    out, mask = ops.add_act(x, residual, True, True)
    wanted, wanted_mask = torch.ops.fusedres.add_act_reference(x, residual, True, True)
    assert_same_bits(out, wanted)
    assert_same_bits(mask, wanted_mask)
    assert_same_bits(ops.add_act_backward(x, mask), torch.where(~(out <= 0), x, 0))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)])
def test_memory_order_is_kept(ops, order):
    """Any dense tensor, with dimensions of size 1 and whatever order of the others."""
    x, residual = (torch.randn(2, 5, 1, 7).permute(order) for _ in range(2))
    out, mask = ops.add_act(x, residual, True, True)
    assert_same_bits(out, (x + residual).relu())
    assert_same_bits(ops.add_act_backward(x, mask), torch.where(out > 0, x, 0))


BAD = {
    "residual's shape": (lambda ops, x: ops.add_act(x, x[:3], True, True), "residual"),
    "residual's dtype": (lambda ops, x: ops.add_act(x, x.double(), True, True), "residual"),
    "residual's strides": (lambda ops, x: ops.add_act(x, x.t().contiguous().t(), True, True), "residual"),
    "gaps": (lambda ops, x: ops.add_act(x[:, ::2], x[:, ::2], True, True), "x must be dense"),
    "overlaps": (lambda ops, x: ops.add_act(x[:1].expand(4, 4), x[:1].expand(4, 4), True, True), "x must be dense"),
    "integers": (lambda ops, x: ops.add_act(x.int(), x.int(), True, True), "dtype"),
    "mask's size": (lambda ops, x: ops.add_act_backward(x, torch.zeros(3, dtype=torch.uint8)), "mask must have 2"),
    "mask's dtype": (lambda ops, x: ops.add_act_backward(x, torch.zeros(2)), "mask must be a contiguous"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(ops, case):
    call, words = BAD[case]
    with pytest.raises(RuntimeError, match=words):
        call(ops, torch.randn(4, 4))
