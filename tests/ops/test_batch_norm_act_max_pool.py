"""batch_norm_act_max_pool: the stem, without writing the un-pooled activation."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from fusedres import functional as F
from fusedres import verification
from fusedres.verification import Case

FORMATS = ("contiguous", "channels_last")
DWEIGHT = 4  # in what _both returns


@pytest.mark.parametrize("case", verification.cases("batch_norm_act_max_pool"), ids=lambda c: c.name)
def test_rule(case: Case, any_backend: str) -> None:
    assert not verification.failures(case, any_backend)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 34, 63, 65, 66, 129])
def test_tails(width: int, layout: str, dtype: str, kernel: str) -> None:
    shapes = ((2, width, 5, 4), (1, width, 2, 3), (1, 2, 3, width + 3), (2, 3, width + 2, 3))
    cases = [Case("batch_norm_act_max_pool", shape=shape, dtype=dtype, layout=layout) for shape in shapes]
    assert not verification.pooled_failures(cases, kernel)
    assert not verification.pooled_failures([replace(c, distribution="large_mean") for c in cases], kernel)


def _both(x, window, training=True, act="relu", dy=None, weight=None, bias=None):
    """Results of ours and of eager for one x: out, statistics, gradients."""
    results = []
    channels = x.shape[1]
    for name in ("ours", "eager"):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        param = torch.float64 if x.dtype is torch.float64 else torch.float32
        w = torch.ones(channels, dtype=param) if weight is None else weight.clone()
        b = torch.zeros(channels, dtype=param) if bias is None else bias.clone()
        stats = [torch.zeros(channels, dtype=param), torch.ones(channels, dtype=param)]
        w.requires_grad_()
        b.requires_grad_()
        if name == "ours":
            out = F.batch_norm_act_max_pool(leaf, *stats, w, b, training=training, act=act, **window)
        else:
            y = nn.functional.batch_norm(leaf, *stats, w, b, training)
            out = nn.functional.max_pool2d(torch.relu(y) if act else y, **window)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype) if dy is None else dy
        results.append([out, *stats, *torch.autograd.grad(out, (leaf, w, b), grad)])
    return results


WINDOWS = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "stride": None, "padding": 0},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    {"kernel_size": 3, "stride": 2, "padding": 0, "ceil_mode": True},
    {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True},
    {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2},
    {"kernel_size": (2, 3), "stride": (3, 2), "padding": (0, 1), "dilation": (3, 1), "ceil_mode": True},
    {"kernel_size": 7, "stride": 3, "padding": 3},
    {"kernel_size": 9, "stride": 9, "padding": 4},
    {"kernel_size": (1, 9), "stride": (1, 1), "padding": (0, 4)},
    {"kernel_size": 1, "stride": 2, "padding": 0},
]


@pytest.mark.parametrize("act", ["relu", None])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows(window, layout, training, act, backend) -> None:
    x = verification.lay_out(torch.randn(2, 5, 13, 14, generator=torch.Generator().manual_seed(0)), layout)
    for mine, theirs in zip(*_both(x, window, training, act), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("negative", [False, True], ids=["plus", "minus"])
def test_ties_go_where_torch_sends_them(negative, window, layout, dtype, backend) -> None:
    """Few distinct values, so equal inputs give equal activations; negative weights turn the order round."""
    g = torch.Generator().manual_seed(0)
    x = verification.lay_out(torch.randint(-1, 2, (2, 5, 13, 14), generator=g).to(dtype), layout)
    param = torch.float64 if dtype is torch.float64 else torch.float32
    weight = torch.full((5,), -1.0 if negative else 1.0, dtype=param)
    bias = torch.tensor([0.0, 2.0, -0.5, 5.0, 0.1], dtype=param)
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
    for training in (True, False):
        mine, theirs = _both(x, window, training, weight=weight, bias=bias)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=5 * tolerance)
        if not training and dtype is not torch.bfloat16:  # a gradient is zero wherever no window sent one
            assert torch.equal(mine[3] == 0, theirs[3] == 0)


def test_constant_input_is_one_big_tie(backend) -> None:
    x = torch.full((2, 3, 8, 8), 0.7)
    for bias in (1.0, 0.0, -1.0):
        mine, theirs = _both(x, WINDOWS[0], training=False, bias=torch.full((3,), bias))
        assert torch.equal(mine[3] == 0, theirs[3] == 0)
        torch.testing.assert_close(mine[3], theirs[3])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("window", WINDOWS[:6], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("act", ["relu", None])
def test_specials(act, training, window, layout, value, backend) -> None:
    """A NaN wins its windows (the last of several), infinities as in eager, and all lands where eager's lands."""
    x = torch.randn(2, 5, 9, 10, generator=torch.Generator().manual_seed(0))
    x[0, 1, 4, 4] = x[0, 1, 4, 5] = x[1, 2, 0, 0] = x[1, 3, 8, 9] = value
    mine, theirs = _both(verification.lay_out(x, layout), window, training, act)
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if i == DWEIGHT and not training:
            # Eager sums gradient times x over all pixels, with 0 * Inf where nothing was won; ours over the winners.
            a = torch.where(b.isfinite(), a, b)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda m, i=i: f"{i}: {m}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_special_gradients(value, backend) -> None:
    x = torch.randn(2, 5, 9, 10, generator=torch.Generator().manual_seed(0))
    dy = torch.randn(2, 5, 5, 5, generator=torch.Generator().manual_seed(1))
    dy[1, 2, 2, 2] = value
    for training in (True, False):
        for a, b in zip(*_both(x, WINDOWS[0], training, dy=dy), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("layout", FORMATS)
def test_everything_dead(layout, backend) -> None:
    """No window passes the ReLU: output and gradients are zero, and only the statistics move."""
    x = verification.lay_out(torch.randn(2, 5, 9, 10), layout)
    mine, theirs = _both(x, WINDOWS[0], weight=torch.full((5,), 0.1), bias=torch.full((5,), -10.0))
    assert mine[0].abs().max() == 0
    assert all(g.abs().max() == 0 for g in mine[3:])
    torch.testing.assert_close(mine[1], theirs[1])


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_for_backward(dtype, layout, backend, saved_bytes, norm_arguments) -> None:
    """x, the statistics and at most one bit per element: not the un-pooled activation, no 64-bit indices."""
    x = verification.lay_out(torch.randn(4, 16, 32, 32).to(dtype), layout).requires_grad_()
    out, size = saved_bytes(lambda: F.batch_norm_act_max_pool(x, *norm_arguments(16), training=True))
    assert size <= x.numel() * dtype.itemsize + x.numel() // 8 + 6 * 16 * 4
    assert out.shape == (4, 16, 16, 16)


def test_does_not_write_the_unpooled_activation(norm_arguments, record_ops) -> None:
    """The C++ op makes nothing of x's size in the forward; in the backward, dx only."""
    import fusedres

    if verification.backends("cpu")["cpu"] is not None:
        pytest.skip("no C++ backend")
    x = torch.randn(4, 16, 32, 32, requires_grad=True)
    with fusedres.use_backend("cpu"), record_ops() as record:
        out = F.batch_norm_act_max_pool(x, *norm_arguments(16), training=True)
        torch.autograd.grad(out, x, torch.ones_like(out))
    made = [(str(op), r) for op, _, _, results in record.calls for r in (results if isinstance(results, tuple) else ())]
    large = [op for op, r in made if isinstance(r, torch.Tensor) and r.numel() >= x.numel()]
    assert large == ["fusedres.batch_norm_act_max_pool_backward.default"]


@pytest.mark.parametrize("layout", verification.LAYOUTS)
def test_memory_format(layout, backend, norm_arguments) -> None:
    x = verification.lay_out(torch.randn(3, 5, 6, 7), layout).requires_grad_()
    out = F.batch_norm_act_max_pool(x, *norm_arguments(5), training=True)
    if layout in FORMATS:
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        assert out.is_contiguous(memory_format=memory_format)
        assert torch.autograd.grad(out.sum(), x)[0].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("wanted", [s for k in (1, 2, 3) for s in itertools.combinations((0, 1, 2), k)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_frozen_parameters(wanted, training, backend, norm_arguments) -> None:
    def gradients(indices):
        x = torch.randn(2, 5, 9, 10, generator=torch.Generator().manual_seed(0))
        mean, var, weight, bias = norm_arguments(5)
        leaves = [x, weight, bias]
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i in indices)
        out = F.batch_norm_act_max_pool(x, mean, var, weight, bias, training=training)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
        return {i: leaves[i].grad for i in range(3)}

    some, everything = gradients(wanted), gradients((0, 1, 2))
    for i in range(3):
        assert torch.equal(some[i], everything[i]) if i in wanted else some[i] is None


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_neither_on_run_nor_on_threads(dtype, layout, backend) -> None:
    shape = (8, 64, 56, 56)
    g = torch.Generator().manual_seed(0)
    x = verification.lay_out(torch.randn(shape, generator=g).to(dtype), layout).requires_grad_()
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            weight, bias = torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
            stats = [torch.zeros(64), torch.ones(64)]
            out = F.batch_norm_act_max_pool(x, *stats, weight, bias, training=True)
            dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            results.append([out, *stats, *torch.autograd.grad(out, (x, weight, bias), dy)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_empty_batch(training, backend) -> None:
    x = torch.randn(0, 5, 6, 7)
    mine, theirs = _both(x, WINDOWS[0], training)
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["x", "weight"])
def test_change_in_place_before_backward_raises(name, backend, norm_arguments) -> None:
    arguments = norm_arguments(5)
    x = torch.randn(2, 5, 9, 10, requires_grad=True) * 1
    out = F.batch_norm_act_max_pool(x, *arguments, training=True)
    with torch.no_grad():
        (x if name == "x" else arguments[2]).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_window_without_elements(backend) -> None:
    """All of a window in the padding (dilation > size): -inf as in eager, no gradient; eager's is out of bounds."""
    code = """
import torch
from fusedres import functional as F
for memory_format in (torch.contiguous_format, torch.channels_last):
    for act in ("relu", None):
        for _ in range(20):
            x = torch.randn(2, 3, 1, 6).contiguous(memory_format=memory_format).requires_grad_()
            window = dict(kernel_size=2, stride=2, padding=1, dilation=2)
            y = F.batch_norm_act_max_pool(x, torch.zeros(3), torch.ones(3), training=True, act=act, **window)
            assert (y == -torch.inf).all()
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
            assert dx.isfinite().all(), dx
            assert act is None or (dx == 0).all(), dx
"""
    environment = os.environ | {"FUSEDRES_BACKEND": backend, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr[-1000:])
