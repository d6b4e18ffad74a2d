"""The Triton kernels of batch_norm_act and its pair form in Triton's interpreter, against the reference ops.

Not collected by name: test_interpreted.py runs it in a process with TRITON_INTERPRET=1. What is uninitialised is NaN.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fusedres
from fusedres import verification
from fusedres.kernels import batch_norm_act as kernels
from fusedres.kernels import common
from fusedres.ops import batch_norm_act as ops
from fusedres.ops.layout import pack_mask

sys.path.insert(0, str(Path(__file__).parent))
from byte_counter import count_bytes

REFERENCE = torch.ops.fusedres
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = {
    "f32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.float32),
    "f16": (torch.float16, torch.float32),
    "f64": (torch.float64, torch.float64),
    "all-bf16": (torch.bfloat16, torch.bfloat16),
    "all-f16": (torch.float16, torch.float16),
}


@pytest.fixture(autouse=True)
def _poison():
    torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN
    yield
    torch.use_deterministic_algorithms(False)


PLANS = ["small tiles", "small tiles in reverse", "one pass"]


def set_plan(monkeypatch, name: str) -> None:
    """Launch plans: many tiles and chunks of a small tensor, or all of a slab in one program."""
    common._plan.cache_clear()
    monkeypatch.setattr(common, "APPLY_TILE", dict.fromkeys((2, 4, 8), 256))
    monkeypatch.setattr(common, "REDUCE_TILE", dict.fromkeys((2, 4, 8), 512))
    monkeypatch.setattr(common, "INTERPRETED_DEVICE", common.Device(1, 1 << 20 if "reverse" in name else 0))
    monkeypatch.setattr(common, "ONE_PASS_BYTES", 1 << 16 if name == "one pass" else 0)
    monkeypatch.setattr(common, "SLAB_BYTES", 64)


@pytest.fixture(autouse=True)
def _forget_plans():
    yield
    common._plan.cache_clear()


def sample(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    return (torch.randn(shape) * 1.5 + 0.5).to(dtype).contiguous(memory_format=LAYOUTS[layout])


def vectors(channels: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    mean, var = torch.randn(channels).to(dtype), torch.rand(channels).add(0.5).to(dtype)
    return torch.randn(channels).to(dtype), torch.randn(channels).to(dtype), mean, var, torch.tensor(3)


def copies(args: tuple) -> list:
    return [a.clone(memory_format=torch.preserve_format) if isinstance(a, Tensor) else a for a in args]


def assert_near(got: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Within a rounding of the dtype or, of float32 statistics and sums, a few: the rule itself is tested below."""
    for g, w in zip(got, want, strict=True):
        assert (g.shape, g.dtype, g.stride()) == (w.shape, w.dtype, w.stride())
        if not g.numel():
            continue
        rounding = torch.finfo(g.dtype).eps if g.is_floating_point() else 0
        finite = w.double().abs()
        bound = (64 if g.dtype == torch.float64 else 8) * rounding * max(1.0, float(finite[finite.isfinite()].max()))
        torch.testing.assert_close(g.double(), w.double(), rtol=0, atol=bound, equal_nan=True)


SHAPES = [(2, 16, 5, 7), (5, 3, 6, 6), (1, 1, 9, 4), (2, 24, 1, 3), (3, 65, 2, 2), (6, 8, 4, 4)]
CASES = [
    *zip(SHAPES * 2, itertools.cycle(LAYOUTS), [*DTYPES, *reversed(DTYPES)], strict=False),
    ((3, 65, 2, 2), "channels_last", "bf16"),
    ((2, 16, 5, 7), "channels_last", "bf16"),
    ((1, 1, 9, 4), "contiguous", "f32"),
]


ROTATED = [(*case, PLANS[i % 3], i % 4 < 2) for i, case in enumerate(CASES)]


@pytest.mark.parametrize(("shape", "layout", "dtype", "plan", "residual"), ROTATED, ids=str)
def test_against_the_reference(monkeypatch, shape, layout, dtype, plan, residual):
    """Forward and backward, training and evaluation; nothing is touched outside of the tensors of a launch."""
    set_plan(monkeypatch, plan)
    dtype, param = DTYPES[dtype]
    x, r, dy = (sample(shape, dtype, layout) for _ in range(3))
    for training, relu, momentum in ((True, True, 0.1), (True, False, None), (False, True, 0.1)):
        args = (x, r if residual else None, *vectors(shape[1], param), training, momentum, 1e-5, relu, residual)
        mine, theirs = copies(args), copies(args)
        with count_bytes():
            out, stats, mask = kernels.batch_norm_act(*mine)
        want = REFERENCE.batch_norm_act_reference(*theirs)
        assert_near((out, stats), want[:2], dtype)
        assert_near(tuple(mine[4:7]), tuple(theirs[4:7]), dtype)
        if residual:
            assert torch.equal(mask, pack_mask(~(out <= 0)))
        weight, bias = args[2:4]
        saved = mask if residual else None
        args = (dy, x, weight, bias, stats, saved, training, relu, True, residual, True)
        with count_bytes():
            grads = kernels.batch_norm_act_backward(*args)
        assert_near(grads, REFERENCE.batch_norm_act_backward_reference(*args), dtype)


@pytest.mark.parametrize(("shape", "layout", "dtype", "plan"), [row[:4] for row in ROTATED[:5]], ids=str)
def test_pair_against_the_reference(monkeypatch, shape, layout, dtype, plan):
    set_plan(monkeypatch, plan)
    dtype, param = DTYPES[dtype]
    x, x2, dy = (sample(shape, dtype, layout) for _ in range(3))
    for training, training2 in ((True, True), (True, False), (False, False)):
        norm = (*vectors(shape[1], param), training, 0.1, 1e-5)
        norm2 = (*vectors(shape[1], param), training2, None, 1e-3)
        mine, theirs = copies((x, *norm, x2, *norm2, True)), copies((x, *norm, x2, *norm2, True))
        with count_bytes():
            results = kernels.batch_norm_add_batch_norm_act(*mine)
        assert_near(results, REFERENCE.batch_norm_add_batch_norm_act_reference(*theirs), dtype)
        assert_near(
            tuple(v for v in mine if isinstance(v, Tensor)), tuple(v for v in theirs if isinstance(v, Tensor)), dtype
        )
        _, stats, stats2 = results
        args = (dy, x, *norm[:2], stats, training, x2, *norm2[:2], stats2, training2, True, True, True, True, True)
        with count_bytes():
            grads = kernels.batch_norm_add_batch_norm_act_backward(*args)
        assert_near(grads, REFERENCE.batch_norm_add_batch_norm_act_backward_reference(*args), dtype)


def test_only_what_is_wanted():
    """Every choice of results of the backward, and vectors that are None."""
    x, r, dy = (sample((2, 8, 3, 5), torch.float32, "channels_last") for _ in range(3))
    weight, bias, *_ = vectors(8, torch.float32)
    for affine in ((weight, bias), (weight, None), (None, bias), (None, None)):
        args = (x, r, *affine, None, None, None, True, 0.1, 1e-5, True, True)
        got, want = kernels.batch_norm_act(*args), REFERENCE.batch_norm_act_reference(*args)
        assert_near(got[:2], want[:2], torch.float32)
        for wants, training in itertools.product(itertools.product((True, False), repeat=3), (True, False)):
            back = (dy, x, *affine, got[1], got[2], training, True, *wants)
            assert_near(
                kernels.batch_norm_act_backward(*back), REFERENCE.batch_norm_act_backward_reference(*back), x.dtype
            )


def test_same_bits_in_every_run_and_order(monkeypatch):
    x, r = (sample((4, 16, 9, 9), torch.bfloat16, "channels_last") for _ in range(2))
    args = (x, r, *vectors(16, torch.float32), True, 0.1, 1e-5, True, True)
    results = []
    for name in ("small tiles", "small tiles", "small tiles in reverse"):
        set_plan(monkeypatch, name)
        mine = copies(args)
        out, stats, mask = kernels.batch_norm_act(*mine)
        grads = kernels.batch_norm_act_backward(r, x, *args[2:4], stats, mask, True, True, True, True, True)
        results.append((out, stats, mask, *mine[4:7], *grads))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_refusals_write_nothing():
    x = sample((2, 8, 3, 5), torch.float32, "channels_last")
    weight, bias, mean, var, counter = vectors(8, torch.float32)
    before = copies((mean, var, counter))
    for args in (
        (x, x[:1], weight, bias, mean, var, counter),
        (x, x.double(), weight, bias, mean, var, counter),
        (x, None, weight[:4], bias, mean, var, counter),
        (x[..., ::2], None, weight, bias, mean, var, counter),
    ):
        with pytest.raises(RuntimeError):
            kernels.batch_norm_act(*args, True, 0.1, 1e-5, True, False)
    assert all(torch.equal(a, b) for a, b in zip(before, (mean, var, counter), strict=True))


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["two_pass", "one_pass"])
def test_bytes_are_those_of_the_traffic_functions(monkeypatch, layout, form):
    """Distinct bytes per launch, loads and stores apart. The tensors are of several tiles, with a tail; their mask ends
    with a whole word, for the backward does not read its padding."""
    set_plan(monkeypatch, "one pass" if form == "one_pass" else "small tiles")
    shape, dtype = (4, 24, 5, 7), torch.bfloat16
    x, r, dy = (sample(shape, dtype, layout) for _ in range(3))
    tiles = common.reduce_plan(x).parts
    for residual, training, momentum in (
        (True, True, 0.1),
        (False, True, 0.1),
        (False, True, None),
        (True, False, 0.1),
    ):
        cumulative = momentum is None
        of = "two_pass" if cumulative else form
        args = (*vectors(24, torch.float32), training, momentum, 1e-5)
        with count_bytes() as launches:
            _, stats, mask = kernels.batch_norm_act(x, r if residual else None, *args, True, residual)
        wanted = ops.batch_norm_act_traffic(
            shape, dtype, layout=layout, training=training, residual=residual, counter=True, cumulative=cumulative,
            form=of, tiles=tiles,
        )  # fmt: skip
        assert_traffic(launches, wanted)
        saved = mask if residual else None
        with count_bytes() as launches:
            kernels.batch_norm_act_backward(dy, x, *args[:2], stats, saved, training, True, True, residual, True)
        wanted = ops.batch_norm_act_backward_traffic(
            shape, dtype, layout=layout, training=training, residual=residual, tiles=tiles,
            form=form if training else "two_pass",
        )  # fmt: skip
        assert_traffic(launches, wanted)
    norm = (*vectors(24, torch.float32), True, 0.1, 1e-5)
    norm2 = (*vectors(24, torch.float32), True, 0.1, 1e-5)
    with count_bytes() as launches:
        _, stats, stats2 = kernels.batch_norm_add_batch_norm_act(x, *norm, r, *norm2, True)
    options = {"layout": layout, "form": form, "tiles": tiles}
    assert_traffic(launches, ops.batch_norm_add_batch_norm_act_traffic(shape, dtype, counter=True, **options))
    first, second = (x, *norm[:2], stats, True), (r, *norm2[:2], stats2, True)
    with count_bytes() as launches:
        kernels.batch_norm_add_batch_norm_act_backward(dy, *first, *second, True, True, True, True, True)
    assert_traffic(launches, ops.batch_norm_add_batch_norm_act_backward_traffic(shape, dtype, **options))


def assert_traffic(launches, wanted) -> None:
    assert [(one.loads, one.stores) for one in launches] == [(one.loads, one.stores) for one in wanted.launches]
    for one in launches:
        print(one)  # with -s: requested bytes beside the distinct ones


# ---- the rule, and models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["batch_norm_act", "batch_norm_add_batch_norm_act"])
def test_the_error_rule(op):
    """Cases of `fusedres verify` of every dtype, layout and distribution; its large tensors are left to a device."""
    table = [case for case in verification.cases(op) if torch.Size(case.shape).numel() < 2000][::5]
    assert not verification.pooled_failures(table, "triton")


class TinyResNet(torch.nn.Module):
    def __init__(self, block: type, planes: int) -> None:
        super().__init__()
        width = planes * block.expansion
        shortcut = torch.nn.Sequential(torch.nn.Conv2d(8, width, 1, 2, bias=False), torch.nn.BatchNorm2d(width))
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.blocks = torch.nn.Sequential(block(8, planes, 2, shortcut), block(width, planes))
        self.head = torch.nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("block", [fusedres.BasicBlock, fusedres.Bottleneck])
def test_a_tiny_resnet_trains_as_in_eager(block):
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last), torch.arange(4)
    start = TinyResNet(block, 4).state_dict()
    curves, states = [], []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        model = TinyResNet(block, 4).to(memory_format=torch.channels_last)
        model.load_state_dict(start)
        model.to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        curve = []
        with fusedres.use_backend(backend):
            for _ in range(3):
                loss = torch.nn.functional.cross_entropy(model(images.to(dtype)), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                curve.append(float(loss.detach()))
        curves.append(curve)
        states.append(torch.cat([v.double().flatten() for v in model.state_dict().values()]))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    exact = states[2]
    assert float((states[0] - exact).abs().max()) <= 2 * float((states[1] - exact).abs().max()) + 1e-6
