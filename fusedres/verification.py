"""The error rule, and the one table of cases that `fusedres verify` and the tests share.

Every output, gradient and running statistic of an op is compared with a float64 reference, and its error with eager's:

    max|ours - float64| <= 2 max|eager - float64| + tiny,        tiny = 1 ulp of the output dtype at max|float64|

with eager at the same dtype, layout and inputs. Where a pre-activation lies within rounding of zero, or two candidates
of a pooling window within rounding of each other, either side is right; so the float64 gradients use the ReLU mask
`!(out <= 0)` and the pool winners of the implementation they judge (ours for ours, eager's for eager's), and masks and
winners may differ from float64's only inside that rounding. The winners are read from gradients, see `_winners`.

An error is reported as a multiple of eager's, `error / (eager's error + tiny / 2)`; the rule is `multiple <= 2`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

LIMIT = 2.0

# float64 has nothing more exact to be compared with, and is there for gradcheck: it must be right, no more
_FLOAT64_TOLERANCE = 1e-10

_DTYPES = {
    "f32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.float32),
    "f16": (torch.float16, torch.float32),
    "f64": (torch.float64, torch.float64),
    "all-bf16": (torch.bfloat16, torch.bfloat16),
    "all-f16": (torch.float16, torch.float16),
}

LAYOUTS = ("contiguous", "channels_last", "strided", "transposed", "expanded", "channel_slice", "overlapping", "offset")
DISTRIBUTIONS = ("normal", "large_mean", "tiny_variance", "constant", "saturated", "large", "mixed_scale")
# hard for a variance that is computed from the moments of a convolution's input
FOLDED_DISTRIBUTIONS = ("mean_10", "mean_100", "equal_3%", "equal_1%", "dead", "tiny_variance", "mixed_scale")


@dataclass(frozen=True)
class Case:
    """One call of one op. `dtype` is a key of the table above: dtype of x, and of parameters and statistics."""

    op: str
    shape: tuple[int, int, int, int] = (4, 6, 5, 7)
    dtype: str = "f32"
    layout: str = "contiguous"
    distribution: str = "normal"
    training: bool = True
    residual: str | None = None  # layout of the residual; add_act always has one
    affine: str = "both"  # both | weight | bias | none | zero: a weight of zeros, and a bias
    stats: bool = True
    momentum: float | None = 0.1  # None: cumulative average through num_batches_tracked
    eps: float = 1e-5
    act: str | None = "relu"
    training2: bool | None = None
    window: tuple[int, int, int, int, bool] = (3, 2, 1, 1, False)  # kernel_size, stride, padding, dilation, ceil_mode
    conv: tuple[int, int, int, int, int, bool] = (
        8,
        3,
        1,
        1,
        1,
        False,
    )  # channels, kernel, stride, padding, groups, bias
    weights: str = "random"  # of a convolution: random | zero_sum, over the input channels
    amp: bool = False
    block: tuple[tuple[str, Any], ...] = ()  # constructor arguments of a block
    seed: int = 0  # another one: other values

    @property
    def name(self) -> str:
        default = Case(self.op)
        parts = ["x".join(map(str, self.shape)), self.dtype, self.layout, self.distribution]
        for key in (
            "training",
            "residual",
            "affine",
            "stats",
            "momentum",
            "eps",
            "act",
            "training2",
            "window",
            "conv",
            "weights",
            "amp",
            "block",
            "seed",
        ):
            value = getattr(self, key)
            if value != getattr(default, key):
                text = (
                    "-".join(map(str, itertools.chain.from_iterable(value) if key == "block" else value))
                    if isinstance(value, tuple)
                    else value
                )
                parts.append(f"{key}={text}")
        return ",".join(parts)

    @property
    def convolution(self) -> tuple[int, int, int, int, int, bool]:
        """`conv`, with the kernel that a folded op has; of a pair the second convolution's."""
        return (self.conv[0], 1, self.conv[2], 0, 1, False) if self.op in FOLDED else self.conv

    @property
    def x_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype][0]

    @property
    def param_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype][1]


@dataclass
class Measurement:
    """How far one quantity of one case is from float64, in our hands and in eager's."""

    quantity: str
    error: float
    eager_error: float
    tiny: float
    note: str = ""

    @property
    def multiple(self) -> float:
        if self.error == 0 or self.eager_error == math.inf:  # eager overflowed on the way
            return 0.0
        allowed = self.eager_error + self.tiny / 2
        multiple = self.error / allowed if allowed else math.inf
        return math.inf if math.isnan(multiple) else multiple

    @property
    def ok(self) -> bool:
        return self.multiple <= LIMIT and not self.note

    def __str__(self) -> str:
        errors = f"ours {self.error:.3e}, eager {self.eager_error:.3e}, ulp {self.tiny:.1e}"
        text = f"{self.quantity}: {self.multiple:.3g} times eager's error ({errors})"
        return f"{text}; {self.note}" if self.note else text


@dataclass
class Result:
    """What one implementation gave for a case, with the mask and the winners it used."""

    values: dict[str, Tensor]
    mask: Tensor | None = None
    winners: Tensor | None = None
    masks: list[Tensor] = field(default_factory=list)  # of a block's inner activations


# --- inputs ---------------------------------------------------------------------------------------------------------


def sample(distribution: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Float64 values of shape (N, C, H, W), exactly representable in `dtype`."""
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    channel = torch.rand((1, shape[1], 1, 1), generator=generator, dtype=torch.float64)
    if distribution == "large_mean":  # in 16 bits as large as leaves two steps to a standard deviation
        z = z + {torch.float16: 1e3, torch.bfloat16: 1e2}.get(dtype, 1e4)
    elif distribution == "tiny_variance":
        z = 1e-5 * z + (channel - 0.5 if dtype in (torch.float32, torch.float64) else 0)
    elif distribution == "constant":  # every second channel
        z = torch.where((torch.arange(shape[1]) % 2 == 0).view(1, -1, 1, 1), channel.expand(shape), z)
    elif distribution == "saturated":  # two values
        z = torch.where(z > 0.3, 1e3, -1e3)
    elif distribution == "large":
        z = z * (1e2 if dtype is torch.float16 else 1e15)
    elif distribution == "mixed_scale":
        z = z * 10.0 ** (6 * channel - 3)
    elif distribution in ("mean_10", "mean_100"):  # in standard deviations, one sign: what a ReLU lets through
        z = z + float(distribution.removeprefix("mean_"))
    elif distribution in ("equal_3%", "equal_1%"):  # channels that differ by so much
        z = z[:, :1] + z * (0.03 if distribution == "equal_3%" else 0.01)
    elif distribution == "dead":  # every fourth channel, after a ReLU
        z = torch.where((torch.arange(shape[1]) % 4 == 0).view(1, -1, 1, 1), 0.0, z.relu())
    elif distribution != "normal":
        raise ValueError(
            f"unknown distribution {distribution!r}; it is one of {', '.join({*DISTRIBUTIONS, *FOLDED_DISTRIBUTIONS})}"
        )
    return z.to(dtype)


def lay_out(dense: Tensor, layout: str) -> Tensor:
    """The values of `dense` (not for `expanded` and `overlapping`, which repeat some) in memory as `layout` says."""
    n, c, h, w = dense.shape
    if layout == "contiguous":
        return dense.contiguous()
    if layout == "channels_last":
        return dense.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return dense.new_zeros((n, c, 2 * h, 3 * w))[:, :, ::2, ::3].copy_(dense)
    if layout == "transposed":
        return dense.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    if layout == "expanded":
        return dense[:, :, :1].expand(n, c, h, w) if h > 1 else dense[:1].expand(n, c, h, w) if n else dense
    if layout == "channel_slice":
        return dense.new_zeros((n, c + 3, h, w)).to(memory_format=torch.channels_last)[:, 1 : c + 1].copy_(dense)
    if layout == "overlapping":
        flat = torch.cat([dense.flatten(), dense.flatten()[:1]])
        return flat.as_strided((n, c, h, w), (c * h * w // 2 or 1, h * w // 2 or 1, w, 1)) if dense.numel() else dense
    if layout == "offset":  # contiguous, not aligned
        return dense.new_zeros(dense.numel() + 1)[1:].view(n, c, h, w).copy_(dense)
    raise ValueError(f"unknown layout {layout!r}; it is one of {', '.join(LAYOUTS)}")


def _affine(count: int, case: Case, generator: torch.Generator, tensors: dict[str, Tensor], suffix: str = "") -> None:
    sign = torch.where(torch.rand(count, generator=generator) < 0.3, -1.0, 1.0)
    weight = sign * (
        0.5 + torch.rand(count, generator=generator)
    )  # away from zero: the winners are read from dx / weight
    bias = 0.5 * torch.randn(count, generator=generator)
    if case.affine in ("both", "weight", "zero"):
        tensors["weight" + suffix] = (weight * (case.affine != "zero")).to(case.param_dtype)
    if case.affine in ("both", "bias", "zero"):
        tensors["bias" + suffix] = bias.to(case.param_dtype)


def _running(
    x: Tensor,
    case: Case,
    generator: torch.Generator,
    tensors: dict[str, Tensor],
    suffix: str = "",
    training: bool = True,
) -> None:
    if not case.stats:
        return
    count = x.shape[1]
    mean, var = (
        torch.randn(count, generator=generator, dtype=torch.float64),
        0.5 + torch.rand(count, generator=generator, dtype=torch.float64),
    )
    if not training and x.numel():  # statistics that fit x, so that eval mode meets the same cancellation
        x = x.double()
        deviation = x.std((0, 2, 3), correction=0)
        mean, var = x.mean((0, 2, 3)) + 0.1 * deviation * mean, deviation.square() * var
    limit = torch.finfo(case.param_dtype).max
    tensors["running_mean" + suffix] = mean.clamp(-limit, limit).to(case.param_dtype)
    tensors["running_var" + suffix] = var.clamp(max=limit).to(case.param_dtype)
    if case.momentum is None:
        tensors["num_batches_tracked" + suffix] = torch.tensor(3)


def _conv_weight(case: Case, inputs: int, generator: torch.Generator) -> Tensor:
    channels, kernel, _, _, groups, _ = case.convolution
    weight = torch.randn((channels, inputs // groups, kernel, kernel), generator=generator, dtype=torch.float64)
    if case.weights == "zero_sum":
        weight = weight - weight.mean(1, keepdim=True)
    return (weight / math.sqrt(weight[0].numel())).to(case.x_dtype)


def make_inputs(case: Case) -> dict[str, Tensor]:
    """Fresh tensors on the CPU, the same at every call."""
    g = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    tensors = {"x": lay_out(sample(case.distribution, case.shape, case.x_dtype, g), case.layout)}
    if case.op == "add_act":
        tensors["residual"] = lay_out(sample("normal", case.shape, case.x_dtype, g), case.residual or case.layout)
        return tensors
    shape = case.shape
    if case.op in CONVOLUTIONS:
        channels, kernel, stride, padding, _, bias = case.convolution
        tensors["conv_weight"] = _conv_weight(case, shape[1], g)
        if bias:
            tensors["conv_bias"] = torch.randn(channels, generator=g).to(case.x_dtype)
        if case.op == PAIR_1X1:
            stride = 1
        height, width = ((size + 2 * padding - kernel) // stride + 1 for size in shape[2:])
        shape = (shape[0], channels, height, width)
        _running(torch.randn((2, channels, 3, 3), generator=g), case, g, tensors, training=case.training)
    else:
        _running(tensors["x"], case, g, tensors, training=case.training)
    _affine(shape[1], case, g, tensors)
    if case.op == "batch_norm_add_batch_norm_act":
        tensors["x2"] = lay_out(sample(case.distribution, case.shape, case.x_dtype, g), case.residual or case.layout)
        training = case.training if case.training2 is None else case.training2
        _running(tensors["x2"], case, g, tensors, "2", training)
        _affine(shape[1], case, g, tensors, "2")
    elif case.op == PAIR_1X1:  # the second convolution has the stride, and more channels
        stride, more = case.conv[2], case.shape[1] + 3
        x2 = sample(case.distribution, (shape[0], more, stride * shape[2], stride * shape[3]), case.x_dtype, g)
        tensors["x2"], tensors["conv_weight2"] = lay_out(x2, case.residual or case.layout), _conv_weight(case, more, g)
        _running(torch.randn((2, shape[1], 3, 3), generator=g), case, g, tensors, "2", case.training)
        _affine(shape[1], case, g, tensors, "2")
    elif case.residual:
        tensors["residual"] = lay_out(sample("normal", shape, case.x_dtype, g), case.residual)
    return tensors


BUFFERS = (
    "running_mean",
    "running_var",
    "running_mean2",
    "running_var2",
    "num_batches_tracked",
    "num_batches_tracked2",
)


def differentiable(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name in tensors if name not in BUFFERS]


# --- the ops: ours, and eager's pre-activation ----------------------------------------------------------------------


def ours(case: Case, t: dict[str, Tensor]) -> Tensor:
    """The call under test."""
    from . import functional as F

    if case.op == "add_act":
        return F.add_act(t["x"], t["residual"], act=case.act)
    options: dict[str, Any] = {"training": case.training, "eps": case.eps, "act": case.act}
    options["momentum"] = case.momentum
    for name in ("num_batches_tracked", "num_batches_tracked2"):
        if name in t:
            options[name] = t[name]
    bn = [t.get(name) for name in ("running_mean", "running_var", "weight", "bias")]
    if case.op == "batch_norm_act":
        return F.batch_norm_act(t["x"], *bn, t.get("residual"), **options)
    if case.op == "batch_norm_add_batch_norm_act":
        bn2 = [t.get(name) for name in ("running_mean2", "running_var2", "weight2", "bias2")]
        if case.training2 is not None:
            options["training2"] = case.training2
        return F.batch_norm_add_batch_norm_act(t["x"], *bn, t["x2"], *bn2, **options)
    if case.op == "batch_norm_act_max_pool":
        keys = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        return F.batch_norm_act_max_pool(t["x"], *bn, **dict(zip(keys, case.window, strict=True)), **options)
    if case.op == "conv1x1_bn_act":
        fold = {"stride": case.conv[2], "folding": "always"}
        return F.conv1x1_bn_act(t["x"], t["conv_weight"], *bn, t.get("residual"), **fold, **options)
    if case.op == PAIR_1X1:
        bn2 = [t.get(name) for name in ("running_mean2", "running_var2", "weight2", "bias2")]
        second = (t["x2"], t["conv_weight2"], *bn2)
        fold = {"stride2": case.conv[2], "training2": case.training2, "folding": "always"}
        return F.conv1x1_bn_add_conv1x1_bn_act(t["x"], t["conv_weight"], *bn, *second, **fold, **options)
    if case.op == "conv_bn_act":
        _, _, stride, padding, groups, _ = case.conv
        conv = {"conv_bias": t.get("conv_bias"), "stride": stride, "padding": padding, "groups": groups}
        return F.conv_bn_act(t["x"], t["conv_weight"], *bn, t.get("residual"), **conv, **options)
    raise ValueError(f"unknown op {case.op!r}; it is one of {', '.join(OPS)}")


def _eager_batch_norm(case: Case, t: dict[str, Tensor], x: Tensor, suffix: str = "") -> Tensor:
    training = case.training2 if suffix and case.training2 is not None else case.training
    momentum, tracked = case.momentum, t.get("num_batches_tracked" + suffix)
    if tracked is not None and training:
        tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(tracked)
    stats = [t.get(name + suffix) for name in ("running_mean", "running_var")]
    affine = [t.get(name + suffix) for name in ("weight", "bias")]
    return nn.functional.batch_norm(x, *stats, *affine, training, 0.0 if momentum is None else momentum, case.eps)


def _exact_batch_norm(case: Case, t: dict[str, Tensor], x: Tensor, suffix: str = "") -> Tensor:
    """batch_norm in float64, on values shifted by one of them: no cancellation even for float64 inputs."""
    training = case.training2 if suffix and case.training2 is not None else case.training
    momentum, tracked = case.momentum, t.get("num_batches_tracked" + suffix)
    if tracked is not None and training:
        tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(tracked)
    running_mean, running_var = (t.get(name + suffix) for name in ("running_mean", "running_var"))
    affine = [t.get(name + suffix) for name in ("weight", "bias")]
    values = x.detach()
    shift = values.new_zeros(x.shape[1])
    if x.numel():
        mean, deviation = values.mean((0, 2, 3)), values.std((0, 2, 3), correction=0)
        shift = torch.where(mean.abs() > 8 * deviation, values[0, :, 0, 0], shift)
    shifted = x - shift.view(1, -1, 1, 1)
    if not training:
        return nn.functional.batch_norm(shifted, running_mean - shift, running_var, *affine, False, 0.0, case.eps)
    mean, var = torch.zeros_like(shift), torch.ones_like(shift)
    y = nn.functional.batch_norm(shifted, mean, var, *affine, True, 1.0, case.eps)
    if running_mean is not None and x.numel():
        running_mean.mul_(1 - momentum).add_(momentum * (mean + shift))
        running_var.mul_(1 - momentum).add_(momentum * var)
    return y


def pre_activation(case: Case, t: dict[str, Tensor], batch_norm: Callable[..., Tensor] = _eager_batch_norm) -> Tensor:
    """What the activation is applied to, from PyTorch's own operators; in the dtype of the tensors given."""
    x = t["x"]
    if case.op == "add_act":
        return x + t["residual"]
    if case.op in CONVOLUTIONS:
        _, _, stride, padding, groups, _ = case.convolution
        of_first = 1 if case.op == PAIR_1X1 else stride
        x = nn.functional.conv2d(x, t["conv_weight"], t.get("conv_bias"), of_first, padding, 1, groups)
    z = batch_norm(case, t, x)
    if case.op == PAIR_1X1:
        return z + batch_norm(case, t, nn.functional.conv2d(t["x2"], t["conv_weight2"], None, stride), "2")
    if case.op == "batch_norm_add_batch_norm_act":
        return z + batch_norm(case, t, t["x2"], "2")
    return z + t["residual"] if "residual" in t else z


def eager(case: Case, t: dict[str, Tensor]) -> Tensor:
    """The composition of PyTorch's operators that the op stands for."""
    z = pre_activation(case, t)
    y = nn.functional.relu(z) if case.act else z
    return nn.functional.max_pool2d(y, *case.window) if case.op == "batch_norm_act_max_pool" else y


PAIR_1X1 = "conv1x1_bn_add_conv1x1_bn_act"
FOLDED = ("conv1x1_bn_act", PAIR_1X1)
CONVOLUTIONS = ("conv_bn_act", *FOLDED)
OPS = ("batch_norm_act", "batch_norm_add_batch_norm_act", "batch_norm_act_max_pool", "add_act", *CONVOLUTIONS)
BLOCKS = ("BasicBlock", "Bottleneck", "PreActBasicBlock", "PreActBottleneck")


# --- running an implementation --------------------------------------------------------------------------------------


def place(tensors: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Copies on `device` with the same strides (an expanded tensor stays expanded)."""

    def move(t: Tensor) -> Tensor:
        if t.device == torch.device(device) or t.dim() != 4:
            return t.to(device)
        size = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        flat = torch.as_strided(t, (size,), (1,), t.storage_offset())
        return flat.to(device).as_strided(t.shape, t.stride())

    return {name: move(t) for name, t in tensors.items()}


def cotangent(case: Case, out: Tensor) -> Tensor:
    """The same dy for every implementation, laid out as its output."""
    g = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) ^ 1)
    dy = torch.randn(out.shape, generator=g, dtype=torch.float64) + 0.25
    return torch.empty_like(out).copy_(dy.to(out.dtype))


def run(case: Case, forward: Callable[[Case, dict[str, Tensor]], Tensor], device: torch.device | str = "cpu") -> Result:
    """Forward and backward of one implementation on fresh inputs."""
    tensors = place(make_inputs(case), device)
    names = differentiable(tensors)
    leaves = [tensors[name].requires_grad_() for name in names]
    out = forward(case, tensors)
    gradients = torch.autograd.grad(out, leaves, cotangent(case, out), retain_graph=True, allow_unused=True)
    values = {"out": out.detach()}
    values |= {name: tensors[name] for name in BUFFERS if name in tensors}
    values |= {"d" + name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    result = Result(values, mask=~(out.detach() <= 0) if case.act else None)
    if case.op == "batch_norm_act_max_pool" and out.numel():
        result.winners = _winners(case, out, tensors["x"], result.mask)
    return result


def _exact_tensors(case: Case) -> dict[str, Tensor]:
    return {name: t if name.startswith("num_batches") else t.double() for name, t in make_inputs(case).items()}


def _scale(case: Case, exact: dict[str, Tensor], suffix: str = "") -> Tensor:
    """weight * rstd of every channel."""
    training = case.training2 if suffix and case.training2 is not None else case.training
    x = exact["x" + suffix].detach()
    var = x.var((0, 2, 3), correction=0) if training else exact["running_var" + suffix]
    return (var + case.eps).rsqrt() * exact.get("weight" + suffix, torch.ones_like(var))


def _winners(case: Case, out: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """Flat index (as max_pool2d's) of the element each window sends its gradient to, read from gradients.

    Windows `step` apart do not overlap. With dy = 1 for one class of those and 0 elsewhere, dx = a (g - A - x_hat B),
    where g is 1 at the winners and 0 elsewhere, a = weight * rstd, and A = mean(g), B = mean(g x_hat) in training (0 in
    eval mode). a, x_hat, A and B come from float64 (x_hat of a winner is that of the maximum up to rounding), so g can
    be solved for and is 1 at the winner.
    """
    kernel, stride, padding, dilation, ceil_mode = case.window
    exact = _exact_tensors(case)
    z = _exact_batch_norm(case, dict(exact), exact["x"].requires_grad_())
    unit = replace(case, affine="none")
    plain = {k: v for k, v in _exact_tensors(case).items() if not k.startswith(("weight", "bias"))}
    x_hat = _exact_batch_norm(unit, plain, plain["x"])
    a, z = _scale(case, exact).view(1, -1, 1, 1), z.detach()
    windows: dict[str, Any] = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    windows |= {"ceil_mode": ceil_mode, "return_indices": True}
    _, best = nn.functional.max_pool2d(z, **windows)
    x_hat_best = x_hat.flatten(2).gather(2, best.flatten(2)).view_as(best)
    live = torch.ones(out.shape, dtype=torch.bool) if mask is None else mask.cpu()
    step = -(-((kernel - 1) * dilation + 1) // stride)
    winners = best.clone()
    count = z.shape[0] * z.shape[2] * z.shape[3]
    for row, column in itertools.product(range(min(step, out.shape[2])), range(min(step, out.shape[3]))):
        chosen = torch.zeros(out.shape, dtype=torch.bool)
        chosen[:, :, row::step, column::step] = True
        dy = torch.empty_like(out).copy_(chosen.to(out.dtype))
        (dx,) = torch.autograd.grad(out, x, dy, retain_graph=True)
        g = dx.cpu().double() / a
        if case.training:
            hits = (chosen & live).double()
            g = g + hits.sum((0, 2, 3), keepdim=True) / count
            g = g + x_hat * ((hits * x_hat_best).sum((0, 2, 3), keepdim=True) / count)
        _, index = nn.functional.max_pool2d(g.nan_to_num(), **windows)
        winners[chosen] = index[chosen]
    return winners


def _exact(case: Case, of: Result) -> tuple[dict[str, Tensor], Tensor]:
    """Float64 values, gradients through the mask and the winners of `of`, and the pre-activation."""
    tensors = _exact_tensors(case)
    names = differentiable(tensors)
    leaves = [tensors[name].requires_grad_() for name in names]
    z = pre_activation(case, tensors, _exact_batch_norm)
    routed, pooled = z, z.detach()
    if case.op == "batch_norm_act_max_pool" and z.numel():
        pooled = nn.functional.max_pool2d(z.detach(), *case.window)
        if of.winners is not None:
            index = of.winners.cpu()
            routed = z.flatten(2).gather(2, index.flatten(2)).view(index.shape)
    elif case.op == "batch_norm_act_max_pool":
        routed = pooled = nn.functional.max_pool2d(z, *case.window)
    out = of.values["out"]
    dy = cotangent(case, out).cpu().double()
    if of.mask is not None:
        dy = dy * of.mask.cpu()
    gradients = torch.autograd.grad(routed, leaves, dy, allow_unused=True)
    values = {"out": pooled.relu() if case.act else pooled.detach()}
    values |= {name: tensors[name] for name in BUFFERS if name in tensors}
    values |= {"d" + name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    return values, z.detach() if case.op == "batch_norm_act_max_pool" else pooled


# --- the rule -------------------------------------------------------------------------------------------------------


def ulp(dtype: torch.dtype, magnitude: float) -> float:
    """Distance between neighbours of `dtype` at `magnitude`."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    if magnitude == 0 or not math.isfinite(magnitude):
        return smallest
    return max(2.0 ** math.floor(math.log2(min(magnitude, info.max))) * info.eps, smallest)


def max_error(value: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """max|value - exact|; where that is beyond the dtype's range, the right infinity (or NaN) counts as exact."""
    if value.numel() == 0:
        return 0.0
    value, rounded = value.detach().cpu().double(), exact.to(dtype).double()
    agree = (value == rounded) | (value.isnan() & rounded.isnan())
    difference = (value - exact).abs()
    difference = torch.where(agree & ~rounded.isfinite(), 0.0, difference)
    return math.inf if difference.isnan().any() else difference.max().item()


def _tiny(exact: Tensor, dtype: torch.dtype) -> float:
    finite = exact[exact.isfinite()]
    magnitude = finite.abs().max().item() if finite.numel() else 0.0
    return _FLOAT64_TOLERANCE * magnitude if dtype is torch.float64 and magnitude else ulp(dtype, magnitude)


def _float64_terms(case: Case, name: str, out: Tensor) -> float:
    """How large the terms are that a float64 dx is summed from; where they cancel, its error is theirs."""
    normalised = case.op in ("batch_norm_act", "batch_norm_add_batch_norm_act", "batch_norm_act_max_pool")
    if out.dtype is not torch.float64 or not normalised or name not in ("dx", "dx2") or not out.numel():
        return 0.0
    scale = _scale(case, _exact_tensors(case), name.removeprefix("dx"))
    return (scale.abs().max() * cotangent(case, out).abs().max()).item()


def compare(
    case: Case, mine: Result, theirs: Result, exact_theirs: dict[str, Tensor] | None = None
) -> list[Measurement]:
    """The rule, for every value of the case."""
    exact_mine, z = _exact(case, mine)
    exact_theirs = exact_theirs or _exact(case, theirs)[0]
    measurements = []
    for name, reference in exact_mine.items():
        if name not in theirs.values:
            continue
        if name not in mine.values:
            measurements.append(Measurement(name, math.inf, 0.0, 0.0, "missing"))
            continue
        value, other = mine.values[name], theirs.values[name]
        note = ""
        if value.dtype != other.dtype or value.shape != other.shape:
            note = f"{tuple(value.shape)} {value.dtype}, eager has {tuple(other.shape)} {other.dtype}"
            measurements.append(Measurement(name, math.inf, 0.0, 0.0, note))
            continue
        if name.startswith("num_batches"):
            measurements.append(Measurement(name, float(value != other), 0.0, 0.0))
            continue
        dtype = value.dtype
        tiny = max(_tiny(reference, dtype), _FLOAT64_TOLERANCE * _float64_terms(case, name, mine.values["out"]))
        error, eager_error = max_error(value, reference, dtype), max_error(other, exact_theirs[name], dtype)
        measurements.append(Measurement(name, error, eager_error, tiny, note))
    if z.numel():
        measurements += _choices(case, mine, z)
    return measurements


def _choices(case: Case, mine: Result, z: Tensor) -> Iterator[Measurement]:
    """Masks and winners may differ from float64's only within rounding: eager's error in the pre-activation."""
    tensors = make_inputs(case)
    with torch.no_grad():
        approximate = pre_activation(case, tensors)
    dtype = approximate.dtype
    eager_error, tiny = max_error(approximate, z, dtype), _tiny(z, dtype)
    value = z
    if case.op == "batch_norm_act_max_pool":
        value = nn.functional.max_pool2d(z, *case.window)
        if mine.winners is not None:
            chosen = z.flatten(2).gather(2, mine.winners.flatten(2)).view_as(value)
            behind = (value - chosen).abs()
            if mine.mask is not None:
                behind = behind[mine.mask.cpu()]
            if behind.numel():
                yield Measurement("winners", behind.max().item(), 2 * eager_error, 2 * tiny)
    if mine.mask is not None:
        wrong = value[mine.mask.cpu() != (value > 0)]
        yield Measurement("mask", wrong.abs().max().item() if wrong.numel() else 0.0, eager_error, tiny)


@functools.lru_cache(maxsize=512)
def _eager_result(case: Case, device: str) -> tuple[Result, dict[str, Tensor]]:
    result = run(case, eager, device)
    return result, _exact(case, result)[0]


def check(case: Case, backend: str = "auto", device: str = "cpu") -> list[Measurement]:
    """Run a case on one backend and measure it."""
    from . import use_backend

    with use_backend(backend):
        if case.op in BLOCKS:
            return _check_block(case, device)
        mine = run(case, ours, device)
    return compare(case, mine, *_eager_result(case, device))


def failures(case: Case, backend: str = "auto", device: str = "cpu") -> list[str]:
    """What breaks the rule, in words; empty if nothing does."""
    return [str(m) for m in check(case, backend, device) if not m.ok]


_MORE_DRAWS = 8


def pooled_failures(table: Iterable[Case], backend: str = "auto", device: str = "cpu") -> list[str]:
    """The rule over several cases at once, in units of tiny: for tensors so small that eager's error is luck.

    A pool that breaks it is enlarged by more draws of every case. The worst of many draws is that of the arithmetic: a
    lucky one of eager's is forgiven, a deficit is not.
    """
    table = list(table)
    pools: dict[str, Measurement] = {}
    _measure_into(pools, table, backend, device)
    if not all(pool.ok for pool in pools.values()):
        draws = range(1, 1 + _MORE_DRAWS)
        _measure_into(pools, [replace(case, seed=seed) for case in table for seed in draws], backend, device)
    return [str(pool) for pool in pools.values() if not pool.ok]


def _measure_into(pools: dict[str, Measurement], table: Iterable[Case], backend: str, device: str) -> None:
    """Keeps the worst of every quantity, ours and eager's."""
    for case in table:
        for m in check(case, backend, device):
            pool = pools.setdefault(m.quantity, Measurement(m.quantity, 0.0, 0.0, 1.0))
            unit = m.tiny or 1.0
            if m.note or m.error / unit > pool.error:
                pool.error, pool.note = m.error / unit, m.note or pool.note
                pool.quantity = f"{m.quantity} of {case.name}"
            pool.eager_error = max(pool.eager_error, m.eager_error / unit)


# --- blocks ---------------------------------------------------------------------------------------------------------


def _block_forward(block: nn.Module, kind: str, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """torchvision's forward (and that of pre-activation blocks) on the block's own modules, with nothing fused."""
    if kind == "BasicBlock":
        y = block.bn2(block.conv2(act(block.bn1(block.conv1(x)))))
        return act(y + (x if block.downsample is None else block.downsample(x)))
    if kind == "Bottleneck":
        y = act(block.bn2(block.conv2(act(block.bn1(block.conv1(x))))))
        y = block.bn3(block.conv3(y))
        return act(y + (x if block.downsample is None else block.downsample(x)))
    h = act(block.bn1(x))
    shortcut = x if block.downsample is None else block.downsample(h)
    y = block.conv2(act(block.bn2(block.conv1(h))))
    if kind == "PreActBottleneck":
        y = block.conv3(act(block.bn3(y)))
    return y + shortcut


def make_block(case: Case) -> nn.Module:
    """The block of a case, with weights that do not hide errors (no zeros, no ones)."""
    from . import nn as blocks

    arguments = dict(case.block)
    stride, planes = arguments.get("stride", 1), arguments["planes"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(case.name.encode()))
        kind = getattr(blocks, case.op)
        outplanes = planes * kind.expansion
        if stride != 1 or case.shape[1] != outplanes:
            arguments["downsample"] = nn.Conv2d(case.shape[1], outplanes, 1, stride, bias=False)
            if not case.op.startswith("PreAct"):
                arguments["downsample"] = nn.Sequential(arguments["downsample"], nn.BatchNorm2d(outplanes))
        block = kind(case.shape[1], **arguments)
        with torch.no_grad():
            for module in block.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(std=0.5)
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 1.5)
    block.train(case.training)
    if case.dtype.startswith("all-") or case.dtype == "f64":
        block.to(case.x_dtype)
    if case.layout == "channels_last":
        block.to(memory_format=torch.channels_last)
    return block


def _run_block(case: Case, forward: Callable[..., Tensor], device: str) -> Result:
    block = make_block(case).to(device)
    g = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    x = lay_out(sample(case.distribution, case.shape, case.x_dtype, g), case.layout).to(device).requires_grad_()
    inner: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inner[name] = arguments[0].detach()

        return hook

    handles = [
        getattr(block, name).register_forward_pre_hook(remember(name))
        for name in ("conv1", "conv2", "conv3")
        if hasattr(block, name)
    ]
    amp = torch.autocast(torch.device(device).type, torch.bfloat16) if case.amp else contextlib.nullcontext()
    with amp:
        out = forward(block, x)
    for handle in handles:
        handle.remove()
    parameters = dict(block.named_parameters())
    gradients = torch.autograd.grad(out, [x, *parameters.values()], cotangent(case, out))
    values = {"out": out.detach()}
    values |= dict(block.named_buffers())
    values |= {"d" + name: gradient for name, gradient in zip(["x", *parameters], gradients, strict=True)}
    preact = case.op.startswith("PreAct")
    names = [name for name in ("conv1", "conv2", "conv3") if name in inner and (preact or name != "conv1")]
    masks = [~(inner[name] <= 0) for name in names] + ([] if preact else [~(out.detach() <= 0)])
    return Result(values, masks=masks)


def _exact_block(case: Case, of: Result) -> tuple[dict[str, Tensor], list[Tensor]]:
    block = make_block(case).double()
    g = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    x = lay_out(sample(case.distribution, case.shape, case.x_dtype, g), case.layout).double().requires_grad_()
    masks, seen = iter(of.masks), []

    def act(z: Tensor) -> Tensor:
        seen.append(z.detach())
        return z * next(masks).cpu()

    out = _block_forward(block, case.op, x, act)
    parameters = dict(block.named_parameters())
    gradients = torch.autograd.grad(out, [x, *parameters.values()], cotangent(case, of.values["out"]).cpu().double())
    values = {"out": out.detach()}
    values |= dict(block.named_buffers())
    values |= {"d" + name: gradient for name, gradient in zip(["x", *parameters], gradients, strict=True)}
    return values, seen


def _eager_forward(case: Case) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda block, x: _block_forward(block, case.op, x, nn.functional.relu)


def _check_block(case: Case, device: str) -> list[Measurement]:
    mine = _run_block(case, lambda block, x: block(x), device)
    theirs = _run_block(case, _eager_forward(case), device)
    exact_mine, z_mine = _exact_block(case, mine)
    exact_theirs, z_theirs = _exact_block(case, theirs)
    measurements = []
    for name, reference in exact_mine.items():
        value, other = mine.values[name], theirs.values[name]
        if name.endswith("num_batches_tracked"):
            measurements.append(Measurement(name, float(value != other), 0.0, 0.0))
            continue
        if value.dtype != other.dtype or value.shape != other.shape:
            note = f"{tuple(value.shape)} {value.dtype}, eager has {tuple(other.shape)} {other.dtype}"
            measurements.append(Measurement(name, math.inf, 0.0, 0.0, note))
            continue
        # under autocast a float32 gradient went through bfloat16 on its way
        tiny = _tiny(reference, torch.bfloat16 if case.amp and "running" not in name else value.dtype)
        measurements.append(
            Measurement(
                name, max_error(value, reference, value.dtype), max_error(other, exact_theirs[name], value.dtype), tiny
            )
        )

    def distance(of: Result, z: list[Tensor]) -> float:
        wrong = [v[m.cpu() != (v > 0)].abs() for m, v in zip(of.masks, z, strict=True)]
        return max((w.max().item() for w in wrong if w.numel()), default=0.0)

    worst = max((v.abs().max().item() for v in z_mine), default=0.0)
    compute = torch.bfloat16 if case.amp else case.x_dtype
    measurements.append(
        Measurement("mask", distance(mine, z_mine), distance(theirs, z_theirs), 4 * ulp(compute, worst))
    )
    return measurements


# --- the table ------------------------------------------------------------------------------------------------------


def pairwise(
    factors: dict[str, list[Any]], valid: Callable[[dict[str, Any]], bool] = lambda row: True
) -> list[dict[str, Any]]:
    """Rows that contain every valid pair of values of every two factors; greedy, the same at every call."""
    rng = random.Random(0)
    names = list(factors)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }

    def pairs(row: dict[str, int]) -> set[tuple[str, int, str, int]]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)}

    rows = []
    while missing:
        a, i, b, j = min(missing)
        best: dict[str, int] | None = None
        gain = -1
        for _ in range(40):
            row = {name: rng.randrange(len(factors[name])) for name in names} | {a: i, b: j}
            if valid({name: factors[name][row[name]] for name in names}):
                found = len(pairs(row) & missing)
                if found > gain:
                    best, gain = row, found
        if best is None:
            missing.discard((a, i, b, j))
            continue
        missing -= pairs(best)
        rows.append({name: factors[name][best[name]] for name in names})
    return rows


_SHAPES = [
    (4, 3, 8, 8),
    (2, 1, 3, 5),
    (3, 64, 7, 7),
    (2, 65, 5, 6),
    (2, 257, 3, 4),
    (48, 16, 1, 1),
    (1, 8, 9, 13),
    (2, 7, 1, 35),
    (3, 13, 1, 2),
    (1, 5, 1, 1),
    (0, 6, 4, 4),
]


def _valid(row: dict[str, Any]) -> bool:
    shape, training = row["shape"], row.get("training", True) or row.get("training2", True)
    if row.get("conv"):
        channels, _, _, _, groups, bias = row["conv"]
        if shape[1] % groups or channels % groups:
            return False
        if bias and row["training"]:  # the gradient of that bias is zero: rounding compared with rounding
            return False
    if training and shape[0] and shape[0] * shape[2] * shape[3] < (4 if row.get("window") else 2):
        return False
    if not row.get("stats", True) and not (row.get("training", True) and row.get("training2", True) in (True, None)):
        return False
    if not row.get("stats", True) and row.get("momentum", 0.1) is None:
        return False
    if row.get("layout") == "overlapping" and shape[0] == 1:
        return False
    if row.get("window"):
        kernel, _, padding, dilation, _ = row["window"]
        if any(size + 2 * padding < dilation * (kernel - 1) + 1 for size in shape[2:]) or not shape[0]:
            return False
    return True


@functools.lru_cache
def cases(op: str, quick: bool = False) -> tuple[Case, ...]:
    """The cases of an op or a block; `quick` leaves about a third of them."""
    table = _block_cases(op) if op in BLOCKS else _op_cases(op) + _extreme_cases(op)
    return tuple(table[::3] if quick else table)


def _op_cases(op: str) -> list[Case]:
    factors: dict[str, list[Any]] = {
        "shape": list(_SHAPES),
        "dtype": list(_DTYPES),
        "layout": list(LAYOUTS),
        "distribution": list(DISTRIBUTIONS),
        "act": ["relu", None],
    }
    if op != "add_act":
        factors |= {
            "training": [True, False],
            "affine": ["both", "weight", "bias", "none"],
            "stats": [True, False],
            "momentum": [0.1, None, 1.0, 0.0],
            "eps": [1e-5, 1e-3],
        }
    if op == "add_act":
        factors["residual"] = [None, "contiguous", "channels_last", "expanded"]
    elif op == "batch_norm_act":
        factors["residual"] = [None, "contiguous", "channels_last", "expanded", "transposed"]
    elif op == "batch_norm_add_batch_norm_act":
        factors["residual"] = [None, "contiguous", "channels_last", "strided"]
        factors["training2"] = [None, True, False]
    elif op == "batch_norm_act_max_pool":
        factors["shape"] = [
            (2, 3, 16, 16),
            (2, 1, 9, 7),
            (1, 64, 13, 11),
            (2, 65, 8, 9),
            (1, 257, 5, 6),
            (3, 4, 1, 1),
            (2, 6, 3, 20),
            (4, 8, 2, 2),
        ]
        factors["window"] = [
            (3, 2, 1, 1, False),
            (2, 2, 0, 1, False),
            (3, 1, 1, 1, False),
            (3, 2, 0, 1, True),
            (5, 3, 2, 1, False),
            (2, 3, 1, 2, True),
            (1, 1, 0, 1, False),
        ]
    elif op == "conv_bn_act":
        factors["shape"] = [(2, 4, 9, 9), (3, 8, 7, 5), (1, 16, 12, 12), (5, 12, 1, 1)]
        factors["layout"] = ["contiguous", "channels_last", "strided"]
        factors["distribution"] = ["normal", "saturated", "mixed_scale"]
        factors["residual"] = [None, "contiguous", "channels_last"]
        factors["conv"] = [
            (8, 3, 1, 1, 1, False),
            (8, 1, 1, 0, 1, True),
            (12, 1, 2, 0, 4, False),
            (16, 3, 2, 1, 4, True),
        ]
    elif op in CONVOLUTIONS:
        factors["shape"] = [(4, 16, 8, 8), (3, 3, 7, 5), (7, 65, 9, 7), (1, 16, 12, 12), (2, 12, 2, 1)]
        factors["layout"] = ["channels_last", "contiguous", "strided"]
        factors["distribution"] = ["normal", *FOLDED_DISTRIBUTIONS]
        factors["affine"] = [*factors["affine"], "zero"]
        factors["residual"] = [None, "contiguous", "channels_last"]
        factors["conv"] = [(8, 1, 1, 0, 1, False), (33, 1, 2, 0, 1, False)]
        factors["weights"] = ["random", "zero_sum"]
    return [Case(op, **row) for row in pairwise(factors, _valid)]


def _extreme_cases(op: str) -> list[Case]:
    """Tensors of less than a vector, and of many tiles: sums are merged, threads share the work, stores may stream."""
    if op == "conv_bn_act":
        return []
    if op in CONVOLUTIONS:
        return _folded_cases(op)
    table = []
    for shape, layout in itertools.product([(2, 13, 2, 3), (3, 1, 2, 2)], LAYOUTS[:2]):
        table += [Case(op, shape=shape, layout=layout, distribution=d) for d in ("large_mean", "tiny_variance")]
    for shape, layout in itertools.product(
        [(2, 64, 56, 56), (8, 256, 14, 14), (4, 19, 97, 33)], ["channels_last", "contiguous"]
    ):
        for dtype, distribution in (("f32", "normal"), ("f32", "large_mean"), ("bf16", "normal")):
            table.append(Case(op, shape=shape, dtype=dtype, layout=layout, distribution=distribution))
            if op == "batch_norm_act":
                table.append(replace(table[-1], residual=layout))
    return table


def _folded_cases(op: str) -> list[Case]:
    """Every distribution at sizes where luck plays no part in the errors."""
    table = []
    for (shape, channels), dtype in itertools.product(
        [((4, 64, 14, 14), 256), ((2, 16, 32, 32), 64)], ("f32", "bf16", "f16")
    ):
        case = Case(op, shape=shape, dtype=dtype, layout="channels_last", conv=(channels, 1, 2, 0, 1, False))
        if op == "conv1x1_bn_act":
            case = replace(case, conv=(channels, 1, 1, 0, 1, False), residual="channels_last")
        table += [replace(case, distribution=d) for d in ("normal", *FOLDED_DISTRIBUTIONS)]
        table += [
            replace(case, distribution=d, weights="zero_sum") for d in ("normal", "mean_10", "equal_3%", "equal_1%")
        ]
        table.append(replace(case, affine="zero"))
    return table


def _block_cases(op: str) -> list[Case]:
    expansion = 4 if op.endswith("Bottleneck") else 1
    table = []
    for dtype, layout, amp in (
        ("f32", "channels_last", False),
        ("f32", "contiguous", False),
        ("f32", "channels_last", True),
        ("all-bf16", "channels_last", False),
        ("f64", "contiguous", False),
    ):
        for inplanes, stride in ((16 * expansion, 1), (24, 2)):
            for training in (True, False):
                block = (("planes", 16), ("stride", stride))
                table.append(
                    Case(
                        op,
                        shape=(4, inplanes, 14, 14),
                        dtype=dtype,
                        layout=layout,
                        amp=amp,
                        training=training,
                        block=block,
                    )
                )
    return table


# --- everything -----------------------------------------------------------------------------------------------------


def backends(device: str = "cpu") -> dict[str, str | None]:
    """Backends that can run on a device type, each with None or the reason why it cannot."""
    from . import use_backend

    found: dict[str, str | None] = {}
    for name in ("reference", "cpu", "cuda", "triton"):
        if name in ("cpu", "cuda") and name != torch.device(device).type:
            continue
        if name == "triton" and torch.device(device).type == "cpu":
            continue
        x = torch.ones((1, 1, 1, 1), device=device)
        try:
            from . import functional as F

            with use_backend(name):
                F.add_act(x, x)
            found[name] = None
        except Exception as error:  # whatever keeps a backend from serving is its reason
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    found["auto"] = None
    return found


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@dataclass
class Row:
    """The worst of one op on one backend, at one dtype and layout."""

    op: str
    backend: str
    device: str
    dtype: str
    layout: str
    cases: int = 0
    failed: int = 0
    multiple: float = -1.0
    worst: str = ""
    detail: str = ""

    def add(self, case: Case, measurements: list[Measurement]) -> None:
        self.cases += 1
        self.failed += not all(m.ok for m in measurements)
        for m in measurements:
            if m.multiple > self.multiple:
                self.multiple, self.worst, self.detail = m.multiple, case.name, str(m)

    def add_failure(self, case: Case, error: Exception) -> None:
        self.cases += 1
        self.failed += 1
        self.multiple, self.worst = math.inf, case.name
        self.detail = f"{type(error).__name__}: {error}".splitlines()[0]


def verify(
    ops: tuple[str, ...] = OPS + BLOCKS,
    backend_names: tuple[str, ...] | None = None,
    quick: bool = False,
    progress: Callable[[str], None] = lambda text: None,
    device_names: tuple[str, ...] | None = None,
) -> list[Row]:
    """Check every op and block on all backends and devices, or those named; a row per op, backend, dtype and layout."""
    rows: dict[tuple[str, ...], Row] = {}
    threads = torch.get_num_threads()
    try:
        _verify(ops, backend_names, quick, progress, rows, threads, device_names)
    finally:
        torch.set_num_threads(threads)
    return list(rows.values())


def _verify(
    ops: tuple[str, ...],
    backend_names: tuple[str, ...] | None,
    quick: bool,
    progress: Callable[[str], None],
    rows: dict[tuple[str, ...], Row],
    threads: int,
    device_names: tuple[str, ...] | None,
) -> None:
    for device in [d for d in devices() if device_names is None or d in device_names]:
        available = [name for name, reason in backends(device).items() if reason is None]
        for op in ops:
            chosen = [name for name in available if backend_names is None or name in backend_names]
            for number, case in enumerate(cases(op, quick)):
                # threads that wait for each other take long on a busy machine, and a small tensor needs one
                torch.set_num_threads(threads if math.prod(case.shape) > 2**16 else 1)
                amp = "amp-" if case.amp else ""
                for backend in chosen:
                    if backend in ("reference", "auto") and len(chosen) > 2 and number % 3:
                        continue  # the kernels are what runs, and "auto" is one of them
                    key = (
                        op,
                        backend,
                        device,
                        amp + case.dtype,
                        case.layout if case.layout in LAYOUTS[:2] else "other strides",
                    )
                    row = rows.setdefault(key, Row(*key))
                    progress(f"{op} {backend} {device}")
                    try:
                        row.add(case, check(case, backend, device))
                    except Exception as error:  # an op that raises on a valid case has failed it
                        row.add_failure(case, error)
            _eager_result.cache_clear()
