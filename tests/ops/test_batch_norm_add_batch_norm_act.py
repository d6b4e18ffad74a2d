"""batch_norm_add_batch_norm_act: relu(bn(x) + bn2(x2)), the tail of a block with a projection shortcut."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from fusedres import functional as F
from fusedres import verification
from fusedres.verification import Case

FORMATS = ("contiguous", "channels_last")


@pytest.mark.parametrize("case", verification.cases("batch_norm_add_batch_norm_act"), ids=lambda c: c.name)
def test_rule(case: Case, any_backend: str) -> None:
    assert not verification.failures(case, any_backend)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 65, 129, 513])
def test_tails(width: int, layout: str, dtype: str, kernel: str) -> None:
    shapes = ((3, width, 1, 5), (2, width, 1, 2), (2, 3, 1, width + 1), (5, 2, width, 3))
    cases = [Case("batch_norm_add_batch_norm_act", shape=shape, dtype=dtype, layout=layout) for shape in shapes]
    assert not verification.pooled_failures(cases, kernel)
    assert not verification.pooled_failures([replace(c, distribution="large_mean") for c in cases], kernel)


def _arguments(seed: int, channels: int = 5):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, channels, 6, 7, generator=g).requires_grad_()
    weight = (torch.rand(channels, generator=g) + 0.5).requires_grad_()
    bias = torch.randn(channels, generator=g).requires_grad_()
    return x, torch.zeros(channels), torch.ones(channels), weight, bias


def _eager(a, b, training=True, training2=True, momentum=0.1, momentum2=0.1, eps=1e-5, eps2=1e-5, act="relu"):
    y = nn.functional.batch_norm(*a, training, momentum, eps) + nn.functional.batch_norm(*b, training2, momentum2, eps2)
    return torch.relu(y) if act else y


@pytest.mark.parametrize(
    "options",
    [
        {"training": True, "momentum2": 0.7},
        {"training": True, "eps2": 0.5},
        {"training": False, "training2": True, "momentum2": 1.0, "eps": 0.1, "eps2": 0.2},
        {"training": True, "training2": False, "act": None},
        {"training": True, "momentum": 0.0, "momentum2": 2.0},
    ],
    ids=str,
)
def test_each_norm_has_its_own_options(options, backend) -> None:
    eager_options = dict(options)
    eager_options.setdefault("training2", options["training"])
    eager_options.setdefault("momentum2", options.get("momentum", 0.1))
    eager_options.setdefault("eps2", options.get("eps", 1e-5))
    results = []
    for name in ("ours", "eager"):
        a, b = _arguments(0), _arguments(1)
        out = F.batch_norm_add_batch_norm_act(*a, *b, **options) if name == "ours" else _eager(a, b, **eager_options)
        dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        leaves = [a[0], a[3], a[4], b[0], b[3], b[4]]
        results.append([out, a[1], a[2], b[1], b[2], *torch.autograd.grad(out, leaves, dy)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_counters_and_cumulative_averages(backend) -> None:
    a, b = _arguments(0), _arguments(1)
    first, second = torch.tensor(0), torch.tensor(4)
    for _ in range(3):
        F.batch_norm_add_batch_norm_act(
            *a, *b, training=True, momentum=None, momentum2=0.5, num_batches_tracked=first, num_batches_tracked2=second
        )
    assert (first.item(), second.item()) == (3, 7)
    torch.testing.assert_close(a[1], a[0].detach().mean((0, 2, 3)))
    torch.testing.assert_close(b[1], b[0].detach().mean((0, 2, 3)) * (1 - 0.5**3))


SUBSETS = [s for k in (1, 2, 3) for s in itertools.combinations(range(6), k)]


@pytest.mark.parametrize("training", [(True, True), (True, False), (False, False)], ids=str)
@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
def test_frozen_parameters(wanted, training, backend) -> None:
    def gradients(indices):
        a, b = _arguments(0), _arguments(1)
        leaves = [a[0], a[3], a[4], b[0], b[3], b[4]]
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i in indices)
        out = F.batch_norm_add_batch_norm_act(*a, *b, training=training[0], training2=training[1])
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
        assert [leaf.grad is not None for leaf in leaves] == [i in indices for i in range(6)]
        return {i: leaves[i].grad for i in indices}

    some, everything = gradients(wanted), gradients(range(6))
    assert all(torch.equal(some[i], everything[i]) for i in wanted)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_for_backward(dtype, layout, backend, saved_bytes, norm_arguments) -> None:
    """x, x2, the statistics, at most one bit per element."""
    x, x2 = (verification.lay_out(torch.randn(4, 16, 32, 32).to(dtype), layout).requires_grad_() for _ in range(2))
    a, b = norm_arguments(16), norm_arguments(16)
    _, size = saved_bytes(lambda: F.batch_norm_add_batch_norm_act(x, *a, x2, *b, training=True))
    assert size <= 2 * x.numel() * dtype.itemsize + x.numel() // 8 + 12 * 16 * 4


@pytest.mark.parametrize("layout", verification.LAYOUTS)
@pytest.mark.parametrize("layout2", FORMATS)
def test_memory_format(layout, layout2, backend, norm_arguments) -> None:
    x = verification.lay_out(torch.randn(3, 5, 6, 7), layout).requires_grad_()
    x2 = verification.lay_out(torch.randn(3, 5, 6, 7), layout2).requires_grad_()
    out = F.batch_norm_add_batch_norm_act(x, *norm_arguments(5), x2, *norm_arguments(5), training=True)
    if layout in FORMATS:
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        assert out.is_contiguous(memory_format=memory_format)
        dx = torch.autograd.grad(out.sum(), x)[0]
        assert dx.is_contiguous(memory_format=memory_format)


def test_same_x_and_same_statistics_twice(backend) -> None:
    """One tensor, or one module, in both places: gradients add up, statistics are updated one after the other."""
    results = []
    for name in ("ours", "eager"):
        x, mean, var, weight, bias = _arguments(0)
        a = (x, mean, var, weight, bias)
        out = F.batch_norm_add_batch_norm_act(*a, *a, training=True) if name == "ours" else _eager(a, a)
        dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        results.append([out, mean, var, *torch.autograd.grad(out, (x, weight, bias), dy)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("target", ["x", "x2", "dy"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_specials_propagate_as_in_eager(training, target, value, backend) -> None:
    results = []
    for name in ("ours", "eager"):
        a, b = _arguments(0), _arguments(1)
        dy = torch.randn(3, 5, 6, 7, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            {"x": a[0], "x2": b[0], "dy": dy}[target][1, 2, 3, 4] = value
        if name == "ours":
            out = F.batch_norm_add_batch_norm_act(*a, *b, training=training)
        else:
            out = _eager(a, b, training, training)
        leaves = [a[0], a[3], a[4], b[0], b[3], b[4]]
        results.append([out, a[1], a[2], b[1], b[2], *torch.autograd.grad(out, leaves, dy)])
    for i, (mine, theirs) in enumerate(zip(*results, strict=True)):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4, equal_nan=True, msg=lambda m, i=i: f"{i}: {m}")


@pytest.mark.parametrize("name", ["x", "x2", "weight", "weight2"])
def test_change_in_place_before_backward_raises(name, backend) -> None:
    a, b = _arguments(0), _arguments(1)
    x, x2 = a[0] * 1, b[0] * 1
    out = F.batch_norm_add_batch_norm_act(x, *a[1:], x2, *b[1:], training=True)
    with torch.no_grad():
        {"x": x, "x2": x2, "weight": a[3], "weight2": b[3]}[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_neither_on_run_nor_on_threads(dtype, layout, backend) -> None:
    shape = (8, 64, 28, 28)
    g = torch.Generator().manual_seed(0)
    x, x2, dy = (verification.lay_out(torch.randn(shape, generator=g).to(dtype), layout) for _ in range(3))
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            parts = []
            for t in (x, x2):
                leaf = t.clone(memory_format=torch.preserve_format).requires_grad_()
                affine = torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
                parts.append([leaf, torch.zeros(64), torch.ones(64), *affine])
            out = F.batch_norm_add_batch_norm_act(*parts[0], *parts[1], training=True)
            leaves = [parts[0][i] for i in (0, 3, 4)] + [parts[1][i] for i in (0, 3, 4)]
            results.append([out, *parts[0][1:3], *parts[1][1:3], *torch.autograd.grad(out, leaves, dy)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_shapes_that_broadcast(backend, norm_arguments) -> None:
    """Eager's sum broadcasts: the same, or an error that says so before anything is written."""
    x, x2 = torch.randn(3, 5, 6, 7, requires_grad=True), torch.randn(3, 5, 6, 1, requires_grad=True)
    a, b = norm_arguments(5), norm_arguments(5)
    theirs = torch.relu(
        nn.functional.batch_norm(x, *norm_arguments(5), True) + nn.functional.batch_norm(x2, *norm_arguments(5), True)
    )
    try:
        mine = F.batch_norm_add_batch_norm_act(x, *a, x2, *b, training=True)
    except RuntimeError as error:
        assert "x2" in str(error)  # noqa: PT017
        assert torch.equal(a[0], torch.zeros(5))
    else:
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        for i, j in zip(
            torch.autograd.grad(mine.sum(), (x, x2)), torch.autograd.grad(theirs.sum(), (x, x2)), strict=True
        ):
            torch.testing.assert_close(i, j, rtol=1e-4, atol=1e-4)
