"""Convolution, batch normalisation, residual and activation as one module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.checks import check_act
from .norm import conv_norm_act, folding_decision

__all__ = ["ConvBNAct2d"]


class ConvBNAct2d(nn.Module):
    """``act(bn(conv(x)) + residual)``: the library's convolution, then one op for all the rest.

    A 1x1 convolution in training can be one GEMM with all of it; see ``folding``.

    The children are torch's own, ``conv`` (``nn.Conv2d``), ``bn`` (``nn.BatchNorm2d``), ``act`` (``nn.ReLU`` or None),
    so ``nn.SyncBatchNorm.convert_sync_batchnorm`` and weight surgery work as they do for the three written out. A child
    that is replaced, hooked or parametrized is called as the module it is.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as ``nn.Conv2d``.
        bias: of the convolution; off by default, because the batch norm that follows subtracts it again.
        act: ``"relu"``, or ``None`` for no activation.
        eps, momentum, affine, track_running_stats: as ``nn.BatchNorm2d``.
        device, dtype: of the parameters and buffers of both children.

    Attributes:
        folding: ``"auto"``, ``"always"`` or ``"never"``: whether a 1x1 convolution and its norm are, in training, one
            GEMM whose intermediate result is never written (``functional.conv1x1_bn_act``). Set it on an instance.

    Shape:
        ``x`` is ``(N, in_channels, H, W)``, the output ``(N, out_channels, H', W')`` as of the convolution;
        ``residual``, if given, has the output's shape.

    Raises:
        ValueError: ``act`` is neither ``"relu"`` nor ``None``, or as ``nn.Conv2d``.
    """

    folding: str = "auto"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        *,
        bias: bool = False,
        padding_mode: str = "zeros",
        act: str | None = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_act(act)
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.act = nn.ReLU(inplace=True) if act == "relu" else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        decision = folding_decision(self)
        return conv_norm_act(self.conv, self.bn, x, residual, self.act, self.folding, decision)
