r"""A 1x1 convolution, its batch normalisation in training, and what follows, as one GEMM.

``act(bn(conv(y)) + residual)`` and ``act(bn(conv(y)) + bn2(conv2(y2)))``. Rows are pixels: ``Y (n, C)`` are the ``n``
pixels that the stride takes from ``y``, ``w (K, C)`` is the weight, and ``X = Y w^T (n, K)``, what is normalised, never
exists. The statistics of X follow from the moments of Y, so they are known before the convolution runs::

    mean = Y^T 1 / n (C)          cov = (Y - mean)^T (Y - mean) (C, C)          reads y
    mu   = w mean (K)             var = diag(w cov w^T) / n
    rstd = 1/sqrt(var + eps)      s   = weight * rstd
    w~   = round(s w)             t   = bias - w~ mean
    out  = max(Y w~^T + t + residual, 0)                                        reads y, residual; writes out, mask

``round`` is to the dtype of y. With ``w~`` instead of ``s w`` in ``t``, its rounding meets centred values only.

Backward, with ``g = dout`` where ``out > 0``, else 0 (g is also the gradient of the residual)::

    P   = g^T Y (K, C)            s1  = g^T 1 (K)                               reads dout, mask, y
    P-  = P - s1 mean^T           dbias = s1          dweight = rstd * sum_c w P-
    b   = -s * rstd * dweight / n dw  = s P- + (b w) cov
    M~  = round(w^T (b w)) (C, C) v   = -(w~^T s1) / n - M~^T mean
    dy  = g w~ + Y M~ + v                                                       reads dout, mask, y; writes dy

``dy`` is zero at the pixels that the stride leaves out. The second convolution of a pair has the same formulas with the
same ``g``; its terms are added to ``out`` before the rounding.

``conv1x1_statistics`` is a convolution that leaves the partial statistics of its output, for a norm that is not folded.

Where y is itself ``relu(bn0(x0))``, the ops take x0 and ``norm``, (3, C): mean, scale and shift, and normalise as they
read: ``y = round(max((x0 - mean) * scale + shift, 0))`` never exists either. The last pass then writes ``dy`` where
``y > 0``, else 0, and its sums and those with ``x0 - mean``, which are what the gradient of bn0 needs.

What is saved: y (or x0), the parameters, ``mean``, ``cov``, ``mu`` and ``rstd``, and one bit per element of ``out`` for
the ReLU. ``w~`` is computed anew. The vectors and the small matrices are float64, whatever serves the four passes over
pixels; where that is not exact enough, ``fusedres/ops/folding.py`` refuses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .batch_norm_act import update_running
from .batch_norm_sync import batch_norm_statistics_reference, differentiable_backward
from .folding import Conditioning
from .layout import mask_bytes, pack_mask, unpack_mask
from .registry import define, serve
from .traffic import COUNTER, Launch, Sizes, Traffic

# ---- shapes ----------------------------------------------------------------------------------------------------------


def strided_size(size: int, stride: int) -> int:
    """Pixels that a stride takes from a row or a column of ``size``."""
    return (size - 1) // stride + 1


def pixels(y: Tensor, stride: int) -> int:
    """Pixels that a stride takes from a batch: the values per channel."""
    return y.size(0) * strided_size(y.size(2), stride) * strided_size(y.size(3), stride)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over channels of ``dtype`` are accumulated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matrix_dtype(dtype: torch.dtype) -> torch.dtype:
    """What covariances and products over all pixels of ``dtype`` are kept in; they are summed in float64."""
    return torch.float64 if dtype.itemsize > 2 else torch.float32


def _output_like(y: Tensor, channels: int, stride: int) -> Tensor:
    """Uninitialised (N, K, H', W'), channels_last."""
    shape = (y.size(0), channels, strided_size(y.size(2), stride), strided_size(y.size(3), stride))
    return torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)


# ---- reference -------------------------------------------------------------------------------------------------------


def _rows(y: Tensor, stride: int = 1) -> Tensor:
    """The pixels that the stride takes, in float64."""
    return y[:, :, ::stride, ::stride].double().permute(0, 2, 3, 1).reshape(-1, y.size(1))  # (n, C)


def _normalised(y: Tensor, norm: Tensor | None) -> Tensor:
    """``y``, or the activation that it becomes."""
    if norm is None:
        return y
    mean, scale, shift = norm.double().view(3, 1, -1, 1, 1)
    return ((y.double() - mean) * scale + shift).relu().to(y.dtype)


def _as_image(rows: Tensor, like: Tensor) -> Tensor:
    n, _, h, w = like.shape
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)


def _conv1x1_moments_reference(y: Tensor, norm: Tensor | None, stride: int) -> tuple[Tensor, Tensor]:
    rows = _rows(_normalised(y, norm), stride)
    mean = rows.mean(0)
    rest = (rows - mean).mean(0)
    mean = mean + torch.where(rest.isfinite(), rest, 0.0)  # exact for a constant channel
    centred = rows - mean
    return mean, centred.T @ centred


def _conv1x1_statistics_reference(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    out = _output_like(x, weight.size(0), 1)
    out.copy_(_as_image(_rows(x) @ weight.double().T, out))
    return out, batch_norm_statistics_reference(out)


def _conv1x1_bn_act_apply_reference(
    y: Tensor,
    norm: Tensor | None,
    folded: Tensor,
    shift: Tensor,
    stride: int,
    y2: Tensor | None,
    folded2: Tensor | None,
    stride2: int,
    residual: Tensor | None,
    residual_mask: Tensor | None,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    out = _output_like(y, folded.size(0), stride)
    z = _rows(_normalised(y, norm), stride) @ folded.double().T + shift.double()
    if y2 is not None:
        z = z + _rows(y2, stride2) @ folded2.double().T
    if residual is not None:
        z = z + _rows(_masked(residual, residual_mask))
    out.copy_(_as_image(z.relu() if relu else z, out))
    return out, pack_mask(~(out <= 0)) if save_mask else y.new_empty(0, dtype=torch.uint8)


def _masked(dy: Tensor, mask: Tensor | None) -> Tensor:
    return dy if mask is None else torch.where(unpack_mask(mask, dy), dy, 0.0)


def _conv1x1_bn_act_backward_reduce_reference(
    dy: Tensor,
    mask: Tensor | None,
    y: Tensor,
    norm: Tensor | None,
    stride: int,
    y2: Tensor | None,
    stride2: int,
    need_g: bool,
    need_products: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    masked, dtype = _masked(dy, mask), matrix_dtype(dy.dtype)
    g = _rows(masked)
    return (
        torch.empty_like(dy).copy_(masked) if need_g else dy.new_empty(0),
        g.sum(0),
        (g.T @ _rows(_normalised(y, norm), stride) if need_products else g.new_empty(0)).to(dtype),
        (g.T @ _rows(y2, stride2) if need_products and y2 is not None else g.new_empty(0)).to(dtype),
    )


def _reference_dx(g: Tensor, y: Tensor, folded: Tensor, mixing: Tensor, offset: Tensor, stride: int) -> Tensor:
    dx = torch.zeros_like(y)
    strided = dx[:, :, ::stride, ::stride]
    rows = g @ folded.double() + _rows(y, stride) @ mixing.double() + offset.double()
    strided.copy_(_as_image(rows, strided))
    return dx


def _conv1x1_bn_act_backward_apply_reference(
    dy: Tensor,
    mask: Tensor | None,
    y: Tensor,
    norm: Tensor | None,
    folded: Tensor,
    mixing: Tensor,
    offset: Tensor,
    stride: int,
    y2: Tensor | None,
    folded2: Tensor | None,
    mixing2: Tensor | None,
    offset2: Tensor | None,
    stride2: int,
    need_dx: bool,
    need_dx2: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    g = _rows(_masked(dy, mask))
    dx, sums = y.new_empty(0), y.new_empty(0, dtype=torch.float64)
    if need_dx:
        activated = _normalised(y, norm)
        dx = _reference_dx(g, activated, folded, mixing, offset, stride)
        if norm is not None:
            dx = dx.where(~(activated <= 0), 0.0)
            rows = _rows(dx)
            sums = torch.stack([rows.sum(0), (rows * (_rows(y) - norm[0].double())).sum(0)])
    dx2 = _reference_dx(g, y2, folded2, mixing2, offset2, stride2) if need_dx2 else y.new_empty(0)
    return dx, dx2, sums


# ---- fake kernels ----------------------------------------------------------------------------------------------------


def _conv1x1_moments_fake(y: Tensor, norm: Tensor | None, stride: int) -> tuple[Tensor, Tensor]:
    channels = y.size(1)
    return y.new_empty(channels, dtype=torch.float64), y.new_empty((channels, channels), dtype=torch.float64)


def _conv1x1_statistics_fake(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return _output_like(x, weight.size(0), 1), x.new_empty(2 * weight.size(0) + 1, dtype=torch.float64)


def _conv1x1_bn_act_apply_fake(
    y: Tensor, norm: Tensor | None, folded: Tensor, shift: Tensor, stride: int, *args: Any
) -> tuple[Tensor, Tensor]:
    save_mask = args[-1]
    out = _output_like(y, folded.size(0), stride)
    return out, y.new_empty(mask_bytes(out) if save_mask else 0, dtype=torch.uint8)


def _conv1x1_bn_act_backward_reduce_fake(
    dy: Tensor,
    mask: Tensor | None,
    y: Tensor,
    norm: Tensor | None,
    stride: int,
    y2: Tensor | None,
    stride2: int,
    need_g: bool,
    need_products: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def products(of: Tensor | None) -> Tensor:
        wanted = need_products and of is not None
        return dy.new_empty((dy.size(1), of.size(1)) if wanted else 0, dtype=matrix_dtype(dy.dtype))

    g = torch.empty_like(dy) if need_g else dy.new_empty(0)
    return g, dy.new_empty(dy.size(1), dtype=torch.float64), products(y), products(y2)


def _conv1x1_bn_act_backward_apply_fake(
    dy: Tensor, mask: Tensor | None, y: Tensor, norm: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    y2, need_dx, need_dx2 = args[4], *args[-2:]
    dx, dx2 = (torch.empty_like(v) if wanted else y.new_empty(0) for v, wanted in ((y, need_dx), (y2, need_dx2)))
    return dx, dx2, y.new_empty((2, y.size(1)) if need_dx and norm is not None else 0, dtype=torch.float64)


# ---- ops -------------------------------------------------------------------------------------------------------------


def _triton_conv1x1_moments() -> Any:
    from ..kernels.conv1x1_bn_act import conv1x1_moments

    return conv1x1_moments


def _triton_conv1x1_statistics() -> Any:
    from ..kernels.conv1x1_bn_act import conv1x1_statistics

    return conv1x1_statistics


def _triton_conv1x1_bn_act_apply() -> Any:
    from ..kernels.conv1x1_bn_act import conv1x1_bn_act_apply

    return conv1x1_bn_act_apply


def _triton_conv1x1_bn_act_backward_reduce() -> Any:
    from ..kernels.conv1x1_bn_act import conv1x1_bn_act_backward_reduce

    return conv1x1_bn_act_backward_reduce


def _triton_conv1x1_bn_act_backward_apply() -> Any:
    from ..kernels.conv1x1_bn_act import conv1x1_bn_act_backward_apply

    return conv1x1_bn_act_backward_apply


CONV1X1_MOMENTS = define(
    "conv1x1_moments",
    "(Tensor y, Tensor? norm, int stride) -> (Tensor mean, Tensor cov)",
    _conv1x1_moments_reference,
    _conv1x1_moments_fake,
    triton=_triton_conv1x1_moments,
)

CONV1X1_STATISTICS = define(
    "conv1x1_statistics",
    "(Tensor x, Tensor weight) -> (Tensor out, Tensor partial)",
    _conv1x1_statistics_reference,
    _conv1x1_statistics_fake,
    triton=_triton_conv1x1_statistics,
)

CONV1X1_BN_ACT_APPLY = define(
    "conv1x1_bn_act_apply",
    "(Tensor y, Tensor? norm, Tensor folded, Tensor shift, int stride, Tensor? y2, Tensor? folded2, int stride2,"
    " Tensor? residual, Tensor? residual_mask, bool relu, bool save_mask) -> (Tensor out, Tensor mask)",
    _conv1x1_bn_act_apply_reference,
    _conv1x1_bn_act_apply_fake,
    triton=_triton_conv1x1_bn_act_apply,
)

CONV1X1_BN_ACT_BACKWARD_REDUCE = define(
    "conv1x1_bn_act_backward_reduce",
    "(Tensor dy, Tensor? mask, Tensor y, Tensor? norm, int stride, Tensor? y2, int stride2, bool need_g,"
    " bool need_products)"
    " -> (Tensor g, Tensor sum_g, Tensor products, Tensor products2)",
    _conv1x1_bn_act_backward_reduce_reference,
    _conv1x1_bn_act_backward_reduce_fake,
    triton=_triton_conv1x1_bn_act_backward_reduce,
)

CONV1X1_BN_ACT_BACKWARD_APPLY = define(
    "conv1x1_bn_act_backward_apply",
    "(Tensor dy, Tensor? mask, Tensor y, Tensor? norm, Tensor folded, Tensor mixing, Tensor offset, int stride,"
    " Tensor? y2, Tensor? folded2, Tensor? mixing2, Tensor? offset2, int stride2, bool need_dx, bool need_dx2)"
    " -> (Tensor dx, Tensor dx2, Tensor sums)",
    _conv1x1_bn_act_backward_apply_reference,
    _conv1x1_bn_act_backward_apply_fake,
    triton=_triton_conv1x1_bn_act_backward_apply,
)

# ---- traffic ---------------------------------------------------------------------------------------------------------

_FLOAT64 = 8  # bytes of what the small matrices are made of


class _Sizes:
    """Bytes of the operands of one convolution; only the pixels that the stride takes are read."""

    def __init__(self, shape: Sequence[int], channels: int, dtype: torch.dtype, stride: int) -> None:
        n, c, h, w = shape
        if stride < 1:
            raise ValueError(f"stride must be positive, but got {stride}")
        out = (n, channels, strided_size(h, stride), strided_size(w, stride))
        of_y, of_out = (Sizes(s, dtype, "channels_last") for s in (shape, out))
        count = n * out[2] * out[3]
        self.image = of_y.x
        self.y = count * c * dtype.itemsize
        self.out, self.mask, self.shift = of_out.x, of_out.mask, of_out.wide
        self.folded, self.mixing, self.offset = channels * c * dtype.itemsize, c * c * dtype.itemsize, of_y.wide
        self.products, self.sums = channels * c * matrix_dtype(dtype).itemsize, channels * _FLOAT64
        self.norm, self.norm_sums = 3 * of_y.wide, 2 * c * _FLOAT64


def _one_launch(name: str, loads: int, stores: int) -> Traffic:
    return Traffic(loads + stores, (Launch(name, loads, stores),))


def conv1x1_moments_traffic(
    shape: Sequence[int], dtype: torch.dtype, *, norm: bool = False, stride: int = 1
) -> Traffic:
    """Bytes of the moments of a channels_last (N, C, H, W): one pass over the pixels that the stride takes.

    Args:
        norm: whether y is normalised as it is read.

    Raises:
        ValueError: a shape that is not four sizes, a stride that is not positive; so do the other three.
    """
    s, c = _Sizes(shape, 1, dtype, stride), shape[1]
    return _one_launch("moments", s.y + norm * s.norm, (c + c * c) * _FLOAT64)


def conv1x1_statistics_traffic(shape: Sequence[int], channels: int, dtype: torch.dtype) -> Traffic:
    """Bytes of a convolution of a channels_last (N, C, H, W) to ``channels`` that also takes statistics."""
    s = _Sizes(shape, channels, dtype, 1)
    return _one_launch("apply", s.y + s.folded, s.out + (2 * channels + 1) * _FLOAT64)


def conv1x1_bn_act_apply_traffic(
    shape: Sequence[int],
    channels: int,
    dtype: torch.dtype,
    *,
    norm: bool = False,
    stride: int = 1,
    shape2: Sequence[int] | None = None,
    stride2: int = 1,
    residual: bool = False,
    residual_mask: bool = False,
    save_mask: bool = True,
) -> Traffic:
    """Bytes of the forward's GEMM.

    Args:
        shape: of y, (N, C, H, W). channels: of the output. shape2, stride2: of the second of a pair.
        norm: whether y is normalised as it is read.
        residual, residual_mask, save_mask: whether there are a residual, a mask over it, and one of the output.
    """
    s = _Sizes(shape, channels, dtype, stride)
    loads = s.y + norm * s.norm + s.folded + s.shift + residual * s.out + residual_mask * s.mask
    if shape2 is not None:
        second = _Sizes(shape2, channels, dtype, stride2)
        loads += second.y + second.folded
    return _one_launch("apply", loads, s.out + save_mask * s.mask)


def conv1x1_bn_act_backward_reduce_traffic(
    shape: Sequence[int],
    channels: int,
    dtype: torch.dtype,
    *,
    norm: bool = False,
    stride: int = 1,
    shape2: Sequence[int] | None = None,
    stride2: int = 1,
    relu: bool = True,
    need_g: bool = False,
    need_products: bool = True,
) -> Traffic:
    """Bytes of the backward's reduction; arguments as of the op and of :func:`conv1x1_bn_act_apply_traffic`."""
    s = _Sizes(shape, channels, dtype, stride)
    loads = s.out + relu * s.mask + need_products * (s.y + norm * s.norm)
    stores = need_g * s.out + s.sums + need_products * s.products
    if shape2 is not None and need_products:
        second = _Sizes(shape2, channels, dtype, stride2)
        loads, stores = loads + second.y, stores + second.products
    return _one_launch("reduce", loads, stores)


def conv1x1_bn_act_backward_apply_traffic(
    shape: Sequence[int],
    channels: int,
    dtype: torch.dtype,
    *,
    norm: bool = False,
    stride: int = 1,
    shape2: Sequence[int] | None = None,
    stride2: int = 1,
    relu: bool = True,
    need_dx: bool = True,
    need_dx2: bool = False,
) -> Traffic:
    """Bytes of the backward's GEMM; arguments as of the op and of :func:`conv1x1_bn_act_apply_traffic`.

    All of dx is written, also the pixels that the stride leaves out.
    """
    first = _Sizes(shape, channels, dtype, stride)
    wanted = [first] if need_dx else []
    if need_dx2:
        wanted.append(_Sizes(shape2, channels, dtype, stride2))
    loads = first.out + relu * first.mask + sum(s.y + s.folded + s.mixing + s.offset for s in wanted)
    normalises = norm and need_dx
    return _one_launch(
        "apply", loads + normalises * first.norm, sum(s.image for s in wanted) + normalises * first.norm_sums
    )


# ---- small matrices --------------------------------------------------------------------------------------------------


def _matrix(conv_weight: Tensor) -> Tensor:
    return conv_weight.flatten(1).double()  # (K, C)


def output_moments(conv_weight: Tensor, mean: Tensor, cov: Tensor, count: int) -> Tensor:
    """Mean and biased variance of the convolution's output, (2, K) in float64."""
    w = _matrix(conv_weight)
    return torch.stack([w @ mean, (((w @ cov) * w).sum(1) / count).clamp(min=0)])  # which keeps NaN


def conditioning(
    conv_weight: Tensor, mean: Tensor, cov: Tensor, count: int, moments: Tensor, eps: float
) -> Conditioning:
    """How exactly the fold of these moments would be computed; waits for the device."""
    variance = cov.diagonal() / count
    columns = torch.stack([variance + mean.square(), variance], 1)  # (C, 2)
    terms = _matrix(conv_weight.detach()).square() @ columns / (moments[1] + eps).unsqueeze(1)  # (K, 2)
    return Conditioning(*terms.amax(0).tolist())


def _scale(weight: Tensor | None, rstd: Tensor) -> Tensor:
    return rstd if weight is None else rstd * weight.double()


def _fold_weight(conv_weight: Tensor, weight: Tensor | None, rstd: Tensor, dtype: torch.dtype) -> Tensor:
    """w~; forward and backward must have the same bits."""
    return (_matrix(conv_weight) * _scale(weight, rstd).unsqueeze(1)).to(dtype)  # (K, C)


def _conv1x1_bn_fold_reference(
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    cov: Tensor,
    moments: Tensor | None,
    eps: float,
    count: int,
    shift0: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    own = output_moments(conv_weight, mean, cov, count)
    mu, var = own if moments is None else moments
    rstd = (var + eps).rsqrt()
    folded = _fold_weight(conv_weight, weight, rstd, dtype)
    shift = _scale(weight, rstd) * (own[0] - mu) - folded.double() @ mean
    if bias is not None:
        shift = shift + bias.double()
    if shift0 is not None:
        shift = shift + shift0.double()
    covariance = (cov / count).to(matrix_dtype(dtype))
    return folded, shift.to(wide_dtype(dtype)), torch.stack([mu, var, rstd]), covariance


def _conv1x1_bn_fold_fake(
    conv_weight: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, cov: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = args[-1]
    k, c = conv_weight.size(0), mean.size(0)
    return (
        mean.new_empty((k, c), dtype=dtype),
        mean.new_empty(k, dtype=wide_dtype(dtype)),
        mean.new_empty((3, k)),
        mean.new_empty((c, c), dtype=matrix_dtype(dtype)),
    )


def unfold(
    conv_weight: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    covariance: Tensor,
    stats: Tensor,
    sum_g: Tensor,
    products: Tensor,
    count: int,
    dtype: torch.dtype,
    need_dconv_weight: bool,
    need_dy: bool,
    own_count: int | None = None,
    reduced: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``conv1x1_bn_unfold`` gives; of a group of processes with ``own_count`` and ``reduced``, the sum over ranks.

    ``mean`` and the sums are then those of the own part, ``stats`` and ``count`` of the whole.
    """
    w, (mu, _, rstd) = _matrix(conv_weight), stats
    scale = _scale(weight, rstd)
    centred = torch.addr(products.double(), sum_g, mean, alpha=-1)  # (K, C)
    dweight = rstd * (w * centred).sum(1)
    total_g, total_dweight, off = sum_g, dweight, None
    if reduced is not None:
        off = w @ mean - mu
        dweight = dweight + rstd * off * sum_g
        total_g, total_dweight = reduced(torch.stack([sum_g, dweight]))
    slope = -(scale * rstd * total_dweight)  # n b
    weighted = w * slope.unsqueeze(1)
    dconv_weight = conv_weight.new_empty(0)
    folded, mixing, offset = (mean.new_empty(0, dtype=t) for t in (dtype, dtype, wide_dtype(dtype)))
    if need_dconv_weight:
        d = torch.addmm(scale.unsqueeze(1) * centred, weighted, covariance.double())
        if off is not None:
            share = own_count / count
            d = torch.addr(d, scale * (sum_g - share * total_g) + share * slope * off, mean)
        dconv_weight = torch.empty_like(conv_weight).copy_(d.view(conv_weight.shape))  # with its strides
    if need_dy:
        folded = _fold_weight(conv_weight, weight, rstd, dtype)
        mixing = (w.T @ weighted / count).to(dtype)  # (C, C)
        offset = -(folded.double().T @ total_g) / count - mixing.double().T @ mean
        if off is not None:
            offset = offset + w.T @ (slope * off) / count
    return dconv_weight, dweight, folded, mixing, offset.to(wide_dtype(dtype))


def _conv1x1_bn_unfold_fake(
    conv_weight: Tensor, weight: Tensor | None, mean: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, need_dconv_weight, need_dy = args[-3:]
    k, c = conv_weight.size(0), mean.size(0)
    return (
        torch.empty_like(conv_weight) if need_dconv_weight else conv_weight.new_empty(0),
        mean.new_empty(k),
        mean.new_empty((k, c) if need_dy else 0, dtype=dtype),
        mean.new_empty((c, c) if need_dy else 0, dtype=dtype),
        mean.new_empty(c if need_dy else 0, dtype=wide_dtype(dtype)),
    )


def _conv1x1_bn_update_running_reference(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    stats: Tensor,
    count: int,
) -> None:
    update_running(running_mean, running_var, num_batches_tracked, momentum, stats[0], stats[1], count)


def _triton_conv1x1_bn_fold() -> Any:
    from ..kernels.conv1x1_bn_fold import conv1x1_bn_fold

    return conv1x1_bn_fold


def _triton_conv1x1_bn_unfold() -> Any:
    from ..kernels.conv1x1_bn_fold import conv1x1_bn_unfold

    return conv1x1_bn_unfold


def _triton_conv1x1_bn_update_running() -> Any:
    from ..kernels.conv1x1_bn_fold import conv1x1_bn_update_running

    return conv1x1_bn_update_running


CONV1X1_BN_FOLD = define(
    "conv1x1_bn_fold",
    "(Tensor conv_weight, Tensor? weight, Tensor? bias, Tensor mean, Tensor cov, Tensor? moments, float eps, int count,"
    " Tensor? shift0, ScalarType dtype) -> (Tensor folded, Tensor shift, Tensor stats, Tensor covariance)",
    _conv1x1_bn_fold_reference,
    _conv1x1_bn_fold_fake,
    triton=_triton_conv1x1_bn_fold,
)

CONV1X1_BN_UNFOLD = define(
    "conv1x1_bn_unfold",
    "(Tensor conv_weight, Tensor? weight, Tensor mean, Tensor covariance, Tensor stats, Tensor sum_g, Tensor products,"
    " int count, ScalarType dtype, bool need_dconv_weight, bool need_dy)"
    " -> (Tensor dconv_weight, Tensor dweight, Tensor folded, Tensor mixing, Tensor offset)",
    unfold,
    _conv1x1_bn_unfold_fake,
    triton=_triton_conv1x1_bn_unfold,
)

CONV1X1_BN_UPDATE_RUNNING = define(
    "conv1x1_bn_update_running",
    "(Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum,"
    " Tensor stats, int count) -> ()",
    _conv1x1_bn_update_running_reference,
    lambda *args: None,
    triton=_triton_conv1x1_bn_update_running,
)


# ---- traffic of the small matrices -----------------------------------------------------------------------------------


class _MatrixSizes:
    """Bytes of what the small matrices of one convolution are made of; ``shape`` is (K, C)."""

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, weight_dtype: torch.dtype, param_dtype: torch.dtype | None
    ) -> None:
        k, c = shape
        self.conv_weight, self.folded, self.products = (
            k * c * d.itemsize for d in (weight_dtype, dtype, matrix_dtype(dtype))
        )
        self.param = 0 if param_dtype is None else k * param_dtype.itemsize
        self.of_inputs, self.of_outputs = c * _FLOAT64, k * _FLOAT64
        self.cov = c * c * _FLOAT64
        self.covariance = c * c * matrix_dtype(dtype).itemsize
        self.mixing = c * c * dtype.itemsize
        self.shift, self.offset = (n * wide_dtype(dtype).itemsize for n in (k, c))


def conv1x1_bn_fold_traffic(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    weight_dtype: torch.dtype = torch.float32,
    param_dtype: torch.dtype | None = torch.float32,
    moments: bool = False,
    shift0: bool = False,
) -> Traffic:
    """Bytes of folding a weight.

    Args:
        shape: of the weight, (K, C). dtype: of what is convolved. weight_dtype: of the weight.
        param_dtype: of weight and bias of the norm; None: it has neither.
        moments, shift0: whether they are given.
    """
    s = _MatrixSizes(shape, dtype, weight_dtype, param_dtype)
    loads = s.conv_weight + 2 * s.param + s.of_inputs + s.cov + moments * 2 * s.of_outputs + shift0 * s.shift
    return _one_launch("fold", loads, s.folded + s.shift + 3 * s.of_outputs + s.covariance)


def conv1x1_bn_unfold_traffic(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    weight_dtype: torch.dtype = torch.float32,
    param_dtype: torch.dtype | None = torch.float32,
    need_dconv_weight: bool = True,
    need_dy: bool = True,
) -> Traffic:
    """Bytes of the gradients of a folded weight; arguments as of the op and of :func:`conv1x1_bn_fold_traffic`."""
    s = _MatrixSizes(shape, dtype, weight_dtype, param_dtype)
    vectors = s.param + s.of_inputs + 2 * s.of_outputs  # weight, mean, rstd and sum_g
    slopes = Launch("slopes", s.conv_weight + s.products + vectors, 2 * s.of_outputs + need_dy * s.folded)
    loads, stores = need_dconv_weight * s.covariance, need_dconv_weight * s.conv_weight
    stores += need_dy * (s.mixing + s.offset)
    floor = slopes.total - s.of_outputs + loads + stores  # without the slopes
    if not stores:
        return Traffic(floor, (slopes,))
    loads += s.conv_weight + need_dconv_weight * s.products + vectors + s.of_outputs
    return Traffic(floor, (slopes, Launch("unfold", loads, stores)))


def conv1x1_bn_update_running_traffic(
    channels: int, *, param_dtype: torch.dtype | None = torch.float32, counter: bool = True
) -> Traffic:
    """Bytes of moving the running statistics of ``channels``; param_dtype: of those, None without."""
    moved = counter * COUNTER
    if param_dtype is None:
        return _one_launch("update_running", moved, moved)
    moved += 2 * channels * param_dtype.itemsize
    return _one_launch("update_running", 2 * channels * _FLOAT64 + moved, moved)


# ---- autograd --------------------------------------------------------------------------------------------------------


class FoldingOps(NamedTuple):
    """Who serves the passes over pixels, the two over small matrices, and the running statistics.

    ``statistics`` is of the convolution before them, with which a Bottleneck begins.

    ``group`` are the processes whose batch it is, or None.
    """

    moments: Callable[..., Any]
    apply: Callable[..., Any]
    reduce: Callable[..., Any]
    backward_apply: Callable[..., Any]
    statistics: Callable[..., Any]
    fold: Callable[..., Any]
    unfold: Callable[..., Any]
    update_running: Callable[..., Any]
    group: Any = None

    def across(self, group: Any, own_count: int) -> FoldingOps:
        """For one part, of ``own_count`` pixels, of the batch of a group: it meets the others in ``unfold``."""

        def reduced(sums: Tensor) -> Tensor:
            dist.all_reduce(sums, group=group)
            return sums

        return self._replace(
            fold=_conv1x1_bn_fold_reference,
            unfold=functools.partial(unfold, own_count=own_count, reduced=reduced),
            update_running=_conv1x1_bn_update_running_reference,
            group=group,
        )


def folding_ops(y: Tensor) -> FoldingOps | None:
    """Who serves tensors like ``y``; None where that is nobody. The small matrices are ATen's where no kernel is."""
    passes = (
        CONV1X1_MOMENTS,
        CONV1X1_BN_ACT_APPLY,
        CONV1X1_BN_ACT_BACKWARD_REDUCE,
        CONV1X1_BN_ACT_BACKWARD_APPLY,
        CONV1X1_STATISTICS,
    )
    try:
        served = tuple(serve(op, y) for op in passes)
    except RuntimeError:  # a forced backend without these kernels serves what follows the convolution
        return None
    if None in served:
        return None
    of_matrices = (CONV1X1_BN_FOLD, CONV1X1_BN_UNFOLD, CONV1X1_BN_UPDATE_RUNNING)
    small = (op.reference if y.is_cpu else serve(op, y) or op.reference for op in of_matrices)
    return FoldingOps(*served, *small)


class _Branch(NamedTuple):
    """One convolution with its normalisation as saved for the backward, and which of its gradients are wanted.

    ``covariance`` is ``cov / count``; ``needs`` is for y, conv_weight, weight.
    """

    y: Tensor
    conv_weight: Tensor
    weight: Tensor | None
    mean: Tensor
    covariance: Tensor
    stats: Tensor  # (3, K): mean, variance, rstd
    count: int
    stride: int
    eps: float
    needs: tuple[bool, bool, bool]

    def unfold(self, op: Callable[..., Any], sum_g: Tensor, products: Tensor) -> tuple[Tensor, ...]:
        """dconv_weight, dweight, and what the pass that writes ``dy`` takes."""
        small = (self.mean, self.covariance, self.stats, sum_g, products)
        need_dy, need_dconv_weight, _ = self.needs
        return op(self.conv_weight, self.weight, *small, self.count, self.y.dtype, need_dconv_weight, need_dy)


def _gradients(
    dy: Tensor, mask: Tensor | None, branches: Sequence[_Branch], need_g: bool, ops: FoldingOps
) -> tuple[Tensor, Tensor, list[tuple[Tensor | None, ...]]]:
    """g, its sums, and of each branch dy, dconv_weight, dweight; None for what is not wanted."""
    wanted = [b for b in branches if any(b.needs)]
    first, second = (*wanted, *branches)[0], wanted[1] if len(wanted) == 2 else None
    second_y = (None, 1) if second is None else (second.y, second.stride)
    g, sum_g, *products = ops.reduce(dy, mask, first.y, None, first.stride, *second_y, need_g, bool(wanted))
    unfolded = [b.unfold(ops.unfold, sum_g, p) for b, p in zip(wanted, products, strict=False)]

    passes = [(b.y, *matrices, b.stride) for b, (_, _, *matrices) in zip(wanted, unfolded, strict=True) if b.needs[0]]
    dys: list[Tensor] = []
    if passes:
        other = passes[1] if len(passes) == 2 else (None, None, None, None, 1)
        # g, once written, is as small as dy and needs no mask
        source = (g, None) if need_g else (dy, mask)
        first_y, *of_first = passes[0]
        *dys, _ = ops.backward_apply(*source, first_y, None, *of_first, *other, True, len(passes) == 2)
    of_wanted = iter(unfolded)
    results: list[tuple[Tensor | None, ...]] = []
    for b in branches:
        if not any(b.needs):
            results.append((None, None, None))
            continue
        (dconv_weight, dweight, *_), (need_dy, need_dconv_weight, need_dweight) = next(of_wanted), b.needs
        results.append(
            (
                dys.pop(0) if need_dy else None,
                dconv_weight if need_dconv_weight else None,
                dweight.to(b.weight.dtype) if need_dweight else None,
            )
        )
    return g, sum_g, results


def _kept(mask: Tensor, dy: Tensor) -> Tensor:
    """The elements of ``dy``, in any layout, that pass the ReLU."""
    return unpack_mask(mask, dy.detach().contiguous(memory_format=torch.channels_last))


def _differentiable_convolution(dx: Tensor, y: Tensor, w: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """dy and dw."""
    return torch.ops.aten.convolution_backward(
        dx, y, w, None, [stride, stride], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
    )[:2]


def _differentiable_gradients(g: Tensor, branch: _Branch, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """dy, dconv_weight, dweight from ATen ops that autograd can differentiate again; used under ``create_graph``."""
    y, conv_weight, weight, *_, stride, eps, _ = branch
    w = conv_weight.to(y.dtype)
    x = F.conv2d(y, w, None, stride)
    if group is not None:
        dx, _, dweight, _ = differentiable_backward(g, x, weight, None, branch.stats, None, False, eps, group)
        return *_differentiable_convolution(dx, y, w, stride), dweight
    mu, _, rstd = branch.stats.to(y.dtype if weight is not None and weight.dtype == y.dtype else wide_dtype(y.dtype))
    if weight is None:  # ATen's own double backward needs one
        weight = torch.ones_like(mu)
    dx, dweight, _ = torch.ops.aten.native_batch_norm_backward(
        g, x, weight, None, None, mu, rstd, True, eps, [True, True, True]
    )
    return *_differentiable_convolution(dx, y, w, stride), dweight


class Input(NamedTuple):
    """One convolution with its normalisation, forward.

    ``mean``, ``cov`` and ``count`` are the moments of what the convolution reads; ``moments``, if known, what
    ``output_moments`` gives; ``running`` are the arguments of ``update_running`` up to ``momentum``.
    """

    y: Tensor
    conv_weight: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    cov: Tensor
    count: int
    moments: Tensor | None
    running: tuple[Any, ...]
    eps: float
    stride: int

    def fold(self, op: Callable[..., Any], shift0: Tensor | None = None) -> tuple[Tensor, ...]:
        """w~, t, mean, variance and rstd of the output, and ``cov / count``."""
        affine, of_y = (self.conv_weight, self.weight, self.bias), (self.mean, self.cov, self.moments)
        return op(*affine, *of_y, self.eps, self.count, shift0, self.y.dtype)


def folded_forward(
    inputs: Sequence[Input], residual: Tensor | None, relu: bool, save_mask: bool, ops: FoldingOps
) -> tuple[Tensor, Tensor, list[tuple[Tensor | None, ...]]]:
    """out, its mask, and of each convolution what a :class:`_Branch` takes; moves the running statistics."""
    y, shift = inputs[0].y, None
    folded, saved = [], []
    for i in inputs:
        of_input, shift, stats, covariance = i.fold(ops.fold, shift)
        folded.append(of_input)
        saved.append((i.y, i.conv_weight, i.weight, i.mean, covariance, stats))
    second = (inputs[1].y, folded[1], inputs[1].stride) if len(inputs) == 2 else (None, None, 1)
    of_first = (folded[0], shift, inputs[0].stride)
    out, mask = ops.apply(y, None, *of_first, *second, residual, None, relu, save_mask)
    for i, (*_, stats) in zip(inputs, saved, strict=True):
        ops.update_running(*i.running, stats, i.count)
    return out, mask, saved


class Conv1x1BNActFunction(Function):
    """``act(bn(conv(y)) + residual)`` of channels_last tensors, in training.

    ``config`` is what is not differentiable: what an :class:`Input` has after ``bias``, then ``relu`` and ``ops``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        conv_weight: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        config: tuple[Any, ...],
    ) -> Tensor:
        *of_branch, relu, ops = config
        branch = Input(y, conv_weight, weight, bias, *of_branch)
        out, mask, (saved,) = folded_forward((branch,), residual, relu, relu, ops)
        ctx.save_for_backward(*saved, mask if relu else None)
        ctx.config = (branch.count, branch.stride, branch.eps, None if bias is None else bias.dtype, ops)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, *parameters, mask = ctx.saved_tensors
        count, stride, eps, bias_dtype, ops = ctx.config
        *needs, need_dbias, need_dresidual = ctx.needs_input_grad[:5]
        y = y.contiguous(memory_format=torch.channels_last)
        branch = _Branch(y, *parameters, count, stride, eps, tuple(needs))
        relu = mask is not None
        g = dy
        dbias, gradients = None, (None, None, None)
        if torch.is_grad_enabled():
            if relu:
                g = dy * _kept(mask, dy)
            if need_dbias:
                dbias = g.sum((0, 2, 3), dtype=wide_dtype(g.dtype))
            if any(needs):
                gradients = _differentiable_gradients(g, branch, ops.group)
        else:
            dy = dy.contiguous(memory_format=torch.channels_last)
            masked, dbias, (gradients,) = _gradients(dy, mask, (branch,), need_dresidual and relu, ops)
            g = masked if relu else g
        return (
            *(t if need else None for t, need in zip(gradients, needs, strict=True)),
            dbias.to(bias_dtype) if need_dbias else None,
            g if need_dresidual else None,
            None,
        )


class Conv1x1BNAddConv1x1BNActFunction(Function):
    """``act(bn(conv(y)) + bn2(conv2(y2)))`` of channels_last tensors, in training.

    ``config`` is what either :class:`Input` has after ``bias``, one after the other, then ``relu`` and ``ops``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        conv_weight: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y2: Tensor,
        conv_weight2: Tensor,
        weight2: Tensor | None,
        bias2: Tensor | None,
        config: tuple[Any, ...],
    ) -> Tensor:
        *of_branches, relu, ops = config
        half = len(of_branches) // 2
        first = Input(y, conv_weight, weight, bias, *of_branches[:half])
        second = Input(y2, conv_weight2, weight2, bias2, *of_branches[half:])
        out, mask, (saved, saved2) = folded_forward((first, second), None, relu, relu, ops)
        ctx.save_for_backward(*saved, *saved2, mask if relu else None)
        ctx.config = tuple((b.count, b.stride, b.eps) for b in (first, second))
        ctx.dtypes = tuple(None if b is None else b.dtype for b in (bias, bias2))
        ctx.ops = ops
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *saved, mask = ctx.saved_tensors
        needs = ctx.needs_input_grad[:8]
        branches = tuple(
            _Branch(y.contiguous(memory_format=torch.channels_last), *rest, *config, wanted)
            for (y, *rest), config, wanted in zip(
                (saved[:6], saved[6:]), ctx.config, (needs[:3], needs[4:7]), strict=True
            )
        )
        if torch.is_grad_enabled():
            g = dy
            if mask is not None:
                g = dy * _kept(mask, dy)
            sum_g = g.sum((0, 2, 3), dtype=wide_dtype(g.dtype))
            gradients = [
                _differentiable_gradients(g, b, ctx.ops.group) if any(b.needs) else (None, None, None) for b in branches
            ]
        else:
            dy = dy.contiguous(memory_format=torch.channels_last)
            _, sum_g, gradients = _gradients(dy, mask, branches, False, ctx.ops)
        results = []
        for of_branch, dtype in zip(gradients, ctx.dtypes, strict=True):
            results += [*of_branch, None if dtype is None else sum_g.to(dtype)]
        return *(t if need else None for t, need in zip(results, needs, strict=True)), None
