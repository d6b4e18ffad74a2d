"""Properties of the CUDA launch plans: what csrc/common/launch_plan.h promises, for usual, random and nasty shapes."""

from __future__ import annotations

import math
import random

import pytest

_C = pytest.importorskip("fusedres._C")

SHARED_BYTES = 227 * 1024
LEAST_SHARED_BYTES = 164 * 1024  # of a multiprocessor, sm_80; a block takes one more KiB than it asks for
RESNET50 = [  # channels, height
    *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14)),
    *((512, 14), (512, 7), (2048, 7)),
]
NASTY = [  # batch, channels, area
    *((1, 1, 1), (1, 1, 2), (2, 1, 1), (1, 3, 1), (1, 1, 17), (5, 3, 7), (3, 65, 1), (2, 257, 9), (1, 1 << 20, 1)),
    *(
        (1 << 20, 1, 1),
        (1 << 15, 1, 9),
        (1, 1, 1 << 20),
        (7, 24, 49),
        (64, 2048, 49),
        (1, 100003, 3),
        (33, 31, 224 * 224),
    ),
    *((1 << 13, 64, 1 << 14), (1, 1, 1 << 33), (1 << 33, 1, 1), (1 << 20, 8191, 1), (1, 1 << 24, 1 << 9)),  # 2^33
]
DEVICES = [(132, 50 << 20), (148, 126 << 20), (108, 40 << 20), (1, 1 << 20)]


def random_shapes(count: int) -> list[tuple[int, int, int]]:
    draw = random.Random(7)
    shapes = []
    while len(shapes) < count:
        shape = tuple(int(2 ** draw.uniform(0, most)) for most in (12, 12, 18))
        if math.prod(shape) <= 1 << 33:
            shapes.append(shape)
    return shapes


def variants():
    """Plans of all directions, layouts and element sizes, with the arguments they are for."""
    for batch, channels, area in [*NASTY, *random_shapes(60), *((b, c, h * h) for b in (32, 256) for c, h in RESNET50)]:
        for channels_last in (True, False):
            for size in (2, 4, 8):
                for backward, norms in ((False, 1), (False, 2), (True, 1), (True, 2)):
                    for sms, l2_bytes in DEVICES:
                        shape = (channels_last, batch, channels, area, size)
                        options = {"backward": backward, "norms": norms, "sms": sms, "l2_bytes": l2_bytes}
                        for may_one_pass in (True, False):
                            plan = _C.launch_plan(*shape, **options, may_one_pass=may_one_pass)
                            yield (*shape, {**options, "may_one_pass": may_one_pass}), plan


def partial_columns(channels_last: bool, channels: int) -> int:
    return channels * (16 // math.gcd(channels, 16)) if channels_last else channels


def test_promises():
    """Everything that can be said without looking at elements, for every plan."""
    forms = set()
    for (channels_last, batch, channels, area, size, options), plan in variants():
        context = (channels_last, batch, channels, area, size, options, plan)
        numel, vector = batch * channels * area, plan["vector"]
        forms.add((channels_last, options["backward"], plan["form"]))
        assert vector * size == 16, context
        assert plan["columns"] == partial_columns(channels_last, channels), context

        # Rows cover the tensor, and none is empty; vectors are aligned wherever they are said to be.
        if channels_last:
            assert plan["row_length"] == plan["columns"], context
            assert (plan["rows"] - 1) * plan["row_length"] < numel <= plan["rows"] * plan["row_length"], context
            assert plan["row_length"] == plan["row_vectors"] * vector, context
            assert plan["row_length"] * size % 16 == 0, context
            height, tiles = plan["rows"], -(-plan["row_vectors"] // plan["threads_x"])
        else:
            assert (plan["rows"], plan["row_length"]) == (batch, area), context
            assert area <= plan["row_vectors"] * vector < area + 16, context
            height, tiles = batch * plan["row_vectors"], channels
            assert plan["threads_x"] == 1, context
        assert plan["row_vectors"] * vector % 16 == 0, context  # whole words of the mask
        assert plan["threads_x"] * vector % 8 == 0 or not channels_last, context  # whole bytes of it
        assert plan["threads_y"] * vector % 8 == 0 or channels_last, context

        # Tiles and chunks cover the rows exactly once, and no block is empty.
        assert plan["tiles"] == tiles, context
        assert plan["threads"] == plan["threads_x"] * plan["threads_y"] <= 512, context
        assert plan["threads"] % 32 == 0, context
        for name in ("reduce", "apply"):
            step = plan[name]
            assert (step["chunks"] - 1) * step["chunk"] < height <= step["chunks"] * step["chunk"], context
            assert step["blocks"] == tiles * step["chunks"] < 1 << 31, context
            assert 0 < step["shared_bytes"] <= SHARED_BYTES, context

        # Workspace, by its definition: partial sums, and two numbers per channel that dx needs.
        wide, norms, backward = max(size, 4), options["norms"], options["backward"]
        if plan["form"] == "one_pass":
            assert options["may_one_pass"], context
            assert plan["reduce"]["chunks"] == 1, context
            assert plan["workspace_bytes"] == plan["partial_bytes"] == plan["finish_blocks"] == 0, context
            assert (plan["slab_vectors"] - 1) * plan["threads_y"] < height, context
            assert height <= plan["slab_vectors"] * plan["threads_y"], context
            slab = plan["slab_vectors"] * plan["threads"] * 16 * (norms + backward)
            assert slab < plan["apply"]["shared_bytes"], context
            assert not plan["reverse"], context
        else:
            quantities = 1 + norms if backward else 3 * norms
            partial = wide * quantities * plan["reduce"]["chunks"] * plan["columns"]
            assert plan["partial_bytes"] == partial, context
            assert plan["workspace_bytes"] == partial + (wide * 2 * norms * channels if backward else 0), context
            assert plan["finish_blocks"] == -(-channels // 8), context
            assert plan["finish_threads"] % 32 == 0, context
            assert plan["finish_threads"] <= 1024, context
            for name, per_sm in (("reduce", 5), ("apply", 6)):  # as many as the launch bounds ask for
                assert per_sm * (plan[name]["shared_bytes"] + 1024) <= LEAST_SHARED_BYTES, context
            for name, most in (("reduce", 64), ("apply", 32)):  # sums in float32 stay short
                assert plan[name]["chunk"] % plan["threads_y"] == 0, context
                assert plan[name]["chunk"] <= most * plan["threads_y"], context
            assert plan["reverse"], context
        assert plan["fits_l2"] == (numel * size * (norms + backward) <= options["l2_bytes"]), context
    assert len(forms) == 8  # both forms occur in both layouts and directions


@pytest.mark.parametrize("sms", [132, 148])
@pytest.mark.parametrize("channels_last", [True, False])
def test_large_tensors_fill_the_gpu(sms, channels_last):
    for batch in (64, 256):
        for channels, height in RESNET50:
            for size in (2, 4):
                if batch * channels * height**2 * size < 8 << 20:
                    continue
                for backward, norms in ((False, 1), (True, 1), (True, 2)):
                    plan = _C.launch_plan(
                        channels_last, batch, channels, height**2, size, backward=backward, norms=norms, sms=sms
                    )
                    if plan["form"] == "one_pass":  # one block per slab, of which an SM takes one
                        assert plan["reduce"]["blocks"] >= 64
                        continue
                    for step in ("reduce", "apply"):
                        blocks = plan[step]["blocks"]
                        assert blocks >= sms, (batch, channels, height, size, backward, norms, step, plan)
                        # The last of the waves is not nearly empty.
                        per_sm = 4 if norms == 2 else 5 if backward or step == "reduce" else 6
                        slots = sms * per_sm
                        if channels_last and batch * channels * height**2 * size >= 64 << 20:
                            assert blocks / (-(-blocks // slots) * slots) > 0.8, (batch, channels, height, step, plan)


def walk(plan: dict, channels_last: bool, shape: tuple[int, int, int], step: dict):
    """(offset, first bit of the mask, elements) of every vector, as csrc/cuda/tile.h takes them."""
    batch, channels, area = shape
    numel, vector = batch * channels * area, plan["vector"]
    for block in range(step["blocks"]):
        chunk, tile = divmod(block, plan["tiles"])
        begin = chunk * step["chunk"]
        for thread in range(plan["threads"]):
            y, x = divmod(thread, plan["threads_x"])
            if channels_last:
                column = tile * plan["threads_x"] + x
                if column >= plan["row_vectors"]:
                    continue
                for row in range(begin + y, min(begin + step["chunk"], plan["rows"]), plan["threads_y"]):
                    offset = row * plan["row_length"] + column * vector
                    yield offset, offset, max(0, min(vector, numel - offset))
            else:
                end = min(begin + step["chunk"], plan["rows"] * plan["row_vectors"])
                for position in range(begin + y, end, plan["threads_y"]):
                    row, column = divmod(position, plan["row_vectors"])
                    plane = row * channels + tile
                    bit = (plane * plan["row_vectors"] + column) * vector
                    yield plane * area + column * vector, bit, max(0, min(vector, area - column * vector))


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("channels_last", [True, False])
def test_every_element_and_mask_bit_once(channels_last, size):
    for shape in ((1, 1, 1), (2, 3, 5), (3, 17, 4), (2, 65, 9), (4, 16, 49), (5, 24, 12), (1, 257, 3), (64, 8, 64)):
        for options in ({}, {"may_one_pass": False}, {"may_one_pass": False, "sms": 1}, {"backward": True}):
            plan = _C.launch_plan(channels_last, *shape, size, **options)
            batch, channels, area = shape
            numel = math.prod(shape)
            words = -(-numel // 16) if channels_last else batch * channels * -(-area // 16)
            for name in ("reduce", "apply"):
                elements, bits = [0] * numel, set()
                for offset, bit, valid in walk(plan, channels_last, shape, plan[name]):
                    for i in range(offset, offset + valid):
                        elements[i] += 1
                    if valid == plan["vector"] and (channels_last or area % plan["vector"] == 0):
                        assert offset * size % 16 == 0
                    if bit < words * 16:
                        assert bit not in bits
                        bits.add(bit)
                assert elements == [1] * numel, (shape, options, name)
                assert len(bits) * plan["vector"] == words * 16, (shape, options, name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 0}, "empty"),
        ({"channels": 0}, "empty"),
        ({"area": 0}, "empty"),
        ({"element_size": 3}, "element_size"),
        ({"norms": 3}, "norms"),
        ({"sms": 0}, "sms"),
    ],
)
def test_impossible_problems(changes, words):
    problem = {"channels_last": True, "batch": 1, "channels": 1, "area": 1, "element_size": 4, **changes}
    with pytest.raises(ValueError, match=words):
        _C.launch_plan(**problem)
