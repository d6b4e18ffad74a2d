"""The traffic functions against counts by hand, and what must hold between them whatever the arguments."""

from __future__ import annotations

import itertools

import pytest
import torch

from fusedres.ops import traffic
from fusedres.ops.add_act import add_act_backward_traffic, add_act_traffic
from fusedres.ops.batch_norm_act import (
    batch_norm_act_backward_traffic,
    batch_norm_act_traffic,
    batch_norm_add_batch_norm_act_backward_traffic,
    batch_norm_add_batch_norm_act_traffic,
)
from fusedres.ops.batch_norm_act_max_pool import (
    batch_norm_act_max_pool_backward_traffic,
    batch_norm_act_max_pool_traffic,
)
from fusedres.ops.batch_norm_sync import (
    batch_norm_act_apply_traffic,
    batch_norm_act_backward_apply_traffic,
    batch_norm_act_backward_reduce_traffic,
    batch_norm_statistics_traffic,
)
from fusedres.ops.calls import _TRAFFIC, call_traffic, op_of
from fusedres.ops.conv1x1_bn_act import (
    conv1x1_bn_act_apply_traffic,
    conv1x1_bn_act_backward_apply_traffic,
    conv1x1_bn_act_backward_reduce_traffic,
    conv1x1_bn_fold_traffic,
    conv1x1_bn_unfold_traffic,
    conv1x1_bn_update_running_traffic,
    conv1x1_moments_traffic,
    conv1x1_statistics_traffic,
)
from fusedres.ops.registry import OPS

SHAPES = [(4, 64, 8, 8), (2, 3, 5, 7), (1, 1, 1, 1), (0, 6, 4, 4), (256, 256, 56, 56)]
NORM = [
    batch_norm_act_traffic,
    batch_norm_act_backward_traffic,
    batch_norm_add_batch_norm_act_traffic,
    batch_norm_add_batch_norm_act_backward_traffic,
]
POOL = [batch_norm_act_max_pool_traffic, batch_norm_act_max_pool_backward_traffic]
ADD = [add_act_traffic, add_act_backward_traffic]


def launches(t: traffic.Traffic) -> dict[str, tuple[int, int]]:
    return {launch.name: (launch.loads, launch.stores) for launch in t.launches}


def test_residual_by_hand():
    """x of 2*3*5*7 = 210 bfloat16 values, three channels, with everything."""
    t, c = 420, 12  # bytes of a tensor and of a float32 vector
    mask = 28  # 210 bits in words of 16
    forward = batch_norm_act_traffic((2, 3, 5, 7), torch.bfloat16, residual=True, counter=True, tiles=4)
    assert launches(forward) == {
        "statistics": (t + 8, 3 * 4 * c + 8),
        "finalise": (3 * 4 * c + 2 * c, 3 * c + 2 * c),
        "apply": (2 * t + 2 * c + 3 * c, t + mask),
    }
    assert forward.floor == 4 * t + mask + 2 * c + 2 * (2 * c + 8) + 3 * c
    cumulative = batch_norm_act_traffic((2, 3, 5, 7), torch.bfloat16, counter=True, cumulative=True, tiles=4)
    assert launches(cumulative)["finalise"] == (3 * 4 * c + 2 * c + 8, 3 * c + 2 * c)
    backward = batch_norm_act_backward_traffic((2, 3, 5, 7), torch.bfloat16, residual=True, tiles=4)
    assert launches(backward) == {
        "reduce": (2 * t + mask + 3 * c, 2 * 4 * c),
        "finalise": (2 * 4 * c + c, 2 * c + 2 * c),
        "apply": (2 * t + mask + c + 3 * c + 2 * c, 2 * t),
    }
    assert backward.floor == 6 * t + 2 * mask + c + 3 * c + 2 * c


def test_planes_start_new_mask_words_in_contiguous_tensors():
    flat, planes = (
        batch_norm_act_traffic((2, 3, 5, 7), torch.float32, residual=True, layout=layout).launches[-1].stores
        for layout in traffic.LAYOUTS
    )
    assert (flat, planes) == (840 + 28, 840 + 6 * 6)


def test_large_tensors_move_the_passes_of_the_readme():
    """In tensor passes, vectors forgotten: the table of the README."""
    shape, dtype = (256, 256, 56, 56), torch.bfloat16
    t = 256 * 256 * 56 * 56 * 2
    mask = 1 / 16
    wanted = {
        "bn": (batch_norm_act_traffic, batch_norm_act_backward_traffic, {}, 3, 5),
        "bn+add": (batch_norm_act_traffic, batch_norm_act_backward_traffic, {"residual": True}, 4 + mask, 6 + 2 * mask),
        "bn+bn": (
            batch_norm_add_batch_norm_act_traffic,
            batch_norm_add_batch_norm_act_backward_traffic,
            {},
            5,
            8,
        ),
        "stem": (batch_norm_act_max_pool_traffic, batch_norm_act_max_pool_backward_traffic, {}, 2.25, 3.5),
        "add": (add_act_traffic, add_act_backward_traffic, {}, 3 + mask, 2 + mask),
    }
    for name, (forward, backward, options, there, back) in wanted.items():
        for of, passes in ((forward, there), (backward, back)):
            found = of(shape, dtype, **options)
            assert found.floor / t == pytest.approx(passes, rel=1e-4), name
            assert found.total / t == pytest.approx(passes, rel=1e-4), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", traffic.LAYOUTS)
def test_invariants(shape, dtype, layout):
    for of, training in itertools.product([*NORM, *POOL], (True, False)):
        found = of(shape, dtype, layout=layout, training=training)
        assert found.floor <= found.total
        assert found.total == found.loads + found.stores == sum(launch.total for launch in found.launches)
        assert len(found.launches) <= (3 if training else 2)
        assert of(shape, dtype, layout=layout, training=training, tiles=9).total >= found.total
        assert of(shape, dtype, layout=layout, training=training, tiles=9).floor == found.floor
        if training and of in NORM and shape[0]:
            one = of(shape, dtype, layout=layout, form="one_pass")
            assert one.floor == one.total < found.floor
            assert len(one.launches) == 1
    for of in ADD:
        found = of(shape, dtype, layout=layout)
        assert found.floor == found.total


def test_only_what_is_wanted_is_moved():
    shape, dtype = (4, 64, 8, 8), torch.bfloat16
    t, c, mask = 4 * 64 * 8 * 8 * 2, 256, 4 * 64 * 8 * 8 // 8

    def of(**options):
        return batch_norm_act_backward_traffic(shape, dtype, **options)

    masked = {"residual": True, "need_dresidual": True, "need_dx": False, "need_affine": False}
    assert launches(of(**masked)) == {"apply": (t + mask + 3 * c, t)}  # neither x nor sums
    assert launches(of(need_dx=False))["reduce"] == (2 * t + 5 * c, 2 * c)
    assert [launch.name for launch in of(need_affine=False).launches] == ["reduce", "finalise", "apply"]
    frozen = of(training=False, need_affine=False)
    assert launches(frozen) == {"apply": (2 * t + 5 * c, t)}  # x for the sign
    assert launches(of(training=False, need_affine=False, relu=False)) == {"apply": (t + 4 * c, t)}
    assert of(training=False).floor == of(training=False, form="one_pass").floor
    forward = batch_norm_act_traffic(shape, dtype, training=False)
    assert launches(forward) == {"apply": (t + 4 * c, t + 3 * c)}
    assert batch_norm_act_traffic(shape, dtype, affine=False, running=False).floor == 3 * t + 3 * c
    half = batch_norm_act_traffic(shape, dtype, param_dtype=dtype)
    assert batch_norm_act_traffic(shape, dtype).floor - half.floor == 6 * c // 2


def test_windows_that_leave_pixels_out():
    window = ((1, 1), (2, 2), (0, 0), (1, 1), False)
    found = batch_norm_act_max_pool_traffic((2, 8, 9, 9), torch.float32, window=window)
    assert found.launches[-1].loads - 5 * 32 == 2 * 8 * 25 * 4
    assert found.launches[-1].stores == 2 * 8 * 25 * 4


def test_folded_by_hand():
    """y of 2*3*5*7 bfloat16 values at stride 2, 24 pixels, to four channels; y2 of five channels."""
    y, y2, out, mask = 24 * 3 * 2, 24 * 5 * 2, 24 * 4 * 2, 12
    first, second = {"stride": 2}, {"stride": 2, "shape2": (2, 5, 3, 4)}
    args = ((2, 3, 5, 7), 4, torch.bfloat16)
    assert launches(conv1x1_moments_traffic(args[0], args[2], stride=2)) == {"moments": (y, 8 * (3 + 9))}
    weight, weight2, shift = 2 * 4 * 3, 2 * 4 * 5, 4 * 4
    assert launches(conv1x1_statistics_traffic(*args)) == {"apply": (210 * 2 + weight, 70 * 4 * 2 + 8 * 9)}
    assert launches(conv1x1_bn_act_apply_traffic(*args, **first, residual=True)) == {
        "apply": (y + weight + shift + out, out + mask)
    }
    assert launches(conv1x1_bn_act_apply_traffic(*args, **second, save_mask=False)) == {
        "apply": (y + weight + y2 + weight2 + shift, out)
    }
    assert launches(conv1x1_bn_act_backward_reduce_traffic(*args, **first, need_g=True)) == {
        "reduce": (out + mask + y, out + 8 * 4 + 4 * 4 * 3)
    }
    assert launches(conv1x1_bn_act_backward_reduce_traffic(*args, **second, relu=False)) == {
        "reduce": (out + y + y2, 8 * 4 + 4 * (4 * 3 + 4 * 5))
    }
    sums = conv1x1_bn_act_backward_reduce_traffic(*args, **second, need_products=False)
    assert launches(sums) == {"reduce": (out + mask, 8 * 4)}
    matrices, matrices2 = weight + 2 * 9 + 4 * 3, weight2 + 2 * 25 + 4 * 5
    assert launches(conv1x1_bn_act_backward_apply_traffic(*args, **first)) == {
        "apply": (out + mask + y + matrices, 2 * 3 * 5 * 7 * 2)
    }
    both = conv1x1_bn_act_backward_apply_traffic(*args, **second, need_dx2=True)
    assert launches(both) == {"apply": (out + mask + y + matrices + y2 + matrices2, (210 + 120) * 2)}
    assert both.floor == both.total
    y, out, mask, norm = 70 * 3 * 2, 70 * 4 * 2, 36, 3 * 3 * 4  # without a stride, of y that is normalised
    assert launches(conv1x1_moments_traffic(args[0], args[2], norm=True)) == {"moments": (y + norm, 8 * (3 + 9))}
    masked = conv1x1_bn_act_apply_traffic(*args, norm=True, residual=True, residual_mask=True, save_mask=False)
    assert launches(masked) == {"apply": (y + norm + weight + shift + out + mask, out)}
    assert launches(conv1x1_bn_act_backward_reduce_traffic(*args, norm=True)) == {
        "reduce": (out + mask + y + norm, 8 * 4 + 4 * 4 * 3)
    }
    sums = conv1x1_bn_act_backward_reduce_traffic(*args, norm=True, need_products=False)
    assert launches(sums) == {"reduce": (out + mask, 8 * 4)}
    assert launches(conv1x1_bn_act_backward_apply_traffic(*args, norm=True)) == {
        "apply": (out + mask + y + norm + matrices, y + 8 * 2 * 3)
    }
    only = conv1x1_bn_act_backward_apply_traffic(*args, norm=True, shape2=(2, 5, 5, 7), need_dx=False, need_dx2=True)
    assert launches(only) == {"apply": (out + mask + 70 * 5 * 2 + matrices2, 70 * 5 * 2)}
    with pytest.raises(ValueError, match="stride must be positive"):
        conv1x1_moments_traffic(args[0], args[2], stride=0)


def test_small_matrices_by_hand():
    """A bfloat16 weight from three to four channels, of a float32 norm."""
    args, w, c, k = ((4, 3), torch.bfloat16), 4 * 3 * 2, 3 * 8, 4 * 8
    fold = conv1x1_bn_fold_traffic(*args, weight_dtype=torch.bfloat16, moments=True, shift0=True)
    loads = w + 2 * 16 + c + 9 * 8 + 2 * k + 16
    assert launches(fold) == {"fold": (loads, w + 16 + 3 * k + 9 * 4)}
    assert fold.floor == fold.total
    unfold = conv1x1_bn_unfold_traffic(*args, weight_dtype=torch.bfloat16, param_dtype=None)
    read = w + 12 * 4 + c + 2 * k
    assert launches(unfold) == {
        "slopes": (read, 2 * k + w),
        "unfold": (read + k + 9 * 4, w + 9 * 2 + 3 * 4),
    }
    assert unfold.floor == read + 9 * 4 + k + w + w + 9 * 2 + 3 * 4
    first = conv1x1_bn_unfold_traffic(*args, need_dconv_weight=False, need_dy=False)
    assert launches(first) == {"slopes": (4 * 3 * 4 + 12 * 4 + 16 + c + 2 * k, 2 * k)}
    assert launches(conv1x1_bn_update_running_traffic(4)) == {"update_running": (2 * k + 2 * 16 + 8, 2 * 16 + 8)}


def test_parts_of_a_synchronised_norm_by_hand():
    """x of 2*3*5*7 = 210 bfloat16 values, three channels, two processes."""
    t, c, mask, sent = 420, 12, 28, 8 * 7
    args = ((2, 3, 5, 7), torch.bfloat16)
    assert launches(batch_norm_statistics_traffic(*args, tiles=4)) == {
        "statistics": (t, 3 * 4 * c),
        "finalise": (3 * 4 * c, sent),
    }
    forward = batch_norm_act_apply_traffic(*args, residual=True, counter=True, parts=2)
    moved = 2 * c + 8
    assert launches(forward) == {
        "merge": (2 * sent + moved, moved + 3 * c),
        "apply": (2 * t + 2 * c + 3 * c, t + mask),
    }
    assert launches(batch_norm_act_backward_reduce_traffic(*args, mask=True, tiles=4)) == {
        "reduce": (2 * t + mask + 3 * c, 2 * 4 * c),
        "finalise": (2 * 4 * c + 2 * c, sent + 2 * c),
    }
    recomputed = batch_norm_act_backward_reduce_traffic(*args, need_affine=False)
    assert launches(recomputed) == {"reduce": (2 * t + 5 * c, 2 * c), "finalise": (4 * c, sent)}
    assert launches(batch_norm_act_backward_apply_traffic(*args, mask=True)) == {
        "coefficients": (sent + 3 * c, 2 * c),
        "apply": (2 * t + mask + c + 3 * c + 2 * c, 2 * t),
    }
    masked = batch_norm_act_backward_apply_traffic(*args, mask=True, need_dx=False)
    assert launches(masked) == {"apply": (t + mask + 3 * c, t)}


@pytest.mark.parametrize("residual", [False, True])
def test_parts_move_the_tensors_of_the_whole(residual):
    shape, dtype = (256, 256, 56, 56), torch.bfloat16
    t = 256 * 256 * 56 * 56 * 2
    there = batch_norm_statistics_traffic(shape, dtype) + batch_norm_act_apply_traffic(shape, dtype, residual=residual)
    back = batch_norm_act_backward_reduce_traffic(shape, dtype, mask=residual)
    back += batch_norm_act_backward_apply_traffic(shape, dtype, mask=residual)
    for parts, of in ((there, batch_norm_act_traffic), (back, batch_norm_act_backward_traffic)):
        whole = of(shape, dtype, residual=residual)
        assert parts.total / t == pytest.approx(whole.total / t, rel=1e-4)
        assert parts.floor <= parts.total
        assert parts.floor / t == pytest.approx(whole.floor / t, rel=1e-4)


def test_every_op_has_traffic():
    assert set(_TRAFFIC) == set(OPS)
    for name in OPS:
        namespace = torch.ops.fusedres
        assert op_of(getattr(namespace, name).default) == name == op_of(getattr(namespace, f"{name}_reference").default)
    assert op_of(torch.ops.aten.relu.default) is None


def test_an_op_without_traffic_is_an_error(monkeypatch):
    monkeypatch.delitem(_TRAFFIC, "add_act_backward")
    with pytest.raises(LookupError, match="fusedres::add_act_backward_reference has no traffic function"):
        call_traffic(torch.ops.fusedres.add_act_backward_reference.default, (torch.ones(2), torch.ones(2)))


def test_calls_are_read_by_the_schema():
    """The arguments that decide what is moved, of ops of every family."""
    ops = torch.ops.fusedres
    x = torch.empty(2, 3, 5, 7, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    v, n = torch.empty(3, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    stats, mask = torch.empty(3, 3, device="meta"), torch.empty(28, dtype=torch.uint8, device="meta")
    shape, dtype = (2, 3, 5, 7), torch.bfloat16
    statistics = (v, v, n, True, None, 1e-5)
    window = ([3, 3], [2, 2], [1, 1], [1, 1], False)
    folded, shift = torch.empty(4, 3, dtype=dtype, device="meta"), torch.empty(4, device="meta")
    out = torch.empty(2, 4, 5, 7, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
    mixing, norm = torch.empty(3, 3, dtype=dtype, device="meta"), stats
    partials, sums = torch.empty(2, 7, dtype=torch.float64, device="meta"), torch.empty(7, device="meta")
    wanted = [
        (
            (ops.batch_norm_act, x, x, v, v, *statistics, True, True),
            batch_norm_act_traffic(shape, dtype, residual=True, counter=True, cumulative=True),
        ),
        (
            (ops.batch_norm_act_backward, x, x, v, v, stats, mask, True, True, True, False, False),
            batch_norm_act_backward_traffic(shape, dtype, residual=True, need_dresidual=False, need_affine=False),
        ),
        (
            (ops.batch_norm_add_batch_norm_act, x, v, v, *statistics, x, v, v, *statistics, True),
            batch_norm_add_batch_norm_act_traffic(shape, dtype, counter=True, cumulative=True),
        ),
        (
            (ops.batch_norm_add_batch_norm_act_backward, x, *(x, v, v, stats, True) * 2, True, True, False, True, True),
            batch_norm_add_batch_norm_act_backward_traffic(shape, dtype, need_dx2=False),
        ),
        (
            (ops.batch_norm_act_max_pool, x, None, None, None, None, None, *statistics[3:], True, *window),
            batch_norm_act_max_pool_traffic(shape, dtype, affine=False, running=False),
        ),
        (
            (ops.batch_norm_act_max_pool_backward, x, x, v, v, stats, True, True, *window, True, True),
            batch_norm_act_max_pool_backward_traffic(shape, dtype),
        ),
        ((ops.add_act, x, x, True, False), add_act_traffic(shape, dtype, save_mask=False)),
        ((ops.add_act_backward, x, mask), add_act_backward_traffic(shape, dtype)),
        ((ops.batch_norm_statistics, x.contiguous()), batch_norm_statistics_traffic(shape, dtype)),
        (
            (ops.batch_norm_act_apply, x, x, partials, v, v, v, v, n, 0.1, 1e-5, True, True),
            batch_norm_act_apply_traffic(shape, dtype, residual=True, counter=True, parts=2),
        ),
        (
            (ops.batch_norm_act_backward_reduce, x, x, v, v, stats, mask, True, False),
            batch_norm_act_backward_reduce_traffic(shape, dtype, mask=True, need_affine=False),
        ),
        (
            (ops.batch_norm_act_backward_apply, x, x, v, v, stats, None, sums, True, True, False),
            batch_norm_act_backward_apply_traffic(shape, dtype),
        ),
        ((ops.conv1x1_statistics, x, folded), conv1x1_statistics_traffic(shape, 4, dtype)),
        ((ops.conv1x1_moments, x, norm, 1), conv1x1_moments_traffic(shape, dtype, norm=True)),
        (
            (ops.conv1x1_bn_act_apply, x, norm, folded, shift, 1, None, None, 1, out, mask, True, False),
            conv1x1_bn_act_apply_traffic(
                shape, 4, dtype, norm=True, residual=True, residual_mask=True, save_mask=False
            ),
        ),
        (
            (ops.conv1x1_bn_act_backward_reduce, out, mask, x, None, 2, x, 2, True, True),
            conv1x1_bn_act_backward_reduce_traffic(shape, 4, dtype, stride=2, shape2=shape, stride2=2, need_g=True),
        ),
        (
            (
                ops.conv1x1_bn_act_backward_apply,
                out,
                None,
                x,
                norm,
                folded,
                mixing,
                v,
                1,
                x,
                *(folded, mixing, v, 1),
                True,
                True,
            ),
            conv1x1_bn_act_backward_apply_traffic(shape, 4, dtype, norm=True, shape2=shape, relu=False, need_dx2=True),
        ),
        (
            (ops.conv1x1_bn_fold, folded[:, :, None, None].float(), v, v, v, mixing, None, 1e-5, 9, None, dtype),
            conv1x1_bn_fold_traffic((4, 3), dtype),
        ),
        (
            (ops.conv1x1_bn_unfold, folded, None, v, mixing, stats, v, mixing, 9, dtype, True, False),
            conv1x1_bn_unfold_traffic((4, 3), dtype, weight_dtype=dtype, param_dtype=None, need_dy=False),
        ),
        (
            (ops.conv1x1_bn_update_running, v, v, None, 0.1, stats, 9),
            conv1x1_bn_update_running_traffic(3, counter=False),
        ),
    ]
    assert {str(op).rpartition(".")[2] for (op, *_), _ in wanted} == set(OPS)
    for (op, *args), expected in wanted:
        assert call_traffic(op.default, args) == expected, op


def test_two_calls_add_up():
    there, back = (of((4, 64, 8, 8), torch.float32) for of in NORM[:2])
    both = there + back
    assert both.floor == there.floor + back.floor
    assert both.total == there.total + back.total
    assert len(both.launches) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shape": (2, 3, 4)}, "shape must be"),
        ({"shape": (2, 3, 4, -1)}, "shape must be"),
        ({"layout": "nhwc"}, "layout must be one of channels_last, contiguous"),
        ({"form": "three_pass"}, "form must be one of two_pass, one_pass"),
    ],
)
def test_bad_arguments(options, words):
    for of in NORM:
        with pytest.raises(ValueError, match=words):
            of(**({"shape": (2, 3, 4, 4), "dtype": torch.float32} | options))
