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

What is saved: y, the parameters, ``mean``, ``cov``, ``mu`` and ``rstd``, and one bit per element of ``out`` for the
ReLU. ``w~`` is computed anew. The vectors and the small matrices are float64, whatever serves the four passes over
pixels; where that is not exact enough, ``fusedres/ops/folding.py`` refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .batch_norm_act import update_running
from .folding import Conditioning
from .layout import mask_bytes, pack_mask, unpack_mask
from .registry import define
from .traffic import Launch, Sizes, Traffic

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


def _output_like(y: Tensor, channels: int, stride: int) -> Tensor:
    """Uninitialised (N, K, H', W'), channels_last."""
    shape = (y.size(0), channels, strided_size(y.size(2), stride), strided_size(y.size(3), stride))
    return torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)


# ---- reference -------------------------------------------------------------------------------------------------------


def _rows(y: Tensor, stride: int = 1) -> Tensor:
    """The pixels that the stride takes, in float64."""
    return y[:, :, ::stride, ::stride].double().permute(0, 2, 3, 1).reshape(-1, y.size(1))  # (n, C)


def _as_image(rows: Tensor, like: Tensor) -> Tensor:
    n, _, h, w = like.shape
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)


def _conv1x1_moments_reference(y: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    rows = _rows(y, stride)
    mean = rows.mean(0)
    rest = (rows - mean).mean(0)
    mean = mean + torch.where(rest.isfinite(), rest, 0.0)  # exact for a constant channel
    centred = rows - mean
    return mean, centred.T @ centred


def _conv1x1_bn_act_apply_reference(
    y: Tensor,
    folded: Tensor,
    shift: Tensor,
    stride: int,
    y2: Tensor | None,
    folded2: Tensor | None,
    stride2: int,
    residual: Tensor | None,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    out = _output_like(y, folded.size(0), stride)
    z = _rows(y, stride) @ folded.double().T + shift.double()
    if y2 is not None:
        z = z + _rows(y2, stride2) @ folded2.double().T
    if residual is not None:
        z = z + _rows(residual)
    out.copy_(_as_image(z.relu() if relu else z, out))
    return out, pack_mask(~(out <= 0)) if save_mask else y.new_empty(0, dtype=torch.uint8)


def _masked(dy: Tensor, mask: Tensor | None) -> Tensor:
    return dy if mask is None else torch.where(unpack_mask(mask, dy), dy, 0.0)


def _conv1x1_bn_act_backward_reduce_reference(
    dy: Tensor,
    mask: Tensor | None,
    y: Tensor,
    stride: int,
    y2: Tensor | None,
    stride2: int,
    need_g: bool,
    need_products: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    masked = _masked(dy, mask)
    g = _rows(masked)
    return (
        torch.empty_like(dy).copy_(masked) if need_g else dy.new_empty(0),
        g.sum(0),
        g.T @ _rows(y, stride) if need_products else g.new_empty(0),
        g.T @ _rows(y2, stride2) if need_products and y2 is not None else g.new_empty(0),
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
) -> tuple[Tensor, Tensor]:
    g = _rows(_masked(dy, mask))
    return (
        _reference_dx(g, y, folded, mixing, offset, stride) if need_dx else y.new_empty(0),
        _reference_dx(g, y2, folded2, mixing2, offset2, stride2) if need_dx2 else y.new_empty(0),
    )


# ---- fake kernels ----------------------------------------------------------------------------------------------------


def _conv1x1_moments_fake(y: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    channels = y.size(1)
    return y.new_empty(channels, dtype=torch.float64), y.new_empty((channels, channels), dtype=torch.float64)


def _conv1x1_bn_act_apply_fake(
    y: Tensor, folded: Tensor, shift: Tensor, stride: int, *args: Any
) -> tuple[Tensor, Tensor]:
    save_mask = args[-1]
    out = _output_like(y, folded.size(0), stride)
    return out, y.new_empty(mask_bytes(out) if save_mask else 0, dtype=torch.uint8)


def _conv1x1_bn_act_backward_reduce_fake(
    dy: Tensor,
    mask: Tensor | None,
    y: Tensor,
    stride: int,
    y2: Tensor | None,
    stride2: int,
    need_g: bool,
    need_products: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def products(of: Tensor | None) -> Tensor:
        wanted = need_products and of is not None
        return dy.new_empty((dy.size(1), of.size(1)) if wanted else 0, dtype=torch.float64)

    g = torch.empty_like(dy) if need_g else dy.new_empty(0)
    return g, dy.new_empty(dy.size(1), dtype=torch.float64), products(y), products(y2)


def _conv1x1_bn_act_backward_apply_fake(
    dy: Tensor, mask: Tensor | None, y: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    y2, need_dx, need_dx2 = args[4], *args[-2:]
    return tuple(torch.empty_like(v) if wanted else y.new_empty(0) for v, wanted in ((y, need_dx), (y2, need_dx2)))


# ---- ops -------------------------------------------------------------------------------------------------------------


def _triton_conv1x1_moments() -> Any:
    from ..kernels.conv1x1_bn_act import conv1x1_moments

    return conv1x1_moments


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
    "(Tensor y, int stride) -> (Tensor mean, Tensor cov)",
    _conv1x1_moments_reference,
    _conv1x1_moments_fake,
    triton=_triton_conv1x1_moments,
)

CONV1X1_BN_ACT_APPLY = define(
    "conv1x1_bn_act_apply",
    "(Tensor y, Tensor folded, Tensor shift, int stride, Tensor? y2, Tensor? folded2, int stride2, Tensor? residual,"
    " bool relu, bool save_mask) -> (Tensor out, Tensor mask)",
    _conv1x1_bn_act_apply_reference,
    _conv1x1_bn_act_apply_fake,
    triton=_triton_conv1x1_bn_act_apply,
)

CONV1X1_BN_ACT_BACKWARD_REDUCE = define(
    "conv1x1_bn_act_backward_reduce",
    "(Tensor dy, Tensor? mask, Tensor y, int stride, Tensor? y2, int stride2, bool need_g, bool need_products)"
    " -> (Tensor g, Tensor sum_g, Tensor products, Tensor products2)",
    _conv1x1_bn_act_backward_reduce_reference,
    _conv1x1_bn_act_backward_reduce_fake,
    triton=_triton_conv1x1_bn_act_backward_reduce,
)

CONV1X1_BN_ACT_BACKWARD_APPLY = define(
    "conv1x1_bn_act_backward_apply",
    "(Tensor dy, Tensor? mask, Tensor y, Tensor folded, Tensor mixing, Tensor offset, int stride,"
    " Tensor? y2, Tensor? folded2, Tensor? mixing2, Tensor? offset2, int stride2, bool need_dx, bool need_dx2)"
    " -> (Tensor dx, Tensor dx2)",
    _conv1x1_bn_act_backward_apply_reference,
    _conv1x1_bn_act_backward_apply_fake,
    triton=_triton_conv1x1_bn_act_backward_apply,
)

OPS = (
    CONV1X1_MOMENTS,
    CONV1X1_BN_ACT_APPLY,
    CONV1X1_BN_ACT_BACKWARD_REDUCE,
    CONV1X1_BN_ACT_BACKWARD_APPLY,
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
        self.products, self.sums = channels * c * _FLOAT64, channels * _FLOAT64


def _one_launch(name: str, loads: int, stores: int) -> Traffic:
    return Traffic(loads + stores, (Launch(name, loads, stores),))


def conv1x1_moments_traffic(shape: Sequence[int], dtype: torch.dtype, *, stride: int = 1) -> Traffic:
    """Bytes of the moments of a channels_last (N, C, H, W): one pass over the pixels that the stride takes.

    Raises:
        ValueError: a shape that is not four sizes, a stride that is not positive; so do the other three.
    """
    s, c = _Sizes(shape, 1, dtype, stride), shape[1]
    return _one_launch("moments", s.y, (c + c * c) * _FLOAT64)


def conv1x1_bn_act_apply_traffic(
    shape: Sequence[int],
    channels: int,
    dtype: torch.dtype,
    *,
    stride: int = 1,
    shape2: Sequence[int] | None = None,
    stride2: int = 1,
    residual: bool = False,
    save_mask: bool = True,
) -> Traffic:
    """Bytes of the forward's GEMM.

    Args:
        shape: of y, (N, C, H, W). channels: of the output. shape2, stride2: of the second of a pair.
        residual, save_mask: whether there are a residual and a mask.
    """
    s = _Sizes(shape, channels, dtype, stride)
    loads = s.y + s.folded + s.shift + residual * s.out
    if shape2 is not None:
        second = _Sizes(shape2, channels, dtype, stride2)
        loads += second.y + second.folded
    return _one_launch("apply", loads, s.out + save_mask * s.mask)


def conv1x1_bn_act_backward_reduce_traffic(
    shape: Sequence[int],
    channels: int,
    dtype: torch.dtype,
    *,
    stride: int = 1,
    shape2: Sequence[int] | None = None,
    stride2: int = 1,
    relu: bool = True,
    need_g: bool = False,
    need_products: bool = True,
) -> Traffic:
    """Bytes of the backward's reduction; arguments as of the op and of :func:`conv1x1_bn_act_apply_traffic`."""
    s = _Sizes(shape, channels, dtype, stride)
    loads, stores = s.out + relu * s.mask + need_products * s.y, need_g * s.out + s.sums + need_products * s.products
    if shape2 is not None and need_products:
        second = _Sizes(shape2, channels, dtype, stride2)
        loads, stores = loads + second.y, stores + second.products
    return _one_launch("reduce", loads, stores)


def conv1x1_bn_act_backward_apply_traffic(
    shape: Sequence[int],
    channels: int,
    dtype: torch.dtype,
    *,
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
    return _one_launch("apply", loads, sum(s.image for s in wanted))


# ---- small matrices --------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Of what goes into a convolution, and of what would come out; float64.

    ``mean`` (C,) and ``cov`` (C, C), a sum over ``count`` pixels; ``mu`` and ``var``, (K,), the latter biased.
    """

    mean: Tensor
    cov: Tensor
    count: int
    mu: Tensor
    var: Tensor


def _matrix(conv_weight: Tensor) -> Tensor:
    return conv_weight.flatten(1).double()  # (K, C)


def output_moments(conv_weight: Tensor, mean: Tensor, cov: Tensor, count: int) -> Moments:
    """The moments with the statistics of the convolution's output."""
    w = _matrix(conv_weight)
    var = ((w @ cov) * w).sum(1) / count
    return Moments(mean, cov, count, w @ mean, var.clamp(min=0))  # which keeps NaN


def conditioning(conv_weight: Tensor, moments: Moments, eps: float) -> Conditioning:
    """How exactly the fold of these moments would be computed; waits for the device."""
    variance = moments.cov.diagonal() / moments.count
    columns = torch.stack([variance + moments.mean.square(), variance], 1)  # (C, 2)
    terms = _matrix(conv_weight.detach()).square() @ columns / (moments.var + eps).unsqueeze(1)  # (K, 2)
    return Conditioning(*terms.amax(0).tolist())


def _scale(weight: Tensor | None, rstd: Tensor) -> Tensor:
    return rstd if weight is None else rstd * weight.double()


def _fold_weight(conv_weight: Tensor, weight: Tensor | None, rstd: Tensor, dtype: torch.dtype) -> Tensor:
    """w~; forward and backward must have the same bits."""
    return (_matrix(conv_weight) * _scale(weight, rstd).unsqueeze(1)).to(dtype)  # (K, C)


def fold(
    conv_weight: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Moments, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """w~ in ``dtype``; t, and the statistics (2, K) that the backward needs, mu and rstd, in float64."""
    rstd = (moments.var + eps).rsqrt()
    folded = _fold_weight(conv_weight, weight, rstd, dtype)
    shift = -(folded.double() @ moments.mean)
    if bias is not None:
        shift = shift + bias.double()
    return folded, shift, torch.stack([moments.mu, rstd])


class _Branch(NamedTuple):
    """One convolution with its normalisation as saved for the backward, and which of its gradients are wanted.

    ``covariance`` is ``cov / count``; ``needs`` is for y, conv_weight, weight.
    """

    y: Tensor
    conv_weight: Tensor
    weight: Tensor | None
    mean: Tensor
    covariance: Tensor
    stats: Tensor
    count: int
    stride: int
    eps: float
    needs: tuple[bool, bool, bool]


class _Unfolded(NamedTuple):
    """Gradients of one convolution with its normalisation, and what the pass that writes ``dy`` takes."""

    dconv_weight: Tensor | None
    dweight: Tensor
    folded: Tensor | None
    mixing: Tensor | None
    offset: Tensor | None


def unfold(branch: _Branch, sum_g: Tensor, products: Tensor) -> _Unfolded:
    """From ``s1`` and ``P``; all in float64, but for what is rounded to the dtype of y."""
    y, conv_weight, weight, mean, covariance, (_, rstd), count, *_ = branch
    need_dy, need_dconv_weight, _ = branch.needs
    w, scale = _matrix(conv_weight), _scale(weight, rstd)
    centred = torch.addr(products, sum_g, mean, alpha=-1)  # (K, C)
    dweight = rstd * (w * centred).sum(1)
    weighted = w * (scale * rstd * dweight).neg().unsqueeze(1)  # n b w
    dconv_weight = folded = mixing = offset = None
    if need_dconv_weight:
        dconv_weight = torch.addmm(scale.unsqueeze(1) * centred, weighted, covariance.double())
        dconv_weight = torch.empty_like(conv_weight).copy_(dconv_weight.view(conv_weight.shape))  # with its strides
    if need_dy:
        folded = _fold_weight(conv_weight, weight, rstd, y.dtype)
        mixing = (w.T @ weighted / count).to(y.dtype)  # (C, C)
        offset = -(folded.double().T @ sum_g) / count - mixing.double().T @ mean
        offset = offset.to(wide_dtype(y.dtype))
    return _Unfolded(dconv_weight, dweight, folded, mixing, offset)


# ---- autograd --------------------------------------------------------------------------------------------------------


def _gradients(
    dy: Tensor, mask: Tensor | None, branches: Sequence[_Branch], need_g: bool, ops: tuple[Callable[..., Any], ...]
) -> tuple[Tensor, Tensor, list[tuple[Tensor | None, ...]]]:
    """g, its sums, and of each branch dy, dconv_weight, dweight; None for what is not wanted."""
    reduce, apply = ops
    wanted = [b for b in branches if any(b.needs)]
    first, second = (*wanted, *branches)[0], wanted[1] if len(wanted) == 2 else None
    second_y = (None, 1) if second is None else (second.y, second.stride)
    g, sum_g, *products = reduce(dy, mask, first.y, first.stride, *second_y, need_g, bool(wanted))
    unfolded = [unfold(b, sum_g, p) for b, p in zip(wanted, products, strict=False)]

    passes = [
        (b.y, u.folded, u.mixing, u.offset, b.stride) for b, u in zip(wanted, unfolded, strict=True) if b.needs[0]
    ]
    dys: list[Tensor] = []
    if passes:
        other = passes[1] if len(passes) == 2 else (None, None, None, None, 1)
        # g, once written, is as small as dy and needs no mask
        source = (g, None) if need_g else (dy, mask)
        dys = list(apply(*source, *passes[0], *other, True, len(passes) == 2))
    of_wanted = iter(unfolded)
    results: list[tuple[Tensor | None, ...]] = []
    for b in branches:
        if not any(b.needs):
            results.append((None, None, None))
            continue
        u, (need_dy, _, need_dweight) = next(of_wanted), b.needs
        dweight = u.dweight.to(b.weight.dtype) if need_dweight else None
        results.append((dys.pop(0) if need_dy else None, u.dconv_weight, dweight))
    return g, sum_g, results


def _kept(mask: Tensor, dy: Tensor) -> Tensor:
    """The elements of ``dy``, in any layout, that pass the ReLU."""
    return unpack_mask(mask, dy.detach().contiguous(memory_format=torch.channels_last))


def _differentiable_gradients(g: Tensor, branch: _Branch) -> tuple[Tensor, Tensor, Tensor]:
    """dy, dconv_weight, dweight from ATen ops that autograd can differentiate again; used under ``create_graph``."""
    y, conv_weight, weight, *_, stride, eps, _ = branch
    w = conv_weight.to(y.dtype)
    x = F.conv2d(y, w, None, stride)
    mu, rstd = branch.stats.to(y.dtype if weight is not None and weight.dtype == y.dtype else wide_dtype(y.dtype))
    if weight is None:  # ATen's own double backward needs one
        weight = torch.ones_like(mu)
    dx, dweight, _ = torch.ops.aten.native_batch_norm_backward(
        g, x, weight, None, None, mu, rstd, True, eps, [True, True, True]
    )
    dy, dw, _ = torch.ops.aten.convolution_backward(
        dx, y, w, None, [stride, stride], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    return dy, dw.to(conv_weight.dtype), dweight


class Input(NamedTuple):
    """One convolution with its normalisation, forward.

    ``running`` are the arguments of ``update_running`` up to ``momentum``.
    """

    y: Tensor
    conv_weight: Tensor
    weight: Tensor | None
    bias: Tensor | None
    moments: Moments
    running: tuple[Any, ...]
    eps: float
    stride: int

    def update_running(self) -> None:
        update_running(*self.running, self.moments.mu, self.moments.var, self.moments.count)

    def saved(self, stats: Tensor) -> tuple[Tensor | None, ...]:
        """The tensors of a :class:`_Branch`; with 16 bits, float32 holds the covariance."""
        mean, cov, count, *_ = self.moments
        dtype = torch.float64 if self.y.element_size() > 2 else torch.float32
        return self.y, self.conv_weight, self.weight, mean, (cov / count).to(dtype), stats


def folded_forward(
    inputs: Sequence[Input], residual: Tensor | None, relu: bool, save_mask: bool, apply: Callable[..., Any]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out, its mask, and of each convolution the statistics; the running ones stay as they are."""
    folded, shifts, stats = zip(
        *(fold(i.conv_weight, i.weight, i.bias, i.moments, i.eps, i.y.dtype) for i in inputs), strict=True
    )
    y = inputs[0].y
    second = (inputs[1].y, folded[1], inputs[1].stride) if len(inputs) == 2 else (None, None, 1)
    shift = torch.stack(shifts).sum(0).to(wide_dtype(y.dtype))
    out, mask = apply(y, folded[0], shift, inputs[0].stride, *second, residual, relu, save_mask)
    return out, mask, list(stats)


class Conv1x1BNActFunction(Function):
    """``act(bn(conv(y)) + residual)`` of channels_last tensors, in training.

    ``config`` is what is not differentiable: ``(moments, running, eps, stride, relu, ops)``, the first four as in
    :class:`Input`, ``ops`` who serves the three passes after the moments.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        conv_weight: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        config: tuple[Moments, tuple[Any, ...], float, int, bool, tuple[Callable[..., Any], ...]],
    ) -> Tensor:
        *of_branch, relu, (apply, *backward_ops) = config
        branch = Input(y, conv_weight, weight, bias, *of_branch)
        out, mask, (stats,) = folded_forward((branch,), residual, relu, relu, apply)
        saved = branch.saved(stats)
        branch.update_running()
        ctx.save_for_backward(*saved, mask if relu else None)
        ctx.config = (
            branch.moments.count,
            branch.stride,
            branch.eps,
            None if bias is None else bias.dtype,
            backward_ops,
        )
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
                gradients = _differentiable_gradients(g, branch)
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

    ``config`` is ``(moments, running, eps, stride, moments2, running2, eps2, stride2, relu, ops)``, as in
    :class:`Conv1x1BNActFunction`.
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
        *of_branches, relu, (apply, *backward_ops) = config
        first = Input(y, conv_weight, weight, bias, *of_branches[:4])
        second = Input(y2, conv_weight2, weight2, bias2, *of_branches[4:])
        out, mask, (stats, stats2) = folded_forward((first, second), None, relu, relu, apply)
        saved = (*first.saved(stats), *second.saved(stats2), mask if relu else None)
        for branch in (first, second):
            branch.update_running()
        ctx.save_for_backward(*saved)
        ctx.config = tuple((b.moments.count, b.stride, b.eps) for b in (first, second))
        ctx.dtypes = tuple(None if b is None else b.dtype for b in (bias, bias2))
        ctx.ops = backward_ops
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
            gradients = [_differentiable_gradients(g, b) if any(b.needs) else (None, None, None) for b in branches]
        else:
            dy = dy.contiguous(memory_format=torch.channels_last)
            _, sum_g, gradients = _gradients(dy, mask, branches, False, ctx.ops)
        results = []
        for of_branch, dtype in zip(gradients, ctx.dtypes, strict=True):
            results += [*of_branch, None if dtype is None else sum_g.to(dtype)]
        return *(t if need else None for t, need in zip(results, needs, strict=True)), None
