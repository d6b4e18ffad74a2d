"""relu(bn(x)), relu(bn(x) + residual) and relu(bn(x) + bn2(x2)) in training, forward + backward, against eager."""

from __future__ import annotations

from typing import Any

from benchmarks.shapes import Shape
from benchmarks.suite import op_parameters, run_op


@op_parameters("batch_norm_act")
def test_batch_norm_act(record: Any, settings: Any, shape: Shape, dtype: str, layout: str, peer: str) -> None:
    run_op(record, settings, shape, dtype, layout, peer)


@op_parameters("batch_norm_add_batch_norm_act")
def test_batch_norm_add_batch_norm_act(
    record: Any, settings: Any, shape: Shape, dtype: str, layout: str, peer: str
) -> None:
    run_op(record, settings, shape, dtype, layout, peer)
