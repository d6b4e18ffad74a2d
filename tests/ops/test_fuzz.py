"""Random combinations of everything, by the pooled rule; another seed with FUSEDRES_FUZZ_SEED."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from fusedres import verification
from fusedres.verification import Case

ROUNDS = 12


def _random_case(op: str, rng: random.Random, dtype: str, distribution: str) -> Case:
    shape = (
        rng.randint(1, 9),
        rng.choice([1, 2, 3, rng.randint(4, 40), rng.randint(41, 300)]),
        *(rng.choice([1, 2, rng.randint(3, 40)]) for _ in range(2)),
    )
    stats, training = rng.random() < 0.8, rng.random() < 0.8
    values: dict[str, Any] = dict(  # noqa: C408
        shape=shape,
        dtype=dtype,
        distribution=distribution,
        layout=rng.choice(["contiguous", "channels_last", *verification.LAYOUTS]),
        act=rng.choice(["relu", "relu", None]),
    )
    if op == "add_act":
        return Case(op, **values, residual=rng.choice([None, *verification.LAYOUTS]))
    values |= dict(  # noqa: C408
        training=training,
        affine=rng.choice(["both", "both", "weight", "bias", "none"]),
        stats=stats or not training,
        momentum=rng.choice([0.1, 1.0, 0.3, None]) if stats else 0.1,
        eps=rng.choice([1e-5, 1e-3, 1e-2]),
    )
    if op == "batch_norm_act":
        values["residual"] = rng.choice([None, *verification.LAYOUTS])
    elif op == "batch_norm_add_batch_norm_act":
        values["residual"] = rng.choice([None, *verification.LAYOUTS])
        values["training2"] = rng.choice([None, True, False]) if values["stats"] else None
    elif op == "batch_norm_act_max_pool":
        kernel = rng.randint(1, 5)
        values["window"] = (
            kernel,
            rng.randint(1, 4),
            rng.randint(0, kernel // 2),
            rng.randint(1, 2),
            rng.random() < 0.5,
        )
    return Case(op, **values)


def _valid(case: Case) -> bool:
    n, _, h, w = case.shape
    if n * h * w < 6:
        return False
    if case.op == "batch_norm_act_max_pool":
        kernel, _, padding, dilation, _ = case.window
        # a window without any element is out of bounds in eager's backward
        return all(size + 2 * padding >= dilation * (kernel - 1) + 1 and size >= dilation for size in (h, w))
    return case.layout != "overlapping" or n > 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64", "all-bf16", "all-f16"])
@pytest.mark.parametrize("distribution", verification.DISTRIBUTIONS)
@pytest.mark.parametrize("op", [op for op in verification.OPS if op not in verification.CONVOLUTIONS])
def test_fuzz(op, distribution, dtype, kernel) -> None:
    rng = random.Random(f"{os.environ.get('FUSEDRES_FUZZ_SEED', '0')} {op} {distribution} {dtype}")
    cases: list[Case] = []
    while len(cases) < ROUNDS:
        case = _random_case(op, rng, dtype, distribution)
        if _valid(case):
            cases.append(case)
    assert not verification.pooled_failures(cases, kernel)
