"""batch_norm_act: values against float64, and everything nn.BatchNorm2d promises besides values."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedres
from fusedres import functional as F
from fusedres import verification
from fusedres.verification import Case

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("case", verification.cases("batch_norm_act"), ids=lambda c: c.name)
def test_rule(case: Case, any_backend: str) -> None:
    assert not verification.failures(case, any_backend)


WIDTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 47, 48, 49, 63, 64, 65, 96, 127, 128, 129, 511, 513, 1030]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("width", WIDTHS)
def test_tails(width: int, layout: str, dtype: str, kernel: str) -> None:
    """Every remainder of a vector, an unrolled loop and a tile, along the channels and along the rows."""
    shapes = ((3, width, 1, 5), (2, width, 1, 2), (2, 3, 1, width + 1), (5, 2, width, 3), (1, width, 4, 5))
    cases = [Case("batch_norm_act", shape=shape, dtype=dtype, layout=layout) for shape in shapes]
    assert not verification.pooled_failures(cases, kernel)
    assert not verification.pooled_failures([replace(c, residual=layout) for c in cases], kernel)
    assert not verification.pooled_failures([replace(c, distribution="large_mean") for c in cases], kernel)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64", "all-bf16", "all-f16"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("channels", range(1, 140))
def test_every_channel_count(channels: int, layout: str, dtype: str, kernel: str) -> None:
    base = Case("batch_norm_act", shape=(2, channels, 1, 11), dtype=dtype, layout=layout)
    for residual, training in itertools.product((None, layout), (True, False)):
        cases = [
            replace(base, shape=(2, channels, h, w), residual=residual, training=training)
            for h in (1, 3, 6)
            for w in (2, 11)
        ]
        assert not verification.pooled_failures(cases, kernel)
        assert not verification.pooled_failures([replace(c, distribution="large_mean") for c in cases], kernel)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("layout", FORMATS)
def test_one_row_holds_the_outlier(layout: str, dtype: str, backend: str) -> None:
    """One element of 1e6 in a small channel, first, last and in the middle: merged means must not lose it."""
    for place in (0, 2000, 4095):
        x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x[place // 1024, 1, place % 1024 // 32, place % 32] = 1e6 if dtype != "bf16" else 1e3
        x = verification.lay_out(x.to(Case("", dtype=dtype).x_dtype), layout)
        mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        theirs, mine = [mean.clone(), var.clone()], [mean.clone(), var.clone()]
        nn.functional.batch_norm(x.double(), *theirs, training=True, momentum=1.0)
        mine = [m.to(Case("", dtype=dtype).param_dtype) for m in mine]
        F.batch_norm_act(x, *mine, training=True, momentum=1.0)
        deviation = theirs[1].sqrt().max().item()
        torch.testing.assert_close(mine[0].double(), theirs[0], rtol=0, atol=3e-7 * deviation)
        torch.testing.assert_close(mine[1].double(), theirs[1], rtol=2e-6, atol=0)


# --- Inf and NaN ---


def _poisoned(where: str, value: float, layout: str, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(4, 6, 9, 11, generator=torch.Generator().manual_seed(3)).to(dtype)
    x = verification.lay_out(x, layout)
    flat = x.permute(1, 0, 2, 3).reshape(6, -1)
    index = {"first": 0, "middle": flat.shape[1] // 2, "last": flat.shape[1] - 1}[where]
    n, rest = divmod(index, 99)
    x[n, 2, rest // 11, rest % 11] = value
    return x


def _same_specials(mine: torch.Tensor, theirs: torch.Tensor, what: str, values: bool) -> None:
    assert torch.equal(mine.isnan(), theirs.isnan()), f"{what}: NaN at other places than eager's"
    assert torch.equal(mine.isinf() * mine.sign().nan_to_num(), theirs.isinf() * theirs.sign().nan_to_num()), (
        f"{what}: infinities at other places than eager's"
    )
    if not values:
        return
    mine, theirs = mine[theirs.isfinite()], theirs[theirs.isfinite()]
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "contiguous"), (torch.float32, "channels_last"), (torch.bfloat16, "channels_last")],
    ids=["f32-contiguous", "f32-channels_last", "bf16-channels_last"],
)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("target", ["x", "residual", "dy", "bias"])
def test_specials_propagate_as_in_eager(target, training, value, where, layout, dtype, backend) -> None:
    if target == "bias" and where != "first":
        pytest.skip("a parameter has one place")
    results = []
    for name in ("ours", "eager"):
        x = _poisoned(where, value if target == "x" else 0.5, layout, dtype).requires_grad_()
        residual = _poisoned(where, value if target == "residual" else 0.5, layout, dtype).requires_grad_()
        dy = _poisoned(where, value if target == "dy" else 0.5, layout, dtype)
        stats = [torch.zeros(6), torch.ones(6)]
        weight, bias = torch.linspace(-1, 1.5, 6), torch.linspace(-0.3, 0.4, 6)
        if target == "bias":
            bias[2] = value
        leaves = [x, residual, weight.requires_grad_(), bias.requires_grad_()]
        if name == "ours":
            out = F.batch_norm_act(x, *stats, weight, bias, residual, training=training)
        else:
            out = torch.relu(nn.functional.batch_norm(x, *stats, weight, bias, training) + residual)
        results.append([out, *stats, *torch.autograd.grad(out, leaves, dy)])
    names = ["out", "running_mean", "running_var", "dx", "dresidual", "dweight", "dbias"]
    for what, mine, theirs in zip(names, *results, strict=True):
        # in bfloat16 the masks may differ where a pre-activation rounds to zero; test_rule covers the values
        _same_specials(mine.detach(), theirs.detach(), what, values=dtype is not torch.bfloat16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_special_weight(layout, value, backend) -> None:
    """(x - mean) * Inf: infinite here, Inf - Inf in eager. Nothing finite but a ReLU's zero, in that channel only."""
    x = verification.lay_out(
        torch.randn(4, 6, 9, 11, generator=torch.Generator().manual_seed(3)), layout
    ).requires_grad_()
    weight = torch.ones(6)
    weight[2] = value
    out = F.batch_norm_act(x, torch.zeros(6), torch.ones(6), weight, training=True)
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    special = ~out.isfinite() | (out == 0)
    assert special[:, 2].all()
    assert (~out[:, 2].isfinite()).any()
    others = [0, 1, 3, 4, 5]
    assert out[:, others].isfinite().all()
    assert dx[:, others].isfinite().all()
    assert not dx[:, 2].isfinite().all()


def test_gradient_is_zero_at_zero_and_passes_at_nan(backend: str) -> None:
    """relu'(0) = 0, relu'(-0) = 0 and relu'(NaN) = 1, as torch has it."""
    x = (
        torch.tensor([0.0, -0.0, float("nan"), 1.0, -1.0, float("inf"), float("-inf"), 1e-40])
        .view(1, 1, 1, 8)
        .requires_grad_()
    )
    residual = torch.zeros(1, 1, 1, 8, requires_grad=True)
    out = F.batch_norm_act(x, torch.zeros(1), torch.ones(1), residual=residual, eps=0.0)
    dx, dresidual = torch.autograd.grad(out, (x, residual), torch.ones_like(out))
    expected = torch.tensor([0, 0, 1, 1, 0, 1, 0, 1.0]).view(1, 1, 1, 8)
    assert torch.equal(dresidual, expected)
    assert torch.equal(dx, expected)
    plain = F.batch_norm_act(x, torch.zeros(1), torch.ones(1), eps=0.0)
    (dx,) = torch.autograd.grad(plain, x, torch.ones_like(out))
    assert torch.equal(dx, expected)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_zero_weight(dtype, residual, layout, backend) -> None:
    """The initial state of a zero-initialised residual branch: relu(0 x + residual), and a gradient for the weight."""
    param = torch.float64 if dtype is torch.float64 else torch.float32
    results = []
    for name in ("ours", "eager"):
        g = torch.Generator().manual_seed(0)
        x, r, dy = (verification.lay_out(torch.randn(3, 5, 6, 7, generator=g).to(dtype), layout) for _ in range(3))
        x.requires_grad_()
        r.requires_grad_()
        weight, bias = torch.zeros(5, dtype=param, requires_grad=True), torch.zeros(5, dtype=param, requires_grad=True)
        stats = [torch.zeros(5, dtype=param), torch.ones(5, dtype=param)]
        leaves = [x, weight, bias] + [r] * residual
        if name == "ours":
            out = F.batch_norm_act(x, *stats, weight, bias, r if residual else None, training=True)
        else:
            out = nn.functional.batch_norm(x, *stats, weight, bias, True)
            out = torch.relu(out + r if residual else out)
        results.append([out, *torch.autograd.grad(out, leaves, dy)])
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-5}
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)
    assert torch.equal(results[0][0], results[1][0])


# --- running statistics, to the letter ---

CONSTRUCTORS = [
    {},
    {"momentum": None},
    {"momentum": 0.0},
    {"momentum": 1.0},
    {"momentum": 2.0},
    {"momentum": -1.0},
    {"momentum": float("nan")},
    {"momentum": 0},
    {"momentum": 1},
    {"eps": 0.3},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"affine": False, "momentum": None},
]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("arguments", CONSTRUCTORS, ids=str)
def test_statistics_follow_batch_norm_2d(arguments, layout, backend, twins) -> None:
    mine, theirs = twins(5, **arguments)
    g = torch.Generator().manual_seed(0)
    for step, size in enumerate([4, 1, 7, 2, 0, 3]):
        for module in (mine, theirs):
            module.train(step != 3)
        x = verification.lay_out(torch.randn(size, 5, 6, 7, generator=g) * 3 + 2, layout)
        torch.testing.assert_close(mine(x), theirs(x), rtol=1e-5, atol=1e-5, equal_nan=True)
        assert list(mine.state_dict()) == list(theirs.state_dict())
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(mine.state_dict()[name], value, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)


def test_running_variance_is_unbiased(backend: str) -> None:
    x = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    mean, var = torch.zeros(1), torch.zeros(1)
    out = F.batch_norm_act(x, mean, var, training=True, momentum=1.0, act=None)
    assert mean.item() == 2.0
    assert var.item() == 2.0  # 1 / (n - 1), while the output divides by n
    torch.testing.assert_close(out.flatten(), torch.tensor([-1.0, 1.0]), rtol=1e-4, atol=0)


def test_counter(backend: str) -> None:
    x = torch.randn(4, 3, 5, 5)
    mean, var, count = torch.zeros(3), torch.ones(3), torch.tensor(0)
    for step in range(1, 4):
        F.batch_norm_act(x + step, mean, var, training=True, momentum=None, num_batches_tracked=count)
        assert count.item() == step
    torch.testing.assert_close(mean, x.mean((0, 2, 3)) + 2)
    torch.testing.assert_close(var, x.var((0, 2, 3)))
    before = count.clone()
    F.batch_norm_act(x, mean, var, training=False, momentum=None, num_batches_tracked=count)
    assert torch.equal(count, before)


def test_counter_beyond_float_precision(backend: str) -> None:
    """1 / num_batches_tracked after 2**24 batches, and the counter itself beyond int32."""
    for start in (2**24 + 1, 2**31 - 1, 2**40):
        x, count = torch.randn(4, 1, 5, 5), torch.tensor(start)
        mean, var = torch.zeros(1), torch.ones(1)
        F.batch_norm_act(x * 1e8, mean, var, training=True, momentum=None, num_batches_tracked=count)
        assert count.item() == start + 1
        torch.testing.assert_close(mean.item(), (x * 1e8).mean().item() / (start + 1), rtol=1e-4, atol=1e-12)


def test_strided_statistics_and_parameters(backend: str) -> None:
    """Views with a stride, an offset, or stride zero, written through."""
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    results = []
    for contiguous in (True, False):
        store = torch.arange(40.0).view(8, 5) / 7 + 1
        mean, var, weight, bias = (store[::2, i].contiguous() if contiguous else store[::2, i] for i in (1, 2, 3, 4))
        weight = weight.detach().requires_grad_() if contiguous else weight
        out = F.batch_norm_act(x, mean, var, weight.detach(), bias.detach(), training=True)
        results.append((out, mean.clone(), var.clone()))
        if not contiguous:
            untouched = torch.arange(40.0).view(8, 5) / 7 + 1
            untouched[::2, 1:3] = store[::2, 1:3]
            assert torch.equal(store, untouched)
            assert torch.equal(store[::2, 1], mean)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    weight = torch.ones(1).expand(4)
    a = F.batch_norm_act(x, torch.zeros(4), torch.ones(4), weight, training=True)
    assert torch.equal(a, F.batch_norm_act(x, torch.zeros(4), torch.ones(4), torch.ones(4), training=True))


# --- memory ---


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", verification.LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 6, 8, 10), (4, 1, 8, 10), (4, 6, 1, 1), (1, 6, 8, 10)], ids=str)
def test_memory_format(shape, layout, dtype, training, backend, norm_arguments) -> None:
    x = verification.lay_out(torch.randn(shape).to(dtype), layout).requires_grad_()
    residual = verification.lay_out(torch.randn(shape).to(dtype), layout).requires_grad_()
    arguments = norm_arguments(shape[1])
    out = F.batch_norm_act(x, *arguments, residual, training=training)
    dx, dresidual = torch.autograd.grad(out, (x, residual), torch.ones_like(out))
    for tensor in (out, dx):  # whatever x is: dense, in a format that the next layer can use
        assert any(tensor.is_contiguous(memory_format=f) for f in FORMATS.values())
    for memory_format in FORMATS.values():
        if x.is_contiguous(memory_format=memory_format):
            assert out.is_contiguous(memory_format=memory_format)
            assert dx.is_contiguous(memory_format=memory_format)
            assert dresidual.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("layout", FORMATS)
def test_gradient_of_other_layouts(layout, backend, norm_arguments) -> None:
    """dy comes expanded (from a sum), in the other memory format, or strided; the numbers are those of a dense dy."""
    x = verification.lay_out(torch.randn(3, 5, 6, 7), layout).requires_grad_()
    residual = verification.lay_out(torch.randn(3, 5, 6, 7), layout).requires_grad_()
    arguments = norm_arguments(5)
    leaves = [x, residual, *arguments[2:]]
    out = F.batch_norm_act(x, *arguments, residual, training=True)
    for other in ("contiguous", "channels_last", "strided", "transposed", "expanded", "offset"):
        dy = verification.lay_out(torch.randn(3, 5, 6, 7), other)
        got = torch.autograd.grad(out, leaves, dy, retain_graph=True)
        want = torch.autograd.grad(out, leaves, torch.empty_like(out).copy_(dy), retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    want = torch.autograd.grad(out, leaves, torch.ones_like(out))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_negative_bit_and_conjugate_views(backend, norm_arguments) -> None:
    z = torch.randn(3, 5, 6, 7, dtype=torch.complex64)
    x = z.conj().imag
    assert x.is_neg()
    out = F.batch_norm_act(x, *norm_arguments(5), x, training=True)
    dense = x.resolve_neg().contiguous()
    torch.testing.assert_close(out, F.batch_norm_act(dense, *norm_arguments(5), dense, training=True))


@pytest.mark.parametrize("name", ["x", "weight"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_change_in_place_before_backward_raises(name, training, backend, norm_arguments) -> None:
    x = torch.randn(3, 5, 6, 7, requires_grad=True)
    arguments = norm_arguments(5)
    base = x * 1
    out = F.batch_norm_act(base, *arguments, training=training)
    with torch.no_grad():
        (base if name == "x" else arguments[2]).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_change_of_residual_is_allowed(backend, norm_arguments) -> None:
    """The residual is not kept: overwriting it must not change the gradients."""
    x, residual = torch.randn(3, 5, 6, 7, requires_grad=True), torch.randn(3, 5, 6, 7, requires_grad=True)
    gradients = []
    for overwrite in (False, True):
        r = residual * 1
        out = F.batch_norm_act(x, *norm_arguments(5), r, training=True)
        if overwrite:
            with torch.no_grad():
                r.zero_()
        gradients.append(torch.autograd.grad(out.square().sum(), (x, residual)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_change_of_output_before_backward_is_seen(backend, norm_arguments) -> None:
    """The output is not kept: overwriting it must not change the gradients."""
    x = torch.randn(3, 5, 6, 7, requires_grad=True)
    want = torch.autograd.grad(F.batch_norm_act(x, *norm_arguments(5), training=True).sum(), x)[0]
    out = F.batch_norm_act(x, *norm_arguments(5), training=True)
    total = out.sum()
    with torch.no_grad():
        out.zero_()
    assert torch.equal(torch.autograd.grad(total, x)[0], want)


def test_output_can_be_changed_in_place_with_autograd(backend, norm_arguments) -> None:
    x = torch.randn(3, 5, 6, 7, requires_grad=True)
    out = F.batch_norm_act(x, *norm_arguments(5), training=True)
    out.mul_(2)
    got = torch.autograd.grad(out.sum(), x)[0]
    want = torch.autograd.grad((F.batch_norm_act(x, *norm_arguments(5), training=True) * 2).sum(), x)[0]
    assert torch.equal(got, want)


def test_statistics_changed_between_forward_and_backward(backend, norm_arguments) -> None:
    """Two training steps before one backward (a module used twice): each backward uses its own batch."""
    x = torch.randn(3, 5, 6, 7, requires_grad=True)
    arguments = norm_arguments(5)
    first = F.batch_norm_act(x, *arguments, training=True)
    F.batch_norm_act(x.detach() * 3 + 1, *arguments, training=True)
    got = torch.autograd.grad(first.sum(), [x, *arguments[2:]])
    want = torch.autograd.grad(F.batch_norm_act(x, *norm_arguments(5), training=True).sum(), x)
    assert torch.equal(got[0], want[0])


def test_statistics_changed_after_eval_forward(backend, norm_arguments) -> None:
    """In eval mode the gradient depends on them: either an error or the old values, never the new ones."""
    x = torch.randn(3, 5, 6, 7, requires_grad=True)
    arguments = norm_arguments(5)
    want = torch.autograd.grad(F.batch_norm_act(x, *arguments).sum(), x)[0]
    out = F.batch_norm_act(x, *arguments)
    arguments[1].mul_(100)
    try:
        got = torch.autograd.grad(out.sum(), x)[0]
    except RuntimeError as error:
        assert "inplace" in str(error)  # noqa: PT017
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
def test_saved_for_backward(residual, training, dtype, layout, backend, saved_bytes, norm_arguments) -> None:
    """x, the statistics and, with a residual, one bit per element."""
    param = torch.float64 if dtype is torch.float64 else torch.float32
    x = verification.lay_out(torch.randn(4, 16, 32, 32).to(dtype), layout).requires_grad_()
    r = verification.lay_out(torch.randn(4, 16, 32, 32).to(dtype), layout).requires_grad_() if residual else None
    arguments = norm_arguments(16, param)
    _, size = saved_bytes(lambda: F.batch_norm_act(x, *arguments, r, training=training))
    per_channel = 6 * 16 * 8
    mask = x.numel() // 8 if residual else 0
    assert size <= x.numel() * dtype.itemsize + mask + per_channel
    out, size = saved_bytes(lambda: F.batch_norm_act(x, *arguments, r, training=training, act=None))
    assert size <= x.numel() * dtype.itemsize + per_channel
    torch.autograd.grad(out.sum(), x)


def test_frozen_parts_need_less(backend, saved_bytes, norm_arguments) -> None:
    """Eval mode with frozen parameters needs no x; only a residual's gradient needs nothing but the mask."""
    x, r = torch.randn(4, 16, 32, 32), torch.randn(4, 16, 32, 32)
    frozen = norm_arguments(16, grad=False)
    _, size = saved_bytes(lambda: F.batch_norm_act(x, *frozen, r.requires_grad_(), training=False))
    assert size <= x.numel() // 8 + 1024 or size <= x.numel() * 4 + x.numel() // 8 + 1024
    out, size = saved_bytes(lambda: F.batch_norm_act(x, *frozen, training=True))
    assert size == 0
    assert not out.requires_grad


SUBSETS = [s for k in (1, 2, 3, 4) for s in itertools.combinations(("x", "residual", "weight", "bias"), k)]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
def test_frozen_parameters(wanted, training, backend, record_ops) -> None:
    """Any subset of gradients equals that part of all of them, and what is not needed is not computed."""
    shape = (3, 5, 6, 7)

    def gradients(names: tuple[str, ...]):
        g = torch.Generator().manual_seed(0)
        t = {"x": torch.randn(shape, generator=g), "residual": torch.randn(shape, generator=g)}
        t |= {"weight": torch.rand(5, generator=g) + 0.5, "bias": torch.randn(5, generator=g)}
        for name in names:
            t[name].requires_grad_()
        out = F.batch_norm_act(
            t["x"], torch.zeros(5), torch.ones(5), t["weight"], t["bias"], t["residual"], training=training
        )
        assert out.requires_grad
        dy = torch.randn(shape, generator=g)
        with record_ops() as record:
            out.backward(dy)
        assert all((t[name].grad is not None) == (name in names) for name in t)
        made = 0
        for op, _, _, result in record.calls:
            if op.namespace == "fusedres":
                results = result if isinstance(result, (tuple, list)) else (result,)
                made += sum(r.numel() >= t["x"].numel() for r in results if isinstance(r, torch.Tensor))
        return {name: t[name].grad for name in names}, made

    some, made = gradients(wanted)
    everything, _ = gradients(("x", "residual", "weight", "bias"))
    for name in wanted:
        assert torch.equal(some[name], everything[name]), name
    assert made <= ("x" in wanted) + ("residual" in wanted)


def test_no_grad_and_inference_mode(backend, norm_arguments, record_ops) -> None:
    x, r = torch.randn(3, 5, 6, 7, requires_grad=True), torch.randn(3, 5, 6, 7)
    want = F.batch_norm_act(x, *norm_arguments(5), r, training=True)
    for context in (torch.no_grad(), torch.inference_mode()):
        arguments = norm_arguments(5)
        with context:
            out = F.batch_norm_act(x, *arguments, r, training=True)
        assert not out.requires_grad
        assert torch.equal(out, want.detach())
        assert not torch.equal(arguments[0], torch.zeros(5))


def test_inference_tensor_in_grad_mode_raises(backend, norm_arguments) -> None:
    with torch.inference_mode():
        x = torch.randn(3, 5, 6, 7)
    weight = norm_arguments(5)[2:]
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensor"):
        nn.functional.batch_norm(x, None, None, *weight, True)
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensor"):
        F.batch_norm_act(x, None, None, *weight, training=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(0, 5, 6, 7), (3, 5, 0, 7), (3, 5, 6, 0), (0, 5, 0, 0)], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_empty(shape, training, layout, backend) -> None:
    results = []
    for name in ("ours", "eager"):
        x = verification.lay_out(torch.randn(shape), layout).requires_grad_()
        r = torch.randn(shape, requires_grad=True)
        weight, bias = torch.ones(5, requires_grad=True), torch.zeros(5, requires_grad=True)
        stats = [torch.full((5,), 0.25), torch.full((5,), 2.0)]
        if name == "ours":
            out = F.batch_norm_act(x, *stats, weight, bias, r, training=training)
        else:
            out = torch.relu(nn.functional.batch_norm(x, *stats, weight, bias, training) + r)
        results.append([out, *stats, *torch.autograd.grad(out.sum(), (x, r, weight, bias))])
    for mine, theirs in zip(*results, strict=True):
        assert mine.shape == theirs.shape
        assert torch.equal(mine, theirs)


# --- residuals that broadcast or promote ---

RESIDUALS = [
    ((1, 5, 1, 1), torch.float32),
    ((5, 1, 1), torch.float32),
    ((3, 1, 6, 7), torch.float32),
    ((7,), torch.float32),
    ((), torch.float32),
    ((3, 5, 6, 7), torch.float64),
    ((3, 5, 6, 7), torch.bfloat16),
    ((3, 5, 6, 7), torch.int64),
    ((2, 3, 5, 6, 7), torch.float32),
]


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "dtype"), RESIDUALS, ids=str)
def test_residual_broadcasts_and_promotes_as_in_eager(shape, dtype, x_dtype, backend, norm_arguments) -> None:
    """As eager does it, or refused with an error before anything is written."""
    x = torch.randn(3, 5, 6, 7).to(x_dtype).requires_grad_()
    residual = torch.randint(-3, 3, shape).to(dtype)
    if dtype.is_floating_point:
        residual.requires_grad_()
    theirs_arguments, arguments = norm_arguments(5), norm_arguments(5)
    theirs = torch.relu(nn.functional.batch_norm(x, *theirs_arguments, True) + residual)
    try:
        mine = F.batch_norm_act(x, *arguments, residual, training=True)
    except (RuntimeError, TypeError, ValueError) as error:
        assert "residual" in str(error)  # noqa: PT017
        assert torch.equal(arguments[0], norm_arguments(5)[0])
        return
    assert mine.dtype == theirs.dtype
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if torch.bfloat16 in (x_dtype, dtype) else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(mine, theirs, **tolerance)
    leaves = [x] + [residual] * residual.requires_grad
    dy = torch.randn(theirs.shape).to(theirs.dtype)
    for a, b in zip(torch.autograd.grad(mine, leaves, dy), torch.autograd.grad(theirs, leaves, dy), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    for a, b in zip(arguments[:2], theirs_arguments[:2], strict=True):
        torch.testing.assert_close(a, b)


def test_residual_is_x(backend, norm_arguments) -> None:
    """One tensor in both places: both gradients arrive."""
    x = torch.randn(3, 5, 6, 7, requires_grad=True)
    got = torch.autograd.grad(F.batch_norm_act(x, *norm_arguments(5), x, training=True).square().sum(), x)[0]
    want = torch.relu(nn.functional.batch_norm(x, *norm_arguments(5), True) + x).square().sum()
    torch.testing.assert_close(got, torch.autograd.grad(want, x)[0], rtol=1e-4, atol=1e-4)


def test_gradient_buffers_are_not_shared(backend, norm_arguments) -> None:
    """dresidual of act=None may be dy itself: accumulating into one gradient must not change another."""
    x, r = torch.randn(3, 5, 6, 7, requires_grad=True), torch.randn(3, 5, 6, 7, requires_grad=True)
    out = F.batch_norm_act(x, *norm_arguments(5), r, training=True, act=None)
    dy = torch.randn_like(out)
    kept = dy.clone()
    out.backward(dy, retain_graph=True)
    out.backward(dy)
    assert torch.equal(dy, kept)
    torch.testing.assert_close(r.grad, 2 * kept)


# --- reproducible ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(8, 64, 56, 56), (16, 512, 7, 7), (4, 3, 33, 35), (2, 2048, 7, 7)], ids=str)
def test_bits_depend_neither_on_run_nor_on_threads(shape, layout, dtype, backend) -> None:
    g = torch.Generator().manual_seed(0)
    x, r, dy = (verification.lay_out(torch.randn(shape, generator=g).to(dtype), layout) for _ in range(3))
    x.requires_grad_()
    r.requires_grad_()
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2, 3, 1):
            torch.set_num_threads(count)
            weight, bias = torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1], requires_grad=True)
            stats = [torch.zeros(shape[1]), torch.ones(shape[1])]
            out = F.batch_norm_act(x, *stats, weight, bias, r, training=True)
            results.append([out, *stats, *torch.autograd.grad(out, (x, r, weight, bias), dy)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, a, b in zip(("out", "mean", "var", "dx", "dr", "dw", "db"), results[0], other, strict=True):
            assert torch.equal(a, b), name


def _available_memory() -> int:
    """Bytes, those of caches that the system would give up included."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(kernel) -> None:
    """64-bit indexing: the values at the far end are right. x and out take 8 GiB, a reference in float32 24 more."""
    needed = 9 if kernel == "cpu" else 34
    if _available_memory() < needed * 2**30:
        pytest.skip(f"needs {needed} GiB of available memory")
    x = torch.zeros(1, 1, 2**16, 2**15 + 1, dtype=torch.bfloat16)
    x[..., -1, -3:] = torch.tensor([1.0, -2.0, 3.0], dtype=torch.bfloat16)
    with torch.no_grad():
        out = F.batch_norm_act(x, torch.zeros(1), torch.ones(1), eps=0.0)
    assert out[..., -1, -3:].flatten().tolist() == [1.0, 0.0, 3.0]
    assert out[..., 0, :9].abs().max() == 0


def test_module_is_the_function(backend, twins) -> None:
    mine, _ = twins(5)
    mine.act = "relu"
    x, r = torch.randn(3, 5, 6, 7), torch.randn(3, 5, 6, 7)
    copy = {k: v.clone() for k, v in mine.state_dict().items()}
    out = mine(x, r)
    want = F.batch_norm_act(x, copy["running_mean"], copy["running_var"], mine.weight, mine.bias, r, training=True)
    assert torch.equal(out, want)
    assert torch.equal(mine.running_var, copy["running_var"])
    assert mine.num_batches_tracked == 1
    assert isinstance(mine, fusedres.BatchNormAct2d)
