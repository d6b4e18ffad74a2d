"""The Triton kernels of conv1x1_bn_act in Triton's interpreter, against its formulas in float64.

Not collected by name: test_interpreted.py runs it in a process with TRITON_INTERPRET=1. What is uninitialised is NaN,
and every access of a launch must lie in its tensors.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusedres.kernels import common
from fusedres.kernels import conv1x1_bn_act as kernels
from fusedres.ops import conv1x1_bn_act as ops
from fusedres.ops.layout import pack_mask, unpack_mask
from fusedres.ops.traffic import Traffic

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
# with y normalised, which has no stride
NORMS = [(shape, k, dtype) for shape, k, stride in SHAPES if stride == 1 for dtype in DTYPES]
NORMS += [((3, 24, 5, 7), 40, "bf16"), ((3, 24, 5, 7), 40, "f32")]
NORM_PAIRS = [pair for pair in PAIRS if pair[1] == 1] + [((2, 13, 3, 5), 1, 40, (6, 9), 2, 24, "f16")]


REFERENCE = torch.ops.fusedres


@pytest.fixture(autouse=True)
def _poison():
    torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Many tiles and chunks of rows of a small tensor."""
    rows, columns = kernels.Tile(16, 32, 16, 128, 1, pieces=2), kernels.Tile(16, 16, 16, 128, 1)
    tiles = {"APPLY": rows, "BACKWARD": rows, "MOMENTS": columns, "REDUCE": columns}
    tiles |= {"STATISTICS": rows, "NORM_APPLY": rows, "NORM_BACKWARD": rows._replace(pieces=4), "NORM_MOMENTS": columns}
    for table, tile in tiles.items():
        monkeypatch.setattr(kernels, f"{table}_TILES", {("other", size): (tile, tile) for size in (2, 4, 8)})
    monkeypatch.setattr(kernels, "MOMENTS_CHUNK_ROWS", 32)
    monkeypatch.setattr(kernels, "REDUCE_CHUNK_ROWS", 32)
    monkeypatch.setattr(kernels, "ODD_TILE", columns)
    monkeypatch.setattr(kernels, "COMBINE_PARTS", 2)
    monkeypatch.setattr(kernels, "COMBINE_ELEMENTS", 64)
    monkeypatch.setattr(kernels, "COMBINE_AT_ONCE", 2)
    monkeypatch.setattr(kernels, "COMBINE_GROUP", 2)
    monkeypatch.setattr(kernels, "MERGE_PARTS", 2)
    monkeypatch.setattr(kernels, "MERGE_COLUMNS", 8)
    monkeypatch.setattr(common, "INTERPRETED_DEVICE", common.Device(8, 1 << 20, "90"))
    yield
    kernels._chunk_rows.cache_clear()


def image(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.5) -> Tensor:
    return (torch.randn(shape) + mean).to(dtype).contiguous(memory_format=torch.channels_last)


def norm_of(y: Tensor) -> Tensor:
    """Mean, scale of either sign and shift, of so few bits that normalising what :func:`coarse` gives is exact.

    In every other channel of very few, so that there are zeros before the ReLU; in the rest of more than bfloat16 has.
    """
    c = y.size(1)
    unit = torch.tensor([8, 1024]).repeat(c)[:c]
    scale = (torch.rand(c) * 0.65 + 0.1) * torch.tensor([1, 1, -1, -1]).repeat(c)[:c]
    norm = torch.stack([torch.rand(c) * 0.5 + 0.5, scale, torch.rand(c) * 1.5 - 0.5])
    return ((norm * unit).round() / unit).to(wide(y.dtype))


def coarse(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (image(shape, torch.float32) * 16).round().div(16).to(dtype)


def activation(y: Tensor, norm: Tensor | None) -> Tensor:
    """What the convolution reads, in the dtype of y."""
    if norm is None:
        return y
    mean, scale, shift = norm.double().view(3, 1, -1, 1, 1)
    return ((y.double() - mean) * scale + shift).relu().to(y.dtype)


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


def assert_summed(got: Tensor, want: Tensor, scale: Tensor, exact: bool, dtype: torch.dtype = torch.float64) -> None:
    assert got.shape == want.shape
    assert got.dtype == dtype
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


def of_products(rows: Tensor, norm: Tensor | None) -> Tensor:
    """The scale of sums of products; of activations, many of which are 0, also of what is taken off to centre them."""
    scale = rows.abs().T @ rows.abs()
    return scale if norm is None else scale + torch.outer(rows.abs().mean(0), rows.abs().sum(0))


def check_moments(y, stride, norm=None):
    dtype = y.dtype
    (mean, cov), launches = twice(lambda: kernels.conv1x1_moments(y, norm, stride))
    rows = matrix(activation(y, norm), stride)
    centred, exact = rows - rows.mean(0), dtype in (torch.float32, torch.float64)
    assert_summed(mean, rows.mean(0), rows.abs().mean(0), True)
    assert_summed(cov, centred.T @ centred, of_products(rows, norm), exact)  # float32: on float64 tensor cores
    assert torch.equal(cov, cov.T)
    n, c = rows.shape
    gemm, combine = of(launches, "_columns_kernel"), of(launches, "_combine_kernel")
    assert gemm.loads == pixels(y, stride) + nbytes(norm)
    # of the upper tiles of 16 columns, which a float32 accumulator for 16 bits and else a float64 one leaves
    size, blocks = 8 if exact else 4, [min(16, c - i) for i in range(0, c, 16)]
    upper = sum(a * b for i, a in enumerate(blocks) for b in blocks[i:])
    splits = splits_of(gemm, upper, c, size)
    assert splits > 1 or n <= 32
    assert combine.loads == splits * (c * (c + 1) // 2 * size + c * 8)
    assert combine.stores == nbytes(mean, cov)


@pytest.mark.parametrize(("shape", "k", "stride", "dtype"), CASES, ids=str)
def test_moments(shape, k, stride, dtype):
    dtype = DTYPES[dtype]
    check_moments(image(shape, dtype, 100.0 if dtype == torch.float32 else 0.5), stride)


@pytest.mark.parametrize(("shape", "k", "dtype"), NORMS, ids=str)
def test_moments_of_normalised(shape, k, dtype):
    y = coarse(shape, DTYPES[dtype])
    check_moments(y, 1, norm_of(y))


@pytest.mark.parametrize("shape", [(2, 20, 9, 8), (1, 16, 3, 5)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, None], ids=["1", "2", "normalised"])
def test_moments_without_float64_tensor_cores(monkeypatch, shape, stride):
    """float32 is shifted by some mean: at 100 standard deviations it is as good as at 1."""
    monkeypatch.setattr(common, "INTERPRETED_DEVICE", common.Device(8, 1 << 20, "89"))
    y, norm = image(shape, torch.float32, 100.0), None
    if stride is None:
        stride, y = 1, coarse(shape, torch.float32)
        norm = norm_of(y)
        norm[2] += 100
    (mean, cov), launches = twice(lambda: kernels.conv1x1_moments(y, norm, stride))
    rows = matrix(activation(y, norm), stride)
    centred = rows - rows.mean(0)
    assert_summed(mean, rows.mean(0), rows.abs().mean(0) / 100, False)
    shifted = (rows - rows[:128].float().mean(0).bfloat16().double()).abs()
    assert_summed(cov, centred.T @ centred, of_products(shifted, norm), False)
    assert torch.equal(cov, cov.T)
    assert of(launches, "_columns_kernel").loads == pixels(y, stride) + 4 * shape[1] + nbytes(norm)
    assert of(launches, "_origin_kernel").stores == 4 * shape[1]


def check_apply(y, k, stride, y2, stride2, residual, relu, save_mask, norm=None, residual_mask=None):
    dtype = y.dtype
    folded = torch.randn(k, y.size(1)).to(dtype)
    folded2 = None if y2 is None else torch.randn(k, y2.size(1)).to(dtype)
    shift = torch.randn(k).to(wide(dtype))
    second = (y2, folded2, stride2, residual, residual_mask)
    (out, mask), launches = twice(
        lambda: kernels.conv1x1_bn_act_apply(y, norm, folded, shift, stride, *second, relu, save_mask)
    )
    rows = matrix(activation(y, norm), stride)
    want, scale = rows @ folded.double().T + shift.double(), rows.abs() @ folded.double().T.abs() + shift.abs()
    if y2 is not None:
        rows2 = matrix(y2, stride2)
        want, scale = want + rows2 @ folded2.double().T, scale + rows2.abs() @ folded2.double().T.abs()
    if residual is not None:
        counted = residual
        if residual_mask is not None:
            counted = torch.where(unpack_mask(residual_mask, residual), residual, 0)
        want, scale = want + matrix(counted), scale + matrix(counted).abs()
    n, _, h, w = y[:, :, ::stride, ::stride].shape
    assert out.shape == (n, k, h, w)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_rounded(matrix(out).to(dtype), want.relu() if relu else want, scale)
    assert torch.equal(mask, pack_mask(~(out <= 0)) if save_mask else mask.new_empty(0))
    gemm = of(launches, "_rows_kernel")
    read_mask = 0 if residual_mask is None else -(-residual.numel() // 8)
    assert gemm.loads == pixels(y, stride) + (0 if y2 is None else pixels(y2, stride2)) + read_mask + nbytes(
        norm, folded, folded2, shift, residual
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


@pytest.mark.parametrize(("shape", "k", "dtype"), NORMS, ids=str)
def test_apply_normalised(shape, k, dtype):
    y = coarse(shape, DTYPES[dtype])
    residual = image((shape[0], k, *shape[2:]), y.dtype)
    residual_mask = pack_mask(image(residual.shape, torch.float32, 0.0) > 0)
    check_apply(y, k, 1, None, 1, residual, True, True, norm_of(y))
    check_apply(y, k, 1, None, 1, residual, False, False, None, residual_mask)
    check_apply(y, k, 1, None, 1, residual, True, True, norm_of(y), residual_mask)


@pytest.mark.parametrize(("shape", "stride", "c2", "size2", "stride2", "k", "dtype"), PAIRS, ids=str)
def test_apply_pair(shape, stride, c2, size2, stride2, k, dtype):
    y, y2 = image(shape, DTYPES[dtype]), image((shape[0], c2, *size2), DTYPES[dtype])
    check_apply(y, k, stride, y2, stride2, None, True, True)


@pytest.mark.parametrize(("shape", "stride", "c2", "size2", "stride2", "k", "dtype"), NORM_PAIRS, ids=str)
def test_apply_normalised_pair(shape, stride, c2, size2, stride2, k, dtype):
    y, y2 = coarse(shape, DTYPES[dtype]), image((shape[0], c2, *size2), DTYPES[dtype])
    check_apply(y, k, stride, y2, stride2, None, True, True, norm_of(y))


def test_nan_passes_the_relu():
    y = image((1, 16, 2, 3), torch.bfloat16)
    y[0, 3, 1, 1] = float("nan")
    folded, shift = torch.randn(16, 16).bfloat16(), torch.zeros(16)
    for norm in (None, norm_of(y)):
        out, mask = kernels.conv1x1_bn_act_apply(y, norm, folded, shift, 1, None, None, 1, None, None, True, True)
        assert out[0, :, 1, 1].isnan().all()
        assert out.isnan().sum() == 16
        assert torch.equal(mask, pack_mask(~(out <= 0)))


def test_nan_passes_the_norm():
    """Also where neither the weights nor other channels bring it: the gradient is there where the activation is NaN."""
    y = coarse((1, 16, 3, 6), torch.bfloat16)
    y[0, 3, 1, 1] = float("nan")
    norm = norm_of(y)
    mean, cov = kernels.conv1x1_moments(y, norm, 1)
    assert torch.equal(mean.isnan().nonzero(), torch.tensor([[3]]))
    assert cov[3].isnan().all()
    assert cov.isnan().sum() == 31
    dy = image(y.shape, y.dtype)
    *_, products, _ = kernels.conv1x1_bn_act_backward_reduce(dy, None, y, norm, 1, None, 1, False, True)
    assert products[:, 3].isnan().all()
    assert products.isnan().sum() == 16
    weight = torch.zeros(16, 16).bfloat16()
    dx, _, sums = kernels.conv1x1_bn_act_backward_apply(
        dy, None, y, norm, weight, weight, torch.ones(16), 1, None, None, None, None, 1, True, False
    )
    kept = ~(activation(y, norm) <= 0)
    assert kept[0, 3, 1, 1]
    assert torch.equal(dx != 0, kept)
    there = torch.zeros_like(kept)
    there[0, :, 1, 1] = kept[0, :, 1, 1]
    assert torch.equal(dx.isnan(), there)
    assert torch.equal(sums[0].isnan(), there[0, :, 1, 1])


def check_statistics(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """out, and its statistics as it is stored: as exact, relative to the deviation, as its dtype's accumulator is."""
    k = weight.size(0)
    (out, partial), (gemm, *merging) = twice(lambda: kernels.conv1x1_statistics(x, weight))
    n, _, h, w = x.shape
    assert (out.shape, out.dtype) == ((n, k, h, w), x.dtype)
    assert out.is_contiguous(memory_format=torch.channels_last)
    rows = matrix(x)
    assert_rounded(matrix(out).to(x.dtype), rows @ weight.double().T, rows.abs() @ weight.double().abs().T)
    stored = matrix(out)
    mean = stored.mean(0)
    centred = stored - mean
    count, m2 = len(stored), centred.square().sum(0)
    assert (partial.shape, partial.dtype, partial[-1]) == ((2 * k + 1,), torch.float64, count)
    exact = x.dtype == torch.float64
    scale = (m2 / count).sqrt() * (1e-13 if exact else 2e-6) + 1e-15 * mean.abs()
    assert ((partial[:k] - mean).abs() <= scale).all()
    assert ((partial[k:-1] - m2).abs() <= (1e-13 if exact else 5e-6) * m2 + 1e-28 * count * mean.square()).all()
    assert gemm.loads == nbytes(x, weight)
    # partial results of tiles, merged in groups while there are many
    m, size = 3 * k, 8 if exact else 4
    parts, rest = divmod(gemm.stores - nbytes(out), m * size)
    assert rest == 0
    assert gemm.requested_stores == gemm.stores
    wanted = []
    while parts > kernels.COMBINE_AT_ONCE:
        groups = -(-parts // kernels.COMBINE_GROUP)
        wanted.append((parts * m * size, groups * m * 8))
        parts, size = groups, 8
    assert [(one.loads, one.stores) for one in merging] == [*wanted, (parts * m * size, nbytes(partial))]
    return out, partial


@pytest.mark.parametrize(("shape", "k", "stride", "dtype"), CASES, ids=str)
def test_statistics(shape, k, stride, dtype):
    check_statistics(image(shape, DTYPES[dtype]), torch.randn(k, shape[1]).to(DTYPES[dtype]))


@pytest.mark.parametrize("mean", [100.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_a_large_mean(dtype, mean):
    """As good at so many standard deviations as at none."""
    x = image((3, 17, 9, 7), DTYPES[dtype], mean)
    weight = torch.rand(20, 17).to(x.dtype) / 17
    out, partial = check_statistics(x, weight)
    want = REFERENCE.batch_norm_statistics_reference(out)
    torch.testing.assert_close(partial[:20], want[:20], rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_a_constant(dtype):
    """Exact."""
    x = torch.full((2, 1, 5, 7), 1.7, dtype=DTYPES[dtype]).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(9, 1).to(x.dtype)
    out, partial = kernels.conv1x1_statistics(x, weight)
    assert torch.equal(partial[:9], out[0, :, 0, 0].double())
    assert (partial[9:18] == 0).all()


@pytest.mark.parametrize("values", [("inf",), ("-inf",), ("inf", "-inf"), ("nan",), ("nan", "inf")], ids=str)
@pytest.mark.parametrize("pixel", [(0, 0, 0), (1, 4, 6)], ids=["first", "last"])
def test_statistics_that_are_not_finite(values, pixel):
    """As the reference's, in whichever tile."""
    x = image((2, 1, 5, 7), torch.bfloat16)
    for value, (n, h, w) in zip(values, (pixel, (0, 3, 3)), strict=False):
        x[n, 0, h, w] = float(value)
    out, partial = kernels.conv1x1_statistics(x, torch.tensor([[1.0], [-1.0]]).bfloat16())
    want = REFERENCE.batch_norm_statistics_reference(out)
    torch.testing.assert_close(partial, want, equal_nan=True, rtol=0, atol=0)


def gradient(y: Tensor, k: int, stride: int, with_mask: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """dy, mask, and g as rows."""
    n, _, h, w = y[:, :, ::stride, ::stride].shape
    dy = image((n, k, h, w), y.dtype, 0.1)
    mask = pack_mask(image((n, k, h, w), torch.float32, 0.0) > 0) if with_mask else None
    if mask is None:
        return dy, None, matrix(dy)
    return dy, mask, torch.where(unpack_mask(mask, dy), dy, 0)


def check_reduce(y, k, stride, y2, stride2, with_mask, need_g, need_products, norm=None):
    exact = y.dtype == torch.float64
    dy, mask, want_g = gradient(y, k, stride, with_mask)
    (g, sum_g, products, products2), launches = twice(
        lambda: kernels.conv1x1_bn_act_backward_reduce(dy, mask, y, norm, stride, y2, stride2, need_g, need_products)
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
        other = matrix(activation(operand, norm if operand is y else None), by)
        assert_summed(got, rows.T @ other, rows.abs().T @ other.abs(), exact, ops.matrix_dtype(y.dtype))
    gemm, combine = of(launches, "_columns_kernel"), of(launches, "_combine_kernel")
    # where rows do not end with bytes, the last byte of the words is no element's
    read_mask = 0 if mask is None else -(-dy.numel() // 8)
    inner = sum(operand.size(1) for operand, *_ in operands if operand is not None) if need_products else 0
    read = sum(pixels(operand, by) for operand, by, _ in operands if operand is not None) if need_products else 0
    assert gemm.loads == nbytes(dy) + read_mask + read + need_products * nbytes(norm)
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


@pytest.mark.parametrize(("shape", "k", "dtype"), NORMS, ids=str)
def test_backward_reduce_normalised(shape, k, dtype):
    y = coarse(shape, DTYPES[dtype])
    check_reduce(y, k, 1, None, 1, True, True, True, norm_of(y))
    check_reduce(y, k, 1, None, 1, False, False, True, norm_of(y))


@pytest.mark.parametrize(("shape", "stride", "c2", "size2", "stride2", "k", "dtype"), NORM_PAIRS, ids=str)
def test_backward_reduce_normalised_pair(shape, stride, c2, size2, stride2, k, dtype):
    y, y2 = coarse(shape, DTYPES[dtype]), image((shape[0], c2, *size2), DTYPES[dtype])
    check_reduce(y, k, stride, y2, stride2, True, False, True, norm_of(y))
    check_reduce(y, k, stride, y2, stride2, True, True, False, norm_of(y))


def check_sums(sums, dx, y, norm, launches):
    """Of what was stored, whose partial sums go through one launch or more."""
    rows, centred = matrix(dx), matrix(y) - norm[0].double()
    want, scale = (torch.stack([r.sum(0), (r * c).sum(0)]) for r, c in ((rows, centred), (rows.abs(), centred.abs())))
    assert_summed(sums, want, scale, y.dtype == torch.float64)
    m, size = sums.numel(), nbytes(norm) // norm.numel()
    parts, rest = divmod(launches[0].loads, m * size)
    assert rest == 0
    wanted = []
    while parts > kernels.COMBINE_AT_ONCE:
        groups = -(-parts // kernels.COMBINE_GROUP)
        wanted.append((parts * m * size, groups * m * 8))
        parts, size = groups, 8
    assert [(launch.loads, launch.stores) for launch in launches] == [*wanted, (parts * m * size, m * 8)]


def check_backward_apply(y, k, stride, y2, stride2, with_mask, needed, norm=None):
    dy, mask, g = gradient(y, k, stride, with_mask)
    rows = matrix(g) if with_mask else g
    dtype = y.dtype
    operands = [(y, stride, norm), (y2, stride2, None)]
    matrices = []
    for operand, *_ in operands:
        c = 0 if operand is None else operand.size(1)
        new = (torch.randn(k, c).to(dtype), torch.randn(c, c).to(dtype), torch.randn(c).to(wide(dtype)))
        matrices.append((None,) * 3 if operand is None else new)
    (*results, sums), launches = twice(
        lambda: kernels.conv1x1_bn_act_backward_apply(
            dy, mask, y, norm, *matrices[0], stride, y2, *matrices[1], stride2, *needed
        )
    )
    loads, stores = nbytes(dy) + (0 if mask is None else -(-dy.numel() // 8)), 0
    for (operand, by, of_operand), of_pass, need, got in zip(operands, matrices, needed, results, strict=True):
        if operand is None or not need:
            assert got.shape == (0,)
            continue
        folded, mixing, offset = of_pass
        assert got.shape == operand.shape
        assert got.is_contiguous(memory_format=torch.channels_last)
        other = matrix(activation(operand, of_operand), by)
        want = rows @ folded.double() + other @ mixing.double() + offset.double()
        scale = rows.abs() @ folded.double().abs() + other.abs() @ mixing.double().abs() + offset.double().abs()
        if of_operand is not None:
            want = want.where(other > 0, 0.0)
            assert (matrix(got)[other <= 0] == 0).all()
        assert_rounded(matrix(got, by).to(dtype), want, scale)
        elsewhere = got.clone()
        elsewhere[:, :, ::by, ::by] = 0
        assert torch.equal(elsewhere, torch.zeros_like(got))
        loads += pixels(operand, by) + nbytes(of_operand, folded, mixing, offset)
        stores += nbytes(got)
    launch, *combining = launches
    if norm is not None and needed[0]:
        check_sums(sums, results[0], y, norm, combining)
        stores += combining[0].loads
    else:
        assert (sums.shape, sums.dtype, combining) == ((0,), torch.float64, [])
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


@pytest.mark.parametrize(("shape", "k", "dtype"), NORMS, ids=str)
def test_backward_apply_normalised(shape, k, dtype):
    y = coarse(shape, DTYPES[dtype])
    for with_mask in (True, False):
        check_backward_apply(y, k, 1, None, 1, with_mask, (True, False), norm_of(y))


@pytest.mark.parametrize(("shape", "stride", "c2", "size2", "stride2", "k", "dtype"), NORM_PAIRS, ids=str)
def test_backward_apply_normalised_pair(shape, stride, c2, size2, stride2, k, dtype):
    y, y2 = coarse(shape, DTYPES[dtype]), image((shape[0], c2, *size2), DTYPES[dtype])
    for needed in ((True, True), (True, False), (False, True)):
        check_backward_apply(y, k, stride, y2, stride2, True, needed, norm_of(y))


def test_nothing_asked_for_launches_nothing():
    y = image((2, 8, 3, 3), torch.float32)
    dy, mask, _ = gradient(y, 16, 1, True)
    matrices = (torch.randn(16, 8), torch.randn(8, 8), torch.randn(8))
    with count_bytes() as launches:
        results = kernels.conv1x1_bn_act_backward_apply(
            dy, mask, y, norm_of(y), *matrices, 1, None, None, None, None, 1, False, False
        )
    assert not launches
    assert [r.shape for r in results] == [(0,)] * 3


def test_rows_counted_in_64_bits(monkeypatch):
    monkeypatch.setattr(kernels, "WIDE_ROWS", 0)
    y = image((2, 16, 5, 4), torch.bfloat16)
    rows = matrix(y, 2)
    centred = rows - rows.mean(0)
    assert_summed(kernels.conv1x1_moments(y, None, 2)[1], centred.T @ centred, rows.abs().T @ rows.abs(), False)
    check_apply(y, 24, 2, None, 1, None, True, True)
    check_reduce(y, 24, 2, None, 1, True, True, True)
    check_backward_apply(y, 24, 2, None, 1, True, (True, False))
    check_normalised(coarse(y.shape, y.dtype), 24)
    check_statistics(y, torch.randn(24, 16).bfloat16())


def check_normalised(y: Tensor, k: int) -> None:
    norm = norm_of(y)
    rows = matrix(activation(y, norm))
    centred = rows - rows.mean(0)
    cov = kernels.conv1x1_moments(y, norm, 1)[1]
    assert_summed(cov, centred.T @ centred, of_products(rows, norm), False)
    check_apply(y, k, 1, None, 1, None, True, True, norm)
    check_reduce(y, k, 1, None, 1, True, False, True, norm)
    check_backward_apply(y, k, 1, None, 1, True, (True, False), norm)
    n, _, h, w = y.shape
    residual = image((n, k, h, w), y.dtype)
    check_apply(y, k, 1, None, 1, residual, False, False, None, pack_mask(residual > 0))


def check_real_tiles(monkeypatch, dtype: str, arch: str) -> None:
    """The tables as they are: tails in all directions."""
    monkeypatch.undo()
    monkeypatch.setattr(common, "INTERPRETED_DEVICE", common.Device(2, 1 << 20, arch))
    y = image((1, 72, 11, 13), DTYPES[dtype])
    rows = matrix(y)
    centred = rows - rows.mean(0)
    cov = kernels.conv1x1_moments(y, None, 1)[1]
    assert_summed(cov, centred.T @ centred, rows.abs().T @ rows.abs(), False)
    check_apply(y, 136, 1, None, 1, None, True, True)
    check_reduce(y, 136, 1, None, 1, True, False, True)
    check_backward_apply(y, 136, 1, None, 1, True, (True, False))
    check_normalised(coarse(y.shape, y.dtype), 136)
    for k in (136, 40):
        check_statistics(y, torch.randn(k, 72).to(y.dtype))


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
    norm = norm_of(y)
    mean, cov = kernels.conv1x1_moments(y, norm, 1)
    assert mean.isnan().all()
    assert (cov == 0).all()
    second = (None, None, 1, None, None)
    out, mask = kernels.conv1x1_bn_act_apply(y, norm, folded, torch.zeros(16), 1, *second, True, True)
    assert out.shape == dy.shape
    assert mask.numel() == 0
    sums = kernels.conv1x1_bn_act_backward_reduce(dy, mask, y, norm, 1, None, 1, False, True)[1:]
    assert [(s.shape, bool((s == 0).all())) for s in sums] == [((16,), True), ((16, 8), True), ((0,), True)]
    with pytest.raises(RuntimeError, match="elements"):
        kernels.conv1x1_statistics(y, folded)
    dx, _, of_dx = kernels.conv1x1_bn_act_backward_apply(
        dy, mask, y, norm, folded, mixing, torch.zeros(8), 1, None, None, None, None, 1, True, False
    )
    assert dx.shape == y.shape
    assert torch.equal(of_dx, torch.zeros(2, 8, dtype=torch.float64))


def test_refuses_what_does_not_fit():
    y = image((2, 8, 3, 4), torch.float32)
    folded, shift = torch.randn(16, 8), torch.zeros(16)
    norm, residual = norm_of(y), image((2, 16, 3, 4), torch.float32)
    bits = pack_mask(residual > 0)

    def apply(
        y=y, norm=None, folded=folded, shift=shift, stride=1, y2=None, folded2=None, residual=None, residual_mask=None
    ):
        second = (y2, folded2, 1, residual, residual_mask)
        return kernels.conv1x1_bn_act_apply(y, norm, folded, shift, stride, *second, True, True)

    wrong = itertools.chain(
        ({"y": t} for t in (y.contiguous(), y[0], y.bfloat16())),
        ({"folded": t} for t in (folded[:, :7], folded.t().contiguous().t(), folded.bfloat16())),
        [
            {"shift": shift[:3]},
            {"shift": shift.double()},
            {"stride": 0},
            {"residual": image((2, 16, 4, 3), torch.float32)},
        ],
        [{"residual": residual.bfloat16()}, {"y2": y}, {"folded2": folded}],
        [{"y2": image((2, 8, 5, 4), torch.float32), "folded2": folded}],
        ({"norm": t} for t in (norm[:2], norm[:, :7], norm.double(), norm.t().contiguous().t())),
        [{"norm": norm, "stride": 2}, {"residual_mask": bits}],
        ({"residual": residual, "residual_mask": t} for t in (bits[:-1], bits.int())),
    )
    for change in wrong:
        with pytest.raises(RuntimeError):
            apply(**change)
    for args in (
        *((t, folded) for t in (y.contiguous(), y[0], y.bfloat16())),
        *((y, t) for t in (folded[:, :7], folded.t().contiguous().t(), folded.bfloat16(), folded[:0])),
        (y, folded.view(16, 8, 1, 1)),
    ):
        with pytest.raises(RuntimeError):
            kernels.conv1x1_statistics(*args)
    matrices = (folded, torch.zeros(8, 8), torch.zeros(8))
    for unfit, stride in ((norm[:2], 1), (norm.double(), 1), (norm, 2)):
        dy = residual[:, :, ::stride, ::stride].contiguous(memory_format=torch.channels_last)
        for op, args in (
            (kernels.conv1x1_moments, (y, unfit, stride)),
            (kernels.conv1x1_bn_act_backward_reduce, (dy, None, y, unfit, stride, None, 1, False, True)),
            (
                kernels.conv1x1_bn_act_backward_apply,
                (dy, None, y, unfit, *matrices, stride, None, None, None, None, 1, True, False),
            ),
        ):
            with pytest.raises(RuntimeError, match=r"norm|float32"):
                op(*args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norm", [False, True])
def test_traffic(dtype, with_norm):
    """What the launches touch is what the formulas say."""
    dtype, k = DTYPES[dtype], 24
    y, y2 = coarse((2, 16, 4, 6), dtype), image((2, 8, 7, 12), dtype)
    norm = norm_of(y) if with_norm else None
    dy, mask, _ = gradient(y, k, 1, True)

    def matrices(c: int) -> tuple[Tensor, ...]:
        return torch.zeros(k, c, dtype=dtype), torch.zeros(c, c, dtype=dtype), torch.zeros(c, dtype=wide(dtype))

    of_y, of_y2, shift = matrices(16), matrices(8), torch.zeros(k, dtype=wide(dtype))
    none, pair = (None,) * 4, {"shape2": y2.shape, "stride2": 2}
    apply, reduce = kernels.conv1x1_bn_act_apply, kernels.conv1x1_bn_act_backward_reduce
    backward_apply = kernels.conv1x1_bn_act_backward_apply

    def check(call: Callable[[], tuple[Tensor, ...]], traffic: Traffic) -> None:
        with count_bytes() as launches:
            results = call()
        (launch,) = traffic.launches
        assert (launches[0].loads, nbytes(*results)) == (launch.loads, launch.stores)

    check(lambda: kernels.conv1x1_moments(y, norm, 1), ops.conv1x1_moments_traffic(y.shape, dtype, norm=with_norm))
    check(lambda: kernels.conv1x1_statistics(y, of_y[0]), ops.conv1x1_statistics_traffic(y.shape, k, dtype))
    of = functools.partial(ops.conv1x1_bn_act_apply_traffic, y.shape, k, dtype, norm=with_norm)
    check(
        lambda: apply(y, norm, of_y[0], shift, 1, None, None, 1, dy, mask, False, False),
        of(residual=True, residual_mask=True, save_mask=False),
    )
    check(lambda: apply(y, norm, of_y[0], shift, 1, y2, of_y2[0], 2, None, None, True, True), of(**pair))
    of = functools.partial(ops.conv1x1_bn_act_backward_reduce_traffic, y.shape, k, dtype, norm=with_norm)
    check(lambda: reduce(dy, mask, y, norm, 1, None, 1, True, True), of(need_g=True))
    check(lambda: reduce(dy, None, y, norm, 1, y2, 2, False, True), of(**pair, relu=False))
    check(lambda: reduce(dy, mask, y, norm, 1, None, 1, False, False), of(need_products=False))
    of = functools.partial(ops.conv1x1_bn_act_backward_apply_traffic, y.shape, k, dtype, norm=with_norm)
    check(lambda: backward_apply(dy, None, y, norm, *of_y, 1, *none, 1, True, False), of(relu=False))
    check(lambda: backward_apply(dy, mask, y, norm, *of_y, 1, y2, *of_y2, 2, True, True), of(**pair, need_dx2=True))
    only_second = of(**pair, need_dx=False, need_dx2=True)
    check(lambda: backward_apply(dy, mask, y, norm, *of_y, 1, y2, *of_y2, 2, False, True), only_second)
