"""conv_bn_act: the library's convolution followed by batch_norm_act."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedres
from fusedres import functional as F
from fusedres import verification
from fusedres.verification import Case


@pytest.mark.parametrize("case", verification.cases("conv_bn_act"), ids=lambda c: c.name)
def test_rule(case: Case, any_backend: str) -> None:
    assert not verification.failures(case, any_backend)


CONVOLUTIONS = [
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 1)},
    {"padding": "same"},
    {"padding": "valid"},
    {"dilation": 2, "padding": 2},
    {"groups": 2, "padding": 1},
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolution_arguments(options, training, backend, norm_arguments) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 9, 8, generator=g, requires_grad=True)
    weight = torch.randn(6, 4 // options.get("groups", 1), 3, 3, generator=g, requires_grad=True)
    bias = torch.randn(6, generator=g, requires_grad=True)
    results = []
    for name in ("ours", "eager"):
        arguments = norm_arguments(6)
        if name == "ours":
            out = F.conv_bn_act(x, weight, *arguments, conv_bias=bias, training=training, **options)
        else:
            out = torch.relu(
                nn.functional.batch_norm(nn.functional.conv2d(x, weight, bias, **options), *arguments, training)
            )
        dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append([out, *arguments[:2], *torch.autograd.grad(out, [x, weight, bias, *arguments[2:]], dy)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1},
        {"in_channels": 4, "out_channels": 6, "kernel_size": (1, 3), "stride": 2, "padding": (0, 1), "groups": 2},
        {
            "in_channels": 4,
            "out_channels": 6,
            "kernel_size": 3,
            "dilation": 2,
            "act": None,
            "eps": 0.1,
            "momentum": None,
        },
    ],
    ids=str,
)
def test_module(options, backend) -> None:
    torch.manual_seed(0)
    mine = fusedres.ConvBNAct2d(**options)
    assert isinstance(mine.conv, nn.Conv2d)
    assert isinstance(mine.bn, nn.BatchNorm2d)
    conv, bn = (
        nn.Conv2d(
            4,
            6,
            **{k: v for k, v in options.items() if k in ("kernel_size", "stride", "padding", "dilation", "groups")},
            bias=mine.conv.bias is not None,
        ),
        nn.BatchNorm2d(6, eps=options.get("eps", 1e-5), momentum=options.get("momentum", 0.1)),
    )
    conv.load_state_dict(mine.conv.state_dict())
    bn.load_state_dict(mine.bn.state_dict())
    for step in range(3):
        x = torch.randn(3, 4, 9, 8, requires_grad=True)
        mine.train(step != 2)
        bn.train(step != 2)
        theirs = bn(conv(x))
        residual = torch.randn(theirs.shape) if step else None
        theirs = theirs if residual is None else theirs + residual
        theirs = torch.relu(theirs) if options.get("act", "relu") else theirs
        out = mine(x) if residual is None else mine(x, residual)
        torch.testing.assert_close(out, theirs, rtol=1e-4, atol=1e-5)
        dy = torch.randn(out.shape)
        got = torch.autograd.grad(out, [x, *mine.parameters()], dy)
        want = torch.autograd.grad(theirs, [x, *conv.parameters(), *bn.parameters()], dy)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        for name, value in bn.state_dict().items():
            torch.testing.assert_close(mine.bn.state_dict()[name], value)


def test_saved_for_backward(backend, saved_bytes, norm_arguments) -> None:
    """The convolution's input and weight, its output, the statistics; with a residual one bit per element."""
    x, weight = torch.randn(4, 8, 32, 32, requires_grad=True), torch.randn(16, 8, 1, 1, requires_grad=True)
    _, size = saved_bytes(lambda: F.conv_bn_act(x, weight, *norm_arguments(16), training=True))
    allowed = (x.numel() + weight.numel() + 4 * 16 * 32 * 32) * 4 + 6 * 16 * 4
    assert size <= allowed
    residual = torch.randn(4, 16, 32, 32, requires_grad=True)
    _, size = saved_bytes(lambda: F.conv_bn_act(x, weight, *norm_arguments(16), residual, training=True))
    assert size <= allowed + residual.numel() // 8


def test_autocast(backend, norm_arguments) -> None:
    """The convolution runs in bfloat16, parameters and their gradients stay float32."""
    x, weight = torch.randn(4, 8, 9, 9, requires_grad=True), torch.randn(16, 8, 3, 3, requires_grad=True)
    results = []
    for name in ("ours", "eager"):
        arguments = norm_arguments(16)
        with torch.autocast("cpu", torch.bfloat16):
            if name == "ours":
                out = F.conv_bn_act(x, weight, *arguments, training=True)
            else:
                out = torch.relu(nn.functional.batch_norm(nn.functional.conv2d(x, weight), *arguments, True))
        dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
        results.append([out, *arguments[:2], *torch.autograd.grad(out, [x, weight, *arguments[2:]], dy)])
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=3e-2, atol=3e-1)
