"""Small tensors: what a fused call costs beyond its arithmetic, and whether it is ever slower than eager.

Overhead is the time of a forward call that records a graph, on 64 values and with the native kernel demanded, less the
time of the raw op (`torch.ops.fusedres.*`) on the same tensors: checks, `autograd.Function`, what is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pytest
import torch

import fusedres
from benchmarks.cases import DTYPES, EPS, MOMENTUM, OPS, Case
from benchmarks.harness import Comparison, compare
from benchmarks.shapes import Shape

TINY = (2, 8, 2, 2)
SMALL = (
    TINY,
    (2, 16, 4, 4),
    (2, 16, 8, 8),
    (2, 32, 8, 8),
    (4, 32, 8, 8),
    (4, 64, 7, 7),
    (4, 32, 11, 11),
    (4, 64, 11, 11),
)
LIMIT = 64 * 1024  # bytes of x
MODES = ("train", "eval")
FORMS = tuple(
    (op, residual) for op in OPS for residual in ((False, True) if op == "batch_norm_act" else (op == "add_act",))
)


@dataclass(frozen=True)
class SmallCall:
    """One small call, measured."""

    op: str
    residual: bool
    shape: tuple[int, ...]
    dtype: str
    layout: str
    mode: str
    eager_us: float
    fused_us: float
    ratio: float
    ratio_low: float
    ratio_high: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_small(
    form: tuple[str, bool], size: tuple[int, ...], dtype: str, mode: str, layout: str = "channels_last", **options: Any
) -> tuple[SmallCall, Comparison]:
    """Gate, then time one small call against eager."""
    case = Case(Shape(*form, *size), dtype, layout)
    case.gate()
    options = {"min_rounds": 21, "max_rounds": 41, "max_seconds": 0.5, "min_sample_seconds": 2e-3} | options
    done = compare({peer: case.call(peer, mode) for peer in ("eager", "fusedres")}, **options)
    ratio = done.ratio("fusedres")
    eager, fused = (done.timings[peer].median * 1e6 for peer in ("eager", "fusedres"))
    return SmallCall(*form, size, dtype, layout, mode, eager, fused, ratio.value, ratio.low, ratio.high), done


def _raw(case: Case) -> Callable[[], Any]:
    """The raw op of the case's forward, as the functional form calls it."""
    ops, op = torch.ops.fusedres, case.shape.op
    inputs = [t.detach() for t in case.inputs]
    if op == "add_act":
        return partial(ops.add_act.default, *inputs, True, True)
    x, affine, rest = inputs[0], inputs[1:3], inputs[3:]
    norm = (*affine, *case.stats[:2], None, True, MOMENTUM, EPS)
    if op == "batch_norm_add_batch_norm_act":
        second = (*rest[1:], *case.stats[2:], None, True, MOMENTUM, EPS)
        return partial(ops.batch_norm_add_batch_norm_act.default, x, *norm, rest[0], *second, True)
    if op == "batch_norm_act_max_pool":
        window = ([3, 3], [2, 2], [1, 1], [1, 1], False)
        return partial(ops.batch_norm_act_max_pool.default, x, *norm, True, *window)
    return partial(ops.batch_norm_act.default, x, rest[0] if rest else None, *norm, True, bool(rest))


def measure_overhead(form: tuple[str, bool], dtype: str) -> tuple[dict[str, Any], Comparison]:
    """Microseconds of one forward call with grad on 64 values: the native kernel's, the raw op's, eager's."""
    case = Case(Shape(*form, *TINY), dtype)
    case.gate()
    candidates = {
        "raw": _raw(case),
        "fusedres": case.call("fusedres", "forward"),
        "eager": case.call("eager", "forward"),
    }
    with fusedres.use_backend("cpu"):
        done = compare(candidates, min_rounds=21, max_rounds=41, max_seconds=1.0, min_sample_seconds=2e-3)
    us = {name: timing.median * 1e6 for name, timing in done.timings.items()}
    row = {"op": form[0], "residual": form[1], "shape": TINY, "dtype": dtype, "mode": "forward with grad"}
    return row | {
        "fused_us": us["fusedres"],
        "raw_us": us["raw"],
        "eager_us": us["eager"],
        "overhead_us": us["fusedres"] - us["raw"],
    }, done


def small_cases(
    dtypes: tuple[str, ...] = tuple(DTYPES),
) -> Iterator[tuple[tuple[str, bool], tuple[int, ...], str, str]]:
    """(form, size, dtype, mode) of every tensor below the limit."""
    for form in FORMS:
        for size in SMALL:
            for dtype in dtypes:
                if size[0] * size[1] * size[2] * size[3] * DTYPES[dtype].itemsize < LIMIT:
                    for mode in MODES:
                        yield form, size, dtype, mode


def _id(value: Any) -> str | None:
    if isinstance(value, tuple):
        return f"{value[0]}+residual" if value[-1] is True else "x".join(str(v) for v in value if v is not False)
    return None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS, ids=_id)
def test_overhead(record: Any, settings: Any, form: tuple[str, bool], dtype: str) -> None:
    """One forward call with grad on 64 values; the overhead is in extra_info."""
    if settings.environment["served_by"][form[0]] != "cpu":
        pytest.skip("no native CPU kernel")
    row, done = measure_overhead(form, dtype)
    record(done.timings["fusedres"].seconds, group=f"{_id(form)} forward with grad {dtype}", **row)


@pytest.mark.parametrize(("form", "size", "dtype", "mode"), list(small_cases()), ids=_id)
def test_small(
    record: Any, settings: Any, form: tuple[str, bool], size: tuple[int, ...], dtype: str, mode: str
) -> None:
    """Below 64 KiB, fused; the ratio to eager is in extra_info."""
    if settings.quick and (dtype == "float16" or size not in (SMALL[0], SMALL[3])):
        pytest.skip("--quick: two sizes")
    call, done = measure_small(form, size, dtype, mode, **settings.rounds)
    record(done.timings["fusedres"].seconds, group=f"{_id(form)} {mode} {dtype}", **call.as_dict())
