"""Fused Conv-BatchNorm-ReLU and residual kernels for training and serving ResNets in PyTorch."""

import torch as _torch

if tuple(int(part) for part in _torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
    raise ImportError(f"fusedres needs torch 2.10 or newer, but torch {_torch.__version__} is installed")

from . import functional, models
from ._host_memory import reuse_host_memory
from ._info import info
from ._version import __version__
from .nn import (
    BasicBlock,
    BatchNormAct2d,
    Bottleneck,
    ConvBNAct2d,
    PreActBasicBlock,
    PreActBottleneck,
    SyncBatchNormAct2d,
    zero_init_residual,
)
from .ops.registry import use_backend

__all__ = [
    "BasicBlock",
    "BatchNormAct2d",
    "Bottleneck",
    "ConvBNAct2d",
    "PreActBasicBlock",
    "PreActBottleneck",
    "SyncBatchNormAct2d",
    "__version__",
    "functional",
    "info",
    "models",
    "reuse_host_memory",
    "use_backend",
    "zero_init_residual",
]
