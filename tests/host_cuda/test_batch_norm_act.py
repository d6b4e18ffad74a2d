"""The CUDA kernels of csrc/cuda/batch_norm_act.cu, run on the CPU, against the reference ops and by the error rule."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fusedres
from fusedres import verification
from fusedres.ops import registry
from fusedres.ops.layout import pack_mask

NAMES = [
    *("batch_norm_act", "batch_norm_act_backward"),
    *("batch_norm_add_batch_norm_act", "batch_norm_add_batch_norm_act_backward"),
]
DTYPES = {  # of x, of parameters, and the error that is allowed relative to the largest value
    "f32": (torch.float32, torch.float32, 2e-6),
    "bf16": (torch.bfloat16, torch.float32, 2**-8),
    "f16": (torch.float16, torch.float32, 2**-10),
    "f64": (torch.float64, torch.float64, 1e-13),
    "all-bf16": (torch.bfloat16, torch.bfloat16, 2**-7),
    "all-f16": (torch.float16, torch.float16, 2**-9),
}
# One row, odd channels, folded rows with a partial one, planes that are not aligned, one and several tiles and chunks.
SHAPES = [
    *(
        (2, 1, 4, 3),
        (1, 1, 5, 7),
        (2, 3, 5, 7),
        (4, 16, 7, 7),
        (3, 17, 4, 4),
        (2, 24, 3, 9),
        (3, 65, 3, 3),
        (2, 257, 2, 3),
    ),
    *((8, 64, 8, 8), (130, 8, 12, 12)),
]
LAYOUTS = [torch.channels_last, torch.contiguous_format]


@pytest.fixture(scope="module")
def ops(host_cuda_ops):
    return host_cuda_ops("batch_norm_act")


@pytest.fixture
def few_sms(monkeypatch):
    """A device for which few blocks suffice: chunks of many rows, and the form of three launches."""
    monkeypatch.setenv("HOST_CUDA_SMS", "2")


def randn(shape, dtype, layout=torch.contiguous_format, scale=1.0, mean=0.0) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64) * scale + mean
    return x.to(dtype).contiguous(memory_format=layout)


class Norm:
    """The arguments of one normalisation of x, fresh for every call."""

    def __init__(self, x, dtype, training=True, momentum=0.1, affine=True, stats=True, counter=True) -> None:
        c = x.size(1)
        self.weight, self.bias = (randn(c, dtype, mean=0.5), randn(c, dtype)) if affine else (None, None)
        x = x.double()
        self.mean = (x.mean((0, 2, 3)) + 0.1).to(dtype) if stats else None
        self.var = (x.var((0, 2, 3), correction=0) + 0.2).to(dtype) if stats else None
        self.counter = torch.tensor(4) if counter else None
        self.options = (training, momentum, 1e-3)

    def buffers(self) -> list[Tensor | None]:
        return [None if t is None else t.clone() for t in (self.mean, self.var, self.counter)]

    def arguments(self, buffers) -> tuple:
        return (self.weight, self.bias, *buffers, *self.options)


def assert_near(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride()), what
    if got.numel() == 0:
        return
    got, want = got.double(), want.double()
    assert torch.equal(got.isnan(), want.isnan()), what
    error = (got - want).abs().nan_to_num().max().item()
    assert error <= tolerance * max(want.abs().nan_to_num().max().item(), 1e-30), f"{what}: {error}"


def assert_same_bits(got: Tensor | None, want: Tensor | None) -> None:
    if want is None:
        assert got is None
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def assert_statistics(got: Tensor, want: Tensor, tolerance: float) -> None:
    """mean, rstd, and mean with its low part, which is beyond the precision of the others."""
    tolerance = min(tolerance, 1e-6)
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    deviation = 1 / want[1].double()
    assert (((got[0].double() + got[2]) - (want[0].double() + want[2])).abs() <= tolerance * deviation).all()
    assert_near(got[1], want[1], tolerance, "rstd")


def check_single(ops, name, shape, layout, residual, training, relu=True, momentum=0.1, **options) -> None:
    dtype, wide, tolerance = DTYPES[name]
    x = randn(shape, dtype, layout, mean=3.0)
    norm = Norm(x, wide, training, momentum, **options)
    addend = randn(shape, dtype, layout) if residual else None
    save_mask = residual and relu
    mine, theirs = norm.buffers(), norm.buffers()
    out, stats, mask = ops.batch_norm_act(x, addend, *norm.arguments(mine), relu, save_mask)
    wanted, wanted_stats, _ = torch.ops.fusedres.batch_norm_act_reference(
        x, addend, *norm.arguments(theirs), relu, save_mask
    )
    assert_near(out, wanted, tolerance, "out")
    assert_statistics(stats, wanted_stats, tolerance)
    for got, want in zip(mine, theirs, strict=True):
        if got is None or not got.is_floating_point():
            assert_same_bits(got, want)
        else:
            assert_near(got, want, max(tolerance, 1e-6), "running statistics")
    assert torch.equal(mask, pack_mask(~(out <= 0)) if save_mask else mask.new_empty(0))

    dy = randn(shape, dtype, layout)
    saved = mask if save_mask else None
    arguments = (dy, x, norm.weight, norm.bias, stats, saved, training, relu)
    for need_dx, need_dresidual, need_affine in [(True, residual, True), (False, True, False), (True, False, False)]:
        needs = (need_dx, need_dresidual, need_affine)
        results = ops.batch_norm_act_backward(*arguments, *needs)
        wanted = torch.ops.fusedres.batch_norm_act_backward_reference(*arguments, *needs)
        limits = (tolerance, 0, max(tolerance, 1e-5), max(tolerance, 1e-5))
        for what, got, want, limit in zip(
            ("dx", "dresidual", "dweight", "dbias"), results, wanted, limits, strict=True
        ):
            assert_near(got, want, limit, what)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DTYPES)
def test_training(ops, name, layout, residual):
    for shape in SHAPES:
        check_single(ops, name, shape, layout, residual, True)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DTYPES)
def test_training_with_long_chunks(ops, few_sms, name, layout, residual):
    for shape in SHAPES[2:]:
        check_single(ops, name, shape, layout, residual, True, momentum=None)  # in three launches


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DTYPES)
def test_evaluation(ops, name, layout, residual):
    for shape in SHAPES:
        check_single(ops, name, shape, layout, residual, False)


@pytest.mark.parametrize(
    ("relu", "momentum", "options"),
    [
        (False, 0.1, {}),
        (True, None, {}),
        (True, 0.0, {"affine": False}),
        (True, 1.0, {"counter": False}),
        (False, 0.3, {"stats": False}),
        (True, 0.3, {"stats": False, "affine": False, "counter": False}),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_options(ops, layout, relu, momentum, options):
    for name, shape, residual in itertools.product(("f32", "all-f16"), [(4, 16, 7, 7), (3, 17, 4, 4)], (True, False)):
        check_single(ops, name, shape, layout, residual, True, relu, momentum, **options)


@pytest.mark.parametrize("trainings", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DTYPES)
def test_pair(ops, name, layout, trainings):
    dtype, wide, tolerance = DTYPES[name]
    for shape, sms in itertools.product([(2, 3, 5, 7), (4, 16, 7, 7), (2, 257, 2, 3), (130, 8, 6, 6)], ("132", "2")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOST_CUDA_SMS", sms)
            x, x2 = randn(shape, dtype, layout, mean=3.0), randn(shape, dtype, layout, scale=2.0)
            norm, norm2 = (
                Norm(x, wide, trainings[0]),
                Norm(x2, wide, trainings[1], momentum=None if sms == "2" else 0.2),
            )
            mine, theirs = ((norm.buffers(), norm2.buffers()) for _ in range(2))
            out, stats, stats2 = ops.batch_norm_add_batch_norm_act(
                x, *norm.arguments(mine[0]), x2, *norm2.arguments(mine[1]), True
            )
            wanted, wanted_stats, wanted_stats2 = torch.ops.fusedres.batch_norm_add_batch_norm_act_reference(
                x, *norm.arguments(theirs[0]), x2, *norm2.arguments(theirs[1]), True
            )
            assert_near(out, wanted, tolerance, "out")
            assert_statistics(stats, wanted_stats, tolerance)
            assert_statistics(stats2, wanted_stats2, tolerance)
            for got, want in zip([*mine[0], *mine[1]], [*theirs[0], *theirs[1]], strict=True):
                assert_near(got, want, max(tolerance, 1e-6), "running statistics")
            dy = randn(shape, dtype, layout)
            arguments = (dy, x, norm.weight, norm.bias, stats, trainings[0])
            arguments += (x2, norm2.weight, norm2.bias, stats2, trainings[1], True)
            for needs in [
                (True,) * 4,
                (True, False, False, False),
                (False, True, False, True),
                (False, False, True, True),
            ]:
                results = ops.batch_norm_add_batch_norm_act_backward(*arguments, *needs)
                references = torch.ops.fusedres.batch_norm_add_batch_norm_act_backward_reference(*arguments, *needs)
                for i, (got, want) in enumerate(zip(results, references, strict=True)):
                    assert_near(got, want, max(tolerance, 1e-5 * (i % 3 > 0)), f"gradient {i}")


def test_pair_without_relu_reads_what_it_needs(ops):
    """Without a ReLU in evaluation, dx needs neither x; NaN there must not show."""
    for layout in LAYOUTS:
        x = randn((2, 16, 3, 3), torch.float32, layout)
        stats, weight = torch.rand(3, 16), torch.rand(16)
        nan = torch.full_like(x, torch.nan)
        results = ops.batch_norm_add_batch_norm_act_backward(
            x, nan, weight, None, stats, False, nan, None, None, stats, False, False, True, True, False, False
        )
        assert_near(results[0], x * (weight * stats[1]).view(1, -1, 1, 1), 1e-6, "dx")
        assert_near(results[3], x * stats[1].view(1, -1, 1, 1), 1e-6, "dx2")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["f32", "bf16", "f16", "f64"])
def test_backward_cuts_where_forward_did(ops, name, layout):
    """The sign that the backward computes again is that of the stored output, and NaN passes."""
    dtype, wide, _ = DTYPES[name]
    x, x2 = (randn((5, 24, 6, 6), dtype, layout) for _ in range(2))
    x[1, 3, 2, 1] = torch.nan
    norm, norm2 = Norm(x, wide, False), Norm(x2, wide, False)
    norm.mean, norm.var = torch.zeros_like(norm.mean), torch.full_like(norm.var, 1e-3)
    norm.weight[::2] = 1e-5 if dtype == torch.float16 else 1e-38  # results around the smallest numbers
    norm.bias[::2] = 0
    norm2.weight[::2] = norm2.bias[::2] = 0
    dy = torch.ones_like(x)
    out, stats, _ = ops.batch_norm_act(x, None, *norm.arguments(norm.buffers()), True, False)
    (_, _, _, dbias) = ops.batch_norm_act_backward(
        dy, x, norm.weight, norm.bias, stats, None, False, True, True, False, True
    )
    assert torch.equal(dbias.long(), (~(out <= 0)).sum((0, 2, 3)))
    out, stats, stats2 = ops.batch_norm_add_batch_norm_act(
        x, *norm.arguments(norm.buffers()), x2, *norm2.arguments(norm2.buffers()), True
    )
    arguments = (dy, x, norm.weight, norm.bias, stats, False, x2, norm2.weight, norm2.bias, stats2, False, True)
    dbias = ops.batch_norm_add_batch_norm_act_backward(*arguments, True, True, True, True)[2]
    assert torch.equal(dbias.long(), (~(out <= 0)).sum((0, 2, 3)))
    assert 0 < (out == 0).sum() < out.numel()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hard_statistics(ops, few_sms, layout):
    """Large means, tiny variances, constant channels and outliers, over several chunks: to the last bits."""
    n, c, h = 70, 8, 9
    x = torch.randn(n, c, h, h, dtype=torch.float64)
    x[:, 1] += 1e4
    x[:, 2] = x[:, 2] * 1e-5 + 0.3
    x[:, 3] = 0.1
    x[:, 4] *= 1e15
    x[:, 5] = torch.where(x[:, 5] > 0.3, 1e3, -1e3)
    x[0, 6, 0, 0] = 1e6
    x[:, 7] = -3e4
    x = x.float().contiguous(memory_format=layout)
    _, stats, _ = ops.batch_norm_act(x, None, None, None, None, None, None, True, 0.1, 1e-10, True, False)
    exact = x.double()
    mean, var = exact.mean((0, 2, 3)), exact.var((0, 2, 3), correction=0)
    for constant in (3, 7):
        mean[constant], var[constant] = exact[0, constant, 0, 0], 0
    unit = torch.finfo(torch.float32).eps
    error = (stats[0].double() + stats[2] - mean).abs()
    assert (error <= 4 * unit * var.sqrt()).all(), error / var.sqrt()
    rstd = (var + 1e-10).rsqrt()
    assert ((stats[1] - rstd).abs() <= 4 * unit * rstd).all(), (stats[1] - rstd) / rstd


@pytest.mark.parametrize("layout", LAYOUTS)
def test_infinity_stays_in_its_channel(ops, layout):
    for sms in ("132", "2"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOST_CUDA_SMS", sms)
            x = randn((9, 5, 6, 6), torch.float32, layout)
            x[4, 1, 2, 2], x[5, 2, 1, 1], x[3, 3, 0, 0] = torch.inf, torch.nan, -torch.inf
            norm = Norm(x, torch.float32)
            norm.mean, norm.var = torch.zeros(5), torch.ones(5)
            mine, theirs = norm.buffers(), norm.buffers()
            out, stats, _ = ops.batch_norm_act(x, None, *norm.arguments(mine), True, False)
            wanted, wanted_stats, _ = torch.ops.fusedres.batch_norm_act_reference(
                x, None, *norm.arguments(theirs), True, False
            )
            torch.testing.assert_close(stats[:2], wanted_stats[:2], equal_nan=True)
            torch.testing.assert_close(out, wanted, equal_nan=True, rtol=1e-5, atol=1e-5)
            for got, want in zip(mine, theirs, strict=True):
                torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_on_nothing(ops, in_every_order, layout, dtype):
    for shape, sms in itertools.product([(3, 17, 4, 4), (40, 16, 6, 6)], ("132", "2")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOST_CUDA_SMS", sms)
            x, x2, dy = (randn(shape, dtype, layout) for _ in range(3))
            norm = Norm(x, torch.float32)

            def single(x=x, x2=x2, dy=dy, norm=norm):
                buffers = norm.buffers()
                out, stats, mask = ops.batch_norm_act(x, x2, *norm.arguments(buffers), True, True)
                arguments = (dy, x, norm.weight, norm.bias, stats, mask, True, True, True, True, True)
                return [out, stats, mask, *buffers, *ops.batch_norm_act_backward(*arguments)]

            def pair(x=x, x2=x2, dy=dy, norm=norm):
                buffers, buffers2 = norm.buffers(), norm.buffers()
                out, stats, stats2 = ops.batch_norm_add_batch_norm_act(
                    x, *norm.arguments(buffers), x2, *norm.arguments(buffers2), True
                )
                arguments = (dy, x, norm.weight, norm.bias, stats, True, x2, norm.weight, norm.bias, stats2, True)
                gradients = ops.batch_norm_add_batch_norm_act_backward(*arguments, *(True,) * 5)
                return [out, stats, stats2, *buffers, *buffers2, *gradients]

            in_every_order(single)
            in_every_order(pair)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unaligned_and_strided(ops, layout, dtype):
    """Tensors that start off a multiple of 16 bytes, and parameters with gaps, give the same bits as usual ones."""
    shape = (5, 24, 4, 4)

    def moved(t: Tensor) -> Tensor:
        return t.new_empty(t.numel() + 1)[1:].as_strided(t.shape, t.stride(), 1).copy_(t)

    x, residual, dy = (randn(shape, dtype, layout) for _ in range(3))
    norm = Norm(x, torch.promote_types(dtype, torch.float32))
    spread = Norm(x, torch.promote_types(dtype, torch.float32))
    for name in ("weight", "bias", "mean", "var"):
        value = getattr(norm, name)
        setattr(spread, name, torch.stack([value, torch.full_like(value, torch.nan)], 1)[:, 0])
    results = []
    for arrange, one in ((lambda t: t, norm), (moved, norm), (lambda t: t, spread)):
        buffers = [one.mean, one.var, torch.tensor(4)] if one is spread else one.buffers()
        out, stats, mask = ops.batch_norm_act(arrange(x), arrange(residual), *one.arguments(buffers), True, True)
        arguments = (arrange(dy), arrange(x), one.weight, one.bias, stats, mask, True, True, True, True, True)
        results.append([out, stats, mask, *buffers, *ops.batch_norm_act_backward(*arguments)])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("op", ["batch_norm_act", "batch_norm_add_batch_norm_act"])
def test_error_rule(ops, monkeypatch, op):
    """The cases of `fusedres verify`, through the public functions, with the CUDA kernels for CPU ones."""
    for name in NAMES:
        monkeypatch.setattr(registry.OPS[name], "cpu", getattr(ops, name).default)
    failures = {}
    for case in verification.cases(op, quick=True):
        for m in verification.check(case, "cpu"):
            # Eager's sums on a CPU are in double, ours in float32, which shows where the mean is far below the rest.
            if m.quantity.startswith("running_mean") and case.distribution == "large":
                m.tiny = max(m.tiny, verification.ulp(torch.float32, 1e15))
            if not m.ok:
                failures.setdefault(case.name, []).append(str(m))
    assert not failures


def forward(ops, x, **changes):
    arguments = {
        "residual": None,
        "weight": None,
        "bias": None,
        "running_mean": None,
        "running_var": None,
        "num_batches_tracked": None,
        "training": True,
        "momentum": 0.1,
        "eps": 1e-5,
        "relu": True,
        "save_mask": False,
        **changes,
    }
    return ops.batch_norm_act(x, *arguments.values())


def backward(ops, x, **changes):
    arguments = {
        "dy": x,
        "x": x,
        "weight": None,
        "bias": None,
        "stats": torch.ones(3, x.size(1)),
        "mask": None,
        "training": True,
        "relu": True,
        "need_dx": True,
        "need_dresidual": True,
        "need_affine": True,
        **changes,
    }
    return ops.batch_norm_act_backward(*arguments.values())


BAD = {
    "residual's shape": (forward, {"residual": torch.ones(2, 4, 3, 1)}, "residual"),
    "weight's size": (forward, {"weight": torch.ones(5)}, "one element per channel"),
    "weight's dtype": (forward, {"weight": torch.ones(4).double()}, "dtypes"),
    "one running statistic": (forward, {"running_mean": torch.ones(4)}, "go together"),
    "no running statistics": (forward, {"training": False}, "evaluation needs"),
    "eps": (forward, {"eps": 0.0}, "eps"),
    "momentum": (forward, {"momentum": None}, "momentum=None"),
    "counter": (forward, {"num_batches_tracked": torch.tensor(1.0)}, "int64"),
    "mask without residual": (forward, {"save_mask": True}, "save_mask"),
    "dy's shape": (backward, {"dy": torch.ones(2, 4, 3, 1)}, "dy"),
    "stats' shape": (backward, {"stats": torch.ones(2, 4)}, "stats"),
    "stats' dtype": (backward, {"stats": torch.ones(3, 4).double()}, "stats"),
    "mask's size": (backward, {"mask": torch.zeros(3, dtype=torch.uint8)}, "mask"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(ops, case):
    call, changes, words = BAD[case]
    with pytest.raises(RuntimeError, match=words):
        call(ops, torch.randn(2, 4, 3, 3), **changes)


def test_refused_shapes(ops):
    for x in (torch.ones(2, 4, 3), torch.ones(2, 4, 3, 6)[..., ::2], torch.ones(0, 4, 3, 3), torch.ones(1, 4, 1, 1)):
        with pytest.raises(RuntimeError):
            forward(ops, x)


_OUT_OF_MEMORY = """
import resource, sys, torch
import fusedres
from fusedres.ops import registry
for op in {names}:
    schema = getattr(torch.ops.fusedres, op).default._schema
    torch.library.define("fusedres_host::" + op, str(schema).split(op, 1)[1], tags=())
torch.ops.load_library({library!r})
op = registry._with_device_errors(torch.ops.fusedres_host.batch_norm_act.default)
x = torch.ones(64, 64, 128, 128)
mean, var, counter = torch.zeros(64), torch.ones(64), torch.tensor(3)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20, -1))
try:
    op(x, None, None, None, mean, var, counter, True, 0.1, 1e-5, True, False)
except torch.OutOfMemoryError as error:
    print("raised", error)
print(bool((mean == 0).all()), bool((var == 1).all()), counter.item())
"""


def test_out_of_memory(ops):
    """torch's own error, before anything is updated."""
    if os.environ.get("FUSEDRES_SANITIZE") == "1":
        pytest.skip("AddressSanitizer needs all of the address space")
    library = next(path for path in torch.ops.loaded_libraries if Path(path).name == "batch_norm_act.so")
    script = _OUT_OF_MEMORY.format(names=NAMES, library=library)
    environment = {**os.environ, "PYTHONPATH": str(Path(fusedres.__file__).parents[1])}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.splitlines() == [
        "raised CUDA out of memory: cannot allocate a tensor of 67108864 elements",
        "True True 3",
    ], done.stderr
