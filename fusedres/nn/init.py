"""Initialisation of residual networks."""

from __future__ import annotations

import sys
from typing import TypeVar

from torch import nn

from .blocks import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck

__all__ = ["zero_init_residual"]

Model = TypeVar("Model", bound=nn.Module)


def zero_init_residual(model: Model) -> Model:
    """Make every residual block of ``model`` start as its shortcut, and return ``model`` (changed in place).

    The last scale of each residual branch is set to zero (Goyal et al., https://arxiv.org/abs/1706.02677, section 5.1):
    the weight of the last norm, ``bn2`` or ``bn3``; in the pre-activation blocks, where a ReLU follows the last norm
    and would then pass no gradient at all, the weight of the last convolution. Norms without weight are left alone.

    Applies to the blocks of this package and of torchvision, and to subclasses of them, wherever they are in ``model``.
    The argument of the same name of ``torchvision.models.ResNet`` reaches torchvision's own blocks only.
    """
    last: list[tuple[type[nn.Module], str]] = [
        (BasicBlock, "bn2"),
        (Bottleneck, "bn3"),
        (PreActBasicBlock, "conv2"),
        (PreActBottleneck, "conv3"),
    ]
    torchvision_resnet = sys.modules.get("torchvision.models.resnet")  # imported, if the model has its blocks
    if torchvision_resnet is not None:
        last += [(torchvision_resnet.BasicBlock, "bn2"), (torchvision_resnet.Bottleneck, "bn3")]
    for module in model.modules():
        for block, name in last:
            if isinstance(module, block):
                weight = getattr(getattr(module, name), "weight", None)
                if weight is not None:
                    nn.init.zeros_(weight)
                break
    return model
