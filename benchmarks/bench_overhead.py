"""Small tensors: what a fused call costs beyond its arithmetic, and whether it is ever slower than eager.

The overhead is the time of a whole forward call that records a graph, on a tensor of 64 values, where the arithmetic is
below a tenth of a microsecond: an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pytest

from benchmarks.cases import DTYPES, OPS, Case
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


@pytest.mark.parametrize("peer", ["eager", "fusedres"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS, ids=_id)
def test_overhead(record: Any, settings: Any, form: tuple[str, bool], dtype: str, peer: str) -> None:
    """One forward call with grad on 64 values."""
    call, done = measure_small(form, TINY, dtype, "forward")
    record(done.timings[peer].seconds, group=f"{_id(form)} forward with grad {dtype}", peer=peer, **call.as_dict())


@pytest.mark.parametrize(("form", "size", "dtype", "mode"), list(small_cases()), ids=_id)
def test_small(
    record: Any, settings: Any, form: tuple[str, bool], size: tuple[int, ...], dtype: str, mode: str
) -> None:
    """Below 64 KiB, fused; the ratio to eager is in extra_info."""
    if settings.quick and (dtype == "float16" or size not in (SMALL[0], SMALL[3])):
        pytest.skip("--quick: two sizes")
    call, done = measure_small(form, size, dtype, mode, **settings.rounds)
    record(done.timings["fusedres"].seconds, group=f"{_id(form)} {mode} {dtype}", **call.as_dict())
