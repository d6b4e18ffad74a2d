"""Batch normalisation with the statistics of all processes of a group."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import handle_torch_function, has_torch_function

from .. import functional as fused
from ..ops.batch_norm_sync import (
    SyncBatchNormActFunction,
    gathered,
    implementations,
    memory_format_of,
    merged,
    sync_batch_norm_act,
)
from ..ops.checks import check_act, check_addend, check_batch_norm, check_conv1x1, check_not_inference
from ..ops.conv1x1_bn_act import output_moments
from ..ops.folded_call import Conv1x1, can_move, checked_moments, folding_ops_for
from ..ops.folding import FoldingDecision, folding_asked
from ..ops.tracing import is_traced, wants_gradients
from .norm import BatchNormAct2d, register_synchronised

__all__ = ["SyncBatchNormAct2d"]


def _across_processes(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    training: bool,
    momentum: float | None,
    eps: float,
    act: str | None,
    num_batches_tracked: Tensor | None,
    process_group: Any,
    partials: Tensor | None = None,
) -> Tensor:
    """``functional.batch_norm_act`` in training, by the statistics of all processes of the group.

    ``partials`` are those of x, of all processes, where they have been exchanged already.
    """
    tensors = (x, running_mean, running_var, weight, bias, residual, num_batches_tracked)
    keywords = {
        "training": training,
        "momentum": momentum,
        "eps": eps,
        "act": act,
        "num_batches_tracked": num_batches_tracked,
        "process_group": process_group,
    }
    if has_torch_function(tensors):
        return handle_torch_function(_across_processes, tensors, x, *tensors[1:-1], **keywords)
    # Not torch.compiler.is_exporting(), which Dynamo of torch 2.10 takes to be true.
    if torch.compiler._is_exporting_flag if torch.compiler.is_compiling() else is_traced():
        raise RuntimeError(
            "SyncBatchNormAct2d in training cannot be traced, exported or transformed by torch.func: "
            "it exchanges its statistics with other processes; call eval() first"
        )
    check_act(act)
    check_batch_norm(
        x, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked, whole_batch=False
    )
    if residual is not None:
        check_addend("residual", residual, x)
        if residual.dtype != x.dtype or residual.shape != x.shape:
            alone = {**keywords, "act": None, "partials": partials}
            y = _across_processes(x, running_mean, running_var, weight, bias, None, **alone)
            y = y + residual
            return torch.relu(y) if act == "relu" else y

    check_not_inference({"x": x, "weight": weight, "bias": bias})
    memory_format = memory_format_of(x)
    x = x.contiguous(memory_format=memory_format)
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format)
        if residual is x and torch.compiler.is_compiling():  # Dynamo refuses a Function that is given one tensor twice
            residual = residual.view_as(residual)
    arguments = (
        x,
        residual,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        momentum,
        eps,
        act == "relu",
    )
    ops = implementations(x)
    leaves = (x, residual, weight, bias)
    if wants_gradients(*leaves):
        return SyncBatchNormActFunction.apply(*arguments, process_group, ops, partials)
    return sync_batch_norm_act(*arguments, False, process_group, ops, partials)[0]


def _conv1x1_across_processes(
    y: Tensor,
    conv_weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    stride: int | tuple[int, int],
    training: bool,
    momentum: float | None,
    eps: float,
    act: str | None,
    num_batches_tracked: Tensor | None,
    folding: str,
    decision: FoldingDecision | None,
    process_group: Any,
) -> Tensor:
    """``functional.conv1x1_bn_act`` in training, by the statistics of all processes: folded where all of them can.

    Whether a process can depends on its part of the batch, so that each tells the others, beside its statistics. They
    are of the convolution's output either way: there is one collective, however the vote ends. Its end has to be known
    to the host, which waits for the device.
    """
    norm = {
        "training": training,
        "momentum": momentum,
        "eps": eps,
        "act": act,
        "num_batches_tracked": num_batches_tracked,
        "process_group": process_group,
    }
    statistics = (running_mean, running_var, weight, bias)
    asked = folding_asked(folding)
    check_conv1x1(y, conv_weight)
    convolution = Conv1x1(y, conv_weight, stride)
    if torch.compiler.is_compiling() or is_traced() or has_torch_function((y, conv_weight)):
        return _across_processes(F.conv2d(y, conv_weight, None, stride), *statistics, residual, **norm)

    check_act(act)
    check_batch_norm(convolution.output(), *statistics, training, momentum, eps, num_batches_tracked, whole_batch=False)
    check_not_inference({"y": y, "conv_weight": conv_weight, "weight": weight, "bias": bias})
    fits = convolution.fits and can_move(running_mean, running_var, num_batches_tracked)
    fits = fits and (residual is None or convolution.matches(residual))
    ops = folding_ops_for(asked, (convolution,), training, fits, decision)
    x = known = None
    if ops is not None:
        rows, mean, cov, count = convolution.moments(ops)
        known = checked_moments([(convolution, mean, cov, count, eps)], decision)
    if known is None:
        x = F.conv2d(y, conv_weight, None, stride)
        x = x.contiguous(memory_format=memory_format_of(x))
    with torch.no_grad():
        if x is not None:
            own = torch.cat([implementations(x)[0](x), x.new_zeros(1, dtype=torch.float64)])
        else:
            mu, var = known[0] if known[0] is not None else output_moments(conv_weight, mean, cov, count)
            own = torch.cat([mu, var * count, mu.new_tensor([count, 1.0])])
        parts = gathered(own, process_group)
    partials = parts[:, :-1].contiguous()
    if not bool((parts[:, -1] == 1).all()):
        if x is None:
            x = F.conv2d(y, conv_weight, None, stride)
        return _across_processes(x, *statistics, residual, **norm, partials=partials)
    total_mean, m2, total = merged(partials)
    running = (running_mean, running_var, num_batches_tracked, momentum)
    moments = torch.stack([total_mean, m2 / total])
    config = (mean, cov, int(total), moments, running, eps, convolution.stride, act == "relu")
    by = ops.across(process_group or dist.group.WORLD, count)
    return fused.conv1x1_bn_act_of_moments(rows, conv_weight, weight, bias, residual, (*config, by))


class SyncBatchNormAct2d(BatchNormAct2d):
    """:class:`BatchNormAct2d` that normalises, in training, by the batch of all processes of a group together.

    As :class:`torch.nn.SyncBatchNorm`, with the same parameters, buffers and state_dict keys, and also on a CPU: each
    process passes its part of the batch, the parts may differ in size, and one may be empty. Gradients of ``x`` are
    those of the sum of the processes' losses; gradients of ``weight`` and ``bias`` are of the own part, and
    DistributedDataParallel averages them. Running statistics come out the same on every process. Where there is no
    process group, or a group of one, and in evaluation, it is a :class:`BatchNormAct2d`.

    All processes of the group must make the same calls in the same order: one collective in forward and, if ``x``
    needs a gradient, one in backward. A process that raises leaves the others waiting, as with any collective.

    Args:
        num_features .. track_running_stats: as :class:`torch.nn.SyncBatchNorm`.
        process_group: of ``torch.distributed``; None is the default group. Not pickled: a copy read from a file
            has the default group.
        device, dtype: of parameters and buffers.
        bias: False leaves out the learnable bias.
        act: ``"relu"`` or None.

    Shape: as :class:`BatchNormAct2d`; the shape of x may differ between processes in all but the channels.

    Raises:
        ValueError: x that is not 4-D; one value per channel in all processes together (seen on a CPU only; elsewhere
            the running statistics then stay as they are).
        RuntimeError: in training, while x is traced, exported or transformed by ``torch.func``.
        Otherwise as :class:`BatchNormAct2d`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: str | None = "relu",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias, act=act)
        self.process_group = process_group

    def is_synchronised(self) -> bool:
        """Whether a call now would meet other processes."""
        return (
            self.training
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size(self.process_group) > 1
        )

    def _batch_norm_act(self, *args: Any, **keywords: Any) -> Tensor:
        if not self.is_synchronised():
            return fused.batch_norm_act(*args, **keywords)
        return _across_processes(*args, **keywords, process_group=self.process_group)

    def _conv1x1_bn_act(self, *args: Any, **keywords: Any) -> Tensor:
        if not self.is_synchronised():
            return fused.conv1x1_bn_act(*args, **keywords)
        return _conv1x1_across_processes(*args, **keywords, process_group=self.process_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process_group": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNormAct2d:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state = {name: value for name, value in self.__dict__.items() if name != "process_group"}
        twin.__dict__ = copy.deepcopy(state, memo)
        twin.__dict__["process_group"] = self.process_group  # shared: a group belongs to the process
        return twin

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any | None = None) -> nn.Module:
        """Replace the batch norms in ``module``, as ``nn.SyncBatchNorm.convert_sync_batchnorm`` does.

        Args:
            module: changed in place, unless it is itself a batch norm.
            process_group: of the new modules; None is the default group.

        Returns:
            ``module``, or its replacement. ``nn.BatchNorm2d`` and its subclasses become SyncBatchNormAct2d: a
            :class:`BatchNormAct2d` keeps its ``act``, others have none. Other batch norms (1d, 3d,
            ``nn.SyncBatchNorm``) become ``nn.SyncBatchNorm``. Parameters and buffers are the same objects. Hooks of a
            replaced module are lost.

        Raises:
            ValueError: a lazy batch norm that has not seen a batch.
            TypeError: a subclass of ``nn.BatchNorm2d`` with a forward of its own, which would be lost.
        """
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
            raise ValueError(f"{type(module).__name__} must be initialised, by a first batch, before it is converted")
        converted = module
        if isinstance(module, nn.BatchNorm2d):
            if type(module).forward not in (nn.BatchNorm2d.forward, BatchNormAct2d.forward) or "forward" in vars(
                module
            ):
                raise TypeError(
                    f"{type(module).__name__} has a forward of its own, which SyncBatchNormAct2d would drop"
                )
            converted = cls(
                module.num_features,
                module.eps,
                module.momentum,
                module.affine,
                module.track_running_stats,
                process_group,
                device="meta",
                bias=module.bias is not None,
                act=module.act if isinstance(module, BatchNormAct2d) else None,
            )
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                setattr(converted, name, getattr(module, name))
            converted.training = module.training
            if hasattr(module, "qconfig"):
                converted.qconfig = module.qconfig
        elif isinstance(module, _BatchNorm):
            return nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
        for name, child in module.named_children():
            converted.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return converted


register_synchronised(SyncBatchNormAct2d)
