"""Batch normalisation as a module, and the fusion of the plain norm, activation and pooling modules of a block."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules import module as _module

from .. import functional as fused
from ..ops.batch_norm_act_conv import CONV1X1, Convolution
from ..ops.checks import check_act
from ..ops.folded_bottleneck import Part, folded_bottleneck
from ..ops.folded_call import Conv1x1, folding_ops_for, may_gain
from ..ops.folding import FoldingDecision, folding_asked
from ..ops.tracing import is_traced, wants_gradients


def _tensors(norm: nn.BatchNorm2d, traced: bool) -> tuple[Tensor | None, ...]:
    """running_mean, running_var, weight, bias, num_batches_tracked.

    From the module's own tables: ``nn.Module.__getattr__`` takes five times as long. By attribute where a symbolic
    trace records the access, or where a parametrization or a replica keeps them elsewhere.
    """
    if not traced:
        state = norm.__dict__
        buffers, parameters = state["_buffers"], state["_parameters"]
        try:
            return (
                buffers["running_mean"],
                buffers["running_var"],
                parameters["weight"],
                parameters["bias"],
                buffers["num_batches_tracked"],
            )
        except KeyError:
            pass
    counter = norm.num_batches_tracked if norm.training and norm.track_running_stats else None
    return norm.running_mean, norm.running_var, norm.weight, norm.bias, counter


def _statistics(norm: nn.BatchNorm2d, traced: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of ``functional.batch_norm_act`` for one call of ``norm``: as its own forward would have them."""
    running_mean, running_var, weight, bias, counter = _tensors(norm, traced)
    training, momentum = norm.training, norm.momentum
    by_batch = training or running_mean is None
    if training and not norm.track_running_stats:
        running_mean = running_var = None
    if not training or not norm.track_running_stats:
        counter = None
    return (running_mean, running_var, weight, bias), {
        "training": by_batch,
        # Without a counter there is nothing to average over: nn.BatchNorm2d then moves its statistics by 0.
        "momentum": momentum if momentum is not None or counter is not None else 0.0,
        "eps": norm.eps,
        "num_batches_tracked": counter,
    }


def _check_four_dimensional(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, but got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (got {x.dim()}D input): x has shape {tuple(x.shape)}")


class BatchNormAct2d(nn.BatchNorm2d):
    """``act(batch_norm(x) + residual)`` in one pass over memory; otherwise an :class:`torch.nn.BatchNorm2d`.

    Args:
        num_features .. dtype: as :class:`torch.nn.BatchNorm2d`, with the same parameters, buffers and state_dict keys.
        bias: False leaves out the learnable bias.
        act: ``"relu"`` or None.

    Shape: x (N, C, H, W) in float32, float64, bfloat16 or float16; residual the same, or whatever broadcasts; the
    output has the shape, dtype and memory format of x.

    ``SyncBatchNormAct2d.convert_sync_batchnorm`` keeps ``act``; ``nn.SyncBatchNorm``'s makes a plain SyncBatchNorm of
    it, which drops it.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: str | None = "relu",
    ) -> None:
        check_act(act)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if affine and not bias:
            self.register_parameter("bias", None)
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        traced = isinstance(x, Proxy)
        if not traced:
            _check_four_dimensional(x)
        positional, keywords = _statistics(self, traced)
        return self._batch_norm_act(x, *positional, residual, **keywords, act=self.act)

    _batch_norm_act = staticmethod(fused.batch_norm_act)

    def extra_repr(self) -> str:
        without_bias = ", bias=False" if self.affine and self.bias is None else ""
        return f"{super().extra_repr()}{without_bias}, act={self.act!r}"


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its forward."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def _may_fuse(x: Tensor) -> bool:
    """Whether nothing wants to see the modules called: no global hooks, no symbolic trace (it freezes training)."""
    return not (
        isinstance(x, Proxy)
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


_synchronised: set[type[nn.Module]] = set()


def register_synchronised(kind: type[nn.Module]) -> None:
    """Let :func:`norm_act` fuse modules of a type that has ``_batch_norm_act`` and ``is_synchronised``."""
    _synchronised.add(kind)


def is_fusable(norm: nn.Module, relu_follows: bool = False) -> bool:
    """Whether ``norm`` is exactly a batch normalisation whose forward a fused op can stand in for at this call.

    A subclass may compute anything; parametrizations are subclasses too. A ReLU of its own only fits where one follows.
    """
    kind = type(norm)
    if kind is BatchNormAct2d or (kind in _synchronised and not norm.is_synchronised()):
        return (norm.act is None or relu_follows) and not has_hooks(norm)
    return kind is nn.BatchNorm2d and not has_hooks(norm)


def is_plain_relu(act: nn.Module) -> bool:
    """Whether ``act`` is exactly ``nn.ReLU`` and nothing watches it."""
    return type(act) is nn.ReLU and not has_hooks(act)


def norm_act(norm: nn.Module, x: Tensor, residual: Tensor | None = None, act: nn.Module | None = None) -> Tensor:
    """``act(norm(x) + residual)``: one fused op where the modules allow it, else the modules' own forwards.

    Args:
        norm: any normalisation. act: any activation module, or None.
    """
    relu_follows = act is not None and residual is None
    synchronised = _can_synchronise(norm, relu_follows)
    fusable = synchronised or is_fusable(norm, relu_follows)
    if fusable and (act is None or is_plain_relu(act)) and _may_fuse(x):
        _check_four_dimensional(x)
        positional, keywords = _statistics(norm)
        function = norm._batch_norm_act if synchronised else fused.batch_norm_act
        return function(x, *positional, residual, **keywords, act=None if act is None else "relu")
    y = norm(x)
    if residual is not None:
        y = y + residual
    return y if act is None else act(y)


def _convolution(conv: nn.Module) -> Convolution | None:
    """What a plain convolution with zero padding by numbers is; None of any other module."""
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or has_hooks(conv):
        return None
    padding = (0, 0) if conv.padding == "valid" else conv.padding
    return None if isinstance(padding, str) else Convolution(conv.stride, padding, conv.dilation, conv.groups)


def norm_act_conv(
    norm: nn.Module, x: Tensor, act: nn.Module | None, conv: nn.Module, recompute: bool = False
) -> Tensor:
    """``conv(act(norm(x)))``; with ``recompute`` the activation is not kept for backward where the modules allow it."""
    if recompute and norm.training and _may_fuse(x) and (act is None or is_plain_relu(act)):
        convolution = _convolution(conv)
        synchronised = _can_synchronise(norm, act is not None)
        if convolution is not None and (synchronised or is_fusable(norm, act is not None)):
            _check_four_dimensional(x)
            positional, keywords = _statistics(norm)
            meets_others = synchronised and norm.is_synchronised()
            leaves = (x, *positional[2:], conv.weight, conv.bias)
            unseen = torch.compiler.is_compiling() or is_traced()
            if meets_others and (unseen or not wants_gradients(*leaves)):
                return conv(norm_act(norm, x, None, act))
            return fused.batch_norm_act_conv(
                x,
                *positional,
                conv.weight,
                conv.bias,
                **convolution._asdict(),
                **keywords,
                act=None if act is None else "relu",
                process_group=(norm.process_group or dist.group.WORLD) if meets_others else None,
            )
    return conv(norm_act(norm, x, None, act))


def norm_add_norm_act(norm: nn.Module, x: Tensor, norm2: nn.Module, x2: Tensor, act: nn.Module | None = None) -> Tensor:
    """``act(norm(x) + norm2(x2))``: one fused op where the modules allow it, else the modules' own forwards."""
    if is_fusable(norm) and is_fusable(norm2) and (act is None or is_plain_relu(act)) and _may_fuse(x):
        _check_four_dimensional(x)
        positional, first = _statistics(norm)
        positional2, second = _statistics(norm2)
        return fused.batch_norm_add_batch_norm_act(
            x,
            *positional,
            x2,
            *positional2,
            **first,
            **{f"{name}2": value for name, value in second.items()},
            act=None if act is None else "relu",
        )
    return norm_act(norm, x, norm2(x2), act)


def _can_synchronise(norm: nn.Module, relu_follows: bool) -> bool:
    """Whether ``norm`` is of a type that may meet other processes, and a fused op can stand in for it."""
    return type(norm) in _synchronised and (norm.act is None or relu_follows) and not has_hooks(norm)


def _meets_others(norm: nn.Module, relu_follows: bool = False) -> bool:
    """Whether ``norm`` would exchange statistics with other processes at this call, and a fused op can stand in."""
    return _can_synchronise(norm, relu_follows) and norm.is_synchronised()


def _is_foldable(conv: nn.Module, norm: nn.Module, y: Tensor, synchronised: bool = True) -> bool:
    """Whether ``norm(conv(y))`` may be one op at this call: a plain 1x1 convolution, the statistics of a batch."""
    return (
        type(conv) is nn.Conv2d
        and y.dim() == 4
        and conv.kernel_size == (1, 1)
        and conv.bias is None
        and conv.groups == 1
        and conv.padding in ((0, 0), "valid", "same")
        and norm.training
        and not has_hooks(conv)
        and (is_fusable(norm) or (synchronised and _meets_others(norm)))
    )


def may_fold(conv: nn.Module, norm: nn.Module, y: Tensor, act: nn.Module | None, folding: str) -> bool:
    """Whether :func:`conv_norm_act` asks for a fold at this call, as far as the modules tell."""
    if folding == "never" or not _may_fuse(y):
        return False
    return _is_foldable(conv, norm, y) and (act is None or is_plain_relu(act))


def recomputes(owner: nn.Module) -> bool:
    """Whether a module with ``recompute`` and ``folding`` keeps as little as it can."""
    return owner.recompute or folding_asked(owner.folding) == "always"


def folds(
    conv: nn.Module, norm: nn.Module, y: Tensor, act: nn.Module | None, folding: str, decision: FoldingDecision
) -> bool:
    """Whether :func:`conv_norm_act` would fold a call with a tensor like ``y``, or let processes vote on it."""
    if not may_fold(conv, norm, y, act, folding):
        return False
    if _meets_others(norm):
        return True
    convolution = Conv1x1(y, conv.weight, conv.stride)
    return folding_ops_for(folding_asked(folding), (convolution,), True, convolution.fits, decision) is not None


def folding_decision(owner: nn.Module) -> FoldingDecision:
    """What a module keeps between its calls of whether its folds are exact enough."""
    decision = getattr(owner, "_folding_decision", None)
    if decision is None:
        decision = FoldingDecision()
        if not torch.compiler.is_compiling():
            owner._folding_decision = decision
    return decision


def conv_norm_act(
    conv: nn.Module,
    norm: nn.Module,
    y: Tensor,
    residual: Tensor | None = None,
    act: nn.Module | None = None,
    folding: str = "auto",
    decision: FoldingDecision | None = None,
) -> Tensor:
    """``act(norm(conv(y)) + residual)``: in training one GEMM where a 1x1 convolution folds, else :func:`norm_act`.

    Args:
        folding: as in ``functional.conv1x1_bn_act``.
    """
    if may_fold(conv, norm, y, act, folding):
        positional, keywords = _statistics(norm)
        function = norm._conv1x1_bn_act if type(norm) in _synchronised else fused.conv1x1_bn_act
        return function(
            y,
            conv.weight,
            *positional,
            residual,
            **keywords,
            stride=conv.stride,
            act=None if act is None else "relu",
            folding=folding,
            decision=decision,
        )
    return norm_act(norm, conv(y), residual, act)


def conv_norm_add_conv_norm_act(
    conv: nn.Module,
    norm: nn.Module,
    y: Tensor,
    conv2: nn.Module,
    norm2: nn.Module,
    y2: Tensor,
    act: nn.Module | None = None,
    folding: str = "auto",
    decision: FoldingDecision | None = None,
) -> Tensor:
    """``act(norm(conv(y)) + norm2(conv2(y2)))`` folded where both are, and under "always" where one is."""
    if folding != "never" and (act is None or is_plain_relu(act)) and _may_fuse(y):
        foldable, foldable2 = (_is_foldable(*branch, False) for branch in ((conv, norm, y), (conv2, norm2, y2)))
        if foldable and foldable2:
            positional, first = _statistics(norm)
            positional2, second = _statistics(norm2)
            return fused.conv1x1_bn_add_conv1x1_bn_act(
                y,
                conv.weight,
                *positional,
                y2,
                conv2.weight,
                *positional2,
                **first,
                **{f"{name}2": value for name, value in second.items()},
                stride=conv.stride,
                stride2=conv2.stride,
                act=None if act is None else "relu",
                folding=folding,
                decision=decision,
            )
    if folding_asked(folding) == "always" and may_fold(conv, norm, y, act, folding):
        shortcut = conv_norm_act(conv2, norm2, y2, folding=folding)
        return conv_norm_act(conv, norm, y, shortcut, act, folding, decision)
    return norm_add_norm_act(norm, conv(y), norm2, conv2(y2), act)


def norm_add_shortcut_act(
    norm: nn.Module,
    x: Tensor,
    conv2: nn.Module,
    norm2: nn.Module,
    x2: Tensor,
    act: nn.Module | None = None,
    folding: str = "auto",
    decision: FoldingDecision | None = None,
) -> Tensor:
    """``act(norm(x) + norm2(conv2(x2)))``, the shortcut's convolution folded under "always"."""
    if folding_asked(folding) == "always" and may_fold(conv2, norm2, x2, act, folding):
        return norm_act(norm, x, conv_norm_act(conv2, norm2, x2, folding=folding, decision=decision), act)
    return norm_add_norm_act(norm, x, norm2, conv2(x2), act)


def _part(conv: nn.Module, norm: nn.Module) -> Part:
    (running_mean, running_var, weight, bias), keywords = _statistics(norm)
    of_norm = (running_mean, running_var, weight, bias, keywords["num_batches_tracked"])
    return Part(conv.weight, *of_norm, keywords["momentum"], norm.eps)


def bottleneck(
    pairs: tuple[tuple[nn.Module, nn.Module], ...],
    x: Tensor,
    act: nn.Module,
    folding: str,
    recompute: bool,
    decision: FoldingDecision,
) -> Tensor | bool | None:
    """A Bottleneck as one op; None where its modules, or the call, do not allow it; False if it will not fold at all.

    Args:
        pairs: conv1, conv2, conv3 and, of a projection, the shortcut's convolution, each with its norm.
    """
    asked, (last, last_norm) = folding_asked(folding), pairs[2]
    if asked == "never" or not last_norm.training or type(last) is not nn.Conv2d or not is_plain_relu(act):
        return None
    if not isinstance(x, Tensor) or not _may_fuse(x) or x.dim() != 4:
        return None
    if any(_can_synchronise(norm, True) and norm.is_synchronised() for _, norm in pairs):
        return None  # what this process sees of the batch must not decide alone
    if not may_gain(asked, x, [last.in_channels], last.out_channels):
        return None if len(pairs) == 4 else False
    convolutions = [_convolution(conv) for conv, _ in pairs]
    if None in convolutions or any(conv.bias is not None for conv, _ in pairs):
        return None
    for (_, norm), relu_follows in zip(pairs, (True, True, False, False), strict=False):
        if not norm.training or not is_fusable(norm, relu_follows):
            return None
    first, second, third, *shortcut = convolutions
    stride, columns = shortcut[0].stride if shortcut else (1, 1)
    if first != CONV1X1 or third != CONV1X1 or stride != columns:
        return None
    if shortcut and shortcut[0]._replace(stride=(1, 1)) != CONV1X1:
        return None
    parts = [_part(conv, norm) for conv, norm in pairs]
    return folded_bottleneck(x, parts, second, stride, asked, recompute, decision)


def _pools_fused(norm: nn.Module, x: Tensor, pool: nn.Module, act: nn.Module | None) -> bool:
    plain = type(pool) is nn.MaxPool2d and not pool.return_indices and not has_hooks(pool)
    return plain and is_fusable(norm, act is not None) and (act is None or is_plain_relu(act)) and _may_fuse(x)


def conv_norm_act_max_pool(
    conv: nn.Module, norm: nn.Module, x: Tensor, pool: nn.Module, act: nn.Module | None = None, recompute: bool = False
) -> Tensor:
    """``pool(act(norm(conv(x))))``, a stem; with ``recompute`` backward computes the convolution's output again.

    Not where something else packs what is saved for backward, which would not see it.
    """
    y = conv(x)
    recompute = recompute and not torch.compiler.is_compiling() and _pools_fused(norm, y, pool, act)
    convolution = _convolution(conv) if recompute and not is_traced() and y.requires_grad else None
    if convolution is None or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return norm_act_max_pool(norm, y, pool, act)
    dtype, known = y.dtype, (y.data_ptr(), y.shape, y.stride(), y._version)
    operands = [t if t is None else t.detach() for t in (x, conv.weight, conv.bias)]
    versions = [None if t is None else t._version for t in operands]

    def pack(t: Tensor) -> Tensor | None:
        return None if (t.data_ptr(), t.shape, t.stride(), t._version) == known else t

    def unpack(packed: Tensor | None) -> Tensor:
        if packed is not None:
            return packed
        if versions != [None if t is None else t._version for t in operands]:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                "the input or a parameter of the first convolution, from which recompute=True makes its output again"
            )
        with torch.no_grad():
            return convolution(*(t if t is None else t.to(dtype) for t in operands))

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return norm_act_max_pool(norm, y, pool, act)


def norm_act_max_pool(norm: nn.Module, x: Tensor, pool: nn.Module, act: nn.Module | None = None) -> Tensor:
    """``pool(act(norm(x)))``: one fused op where the modules allow it, else the modules' own forwards."""
    if _pools_fused(norm, x, pool, act):
        _check_four_dimensional(x)
        positional, keywords = _statistics(norm)
        return fused.batch_norm_act_max_pool(
            x,
            *positional,
            kernel_size=pool.kernel_size,
            stride=pool.stride,
            padding=pool.padding,
            dilation=pool.dilation,
            ceil_mode=pool.ceil_mode,
            **keywords,
            act=None if act is None else "relu",
        )
    return pool(norm_act(norm, x, None, act))
