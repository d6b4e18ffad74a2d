"""What is counted of a step: the ops that really run, each by what it reads and writes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import fusedres
from fusedres.models import cifar_resnet
from fusedres.training import traffic


def counted(f, *tensors, batch=2, weights=()):
    recorder = traffic.StepRecorder(batch, set(weights))
    with recorder:
        f(*tensors)
    return {name: (op.calls, op.loads, op.stores) for name, op in recorder.ops.items()}


X = torch.randn(2, 3, 4, 4)
T = 2 * 3 * 4 * 4 * 4  # bytes


@pytest.mark.parametrize(
    ("f", "wanted"),
    [
        (torch.relu, {"aten::relu": (1, T, T)}),
        (lambda x: x.clone().add_(x), {"aten::clone": (1, T, T), "aten::add_": (1, 2 * T, T)}),
        (lambda x: x.transpose(2, 3).detach().view(2, 3, 4, 4), {}),
        (lambda x: torch.empty_like(x).copy_(x), {"aten::copy_": (1, T, T)}),
        (torch.zeros_like, {"aten::zeros_like": (1, 0, T)}),
        (lambda x: x[:, :, :1, :1].expand(2, 3, 4, 4) * 2, {"aten::mul": (1, T // 16, T)}),
        (lambda x: x.sum(), {}),  # the loss's business: no activation comes out
        (lambda x: x.flatten(1) * 2, {}),
        (lambda x: torch.cat([x, x], 1), {"aten::cat": (1, 2 * T, 2 * T)}),
    ],
)
def test_elementwise(f, wanted):
    found = counted(f, X.clone())
    if wanted == {}:
        assert all(name == "aten::sum" for name in found)
    else:
        assert found == wanted


def test_batch_norm_has_two_passes():
    x, v = X.clone().requires_grad_(), torch.ones(3)
    found = counted(lambda x: torch.batch_norm(x, v, v, v, v, True, 0.1, 1e-5, False).backward(X), x)
    assert found["aten::native_batch_norm"] == (1, 2 * T, T)
    assert found["aten::native_batch_norm_backward"] == (1, 4 * T, T)


def test_max_pool():
    x, pooled = X.clone().requires_grad_(), T // 4
    found = counted(lambda x: nn.functional.max_pool2d(x, 2).backward(torch.ones(2, 3, 2, 2)), x)
    assert found["aten::max_pool2d_with_indices"] == (1, T, pooled + 2 * pooled)
    assert found["aten::max_pool2d_with_indices_backward"] == (1, pooled + 2 * pooled, T)


@pytest.mark.parametrize(("kernel", "stride", "read"), [(1, 1, T), (1, 2, T // 4), (3, 2, T)])
def test_convolutions(kernel, stride, read):
    conv = nn.Conv2d(3, 5, kernel, stride, kernel // 2, bias=False)
    out = 2 * 5 * (4 // stride) ** 2 * 4
    x = X.clone().requires_grad_()
    found = counted(lambda x: conv(x).sum().backward(), x, weights=[conv.weight.shape])
    assert found["aten::convolution"] == (1, read, out)
    dy = 4  # expanded from the gradient of the sum
    assert found["aten::convolution_backward"] == (1, dy + dy + read, T)
    found = counted(lambda x: conv(x).sum().backward(), X, weights=[conv.weight.shape])
    assert found["aten::convolution_backward"] == (1, dy + read, 0)


@pytest.mark.parametrize("variant", traffic.VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_tensors_call_what_real_ones_call(variant, dtype):
    """A network of bottlenecks with projections, small enough for the reference."""

    def step():
        network = cifar_resnet(11, bottleneck=True, shortcut="B")
        traffic._prepare(network, variant)
        images = torch.randn(4, 3, 32, 32).to(dtype, memory_format=torch.channels_last)
        return traffic.record_step(network, images, torch.tensor([1, 2, 3, 4]))

    with fusedres.use_backend("reference"), traffic._every_fold_gains():
        real = step()
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = step()
    assert ("fusedres::conv1x1_bn_act_apply" in fake) == (variant in ("auto", "always"))
    for of in (real, fake):  # real calls look at values first, and hand on what they computed for that
        fold = of.pop("fusedres::conv1x1_bn_fold", None)
        assert fold is None or fold.calls == 4
    assert real == fake
