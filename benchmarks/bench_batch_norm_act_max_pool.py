"""The stem, max_pool(relu(bn(x))) in training, forward + backward, against eager."""

from __future__ import annotations

from typing import Any

from benchmarks.shapes import Shape
from benchmarks.suite import op_parameters, run_op


@op_parameters("batch_norm_act_max_pool")
def test_batch_norm_act_max_pool(record: Any, settings: Any, shape: Shape, dtype: str, layout: str, peer: str) -> None:
    run_op(record, settings, shape, dtype, layout, peer)
