"""The Triton kernels of conv1x1_bn_act in Triton's interpreter, against its formulas in float64.

Not collected by name: test_interpreted.py runs it in a process with TRITON_INTERPRET=1. What is uninitialised is NaN,
and every access of a launch must lie in its tensors.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusedres.kernels import common
from fusedres.kernels import conv1x1_bn_act as kernels
from fusedres.ops.layout import pack_mask, unpack_mask

sys.path.insert(0, str(Path(__file__).parent))
from byte_counter import Launch, count_bytes

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
# (N, C, H, W), K, stride: whole tiles and tails, masks whose rows do not end with bytes, one pixel, one channel
SHAPES = [
    ((2, 32, 4, 8), 32, 1),
    ((3, 24, 5, 7), 40, 2),
    ((1, 17, 9, 6), 33, 1),
    ((2, 33, 7, 5), 19, 2),
    ((2, 16, 8, 7), 8, 3),
    ((1, 1, 1, 1), 3, 1),
    ((1, 40, 1, 1), 1, 2),
]
CASES = [(*shape, dtype) for i, shape in enumerate(SHAPES) for dtype in list(DTYPES)[i % 2 : None : 2]]
CASES += [(*SHAPES[2], "bf16")]
# (N, C, H, W), stride, C2, height and width of y2, stride2, K, dtype
PAIRS = [
    ((2, 16, 4, 4), 1, 32, (8, 8), 2, 32, "bf16"),
    ((2, 17, 3, 4), 1, 24, (6, 7), 2, 20, "f32"),
    ((1, 24, 5, 5), 2, 9, (3, 3), 1, 40, "f16"),
    ((2, 8, 3, 3), 1, 8, (3, 3), 1, 16, "f64"),
]


@pytest.fixture(autouse=True)
def _poison():
    torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Many tiles and chunks of rows of a small tensor."""
    rows, columns = kernels.Tile(16, 32, 16, 128, 1, pieces=2), kernels.Tile(16, 16, 16, 128, 1)
    for table, tile in (("APPLY", rows), ("BACKWARD", rows), ("MOMENTS", columns), ("REDUCE", columns)):
        monkeypatch.setattr(kernels, f"{table}_TILES", {("other", size): (tile, tile) for size in (2, 4, 8)})
    monkeypatch.setattr(kernels, "MOMENTS_CHUNK_ROWS", 32)
    monkeypatch.setattr(kernels, "REDUCE_CHUNK_ROWS", 32)
    monkeypatch.setattr(kernels, "ODD_TILE", columns)
    monkeypatch.setattr(kernels, "COMBINE_PARTS", 2)
    monkeypatch.setattr(kernels, "COMBINE_ELEMENTS", 64)
    monkeypatch.setattr(common, "INTERPRETED_DEVICE", common.Device(8, 1 << 20, "90"))
    yield
    kernels._chunk_rows.cache_clear()


def image(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.5) -> Tensor:
    return (torch.randn(shape) + mean).to(dtype).contiguous(memory_format=torch.channels_last)


def matrix(x: Tensor, stride: int = 1) -> Tensor:
    """Rows of pixels, float64."""
    return x[:, :, ::stride, ::stride].permute(0, 2, 3, 1).reshape(-1, x.size(1)).double()


def assert_rounded(got: Tensor, want: Tensor, scale: Tensor) -> None:
    """One rounding away from float64, and some of the accumulator; ``scale`` is of what was added up."""
    bound = torch.finfo(got.dtype).eps / 2 * want.abs() + 1e-6 * scale
    if got.dtype == torch.float64:
        bound = 1e-14 * scale
    assert torch.isfinite(got).all()
    assert ((got.double() - want).abs() <= bound + torch.finfo(got.dtype).tiny).all()


def assert_summed(got: Tensor, want: Tensor, scale: Tensor, exact: bool) -> None:
    assert got.shape == want.shape
    assert got.dtype == torch.float64
    assert ((got - want).abs() <= (1e-14 if exact else 5e-7) * scale).all()


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def twice(call):
    """Results of a call that must give the same bits again, and its launches."""
    with count_bytes() as launches:
        results = call()
    for got, again in zip(results, call(), strict=True):
        assert torch.equal(got, again)
    return results, launches


def of(launches: list[Launch], kernel: str) -> Launch:
    (found,) = (launch for launch in launches if launch.kernel == kernel)
    return found


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def pixels(y: Tensor, stride: int) -> int:
    """Bytes of the pixels that a stride takes."""
    return nbytes(y[:, :, ::stride, ::stride])


def splits_of(partial: Launch, products: int, columns: int, size: int) -> int:
    """Chunks of rows, from what a launch stored beside them."""
    splits, rest = divmod(partial.stores, products * size + columns * 8)
    assert rest == 0
    return splits


@pytest.mark.parametrize(("shape", "k", "stride", "dtype"), CASES, ids=str)
def test_moments(shape, k, stride, dtype):
    dtype = DTYPES[dtype]
    y = image(shape, dtype, 100.0 if dtype == torch.float32 else 0.5)
    (mean, cov), launches = twice(lambda: kernels.conv1x1_moments(y, stride))
    rows = matrix(y, stride)
    centred, exact = rows - rows.mean(0), dtype in (torch.float32, torch.float64)
    assert_summed(mean, rows.mean(0), rows.abs().mean(0), True)
    assert_summed(cov, centred.T @ centred, rows.abs().T @ rows.abs(), exact)  # float32: on float64 tensor cores
    assert torch.equal(cov, cov.T)
    n, c = rows.shape
    gemm, combine = of(launches, "_columns_kernel"), of(launches, "_combine_kernel")
    assert gemm.loads == pixels(y, stride)
    # of the upper tiles of 16 columns, which a float32 accumulator for 16 bits and else a float64 one leaves
    size, blocks = 8 if exact else 4, [min(16, c - i) for i in range(0, c, 16)]
    upper = sum(a * b for i, a in enumerate(blocks) for b in blocks[i:])
    splits = splits_of(gemm, upper, c, size)
    assert splits > 1 or n <= 32
    assert combine.loads == splits * (c * (c + 1) // 2 * size + c * 8)
    assert combine.stores == nbytes(mean, cov)


@pytest.mark.parametrize("shape", [(2, 20, 9, 8), (1, 16, 3, 5)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_moments_without_float64_tensor_cores(monkeypatch, shape, stride):
    """float32 is shifted by some mean: at 100 standard deviations it is as good as at 1."""
    monkeypatch.setattr(common, "INTERPRETED_DEVICE", common.Device(8, 1 << 20, "89"))
    y = image(shape, torch.float32, 100.0)
    (mean, cov), launches = twice(lambda: kernels.conv1x1_moments(y, stride))
    rows = matrix(y, stride)
    centred = rows - rows.mean(0)
    assert_summed(mean, rows.mean(0), rows.abs().mean(0) / 100, False)
    shifted = (rows - rows[:128].float().mean(0).bfloat16().double()).abs()
    assert_summed(cov, centred.T @ centred, shifted.T @ shifted, False)
    assert torch.equal(cov, cov.T)
    assert of(launches, "_columns_kernel").loads == pixels(y, stride) + 4 * shape[1]
    assert of(launches, "_origin_kernel").stores == 4 * shape[1]


def check_apply(y, k, stride, y2, stride2, residual, relu, save_mask):
    dtype = y.dtype
    folded = torch.randn(k, y.size(1)).to(dtype)
    folded2 = None if y2 is None else torch.randn(k, y2.size(1)).to(dtype)
    shift = torch.randn(k).to(wide(dtype))
    (out, mask), launches = twice(
        lambda: kernels.conv1x1_bn_act_apply(y, folded, shift, stride, y2, folded2, stride2, residual, relu, save_mask)
    )
    rows = matrix(y, stride)
    want, scale = rows @ folded.double().T + shift.double(), rows.abs() @ folded.double().T.abs() + shift.abs()
    if y2 is not None:
        rows2 = matrix(y2, stride2)
        want, scale = want + rows2 @ folded2.double().T, scale + rows2.abs() @ folded2.double().T.abs()
    if residual is not None:
        want, scale = want + matrix(residual), scale + matrix(residual).abs()
    n, _, h, w = y[:, :, ::stride, ::stride].shape
    assert out.shape == (n, k, h, w)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_rounded(matrix(out).to(dtype), want.relu() if relu else want, scale)
    assert torch.equal(mask, pack_mask(~(out <= 0)) if save_mask else mask.new_empty(0))
    gemm = of(launches, "_rows_kernel")
    assert gemm.loads == pixels(y, stride) + (0 if y2 is None else pixels(y2, stride2)) + nbytes(
        folded, folded2, shift, residual
    )
    own_mask = save_mask and k % 8 == 0
    assert gemm.stores == nbytes(out) + own_mask * mask.numel()
    if save_mask and not own_mask:
        of(launches, "_mask_kernel")


@pytest.mark.parametrize(("shape", "k", "stride", "dtype"), CASES, ids=str)
def test_apply(shape, k, stride, dtype):
    y = image(shape, DTYPES[dtype])
    n, _, h, w = y[:, :, ::stride, ::stride].shape
    for with_residual, relu, save_mask in ((True, True, True), (False, stride == 1, stride != 1)):
        residual = image((n, k, h, w), y.dtype) if with_residual else None
        check_apply(y, k, stride, None, 1, residual, relu, save_mask)


@pytest.mark.parametrize(("shape", "stride", "c2", "size2", "stride2", "k", "dtype"), PAIRS, ids=str)
def test_apply_pair(shape, stride, c2, size2, stride2, k, dtype):
    y, y2 = image(shape, DTYPES[dtype]), image((shape[0], c2, *size2), DTYPES[dtype])
    check_apply(y, k, stride, y2, stride2, None, True, True)


def test_nan_passes_the_relu():
    y = image((1, 16, 2, 3), torch.bfloat16)
    y[0, 3, 1, 1] = float("nan")
    folded, shift = torch.randn(16, 16).bfloat16(), torch.zeros(16)
    out, mask = kernels.conv1x1_bn_act_apply(y, folded, shift, 1, None, None, 1, None, True, True)
    assert out[0, :, 1, 1].isnan().all()
    assert out.isnan().sum() == 16
    assert torch.equal(mask, pack_mask(~(out <= 0)))


def gradient(y: Tensor, k: int, stride: int, with_mask: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """dy, mask, and g as rows."""
    n, _, h, w = y[:, :, ::stride, ::stride].shape
    dy = image((n, k, h, w), y.dtype, 0.1)
    mask = pack_mask(image((n, k, h, w), torch.float32, 0.0) > 0) if with_mask else None
    if mask is None:
        return dy, None, matrix(dy)
    return dy, mask, torch.where(unpack_mask(mask, dy), dy, 0)


def check_reduce(y, k, stride, y2, stride2, with_mask, need_g, need_products):
    exact = y.dtype == torch.float64
    dy, mask, want_g = gradient(y, k, stride, with_mask)
    (g, sum_g, products, products2), launches = twice(
        lambda: kernels.conv1x1_bn_act_backward_reduce(dy, mask, y, stride, y2, stride2, need_g, need_products)
    )
    if need_g:
        assert torch.equal(g, want_g)
        assert g.stride() == dy.stride()
    else:
        assert g.numel() == 0
    rows = matrix(want_g) if with_mask else want_g
    assert_summed(sum_g, rows.sum(0), rows.abs().sum(0), exact)
    operands = [(y, stride, products), (y2, stride2, products2)]
    for operand, by, got in operands:
        if operand is None or not need_products:
            assert got.shape == (0,)
            continue
        other = matrix(operand, by)
        assert_summed(got, rows.T @ other, rows.abs().T @ other.abs(), exact)
    gemm, combine = of(launches, "_columns_kernel"), of(launches, "_combine_kernel")
    # where rows do not end with bytes, the last byte of the words is no element's
    read_mask = 0 if mask is None else -(-dy.numel() // 8)
    inner = sum(operand.size(1) for operand, *_ in operands if operand is not None) if need_products else 0
    read = sum(pixels(operand, by) for operand, by, _ in operands if operand is not None) if need_products else 0
    assert gemm.loads == nbytes(dy) + read_mask + read
    left = gemm.stores - (nbytes(dy) if need_g else 0)
    per_split = k * (inner * (8 if exact else 4) + 8)
    assert left % per_split == 0
    assert combine.loads == left
    assert combine.stores == nbytes(sum_g, products, products2)


@pytest.mark.parametrize(("shape", "k", "stride", "dtype"), CASES, ids=str)
def test_backward_reduce(shape, k, stride, dtype):
    y = image(shape, DTYPES[dtype])
    for with_mask, need_g, need_products in ((True, True, True), (False, False, stride == 1)):
        check_reduce(y, k, stride, None, 1, with_mask, need_g, need_products)


@pytest.mark.parametrize(("shape", "stride", "c2", "size2", "stride2", "k", "dtype"), PAIRS, ids=str)
def test_backward_reduce_pair(shape, stride, c2, size2, stride2, k, dtype):
    y, y2 = image(shape, DTYPES[dtype]), image((shape[0], c2, *size2), DTYPES[dtype])
    check_reduce(y, k, stride, y2, stride2, True, False, True)
    check_reduce(y, k, stride, y2, stride2, True, True, False)


def check_backward_apply(y, k, stride, y2, stride2, with_mask, needed):
    dy, mask, g = gradient(y, k, stride, with_mask)
    rows = matrix(g) if with_mask else g
    dtype = y.dtype
    operands = [(y, stride), (y2, stride2)]
    matrices = []
    for operand, _ in operands:
        c = 0 if operand is None else operand.size(1)
        new = (torch.randn(k, c).to(dtype), torch.randn(c, c).to(dtype), torch.randn(c).to(wide(dtype)))
        matrices.append((None,) * 3 if operand is None else new)
    results, launches = twice(
        lambda: kernels.conv1x1_bn_act_backward_apply(
            dy, mask, y, *matrices[0], stride, y2, *matrices[1], stride2, *needed
        )
    )
    loads, stores = nbytes(dy) + (0 if mask is None else -(-dy.numel() // 8)), 0
    for (operand, by), (folded, mixing, offset), need, got in zip(operands, matrices, needed, results, strict=True):
        if operand is None or not need:
            assert got.shape == (0,)
            continue
        assert got.shape == operand.shape
        assert got.is_contiguous(memory_format=torch.channels_last)
        other = matrix(operand, by)
        want = rows @ folded.double() + other @ mixing.double() + offset.double()
        scale = rows.abs() @ folded.double().abs() + other.abs() @ mixing.double().abs() + offset.double().abs()
        assert_rounded(matrix(got, by).to(dtype), want, scale)
        elsewhere = got.clone()
        elsewhere[:, :, ::by, ::by] = 0
        assert torch.equal(elsewhere, torch.zeros_like(got))
        loads += pixels(operand, by) + nbytes(folded, mixing, offset)
        stores += nbytes(got)
    (launch,) = launches
    assert (launch.loads, launch.stores) == (loads, stores)
    assert launch.requested_stores == stores  # the pixels left out once, by one program


@pytest.mark.parametrize(("shape", "k", "stride", "dtype"), CASES, ids=str)
def test_backward_apply(shape, k, stride, dtype):
    y = image(shape, DTYPES[dtype])
    check_backward_apply(y, k, stride, None, 1, True, (True, False))
    if stride == 1:
        check_backward_apply(y, k, stride, None, 1, False, (True, False))


@pytest.mark.parametrize(("shape", "stride", "c2", "size2", "stride2", "k", "dtype"), PAIRS, ids=str)
def test_backward_apply_pair(shape, stride, c2, size2, stride2, k, dtype):
    y, y2 = image(shape, DTYPES[dtype]), image((shape[0], c2, *size2), DTYPES[dtype])
    for needed in ((True, True), (True, False), (False, True)):
        check_backward_apply(y, k, stride, y2, stride2, True, needed)


def test_nothing_asked_for_launches_nothing():
    y = image((2, 8, 3, 3), torch.float32)
    dy, mask, _ = gradient(y, 16, 1, True)
    matrices = (torch.randn(16, 8), torch.randn(8, 8), torch.randn(8))
    with count_bytes() as launches:
        results = kernels.conv1x1_bn_act_backward_apply(
            dy, mask, y, *matrices, 1, None, None, None, None, 1, False, False
        )
    assert not launches
    assert [r.shape for r in results] == [(0,), (0,)]


def test_rows_counted_in_64_bits(monkeypatch):
    monkeypatch.setattr(kernels, "WIDE_ROWS", 0)
    y = image((2, 16, 5, 4), torch.bfloat16)
    rows = matrix(y, 2)
    centred = rows - rows.mean(0)
    assert_summed(kernels.conv1x1_moments(y, 2)[1], centred.T @ centred, rows.abs().T @ rows.abs(), False)
    check_apply(y, 24, 2, None, 1, None, True, True)
    check_reduce(y, 24, 2, None, 1, True, True, True)
    check_backward_apply(y, 24, 2, None, 1, True, (True, False))


def check_real_tiles(monkeypatch, dtype: str, arch: str) -> None:
    """The tables as they are: tails in all directions."""
    monkeypatch.undo()
    monkeypatch.setattr(common, "INTERPRETED_DEVICE", common.Device(2, 1 << 20, arch))
    y = image((1, 72, 11, 13), DTYPES[dtype])
    rows = matrix(y)
    centred = rows - rows.mean(0)
    assert_summed(kernels.conv1x1_moments(y, 1)[1], centred.T @ centred, rows.abs().T @ rows.abs(), False)
    check_apply(y, 136, 1, None, 1, None, True, True)
    check_reduce(y, 136, 1, None, 1, True, False, True)
    check_backward_apply(y, 136, 1, None, 1, True, (True, False))


@pytest.mark.parametrize(("dtype", "arch"), [("bf16", "90")])
def test_real_tiles(monkeypatch, dtype, arch):
    check_real_tiles(monkeypatch, dtype, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100", "gfx942", "89"])
@pytest.mark.parametrize("dtype", ["bf16", "f32", "f64"])
def test_all_real_tiles(monkeypatch, dtype, arch):
    check_real_tiles(monkeypatch, dtype, arch)


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0, 3)], ids=str)
def test_no_pixels(shape):
    y, dy = image(shape, torch.float32), image((shape[0], 16, *shape[2:]), torch.float32)
    folded, mixing = torch.randn(16, 8), torch.randn(8, 8)
    mean, cov = kernels.conv1x1_moments(y, 1)
    assert mean.isnan().all()
    assert (cov == 0).all()
    out, mask = kernels.conv1x1_bn_act_apply(y, folded, torch.zeros(16), 1, None, None, 1, None, True, True)
    assert out.shape == dy.shape
    assert mask.numel() == 0
    sums = kernels.conv1x1_bn_act_backward_reduce(dy, mask, y, 1, None, 1, False, True)[1:]
    assert [(s.shape, bool((s == 0).all())) for s in sums] == [((16,), True), ((16, 8), True), ((0,), True)]
    dx, _ = kernels.conv1x1_bn_act_backward_apply(
        dy, mask, y, folded, mixing, torch.zeros(8), 1, None, None, None, None, 1, True, False
    )
    assert dx.shape == y.shape


def test_refuses_what_does_not_fit():
    y = image((2, 8, 3, 4), torch.float32)
    folded, shift = torch.randn(16, 8), torch.zeros(16)

    def apply(y=y, folded=folded, shift=shift, stride=1, y2=None, folded2=None, residual=None):
        return kernels.conv1x1_bn_act_apply(y, folded, shift, stride, y2, folded2, 1, residual, True, True)

    wrong = itertools.chain(
        ({"y": t} for t in (y.contiguous(), y[0], y.bfloat16())),
        ({"folded": t} for t in (folded[:, :7], folded.t().contiguous().t(), folded.bfloat16())),
        [
            {"shift": shift[:3]},
            {"shift": shift.double()},
            {"stride": 0},
            {"residual": image((2, 16, 4, 3), torch.float32)},
        ],
        [{"residual": image((2, 16, 3, 4), torch.bfloat16)}, {"y2": y}, {"folded2": folded}],
        [{"y2": image((2, 8, 5, 4), torch.float32), "folded2": folded}],
    )
    for change in wrong:
        with pytest.raises(RuntimeError):
            apply(**change)
