"""add_act: relu(x + residual), with one bit per element kept for the backward."""

from __future__ import annotations

import pytest
import torch

from fusedres import functional as F
from fusedres import verification
from fusedres.verification import Case


@pytest.mark.parametrize("case", verification.cases("add_act"), ids=lambda c: c.name)
def test_rule(case: Case, any_backend: str) -> None:
    assert not verification.failures(case, any_backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_equals_eager_bit_for_bit(dtype, backend) -> None:
    """One rounding of an exact sum: the same bits, and the same gradient bits, for every tail length."""
    for size in [*range(1, 70), 127, 128, 129, 1000, 4097, 70001]:
        g = torch.Generator().manual_seed(size)
        x, r = (torch.randn(size, generator=g).to(dtype).requires_grad_() for _ in range(2))
        dy = torch.randn(size, generator=g).to(dtype)
        mine, theirs = F.add_act(x, r), torch.relu(x + r)
        assert torch.equal(mine, theirs), size
        for a, b in zip(torch.autograd.grad(mine, (x, r), dy), torch.autograd.grad(theirs, (x, r), dy), strict=True):
            assert torch.equal(a, b), size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_special_values(dtype, backend) -> None:
    """Every pair of special values: NaN propagates, -0 and underflow as in eager, gradient 0 at 0 and 1 at NaN."""
    info = torch.finfo(dtype)
    small = info.smallest_normal
    values = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        float("inf"),
        float("-inf"),
        float("nan"),
        small,
        -small,
        # Documented: the CPU's own conversion to bfloat16 flushes subnormals.
        *([] if dtype is torch.bfloat16 else [small * info.eps]),
        info.max,
        info.min,
    ]
    a = torch.tensor(values, dtype=torch.float64).to(dtype)
    x, r = (t.flatten().clone().requires_grad_() for t in torch.meshgrid(a, a, indexing="ij"))
    mine, theirs = F.add_act(x, r), torch.relu(x + r)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    dy = torch.arange(1, len(values) ** 2 + 1).to(dtype)
    for m, t in zip(torch.autograd.grad(mine, (x, r), dy), torch.autograd.grad(theirs, (x, r), dy), strict=True):
        torch.testing.assert_close(m, t, rtol=0, atol=0, equal_nan=True)
    special = torch.full((len(values) ** 2,), float("nan"), dtype=dtype)
    mine = torch.autograd.grad(F.add_act(x, r), x, special)[0]
    theirs = torch.autograd.grad(torch.relu(x + r), x, special)[0]
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


SHAPES = [
    ((3, 5, 6, 7), (1, 5, 1, 1)),
    ((3, 5, 6, 7), ()),
    ((7,), (3, 5, 6, 7)),
    ((2, 3), (2, 3)),
    ((), ()),
    ((0, 3), (0, 3)),
    ((3, 1), (1, 4)),
]


@pytest.mark.parametrize(("shape", "other"), SHAPES, ids=str)
def test_any_rank_and_broadcast(shape, other, backend) -> None:
    x, r = torch.randn(shape, requires_grad=True), torch.randn(other, requires_grad=True)
    mine, theirs = F.add_act(x, r), torch.relu(x + r)
    assert torch.equal(mine, theirs)
    dy = torch.randn(theirs.shape)
    for a, b in zip(torch.autograd.grad(mine, (x, r), dy), torch.autograd.grad(theirs, (x, r), dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float64, torch.float32),
        (torch.float32, torch.int64),
        (torch.int64, torch.int64),
    ],
    ids=str,
)
def test_promotion(a, b, backend) -> None:
    x, r = torch.randint(-3, 4, (3, 5, 6, 7)).to(a), torch.randint(-3, 4, (3, 5, 6, 7)).to(b)
    theirs = torch.relu(x + r)
    mine = F.add_act(x, r)
    assert mine.dtype == theirs.dtype
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("layout", verification.LAYOUTS)
@pytest.mark.parametrize("layout2", verification.LAYOUTS)
def test_layouts(layout, layout2, backend) -> None:
    x = verification.lay_out(torch.randn(3, 5, 6, 7), layout).requires_grad_()
    r = verification.lay_out(torch.randn(3, 5, 6, 7), layout2).requires_grad_()
    mine, theirs = F.add_act(x, r), torch.relu(x + r)
    assert torch.equal(mine, theirs)
    dy = torch.randn(3, 5, 6, 7)
    for a, b in zip(torch.autograd.grad(mine, (x, r), dy), torch.autograd.grad(theirs, (x, r), dy), strict=True):
        assert torch.equal(a, b)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if x.is_contiguous(memory_format=memory_format):
            assert mine.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("permutation", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 3, 2)], ids=str)
def test_dense_permutations(permutation, backend) -> None:
    """Any dense order of memory: the mask is packed in it, and dy may come in another."""
    x = torch.randn(3, 5, 6, 7).permute(permutation).requires_grad_()
    r = torch.randn(3, 5, 6, 7).permute(permutation).requires_grad_()
    mine, theirs = F.add_act(x, r), torch.relu(x + r)
    assert torch.equal(mine, theirs)
    for dy in (torch.randn(x.shape), torch.empty_like(mine).normal_(), torch.ones(()).expand(x.shape)):
        got = torch.autograd.grad(mine, (x, r), dy, retain_graph=True)
        want = torch.autograd.grad(theirs, (x, r), dy, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_for_backward(dtype, backend, saved_bytes) -> None:
    x, r = (torch.randn(4, 16, 32, 32).to(dtype).requires_grad_() for _ in range(2))
    out, size = saved_bytes(lambda: F.add_act(x, r))
    assert size <= x.numel() // 8 + 16
    torch.autograd.grad(out.sum(), x)
    _, size = saved_bytes(lambda: F.add_act(x, r, act=None))
    assert size == 0
    _, size = saved_bytes(lambda: F.add_act(x.detach(), r.detach()))
    assert size == 0


def test_inputs_may_change_afterwards(backend) -> None:
    x, r = torch.randn(3, 5, 6, 7, requires_grad=True), torch.randn(3, 5, 6, 7, requires_grad=True)
    a, b = x * 1, r * 1
    out = F.add_act(a, b)
    want = torch.autograd.grad(torch.relu(x + r).sum(), (x, r))
    with torch.no_grad():
        a.zero_()
        b.zero_()
    got = torch.autograd.grad(out.sum(), (x, r))
    assert all(torch.equal(m, t) for m, t in zip(got, want, strict=True))


def test_one_side_frozen_and_same_tensor_twice(backend) -> None:
    x, r = torch.randn(3, 5, 6, 7, requires_grad=True), torch.randn(3, 5, 6, 7)
    for a, b in ((x, r), (r, x), (x, x)):
        got = torch.autograd.grad(F.add_act(a, b).square().sum(), x)[0]
        want = torch.autograd.grad(torch.relu(a + b).square().sum(), x)[0]
        assert torch.equal(got, want)


def test_gradients_are_not_aliased(backend) -> None:
    """Both gradients have the same values; adding to one must not change the other, nor dy."""
    for act in ("relu", None):
        x, r = torch.randn(3, 5, 6, 7, requires_grad=True), torch.randn(3, 5, 6, 7, requires_grad=True)
        dy = torch.randn(3, 5, 6, 7)
        kept = dy.clone()
        F.add_act(x, r, act=act).backward(dy)
        gx = x.grad.clone()
        r.grad.add_(1)
        assert torch.equal(x.grad, gx)
        assert torch.equal(dy, kept)
        out = F.add_act(x, r, act=act)
        out.backward(dy)
        assert torch.equal(x.grad, 2 * gx)


def test_no_grad(backend) -> None:
    x, r = torch.randn(3, 5, 6, 7, requires_grad=True), torch.randn(3, 5, 6, 7)
    with torch.no_grad():
        assert not F.add_act(x, r).requires_grad
    assert not F.add_act(x.detach(), r).requires_grad
