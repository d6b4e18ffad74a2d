"""1x1 convolutions folded into their batch norms, on the device: the ops, the calls, whole blocks and a network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres import verification
from fusedres.models import resnet50
from fusedres.nn.norm import folding_decision
from fusedres.ops import conv1x1_bn_act as family
from fusedres.ops import registry
from fusedres.ops.batch_norm_act_conv import activation
from fusedres.ops.layout import pack_mask, unpack_mask
from fusedres.training.networks import plain_twin
from fusedres.verification import Case, Result

from .conftest import DEVICE

pytestmark = pytest.mark.gpu

CHANNELS_LAST = torch.channels_last
ONE_NODE = "FoldedBottleneckFunctionBackward"
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def kernel(op: registry.Op) -> Callable[..., Any]:
    """The Triton launcher; on a CPU what serves there."""
    if DEVICE == "cpu":
        return op.cpu or op.reference
    if (reason := op.why_not("triton")) is not None:
        pytest.fail(f"triton does not serve {op.name}: {reason}")
    return op.triton


# ---- the passes over pixels ------------------------------------------------------------------------------------------

# (N, C, H, W) of y, output channels, and channels, stride of a second operand: whole tiles, and tails in all directions
SIZES = {
    "tiles": ((8, 64, 28, 28), 256, 128, 1),
    "strided": ((8, 128, 14, 14), 512, 256, 2),
    "wide": ((16, 512, 7, 7), 2048, 64, 1),
    "tails": ((3, 33, 9, 7), 20, 17, 2),
}
# Every kernel is compiled for each of them, and float32 has the tiles of its own.
OF_SIZES = [
    ("tiles", "bf16"),
    ("tails", "bf16"),
    ("strided", "bf16"),
    ("wide", "bf16"),
    ("tiles", "f32"),
    ("tails", "f32"),
]
sizes = pytest.mark.parametrize(("size", "dtype"), OF_SIZES, ids=["-".join(of) for of in OF_SIZES])


class Operands:
    """Of the four passes. What is normalised is exact in every dtype, so that every zero of it is one."""

    def __init__(self, size: str, dtype: str) -> None:
        (n, c, h, w), k, c2, self.stride2 = SIZES[size]
        self.generator = torch.Generator().manual_seed(0)
        self.dtype = DTYPES[dtype]
        self.y = self.image(n, c, h, w, eighths=True)
        self.y2 = self.image(n, c2, (h - 1) * self.stride2 + 1, w * self.stride2)
        self.dy, self.residual = self.image(n, k, h, w), self.image(n, k, h, w)
        self.mask, self.residual_mask = (pack_mask(self.image(n, k, h, w) > 0) for _ in range(2))
        self.folded, self.folded2 = (self.normal(k, i) / i**0.5 for i in (c, c2))
        self.mixing, self.mixing2 = (self.normal(i, i) / i**0.5 for i in (c, c2))
        self.shift, self.offset, self.offset2 = (self.normal(i).float() for i in (k, c, c2))
        mean, shift = (torch.randint(-8, 9, (c,), generator=self.generator) / 8 for _ in range(2))
        scale = torch.tensor([0.5, 1.0, -1.0, 2.0])[torch.randint(4, (c,), generator=self.generator)]
        self.norm = torch.stack([mean, scale, shift]).to(DEVICE)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype).to(DEVICE)

    def image(self, *shape: int, eighths: bool = False) -> Tensor:
        if eighths:
            values = (torch.randint(-24, 25, shape, generator=self.generator) / 8).to(self.dtype).to(DEVICE)
        else:
            values = self.normal(*shape)
        return values.contiguous(memory_format=CHANNELS_LAST)

    def rows(self, y: Tensor, stride: int = 1) -> Tensor:
        return y[:, :, ::stride, ::stride].double().permute(0, 2, 3, 1).reshape(-1, y.size(1))

    def activation(self, norm: Tensor | None) -> Tensor:
        if norm is None:
            return self.y
        mean, scale, shift = norm.double().view(3, 1, -1, 1, 1)
        return ((self.y.double() - mean) * scale + shift).relu().to(self.dtype)

    @property
    def g(self) -> Tensor:
        return self.rows(torch.where(unpack_mask(self.mask, self.dy), self.dy, 0.0))


def assert_rounded(got: Tensor, want: Tensor, terms: Tensor) -> None:
    """One rounding away from float64, and the sums in float32 of ``terms``, the sums of absolute values."""
    assert got.shape == want.shape
    bound = torch.finfo(got.dtype).eps * want.double().abs() + 2.0**-18 * terms
    assert ((got.double() - want.double()).abs() <= bound).all()


def as_image(rows: Tensor, like: Tensor) -> Tensor:
    n, _, h, w = like.shape
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)


def twice(op: registry.Op, *args: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the kernel gives, the same bits again, and what the reference does."""
    got, again, want = kernel(op)(*args), kernel(op)(*args), op.reference(*args)
    for a, b, c in zip(got, again, want, strict=True):
        assert torch.equal(a, b)
        assert (a.shape, a.dtype) == (c.shape, c.dtype)
        assert a.dim() != 4 or a.is_contiguous(memory_format=CHANNELS_LAST)
    return got, want


def of_products(rows: Tensor) -> Tensor:
    """The terms of a covariance: products, and what is taken off to centre them."""
    rows = rows.abs()
    return rows.T @ rows + torch.outer(rows.mean(0), rows.sum(0))


normalised = pytest.mark.parametrize("normalised", [False, True], ids=["plain", "norm"])


@sizes
@normalised
def test_moments(size, dtype, normalised):
    o = Operands(size, dtype)
    norm = o.norm if normalised else None
    (mean, cov), (want_mean, want_cov) = twice(family.CONV1X1_MOMENTS, o.y, norm, 1)
    rows = o.rows(o.activation(norm))
    assert_rounded(mean, want_mean, rows.abs().mean(0))
    assert_rounded(cov, want_cov, of_products(rows))
    assert torch.equal(cov, cov.T)
    if not normalised:
        (_, cov), (_, want_cov) = twice(family.CONV1X1_MOMENTS, o.y2, None, o.stride2)
        assert_rounded(cov, want_cov, of_products(o.rows(o.y2, o.stride2)))


@sizes
@pytest.mark.parametrize(
    ("normalised", "beside"),
    [
        (True, "residual"),
        (True, "pair"),
        (True, "nothing"),
        (False, "masked residual"),
        (False, "residual"),
        (False, "pair"),
    ],
)
def test_apply(size, dtype, normalised, beside):
    o = Operands(size, dtype)
    norm = o.norm if normalised else None
    second = (o.y2, o.folded2, o.stride2) if beside == "pair" else (None, None, 1)
    residual = o.residual if "residual" in beside else None
    residual_mask = o.residual_mask if "masked" in beside else None
    relu = beside != "masked residual"  # which is a gradient
    args = (o.y, norm, o.folded, o.shift, 1, *second, residual, residual_mask, relu, relu)
    (out, mask), (want, _) = twice(family.CONV1X1_BN_ACT_APPLY, *args)
    terms = o.rows(o.activation(norm)).abs() @ o.folded.double().abs().T + o.shift.abs()
    if beside == "pair":
        terms = terms + o.rows(o.y2, o.stride2).abs() @ o.folded2.double().abs().T
    if residual is not None:
        terms = terms + o.rows(residual).abs()
    assert_rounded(out, want, as_image(terms, out))
    assert torch.equal(mask, pack_mask(~(out <= 0)) if relu else mask.new_empty(0))


@sizes
@normalised
@pytest.mark.parametrize("pair", [False, True], ids=["one", "pair"])
def test_backward_reduce(size, dtype, normalised, pair):
    o = Operands(size, dtype)
    norm = o.norm if normalised else None
    second = (o.y2, o.stride2) if pair else (None, 1)
    got, want = twice(family.CONV1X1_BN_ACT_BACKWARD_REDUCE, o.dy, o.mask, o.y, norm, 1, *second, not pair, True)
    assert torch.equal(got[0], want[0])
    g = o.g.abs()
    assert_rounded(got[1], want[1], g.sum(0))
    assert_rounded(got[2], want[2], g.T @ o.rows(o.activation(norm)).abs())
    if pair:
        assert_rounded(got[3], want[3], g.T @ o.rows(o.y2, o.stride2).abs())


@sizes
@normalised
@pytest.mark.parametrize("pair", [False, True], ids=["one", "pair"])
def test_backward_apply(size, dtype, normalised, pair):
    o = Operands(size, dtype)
    norm = o.norm if normalised else None
    second = (o.y2, o.folded2, o.mixing2, o.offset2, o.stride2) if pair else (None, None, None, None, 1)
    args = (o.dy, o.mask, o.y, norm, o.folded, o.mixing, o.offset, 1, *second, True, pair)
    (dx, dx2, sums), (want, want2, _) = twice(family.CONV1X1_BN_ACT_BACKWARD_APPLY, *args)

    def terms(y: Tensor, stride: int, folded: Tensor, mixing: Tensor, offset: Tensor) -> Tensor:
        return o.g.abs() @ folded.double().abs() + o.rows(y, stride).abs() @ mixing.double().abs() + offset.abs()

    activated = o.activation(norm)
    assert_rounded(dx, want, as_image(terms(activated, 1, o.folded, o.mixing, o.offset), dx))
    if pair:
        of_dx2 = torch.zeros_like(dx2, dtype=torch.float64)
        strided = of_dx2[:, :, :: o.stride2, :: o.stride2]
        strided.copy_(as_image(terms(o.y2, o.stride2, o.folded2, o.mixing2, o.offset2), strided))
        assert_rounded(dx2, want2, of_dx2)
        left_out = torch.ones_like(dx2, dtype=torch.bool)
        left_out[:, :, :: o.stride2, :: o.stride2] = False
        assert not dx2[left_out].any()
    if not normalised:
        return
    assert not dx[activated <= 0].any()
    rows, centred = o.rows(dx), o.rows(o.y) - norm[0].double()
    assert_rounded(sums[0], rows.sum(0), rows.abs().sum(0))
    assert_rounded(sums[1], (rows * centred).sum(0), (rows * centred).abs().sum(0))


@sizes
def test_every_pass_reads_the_same_activation(size, dtype):
    """Of any numbers: what one pass takes for zero, so do the others."""
    o = Operands(size, dtype)
    c = o.y.size(1)
    o.y = (o.y + o.image(*o.y.shape)).contiguous(memory_format=CHANNELS_LAST)
    norm = torch.randn((3, c), generator=o.generator).to(DEVICE)
    identity = torch.eye(c, dtype=o.dtype, device=DEVICE)
    nothing = torch.zeros(c, device=DEVICE)
    none = (None, None, 1, None, None)
    read, _ = kernel(family.CONV1X1_BN_ACT_APPLY)(o.y, norm, identity, nothing, 1, *none, False, False)
    # products with an identity are exact in 16 bits; three products in TF32 leave a float32 two bits short
    mean, scale, shift = norm.double().abs().view(3, 1, -1, 1, 1)
    assert_rounded(read, o.activation(norm), 2.0**-4 * ((o.y.double().abs() + mean) * scale + shift))
    dy, zeros = torch.zeros_like(o.y), torch.zeros_like(identity)
    args = (dy, None, o.y, norm, zeros, zeros, nothing + 1, 1, None, None, None, None, 1, True, False)
    kept, _, _ = kernel(family.CONV1X1_BN_ACT_BACKWARD_APPLY)(*args)
    assert torch.equal(kept, (read > 0).to(o.dtype))
    if dtype == "bf16":
        (mean, cov), (_, products) = (
            kernel(family.CONV1X1_MOMENTS)(o.y, norm, 1),
            kernel(family.CONV1X1_BN_ACT_BACKWARD_REDUCE)(o.residual, None, o.y, norm, 1, None, 1, False, True)[1:3],
        )
        want_mean, want_cov = family.CONV1X1_MOMENTS.reference(read, None, 1)
        rows = o.rows(read)
        assert_rounded(mean, want_mean, rows.mean(0))
        assert_rounded(cov, want_cov, of_products(rows))
        assert_rounded(products, o.rows(o.residual).T @ rows, o.rows(o.residual).abs().T @ rows)


# ---- the small matrices ----------------------------------------------------------------------------------------------

# (K, C), and dtypes: of what is convolved, of the weight, of the norm's parameters
MATRICES = [
    ((256, 64), ("bf16", "f32", "f32")),
    ((2048, 512), ("bf16", "f32", "f32")),
    ((512, 256), ("bf16", "bf16", "f32")),
    ((512, 128), ("f32", "f32", "f32")),
    ((40, 23), ("bf16", "bf16", "bf16")),
    ((33, 17), ("f32", "f32", "f32")),
]
matrices = pytest.mark.parametrize(("size", "of"), MATRICES, ids=lambda v: "-".join(map(str, v)))


class SmallOperands:
    """Of the ops on the matrices of one convolution."""

    def __init__(self, size: tuple[int, int], of: tuple[str, str, str]) -> None:
        (k, c), (self.dtype, weight_dtype, param_dtype) = size, (DTYPES[name] for name in of)
        self.count = 4 * c + 3
        rows = torch.randn((self.count, c), dtype=torch.float64, device=DEVICE).relu() + 0.25
        self.mean = rows.mean(0)
        self.cov = (rows - self.mean).T @ (rows - self.mean)
        self.conv_weight = (torch.randn(k, c, 1, 1, device=DEVICE) / c**0.5).to(weight_dtype)
        self.weight, self.bias = (torch.randn(k, device=DEVICE).to(param_dtype) for _ in range(2))
        self.sum_g, self.products = (torch.randn(s, dtype=torch.float64, device=DEVICE) for s in ((k,), (k, c)))

    def fold(self, moments: Tensor | None = None, shift0: Tensor | None = None) -> tuple[Any, ...]:
        affine = (self.conv_weight, self.weight, self.bias)
        return *affine, self.mean, self.cov, moments, 1e-5, self.count, shift0, self.dtype

    def unfold(self, stats: Tensor, covariance: Tensor) -> tuple[Any, ...]:
        of_input, of_output = (self.mean, covariance), (stats, self.sum_g, self.products)
        return self.conv_weight, self.weight, *of_input, *of_output, self.count, self.dtype, True, True


def assert_near(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """One rounding away from each other, and sums in float64."""
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        bound = torch.finfo(a.dtype).eps * b.double().abs() + 1e-12 * b.double().abs().max()
        assert ((a.double() - b.double()).abs() <= bound).all()


@matrices
def test_fold(size, of):
    o = SmallOperands(size, of)
    got, want = twice(family.CONV1X1_BN_FOLD, *o.fold())
    assert_near(got, want)
    # the second of a pair, of moments that are known
    moments = want[2][:2] + 1e-3
    assert_near(*twice(family.CONV1X1_BN_FOLD, *o.fold(moments.contiguous(), got[1])))


@matrices
def test_unfold(size, of):
    o = SmallOperands(size, of)
    folded, _, stats, covariance = kernel(family.CONV1X1_BN_FOLD)(*o.fold())
    got, want = twice(family.CONV1X1_BN_UNFOLD, *o.unfold(stats, covariance))
    assert torch.equal(got[2], folded)
    # of the matrices as they were rounded
    offset = -(got[2].double().T @ o.sum_g) / o.count - got[3].double().T @ o.mean
    assert_near(got, (*want[:4], offset.to(want[4].dtype)))


@matrices
@pytest.mark.parametrize("momentum", [0.1, None])
def test_update_running(size, of, momentum):
    k = size[0]
    stats = torch.rand((3, k), dtype=torch.float64, device=DEVICE) + 0.5
    param_dtype = DTYPES[of[2]]
    running = [torch.randn(k, device=DEVICE).to(param_dtype) for _ in range(2)]
    running.append(torch.tensor(3, device=DEVICE))
    results = []
    for op in (kernel(family.CONV1X1_BN_UPDATE_RUNNING), family.CONV1X1_BN_UPDATE_RUNNING.reference):
        own = [t.clone() for t in running]
        op(*own, momentum, stats, 49)
        results.append(own)
    got, want = results
    assert_near(tuple(got[:2]), tuple(want[:2]))
    assert got[2] == want[2] == 4


# ---- calls, by the error rule ----------------------------------------------------------------------------------------

CALLS = [
    case
    for op in verification.FOLDED
    for case in verification.cases(op)
    if case.shape == (4, 64, 14, 14) and case.dtype in ("f32", "bf16")
]


@pytest.fixture
def ieee():
    """Eager's convolutions of float32 without TF32: the rule is stricter then."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("case", CALLS, ids=[f"{c.op}-{c.name}" for c in CALLS])
def test_rule(case, ieee):
    assert verification.failures(case, "auto", DEVICE) == []


@pytest.mark.parametrize("op", verification.FOLDED)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_well_conditioned_calls_fold(op, dtype):
    """So that the rule is about the fold, and not about what takes its place."""
    case = next(c for c in CALLS if (c.op, c.dtype, c.distribution) == (op, dtype, "normal"))
    tensors = verification.place(verification.make_inputs(case), DEVICE)
    for name in verification.differentiable(tensors):
        tensors[name].requires_grad_()
    assert type(verification.ours(case, tensors).grad_fn).__name__.startswith("Conv1x1BN")


# ---- whole blocks ----------------------------------------------------------------------------------------------------

BLOCKS = {
    "identity": ((4, 256, 14, 14), (("planes", 64), ("stride", 1))),
    "projection": ((4, 128, 28, 28), (("planes", 64), ("stride", 2))),
}
PRECISIONS = {"f32": ("f32", False), "bf16": ("all-bf16", False), "autocast": ("bf16", True)}
blocks = pytest.mark.parametrize("shape", BLOCKS)
precisions = pytest.mark.parametrize("precision", PRECISIONS)


def block_case(shape: str, precision: str) -> Case:
    (size, arguments), (dtype, amp) = BLOCKS[shape], PRECISIONS[precision]
    return Case("Bottleneck", size, dtype, "channels_last", amp=amp, block=arguments)


def make_block(case: Case) -> fusedres.Bottleneck:
    block = verification.make_block(case).to(DEVICE)
    block.folding = "always"
    return block


def make_image(case: Case, seed: int = 0) -> Tensor:
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(seed))
    return x.to(case.x_dtype).to(DEVICE).contiguous(memory_format=CHANNELS_LAST)


def autocast(case: Case) -> torch.autocast:
    # the cache of casted weights would outlive the capture of a graph
    return torch.autocast(DEVICE, torch.bfloat16, enabled=case.amp, cache_enabled=False)


def inner_masks(node: Any) -> list[Tensor]:
    """Where the activations that conv2 and conv3 of a block read are positive, from what its node keeps."""
    block = node.block
    _, *saved = node.saved_tensors
    parameters, kept = saved[: 3 * len(block.norms)], saved[3 * len(block.norms) :]
    partials1, of_y2, x1, x2 = kept[0], kept[3], kept[8], kept[9]
    y1, _ = activation(x1, partials1, parameters[1], parameters[2], block.norms[0].eps, True, block.passes)
    mean, scale, shift = of_y2.view(3, 1, -1, 1, 1)
    y2 = (x2 - mean).double() * scale.double() + shift.double()  # the sign of a fused multiply-add
    return [~(y1 <= 0), ~(y2 <= 0)]


@pytest.fixture
def folded_in_verification(monkeypatch):
    """Verification runs a block with hooks that tell it the masks; then nothing folds. Here its node tells them."""
    run, mine = verification._run_block, itertools.cycle([True, False])

    def run_block(case: Case, forward: Callable[..., Tensor], device: str) -> Result:
        if not next(mine):
            return run(case, forward, device)
        masks: list[Tensor] = []

        def folded(block: nn.Module, x: Tensor) -> Tensor:
            for module in block.modules():
                module._forward_pre_hooks.clear()
            block.folding = "always"
            out = block(x)
            assert type(out.grad_fn).__name__ == ONE_NODE
            masks.extend(inner_masks(out.grad_fn))
            return out

        result = run(case, folded, device)
        result.masks = [*masks, *result.masks]
        return result

    monkeypatch.setattr(verification, "_run_block", run_block)


@blocks
@precisions
def test_block_rule(shape, precision, folded_in_verification, ieee):
    """Over several draws, where eager's error in one of them is luck."""
    assert verification.pooled_failures([block_case(shape, precision)], "auto", DEVICE) == []


class BlockCall:
    """Forward and backward of a block on tensors that stay where they are, so that a graph can replay it."""

    def __init__(self, case: Case) -> None:
        self.case, self.block = case, make_block(case)
        self.x = make_image(case).requires_grad_()
        self.leaves = [self.x, *self.block.parameters()]
        self.buffers = list(self.block.buffers())
        n, _, h, w = case.shape
        stride, k = dict(case.block)["stride"], self.block.conv3.out_channels
        self.dy = make_image(Case("Bottleneck", (n, k, h // stride, w // stride), case.dtype), 1)

    def state(self) -> list[Tensor]:
        return [t.clone() for t in self.buffers]

    def restore(self, state: list[Tensor]) -> None:
        with torch.no_grad():
            for buffer, t in zip(self.buffers, state, strict=True):
                buffer.copy_(t)

    def __call__(self) -> list[Tensor]:
        with autocast(self.case):
            out = self.block(self.x)
        assert type(out.grad_fn).__name__ == ONE_NODE
        return [out, *torch.autograd.grad(out, self.leaves, self.dy)]

    def fresh(self) -> list[Tensor]:
        """The same from the statistics as they are now, which stay."""
        state = self.state()
        results = [t.detach().clone() for t in self()] + self.state()
        self.restore(state)
        return results


@pytest.fixture
def call(shape, precision) -> BlockCall:
    """Of a block that has decided."""
    made = BlockCall(block_case(shape, precision))
    made.fresh()
    assert folding_decision(made.block).safe
    return made


@blocks
@precisions
def test_same_bits_twenty_times(call, bits):
    want = call.fresh()
    for _ in range(19):
        bits(call.fresh(), want)


@blocks
@precisions
def test_graph_replays_on_new_inputs(call, bits, capture):
    """Forward, backward and running statistics, after the decision was taken eagerly."""
    replay, results = capture(call)
    for seed in range(2, 5):
        with torch.no_grad():
            call.x.copy_(make_image(call.case, seed))
        want = call.fresh()
        for t in results:
            t.data.fill_(float("nan"))
        replay()
        bits([*(t.detach() for t in results), *call.buffers], want)


@blocks
@precisions
def test_no_waiting_for_the_host(call, needs_gpu):
    """In a step that knows what it decided."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@blocks
@precisions
def test_second_stream(call, needs_gpu, bits):
    """Kernels run on the current stream: behind what it was given, not beside it."""
    want = call.fresh()
    x, dy = call.x.detach().clone(), call.dy.clone()
    with torch.no_grad():
        call.x.fill_(float("nan"))
        call.dy.fill_(float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            call.x.copy_(x)
            call.dy.copy_(dy)
        got = call.fresh()
    torch.cuda.synchronize()
    bits(got, want)


@blocks
@precisions
def test_decision_where_it_can_be_looked_at(shape, precision):
    """A block whose fold would not be exact runs in pieces, with eager's numbers."""
    case = block_case(shape, precision)
    block = make_block(case)
    with torch.no_grad():
        block.bn2.weight.fill_(1e-4)
        block.bn2.bias.fill_(1e6)  # beside which nothing is left of what varies
    x = make_image(case).requires_grad_()
    with autocast(case):
        out = block(x)
    assert folding_decision(block).safe is False
    assert type(out.grad_fn).__name__ != ONE_NODE
    assert out.isfinite().all()


def test_memory_of_a_block(needs_gpu):
    """Kept for backward: what fused blocks keep, less the tensors as wide as the output that are not the output."""
    kept = {}
    case = Case("Bottleneck", (16, 256, 56, 56), "all-bf16", "channels_last", block=(("planes", 64), ("stride", 1)))
    for folding in ("never", "always"):
        block = make_block(case)
        block.folding = folding
        x = make_image(case).requires_grad_()
        block(x)  # compiles, and decides
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = block(x)
        kept[folding] = torch.cuda.memory_allocated() - before
        wide = out.numel() * out.element_size()
        del out
    # x1 and x2, a quarter each, the output and a bit for each of its elements; small matrices
    assert kept["always"] <= (1 + 0.5 + 1 / 16) * wide + (2 << 20)
    assert kept["always"] <= kept["never"] - wide


# ---- a network -------------------------------------------------------------------------------------------------------


def nodes(loss: Tensor) -> Iterator[Any]:
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [after for after, _ in node.next_functions]
            yield node


@pytest.mark.parametrize("amp", [False, True], ids=["f32", "amp"])
def test_network_trains_as_eager_does(amp, ieee):
    """Three steps of a ResNet-50 of small images. It amplifies rounding, as any network that was just initialised."""
    torch.manual_seed(0)
    batch = 64 if DEVICE == "cuda" else 8
    model = resnet50(num_classes=10, folding="always")
    twin = plain_twin(model)
    data, target = torch.randn(3, batch, 3, 64, 64), torch.randint(0, 10, (3, batch))
    curves = []
    for network, folds in ((model, True), (twin, False)):
        network.to(DEVICE, memory_format=CHANNELS_LAST)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        curves.append([])
        for x, t in zip(data, target, strict=True):
            x = x.to(DEVICE, memory_format=CHANNELS_LAST)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=amp):
                logits = network(x)
            loss = nn.functional.cross_entropy(logits.float(), t.to(DEVICE))
            folded = sum(type(node).__name__ == ONE_NODE for node in nodes(loss))
            assert folded >= 6 if folds else folded == 0  # those with enough pixels
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[-1].append(loss.item())
    (first, *later), (want, *wanted) = curves
    assert abs(first - want) <= (2e-2 if amp else 1e-4) * abs(want)
    assert all(abs(a - b) <= 0.05 * abs(b) for a, b in zip(later, wanted, strict=True)), curves
    counters = [[t for name, t in m.named_buffers() if "num_batches" in name] for m in (model, twin)]
    assert all(a == b == 3 for a, b in zip(*counters, strict=True))
