"""csrc/cuda/batch_norm_act_max_pool.cu run on the CPU: the stem, against eager and the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fusedres import functional as F
from fusedres import verification
from fusedres.verification import Case

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
STEM = (3, 2, 1, 1, False)
# kernel, stride, padding, dilation, ceil_mode
WINDOWS = [
    STEM,
    (3, 1, 1, 1, False),
    (2, 2, 0, 1, False),
    (1, 1, 0, 1, False),
    (1, 2, 0, 1, True),
    (2, 1, 1, 1, False),
    (3, 2, 1, 2, False),
    (3, 2, 0, 1, True),
    (2, 3, 1, 1, True),
    (5, 2, 2, 1, False),
    ((3, 2), (2, 1), (1, 0), 1, False),
    ((2, 3), (3, 2), (0, 1), (3, 1), True),
    ((1, 9), 1, (0, 4), 1, False),
]
# Streaming multiprocessors, for launch plans of one chunk, of a few and of many.
DEVICES = [1, 4, 132]


@pytest.fixture
def ops(host_cuda_backend):
    return host_cuda_backend("batch_norm_act_max_pool")


def pairs(window) -> tuple:
    """The window as the ops take it."""
    return *((v, v) if isinstance(v, int) else v for v in window[:4]), window[4]


def make(shape, dtype, layout="channels_last", seed=0, offset=0) -> Tensor:
    """Random values in a layout, that start ``offset`` elements after an aligned address."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    x = x.contiguous(memory_format=FORMATS[layout])
    storage = torch.empty(x.numel() + offset, dtype=dtype)
    return storage[offset:].as_strided(x.shape, x.stride()).copy_(x) if offset else x


def both(x, window, training=True, act="relu", weight=None, bias=None, dy=None) -> tuple[list, list]:
    """Ours and eager's output, statistics and gradients."""
    results = []
    param = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name in ("ours", "eager"):
        leaf = x.detach().requires_grad_()
        w = torch.ones(x.size(1)) if weight is None else weight.clone()
        b = torch.zeros(x.size(1)) if bias is None else bias.clone()
        w, b = (t.to(param).requires_grad_() for t in (w, b))
        stats = [torch.zeros(x.size(1), dtype=param), torch.ones(x.size(1), dtype=param)]
        if name == "ours":
            kernel, stride, padding, dilation, ceil_mode = window
            sizes = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation, "act": act}
            out = F.batch_norm_act_max_pool(leaf, *stats, w, b, training=training, ceil_mode=ceil_mode, **sizes)
        else:
            y = nn.functional.batch_norm(leaf, *stats, w, b, training)
            out = nn.functional.max_pool2d(y.relu() if act else y, *window)
        grad = make(out.shape, x.dtype, seed=5) if dy is None else dy
        results.append([out, *stats, *torch.autograd.grad(out, (leaf, w, b), grad)])
    return tuple(results)


@pytest.mark.parametrize("case", verification.cases("batch_norm_act_max_pool"), ids=lambda c: c.name)
def test_rule(case: Case, ops) -> None:
    assert not verification.failures(case, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("channels", [1, 3, 8, 12, 17, 64, 65, 257, 264])
def test_channels(channels, layout, dtype, ops) -> None:
    name = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    shapes = ((2, channels, 5, 4), (1, channels, 9, 2))
    cases = [Case("batch_norm_act_max_pool", shape=shape, dtype=name, layout=layout) for shape in shapes]
    assert not verification.pooled_failures(cases, "cpu")


@pytest.mark.parametrize("act", ["relu", None])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("layout", "channels"), [("channels_last", 5), ("channels_last", 8), ("contiguous", 3)])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows(window, layout, channels, training, act, ops) -> None:
    x = make((2, channels, 13, 14), torch.float32, layout)
    for mine, theirs in zip(*both(x, window, training, act), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("layout", "channels"), [("channels_last", 5), ("channels_last", 8), ("contiguous", 5)])
@pytest.mark.parametrize("window", WINDOWS[:10], ids=str)
@pytest.mark.parametrize("negative", [False, True], ids=["plus", "minus"])
@pytest.mark.parametrize("act", ["relu", None])
def test_ties_go_where_torch_sends_them(act, negative, window, layout, channels, dtype, ops) -> None:
    """Few distinct values, so that equal inputs give equal activations; negative weights turn the order round."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-1, 2, (2, channels, 9, 8), generator=g).to(dtype).contiguous(memory_format=FORMATS[layout])
    weight = torch.full((channels,), -1.0 if negative else 1.0)
    bias = torch.tensor([0.0, 2.0, -0.5, 5.0, 0.125, 1.0, -2.0, 0.0])[:channels]
    pooled = nn.functional.max_pool2d(x, *window)
    dy = make(pooled.shape, dtype, layout).abs() + 1
    mine, theirs = both(x, window, False, act, weight, bias, dy)
    assert torch.equal(mine[3] == 0, theirs[3] == 0)  # a gradient is zero wherever no window sent one
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=5 * tolerance)


def test_zeros_of_either_sign_tie(ops) -> None:
    """Without a ReLU the first of 0 and -0 wins, as they are equal."""
    for dtype in DTYPES:
        x = torch.tensor([-0.0, 0.0, -1e-12, 1e-12]).to(dtype).view(1, 1, 1, 4)
        for values in (x, x.flip(3)):
            mine, theirs = both(values, ((1, 2), (1, 2), 0, 1, False), False, None)
            assert torch.equal(mine[3], theirs[3])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("window", WINDOWS[:6], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("act", ["relu", None])
def test_specials(act, training, window, layout, dtype, value, ops) -> None:
    """A NaN wins its windows (the last of several), infinities as in eager, and all lands where eager's lands."""
    x = make((2, 8, 9, 10), dtype, layout)
    x[0, 1, 4, 4] = x[0, 1, 4, 5] = x[1, 2, 0, 0] = x[1, 3, 8, 9] = value
    x[1, 4] = value  # whole windows of it
    if value != value:
        x[0, 5, 3:6, 3:6] = -x[0, 1, 4, 4]  # with the sign
    mine, theirs = both(x, window, training, act)
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if i == 4 and not training:
            # Eager sums gradient times x over all pixels, with 0 * Inf where nothing was won; ours over the winners.
            a = torch.where(b.isfinite(), a, b)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, i=i: f"{i}: {m}")


def forward_and_backward(ops, x, window, training=True, relu=True, affine=True, stats=True) -> list[Tensor]:
    """All that the raw ops return, and the running statistics."""
    c = x.size(1)
    param = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = torch.linspace(-1, 2, c, dtype=param) if affine else None
    bias = torch.linspace(1, -1, c, dtype=param) if affine else None
    running = [torch.zeros(c, dtype=param), torch.ones(c, dtype=param), torch.tensor(3)] if stats else [None] * 3
    out, saved = ops.batch_norm_act_max_pool(x, weight, bias, *running, training, None, 1e-5, relu, *pairs(window))
    dy = make(out.shape, x.dtype, "channels_last" if x.stride(1) == 1 else "contiguous", seed=3)
    grads = ops.batch_norm_act_max_pool_backward(dy, x, weight, bias, saved, training, relu, *pairs(window), True, True)
    return [out, saved, *grads, *(t for t in running if t is not None)]


@pytest.mark.parametrize("sms", DEVICES)
@pytest.mark.parametrize(("layout", "channels"), [("channels_last", 264), ("channels_last", 7), ("contiguous", 3)])
@pytest.mark.parametrize("window", [STEM, (2, 1, 1, 1, True)], ids=str)
def test_launch_plans(window, layout, channels, sms, ops, in_every_order, monkeypatch) -> None:
    """The same bits in every order, and the reference's results, whatever the number of blocks."""
    monkeypatch.setenv("HOST_CUDA_SMS", str(sms))
    x = make((3, channels, 37, 11 if channels > 100 else 50), torch.float64, layout)
    mine = in_every_order(lambda: forward_and_backward(ops, x, window))
    namespace = torch.ops.fusedres
    reference = type(
        "Reference",
        (),
        {
            "batch_norm_act_max_pool": namespace.batch_norm_act_max_pool_reference,
            "batch_norm_act_max_pool_backward": namespace.batch_norm_act_max_pool_backward_reference,
        },
    )
    for a, b in zip(mine, forward_and_backward(reference, x, window), strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_same_bits_in_every_order(layout, dtype, ops, in_every_order) -> None:
    x = make((4, 64, 17, 19), dtype, layout)
    in_every_order(lambda: forward_and_backward(ops, x, STEM))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned(offset, dtype, ops) -> None:
    """Slower accesses, the same winners, and the same sums up to rounding."""
    shape = (2, 16, 9, 11)
    aligned, unaligned = (forward_and_backward(ops, make(shape, dtype, offset=o), STEM) for o in (0, offset))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    for a, b in zip(aligned, unaligned, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_only_what_is_wanted(training, needs, ops) -> None:
    x = make((2, 8, 9, 10), torch.float32)
    stats = torch.stack([x.mean((0, 2, 3)), x.var((0, 2, 3)).rsqrt(), torch.zeros(8)])
    dy = make((2, 8, 5, 5), torch.float32, seed=1)
    arguments = (dy, x, None, None, stats, training, True, *pairs(STEM))
    everything = ops.batch_norm_act_max_pool_backward(*arguments, True, True)
    some = ops.batch_norm_act_max_pool_backward(*arguments, *needs)
    for need, mine, full in zip((needs[0], needs[1], needs[1]), some, everything, strict=True):
        assert torch.equal(mine, full) if need else mine.numel() == 0


def test_inf_where_x_is_not_needed(ops) -> None:
    """dx in evaluation is the gradient times the scale, whatever x is where it did not win."""
    x = make((1, 8, 6, 6), torch.float32)
    x[0, 0, 3, 3] = float("-inf")
    stats = torch.tensor([[0.0], [1.0], [0.0]]).expand(3, 8).contiguous()
    dy = make((1, 8, 3, 3), torch.float32, seed=1)
    dx = ops.batch_norm_act_max_pool_backward(dy, x, None, None, stats, False, True, *pairs(STEM), True, False)[0]
    assert dx.isfinite().all()


@pytest.mark.parametrize("layout", FORMATS)
def test_statistics_of_evaluation_are_saved(layout, ops) -> None:
    x = make((2, 11, 5, 6), torch.float32, layout)
    mean, var = torch.randn(11) * 1e4, torch.rand(11)
    arguments = (x, None, None, mean, var, None, False, 0.1, 1e-5, True, *pairs(STEM))
    stats = ops.batch_norm_act_max_pool(*arguments)[1]
    torch.testing.assert_close(stats, torch.ops.fusedres.batch_norm_act_max_pool_reference(*arguments)[1])


BAD = {
    "small x": ({"shape": (2, 4, 1, 1), "window": (3, 1, 0, 1, False)}, "too small"),
    "padding": ({"window": (3, 1, 2, 1, False)}, "at most half"),
    "stride": ({"window": (3, 0, 1, 1, False)}, "must be positive"),
    "dilation": ({"shape": (1, 4, 1, 9), "window": (3, 1, 1, 2, False)}, "padding altogether"),
    "kernel": ({"shape": (1, 4, 20, 20), "window": (16, 1, 0, 1, False)}, "255"),
    "gaps": ({"x": lambda x: x[:, :, ::2]}, "contiguous or channels_last"),
    "dtype": ({"x": lambda x: x.int()}, "dtypes"),
    "dimensions": ({"x": lambda x: x[0]}, "4 dimensions"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_leave_the_statistics(case, ops) -> None:
    change, words = BAD[case]
    x = change.get("x", lambda x: x)(make(change.get("shape", (2, 4, 8, 8)), torch.float32))
    running = [torch.zeros(4), torch.ones(4), torch.tensor(0)]
    window = pairs(change.get("window", STEM))
    with pytest.raises(RuntimeError, match=words):
        ops.batch_norm_act_max_pool(x, None, None, *running, True, 0.1, 1e-5, True, *window)
    assert [t.tolist() for t in running] == [[0.0] * 4, [1.0] * 4, 0]


def test_bad_gradients(ops) -> None:
    x, stats = make((2, 4, 8, 8), torch.float32), torch.zeros(3, 4)
    for dy, saved, words in (
        (torch.zeros(2, 4, 4, 4), stats, "dy must have the shape and strides"),
        (make((2, 4, 5, 4), torch.float32), stats, "dy must have the shape and strides"),
        (make((2, 4, 4, 4), torch.float64), stats, "dy must have the shape and strides"),
        (make((2, 4, 4, 4), torch.float32), torch.zeros(2, 4), "stats must be"),
    ):
        with pytest.raises(RuntimeError, match=words):
            ops.batch_norm_act_max_pool_backward(dy, x, None, None, saved, True, True, *pairs(STEM), True, True)
