"""Fused Conv-BatchNorm-ReLU and residual kernels for training and serving ResNets in PyTorch."""

import torch as _torch

if tuple(int(part) for part in _torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
    raise ImportError(f"fusedres needs torch 2.10 or newer, but torch {_torch.__version__} is installed")

from . import functional
from ._host_memory import reuse_host_memory
from ._info import info
from ._version import __version__
from .nn import BatchNormAct2d
from .ops.registry import use_backend

__all__ = [
    "BatchNormAct2d",
    "__version__",
    "functional",
    "info",
    "reuse_host_memory",
    "use_backend",
]
