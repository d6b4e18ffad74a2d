"""Properties of the CUDA launch plans of a pooling: what csrc/common/pool_plan.h promises."""

from __future__ import annotations

import random

import pytest

_C = pytest.importorskip("fusedres._C")

SHAPES = [  # batch, channels, height, width
    *((1, 1, 1, 1), (1, 3, 1, 500), (2, 8, 500, 1), (3, 64, 56, 56), (256, 64, 56, 56), (256, 64, 112, 112)),
    *((4, 257, 7, 9), (1, 4096, 2, 2), (1 << 16, 8, 1, 1), (1, 8, 1 << 15, 1 << 15), (1, 2048, 1 << 11, 1 << 11)),
]


def random_shapes(count: int) -> list[tuple[int, int, int, int]]:
    draw = random.Random(3)
    return [tuple(int(2 ** draw.uniform(0, most)) for most in (9, 11, 9, 9)) for _ in range(count)]


def plans():
    for shape in [*SHAPES, *random_shapes(200)]:
        for channels_last in (True, False):
            for vector in (1, 2, 4, 8) if channels_last else (1,):
                for sms in (1, 4, 108, 132, 148):
                    if shape[1] % vector == 0:
                        for most in (12, 32):
                            options = {"vector": vector, "sms": sms, "most_chunks_per_sm": most}
                            yield (channels_last, *shape), options, _C.pool_plan(channels_last, *shape, **options)


def test_every_position_has_one_thread() -> None:
    for arguments, options, p in plans():
        channels_last, batch, channels, height, width = arguments
        context = (arguments, options, p)
        threads = p["threads_x"] * p["threads_y"]
        assert threads & (threads - 1) == 0, context
        assert 32 <= threads <= 128, context
        assert p["threads_w"] * p["threads_h"] == p["threads_y"], context
        assert channels_last or p["threads_x"] == 1, context

        # Patches cover an image, and none is empty; every column of one has its thread.
        assert p["columns"] <= p["threads_w"], context
        assert (p["across"] - 1) * p["columns"] < width <= p["across"] * p["columns"], context
        down = p["per_image"] // p["across"]
        assert p["per_image"] == down * p["across"], context
        assert (down - 1) * p["rows"] < height <= down * p["rows"], context
        assert p["rows"] % p["threads_h"] == 0, context

        # Chunks cover the patches, tiles the channels, and none is empty.
        assert p["patches"] == batch * p["per_image"], context
        assert (p["chunks"] - 1) * p["chunk"] < p["patches"] <= p["chunks"] * p["chunk"], context
        vectors = channels // options["vector"]
        assert (p["tiles"] - 1) * p["threads_x"] < vectors <= p["tiles"] * p["threads_x"], context


def test_sums_stay_short() -> None:
    """No thread sums more than a few dozen terms in the compute type."""
    for arguments, options, p in plans():
        assert p["chunk"] * (p["rows"] // p["threads_h"]) <= 64, (arguments, options, p)


@pytest.mark.parametrize("sms", [132, 148])
@pytest.mark.parametrize("batch", [32, 64, 256])
def test_stem_fills_the_device(batch, sms) -> None:
    """ResNet's stem in 16 bit, windows and pairs of pixels: every SM has blocks, and few threads have nothing to do."""
    for height, width in ((56, 56), (112, 56)):
        p = _C.pool_plan(True, batch, 64, height, width, vector=8, sms=sms)
        assert p["tiles"] * p["chunks"] >= 4 * sms
        assert p["threads_x"] == 8
        slots = p["patches"] * p["rows"] * p["threads_w"]
        assert batch * height * width >= 0.85 * slots


def test_refused() -> None:
    for arguments in ((0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)):
        with pytest.raises(ValueError, match="must not be empty"):
            _C.pool_plan(True, *arguments)
    with pytest.raises(ValueError, match="divide"):
        _C.pool_plan(True, 1, 3, 4, 4, vector=2)
    with pytest.raises(ValueError, match="positive"):
        _C.pool_plan(True, 1, 3, 4, 4, sms=0)
