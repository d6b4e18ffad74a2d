"""The four passes of a folded 1x1 convolution over pixels: the C++ kernels against the reference of the same op."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedres
from fusedres import functional as F
from fusedres.ops import conv1x1_bn_act as family
from fusedres.ops import registry
from fusedres.ops.layout import pack_mask

CHANNELS_LAST = torch.channels_last
PASSES = (
    family.CONV1X1_MOMENTS,
    family.CONV1X1_BN_ACT_APPLY,
    family.CONV1X1_BN_ACT_BACKWARD_REDUCE,
    family.CONV1X1_BN_ACT_BACKWARD_APPLY,
)
pytestmark = pytest.mark.skipif(any(op.cpu is None for op in PASSES), reason="no C++ kernels")
MOMENTS, APPLY, REDUCE, BACKWARD_APPLY = PASSES

dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch.")
)
# y's shape, and the channels of the output: whole vectors and panels, and what is left of them
SIZES = [
    ((2, 1, 5, 7), 1),
    ((3, 3, 6, 5), 7),
    ((1, 16, 1, 1), 16),
    ((2, 16, 9, 7), 33),
    ((5, 64, 7, 11), 256),
    ((2, 64, 12, 12), 65),
    ((3, 65, 7, 7), 20),
    ((2, 128, 9, 9), 96),
]
sizes = pytest.mark.parametrize(
    ("shape", "channels"), SIZES, ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else str(v)
)
normalised = pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])


@pytest.fixture(autouse=True, params=["cpu"])
def _forced(request: pytest.FixtureRequest):
    with fusedres.use_backend(request.param):
        yield


class Operands:
    """Tensors of the four passes. What is normalised comes out exactly, so that every zero of it is one."""

    def __init__(self, shape: tuple[int, ...], channels: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(0)
        n, c, h, w = shape
        self.dtype, self.wide, self.shape = dtype, family.wide_dtype(dtype), shape
        self.out_shape = (n, channels, h, w)
        self.y = self._image(*shape, eighths=True)
        self.y2 = self._image(n, 4, h, w)
        self.dy, self.residual = self._image(*self.out_shape), self._image(*self.out_shape)
        self.mask, self.residual_mask = (pack_mask(self._image(*self.out_shape) > 0) for _ in range(2))
        matrices = [(channels, c), (channels, 4), (c, c), (4, 4)]
        self.folded, self.folded2, self.mixing, self.mixing2 = (self._normal(*s).to(dtype) for s in matrices)
        self.shift, self.offset, self.offset2 = (self._normal(s).to(self.wide) for s in (channels, c, 4))
        mean, shift = (torch.randint(-8, 9, (c,), generator=self.generator) / 8 for _ in range(2))
        scale = torch.tensor([0.5, 1.0, -1.0, 2.0])[torch.randint(4, (c,), generator=self.generator)]
        self.norm = torch.stack([mean, scale, shift]).to(self.wide)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def _image(self, *shape: int, eighths: bool = False) -> Tensor:
        values = torch.randint(-24, 25, shape, generator=self.generator) / 8 if eighths else self._normal(*shape)
        return values.to(self.dtype).contiguous(memory_format=CHANNELS_LAST)

    def activation(self) -> Tensor:
        """As batch_norm_act writes it."""
        mean, scale, shift = self.norm
        return F.batch_norm_act(self.y, mean, torch.ones_like(mean), scale, shift, training=False, eps=0.0)


def _compare(op: registry.Op, dtype: torch.dtype, *args: Any, terms: float = 1.0) -> tuple[Tensor, ...]:
    """Ours, where it is within rounding of the reference: of ``dtype``, and of sums of ``terms`` times the largest."""
    got, want = op.cpu(*args), op.reference(*args)
    sums = 2.0**-46 if dtype == torch.float64 else 2.0**-19
    for ours, theirs in zip(got, want, strict=True):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        if ours.dtype == torch.uint8:
            continue
        eps = sums if ours.dtype == torch.float64 else max(torch.finfo(ours.dtype).eps, sums)
        if ours.numel():
            assert (ours.double() - theirs).abs().max() <= eps * terms * max(1.0, theirs.abs().max().item())
    return got


@sizes
@dtypes
@normalised
def test_moments(shape, channels, dtype, norm) -> None:
    o = Operands(shape, channels, dtype)
    _compare(MOMENTS, dtype, o.y, o.norm if norm else None, 1, terms=4.0)


def test_moments_of_a_large_mean() -> None:
    """float32 is summed about samples of the activation, not of what is normalised."""
    o = Operands((8, 16, 14, 14), 1, torch.float32)
    o.norm[2] += 2.0**14
    _, cov = MOMENTS.cpu(o.y, o.norm, 1)
    _, want = MOMENTS.reference(o.y, o.norm, 1)
    torch.testing.assert_close(cov, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


@sizes
@dtypes
def test_statistics(shape, channels, dtype) -> None:
    """Of what was stored: those of batch_norm_statistics, to float32's rounding within blocks."""
    o = Operands(shape, channels, dtype)
    out, partial = family.CONV1X1_STATISTICS.cpu(o.y + 3, o.folded)
    want, _ = family.CONV1X1_STATISTICS.reference(o.y + 3, o.folded)
    assert out.stride() == want.stride()
    eps = max(torch.finfo(dtype).eps, 2.0**-46 if dtype == torch.float64 else 2.0**-19)
    assert (out.double() - want).abs().max() <= eps * want.abs().max()
    mean, m2, count = torch.ops.fusedres.batch_norm_statistics_reference(out).split([channels, channels, 1])
    got_mean, got_m2, got_count = partial.split([channels, channels, 1])
    wide = torch.finfo(o.wide).eps
    assert got_count == count
    torch.testing.assert_close(got_mean, mean, rtol=8 * wide, atol=8 * wide * mean.abs().max().item())
    torch.testing.assert_close(got_m2, m2, rtol=64 * wide, atol=64 * wide * m2.max().item())


def test_statistics_of_a_large_mean_and_of_infinity() -> None:
    x = torch.randn(4, 8, 30, 30).contiguous(memory_format=CHANNELS_LAST)
    w = torch.rand(16, 8) + 1000 * (torch.arange(8) == 7)
    x[:, 7] = 1.0
    for value in (1.0, float("inf"), float("nan")):
        x[0, 0, 3, 3] = value
        out, partial = family.CONV1X1_STATISTICS.cpu(x, w)
        want = torch.ops.fusedres.batch_norm_statistics_reference(out)
        torch.testing.assert_close(partial, want, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert out[1].mean() > 900


@sizes
@dtypes
@normalised
@pytest.mark.parametrize("addend", ["none", "residual", "masked residual", "pair"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
def test_apply(shape, channels, dtype, norm, addend, relu) -> None:
    o = Operands(shape, channels, dtype)
    args = [o.y, o.norm if norm else None, o.folded, o.shift, 1, None, None, 1, None, None, relu, True]
    if addend == "pair":
        args[5:8] = o.y2, o.folded2, 1
    elif addend != "none":
        args[8:10] = o.residual, o.residual_mask if "masked" in addend else None
    out, mask = _compare(APPLY, dtype, *args, terms=2.0)
    assert torch.equal(mask, pack_mask(~(out <= 0)))
    again, nothing = APPLY.cpu(*args[:-1], False)
    assert torch.equal(out, again)
    assert nothing.numel() == 0


@sizes
@dtypes
@normalised
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
def test_backward_reduce(shape, channels, dtype, norm, masked) -> None:
    o = Operands(shape, channels, dtype)
    args = [o.dy, o.mask if masked else None, o.y, o.norm if norm else None, 1]
    for second in ((o.y2, 1), (None, 1)):
        _compare(REDUCE, dtype, *args, *second, masked, True, terms=4.0)
    _compare(REDUCE, dtype, *args, None, 1, False, False, terms=4.0)


@sizes
@dtypes
@normalised
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
def test_backward_apply(shape, channels, dtype, norm, masked) -> None:
    o = Operands(shape, channels, dtype)
    first = (o.dy, o.mask if masked else None, o.y, o.norm if norm else None, o.folded, o.mixing, o.offset, 1)
    second = (o.y2, o.folded2, o.mixing2, o.offset2, 1)
    both = BACKWARD_APPLY.cpu(*first, *second, True, True)
    want = BACKWARD_APPLY.reference(*first, *second, True, True)
    only = BACKWARD_APPLY.cpu(*first, None, None, None, None, 1, True, False)
    none = BACKWARD_APPLY.cpu(*first, *second, False, True)
    assert torch.equal(both[0], only[0])
    assert torch.equal(both[2], only[2])
    assert torch.equal(both[1], none[1])
    assert [t.numel() for t in (only[1], none[0], none[2])] == [0, 0, 0]
    for ours, theirs in zip(both[:2], want[:2], strict=True):
        eps = max(torch.finfo(dtype).eps, 2.0**-46 if dtype == torch.float64 else 2.0**-19)
        assert ours.stride() == theirs.stride()
        assert (ours.double() - theirs).abs().max() <= 2 * eps * theirs.abs().max()
    dx, _, sums = both
    if not norm:
        assert sums.shape == (0,)
        return
    assert torch.equal(dx.where(o.activation() <= 0, 0.0), torch.zeros_like(dx))
    rows, centred = dx.double(), (o.y.to(o.wide) - o.norm[0].view(-1, 1, 1)).double()
    exact = torch.stack([rows.sum((0, 2, 3)), (rows * centred).sum((0, 2, 3))])
    terms = torch.stack([rows.abs().sum((0, 2, 3)), (rows * centred).abs().sum((0, 2, 3))])
    assert sums.dtype == torch.float64
    assert ((sums - exact).abs() <= (2.0**-46 if dtype == torch.float64 else 2.0**-21) * terms).all()


@sizes
@dtypes
def test_every_pass_reads_what_batch_norm_act_writes(shape, channels, dtype) -> None:
    """To the bit, whatever the numbers."""
    o = Operands(shape, channels, dtype)
    o.y = (o.y.double() + torch.randn(shape, generator=o.generator, dtype=torch.float64)).to(dtype)
    o.y = o.y.contiguous(memory_format=CHANNELS_LAST)
    o.norm = torch.randn(o.norm.shape, generator=o.generator, dtype=torch.float64).to(o.wide)
    written = o.activation()
    for op, before, after in (
        (APPLY, (), (o.folded, o.shift, 1, None, None, 1, o.residual, o.residual_mask, True, True)),
        (REDUCE, (o.dy, o.mask), (1, None, 1, False, True)),
        (MOMENTS, (), (1,)),
        (BACKWARD_APPLY, (o.dy, o.mask), (o.folded, o.mixing, o.offset, 1, None, None, None, None, 1, True, False)),
    ):
        got, want = op.cpu(*before, o.y, o.norm, *after), op.cpu(*before, written, None, *after)
        if op is BACKWARD_APPLY:
            dx, want_dx = got[0], want[0].where(~(written <= 0), 0.0)
            got, want = (dx,), (want_dx,)
        for ours, theirs in zip(got, want, strict=True):
            if dtype.itemsize == 2 or op is APPLY:
                assert torch.equal(ours, theirs)
            else:  # sums about samples of the activation, which need not be so exact
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(
                    ours, theirs, rtol=eps, atol=64 * eps * theirs.abs().max().item() if theirs.numel() else 0
                )


@dtypes
def test_not_a_number(dtype) -> None:
    """NaN passes the ReLU of what is normalised, forward and backward; an infinity is one, or nothing."""
    o = Operands((2, 24, 4, 4), 32, dtype)
    o.norm[1] = 1.0
    o.y[0, 5, 1, 1], o.y[1, 7, 2, 2], o.y[1, 9, 3, 3] = float("nan"), float("inf"), float("-inf")
    folded = torch.ones_like(o.folded)
    out, _ = APPLY.cpu(o.y, o.norm, folded, o.shift, 1, None, None, 1, None, None, True, False)
    assert out[0, :, 1, 1].isnan().all()
    assert (out[1, :, 2, 2] == float("inf")).all()
    assert out[1, :, 3, 3].isfinite().all()
    args = (folded, torch.zeros_like(o.mixing), o.offset, 1, None, None, None, None, 1, True, False)
    dx, _, sums = BACKWARD_APPLY.cpu(o.dy, None, o.y, o.norm, *args)
    assert dx[0, 5, 1, 1].isnan()
    assert dx[1, 9, 3, 3] == 0 or dx[1, 9, 3, 3].isnan()
    assert sums[:, 5].isnan().all()
    mean, cov = MOMENTS.cpu(o.y, o.norm, 1)
    assert mean[5].isnan()
    assert cov[5].isnan().all()
    _, _, products, _ = REDUCE.cpu(o.dy, None, o.y, o.norm, 1, None, 1, False, True)
    assert products[:, 5].isnan().all()
    assert products[:, 9].isfinite().all()


@pytest.mark.parametrize(("shape", "channels"), [((4, 64, 30, 31), 96), ((4, 63, 30, 31), 95)], ids=["whole", "rest"])
@dtypes
def test_bits_depend_neither_on_run_nor_on_threads(shape, channels, dtype) -> None:
    o = Operands(shape, channels, dtype)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        pair = (None, None, None, None, 1)
        results.append(
            [
                *MOMENTS.cpu(o.y, o.norm, 1),
                *family.CONV1X1_STATISTICS.cpu(o.y, o.folded),
                *APPLY.cpu(o.y, o.norm, o.folded, o.shift, 1, None, None, 1, o.residual, o.residual_mask, True, True),
                *REDUCE.cpu(o.dy, o.mask, o.y, o.norm, 1, None, 1, True, True),
                *BACKWARD_APPLY.cpu(o.dy, o.mask, o.y, o.norm, o.folded, o.mixing, o.offset, 1, *pair, True, False),
            ]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def _calls(o: Operands, norm: Tensor | None, stride: int = 1) -> list[Callable[[], Any]]:
    pair = (None, None, None, None, 1)
    dy = o.dy[:, :, ::stride, ::stride].contiguous(memory_format=CHANNELS_LAST)
    return [
        lambda: MOMENTS.cpu(o.y, norm, stride),
        lambda: APPLY.cpu(o.y, norm, o.folded, o.shift, stride, None, None, 1, None, None, True, True),
        lambda: REDUCE.cpu(dy, None, o.y, norm, stride, None, 1, False, True),
        lambda: BACKWARD_APPLY.cpu(dy, None, o.y, norm, o.folded, o.mixing, o.offset, stride, *pair, True, False),
    ]


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
def test_fake_kernels(norm, record_ops) -> None:
    o = Operands((2, 8, 6, 6), 16, torch.float32)
    with record_ops() as record:
        for call in _calls(o, o.norm if norm else None):
            call()
    for op, args, *_ in record.calls:
        if op.namespace == "fusedres":
            torch.library.opcheck(op, args)


@pytest.mark.parametrize("index", range(4), ids=[op.name for op in PASSES])
def test_bad_norms_raise(index) -> None:
    o = Operands((2, 8, 6, 6), 16, torch.float32)
    _calls(o, o.norm)[index]()
    _calls(o, None, stride=2)[index]()
    with pytest.raises(RuntimeError, match="stride"):
        _calls(o, o.norm, stride=2)[index]()
    for bad in (o.norm.double(), o.norm[:2], o.norm[:, :7], o.norm[0], o.norm.T.contiguous().T, o.norm.bfloat16()):
        with pytest.raises(RuntimeError, match="norm must be"):
            _calls(o, bad)[index]()


def test_bad_residual_masks_raise() -> None:
    o = Operands((2, 8, 6, 6), 16, torch.float32)

    def call(residual: Tensor | None, residual_mask: Tensor | None) -> None:
        APPLY.cpu(o.y, None, o.folded, o.shift, 1, None, None, 1, residual, residual_mask, True, True)

    call(o.residual, o.residual_mask)
    with pytest.raises(RuntimeError, match="residual_mask goes with residual"):
        call(None, o.residual_mask)
    for bad in (o.residual_mask[:-2], o.residual_mask.to(torch.int8), o.residual_mask.repeat(2)[::2]):
        with pytest.raises(RuntimeError, match="mask"):
            call(o.residual, bad)


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_cpu_capabilities(capability) -> None:
    """All of the above with the kernels of every instruction set that this machine has."""
    order = ["baseline", "avx2", "avx512"]
    if registry.CPU_CAPABILITY not in order[order.index(capability) + 1 :]:
        pytest.skip(f"this process has {registry.CPU_CAPABILITY}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not capabilities", __file__]
    environ = {**os.environ, "FUSEDRES_CPU_CAPABILITY": capability}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
