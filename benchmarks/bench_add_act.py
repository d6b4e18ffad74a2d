"""relu(x + residual), forward + backward, against eager."""

from __future__ import annotations

from typing import Any

from benchmarks.shapes import Shape
from benchmarks.suite import op_parameters, run_op


@op_parameters("add_act")
def test_add_act(record: Any, settings: Any, shape: Shape, dtype: str, layout: str, peer: str) -> None:
    run_op(record, settings, shape, dtype, layout, peer)
