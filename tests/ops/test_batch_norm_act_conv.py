"""batch_norm_act_conv: batch norm, activation, convolution; backward computes the activation again."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres import functional as F
from fusedres import verification

from .conftest import FORCED

NAN = float("nan")
LEAVES = ("x", "weight", "bias", "conv_weight", "conv_bias")
CONVOLUTIONS = [
    {"padding": 1},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 2)},
    {"dilation": 2, "padding": 2},
    {"groups": 2, "padding": 1},
    {"kernel": (1, 1)},
    {"kernel": (1, 3), "stride": 3},
]


def arguments(
    shape: tuple[int, ...] = (3, 4, 9, 8),
    channels: int = 6,
    *,
    kernel: tuple[int, int] = (3, 3),
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    norm_dtype: torch.dtype | None = None,
    layout: torch.memory_format = torch.channels_last,
    conv_bias: bool = False,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Of one call, as keywords; leaves that take gradients require them."""
    g = torch.Generator().manual_seed(seed)
    c, wide = shape[1], norm_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    x = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    if x.dim() == 4:
        x = x.contiguous(memory_format=layout)
    sign = torch.where(torch.rand(c, generator=g) < 0.3, -1.0, 1.0)
    tensors = {
        "x": x,
        "weight": (sign * (0.5 + torch.rand(c, generator=g))).to(wide),
        "bias": torch.randn(c, generator=g).to(wide),
        "conv_weight": (torch.randn(channels, c // groups, *kernel, generator=g) / 3).to(dtype),
        "conv_bias": torch.randn(channels, generator=g).to(dtype) if conv_bias else None,
    }
    running = {"running_mean": torch.randn(c, generator=g).to(wide), "running_var": torch.rand(c, generator=g).to(wide)}
    tensors = {name: t if t is None else t.requires_grad_() for name, t in tensors.items()}
    counter = {"num_batches_tracked": torch.tensor(3)}
    return tensors | running | counter | {"training": True, "groups": groups} | options


def clone(a: dict[str, Any]) -> dict[str, Any]:
    """Leaves and buffers of its own."""
    return {
        name: v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else copy.deepcopy(v)
        for name, v in a.items()
    }


def ours(a: dict[str, Any]) -> Tensor:
    return F.batch_norm_act_conv(**a)


def eager(a: dict[str, Any]) -> Tensor:
    """nn.BatchNorm2d's statistics, ReLU, conv2d."""
    momentum, counter = a.get("momentum", 0.1), a.get("num_batches_tracked")
    if counter is not None and a["training"]:
        counter.add_(1)
        momentum = 1.0 / float(counter) if momentum is None else momentum
    stats = (a[name] for name in ("running_mean", "running_var", "weight", "bias"))
    y = nn.functional.batch_norm(a["x"], *stats, a["training"], momentum, a.get("eps", 1e-5))
    y = torch.relu(y) if a.get("act", "relu") else y
    convolution = (a.get("stride", 1), a.get("padding", 0), a.get("dilation", 1), a.get("groups", 1))
    return nn.functional.conv2d(y, a["conv_weight"], a["conv_bias"], *convolution)


def step(function, a: dict[str, Any], wanted: tuple[str, ...] = LEAVES) -> dict[str, Tensor]:
    """Output, statistics, gradients of one training step on copies."""
    a = clone(a)
    out = function(a)
    names = [name for name in wanted if a[name] is not None]
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    gradients = torch.autograd.grad(out, [a[name] for name in names], dy)
    buffers = {name: a[name] for name in ("running_mean", "running_var", "num_batches_tracked") if a[name] is not None}
    return {"out": out.detach(), **buffers, **{f"d{n}": g for n, g in zip(names, gradients, strict=True)}}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        scale = value.nan_to_num(0, 0, 0).abs().max().item() if value.is_floating_point() and value.numel() else 0
        assert got[name].dtype == value.dtype, name
        torch.testing.assert_close(
            got[name],
            value,
            rtol=0,
            atol=tolerance * max(scale, 1.0),
            equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def is_fused(out: Tensor) -> bool:
    return type(out.grad_fn).__name__ == "BatchNormActConvFunctionBackward"


layouts = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)


# --- eager's numbers --------------------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("conv_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_equals_eager_in_float64(convolution, conv_bias, layout, any_backend) -> None:
    a = arguments(dtype=torch.float64, layout=layout, conv_bias=conv_bias, **convolution)
    out = ours(clone(a))
    assert is_fused(out)
    assert out.is_contiguous(memory_format=layout)
    assert_close(step(ours, a), step(eager, a))


def _masked_float64(a: dict[str, Any], of: Tensor) -> dict[str, Tensor]:
    """Float64's step, its ReLU by the mask of another's normalisation."""
    wide = {
        name: v.detach().double().requires_grad_(v.requires_grad)
        if isinstance(v, Tensor) and v.is_floating_point()
        else v
        for name, v in clone(a).items()
    }

    def function(a: dict[str, Any]) -> Tensor:
        a["num_batches_tracked"].add_(1)
        stats = (a[name] for name in ("running_mean", "running_var", "weight", "bias"))
        y = nn.functional.batch_norm(a["x"], *stats, True, 0.1, 1e-5)
        return nn.functional.conv2d(y * ~(of <= 0), a["conv_weight"], a["conv_bias"], 1, a.get("padding", 0))

    return step(function, wide)


@layouts
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "all-bfloat16", "autocast"])
@pytest.mark.parametrize("channels", [3, 16, 65])
def test_rule(channels, dtype, layout, any_backend) -> None:
    """With the masks of batch_norm_act, whose bits the activation has."""
    amp, kind = dtype == "autocast", getattr(torch, dtype.removeprefix("all-").replace("autocast", "float32"))
    rounded = torch.bfloat16 if amp else kind
    norm_dtype = kind if dtype.startswith("all") else torch.float32
    worst: dict[str, list[float]] = {}

    def failures() -> list[str]:
        return [f"{name}: {errors}" for name, errors in worst.items() if not errors[0] <= 2 * errors[1] + 1]

    for seed in range(8):  # the worst of many, for of few values how exact eager is depends on luck
        a = arguments((4, channels, 12, 10), 8, dtype=kind, norm_dtype=norm_dtype, layout=layout, seed=seed, padding=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            mine, theirs = step(ours, a), step(eager, a)
            norm = [clone(a)[n] for n in ("x", "running_mean", "running_var", "weight", "bias")]
            with fusedres.use_backend("cpu" if any_backend == "auto" and "cpu" in FORCED else any_backend):
                masks = [F.batch_norm_act(*norm, training=True).detach()]
            masks.append(torch.relu(nn.functional.batch_norm(*norm, True)).detach())
        for i, (result, mask) in enumerate(zip((mine, theirs), masks, strict=True)):
            for name, want in _masked_float64(a, mask).items():
                value = result[name]
                assert value.dtype == theirs[name].dtype, name
                if not value.is_floating_point():
                    assert torch.equal(value, want)
                    continue
                gradient = name.startswith("d")
                largest = max(want.abs().max().item(), 1.0 if gradient else 0.0)  # of terms, where they cancel
                error = (value.double() - want).abs().max().item()
                found = worst.setdefault(name, [0.0, 0.0])
                found[i] = max(found[i], error / verification.ulp(rounded if gradient else value.dtype, largest))
        if seed == 1 and not failures():
            break
    assert not failures()


@pytest.mark.parametrize("layout", verification.LAYOUTS)
def test_layouts_of_x(layout, any_backend) -> None:
    results = []
    for function in (ours, eager):
        a = arguments(dtype=torch.float64, padding=1)
        a["x"] = verification.lay_out(a["x"].detach(), layout).requires_grad_()
        a["conv_weight"] = verification.lay_out(a["conv_weight"].detach(), layout).requires_grad_()
        out = function(a)
        dy = verification.lay_out(torch.ones_like(out) + out.detach(), layout)
        results.append([out, *torch.autograd.grad(out, [a["x"], a["conv_weight"], a["weight"]], dy)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("act", ["relu", None])
@pytest.mark.parametrize("wanted", [s for k in range(1, 6) for s in itertools.combinations(LEAVES, k)], ids="-".join)
def test_frozen(wanted, act, any_backend) -> None:
    """Each subset of gradients is as among all, and no other is made."""
    a = arguments(conv_bias=True, padding=1, act=act)
    everything = step(ours, a)
    for name in LEAVES:
        a[name].requires_grad_(name in wanted)
    some = step(ours, a, wanted)
    for name, value in some.items():
        torch.testing.assert_close(value, everything[name], rtol=1e-6, atol=1e-5)
    b = clone(a)
    ours(b).sum().backward()
    assert [name for name in LEAVES if b[name].grad is not None] == list(wanted)


def test_only_what_is_asked_for(any_backend) -> None:
    """All require gradients, and some are asked for."""
    a = arguments(conv_bias=True, padding=1)
    everything = step(ours, a)
    for name in LEAVES:
        torch.testing.assert_close(step(ours, a, (name,))[f"d{name}"], everything[f"d{name}"], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"momentum": None},
        {"momentum": 1.0},
        {"momentum": 0.0},
        {"eps": 0.3},
        {"act": None},
        {"weight": None},
        {"bias": None},
        {"weight": None, "bias": None},
        {"running_mean": None, "running_var": None, "num_batches_tracked": None},
        {"num_batches_tracked": None},
    ],
    ids=str,
)
def test_norms_as_in_eager(change, any_backend) -> None:
    a = arguments(dtype=torch.float64, padding=1) | change
    for _ in range(3):
        assert_close(step(ours, a), step(eager, a))
        b = clone(a)
        ours(b)
        a |= {name: b[name] for name in ("running_mean", "running_var", "num_batches_tracked")}


@layouts
def test_statistics_move_as_in_batch_norm_act(layout, any_backend) -> None:
    """Bit for bit, and only in the forward."""
    a = arguments((4, 16, 24, 24), layout=layout, padding=1)
    b = clone(a)
    F.batch_norm_act(*(b[n] for n in ("x", "running_mean", "running_var", "weight", "bias")), training=True)
    out = ours(a)
    moved = a["running_mean"].clone(), a["running_var"].clone()
    out.sum().backward()
    for name, value in zip(("running_mean", "running_var"), moved, strict=True):
        assert torch.equal(a[name], value)
        torch.testing.assert_close(value, b[name], rtol=1e-6, atol=1e-6)
    assert a["num_batches_tracked"] == 4


@pytest.mark.parametrize(
    "shape", [(0, 4, 9, 8), (1, 4, 3, 3), (2, 257, 4, 4), (5, 7, 1, 1), (1, 3, 2, 1), (2, 1, 5, 6)], ids=str
)
def test_shapes(shape, any_backend) -> None:
    kernel = (3, 3) if min(shape[2:]) >= 3 else (1, 1)
    a = arguments(shape, dtype=torch.float64, kernel=kernel)
    assert_close(step(ours, a), step(eager, a))


@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("target", ["x", "conv_weight", "weight", "bias"])
def test_specials_as_in_eager(target, value, any_backend) -> None:
    if target == "weight" and value == value:
        pytest.skip("an infinite scale makes NaN of all its channel, in eager of the zeros in it")
    a = arguments(dtype=torch.float64, padding=1)
    with torch.no_grad():
        a[target][(1, 2, 2, 2) if a[target].dim() == 4 else 2] = value
    got, want = step(ours, a), step(eager, a)
    for name in want:
        if want[name].is_floating_point():  # eager has NaN where ours may have an infinity, in sums of such terms
            got[name], want[name] = (torch.where(r[name].isfinite(), r[name], NAN) for r in (got, want))
    assert_close(got, want)


# --- derivatives ------------------------------------------------------------------------------------------------------


def pure(a: dict[str, Any]):
    names = [name for name in LEAVES if a[name] is not None]

    def function(*values: Tensor) -> Tensor:
        out = ours(
            clone({n: v for n, v in a.items() if n not in LEAVES})
            | dict.fromkeys(LEAVES)
            | dict(zip(names, values, strict=True))
        )
        assert is_fused(out)
        return out

    return function, [a[name] for name in names]


@pytest.mark.parametrize("convolution", [*CONVOLUTIONS[:1], *CONVOLUTIONS[3:5]], ids=str)
@pytest.mark.parametrize("act", ["relu", None])
def test_gradcheck(act, convolution, kernel) -> None:
    a = arguments((2, 2, 4, 3), 2, dtype=torch.float64, conv_bias=True, act=act, **convolution)
    assert gradcheck(*pure(a), eps=1e-6, atol=1e-6, nondet_tol=0.0)
    assert gradgradcheck(*pure(a), eps=1e-6, atol=1e-5, nondet_tol=0.0)


def test_gradcheck_without_affine(kernel) -> None:
    a = arguments((2, 2, 4, 3), 2, dtype=torch.float64, padding=1) | {"weight": None, "bias": None}
    assert gradcheck(*pure(a), eps=1e-6, atol=1e-6)
    assert gradgradcheck(*pure(a), eps=1e-6, atol=1e-5)


def test_double_backward_as_eager(any_backend) -> None:
    results = []
    for function in (ours, eager):
        a = arguments(dtype=torch.float64, padding=1, conv_bias=True)
        out = function(a)
        dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype).requires_grad_()
        leaves = [a[name] for name in LEAVES]
        first = torch.autograd.grad(out, leaves, dy, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [*leaves, dy], allow_unused=True)
        results.append([*first, *second])
    for got, want in zip(*results, strict=True):
        got, want = (torch.zeros(()) if t is None else t for t in (got, want))
        torch.testing.assert_close(
            got, want.expand_as(got), rtol=1e-8, atol=1e-8 * max(1, want.abs().max().item()), check_dtype=False
        )


def test_functorch_compile_and_tracers(any_backend) -> None:
    """The plain path, and the same numbers."""
    torch._dynamo.reset()
    a = arguments(dtype=torch.float64, padding=1) | {
        "running_mean": None,
        "running_var": None,
        "num_batches_tracked": None,
    }
    want = step(eager, a)

    def of(function):
        def loss(x: Tensor, w: Tensor) -> Tensor:
            return (
                function(
                    {n: v.detach() if isinstance(v, Tensor) else v for n, v in a.items()} | {"x": x, "conv_weight": w}
                )
                .square()
                .sum()
            )

        return loss

    x, w = a["x"].detach(), a["conv_weight"].detach()
    for got, expected in zip(
        torch.func.grad(of(ours), (0, 1))(x, w), torch.func.grad(of(eager), (0, 1))(x, w), strict=True
    ):
        torch.testing.assert_close(got, expected)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_close(step(compiled, a), want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_and_saved_tensor_hooks(reentrant, any_backend) -> None:
    a = arguments((4, 8, 12, 12), padding=1)
    want = step(ours, a)
    with torch.autograd.graph.save_on_cpu():
        assert_close(step(ours, a), want, 0.0)

    def repeated(b: dict[str, Any]) -> Tensor:
        b["running_mean"], b["running_var"] = None, None
        b["num_batches_tracked"] = None
        return checkpoint(
            lambda x, w: ours(b | {"x": x, "conv_weight": w}), b["x"], b["conv_weight"], use_reentrant=reentrant
        )

    b = clone(a)
    out = repeated(b)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype))
    for got, name in ((out, "out"), (b["x"].grad, "dx"), (b["conv_weight"].grad, "dconv_weight")):
        torch.testing.assert_close(got, want[name], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ["x", "weight", "conv_weight"])
def test_change_in_place_before_backward_raises(name, any_backend) -> None:
    a = arguments(padding=1)
    a["x"] = a["x"] * 1
    out = ours(a)
    with torch.no_grad():
        a[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# --- what is computed and kept ----------------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_for_backward(dtype, layout, any_backend, saved_bytes) -> None:
    """x, the convolution's weight, numbers per channel."""
    a = arguments((4, 16, 32, 32), dtype=dtype, layout=layout, padding=1)
    out, size = saved_bytes(lambda: ours(a))
    assert is_fused(out)
    least = (a["x"].numel() + a["conv_weight"].numel()) * dtype.itemsize
    assert least <= size <= least + 16 * 8 * 8
    held = [t for t in vars(out.grad_fn).values() if isinstance(t, Tensor)]
    assert sum(t.numel() for t in held) <= 16 * 8


def test_kept_for_backward_under_autocast(any_backend, saved_bytes) -> None:
    """x as it came; the weight is a parameter, or its copy in 16 bits."""
    a = arguments((4, 16, 32, 32), padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        _, size = saved_bytes(lambda: ours(a))
    assert size <= (a["x"].numel() + 2 * a["conv_weight"].numel()) * 4 + 16 * 8 * 8


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("training", [True, False])
def test_without_gradients(context, training, any_backend) -> None:
    a = arguments(dtype=torch.float64, padding=1, training=training)
    b = clone(a)
    with context():
        out, want = ours(a), eager(b)
    assert not out.requires_grad
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("act", ["relu", None])
def test_evaluation(act, any_backend) -> None:
    a = arguments(dtype=torch.float64, padding=1, training=False, conv_bias=True, act=act)
    assert_close(step(ours, a), step(eager, a))


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits(dtype, layout, any_backend) -> None:
    """In every run; and those of batch_norm_act and the library's convolution."""
    a = arguments((4, 32, 28, 28), 32, dtype=dtype, layout=layout, padding=1)
    first, again = step(ours, a), step(ours, a)
    assert all(torch.equal(again[name], first[name]) for name in first)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    moved = step(ours, a)
    torch.set_num_threads(threads)
    for name in ("running_mean", "running_var"):
        assert torch.equal(moved[name], first[name])

    def separately(b: dict[str, Any]) -> Tensor:
        y = F.batch_norm_act(
            *(b[n] for n in ("x", "running_mean", "running_var", "weight", "bias")),
            training=True,
            num_batches_tracked=b["num_batches_tracked"],
        )
        return nn.functional.conv2d(y, b["conv_weight"], None, 1, 1)

    want = step(separately, a)
    for name in ("out", "running_mean", "running_var"):
        assert torch.equal(first[name], want[name]), name


# --- wrong arguments --------------------------------------------------------------------------------------------------


def _x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


BAD: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"x": [1.0]}, TypeError, ("x", "list", "Tensor")),
    ({"x": None}, TypeError, ("x", "None", "Tensor")),
    ({"x": _x(3, 5, 9, 8)}, RuntimeError, ("running_mean", "4", "5")),
    ({"x": _x(3, 4, 9, 8).double()}, RuntimeError, ("float64", "float32")),
    ({"x": _x(3, 4, 9, 8).long()}, NotImplementedError, ("int64",)),
    ({"x": _x(3, 4, 9, 8) + 0j}, NotImplementedError, ("complex64",)),
    ({"x": _x(3, 4, 9, 8).to("meta")}, RuntimeError, ("meta", "cpu")),
    ({"x": _x(1, 4, 1, 1)}, ValueError, ("more than 1 value per channel",)),
    ({"x": _x(3, 4, 2, 2)}, RuntimeError, ()),  # smaller than the kernel
    ({"x": _x(4)}, RuntimeError, ()),
    ({"running_mean": torch.zeros(5)}, RuntimeError, ("running_mean", "5", "4")),
    ({"running_var": None}, ValueError, ("running_mean", "running_var", "None")),
    ({"running_var": torch.ones(4, requires_grad=True)}, RuntimeError, ("running_var", "grad")),
    ({"running_mean": torch.zeros(4).double()}, RuntimeError, ("running_mean", "float64", "float32")),
    ({"weight": torch.ones(3)}, RuntimeError, ("weight", "3", "4")),
    ({"weight": [1.0] * 4}, TypeError, ("weight", "list", "Tensor")),
    ({"bias": torch.ones(7)}, RuntimeError, ("bias", "7", "4")),
    ({"num_batches_tracked": 3}, TypeError, ("num_batches_tracked",)),
    ({"num_batches_tracked": torch.tensor(3.0)}, RuntimeError, ("num_batches_tracked",)),
    ({"momentum": "fast"}, TypeError, ("momentum", "str", "float")),
    ({"momentum": None, "num_batches_tracked": None}, TypeError, ("momentum", "None", "float")),
    ({"eps": 0.0}, ValueError, ("eps", "0.0", "positive")),
    ({"eps": "small"}, TypeError, ("eps", "str", "float")),
    ({"training": 1}, TypeError, ("training", "int", "bool")),
    ({"act": "gelu"}, ValueError, ("act", "gelu", "relu")),
    ({"conv_weight": [1.0]}, TypeError, ("conv_weight", "list", "Tensor")),
    ({"conv_weight": None}, TypeError, ("conv_weight", "None", "Tensor")),
    ({"conv_weight": _x(6, 5, 3, 3)}, RuntimeError, ()),
    ({"conv_weight": _x(6, 4, 3)}, RuntimeError, ()),
    ({"conv_weight": _x(6, 4, 3, 3, 3)}, RuntimeError, ()),
    ({"conv_weight": _x(6, 4, 3, 3).double()}, RuntimeError, ()),
    ({"conv_weight": _x(6, 4, 3, 3).bfloat16()}, RuntimeError, ()),
    ({"conv_weight": _x(6, 4, 30, 30)}, RuntimeError, ()),
    ({"conv_weight": _x(6, 4, 3, 3).long()}, RuntimeError, ()),
    ({"conv_bias": torch.ones(5)}, RuntimeError, ()),
    ({"conv_bias": [1.0]}, TypeError, ("conv_bias", "list", "Tensor")),
    ({"conv_bias": torch.ones(6).double()}, RuntimeError, ()),
    ({"stride": 0}, RuntimeError, ("stride",)),
    ({"stride": -1}, RuntimeError, ("stride",)),
    ({"stride": "a"}, TypeError, ("stride", "'a'", "int")),
    ({"stride": 1.5}, TypeError, ("stride", "1.5", "int")),
    ({"stride": (1, 1, 1)}, RuntimeError, ("stride", "1, 1, 1")),
    ({"padding": -1}, RuntimeError, ("padding",)),
    ({"dilation": 0}, RuntimeError, ("dilation",)),
    ({"dilation": 99}, RuntimeError, ()),
    ({"groups": 0}, RuntimeError, ("groups",)),
    ({"groups": -1}, RuntimeError, ("groups",)),
    ({"groups": 2}, RuntimeError, ("groups",)),
    ({"groups": "a"}, TypeError, ("groups",)),
]


@pytest.mark.parametrize(("change", "error", "says"), BAD, ids=lambda v: ",".join(v) if isinstance(v, dict) else "")
def test_wrong_arguments(change, error, says, any_backend) -> None:
    """Eager's class, words, and nothing has moved."""
    a = arguments() | change
    for name, value in change.items():
        if isinstance(value, Tensor) and name in LEAVES and value.is_floating_point():
            a[name] = value.clone().requires_grad_()
    before = clone({name: v for name, v in a.items() if name.startswith(("running", "num"))})
    try:
        eager(clone(a))
    except Exception as theirs:
        if not change.keys() & {"act", "num_batches_tracked"} and not isinstance(a["x"], (list, type(None))):
            assert type(theirs) is error, theirs  # noqa: PT017
    with pytest.raises(error) as info:
        ours(a)
    assert type(info.value) is error
    assert all(fragment in str(info.value) for fragment in says), str(info.value)
    for name, value in before.items():
        if isinstance(value, Tensor):
            assert torch.equal(a[name], value), name


def test_frozen_statistics_cannot_be_half_written(any_backend) -> None:
    """An inference tensor: both statistics move, or neither."""
    if any_backend == "reference":
        pytest.skip("its batch norm writes one after the other")
    for name in ("running_mean", "running_var"):
        a = arguments(padding=1)
        a[name] = torch.inference_mode()(lambda: torch.ones(4))()
        before = clone({n: v for n, v in a.items() if n.startswith("running")})
        try:
            ours(a)
        except RuntimeError:
            assert all(torch.equal(a[n], v) for n, v in before.items())
        else:
            assert not any(torch.equal(a[n], v) for n, v in before.items())


def test_group_needs_training_with_gradients(any_backend) -> None:
    a = arguments(padding=1, process_group=object())
    before = clone({n: v for n, v in a.items() if n.startswith(("running", "num"))})
    with torch.no_grad(), pytest.raises(RuntimeError, match="process_group is for training with gradients"):
        ours(a)
    with pytest.raises(RuntimeError, match="process_group is for training with gradients"):
        ours(a | {"training": False})
    assert all(torch.equal(a[n], v) for n, v in before.items())
