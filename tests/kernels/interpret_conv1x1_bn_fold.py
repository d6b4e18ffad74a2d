"""The Triton kernels of the small matrices in Triton's interpreter, against the reference ops.

Not collected by name: test_interpreted.py runs it in a process with TRITON_INTERPRET=1. What is uninitialised is NaN,
every access of a launch must lie in its tensors, and what it touches is what the traffic functions say.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusedres.kernels import common
from fusedres.kernels import conv1x1_bn_fold as kernels
from fusedres.ops import conv1x1_bn_act as ops

sys.path.insert(0, str(Path(__file__).parent))
from byte_counter import count_bytes

REFERENCE = torch.ops.fusedres
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
EPS = 1e-5
# (K, C): whole tiles, tails, one row, one column, more columns than rows
SIZES = [(24, 16), (33, 17), (5, 1), (1, 9), (12, 40), (40, 23)]
# dtype of what is convolved, of the weight, of weight and bias (None: there are none)
COMBINATIONS = [
    ("bf16", "f32", "f32"),
    ("f32", "f32", None),
    ("f64", "f64", "f64"),
    ("bf16", "bf16", "bf16"),
    ("f16", "f16", "f16"),
]
CASES = [(*size, *dtypes) for size, dtypes in zip(SIZES * 2, itertools.cycle(COMBINATIONS), strict=False)]


@pytest.fixture(autouse=True)
def _poison():
    torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    tiles = kernels.Tiles((4, 8, 4), 1, (8, 8, 4), (8, 16, 4), 1)
    monkeypatch.setattr(kernels, "TILES", {"sm90": tiles, "other": tiles._replace(fold=(8, 4, 4))})
    sizes = {"FOLD_COLS": 8, "COPY": 32, "SLOPE_ROWS": 2, "SLOPE_COLS": 8, "TALL": 16, "RUNNING": 8}
    for name, size in sizes.items():
        monkeypatch.setattr(kernels, name, size)
    monkeypatch.setattr(common, "INTERPRETED_DEVICE", common.Device(8, 1 << 20, "90"))


class Inputs:
    """Arguments of the ops for one convolution, (K, C), of ``count`` pixels."""

    def __init__(self, k: int, c: int, dtype: str, weight_dtype: str, param_dtype: str | None) -> None:
        self.count = 3 * c + 7
        rows = torch.randn(self.count, c, dtype=torch.float64) + 0.5
        self.mean = rows.mean(0)
        self.cov = (rows - self.mean).T @ (rows - self.mean)
        self.dtype, self.weight_dtype = DTYPES[dtype], DTYPES[weight_dtype]
        self.param_dtype = None if param_dtype is None else DTYPES[param_dtype]
        self.conv_weight = torch.randn(k, c, 1, 1).to(self.weight_dtype)
        self.weight = self.bias = None
        if self.param_dtype is not None:
            self.weight, self.bias = (torch.randn(k).to(self.param_dtype) for _ in range(2))
        self.sum_g = torch.randn(k, dtype=torch.float64)
        self.products = torch.randn(k, c, dtype=ops.matrix_dtype(self.dtype))

    def fold(self, moments: Tensor | None = None, shift0: Tensor | None = None) -> tuple:
        affine, of_input = (self.conv_weight, self.weight, self.bias), (self.mean, self.cov, moments)
        return *affine, *of_input, EPS, self.count, shift0, self.dtype

    def unfold(self, stats: Tensor, covariance: Tensor, need_dconv_weight: bool = True, need_dy: bool = True) -> tuple:
        of_input, of_output = (self.mean, covariance), (stats, self.sum_g, self.products)
        needs = (need_dconv_weight, need_dy)
        return self.conv_weight, self.weight, *of_input, *of_output, self.count, self.dtype, *needs

    @property
    def sizes(self) -> dict:
        """Arguments of the traffic functions."""
        return {
            "shape": self.conv_weight.shape[:2],
            "dtype": self.dtype,
            "weight_dtype": self.weight_dtype,
            "param_dtype": self.param_dtype,
        }


def assert_near(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """One rounding away from float64, and some of its own."""
    for g, w in zip(got, want, strict=True):
        assert (g.shape, g.dtype, g.stride()) == (w.shape, w.dtype, w.stride())
        bound = torch.finfo(g.dtype).eps * w.double().abs() + 1e-13 * (1 + w.double().abs().max() if w.numel() else 0)
        assert ((g.double() - w.double()).abs() <= bound).all()


def run(op, args, traffic):
    """The results of a launcher, the same bits twice, of as many bytes as ``traffic`` says."""
    with count_bytes() as launches:
        results = op(*args)
    for got, again in zip(results, op(*args), strict=True):
        assert torch.equal(got, again)
    found = [(one.kernel, one.loads, one.stores) for one in launches]
    assert found == [(f"_{one.name}_kernel", one.loads, one.stores) for one in traffic.launches]
    return results


@pytest.mark.parametrize(("k", "c", "dtype", "weight_dtype", "param_dtype"), CASES, ids=str)
def test_fold(k, c, dtype, weight_dtype, param_dtype):
    of = Inputs(k, c, dtype, weight_dtype, param_dtype)
    traffic = ops.conv1x1_bn_fold_traffic(**of.sizes)
    got = run(kernels.conv1x1_bn_fold, of.fold(), traffic)
    assert_near(got, REFERENCE.conv1x1_bn_fold_reference(*of.fold()))
    assert traffic.total == traffic.floor
    # moments of other processes too, and a shift to add to
    moments = torch.stack([torch.randn(k, dtype=torch.float64), torch.rand(k, dtype=torch.float64) + 0.5])
    args = of.fold(moments, torch.randn(k).to(got[1].dtype))
    traffic = ops.conv1x1_bn_fold_traffic(**of.sizes, moments=True, shift0=True)
    assert_near(run(kernels.conv1x1_bn_fold, args, traffic), REFERENCE.conv1x1_bn_fold_reference(*args))


@pytest.mark.parametrize(("k", "c", "dtype", "weight_dtype", "param_dtype"), CASES, ids=str)
def test_unfold(k, c, dtype, weight_dtype, param_dtype):
    of = Inputs(k, c, dtype, weight_dtype, param_dtype)
    folded, _, stats, covariance = kernels.conv1x1_bn_fold(*of.fold())
    for needs in itertools.product((True, False), repeat=2):
        args = of.unfold(stats, covariance, *needs)
        traffic = ops.conv1x1_bn_unfold_traffic(**of.sizes, need_dconv_weight=needs[0], need_dy=needs[1])
        got = run(kernels.conv1x1_bn_unfold, args, traffic)
        want = REFERENCE.conv1x1_bn_unfold_reference(*args)
        if needs[1]:
            assert torch.equal(got[2], folded)
            # of the results as they are rounded
            offset = -(got[2].double().T @ of.sum_g) / of.count - got[3].double().T @ of.mean
            want = (*want[:4], offset.to(want[4].dtype))
        assert_near(got, want)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_unfold_of_either_products(dtype):
    """float32 and float64 with the same values give the same bits."""
    of = Inputs(12, 40, dtype, "f32", "f32")
    *_, stats, covariance = kernels.conv1x1_bn_fold(*of.fold())
    of.products = of.products.float()
    want = kernels.conv1x1_bn_unfold(*of.unfold(stats, covariance))
    of.products = of.products.double()
    got = kernels.conv1x1_bn_unfold(*of.unfold(stats, covariance))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("moments", [False, True])
def test_fold_of_no_variance(moments):
    """A variance that rounding left negative counts as none; NaN stays."""
    of = Inputs(6, 5, "f32", "f32", "f32")
    of.cov = -of.cov
    args = of.fold(torch.zeros(2, 6, dtype=torch.float64) if moments else None)
    got = kernels.conv1x1_bn_fold(*args)
    assert_near(got, REFERENCE.conv1x1_bn_fold_reference(*args))
    assert (got[2][1] == 0).all()
    of.cov[2, 3] = of.cov[3, 2] = float("nan")
    if not moments:
        assert kernels.conv1x1_bn_fold(*of.fold())[2][1:].isnan().all()


@pytest.mark.parametrize("strides", [(5, 1, 5, 5), (5, 1, 3, 7), (1, 6, 1, 1), (10, 2, 1, 1)], ids=str)
def test_strides_of_the_weight(strides):
    of = Inputs(6, 5, "bf16", "f32", "f32")
    want = kernels.conv1x1_bn_fold(*of.fold())
    dense = kernels.conv1x1_bn_unfold(*of.unfold(*want[2:]))
    values, of.conv_weight = of.conv_weight, torch.empty(120).as_strided((6, 5, 1, 1), strides)
    of.conv_weight.copy_(values)
    assert all(torch.equal(g, w) for g, w in zip(kernels.conv1x1_bn_fold(*of.fold()), want, strict=True))
    args = of.unfold(*want[2:])
    got, reference = kernels.conv1x1_bn_unfold(*args), REFERENCE.conv1x1_bn_unfold_reference(*args)
    assert all(torch.equal(g, w) for g, w in zip(got, dense, strict=True))
    assert got[0].stride() == reference[0].stride()


@pytest.mark.parametrize("arch", ["80", "90", "100", "gfx942", "89"])
def test_real_tiles(monkeypatch, arch):
    """The tables as they are: tails in all directions."""
    monkeypatch.undo()
    monkeypatch.setattr(common, "INTERPRETED_DEVICE", common.Device(2, 1 << 20, arch))
    for of in (Inputs(136, 76, "bf16", "f32", "f32"), Inputs(20, 131, "f32", "f32", None)):
        want = REFERENCE.conv1x1_bn_fold_reference(*of.fold())
        assert_near(kernels.conv1x1_bn_fold(*of.fold()), want)
        args = of.unfold(*want[2:])
        got, want = kernels.conv1x1_bn_unfold(*args), REFERENCE.conv1x1_bn_unfold_reference(*args)
        assert_near(got[:4], want[:4])
        assert ((got[4] - want[4]).abs() <= 1e-3 * want[4].abs().max()).all()


@pytest.mark.parametrize("k", [1, 8, 19])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_update_running(k, dtype, momentum):
    stats = torch.rand(3, k, dtype=torch.float64)
    running = torch.rand(2, k).to(DTYPES[dtype])
    for n in (torch.tensor(3), torch.tensor([4]), None)[: 3 if momentum else 2]:
        results = []
        for op in (kernels.conv1x1_bn_update_running, REFERENCE.conv1x1_bn_update_running_reference):
            mean, var, counter = running[0].clone(), running[1].clone(), None if n is None else n.clone()
            with count_bytes() as launches:
                op(mean, var, counter, momentum, stats, 17)
            results.append([mean, var] + [counter] * (n is not None))
            if launches:
                (one,) = launches
                traffic = ops.conv1x1_bn_update_running_traffic(
                    k, param_dtype=DTYPES[dtype], counter=n is not None
                ).launches[0]
                assert (one.loads, one.stores) == (traffic.loads, traffic.stores)
        assert all(torch.equal(g, w) for g, w in zip(*results, strict=True))


def test_update_of_the_counter_alone():
    stats, counter, running = torch.rand(3, 4, dtype=torch.float64), torch.tensor(7), torch.rand(4)
    for running_mean in (None, running.clone()):
        kernels.conv1x1_bn_update_running(running_mean, None, counter, None, stats, 1)
        if running_mean is not None:
            assert torch.equal(running_mean, running)
    assert counter == 9
    with count_bytes() as launches:
        kernels.conv1x1_bn_update_running(None, None, None, 0.1, stats, 17)
    assert not launches


def test_refusals():
    of = Inputs(6, 5, "f32", "f32", "f32")
    fold, names = of.fold(), ["conv_weight", "weight", "bias", "mean", "cov", "moments", "eps", "count", "shift0"]
    stats, covariance = kernels.conv1x1_bn_fold(*fold)[2:]
    wrong = [
        ("conv_weight", of.conv_weight[:, :, 0]),
        ("conv_weight", torch.randn(6, 5, 3, 3)),
        ("conv_weight", of.conv_weight.long()),
        ("weight", of.weight[:5]),
        ("bias", of.bias.repeat(2)[::2]),
        ("mean", of.mean.float()),
        ("cov", of.cov[:, :4]),
        ("moments", torch.randn(6, 2, dtype=torch.float64)),
        ("shift0", torch.randn(5)),
        ("mean", of.mean.to("meta")),
    ]
    for name, value in wrong:
        args = [value if name == n else a for n, a in zip([*names, "dtype"], fold, strict=True)]
        with pytest.raises(RuntimeError):
            kernels.conv1x1_bn_fold(*args)
    unfold = of.unfold(stats, covariance)
    for i, value in (
        (3, covariance.half()),
        (4, stats[:2]),
        (4, stats.float()),
        (5, of.sum_g.float()),
        (6, of.products.T.contiguous()),
        (6, of.products.half()),
    ):
        with pytest.raises(RuntimeError):
            kernels.conv1x1_bn_unfold(*unfold[:i], value, *unfold[i + 1 :])
    running, counter = torch.rand(6), torch.tensor(1)
    for args in (
        (running[:5], running[:5], counter, 0.1, stats, 17),
        (running, running.repeat(2)[::2], counter, 0.1, stats, 17),
        (running, running, counter.int(), 0.1, stats, 17),
        (running, running, None, None, stats, 17),
        (running, running, counter, 0.1, stats[:2], 17),
    ):
        with pytest.raises(RuntimeError):
            kernels.conv1x1_bn_update_running(*args)
    assert counter == 1
