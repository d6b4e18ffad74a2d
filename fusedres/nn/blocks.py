"""Residual blocks: torchvision's constructors, attributes and state-dict keys, with fused normalisation.

A block owns plain ``norm_layer`` modules and one ``relu``, exactly as torchvision's does. Whether a call is fused is
decided at that call, from what the modules are then: a norm, ReLU or shortcut that was swapped, hooked (also after
construction) or parametrized is called as a module, and so is everything while ``torch.fx`` traces symbolically.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from .norm import (
    bottleneck,
    conv_norm_act,
    conv_norm_add_conv_norm_act,
    folding_decision,
    folds,
    has_hooks,
    may_fold,
    norm_act,
    norm_act_conv,
    norm_add_shortcut_act,
    recomputes,
)

__all__ = ["BasicBlock", "Bottleneck", "PreActBasicBlock", "PreActBottleneck"]


def conv3x3(in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """3x3 convolution without bias, padded to keep the image size (divided by ``stride``)."""
    return nn.Conv2d(in_planes, out_planes, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias."""
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


def _projection(downsample: nn.Module | None, x: Tensor) -> tuple[nn.Module, nn.Module] | None:
    """The convolution and the norm of a plain ``Sequential`` of them, whose parts may be called in its place."""
    plain = (
        type(downsample) is nn.Sequential
        and len(downsample) == 2
        and not has_hooks(downsample)
        and not _has_any_global_hook()
        and not isinstance(x, fx.Proxy)
    )
    return tuple(downsample) if plain else None


def _check_basic(block: type[nn.Module], groups: int, base_width: int, dilation: int) -> None:
    name = block.__name__
    if groups != 1 or base_width != 64:
        raise ValueError(f"{name} only supports groups=1 and base_width=64, got {groups=} and {base_width=}")
    if dilation > 1:
        raise NotImplementedError(f"Dilation > 1 not supported in {name}, got {dilation=}")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., https://arxiv.org/abs/1512.03385, figure 5 left).

    A drop-in for ``torchvision.models.resnet.BasicBlock``: same arguments, attributes, state-dict keys and numbers.

    Args:
        inplanes: channels of the input.
        planes: channels of the output.
        stride: of the first convolution.
        downsample: module that gives the shortcut the shape of the output; ``None`` for the identity.
        groups, base_width, dilation: must be 1, 64 and 1.
        norm_layer: makes a norm from a number of channels; ``nn.BatchNorm2d`` by default.

    Attributes:
        folding: ``"auto"``, ``"always"`` or ``"never"``: whether a 1x1 convolution and its norm are, in training, one
            GEMM whose intermediate result is never written (``functional.conv1x1_bn_act``). Set it on an instance.
        recompute: True keeps of an inner activation only what its norm reads, and computes it again in backward; so
            does ``folding="always"``. It costs a pass over memory.

    Shape:
        ``(N, inplanes, H, W)`` to ``(N, planes, ceil(H / stride), ceil(W / stride))``.

    Raises:
        ValueError: ``groups`` is not 1 or ``base_width`` is not 64.
        NotImplementedError: ``dilation`` is above 1.
    """

    expansion: int = 1
    folding: str = "auto"
    recompute: bool = False

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        _check_basic(type(self), groups, base_width, dilation)
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = norm_act_conv(self.bn1, self.conv1(x), self.relu, self.conv2, recomputes(self))
        projection = _projection(self.downsample, x)
        if projection is not None:
            decision = folding_decision(self)
            return norm_add_shortcut_act(self.bn2, y, *projection, x, self.relu, self.folding, decision)
        return norm_act(self.bn2, y, x if self.downsample is None else self.downsample(x), self.relu)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (He et al., https://arxiv.org/abs/1512.03385, figure 5 right).

    A drop-in for ``torchvision.models.resnet.Bottleneck``: same arguments, attributes, state-dict keys and numbers.

    Args:
        inplanes: channels of the input.
        planes: a quarter of the channels of the output.
        stride: of the 3x3 convolution ("v1.5"; the paper has it on the first 1x1).
        downsample: module that gives the shortcut the shape of the output; ``None`` for the identity.
        groups: of the 3x3 convolution (ResNeXt, https://arxiv.org/abs/1611.05431).
        base_width: the 3x3 convolution has ``int(planes * base_width / 64) * groups`` channels.
        dilation: of the 3x3 convolution.
        norm_layer: makes a norm from a number of channels; ``nn.BatchNorm2d`` by default.

    Attributes:
        folding: ``"auto"``, ``"always"`` or ``"never"``: whether the last convolution, its norm, the shortcut's and the
            addition are, in training, one GEMM whose intermediate results are never written
            (``fusedres/ops/folded_bottleneck.py``). Set it on an instance.
        recompute: True keeps of an inner activation only what its norm reads, and computes it again in backward; so
            does ``folding="always"``. It costs a pass over memory.

    Shape:
        ``(N, inplanes, H, W)`` to ``(N, 4 * planes, ceil(H / stride), ceil(W / stride))``.
    """

    expansion: int = 4
    folding: str = "auto"
    recompute: bool = False

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        projection = _projection(self.downsample, x)
        decision, recompute, folding = folding_decision(self), recomputes(self), self.folding
        inner = (self.conv1, self.bn1), (self.conv2, self.bn2)
        if self.downsample is None or projection is not None:
            pairs = (*inner, (self.conv3, self.bn3), *(() if projection is None else (projection,)))
            out = bottleneck(pairs, x, self.relu, folding, recompute, decision)
            if isinstance(out, Tensor):
                return out
            if out is False:
                folding = "never"
        last = (self.conv3, self.bn3)
        y = norm_act_conv(self.bn1, self.conv1(x), self.relu, self.conv2, recompute)
        if recompute and not folds(*last, y, self.relu, folding, decision):
            y = norm_act_conv(self.bn2, y, self.relu, self.conv3, recompute)
            if projection is not None:
                return norm_add_shortcut_act(self.bn3, y, *projection, x, self.relu, folding, decision)
            return norm_act(self.bn3, y, x if self.downsample is None else self.downsample(x), self.relu)
        y = norm_act(self.bn2, y, act=self.relu)
        if projection is not None:
            return conv_norm_add_conv_norm_act(*last, y, *projection, x, self.relu, folding, decision)
        if self.downsample is None or may_fold(*last, y, self.relu, folding):
            shortcut = x if self.downsample is None else self.downsample(x)
            return conv_norm_act(*last, y, shortcut, self.relu, folding, decision)
        y = self.conv3(y)  # before the shortcut, as torchvision's: hooks and graphs see the order
        return norm_act(self.bn3, y, self.downsample(x), self.relu)


class PreActBasicBlock(nn.Module):
    """:class:`BasicBlock` with norm and ReLU before each convolution (He et al., https://arxiv.org/abs/1603.05027).

    ``a = relu(bn1(x)); out = conv2(relu(bn2(conv1(a)))) + shortcut``, where the shortcut is ``x`` itself, or
    ``downsample(a)`` where there is a ``downsample``, as in the authors' code
    (https://github.com/KaimingHe/resnet-1k-layers). Nothing follows the addition: a network of these blocks ends in a
    norm and a ReLU of its own.

    Arguments, shapes and errors as :class:`BasicBlock`; here ``downsample`` needs no norm. State-dict keys, in order:
    ``bn1 conv1 bn2 conv2 downsample``.
    """

    expansion: int = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        _check_basic(type(self), groups, base_width, dilation)
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        self.bn1 = norm_layer(inplanes)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = norm_layer(planes)
        self.conv2 = conv3x3(planes, planes)
        self.relu = nn.ReLU()  # not in place: behind an identity norm it would overwrite the shortcut
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        a = norm_act(self.bn1, x, act=self.relu)
        y = norm_act(self.bn2, self.conv1(a), act=self.relu)
        y = self.conv2(y)
        return y + (x if self.downsample is None else self.downsample(a))


class PreActBottleneck(nn.Module):
    """:class:`Bottleneck` with norm and ReLU before each convolution; see :class:`PreActBasicBlock`.

    Arguments and shapes as :class:`Bottleneck`, the stride on the 3x3 too (the authors' code has it on the first 1x1).
    State-dict keys, in order: ``bn1 conv1 bn2 conv2 bn3 conv3 downsample``.
    """

    expansion: int = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.bn1 = norm_layer(inplanes)
        self.conv1 = conv1x1(inplanes, width)
        self.bn2 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn3 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.relu = nn.ReLU()  # not in place: behind an identity norm it would overwrite the shortcut
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        a = norm_act(self.bn1, x, act=self.relu)
        y = norm_act(self.bn2, self.conv1(a), act=self.relu)
        y = norm_act(self.bn3, self.conv2(y), act=self.relu)
        y = self.conv3(y)
        return y + (x if self.downsample is None else self.downsample(a))
