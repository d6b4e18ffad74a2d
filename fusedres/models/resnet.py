"""The ImageNet family: ResNet, ResNeXt and Wide ResNet, interchangeable with torchvision's.

Same constructor arguments, attributes, state-dict keys (so its checkpoints load with ``strict=True``) and
initialisation: the same seed gives the same weights, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.blocks import BasicBlock, Bottleneck, conv1x1
from ..nn.init import zero_init_residual as zero_init_residual_
from ..nn.norm import conv_norm_act_max_pool
from ..ops.folding import folding_asked


class ResNet(nn.Module):
    """Deep residual network (He et al., https://arxiv.org/abs/1512.03385, table 1).

    Args:
        block: :class:`~fusedres.BasicBlock`, :class:`~fusedres.Bottleneck`, or a block with the same constructor.
        layers: the number of blocks in each of the four stages.
        num_classes: outputs of the last layer.
        zero_init_residual: start every block as its shortcut; see :func:`fusedres.zero_init_residual`.
        groups, width_per_group: of the 3x3 convolutions; ``Bottleneck`` only.
        replace_stride_with_dilation: for stages 2 to 4, whether to dilate instead of striding; ``Bottleneck`` only.
        norm_layer: makes a norm from a number of channels; ``nn.BatchNorm2d`` by default.
        in_channels: of the images.
        folding, recompute: of every block, see :class:`~fusedres.Bottleneck`; ``recompute`` also of the stem, whose
            first convolution then runs again in backward. These three are not arguments of torchvision's.

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, num_classes)``.

    Raises:
        ValueError: ``replace_stride_with_dilation`` does not have three elements, ``folding`` is unknown, or as
            ``block``.
        NotImplementedError: as ``block``.
    """

    recompute: bool = False

    def __init__(
        self,
        block: Callable[..., nn.Module],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        in_channels: int = 3,
        folding: str = "auto",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        folding_asked(folding)
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        if replace_stride_with_dilation is None:
            replace_stride_with_dilation = (False, False, False)
        if len(replace_stride_with_dilation) != 3:
            raise ValueError(
                f"replace_stride_with_dilation must be None or have 3 elements, got {replace_stride_with_dilation}"
            )
        self._norm_layer = norm_layer
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group

        self.conv1 = nn.Conv2d(in_channels, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=replace_stride_with_dilation[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=replace_stride_with_dilation[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=replace_stride_with_dilation[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, (BasicBlock, Bottleneck)):
                module.folding, module.recompute = folding, recompute
        self.recompute = recompute
        if zero_init_residual:
            zero_init_residual_(self)

    def _make_layer(
        self, block: Callable[..., nn.Module], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        outplanes = planes * block.expansion
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        downsample = None
        if stride != 1 or self.inplanes != outplanes:
            downsample = nn.Sequential(conv1x1(self.inplanes, outplanes, stride), self._norm_layer(outplanes))

        shared = {"groups": self.groups, "base_width": self.base_width, "norm_layer": self._norm_layer}
        layers = [block(self.inplanes, planes, stride, downsample, dilation=first_dilation, **shared)]
        self.inplanes = outplanes
        layers += [block(outplanes, planes, dilation=self.dilation, **shared) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = conv_norm_act_max_pool(self.conv1, self.bn1, x, self.maxpool, self.relu, self.recompute)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


def resnet18(num_classes: int = 1000, **kwargs: Any) -> ResNet:
    """ResNet-18 (https://arxiv.org/abs/1512.03385); other arguments as :class:`ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, **kwargs)


def resnet34(num_classes: int = 1000, **kwargs: Any) -> ResNet:
    """ResNet-34 (https://arxiv.org/abs/1512.03385); other arguments as :class:`ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, **kwargs)


def resnet50(num_classes: int = 1000, **kwargs: Any) -> ResNet:
    """ResNet-50 (https://arxiv.org/abs/1512.03385), stride on the 3x3; other arguments as :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, **kwargs)


def resnet101(num_classes: int = 1000, **kwargs: Any) -> ResNet:
    """ResNet-101 (https://arxiv.org/abs/1512.03385), stride on the 3x3; other arguments as :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, **kwargs)


def resnet152(num_classes: int = 1000, **kwargs: Any) -> ResNet:
    """ResNet-152 (https://arxiv.org/abs/1512.03385), stride on the 3x3; other arguments as :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes, **kwargs)


def resnext50_32x4d(num_classes: int = 1000, **kwargs: Any) -> ResNet:
    """ResNeXt-50 32x4d (https://arxiv.org/abs/1611.05431); other arguments as :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, groups=32, width_per_group=4, **kwargs)


def resnext101_32x8d(num_classes: int = 1000, **kwargs: Any) -> ResNet:
    """ResNeXt-101 32x8d (https://arxiv.org/abs/1611.05431); other arguments as :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, groups=32, width_per_group=8, **kwargs)


def resnext101_64x4d(num_classes: int = 1000, **kwargs: Any) -> ResNet:
    """ResNeXt-101 64x4d (https://arxiv.org/abs/1611.05431); other arguments as :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, groups=64, width_per_group=4, **kwargs)


def wide_resnet50_2(num_classes: int = 1000, **kwargs: Any) -> ResNet:
    """Wide ResNet-50-2 (https://arxiv.org/abs/1605.07146): 3x3 twice as wide; other arguments as :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, width_per_group=128, **kwargs)


def wide_resnet101_2(num_classes: int = 1000, **kwargs: Any) -> ResNet:
    """Wide ResNet-101-2 (https://arxiv.org/abs/1605.07146): 3x3 twice as wide; other arguments as :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, width_per_group=128, **kwargs)
