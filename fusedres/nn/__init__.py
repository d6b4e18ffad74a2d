"""Modules: drop-in twins of torch's and torchvision's, with the same constructors, parameters and state_dict keys."""

from .blocks import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck
from .conv import ConvBNAct2d
from .init import zero_init_residual
from .norm import BatchNormAct2d
from .sync import SyncBatchNormAct2d

__all__ = [
    "BasicBlock",
    "BatchNormAct2d",
    "Bottleneck",
    "ConvBNAct2d",
    "PreActBasicBlock",
    "PreActBottleneck",
    "SyncBatchNormAct2d",
    "zero_init_residual",
]
