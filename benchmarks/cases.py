"""The four ops in plain PyTorch and in fusedres, the bytes they must move, and the gate before any timing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as tnf
from torch import Tensor

from fusedres import functional as F
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
from fusedres.ops.traffic import Traffic

from .harness import Comparison, compare, copy_bandwidth
from .shapes import Shape

OPS = ("batch_norm_act", "batch_norm_add_batch_norm_act", "batch_norm_act_max_pool", "add_act")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
EPS, MOMENTUM = 1e-5, 0.1


@dataclass(frozen=True)
class CaseTraffic:
    """Bytes of one case: forward and backward launch by launch (see `fusedres/ops/traffic.py`)."""

    forward: Traffic
    backward: Traffic
    touched: int  # distinct bytes of activations and mask, both ways: what would have to fit a cache

    @property
    def floor(self) -> int:
        """What must cross memory when nothing stays cached between passes over a tensor."""
        return self.forward.floor + self.backward.floor


_TRAFFIC: dict[str, tuple[Callable[..., Traffic], Callable[..., Traffic]]] = {
    "batch_norm_act": (batch_norm_act_traffic, batch_norm_act_backward_traffic),
    "batch_norm_add_batch_norm_act": (
        batch_norm_add_batch_norm_act_traffic,
        batch_norm_add_batch_norm_act_backward_traffic,
    ),
    "batch_norm_act_max_pool": (batch_norm_act_max_pool_traffic, batch_norm_act_max_pool_backward_traffic),
    "add_act": (add_act_traffic, add_act_backward_traffic),
}


def case_traffic(shape: Shape, dtype: torch.dtype, layout: str = "channels_last", **plan: Any) -> CaseTraffic:
    """Training traffic of a fused region, with all gradients; `plan`: `form` and `tiles` of the ops that have them."""
    size = (shape.n, shape.c, shape.h, shape.w)
    options = plan | ({"residual": shape.residual} if shape.op == "batch_norm_act" else {})
    forward, backward = (of(size, dtype, layout=layout, **options) for of in _TRAFFIC[shape.op])
    t = shape.numel * dtype.itemsize
    inputs = 2 if shape.op in ("add_act", "batch_norm_add_batch_norm_act") or shape.residual else 1
    gradients = 1 if shape.op == "add_act" else inputs
    out = t
    if shape.op == "batch_norm_act_max_pool":
        out = shape.n * shape.c * ((shape.h - 1) // 2 + 1) * ((shape.w - 1) // 2 + 1) * dtype.itemsize
    masked = shape.op == "add_act" or (shape.op == "batch_norm_act" and shape.residual)
    return CaseTraffic(forward, backward, (inputs + gradients) * t + 2 * out + masked * shape.numel // 8)


def _norm(x: Tensor, stats: Sequence[Tensor], affine: Sequence[Tensor], training: bool) -> Tensor:
    return tnf.batch_norm(x, stats[0], stats[1], affine[0], affine[1], training, MOMENTUM, EPS)


def _eager(op: str, inputs: Sequence[Tensor], stats: Sequence[Tensor], training: bool) -> Tensor:
    """As torchvision's ResNet spells it: in-place addition, in-place ReLU."""
    if op == "add_act":
        return torch.relu_(inputs[0] + inputs[1])
    out = _norm(inputs[0], stats, inputs[1:3], training)
    if op == "batch_norm_act_max_pool":
        return tnf.max_pool2d(torch.relu_(out), 3, 2, 1)
    if op == "batch_norm_add_batch_norm_act":
        out += _norm(inputs[3], stats[2:], inputs[4:6], training)
    elif len(inputs) > 3:
        out += inputs[3]
    return torch.relu_(out)


def _fused(op: str, inputs: Sequence[Tensor], stats: Sequence[Tensor], training: bool) -> Tensor:
    x = inputs[0]
    if op == "add_act":
        return F.add_act(x, inputs[1])
    mean, var, weight, bias = stats[0], stats[1], inputs[1], inputs[2]
    if op == "batch_norm_act_max_pool":
        return F.batch_norm_act_max_pool(x, mean, var, weight, bias, training=training, momentum=MOMENTUM, eps=EPS)
    if op == "batch_norm_add_batch_norm_act":
        second = (inputs[3], stats[2], stats[3], inputs[4], inputs[5])
        return F.batch_norm_add_batch_norm_act(
            x, mean, var, weight, bias, *second, training=training, momentum=MOMENTUM, eps=EPS
        )
    residual = inputs[3] if len(inputs) > 3 else None
    return F.batch_norm_act(x, mean, var, weight, bias, residual, training=training, momentum=MOMENTUM, eps=EPS)


PEERS: dict[str, Callable[[str, Sequence[Tensor], Sequence[Tensor], bool], Tensor]] = {
    "eager": _eager,
    "fusedres": _fused,
}


class Case:
    """One op on one shape, dtype and layout: tensors, candidates to time, and the gate."""

    def __init__(
        self,
        shape: Shape,
        dtype: str = "float32",
        layout: str = "channels_last",
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape, self.dtype, self.layout = shape, dtype, layout
        generator = torch.Generator(device).manual_seed(seed)
        size, c, form = (shape.n, shape.c, shape.h, shape.w), shape.c, FORMATS[layout]

        def activation(*size: int) -> Tensor:
            x = torch.randn(size, generator=generator, device=device).to(DTYPES[dtype])
            return x.contiguous(memory_format=form)

        def affine() -> list[Tensor]:
            scale, shift = (f(c, generator=generator, device=device) for f in (torch.rand, torch.randn))
            return [scale + 0.5, shift * 0.1]

        self.inputs = [activation(*size)]
        if shape.op != "add_act":
            self.inputs += affine()
        if shape.residual or shape.op == "batch_norm_add_batch_norm_act":
            self.inputs.append(activation(*size))
        norms = {"add_act": 0, "batch_norm_add_batch_norm_act": 2}.get(shape.op, 1)
        if norms == 2:
            self.inputs += affine()
        self.stats = [f(c, device=device) for _ in range(norms) for f in (torch.zeros, torch.ones)]
        for tensor in self.inputs:
            tensor.requires_grad_()
        out_size = size
        if shape.op == "batch_norm_act_max_pool":
            out_size = (shape.n, c, (shape.h - 1) // 2 + 1, (shape.w - 1) // 2 + 1)
        self.grad_out = activation(*out_size)

    @property
    def key(self) -> str:
        return f"{self.shape.key}-{self.dtype}-{self.layout}"

    @property
    def traffic(self) -> CaseTraffic:
        return case_traffic(self.shape, DTYPES[self.dtype], self.layout)

    def pipeline(self, peer: str) -> list[Callable[..., Any]]:
        """[forward, backward]; the backward drops output, graph and gradients, as a training step does."""
        call, op, inputs, stats, grad_out = PEERS[peer], self.shape.op, self.inputs, self.stats, self.grad_out

        def forward() -> Tensor:
            return call(op, inputs, stats, True)

        def backward(out: Tensor) -> None:
            torch.autograd.grad(out, inputs, grad_out)

        return [forward, backward]

    def call(self, peer: str, mode: str) -> Callable[[], Any]:
        """One uninterrupted call: "train" is forward and backward, "forward" a training forward with a graph,
        "eval" a forward with running statistics that records none."""
        if mode == "train":
            forward, backward = self.pipeline(peer)
            return lambda: backward(forward())
        run, op, inputs, stats = PEERS[peer], self.shape.op, self.inputs, self.stats
        if mode == "forward":
            return lambda: run(op, inputs, stats, True)
        constants = [t.detach() for t in inputs]
        return lambda: run(op, constants, stats, False)

    def results(self, peer: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Output, gradients and updated running statistics of one call, in float64."""
        inputs = [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in self.inputs]
        stats = [torch.full_like(s, i % 2, dtype=dtype) for i, s in enumerate(self.stats)]
        out = PEERS[peer](self.shape.op, inputs, stats, True)
        grads = torch.autograd.grad(out, inputs, self.grad_out.to(out.dtype))
        return self.named(out, grads, stats)

    def named(self, out: Tensor, grads: Sequence[Tensor], stats: Sequence[Tensor]) -> dict[str, Tensor]:
        """What a call gave, in float64."""
        named = (
            {"out": out} | {f"grad{i}": g for i, g in enumerate(grads)} | {f"stat{i}": s for i, s in enumerate(stats)}
        )
        return {k: v.detach().double() for k, v in named.items()}

    def expected(self) -> dict[str, tuple[Tensor, float]]:
        """Float64 results, and for each the relative L2 error that is allowed.

        At most twice eager's, plus what a few ReLU or pooling decisions within rounding of a tie change. The tests hold
        the stricter rule, element by element.
        """
        exact, eager = self.results("eager", torch.float64), self.results("eager")
        slack = {"float32": 1e-3, "bfloat16": 2**-7, "float16": 2**-9}[self.dtype]
        return {
            name: (reference, 2 * float(_relative_error(eager[name], reference)) + slack)
            for name, reference in exact.items()
        }

    def check(self, ours: dict[str, Tensor], expected: dict[str, tuple[Tensor, float]]) -> None:
        """Raise AssertionError unless every result is within what is allowed."""
        for name, (reference, allowed) in expected.items():
            if ours[name].shape != reference.shape:
                got, wanted = tuple(ours[name].shape), tuple(reference.shape)
                raise AssertionError(f"{self.key}: {name} has shape {got}, eager {wanted}")
            error = float(_relative_error(ours[name], reference))
            if not error <= allowed:  # also catches NaN
                raise AssertionError(f"{self.key}: {name} is off by {error:.2e} (relative L2), allowed {allowed:.2e}")

    def gate(self, peer: str = "fusedres") -> None:
        """Raise unless every result of a fresh call is as near to float64 as eager's at the same dtype is."""
        self.check(self.results(peer), self.expected())


def _relative_error(value: Tensor, reference: Tensor) -> Tensor:
    return (value - reference).norm() / reference.norm().clamp_min(1e-12)


@dataclass(frozen=True)
class Measurement:
    """One case, measured: what goes into tables and JSON."""

    op: str
    residual: bool
    shape: tuple[int, int, int, int]
    uses: dict[str, int]
    dtype: str
    layout: str
    eager_ms: float
    fused_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    forward_ratio: float
    backward_ratio: float
    fused_forward_ms: float
    fused_backward_ms: float
    floor_bytes: int
    fused_gb_per_s: float
    eager_gb_per_s: float
    copy_gb_per_s: float
    share_of_copy: float
    eager_faults: float
    fused_faults: float
    rounds: int

    @property
    def key(self) -> str:
        n, c, h, w = self.shape
        return f"{self.op}{'+residual' if self.residual and self.op == 'batch_norm_act' else ''}[{n}x{c}x{h}x{w}]"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(case: Case, *, gate: bool = True, clock: str = "cpu", **options: Any) -> tuple[Measurement, Comparison]:
    """Gate the case, then time eager and fusedres on it, alternating."""
    if gate:
        case.gate()
    done = compare({"eager": case.pipeline("eager"), "fusedres": case.pipeline("fusedres")}, clock=clock, **options)
    eager, fused, ratio = done.timings["eager"], done.timings["fusedres"], done.ratio("fusedres")
    shape, traffic = case.shape, case.traffic
    copy = copy_bandwidth(traffic.touched // 2)  # a copy touches two buffers
    return Measurement(
        op=shape.op,
        residual=shape.residual,
        shape=(shape.n, shape.c, shape.h, shape.w),
        uses=dict(shape.uses),
        dtype=case.dtype,
        layout=case.layout,
        eager_ms=eager.median * 1e3,
        fused_ms=fused.median * 1e3,
        ratio=ratio.value,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        forward_ratio=done.ratio("fusedres", 0).value,
        backward_ratio=done.ratio("fusedres", 1).value,
        fused_forward_ms=fused.stage_medians[0] * 1e3,
        fused_backward_ms=fused.stage_medians[1] * 1e3,
        floor_bytes=traffic.floor,
        fused_gb_per_s=traffic.floor / fused.median * 1e-9,
        eager_gb_per_s=traffic.floor / eager.median * 1e-9,
        copy_gb_per_s=copy * 1e-9,
        share_of_copy=traffic.floor / fused.median / copy,
        eager_faults=eager.faults_per_call,
        fused_faults=fused.faults_per_call,
        rounds=done.rounds,
    ), done
