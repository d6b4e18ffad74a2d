"""benchmarks/TRAFFIC.md: up to date, and its numbers by hand."""

from __future__ import annotations

import pytest

import fusedres
from benchmarks import traffic
from benchmarks.shapes import Shape, resnet_shapes

built = pytest.mark.skipif(not fusedres.info()["libraries"]["_C"]["loaded"], reason="the planner is not built")


@built
def test_page_is_up_to_date():
    from fusedres import _C

    assert traffic.PAGE.read_text() == traffic.page(_C.launch_plan), "run python -m benchmarks.traffic --write"


def test_passes_of_the_peers():
    """BN+add+ReLU in bfloat16: 16 tensor passes in eager, 12 in Inductor, 10.2 here."""
    name = "batch_norm_act+residual"
    assert traffic.passes(traffic.EAGER[name], 2) == 16
    assert traffic.passes(traffic.INDUCTOR[name], 2) == 12
    assert f"| `{name}` | 16.00 | 12.00 | 10.19 |" in traffic.passes_table()
    assert traffic.passes(["dp i -> dy"], 2) == 0.25 + 0.25 * 4 + 1
    assert set(traffic.EAGER) == set(traffic.INDUCTOR) == {traffic.op_name(s) for s in resnet_shapes()}


def plan_of(form: str, fits_l2: bool, chunks: int):
    def plan(channels_last, batch, channels, area, itemsize, *, backward, norms, may_one_pass, **device):
        assert channels_last
        one_pass = form == "one_pass" and may_one_pass
        numbers = 1 + norms if backward else 3 * norms
        partial = 0 if one_pass else 4 * numbers * chunks * channels
        return {"form": "one_pass" if one_pass else "two_pass", "fits_l2": fits_l2, "partial_bytes": partial}

    return plan


def test_bytes_of_a_layer():
    shape = Shape("batch_norm_act", True, 32, 64, 8, 8, (("resnet50", 2),))
    t, k, c = 32 * 64 * 64 * 2, 32 * 64 * 64 // 8, 64 * 4
    two = traffic.layer(shape, plan_of("two_pass", False, 10), traffic.H200)
    assert two.requested == pytest.approx(10 * t + 3 * k + 2 * 10 * (3 + 2) * c, abs=31 * c)
    assert two.memory == two.requested
    assert two.eager == 16 * t
    in_l2 = traffic.layer(shape, plan_of("two_pass", True, 10), traffic.H200)
    assert in_l2.requested - in_l2.memory == 3 * t  # x forward, dy and x backward
    one = traffic.layer(shape, plan_of("one_pass", True, 10), traffic.H200)
    assert one.memory == one.requested == pytest.approx(7 * t + 2 * k, abs=31 * c)
    assert (one.forward, in_l2.backward, two.forward) == ("one pass", "two passes, L2", "two passes")
    stem = Shape("batch_norm_act_max_pool", False, 32, 64, 8, 8, (("resnet50", 1),))
    assert traffic.layer(stem, plan_of("one_pass", False, 10), traffic.H200).forward == "two passes"


def test_a_step_is_the_sum_of_its_regions():
    found = traffic.layers(32, plan_of("two_pass", False, 1), traffic.H200)
    assert sum(dict(at.shape.uses)["resnet50"] for at in found) == 49  # 53 norms, four of them in pairs
    line = traffic.total_line(32, found)
    assert line.startswith("A step moves, in all these regions, 314 MB per image in eager,\n223 in Inductor")
