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
from fusedres.ops.conv1x1_bn_act import (
    conv1x1_bn_act_apply_traffic,
    conv1x1_bn_act_backward_apply_traffic,
    conv1x1_bn_act_backward_reduce_traffic,
    conv1x1_bn_fold_traffic,
    conv1x1_bn_unfold_traffic,
    conv1x1_bn_update_running_traffic,
    conv1x1_moments_traffic,
)

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
    assert launches(conv1x1_bn_act_apply_traffic(*args, **first, residual=True)) == {
        "apply": (y + weight + shift + out, out + mask)
    }
    assert launches(conv1x1_bn_act_apply_traffic(*args, **second, save_mask=False)) == {
        "apply": (y + weight + y2 + weight2 + shift, out)
    }
    assert launches(conv1x1_bn_act_backward_reduce_traffic(*args, **first, need_g=True)) == {
        "reduce": (out + mask + y, out + 8 * (4 + 4 * 3))
    }
    assert launches(conv1x1_bn_act_backward_reduce_traffic(*args, **second, relu=False)) == {
        "reduce": (out + y + y2, 8 * (4 + 4 * 3 + 4 * 5))
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
    read = w + 12 * 8 + c + 2 * k
    assert launches(unfold) == {
        "slopes": (read, 2 * k + w),
        "unfold": (read + k + 9 * 4, w + 9 * 2 + 3 * 4),
    }
    assert unfold.floor == read + 9 * 4 + k + w + w + 9 * 2 + 3 * 4
    first = conv1x1_bn_unfold_traffic(*args, need_dconv_weight=False, need_dy=False)
    assert launches(first) == {"slopes": (4 * 3 * 4 + 12 * 8 + 16 + c + 2 * k, 2 * k)}
    assert launches(conv1x1_bn_update_running_traffic(4)) == {"update_running": (2 * k + 2 * 16 + 8, 2 * 16 + 8)}


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
