"""The Triton kernels of the stem in Triton's interpreter, against the reference op.

Not collected by name: test_interpreted.py runs it in a process with TRITON_INTERPRET=1. What is uninitialised is NaN.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fusedres import verification
from fusedres.kernels import batch_norm_act_max_pool as kernels
from fusedres.kernels import common
from fusedres.ops import batch_norm_act_max_pool as ops

sys.path.insert(0, str(Path(__file__).parent))
from byte_counter import count_bytes
from interpret_batch_norm_act import DTYPES, LAYOUTS, assert_near, assert_traffic, copies, sample, set_plan, vectors

REFERENCE = torch.ops.fusedres
STEM = ((3, 3), (2, 2), (1, 1), (1, 1), False)
WINDOWS = [
    STEM,
    ((5, 4), (3, 2), (2, 1), (1, 1), True),
    ((2, 2), (3, 3), (1, 1), (2, 2), True),  # strides that leave pixels out, dilation
    ((5, 5), (1, 1), (0, 0), (1, 1), False),  # too large to be unrolled
    ((1, 1), (1, 1), (0, 0), (1, 1), False),
]
SHAPES = [(2, 16, 7, 9), (3, 5, 12, 8), (1, 33, 5, 5), (2, 8, 10, 10), (1, 1, 9, 20)]


@pytest.fixture(autouse=True)
def _poison():
    torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN
    yield
    torch.use_deterministic_algorithms(False)
    common._plan.cache_clear()


@pytest.mark.parametrize("i", range(6))
def test_against_the_reference(monkeypatch, i):
    """Forward and backward of a case that differs from the one before in everything."""
    shape, window = SHAPES[i % 5], WINDOWS[(i + i // 5) % 5]
    layout, (dtype, param) = list(LAYOUTS)[(i + i // 2) % 2], list(DTYPES.values())[i % 6]
    set_plan(monkeypatch, ("small tiles", "small tiles in reverse")[i // 2 % 2])
    x = sample(shape, dtype, layout)
    x[0, 0, 2, 3:5] = float("nan") if i == 3 else x[0, 0, 2, 2]  # ties, and not a number
    for training, relu in ((True, True), (False, True), (True, False)):
        args = (x, *vectors(shape[1], param), training, 0.1, 1e-5, relu, *window)
        mine, theirs = copies(args), copies(args)
        with count_bytes():
            out, stats = kernels.batch_norm_act_max_pool(*mine)
        assert_near((out, stats), REFERENCE.batch_norm_act_max_pool_reference(*theirs), dtype)
        assert_near(tuple(mine[3:6]), tuple(theirs[3:6]), dtype)
        dy = torch.randn(out.shape).to(dtype)
        args = (dy, x, *args[1:3], stats, training, relu, *window, True, True)
        with count_bytes():
            grads = kernels.batch_norm_act_max_pool_backward(*args)
        assert_near(grads, REFERENCE.batch_norm_act_max_pool_backward_reference(*args), dtype)


def test_only_what_is_wanted():
    x = sample((2, 8, 9, 9), torch.float32, "channels_last")
    stats = REFERENCE.batch_norm_act_max_pool_reference(x, *vectors(8, x.dtype), True, 0.1, 1e-5, True, *STEM)[1]
    weight, bias, *_ = vectors(8, x.dtype)
    dy = torch.randn(2, 8, 5, 5)
    for affine in ((weight, bias), (None, bias), (None, None)):
        for training in (True, False):
            for wants in ((True, False), (False, True), (False, False)):
                args = (dy, x, *affine, stats, training, True, *STEM, *wants)
                got = kernels.batch_norm_act_max_pool_backward(*args)
                assert_near(got, REFERENCE.batch_norm_act_max_pool_backward_reference(*args), x.dtype)


@pytest.mark.parametrize("window", [STEM, WINDOWS[2]], ids=["stem", "gaps"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_bytes_are_those_of_the_traffic_functions(monkeypatch, layout, training, window):
    set_plan(monkeypatch, "small tiles")
    shape, dtype = (2, 24, 13, 10), torch.bfloat16
    x = sample(shape, dtype, layout)
    norm = vectors(24, torch.float32)
    options = {"layout": layout, "training": training, "window": window}
    with count_bytes() as launches:
        out, stats = kernels.batch_norm_act_max_pool(x, *norm, training, 0.1, 1e-5, True, *window)
    tiles = common.reduce_plan(x).parts
    assert_traffic(launches, ops.batch_norm_act_max_pool_traffic(shape, dtype, counter=True, tiles=tiles, **options))
    dy = torch.ones_like(out)
    with count_bytes() as launches:
        kernels.batch_norm_act_max_pool_backward(dy, x, *norm[:2], stats, training, True, *window, True, True)
    tiles = common.reduce_plan(dy).parts
    wanted = ops.batch_norm_act_max_pool_backward_traffic(shape, dtype, tiles=tiles, stored_winners=True, **options)
    assert_traffic(launches, wanted)


def test_the_error_rule():
    """Cases of `fusedres verify`; its large tensors are left to a device."""
    table = [case for case in verification.cases("batch_norm_act_max_pool") if torch.Size(case.shape).numel() < 2000]
    assert not verification.pooled_failures(table[::5], "triton")
