"""The Triton kernels of batch_norm_sync in Triton's interpreter, all processes in one, against the reference ops.

Not collected by name: test_interpreted.py runs it in a process with TRITON_INTERPRET=1. What is uninitialised is NaN,
and every access of a launch must lie in its tensors.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusedres.kernels import batch_norm_sync as kernels
from fusedres.kernels import common
from fusedres.ops import batch_norm_act as ops
from fusedres.ops.layout import pack_mask

sys.path.insert(0, str(Path(__file__).parent))
from byte_counter import count_bytes
from interpret_batch_norm_act import DTYPES, LAYOUTS, sample, set_plan, vectors

REFERENCE = torch.ops.fusedres
EPS = 1e-5
# channels, height and width; samples of each process, of which some have none
SHAPES = [(16, 5, 7), (3, 6, 6), (1, 9, 4), (24, 1, 3), (65, 2, 2), (8, 4, 4)]
PARTS = [(2, 3), (4, 0, 1), (0, 2), (3,)]
CASES = [
    (shape, PARTS[(i + turn) % 4], list(LAYOUTS)[(i + turn) % 2], list(DTYPES)[(i + 2 * turn) % 6], (i + turn) % 3 > 0)
    for turn in range(4)
    for i, shape in enumerate(SHAPES)
]


@pytest.fixture(autouse=True)
def _poison():
    torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    set_plan(monkeypatch, "small tiles")
    yield
    common._plan.cache_clear()


def assert_near(got: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Within two roundings of the dtype and some of that in which the sums over ``dtype`` are computed."""
    for g, w in zip(got, want, strict=True):
        assert (g.shape, g.dtype, g.stride()) == (w.shape, w.dtype, w.stride())
        if not g.numel():
            continue
        rounding = 2 * torch.finfo(g.dtype).eps + (1e-12 if dtype == torch.float64 else 3e-6)
        finite = w.double().abs()[w.isfinite()]
        bound = rounding * max(1.0, float(finite.max()) if finite.numel() else 0.0)
        torch.testing.assert_close(g.double(), w.double(), rtol=0, atol=bound, equal_nan=True)


def twice(op, *args):
    """The results of a call that must give the same bits again; what it changes in place is checked by others."""
    results = op(*args)
    again = op(*[a.clone(memory_format=torch.preserve_format) if isinstance(a, Tensor) else a for a in args])
    for got, same in zip(*((r,) if isinstance(r, Tensor) else r for r in (results, again)), strict=True):
        assert torch.equal(got, same)
    return results


def both(op: str, *args):
    """What a launcher and the reference give; the latter on copies."""
    theirs = [a.clone(memory_format=torch.preserve_format) if isinstance(a, Tensor) else a for a in args]
    with count_bytes() as launches:
        got = getattr(kernels, op)(*args)
    return got, getattr(REFERENCE, f"{op}_reference")(*theirs), theirs, launches


@pytest.mark.parametrize(("shape", "parts", "layout", "dtype", "residual"), CASES, ids=str)
def test_as_the_reference(shape, parts, layout, dtype, residual):
    dtype, param = DTYPES[dtype]
    channels = shape[0]
    x, r, dy = ([sample((n, *shape), dtype, layout) for n in parts] for _ in range(3))
    relu, save_mask = True, residual
    partials = []
    for part in x:
        got, want, _, launches = both("batch_norm_statistics", part)
        assert_near((got,), (want,), dtype)
        assert len(launches) == 2 * bool(part.numel())
        partials.append(got)
    partials = torch.stack(partials)
    saved, sums = [], []
    weight, bias, mean, var, counter = vectors(channels, param)
    for part, other, g in zip(x, r, dy, strict=True):
        running = (mean.clone(), var.clone(), counter.clone())
        args = (part, other if residual else None, partials, weight, bias, *running, 0.1, EPS, relu, save_mask)
        (out, stats, mask), want, theirs, launches = both("batch_norm_act_apply", *args)
        assert_near((out, stats, *running[:2]), (*want[:2], *theirs[5:7]), dtype)
        assert running[2] == theirs[7] == 4
        assert len(launches) == 1 + bool(part.numel())
        if save_mask:
            assert torch.equal(mask, pack_mask(~(out <= 0)))
        saved.append((g, part, weight, bias, stats, mask if save_mask else None))
        got, want, _, launches = both("batch_norm_act_backward_reduce", *saved[-1], relu, True)
        assert_near(got, want, dtype)
        assert len(launches) == 2 * bool(part.numel())
        sums.append(got[0])
    total = torch.stack(sums).sum(0)
    for of_part in saved:
        got, want, *_, launches = both("batch_norm_act_backward_apply", *of_part, total, relu, True, residual)
        assert_near(got, want, dtype)
        assert len(launches) == 2 * bool(of_part[1].numel())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_are_as_good_as_the_whole(layout):
    """float32 of a large mean, all processes together against float64 of the whole batch."""
    parts, dtype = (2, 3, 1), torch.float32
    whole = (torch.randn(6, 8, 5, 7) + 1e4).contiguous(memory_format=LAYOUTS[layout])
    dy = sample((6, 8, 5, 7), dtype, layout)
    weight, bias, mean, var, counter = vectors(8, dtype)
    running = (mean.clone(), var.clone(), counter.clone())
    args = (weight, bias, *running, True, 0.1, EPS, True, False)
    want, stats, _ = REFERENCE.batch_norm_act_reference(whole, None, *args)
    partials = torch.stack([kernels.batch_norm_statistics(x) for x in whole.split(parts)])
    results = []
    for x in whole.split(parts):
        own = (mean.clone(), var.clone(), counter.clone())
        results.append(kernels.batch_norm_act_apply(x, None, partials, weight, bias, *own, 0.1, EPS, True, False))
        assert_near(own[:2], running[:2], dtype)
    assert_near((torch.cat([out for out, *_ in results]), results[0][1][1]), (want, stats[1]), dtype)
    assert all(torch.equal(other, results[0][1]) for _, other, _ in results)
    exact = stats[0].double() + stats[2].double()
    assert (results[0][1][0].double() + results[0][1][2].double() - exact).abs().max() < 1e-5
    tensors = zip(dy.split(parts), whole.split(parts), strict=True)
    saved = [(*of_part, weight, bias, results[0][1], None) for of_part in tensors]
    reduced = [kernels.batch_norm_act_backward_reduce(*of_part, True, True) for of_part in saved]
    sums, dweight, dbias = (torch.stack(of_all).sum(0) for of_all in zip(*reduced, strict=True))
    dx = torch.cat([kernels.batch_norm_act_backward_apply(*of_part, sums, True, True, False)[0] for of_part in saved])
    args = (dy, whole, weight, bias, results[0][1], None, True, True, True, False, True)
    want = REFERENCE.batch_norm_act_backward_reference(*args)
    assert_near((dx, dweight, dbias), (want[0], *want[2:]), dtype)


@pytest.mark.parametrize("parts", [1, 5, 33, 70])
@pytest.mark.parametrize("empty", [False, True])
def test_merging(parts, empty):
    """Any numbers from the processes; several blocks of them."""
    channels = 11
    x = sample((2, channels, 3, 2), torch.float64, "contiguous")
    counts = torch.randint(1, 50, (parts, 1)).double()
    if empty:
        counts[::3] = 0
    partials = torch.cat([torch.randn(parts, channels) + 3, torch.rand(parts, channels), counts], 1).double()
    partials[:, :-1] *= counts > 0
    for momentum in (0.1, None, 0.0):
        args = [x, None, partials, *vectors(channels, torch.float64), momentum, EPS, False, False]
        got, want, theirs, launches = both("batch_norm_act_apply", *args)
        assert_near((*got[:2], *args[5:7]), (*want[:2], *theirs[5:7]), torch.float64)
        assert args[7] == theirs[7] == 4
        assert [one.kernel for one in launches] == ["_merge_parts_kernel", "_apply_kernel"]
        moves, counts_too = bool(counts.sum() > 1), momentum is not None
        assert launches[0].loads == (partials.numel() + 2 * channels + 1) * 8
        assert launches[0].stores == ((5 if moves else 3) * channels + counts_too) * 8


def test_parts_that_agree_are_exact():
    x = torch.full((3, 4, 5, 2), 0.1)
    partials = torch.stack([kernels.batch_norm_statistics(x)] * 3)
    assert torch.equal(partials[0, :4].float(), x[0, :, 0, 0])
    assert (partials[:, 4:8] == 0).all()
    _, stats, _ = kernels.batch_norm_act_apply(x, None, partials, *[None] * 5, 0.1, EPS, True, False)
    assert torch.equal(stats[0], x[0, :, 0, 0])
    assert (stats[1] == EPS**-0.5).all()


def test_too_little_for_a_variance():
    for parts in ((1, 0), (0, 0)):
        weight, bias, mean, var, counter = vectors(5, torch.float32)
        x = [sample((n, 5, 1, 1), torch.float32, "contiguous") for n in parts]
        partials = torch.stack([kernels.batch_norm_statistics(part) for part in x])
        for part in x:
            for momentum in (0.1, None):
                running = (mean.clone(), var.clone(), counter.clone())
                args = (part, None, partials, weight, bias, *running, momentum, EPS, False, False)
                got, want, *_ = both("batch_norm_act_apply", *args)
                assert_near(got[:2], want[:2], torch.float32)
                assert torch.equal(running[0], mean)
                assert torch.equal(running[1], var)
                assert running[2] == 4


def test_not_finite():
    x = [sample((2, 5, 5, 7), torch.float32, "channels_last") for _ in range(2)]
    x[1][0, 2, 1, 1], x[0][1, 3, 2, 2] = float("inf"), float("nan")
    partials = torch.stack([kernels.batch_norm_statistics(part) for part in x])
    finite = [0, 1, 4]
    for part in x:
        args = (part, None, partials, *vectors(5, torch.float32), 0.1, EPS, True, False)
        got, want, theirs, _ = both("batch_norm_act_apply", *args)
        assert got[0][:, 2:4].isnan().all()
        assert args[5][2:4].isnan().all()
        assert_near((got[0], got[1][:, finite], args[6]), (want[0], want[1][:, finite], theirs[6]), torch.float32)
    # means that are infinite, as others may send them
    partials[:, 2] = torch.tensor([float("inf"), 1.0])
    args = (x[0], None, partials, *vectors(5, torch.float32), 0.1, EPS, True, False)
    got, _, theirs, _ = both("batch_norm_act_apply", *args)
    assert args[5][2] == theirs[5][2] == float("inf")


def test_only_what_is_wanted():
    """Every choice of results of the backward, and vectors that are None."""
    x, r, dy = (sample((2, 8, 3, 5), torch.float32, "channels_last") for _ in range(3))
    weight, bias, mean, var, counter = vectors(8, torch.float32)
    partials = kernels.batch_norm_statistics(x)[None]
    for affine, relu in itertools.product(itertools.product((weight, None), (bias, None)), (True, False)):
        for running in ((None, None, None), (None, None, counter), (mean, var, None)):
            args = (x, r, partials, *affine, *(v if v is None else v.clone() for v in running), 0.1, EPS, relu, relu)
            got, want, theirs, _ = both("batch_norm_act_apply", *args)
            assert_near(got[:2], want[:2], torch.float32)
            moved = [(a, b) for a, b in zip(args[5:8], theirs[5:8], strict=True) if a is not None]
            assert all(torch.allclose(a, b, rtol=1e-6) for a, b in moved)
        saved = (dy, x, *affine, got[1], got[2] if relu else None)
        for need_affine in (True, False):
            reduced, want, *_ = both("batch_norm_act_backward_reduce", *saved, relu, need_affine)
            assert_near(reduced, want, torch.float32)
        for needs in itertools.product((True, False), repeat=2):
            sums = reduced[0] if needs[0] else reduced[0][:0]
            back, want, _, launches = both("batch_norm_act_backward_apply", *saved, sums, relu, *needs)
            assert_near(back, want, torch.float32)
            assert len(launches) == (2 if needs[0] else int(needs[1]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_are_those_of_the_passes(layout):
    """Distinct bytes: of the passes over tensors those of ``batch_norm_act``, and a few vectors between them."""
    shape, dtype = (4, 24, 5, 7), torch.bfloat16
    x, r, dy = (sample(shape, dtype, layout) for _ in range(3))
    tiles, numbers, channels = common.reduce_plan(x).parts, 2 * 24 + 1, 24
    norm = vectors(channels, torch.float32)
    with count_bytes() as launches:
        partials = kernels.batch_norm_statistics(x)[None]
        _, stats, mask = kernels.batch_norm_act_apply(x, r, partials, *norm, 0.1, EPS, True, True)
    options = {"layout": layout, "residual": True, "tiles": tiles}
    wanted = ops.batch_norm_act_traffic(shape, dtype, **options).launches
    statistics, finalise, merge, apply = ((one.loads, one.stores) for one in launches)
    assert [statistics, apply] == [(one.loads, one.stores) for one in (wanted[0], wanted[2])]
    assert finalise == (wanted[0].stores, 8 * numbers)
    assert merge == (8 * numbers + 2 * 4 * channels + 8, 5 * 4 * channels + 8)
    saved = (dy, x, *norm[:2], stats, mask)
    with count_bytes() as launches:
        sums, *_ = kernels.batch_norm_act_backward_reduce(*saved, True, True)
        kernels.batch_norm_act_backward_apply(*saved, sums, True, True, True)
    wanted = ops.batch_norm_act_backward_traffic(shape, dtype, **options).launches
    reduce, finalise, coefficients, apply = ((one.loads, one.stores) for one in launches)
    assert [reduce, apply] == [(one.loads, one.stores) for one in (wanted[0], wanted[2])]
    assert finalise == (wanted[0].stores + 4 * channels, 2 * 4 * channels + 8 * numbers)
    assert coefficients == (8 * numbers + 4 * channels, 2 * 4 * channels)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_twice(layout):
    x, r, dy = (sample((4, 13, 9, 8), torch.bfloat16, layout) for _ in range(3))
    weight, bias, *_ = vectors(13, torch.float32)
    partials = torch.stack([twice(kernels.batch_norm_statistics, x), twice(kernels.batch_norm_statistics, r)])
    norm = (weight, bias, None, None, None, 0.1, EPS)
    _, stats, mask = twice(kernels.batch_norm_act_apply, x, r, partials, *norm, True, True)
    saved = (dy, x, weight, bias, stats, mask)
    sums, *_ = twice(kernels.batch_norm_act_backward_reduce, *saved, True, True)
    twice(kernels.batch_norm_act_backward_apply, *saved, sums, True, True, True)


def test_refusals_write_nothing():
    x = sample((2, 8, 3, 5), torch.float32, "channels_last")
    weight, bias, mean, var, counter = vectors(8, torch.float32)
    before = [v.clone() for v in (mean, var, counter)]
    partials = kernels.batch_norm_statistics(x)[None]
    arguments = {"x": x, "residual": None, "partials": partials, "weight": weight, "bias": bias}
    arguments |= {"mean": mean, "var": var, "counter": counter, "momentum": 0.1}
    for wrong in (
        *({"partials": p} for p in (partials[0], partials.float(), partials[:0], partials[:, 1:])),
        {"residual": x[:1]},
        {"residual": x.double()},
        {"weight": weight[:4]},
        {"x": x[..., ::2]},
        {"x": x[0]},
        {"momentum": None, "counter": None},
        {"counter": counter.int()},
        {"counter": counter.repeat(2)},
    ):
        with pytest.raises(RuntimeError):
            kernels.batch_norm_act_apply(*(arguments | wrong).values(), EPS, True, False)
    assert all(torch.equal(a, b) for a, b in zip(before, (mean, var, counter), strict=True))
    stats = kernels.batch_norm_act_apply(*arguments.values(), EPS, True, False)[1]
    for sums in (partials, partials[0].float(), partials[0, :-1]):
        with pytest.raises(RuntimeError, match="sums"):
            kernels.batch_norm_act_backward_apply(x, x, weight, bias, stats, None, sums, True, True, False)
    with pytest.raises(RuntimeError):
        kernels.batch_norm_act_backward_reduce(x, x, weight, bias, stats.double(), None, True, True)
    with pytest.raises(RuntimeError):
        kernels.batch_norm_statistics(x[0])
