"""What the op suites share: parameters, and one alternating measurement behind the rows of both candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from .cases import DTYPES, FORMATS, Case, Measurement, measure
from .harness import Comparison
from .shapes import Shape, resnet_shapes

PEERS = ("eager", "fusedres")
_measured: dict[tuple[Any, ...], tuple[Measurement, Comparison]] = {}


def op_parameters(*ops: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrise a test over shapes, dtypes, layouts and, innermost, candidates."""
    shapes = [s for op in ops for s in resnet_shapes(batch=1, op=op)]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        for name, values, ids in (
            ("layout", tuple(FORMATS), tuple(FORMATS)),
            ("dtype", tuple(DTYPES), tuple(DTYPES)),
            ("shape", shapes, [s.key.replace("[1x", "[") for s in shapes]),
            ("peer", PEERS, PEERS),  # the outermost decorator varies fastest
        ):
            test = pytest.mark.parametrize(name, values, ids=ids)(test)
        return test

    return decorate


def run_op(record: Any, settings: Any, shape: Shape, dtype: str, layout: str, peer: str) -> None:
    """Measure a case on its first candidate's turn, and enter the candidate's rounds with what explains them."""
    if settings.quick and (dtype == "float16" or layout == "contiguous"):
        pytest.skip("--quick: float32 and bfloat16, channels_last")
    sized = replace(shape, n=settings.batch)
    at = (sized, dtype, layout)
    if at not in _measured:
        _measured.clear()
        _measured[at] = measure(Case(*at), clock=settings.clock, **settings.rounds)
    measurement, done = _measured[at]
    record(done.timings[peer].seconds, group=f"{measurement.key} {dtype} {layout}", peer=peer, **measurement.as_dict())
