"""conv1x1_bn_act and its dual form: a 1x1 convolution folded into its batch norm while training."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres import functional as F
from fusedres import verification
from fusedres.ops import conv1x1_bn_act as family
from fusedres.ops import folded_call, folding, registry
from fusedres.ops.layout import pack_mask, unpack_mask
from fusedres.verification import FOLDED, PAIR_1X1, Case

from .conftest import FORCED

CHANNELS_LAST = torch.channels_last
OP = "conv1x1_bn_act"


def _implementations() -> tuple | None:
    """Of the four ops by the backend in force, where it has them."""
    ops = family.folding_ops(torch.empty(1))
    return None if ops is None else ops[:4]


def _folding_backends() -> list[str]:
    found = []
    for name in FORCED:
        with fusedres.use_backend(name):
            if _implementations() is not None:
                found.append(name)
    return found


@pytest.fixture(params=_folding_backends())
def folds(request: pytest.FixtureRequest):
    """The test runs with each backend that has the kernels, forced."""
    with fusedres.use_backend(request.param):
        yield request.param


def _image(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(dtype).contiguous(memory_format=CHANNELS_LAST)


def _rows(y: Tensor, stride: int = 1) -> Tensor:
    return y[:, :, ::stride, ::stride].double().movedim(1, -1).flatten(0, -2)


# --- the raw ops, against float64 formulas ----------------------------------------------------------------------------

SHAPES = [((2, 16, 9, 7), 33, 1), ((3, 65, 6, 6), 20, 2), ((1, 3, 8, 8), 7, 3), ((40, 5, 1, 1), 1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
shapes = pytest.mark.parametrize(("shape", "channels", "stride"), SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Operands:
    """Tensors of the four ops, and a second y whose pixels are as many."""

    def __init__(self, shape: tuple[int, ...], channels: int, stride: int, dtype: torch.dtype) -> None:
        n, c, h, w = shape
        wide = family.wide_dtype(dtype)
        self.out_shape = (n, channels, -(-h // stride), -(-w // stride))
        self.y, self.y2 = _image(*shape, dtype=dtype), _image(n, 4, *self.out_shape[2:], dtype=dtype, seed=1)
        self.dy, self.residual = (_image(*self.out_shape, dtype=dtype, seed=s) for s in (2, 3))
        self.mask = pack_mask(_image(*self.out_shape, seed=4) > 0)
        matrices = [(channels, c), (channels, 4), (c, c), (4, 4)]
        self.folded, self.folded2, self.mixing, self.mixing2 = (torch.randn(s).to(dtype) for s in matrices)
        self.shift, self.offset, self.offset2 = (torch.randn(s).to(wide) for s in (channels, c, 4))
        self.dtype = dtype

    def close(self, got: Tensor, want: Tensor, dtype: torch.dtype | None = None, terms: float = 1.0) -> None:
        """Within what one rounding to ``dtype``, or sums of a few hundred terms where ours are taken, may lose.

        ``terms`` is how large the sums are before they cancel.
        """
        sums = 2.0**-46 if self.dtype == torch.float64 else 2.0**-20
        eps = max(torch.finfo(dtype or self.dtype).eps, sums)
        assert (got.double() - want).abs().max() <= eps * max(terms, want.abs().max().item())


@shapes
@dtypes
def test_moments(shape, channels, stride, dtype, folds) -> None:
    moments, *_ = _implementations()
    o = Operands(shape, channels, stride, dtype)
    y = o.y + 3
    mean, cov = moments(y, None, stride)
    rows = _rows(y, stride)
    assert mean.dtype == cov.dtype == torch.float64
    o.close(mean, rows.mean(0), torch.float64)
    want = rows.T.cov(correction=0).view(shape[1], shape[1]) * rows.size(0)
    o.close(cov, want, torch.float64, terms=rows.square().sum(0).max().item())
    torch.testing.assert_close(cov, cov.T)


@shapes
@dtypes
@pytest.mark.parametrize("second", [False, True], ids=["one", "pair"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
def test_apply(shape, channels, stride, dtype, relu, second, folds) -> None:
    _, apply, *_ = _implementations()
    o = Operands(shape, channels, stride, dtype)
    pair = (o.y2, o.folded2, 1, None, None) if second else (None, None, 1, o.residual, None)
    out, mask = apply(o.y, None, o.folded, o.shift, stride, *pair, relu, relu)
    want = _rows(o.y, stride) @ o.folded.double().T + o.shift.double()
    want = want + (_rows(o.y2) @ o.folded2.double().T if second else _rows(o.residual))
    assert out.shape == o.out_shape
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=CHANNELS_LAST)
    o.close(_rows(out), want.relu() if relu else want)
    assert torch.equal(mask, pack_mask(~(out <= 0)) if relu else mask[:0])
    again, nothing = apply(o.y, None, o.folded, o.shift, stride, *pair, relu, False)
    assert torch.equal(out, again)
    assert nothing.numel() == 0


@shapes
@dtypes
@pytest.mark.parametrize("masked", [True, False])
def test_backward_reduce(shape, channels, stride, dtype, masked, folds) -> None:
    *_, reduce, _ = _implementations()
    o = Operands(shape, channels, stride, dtype)
    mask = o.mask if masked else None
    want = torch.where(unpack_mask(mask, o.dy), o.dy, 0) if masked else o.dy
    g, sum_g, products, products2 = reduce(o.dy, mask, o.y, None, stride, o.y2, 1, masked, True)
    if masked:
        assert torch.equal(g, want)
        assert g.is_contiguous(memory_format=CHANNELS_LAST)
    kept = family.matrix_dtype(dtype)
    assert sum_g.dtype == torch.float64
    assert products.dtype == products2.dtype == kept
    o.close(sum_g, _rows(want).sum(0), torch.float64)
    o.close(products, _rows(want).T @ _rows(o.y, stride), kept)
    o.close(products2, _rows(want).T @ _rows(o.y2), kept)
    g, only, *nothing = reduce(o.dy, mask, o.y, None, stride, None, 1, False, False)
    o.close(only, _rows(want).sum(0), torch.float64)
    assert [t.numel() for t in (g, *nothing)] == [0, 0, 0]


@shapes
@dtypes
@pytest.mark.parametrize("masked", [True, False])
def test_backward_apply(shape, channels, stride, dtype, masked, folds) -> None:
    *_, apply = _implementations()
    o = Operands(shape, channels, stride, dtype)
    mask = o.mask if masked else None
    g = _rows(torch.where(unpack_mask(mask, o.dy), o.dy, 0) if masked else o.dy)
    first = (o.y, None, o.folded, o.mixing, o.offset, stride)
    dx, dx2, sums = apply(o.dy, mask, *first, o.y2, o.folded2, o.mixing2, o.offset2, 1, True, True)
    want = torch.zeros(shape, dtype=torch.float64)
    rows = g @ o.folded.double() + _rows(o.y, stride) @ o.mixing.double() + o.offset.double()
    want[:, :, ::stride, ::stride] = rows.view(shape[0], *o.out_shape[2:], -1).movedim(-1, 1)
    assert dx.stride() == o.y.stride()
    o.close(dx, want)
    o.close(_rows(dx2), g @ o.folded2.double() + _rows(o.y2) @ o.mixing2.double() + o.offset2.double())
    assert sums.numel() == 0
    alone, nothing, _ = apply(o.dy, mask, *first, None, None, None, None, 1, True, False)
    assert torch.equal(alone, dx)
    assert nothing.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_opcheck(dtype, folds) -> None:
    """The calls that the generic test does not make: 16 bits, a mask without a residual, parts that are not wanted."""
    moments, apply, reduce, backward = _implementations()
    for shape, channels, stride in SHAPES:
        o = Operands(shape, channels, stride, dtype)
        torch.library.opcheck(moments, (o.y, None, stride))
        torch.library.opcheck(apply, (o.y, None, o.folded, o.shift, stride, None, None, 1, None, None, True, True))
        second = (o.y2, o.folded2, 1, None, None)
        torch.library.opcheck(apply, (o.y, None, o.folded, o.shift, stride, *second, False, False))
        torch.library.opcheck(reduce, (o.dy, o.mask, o.y, None, stride, o.y2, 1, False, True))
        torch.library.opcheck(reduce, (o.dy, None, o.y, None, stride, None, 1, False, False))
        second = (o.y2, o.folded2, o.mixing2, o.offset2, 1)
        for wanted in ((True, True), (True, False), (False, True)):
            args = (o.dy, o.mask, o.y, None, o.folded, o.mixing, o.offset, stride, *second, *wanted)
            torch.library.opcheck(backward, args)


# --- the rule ---------------------------------------------------------------------------------------------------------

TABLE = [(op, case) for op in FOLDED for case in verification.cases(op)]


@pytest.mark.parametrize(("op", "case"), TABLE, ids=[f"{op}-{case.name}" for op, case in TABLE])
def test_rule(op, case, folds) -> None:
    assert not verification.pooled_failures([case], folds)


@pytest.mark.parametrize("op", FOLDED)
def test_rule_of_auto(op) -> None:
    for case in verification.cases(op, quick=True)[::3]:
        assert not verification.failures(case), case.name


def _case(shape: tuple[int, ...], channels: int, stride: int = 1, **options) -> Case:
    return Case(OP, shape=shape, layout="channels_last", conv=(channels, 1, stride, 0, 1, False), **options)


# (N, C, H, W), K: fewer pixels than folding takes, the fewest, ResNet-50's first stages
SIZES = [
    ((1, 16, 7, 7), 64),
    ((1, 12, 7, 7), 48),
    ((1, 3, 7, 7), 12),
    ((4, 65, 9, 9), 260),
    ((2, 64, 56, 56), 256),
    ((3, 128, 28, 28), 512),
    ((6, 256, 14, 14), 1024),
]
LARGE = [
    ((8, 64, 56, 56), 256),
    ((64, 64, 56, 56), 256),
    ((16, 128, 28, 28), 512),
    ((32, 256, 14, 14), 1024),
    ((64, 512, 7, 7), 2048),
    ((6, 1024, 28, 28), 2048),
]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("shape", "channels"),
    [*SIZES, *(pytest.param(*size, marks=pytest.mark.slow) for size in LARGE)],
    ids=str,
)
def test_rule_over_sizes(shape, channels, dtype, folds) -> None:
    residual = "channels_last" if channels % 3 else None
    assert not verification.pooled_failures([_case(shape, channels, dtype=dtype, residual=residual)], folds)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("distribution", ["normal", *verification.FOLDED_DISTRIBUTIONS])
@pytest.mark.parametrize("weights", ["random", "zero_sum"])
@pytest.mark.parametrize("channels", [16, 64, 128, 256])
def test_rule_over_distributions(channels, weights, distribution, dtype, folds) -> None:
    case = _case((6, channels, 14, 14), 4 * channels, dtype=dtype, distribution=distribution, weights=weights)
    assert not verification.failures(replace(case, residual="channels_last"), folds)
    assert not verification.failures(replace(case, op=PAIR_1X1, conv=(4 * channels, 1, 2, 0, 1, False)), folds)


# --- what folds, and what does not ------------------------------------------------------------------------------------


def _norm(channels: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    weight, bias = (0.5 + torch.rand(channels, generator=g)).to(dtype), torch.randn(channels, generator=g).to(dtype)
    mean, var = torch.zeros(channels, dtype=dtype), torch.ones(channels, dtype=dtype)
    return [mean, var, weight.requires_grad_(), bias.requires_grad_()]


def _weight(channels: int, inputs: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn((channels, inputs, 1, 1), generator=g) / inputs**0.5).to(dtype).requires_grad_()


def _eager(y: Tensor, w: Tensor, norm: list[Tensor], residual: Tensor | None = None, stride: int = 1, **options):
    act, options = options.get("act", "relu"), {"training": True} | {k: v for k, v in options.items() if k != "act"}
    z = nn.functional.batch_norm(nn.functional.conv2d(y, w, None, stride), *norm, **options)
    z = z if residual is None else z + residual
    return torch.relu(z) if act else z


@pytest.fixture
def is_folded(record_ops):
    """A function that runs `call()` and says whether it folded; what convolves must then not be called."""

    def run(call) -> bool:
        with record_ops() as record:
            call()
        names = {str(func).removesuffix(".default") for func, *_ in record.calls}
        moments = any(name.startswith("fusedres.conv1x1_moments") for name in names)
        applied = any(name.startswith("fusedres.conv1x1_bn_act_apply") for name in names)
        assert applied != any("convolution" in name for name in names)
        assert moments or not applied
        return applied

    return run


def test_what_folds(folds, is_folded, monkeypatch) -> None:
    monkeypatch.setattr(registry, "CPU_CAPABILITY", "avx512")  # where "auto" was measured
    y, w, residual = _image(2, 8, 6, 6).requires_grad_(), _weight(16, 8), _image(2, 16, 6, 6)

    def call(y: Tensor = y, w: Tensor = w, residual: Tensor | None = residual, **options) -> bool:
        options = {"training": True, "folding": "always"} | options
        return is_folded(lambda: F.conv1x1_bn_act(y, w, *_norm(w.size(0), w.dtype), residual, **options))

    assert call()
    assert not call(folding="auto")  # too small to gain
    assert not call(folding="never")
    assert not call(training=False)
    gains = {"y": _image(8, 16, 56, 56), "w": _weight(64, 16), "residual": None, "folding": "auto"}
    assert call(**gains)
    assert not call(**gains | {"y": gains["y"].contiguous()})
    assert call(**gains | {"y": gains["y"].bfloat16(), "w": gains["w"].bfloat16()})
    assert not call(**gains | {"y": gains["y"].half(), "w": gains["w"].half()})
    assert call(residual=None, stride=2, y=_image(4, 8, 6, 6))
    assert call(residual=None, stride=(2, 2), y=_image(4, 8, 6, 6))
    assert not call(residual=None, stride=(2, 1), y=_image(4, 8, 6, 6))
    assert not call(residual=_image(2, 16, 1, 6))  # broadcasts
    assert not call(residual=residual.double())  # promotes
    assert call(residual=residual.contiguous())
    assert call(y=y.contiguous())
    assert call(y=y.bfloat16(), w=w.bfloat16(), residual=residual.bfloat16())
    assert not call(y=y.half(), w=w.half(), residual=residual.half())  # its range is too small
    assert call(y=y.double(), w=w.double(), residual=residual.double())
    assert not call(y=_image(0, 8, 6, 6), residual=None)
    assert not call(y=_image(1, 8, 5, 6), residual=None)  # 30 pixels, fewer than 4 for each channel
    assert call(y=_image(1, 8, 4, 8), residual=None)  # 32
    wide = _image(4, 128, 14, 14)
    assert call(y=wide, w=_weight(16, 128), residual=None)
    assert not call(y=wide, w=_weight(16, 128), residual=None, folding="auto")
    assert not call(y=torch.full_like(y, float("nan")), residual=None)  # what eager makes of it


def test_what_folds_of_a_pair(folds, is_folded) -> None:
    y, w = _image(2, 8, 6, 6).requires_grad_(), _weight(16, 8)
    y2, w2 = _image(2, 12, 12, 12), _weight(16, 12)

    def call(y: Tensor = y, y2: Tensor = y2, w2: Tensor = w2, norm2: list[Tensor] | None = None, **options) -> bool:
        options = {"training": True, "stride2": 2, "folding": "always"} | options
        norms = _norm(16), norm2 or _norm(w2.size(0))
        return is_folded(lambda: F.conv1x1_bn_add_conv1x1_bn_act(y, w, *norms[0], y2, w2, *norms[1], **options))

    assert call()
    assert not call(folding="auto")  # too small to gain
    assert not call(training2=False)
    assert not call(training=False, training2=True)
    assert call(y2=y2.contiguous())
    assert not call(y2=_image(2, 12, 1, 12), stride2=(1, 2))  # broadcasts
    assert not call(y2=_image(2, 20, 12, 12), w2=_weight(16, 20))  # 72 pixels for 20 channels
    assert not call(y2=_image(2, 12, 12, 12) + 1e8)  # one of them is beyond the guard
    assert call(norm2=[None, None, None, None])


def test_what_serves_without_kernels(monkeypatch, is_folded) -> None:
    monkeypatch.setattr(family.CONV1X1_MOMENTS, "cpu", None)
    y, w = _image(2, 8, 6, 6), _weight(16, 8)
    assert not is_folded(lambda: F.conv1x1_bn_act(y, w, *_norm(16), training=True, folding="always"))


def test_folding_choice() -> None:
    def choice(mode="auto", dtype=torch.float32, device="cpu", channels=(64,), outputs=256, pixels=30_000, **options):
        return folding.folding_choice(mode, dtype, device, channels, outputs, pixels, **options)

    assert choice()[0]
    assert choice(dtype=torch.bfloat16)[0]
    for change, says in (
        ({"mode": "never"}, "never"),
        ({"training": False}, "evaluation"),
        ({"traced": True}, "traced"),
        ({"fits": False}, "one GEMM"),
        ({"device": "xpu"}, "measured on xpu: nothing"),
        ({"device": "cuda", "measured": "plain"}, "measured on cuda: plain"),
        ({"pixels": 255}, "255 pixels"),
        ({"channels_last": False}, "channels_last"),
        ({"device": "cuda"}, "cuda"),
        ({"channels": (64, 65)}, "65 to 256 channels"),
        ({"channels": (129,), "outputs": 1024}, "129 to 1024 channels"),
        ({"pixels": 10_000, "image": 100}, "10000 pixels"),
        ({"pixels": 10_000, "dtype": torch.bfloat16}, "10000 pixels"),
        ({"dtype": torch.float16}, "float16"),
        ({"capability": "avx2"}, "avx2"),
    ):
        folds, why = choice(**change)
        assert not folds, change
        assert says in why
    assert choice(device="cuda", measured="fold", channels=(512,))[0]
    assert choice(channels=(128, 256), outputs=512, pixels=6_272)[0]
    assert not choice(channels=(128, 256), outputs=512, pixels=12_544)[0]
    assert not choice(channels=(256,), outputs=1024, pixels=6_272)[0]
    for change in ({"channels_last": False}, {"device": "cuda"}, {"channels": (64, 65)}, {"capability": "avx2"}):
        assert choice("always", **change)[0]
    assert not choice("always", pixels=255)[0]


def test_numerically_safe() -> None:
    easy = folding.Conditioning(2.0, 1.5)

    def safe(found: folding.Conditioning, dtype=torch.float32, weight_dtype=None, sums="float64") -> bool:
        return folding.numerically_safe(found, dtype, weight_dtype or dtype, sums)[0]

    for dtype, sums in itertools.product(set(DTYPES) - {torch.float16}, folding.SUMS):
        assert safe(easy, dtype, sums=sums)
    hard, equal = easy._replace(cancellation=1e3), easy._replace(cancellation=1e3, rounding=1e3)
    assert not safe(hard, sums="plain")
    assert safe(hard, sums="shifted")
    assert not safe(equal, sums="shifted")
    assert safe(equal, sums="float64")
    assert safe(hard, torch.bfloat16)
    assert safe(hard, torch.float64)
    rounded = easy._replace(rounding=100.0)
    assert not safe(rounded, torch.bfloat16)
    assert safe(rounded, torch.bfloat16, torch.float32)
    assert safe(rounded, sums="shifted")
    nan = easy._replace(cancellation=float("nan"))
    assert folding.numerically_safe(nan, torch.float32, torch.float32, "float64")[1].startswith("cancellation of nan")
    assert not safe(nan)
    assert folding.safe_unseen(torch.float32, "float64")
    assert not folding.safe_unseen(torch.float32, "shifted")
    assert not folding.safe_unseen(torch.bfloat16, "float64")


def test_environment(monkeypatch) -> None:
    assert folding.folding_asked("auto") == "auto"
    monkeypatch.setattr(folding, "_default", folding._checked("never", "FUSEDRES_FOLDING"))
    assert folding.folding_asked("auto") == "never"
    assert folding.folding_asked("always") == "always"
    with pytest.raises(ValueError, match="FUSEDRES_FOLDING must be one of auto, always, never, but got 'yes'"):
        folding._checked("yes", "FUSEDRES_FOLDING")


def test_conditioning() -> None:
    """Against the formulas, channel by channel."""
    y, w = _image(4, 6, 5, 5) + 2, _weight(9, 6)
    mean, cov = family.CONV1X1_MOMENTS.reference(y, None, 1)
    mu, variance = moments = family.output_moments(w.detach(), mean, cov, 100)
    x = nn.functional.conv2d(y.double(), w.detach().double())
    torch.testing.assert_close(mu, x.mean((0, 2, 3)))
    torch.testing.assert_close(variance, x.var((0, 2, 3), correction=0))
    found = family.conditioning(w, mean, cov, 100, moments, 1e-3)
    squares, var = w.detach().double().square()[:, :, 0, 0], variance + 1e-3
    second, variance = _rows(y).square().mean(0), _rows(y).var(0, correction=0)
    assert found.cancellation == pytest.approx(((squares * second).sum(1) / var).max().item())
    assert found.rounding == pytest.approx(((squares * variance).sum(1) / var).max().item())


# --- the guard --------------------------------------------------------------------------------------------------------

GUARDED = {
    "rounding-bf16": _case((4, 64, 14, 14), 256, dtype="bf16", distribution="equal_1%", weights="zero_sum"),
    "rounding-f32": _case((4, 64, 14, 14), 256, distribution="equal_1%", weights="zero_sum"),
}


@pytest.mark.parametrize("name", GUARDED)
def test_guard(name, folds, is_folded, monkeypatch) -> None:
    """It acts, and without it the rule is broken."""
    case = GUARDED[name]
    if case.dtype == "f32" and folds == "reference":
        pytest.skip("sums in float64 need no guard")
    tensors = verification.make_inputs(case)
    assert not is_folded(lambda: verification.ours(case, tensors))
    assert not verification.failures(case, folds)
    reasons = []

    def safe(*args) -> tuple[bool, str]:
        reasons.append(folding.numerically_safe(*args)[1])
        return True, ""

    monkeypatch.setattr(folded_call, "numerically_safe", safe)
    assert verification.failures(case, folds)
    assert reasons[0].startswith(name.partition("-")[0])


def test_guard_leaves_statistics_to_the_plain_path(folds) -> None:
    """They move once."""
    case = GUARDED["rounding-bf16"]
    tensors = verification.make_inputs(replace(case, momentum=None))
    theirs = verification.make_inputs(replace(case, momentum=None))
    verification.ours(replace(case, momentum=None), tensors)
    verification.eager(replace(case, momentum=None), theirs)
    assert tensors["num_batches_tracked"] == theirs["num_batches_tracked"] == 4
    torch.testing.assert_close(tensors["running_mean"], theirs["running_mean"], rtol=1e-3, atol=1e-3)


# --- what is computed and kept ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ["relu", None])
def test_saved_for_backward(dtype, act, folds) -> None:
    """y, the parameters, moments, vectors, at most one bit per element of the output; and nothing that is as large."""
    y, w, norm = _image(4, 16, 32, 32, dtype=dtype).requires_grad_(), _weight(64, 16, dtype), _norm(64)
    residual = _image(4, 64, 32, 32, dtype=dtype, seed=1).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = F.conv1x1_bn_act(y, w, *norm, residual, training=True, act=act, folding="always")
    fresh = [t for t in saved if all(t.data_ptr() != p.data_ptr() for p in (y, w, *norm))]
    assert {t.data_ptr() for t in saved if t.numel() > 64} >= {y.data_ptr(), w.data_ptr()}
    assert max(t.numel() for t in fresh) <= max(out.numel() // 8, 16 * 16)
    element = 8 if dtype == torch.float32 else 4
    matrices = 16 * 16 * element + (16 + 3 * 64) * 8
    assert sum(t.numel() * t.element_size() for t in fresh) <= matrices + (out.numel() // 8 if act else 0)


def test_saved_for_backward_of_a_pair(folds, saved_bytes) -> None:
    y, w = _image(4, 16, 16, 16).requires_grad_(), _weight(64, 16)
    y2, w2 = _image(4, 32, 32, 32).requires_grad_(), _weight(64, 32)
    out, size = saved_bytes(
        lambda: F.conv1x1_bn_add_conv1x1_bn_act(
            y, w, *_norm(64), y2, w2, *_norm(64), stride2=2, training=True, folding="always"
        )
    )
    inputs = 4 * (y.numel() + w.numel() + y2.numel() + w2.numel() + 2 * 64)
    assert size <= inputs + out.numel() // 8 + 8 * (16**2 + 16 + 32**2 + 32 + 6 * 64)


def test_the_wide_tensor_is_never_made(folds, record_ops) -> None:
    """Of its size there are the output and, in the backward, what comes in and the residual's gradient."""
    if folds == "reference":
        pytest.skip("float64 intermediates")
    y, w, norm = _image(4, 16, 32, 32).requires_grad_(), _weight(64, 16), _norm(64)
    residual = _image(4, 64, 32, 32).requires_grad_()
    with record_ops() as record:
        out = F.conv1x1_bn_act(y, w, *norm, residual, training=True, folding="always")
        dy = torch.ones_like(out)
        torch.autograd.grad(out, (y, w, *norm[2:], residual), dy)
    known = {t.untyped_storage().data_ptr() for t in (out, dy, residual)}
    wide = {
        t.untyped_storage().data_ptr()
        for *_, results in record.calls
        for t in (results if isinstance(results, (tuple, list)) else (results,))
        if isinstance(t, Tensor) and t.untyped_storage().nbytes() >= 4 * out.numel()
    }
    assert len(wide - known) <= 1


SINGLE = ("y", "conv_weight", "weight", "bias", "residual")


@pytest.mark.parametrize("act", ["relu", None])
@pytest.mark.parametrize("wanted", [s for k in range(1, 5) for s in itertools.combinations(SINGLE, k)], ids="-".join)
def test_frozen(wanted, act, folds) -> None:
    """Each subset of gradients has the bits that it has among all."""

    def gradients(names: tuple[str, ...]) -> dict[str, Tensor]:
        mean, var, weight, bias = _norm(6)
        leaves = dict(zip(SINGLE, (_image(3, 4, 6, 5), _weight(6, 4), weight, bias, _image(3, 6, 6, 5)), strict=True))
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in names)
        y, w, *rest = leaves.values()
        out = F.conv1x1_bn_act(y, w, mean, var, *rest, training=True, act=act, folding="always")
        out.backward(_image(3, 6, 6, 5, seed=2))
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == list(names)
        return {name: leaves[name].grad for name in names}

    some, everything = gradients(wanted), gradients(SINGLE)
    assert all(torch.equal(some[name], everything[name]) for name in wanted)


PAIR_SUBSETS = [s for k in (1, 2, 7) for s in itertools.combinations(range(8), k)]


@pytest.mark.parametrize("wanted", PAIR_SUBSETS, ids=str)
def test_frozen_of_a_pair(wanted, folds) -> None:
    def gradients(indices: tuple[int, ...]) -> dict[int, Tensor]:
        norms = _norm(6), _norm(6, seed=1)
        first = [_image(3, 4, 6, 5), _weight(6, 4), *norms[0][2:]]
        second = [_image(3, 7, 12, 10), _weight(6, 7), *norms[1][2:]]
        leaves = first + second
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i in indices)
        out = F.conv1x1_bn_add_conv1x1_bn_act(
            *first[:2], *norms[0], *second[:2], *norms[1], stride2=2, training=True, folding="always"
        )
        out.backward(_image(3, 6, 6, 5, seed=2))
        assert [leaf.grad is not None for leaf in leaves] == [i in indices for i in range(8)]
        return {i: leaves[i].grad for i in indices}

    some, everything = gradients(wanted), gradients(tuple(range(8)))
    for i in wanted:
        torch.testing.assert_close(some[i], everything[i], rtol=1e-5, atol=1e-6)


def test_no_gradient_is_wanted(folds) -> None:
    y, w, norm = _image(3, 4, 6, 5), _weight(6, 4), _norm(6)
    want = F.conv1x1_bn_act(y, w, *norm, training=True, folding="always")
    with torch.no_grad():
        again = [t.clone() for t in _norm(6)]
        out = F.conv1x1_bn_act(y.requires_grad_(), w, *again, training=True, folding="always")
    assert torch.equal(out, want)
    assert not out.requires_grad
    assert torch.equal(again[0], norm[0])
    with torch.inference_mode():
        assert torch.equal(F.conv1x1_bn_act(y, w, *_norm(6), training=True, folding="always"), want)


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0, 2.0, -1.0, float("nan")], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_running_statistics(momentum, strided, folds) -> None:
    module = nn.BatchNorm2d(6, momentum=momentum)
    mean, var = torch.zeros(6), torch.ones(6)
    if strided:
        mean, var = torch.zeros(12)[::2], torch.ones(18)[::3]
    count = torch.tensor(0)
    w = _weight(6, 4)
    for step in range(3):
        y = _image(3, 4, 6, 5, seed=step) + step
        module(nn.functional.conv2d(y, w))
        F.conv1x1_bn_act(y, w, mean, var, training=True, momentum=momentum, num_batches_tracked=count, folding="always")
    assert count == 3
    torch.testing.assert_close(mean, module.running_mean, equal_nan=True)
    torch.testing.assert_close(var, module.running_var, equal_nan=True)


def test_statistics_of_a_pair(folds) -> None:
    """Each has its own momentum and eps; one norm in both places moves twice."""
    y, w, y2, w2 = _image(3, 4, 6, 5), _weight(6, 4), _image(3, 7, 6, 5, seed=1), _weight(6, 7, seed=1)
    options = {"training": True, "folding": "always"}
    mine, theirs = (_norm(6), _norm(6, seed=1)), (_norm(6), _norm(6, seed=1))
    out = F.conv1x1_bn_add_conv1x1_bn_act(
        y, w, *mine[0], y2, w2, *mine[1], **options, momentum=0.3, momentum2=0.6, eps=0.1, eps2=0.2
    )
    a = _eager(y, w, theirs[0], momentum=0.3, eps=0.1, act=None)
    b = _eager(y2, w2, theirs[1], momentum=0.6, eps=0.2, act=None)
    torch.testing.assert_close(out, torch.relu(a + b))
    for i, j in zip(mine[0] + mine[1], theirs[0] + theirs[1], strict=True):
        torch.testing.assert_close(i, j)

    shared, plain, count = _norm(6), _norm(6), torch.tensor(0)
    counts = {"num_batches_tracked": count, "num_batches_tracked2": count}
    F.conv1x1_bn_add_conv1x1_bn_act(y, w, *shared, y2, w2, *shared, **options, **counts)
    for i, v in ((y, w), (y2, w2)):
        _eager(i, v, plain)
    assert count == 2
    torch.testing.assert_close(shared[0], plain[0])
    torch.testing.assert_close(shared[1], plain[1])


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_that_cannot_be_written_one_by_one(name, folds) -> None:
    """An expanded vector, and an inference tensor: both statistics move, or neither does."""
    if folds == "reference":
        pytest.skip("its batch norm writes one after the other")
    y, w = _image(3, 4, 6, 5), _weight(6, 4).detach()
    for make in (lambda: torch.ones(1).expand(6), lambda: torch.inference_mode()(lambda: torch.ones(6))()):
        norm = {"running_mean": torch.zeros(6), "running_var": torch.ones(6), "num_batches_tracked": torch.tensor(0)}
        norm[name] = make()
        before = {k: v.clone() for k, v in norm.items()}
        try:
            F.conv1x1_bn_act(y, w, **norm, training=True, folding="always")
        except RuntimeError:
            assert all(torch.equal(norm[k], before[k]) for k in norm)
        else:
            assert not any(torch.equal(norm[k], before[k]) for k in norm)


# --- tensors as they come ---------------------------------------------------------------------------------------------


def _compare(mine, theirs, rtol: float = 1e-4, atol: float = 1e-4) -> None:
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, i=i: f"value {i}: {m}")


def test_residual_is_y(folds) -> None:
    results = []
    for name in ("ours", "eager"):
        y, w, norm = _image(3, 4, 6, 5).requires_grad_(), _weight(4, 4), _norm(4)
        if name == "ours":
            out = F.conv1x1_bn_act(y, w, *norm, y, training=True, folding="always")
        else:
            out = _eager(y, w, norm, y)
        results.append([out, *norm[:2], *torch.autograd.grad(out, [y, w, *norm[2:]], _image(3, 4, 6, 5, seed=1))])
    _compare(*results)


def test_one_y_for_both(folds) -> None:
    results = []
    for name in ("ours", "eager"):
        y, w, norm = _image(3, 4, 6, 5).requires_grad_(), _weight(6, 4), _norm(6)
        if name == "ours":
            options = {"training": True, "folding": "always"}
            out = F.conv1x1_bn_add_conv1x1_bn_act(y, w, *norm, y, w, *norm, **options)
        else:
            out = torch.relu(_eager(y, w, norm, act=None) + _eager(y, w, norm, act=None))
        results.append([out, *norm[:2], *torch.autograd.grad(out, [y, w, *norm[2:]], _image(3, 6, 6, 5, seed=1))])
    _compare(*results)


@pytest.mark.parametrize("layout", verification.LAYOUTS)
@pytest.mark.parametrize("layout2", ["contiguous", "channels_last", "strided"])
def test_memory_formats(layout, layout2, folds) -> None:
    """Every layout of y, of the residual, of the weight and of dy."""
    results = []
    for name in ("ours", "eager"):
        y = verification.lay_out(_image(3, 4, 6, 5), layout).requires_grad_()
        residual = verification.lay_out(_image(3, 6, 6, 5, seed=1), layout2).requires_grad_()
        w = verification.lay_out(_weight(6, 4).detach(), layout2).requires_grad_()
        norm, dy = _norm(6), verification.lay_out(_image(3, 6, 6, 5, seed=2), layout2)
        if name == "ours":
            out = F.conv1x1_bn_act(y, w, *norm, residual, training=True, folding="always")
            assert out.is_contiguous(memory_format=CHANNELS_LAST)
        else:
            out = _eager(y, w, norm, residual)
        results.append([out, *norm[:2], *torch.autograd.grad(out, [y, w, *norm[2:], residual], dy)])
    _compare(*results)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("target", ["y", "conv_weight", "weight", "bias", "residual", "dy"])
def test_specials_propagate_as_in_eager(target, value, folds) -> None:
    if target == "weight" and value == value:
        pytest.skip("an infinite scale makes NaN of all its channel, in eager of the zeros in it")
    results = []
    for name in ("ours", "eager"):
        y, w, norm = _image(3, 4, 6, 5), _weight(6, 4), _norm(6)
        residual, dy = _image(3, 6, 6, 5, seed=1), _image(3, 6, 6, 5, seed=2)
        named = {"y": y, "conv_weight": w, "weight": norm[2], "bias": norm[3], "residual": residual, "dy": dy}
        with torch.no_grad():
            named[target][(1, 2, 0, 0) if named[target].dim() == 4 else 2] = value
        leaves = [y.requires_grad_(), w, *norm[2:], residual.requires_grad_()]
        if name == "ours":
            out = F.conv1x1_bn_act(y, w, *norm, residual, training=True, folding="always")
        else:
            out = _eager(y, w, norm, residual)
        results.append([out, *norm[:2], *torch.autograd.grad(out, leaves, dy)])
    if target == "dy":  # eager has NaN where ours may have an infinity: in sums of infinite terms
        results = [[torch.where(t.isfinite(), t, torch.nan) for t in of] for of in results]
    _compare(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["y", "conv_weight", "weight"])
def test_change_in_place_before_backward_raises(name, folds) -> None:
    y, w, norm = _image(3, 4, 6, 5).requires_grad_(), _weight(6, 4), _norm(6)
    moved = y * 1
    out = F.conv1x1_bn_act(moved, w, *norm, training=True, folding="always")
    with torch.no_grad():
        {"y": moved, "conv_weight": w, "weight": norm[2]}[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_neither_on_run_nor_on_threads(dtype, folds) -> None:
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        y, w, norm = _image(4, 32, 28, 28, dtype=dtype).requires_grad_(), _weight(64, 32, dtype), _norm(64)
        residual, dy = (_image(4, 64, 28, 28, dtype=dtype, seed=s) for s in (1, 2))
        out = F.conv1x1_bn_act(y, w, *norm, residual.requires_grad_(), training=True, folding="always")
        results.append([out, *norm[:2], *torch.autograd.grad(out, [y, w, *norm[2:], residual], dy)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- autocast and compilers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rule_under_autocast(dtype, folds, monkeypatch) -> None:
    """float32 parameters: the weight is rounded once, where eager rounds it before the convolution."""

    def amped(forward):
        def run(case: Case, t: dict[str, Tensor]) -> Tensor:
            with torch.autocast("cpu", dtype):
                return forward(case, t | {"x": t["x"].float()})  # the conversion of y is autocast's

        return run

    make_inputs = verification.make_inputs

    def inputs(case: Case) -> dict[str, Tensor]:
        tensors = make_inputs(case)
        weight = torch.randn(tensors["conv_weight"].shape, generator=torch.Generator().manual_seed(0)) / 8
        return tensors | {"conv_weight": weight}

    monkeypatch.setattr(verification, "make_inputs", inputs)
    monkeypatch.setattr(verification, "_choices", lambda *a: [])  # which convolves without autocast
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    for distribution in ("normal", "mean_10", "mean_100", "equal_3%", "equal_1%"):
        case = _case((4, 64, 14, 14), 256, dtype=name, distribution=distribution, residual="channels_last")
        mine, theirs = (verification.run(case, amped(f)) for f in (verification.ours, verification.eager))
        assert mine.values["dconv_weight"].dtype == torch.float32
        bad = [str(m) for m in verification.compare(case, mine, theirs) if not m.ok]
        assert not bad, (distribution, bad)


def test_autocast_leaves_float64_alone(folds, is_folded) -> None:
    y, w, norm = _image(3, 4, 6, 5, dtype=torch.float64), _weight(6, 4, torch.float64), _norm(6, torch.float64)
    want = F.conv1x1_bn_act(y, w, *norm, training=True, folding="always")
    with torch.autocast("cpu", torch.bfloat16):
        assert is_folded(lambda: F.conv1x1_bn_act(y, w, *norm, training=True, folding="always"))
        out = F.conv1x1_bn_act(y, w, *norm, training=True, folding="always")
    assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dtype, dynamic, folds) -> None:
    """One graph without breaks; what folds in it is what need not look at values."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph.print_readable(print_output=False))
        return aot_eager(graph, inputs)

    def step(function, size: int) -> list[Tensor]:
        y, w, norm = _image(size, 4, 6, 5, dtype=dtype).requires_grad_(), _weight(6, 4, dtype), _norm(6)
        y2, w2, norm2 = _image(size, 7, 12, 10, dtype=dtype).requires_grad_(), _weight(6, 7, dtype), _norm(6, seed=1)
        out = function(y, w, norm, y2, w2, norm2)
        leaves = [y, w, *norm[2:], y2, w2, *norm2[2:]]
        return [out, *norm[:2], *norm2[:2], *torch.autograd.grad(out.float().square().sum(), leaves)]

    def mine(y, w, norm, y2, w2, norm2, folding="always"):
        options = {"training": True, "folding": folding}
        out = F.conv1x1_bn_add_conv1x1_bn_act(y, w, *norm, y2, w2, *norm2, stride2=2, **options)
        return F.conv1x1_bn_act(y, w, *norm, out, **options)

    compiled = torch.compile(mine, fullgraph=True, dynamic=dynamic, backend=backend)
    for size in (3, 4) if dynamic else (3,):
        want = step(lambda *args: mine(*args, folding="never"), size)
        for a, b in zip(step(compiled, size), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * max(1.0, b.abs().max().item()))
    unseen = folding.safe_unseen(dtype, "float64" if folds == "reference" else "shifted")
    assert ("conv1x1_moments" in graphs[0]) == unseen
    assert ("conv2d" in graphs[0]) != unseen


def test_meta_tensors_have_shapes() -> None:
    block = fusedres.Bottleneck(64, 16).to("meta")
    for mode in folding.FOLDINGS:
        block.folding = mode
        assert block(torch.empty(2, 64, 8, 8, device="meta")).shape == (2, 64, 8, 8)


@pytest.mark.parametrize("unfolded", ["conv", "shortcut"])
def test_always_folds_the_half_of_a_pair_that_can(unfolded, record_ops) -> None:
    shortcut = nn.Sequential(nn.Conv2d(16, 64, 1, bias=unfolded == "shortcut"), nn.BatchNorm2d(64))
    block = fusedres.Bottleneck(16, 16, downsample=shortcut)
    if unfolded == "conv":
        block.conv3 = nn.Conv2d(16, 64, 1)
    block.folding = "always"
    with record_ops() as record:
        block(_image(2, 16, 8, 8))
    assert [str(name).split(".")[1] for name, *_ in record.calls].count("conv1x1_bn_act_apply") == 1


def test_gradient_of_the_weight_has_its_strides(folds) -> None:
    w = _weight(64, 16).detach().contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    F.conv1x1_bn_act(_image(2, 16, 8, 8), w, *_norm(64), training=True, folding="always").sum().backward()
    assert w.grad.stride() == w.stride()


def test_functorch_takes_the_plain_path(folds, is_folded) -> None:
    y, w, (*_, weight, bias) = _image(3, 4, 6, 5), _weight(6, 4).detach(), _norm(6)

    def mine(y: Tensor, w: Tensor) -> Tensor:
        out = F.conv1x1_bn_act(y, w, None, None, weight.detach(), bias.detach(), training=True, folding="always")
        return out.square().sum()

    def theirs(y: Tensor, w: Tensor) -> Tensor:
        return _eager(y, w, [None, None, weight.detach(), bias.detach()]).square().sum()

    for transform in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(transform(mine, 1)(y, w), transform(theirs, 1)(y, w), rtol=1e-3, atol=1e-3)
    batch = torch.stack([y, 2 * y + 1])
    torch.testing.assert_close(torch.func.vmap(mine, (0, None))(batch, w), torch.func.vmap(theirs, (0, None))(batch, w))
    assert not is_folded(lambda: torch.func.vjp(mine, y, w))


@pytest.mark.parametrize("second", [False, True], ids=["one", "pair"])
def test_gradcheck_is_of_the_folded_path(second, folds, is_folded) -> None:
    """As in the generic tests of derivatives, whose cases must fold."""
    from .conftest import CALLS

    for call in CALLS:
        if call.case.op == (PAIR_1X1 if second else OP):
            tensors = call.tensors()
            expected = call.case.training and call.case.training2 in (None, True)
            assert is_folded(lambda call=call, tensors=tensors: call.ours(tensors)) == expected, call.name
