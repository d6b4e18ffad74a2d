r"""Batch normalisation with residual addition and ReLU: ``act(bn(x) + residual)`` and ``act(bn(x) + bn2(x2))``.

Forward, per channel over the ``m = N*H*W`` values of ``x``, with ``rstd = 1/sqrt(var + eps)`` (Ioffe, Szegedy 2015)::

    y   = (x - mean) * scale + shift        scale = weight * rstd,  shift = bias
    out = max(y + residual, 0)

In training ``mean`` and the biased ``var`` are those of the batch, and the running statistics move towards the mean and
the unbiased variance by ``momentum`` (or ``1/num_batches_tracked`` where momentum is None).

Backward, with ``g = dout`` where ``out > 0``, else 0 (g is also the gradient of the residual)::

    dbias = sum g      dweight = rstd * sum g*(x - mean)
    dx    = scale * (g - dbias/m - (x - mean) * rstd * dweight/m)        training
    dx    = scale * g                                                    evaluation

What is saved: ``x``, three numbers per channel (``stats``: mean, rstd and the part of the mean below float32
resolution, so that a mean of 1e4 costs no accuracy), and with a residual one bit per element for the ReLU. Without one
the sign of ``y`` is recomputed from ``x`` by the forward's own arithmetic, and that of a pair from ``x`` and ``x2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .layout import mask_bytes, pack_mask, unpack_mask
from .registry import define
from .traffic import COEFFICIENTS, COUNTER, PARTIALS, STATS, SUMS, Sizes, Traffic, backward_traffic, forward_traffic

_DIMS = (0, 2, 3)


# ---- reference -------------------------------------------------------------------------------------------------------


def _per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    mean: Tensor,
    var: Tensor,
    count: int,
) -> None:
    """Move the running statistics as ``nn.BatchNorm2d`` does, to a biased ``var`` of ``count`` values, in float64."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if running_mean is None or running_var is None:
        return
    factor = momentum if momentum is not None else num_batches_tracked.double().reciprocal()
    unbiased = var * (count / (count - 1))
    running_mean.copy_(running_mean.double() * (1 - factor) + mean * factor)
    running_var.copy_(running_var.double() * (1 - factor) + unbiased * factor)


def _reference_statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """The (3, C) statistics of a normalisation; updates the running ones in training."""
    if training:
        x64 = x.double()
        mean = x64.mean(_DIMS)
        rest = (x64 - _per_channel(mean)).mean(_DIMS)
        mean = mean + torch.where(rest.isfinite(), rest, 0.0)  # exact for a constant channel
        var = (x64 - _per_channel(mean)).square().mean(_DIMS)
        m = x.numel() // x.size(1)
        update_running(running_mean, running_var, num_batches_tracked, momentum, mean, var, m)
    else:
        mean, var = running_mean.double(), running_var.double()
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    high = mean.to(dtype)
    return torch.stack([high, (var + eps).rsqrt().to(dtype), (mean - high.double()).to(dtype)])


def _reference_normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor) -> Tensor:
    """``bn(x)`` in float64 from the saved statistics."""
    mean, rstd, mean_low = stats.double()
    y = (x.double() - _per_channel(mean) - _per_channel(mean_low)) * _per_channel(rstd)
    if weight is not None:
        y = y * _per_channel(weight.double())
    return y if bias is None else y + _per_channel(bias.double())


def _empty_mask(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.uint8)


def _batch_norm_act_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    stats = _reference_statistics(x, running_mean, running_var, num_batches_tracked, training, momentum, eps)
    y = _reference_normalise(x, weight, bias, stats)
    if residual is not None:
        y = y + residual.double()
    out = torch.empty_like(x).copy_(y.relu() if relu else y)
    return out, stats, pack_mask(~(out <= 0)) if save_mask else _empty_mask(x)


def _masked(dy: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """``dy`` in float64 where the stored, rounded ``y`` is not <= 0, so that NaN passes its gradient as in torch."""
    return torch.where(y.to(dtype) <= 0, 0.0, dy.double())


def _reference_backward(
    g: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, training: bool, need_dx: bool, need_affine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias of one normalisation from the masked float64 gradient ``g``."""
    mean, rstd, mean_low = stats.double()
    scale = rstd if weight is None else rstd * weight.double()
    centred = x.double() - _per_channel(mean) - _per_channel(mean_low)
    dbias = g.sum(_DIMS)
    dweight = (g * centred).sum(_DIMS) * rstd
    dx = x.new_empty(0)
    if need_dx:
        inner = g
        if training and x.numel() > 0:
            m = x.numel() // x.size(1)
            inner = g - _per_channel(dbias / m) - centred * _per_channel(rstd * dweight / m)
        dx = torch.empty_like(x).copy_(inner * _per_channel(scale))
    dtype = weight.dtype if weight is not None else stats.dtype
    return dx, *((v.to(dtype) if need_affine else stats.new_empty(0, dtype=dtype)) for v in (dweight, dbias))


def _batch_norm_act_backward_reference(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    mask: Tensor | None,
    training: bool,
    relu: bool,
    need_dx: bool,
    need_dresidual: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = dy.double()
    if mask is not None:
        g = torch.where(unpack_mask(mask, x), g, 0.0)
    elif relu:
        g = _masked(dy, _reference_normalise(x, weight, bias, stats), x.dtype)
    dx, dweight, dbias = _reference_backward(g, x, weight, stats, training, need_dx, need_affine)
    dresidual = torch.empty_like(x).copy_(g) if need_dresidual else x.new_empty(0)
    return dx, dresidual, dweight, dbias


def _batch_norm_add_batch_norm_act_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    x2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    running_mean2: Tensor | None,
    running_var2: Tensor | None,
    num_batches_tracked2: Tensor | None,
    training2: bool,
    momentum2: float | None,
    eps2: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    stats = _reference_statistics(x, running_mean, running_var, num_batches_tracked, training, momentum, eps)
    stats2 = _reference_statistics(x2, running_mean2, running_var2, num_batches_tracked2, training2, momentum2, eps2)
    y = _reference_normalise(x, weight, bias, stats) + _reference_normalise(x2, weight2, bias2, stats2)
    return torch.empty_like(x).copy_(y.relu() if relu else y), stats, stats2


def _batch_norm_add_batch_norm_act_backward_reference(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    training: bool,
    x2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    stats2: Tensor,
    training2: bool,
    relu: bool,
    need_dx: bool,
    need_dx2: bool,
    need_affine: bool,
    need_affine2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = dy.double()
    if relu:
        y = _reference_normalise(x, weight, bias, stats) + _reference_normalise(x2, weight2, bias2, stats2)
        g = _masked(dy, y, x.dtype)
    dx, dweight, dbias = _reference_backward(g, x, weight, stats, training, need_dx, need_affine)
    dx2, dweight2, dbias2 = _reference_backward(g, x2, weight2, stats2, training2, need_dx2, need_affine2)
    return dx, dweight, dbias, dx2, dweight2, dbias2


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _fake_stats(x: Tensor) -> Tensor:
    return x.new_empty((3, x.size(1)), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _fake_affine_grad(stats: Tensor, weight: Tensor | None, wanted: bool) -> Tensor:
    return stats.new_empty(stats.size(1) if wanted else 0, dtype=stats.dtype if weight is None else weight.dtype)


def _batch_norm_act_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    save_mask = args[-1]
    mask = x.new_empty(mask_bytes(x) if save_mask else 0, dtype=torch.uint8)
    return torch.empty_like(x), _fake_stats(x), mask


def _batch_norm_act_backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    mask: Tensor | None,
    training: bool,
    relu: bool,
    need_dx: bool,
    need_dresidual: bool,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dresidual = (torch.empty_like(x) if wanted else x.new_empty(0) for wanted in (need_dx, need_dresidual))
    dweight, dbias = (_fake_affine_grad(stats, weight, need_affine) for _ in range(2))
    return dx, dresidual, dweight, dbias


def _batch_norm_add_batch_norm_act_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _fake_stats(x), _fake_stats(x)


def _batch_norm_add_batch_norm_act_backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    training: bool,
    x2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    stats2: Tensor,
    training2: bool,
    relu: bool,
    need_dx: bool,
    need_dx2: bool,
    need_affine: bool,
    need_affine2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    results = []
    for v, w, s, wants_dx, wants_affine in (
        (x, weight, stats, need_dx, need_affine),
        (x2, weight2, stats2, need_dx2, need_affine2),
    ):
        results.append(torch.empty_like(v) if wants_dx else v.new_empty(0))
        results += [_fake_affine_grad(s, w, wants_affine) for _ in range(2)]
    return tuple(results)


# ---- ops -------------------------------------------------------------------------------------------------------------


def _triton_batch_norm_act() -> Any:
    from ..kernels.batch_norm_act import batch_norm_act

    return batch_norm_act


def _triton_batch_norm_act_backward() -> Any:
    from ..kernels.batch_norm_act import batch_norm_act_backward

    return batch_norm_act_backward


def _triton_batch_norm_add_batch_norm_act() -> Any:
    from ..kernels.batch_norm_act import batch_norm_add_batch_norm_act

    return batch_norm_add_batch_norm_act


def _triton_batch_norm_add_batch_norm_act_backward() -> Any:
    from ..kernels.batch_norm_act import batch_norm_add_batch_norm_act_backward

    return batch_norm_add_batch_norm_act_backward


_NORM = (
    "Tensor? weight{0}, Tensor? bias{0}, Tensor({1}!)? running_mean{0}, Tensor({2}!)? running_var{0}, "
    "Tensor({3}!)? num_batches_tracked{0}, bool training{0}, float? momentum{0}, float eps{0}"
)

BATCH_NORM_ACT = define(
    "batch_norm_act",
    f"(Tensor x, Tensor? residual, {_NORM.format('', 'a', 'b', 'c')}, bool relu, bool save_mask)"
    " -> (Tensor out, Tensor stats, Tensor mask)",
    _batch_norm_act_reference,
    _batch_norm_act_fake,
    cuda=True,
    triton=_triton_batch_norm_act,
)

BATCH_NORM_ACT_BACKWARD = define(
    "batch_norm_act_backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, Tensor? mask, bool training, bool relu,"
    " bool need_dx, bool need_dresidual, bool need_affine)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _batch_norm_act_backward_reference,
    _batch_norm_act_backward_fake,
    cuda=True,
    triton=_triton_batch_norm_act_backward,
)

BATCH_NORM_ADD_BATCH_NORM_ACT = define(
    "batch_norm_add_batch_norm_act",
    f"(Tensor x, {_NORM.format('', 'a', 'b', 'c')}, Tensor x2, {_NORM.format('2', 'd', 'e', 'f')}, bool relu)"
    " -> (Tensor out, Tensor stats, Tensor stats2)",
    _batch_norm_add_batch_norm_act_reference,
    _batch_norm_add_batch_norm_act_fake,
    cuda=True,
    triton=_triton_batch_norm_add_batch_norm_act,
)

BATCH_NORM_ADD_BATCH_NORM_ACT_BACKWARD = define(
    "batch_norm_add_batch_norm_act_backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, bool training,"
    " Tensor x2, Tensor? weight2, Tensor? bias2, Tensor stats2, bool training2, bool relu,"
    " bool need_dx, bool need_dx2, bool need_affine, bool need_affine2)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dx2, Tensor dweight2, Tensor dbias2)",
    _batch_norm_add_batch_norm_act_backward_reference,
    _batch_norm_add_batch_norm_act_backward_fake,
    cuda=True,
    triton=_triton_batch_norm_add_batch_norm_act_backward,
)


# ---- traffic ---------------------------------------------------------------------------------------------------------


def batch_norm_act_traffic(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    layout: str = "channels_last",
    training: bool = True,
    residual: bool = False,
    relu: bool = True,
    save_mask: bool | None = None,
    affine: bool = True,
    running: bool = True,
    counter: bool = False,
    cumulative: bool = False,
    param_dtype: torch.dtype | None = None,
    form: str = "two_pass",
    tiles: int = 1,
) -> Traffic:
    """Bytes of the forward.

    Args:
        shape, dtype: of x, (N, C, H, W). layout: ``"channels_last"`` or ``"contiguous"``.
        residual, affine, running, counter: whether there is a residual, are weight and bias, running statistics, and
            ``num_batches_tracked``. cumulative: ``momentum=None``, whose factor comes from that counter.
        save_mask: whether the mask is written; by default where the backward needs it, with a residual and ReLU.
        param_dtype: of weight, bias and running statistics; by default that of the saved statistics.
        form: ``"two_pass"``, or ``"one_pass"`` where a channel's values stay on the chip.
        tiles: partial results per channel that the first of two passes leaves.

    Raises:
        ValueError: a shape that is not four sizes, an unknown layout or form.
    """
    s = Sizes(shape, dtype, layout, param_dtype)
    mask = s.mask if (relu and residual if save_mask is None else save_mask) else 0
    return forward_traffic(
        normed=s.x,
        inputs=(1 + residual) * s.x,
        outputs=s.x + mask,
        params=2 * s.param * affine,
        running=2 * s.param * running,
        counters=COUNTER * counter,
        cumulative=cumulative,
        stats=STATS * s.wide,
        partials=PARTIALS * s.wide * tiles,
        training=training,
        form=form,
    )


def batch_norm_act_backward_traffic(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    layout: str = "channels_last",
    training: bool = True,
    residual: bool = False,
    relu: bool = True,
    affine: bool = True,
    need_dx: bool = True,
    need_dresidual: bool | None = None,
    need_affine: bool | None = None,
    param_dtype: torch.dtype | None = None,
    form: str = "two_pass",
    tiles: int = 1,
) -> Traffic:
    """Bytes of the backward; arguments as in :func:`batch_norm_act_traffic`.

    Args:
        need_dx, need_dresidual, need_affine: the gradients that are wanted; by default all there are. The residual's
            own is dy itself without ReLU.
    """
    s = Sizes(shape, dtype, layout, param_dtype)
    need_dresidual = residual and relu if need_dresidual is None else need_dresidual
    need_affine = affine if need_affine is None else need_affine
    with_mask = relu and residual
    reads_x = (need_dx and training) or need_affine or (relu and not with_mask)
    return backward_traffic(
        inputs=(1 + reads_x) * s.x + with_mask * s.mask,
        gradients=need_dx * s.x,
        early=need_dresidual * s.x,
        params=_backward_params(s, affine, relu and not with_mask, need_dx),
        sign_params=_backward_params(s, affine, relu and not with_mask, False),
        stats=STATS * s.wide,
        affine_grads=2 * need_affine * (s.param if affine else s.wide),
        partials=SUMS * s.wide * tiles,
        coefficients=COEFFICIENTS * s.wide,
        training=training,
        form=form,
    )


def _backward_params(s: Sizes, affine: bool, recomputes: bool, need_dx: bool) -> int:
    """Weight, for dx; and bias, where the sign of the activation is recomputed."""
    return affine * s.param * (2 if recomputes else int(need_dx))


def batch_norm_add_batch_norm_act_traffic(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    layout: str = "channels_last",
    training: bool = True,
    relu: bool = True,
    affine: bool = True,
    running: bool = True,
    counter: bool = False,
    cumulative: bool = False,
    param_dtype: torch.dtype | None = None,
    form: str = "two_pass",
    tiles: int = 1,
) -> Traffic:
    """Bytes of the forward with both norms in the same mode; arguments as in :func:`batch_norm_act_traffic`.

    ReLU costs nothing: its sign is recomputed in the backward.
    """
    s = Sizes(shape, dtype, layout, param_dtype)
    return forward_traffic(
        normed=2 * s.x,
        inputs=2 * s.x,
        outputs=s.x,
        params=4 * s.param * affine,
        running=4 * s.param * running,
        counters=2 * COUNTER * counter,
        cumulative=cumulative,
        stats=2 * STATS * s.wide,
        partials=2 * PARTIALS * s.wide * tiles,
        training=training,
        form=form,
    )


def batch_norm_add_batch_norm_act_backward_traffic(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    layout: str = "channels_last",
    training: bool = True,
    relu: bool = True,
    affine: bool = True,
    need_dx: bool = True,
    need_dx2: bool = True,
    need_affine: bool | None = None,
    param_dtype: torch.dtype | None = None,
    form: str = "two_pass",
    tiles: int = 1,
) -> Traffic:
    """Bytes of the backward with both norms in the same mode; arguments as in :func:`batch_norm_act_traffic`.

    The sums are three per tile and channel: of g, and of g times each of the centred inputs.
    """
    s = Sizes(shape, dtype, layout, param_dtype)
    need_affine = affine if need_affine is None else need_affine
    return backward_traffic(
        inputs=3 * s.x,
        gradients=(need_dx + need_dx2) * s.x,
        early=0,
        params=2 * _backward_params(s, affine, relu, True),
        sign_params=2 * _backward_params(s, affine, relu, False),
        stats=2 * STATS * s.wide,
        affine_grads=4 * need_affine * (s.param if affine else s.wide),
        partials=3 * s.wide * tiles,
        coefficients=3 * s.wide,
        training=training,
        form=form,
    )


# ---- eager PyTorch ---------------------------------------------------------------------------------------------------


def eager_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """``F.batch_norm`` and the counter of ``nn.BatchNorm2d``; the cumulative average without a host synchronisation."""
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    by_count = training and momentum is None and running_mean is not None and x.numel() > 0
    if not by_count:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum or 0.0, eps)
    mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_var)
    y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)
    factor = num_batches_tracked.reciprocal().to(mean.dtype)
    running_mean.lerp_(mean, factor)
    running_var.lerp_(var, factor)
    return y


def _differentiable_backward(
    g: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, training: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias from ATen ops that autograd can differentiate again; used under ``create_graph``."""
    mean, rstd, mean_low = stats.unbind()
    if training:
        if weight is None:  # ATen's own double backward needs one
            weight = torch.ones_like(mean)
        return torch.ops.aten.native_batch_norm_backward(
            g, x, weight, None, None, mean + mean_low, rstd, True, eps, [True, True, True]
        )
    dtype = stats.dtype
    scale = rstd if weight is None else rstd * weight.to(dtype)
    g_wide = g.to(dtype)
    x_hat = (x.to(dtype) - _per_channel(mean) - _per_channel(mean_low)) * _per_channel(rstd)
    param_dtype = dtype if weight is None else weight.dtype
    dx = (g_wide * _per_channel(scale)).to(x.dtype)
    return dx, (g_wide * x_hat).sum(_DIMS).to(param_dtype), g_wide.sum(_DIMS).to(param_dtype)


def _statistics_dtype_of(x: Tensor, weight: Tensor | None, stats: Tensor) -> Tensor:
    """ATen wants the saved statistics in the parameters' dtype."""
    wanted = x.dtype if weight is not None and weight.dtype == x.dtype else stats.dtype
    return stats.to(wanted)


def _recomputed_mask(y: Tensor, dtype: torch.dtype) -> Tensor:
    return ~(y.to(dtype) <= 0)


# ---- autograd --------------------------------------------------------------------------------------------------------


class BatchNormActFunction(Function):
    """``act(bn(x) + residual)`` of dense tensors in one memory format.

    ``config`` is what is not differentiable: ``(statistics, relu, memory_format, forward_op, backward_op)``, where
    ``statistics`` are the op's arguments from ``running_mean`` to ``eps``. In one tuple, for every argument costs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        config: tuple[tuple[Any, ...], bool, torch.memory_format, Any, Any],
    ) -> Tensor:
        statistics, relu, memory_format, forward_op, backward_op = config
        save_mask = relu and residual is not None
        out, stats, mask = forward_op(x, residual, weight, bias, *statistics, relu, save_mask)
        ctx.save_for_backward(x, weight, bias, stats, mask if save_mask else None)
        ctx.config = (statistics[3], statistics[5], relu, memory_format, backward_op)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, stats, mask = ctx.saved_tensors
        training, eps, relu, memory_format, backward_op = ctx.config
        # The mask's bits are in the order that x had; a hook that packs saved tensors may have changed it.
        x = x.contiguous(memory_format=memory_format)
        need_dx, need_dresidual, need_dweight, need_dbias = ctx.needs_input_grad[:4]
        need_affine = need_dweight or need_dbias
        dx = dresidual = dweight = dbias = None
        if torch.is_grad_enabled():
            g = dy
            if mask is not None:
                g = dy * unpack_mask(mask, x)
            elif relu:
                with torch.no_grad():
                    keep = _recomputed_mask(_reference_normalise(x, weight, bias, stats), x.dtype)
                g = dy * keep
            dresidual = g
            if need_dx or need_affine:
                saved = _statistics_dtype_of(x, weight, stats)
                dx, dweight, dbias = _differentiable_backward(g, x, weight, saved, training, eps)
        elif relu or need_dx or need_affine:
            dx, dresidual, dweight, dbias = backward_op(
                dy.contiguous(memory_format=memory_format),
                x,
                weight,
                bias,
                stats,
                mask,
                training,
                relu,
                need_dx,
                need_dresidual and relu,
                need_affine,
            )
        if not relu:
            dresidual = dy
        return (
            dx if need_dx else None,
            dresidual if need_dresidual else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            None,
        )


class BatchNormAddBatchNormActFunction(Function):
    """``act(bn(x) + bn2(x2))`` of dense tensors in one memory format.

    ``config`` is ``(statistics, statistics2, relu, memory_format, forward_op, backward_op)``, as in
    :class:`BatchNormActFunction`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        x2: Tensor,
        weight2: Tensor | None,
        bias2: Tensor | None,
        config: tuple[tuple[Any, ...], tuple[Any, ...], bool, torch.memory_format, Any, Any],
    ) -> Tensor:
        statistics, statistics2, relu, memory_format, forward_op, backward_op = config
        out, stats, stats2 = forward_op(x, weight, bias, *statistics, x2, weight2, bias2, *statistics2, relu)
        ctx.save_for_backward(x, weight, bias, stats, x2, weight2, bias2, stats2)
        ctx.config = (statistics[3], statistics[5], statistics2[3], statistics2[5], relu, memory_format, backward_op)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, stats, x2, weight2, bias2, stats2 = ctx.saved_tensors
        training, eps, training2, eps2, relu, memory_format, backward_op = ctx.config
        x, x2 = x.contiguous(memory_format=memory_format), x2.contiguous(memory_format=memory_format)
        need_dx, need_dweight, need_dbias, need_dx2, need_dweight2, need_dbias2 = ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():
            g = dy
            if relu:
                with torch.no_grad():
                    y = _reference_normalise(x, weight, bias, stats) + _reference_normalise(x2, weight2, bias2, stats2)
                    keep = _recomputed_mask(y, x.dtype)
                g = dy * keep
            saved = _statistics_dtype_of(x, weight, stats)
            dx, dweight, dbias = _differentiable_backward(g, x, weight, saved, training, eps)
            saved2 = _statistics_dtype_of(x2, weight2, stats2)
            dx2, dweight2, dbias2 = _differentiable_backward(g, x2, weight2, saved2, training2, eps2)
        else:
            dx, dweight, dbias, dx2, dweight2, dbias2 = backward_op(
                dy.contiguous(memory_format=memory_format),
                x,
                weight,
                bias,
                stats,
                training,
                x2,
                weight2,
                bias2,
                stats2,
                training2,
                relu,
                need_dx,
                need_dx2,
                need_dweight or need_dbias,
                need_dweight2 or need_dbias2,
            )
        return (
            dx if need_dx else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            dx2 if need_dx2 else None,
            dweight2 if need_dweight2 else None,
            dbias2 if need_dbias2 else None,
            None,
        )
