"""The CIFAR family: residual, plain and pre-activation networks for small images.

Architecture: He et al. 2015, https://arxiv.org/abs/1512.03385, section 4.2; pre-activation: He et al. 2016,
https://arxiv.org/abs/1603.05027, and the authors' https://github.com/KaimingHe/resnet-1k-layers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..nn.blocks import (
    BasicBlock,
    Bottleneck,
    PreActBasicBlock,
    PreActBottleneck,
    conv1x1,
    conv3x3,
)
from ..nn.conv import ConvBNAct2d
from ..nn.norm import norm_act


class PadShortcut(nn.Module):
    """Option A: every ``stride``-th pixel, and zeros for the channels that are missing; no parameters."""

    def __init__(self, inplanes: int, outplanes: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = outplanes - inplanes
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, 0, self.extra_channels))

    def extra_repr(self) -> str:
        return f"extra_channels={self.extra_channels}, stride={self.stride}"


class CifarResNet(nn.Module):
    """A 3x3 convolution, three stages of 16, 32 and 64 planes, global average pooling, a linear layer.

    State-dict keys, in order: ``conv1 bn1 layer1 layer2 layer3 fc``, and ``conv1 layer1 layer2 layer3 bn fc`` with
    pre-activation blocks. The layers of a plain network are :class:`~fusedres.ConvBNAct2d`, two for each block.

    Args:
        block: one of the four residual blocks, or ``None`` for a plain network.
        blocks_per_stage: the ``n`` of the paper.
        shortcut: where the shape changes, ``"A"`` (:class:`PadShortcut`) or ``"B"`` (1x1 convolution, and a norm unless
            pre-activation).
        num_classes: outputs of the last layer.
        in_channels: of the images.

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, num_classes)``, for images of any size (training needs more than one value
        per channel behind the two strides).
    """

    def __init__(
        self,
        block: type[nn.Module] | None,
        blocks_per_stage: int,
        *,
        shortcut: Literal["A", "B"] = "A",
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.preact = block in (PreActBasicBlock, PreActBottleneck)
        self.shortcut = shortcut
        self.inplanes = 16
        self.conv1 = conv3x3(in_channels, self.inplanes)
        if not self.preact:
            self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.layer1 = self._make_layer(block, 16, blocks_per_stage, stride=1)
        self.layer2 = self._make_layer(block, 32, blocks_per_stage, stride=2)
        self.layer3 = self._make_layer(block, 64, blocks_per_stage, stride=2)
        if self.preact:
            self.bn = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _make_layer(self, block: type[nn.Module] | None, planes: int, blocks: int, stride: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for i in range(blocks):
            if block is None:
                layers += [
                    ConvBNAct2d(self.inplanes, planes, 3, stride if i == 0 else 1, padding=1),
                    ConvBNAct2d(planes, planes, 3, padding=1),
                ]
                self.inplanes = planes
            elif i == 0:
                layers.append(block(self.inplanes, planes, stride, self._downsample(planes * block.expansion, stride)))
                self.inplanes = planes * block.expansion
            else:
                layers.append(block(self.inplanes, planes))
        return nn.Sequential(*layers)

    def _downsample(self, outplanes: int, stride: int) -> nn.Module | None:
        if stride == 1 and self.inplanes == outplanes:
            # The first pre-activation comes before the paths part (https://arxiv.org/abs/1603.05027, appendix).
            return nn.Identity() if self.preact else None
        if self.shortcut == "A":
            return PadShortcut(self.inplanes, outplanes, stride)
        layers: list[nn.Module] = [conv1x1(self.inplanes, outplanes, stride)]
        if not self.preact:
            layers.append(nn.BatchNorm2d(outplanes))
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if not self.preact:
            x = norm_act(self.bn1, x, act=self.relu)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        if self.preact:
            x = norm_act(self.bn, x, act=self.relu)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


def cifar_resnet(
    depth: int,
    *,
    shortcut: Literal["A", "B"] = "A",
    plain: bool = False,
    preact: bool = False,
    bottleneck: bool | None = None,
    num_classes: int = 10,
    in_channels: int = 3,
) -> CifarResNet:
    """ResNet for small images (8x8 and up) by its number of layers.

    Args:
        depth: ``6n + 2`` with basic blocks (20, 32, 44, 56, 110), ``9n + 2`` with bottlenecks (164, 200, 1001).
        shortcut: where the shape changes, ``"A"``: subsampling and zero-padded channels, without parameters, as in the
            paper's CIFAR experiments; ``"B"``: a 1x1 convolution, as in the authors' pre-activation code.
        plain: without shortcuts, the paper's baseline; ``6n + 2`` only.
        preact: pre-activation blocks.
        bottleneck: the kind of block; by default as published: bottlenecks in pre-activation networks of 164 and more
            layers (where ``depth`` is ``9n + 2``), basic blocks elsewhere (where it is ``6n + 2``).
        num_classes: outputs of the last layer.
        in_channels: of the images.

    Raises:
        ValueError: ``depth`` does not fit the kind of network, ``shortcut`` is unknown, or ``plain`` is combined with
            what only residual networks have.

    >>> sum(p.numel() for p in cifar_resnet(20).parameters())
    269722
    """
    if shortcut not in ("A", "B"):
        raise ValueError(f"shortcut must be 'A' or 'B', got {shortcut!r}")
    if plain and (preact or bottleneck or shortcut != "A"):
        raise ValueError("plain networks have no shortcuts: plain=True excludes preact, bottleneck and shortcut='B'")
    fits_basic = depth >= 8 and depth % 6 == 2
    fits_bottleneck = depth >= 11 and depth % 9 == 2
    if bottleneck is None:
        bottleneck = preact and fits_bottleneck and (depth >= 164 or not fits_basic)
    if bottleneck and not fits_bottleneck:
        raise ValueError(f"depth must be 9n + 2 with bottleneck blocks (164, 1001, ...), got {depth}")
    if not bottleneck and not fits_basic:
        alternative = ", or 9n + 2 for bottleneck blocks (164, 1001, ...)" if preact else ""
        raise ValueError(f"depth must be 6n + 2 with basic blocks (20, 32, 44, 56, 110, ...){alternative}, got {depth}")

    blocks_per_stage = (depth - 2) // (9 if bottleneck else 6)
    if plain:
        block = None
    elif preact:
        block = PreActBottleneck if bottleneck else PreActBasicBlock
    else:
        block = Bottleneck if bottleneck else BasicBlock
    return CifarResNet(block, blocks_per_stage, shortcut=shortcut, num_classes=num_classes, in_channels=in_channels)
