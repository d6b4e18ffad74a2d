"""Networks by name, and the same network as plain PyTorch for comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .. import models
from ..models import CifarResNet, ResNet
from ..nn.blocks import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck
from ..nn.conv import ConvBNAct2d
from .config import ConfigError

IMAGENET = tuple(name for name in models.__all__ if name.islower() and name != "cifar_resnet")
CIFAR = {f"resnet{depth}": {"depth": depth} for depth in (20, 32, 44, 56, 110)}
CIFAR |= {f"plain{depth}": {"depth": depth, "plain": True} for depth in (20, 32, 44, 56)}
CIFAR |= {f"preresnet{depth}": {"depth": depth, "preact": True} for depth in (110, 164, 200, 1001)}


def _factories() -> dict[str, Callable[..., nn.Module]]:
    imagenet = {name: getattr(models, name) for name in IMAGENET}
    return imagenet | {name: partial(models.cifar_resnet, **settings) for name, settings in CIFAR.items()}


def build_model(name: str, *, num_classes: int, in_channels: int = 3) -> nn.Module:
    """The network called ``name`` on the command line, with random weights from torch's global generator."""
    factories = _factories()
    if name not in factories:
        raise ConfigError(f"--model: no network is called {name!r}; there are {', '.join(factories)}")
    return factories[name](num_classes=num_classes, in_channels=in_channels)


class _PlainBasicBlock(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += shortcut
        return self.relu(y)


class _PlainBottleneck(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += shortcut
        return self.relu(y)


class _PlainPreActBasicBlock(PreActBasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu_(self.bn1(x))
        y = self.conv1(a)
        y = self.conv2(torch.relu_(self.bn2(y)))
        y += x if self.downsample is None else self.downsample(a)
        return y


class _PlainPreActBottleneck(PreActBottleneck):
    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu_(self.bn1(x))
        y = self.conv1(a)
        y = self.conv2(torch.relu_(self.bn2(y)))
        y = self.conv3(torch.relu_(self.bn3(y)))
        y += x if self.downsample is None else self.downsample(a)
        return y


class _PlainConvBNAct2d(ConvBNAct2d):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x))
        if residual is not None:
            y += residual
        return y if self.act is None else self.act(y)


class _PlainCifarResNet(CifarResNet):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if not self.preact:
            x = self.relu(self.bn1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        if self.preact:
            x = self.relu(self.bn(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class _PlainResNet(ResNet):
    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: _PlainBasicBlock,
    Bottleneck: _PlainBottleneck,
    PreActBasicBlock: _PlainPreActBasicBlock,
    PreActBottleneck: _PlainPreActBottleneck,
    ConvBNAct2d: _PlainConvBNAct2d,
    CifarResNet: _PlainCifarResNet,
    ResNet: _PlainResNet,
}


def make_plain(model: nn.Module) -> nn.Module:
    """Turn one of this package's networks, in place, into one that runs ``nn.BatchNorm2d``, in-place ReLU and ``+=``.

    Same weights, same state-dict keys; no op of this package is called.
    """
    for module in model.modules():
        module.__class__ = _PLAIN.get(type(module), type(module))  # the attributes are the same, only forward differs
    return model


def plain_twin(model: nn.Module) -> nn.Module:
    """A copy that :func:`make_plain` has been applied to."""
    return make_plain(copy.deepcopy(model))
