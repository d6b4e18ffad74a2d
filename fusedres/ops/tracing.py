"""What stands between a call and the kernels: tracers, transforms, graphs being captured."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_traced() -> bool:
    """Whether something records or transforms this call, so that it must see plain ATen ops."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    if is_compiling():
        return torch.compiler._is_exporting_flag  # is_exporting() is true for Dynamo of torch 2.10
    return torch._C._get_tracing_state() is not None


def is_blind(y: Tensor) -> bool:
    """Whether the call cannot look at values: it becomes part of a graph, or there are none."""
    if is_compiling() or isinstance(y, FakeTensor) or is_traceable_wrapper_subclass(y):
        return True
    return y.is_cuda and torch.cuda.is_current_stream_capturing()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of ``x`` before a convolution; None where it leaves it alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd will want gradients of a call with these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def in_backward() -> bool:
    """Whether autograd runs the call: a checkpoint computes again what it did not keep."""
    return not is_compiling() and torch._C._current_graph_task_id() != -1
