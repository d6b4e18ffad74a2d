"""With the rest of PyTorch on the device: raw ops, autocast, torch.compile, whole networks in training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fusedres
from fusedres import functional as F
from fusedres import verification
from fusedres.models import cifar_resnet

from .conftest import DEVICE, Call, served_by

pytestmark = pytest.mark.gpu

OPS = verification.OPS[:4]
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static")


def raw_calls(suffix: str, dtype: torch.dtype = torch.bfloat16):
    """(overload, arguments) of every raw op, forward and backward, on small tensors of the device."""
    ops = torch.ops.fusedres

    def op(name: str):
        return getattr(ops, name + suffix).default

    def x() -> torch.Tensor:
        return torch.randn(3, 5, 6, 7, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)

    def norm() -> tuple:
        weight, bias, mean, var = (torch.rand(5, device=DEVICE) + 0.5 for _ in range(4))
        return weight, bias, mean, var, torch.tensor(3, device=DEVICE), True, None, 1e-5

    first, second = norm(), norm()
    arguments = (x(), x(), *first, True, True)
    yield op("batch_norm_act"), arguments
    _, stats, mask = op("batch_norm_act")(*arguments)
    yield op("batch_norm_act_backward"), (x(), x(), *first[:2], stats, mask, True, True, True, True, True)
    yield op("batch_norm_add_batch_norm_act"), (x(), *first, x(), *second, True)
    pair = (x(), x(), *first[:2], stats, True, x(), *second[:2], stats, True, True, True, True, True, True)
    yield op("batch_norm_add_batch_norm_act_backward"), pair
    window = ([3, 3], [2, 2], [1, 1], [1, 1], False)
    yield op("batch_norm_act_max_pool"), (x(), *first, True, *window)
    pooled = torch.randn(3, 5, 3, 4, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)
    yield (
        op("batch_norm_act_max_pool_backward"),
        (pooled, x(), *first[:2], stats, True, True, *window, True, True),
    )
    yield op("add_act"), (x(), x(), True, True)
    yield op("add_act_backward"), (x(), op("add_act")(x(), x(), True, True)[1])


def test_opcheck(backend):
    """Schema, mutation, shapes and strides of the fake kernels, dispatch under torch.compile."""
    suffix = {"triton": "_triton", "reference": "_reference"}.get(backend, "")
    with served_by(backend, "batch_norm_act"), served_by(backend, "batch_norm_act_max_pool"):
        for op, arguments in raw_calls(suffix):
            torch.library.opcheck(
                op, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static")
            )


@pytest.mark.parametrize("op", OPS)
def test_compiled_is_what_runs(op, backend):
    """torch.compile(fullgraph=True) gives the bits of the plain call, statistics included."""
    residual = "channels_last" if op in ("batch_norm_act", "add_act") else None
    case = verification.Case(op, (4, 16, 12, 12), "bf16", "channels_last", residual=residual)
    with served_by(backend, op):
        plain, compiled = Call(case), Call(case)
        want = [*(t.detach() for t in plain()), *plain.buffers.values()]
        torch.compiler.reset()
        function = torch.compile(verification.ours, fullgraph=True, backend="aot_eager")
        out = function(case, compiled.tensors)
        got = [out, *torch.autograd.grad(out, compiled.leaves, compiled.dy), *compiled.buffers.values()]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.detach(), b, rtol=0, atol=0)


def test_autocast_keeps_parameters_and_their_gradients_wide(backend):
    with served_by(backend, "batch_norm_act"):
        block = fusedres.Bottleneck(64, 16).to(DEVICE, memory_format=torch.channels_last)
        x = torch.randn(4, 64, 14, 14, device=DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16):
            out = block(x)
            assert out.dtype == torch.bfloat16 or DEVICE == "cpu"
            loss = out.float().square().mean()
        loss.backward()
        assert x.grad.dtype == torch.float32
        for name, parameter in block.named_parameters():
            assert parameter.grad.dtype == torch.float32, name
            assert parameter.grad.isfinite().all(), name
        assert block.bn1.running_mean.dtype == torch.float32


class PlainBlock(nn.Module):
    """A residual block written out in modules of torch."""

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


def network(block) -> nn.Module:
    """Convolution, two blocks (a shortcut and a projection), a classifier."""

    def shortcut(inplanes: int, planes: int, stride: int):
        if block is PlainBlock:
            return block(inplanes, planes, stride)
        projects = stride != 1 or inplanes != planes
        layers = [nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)]
        return block(inplanes, planes, stride, nn.Sequential(*layers) if projects else None)

    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        shortcut(16, 16, 1),
        shortcut(16, 32, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


@pytest.mark.parametrize("amp", [False, True], ids=["f32", "amp"])
def test_a_small_network_trains_as_eager_does(amp, backend):
    """The losses of ten steps, against those of eager in float64: as near as eager's own are."""
    torch.manual_seed(0)
    start = network(PlainBlock)
    data = torch.randn(8, 32, 3, 16, 16)
    target = torch.randint(0, 10, (8, 32))

    def losses(model: nn.Module, dtype: torch.dtype, amp: bool) -> torch.Tensor:
        model.load_state_dict(start.state_dict())
        model.to(DEVICE, dtype, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        curve = []
        for x, t in zip(data, target, strict=True):
            x = x.to(DEVICE, dtype, memory_format=torch.channels_last)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=amp):
                logits = model(x)
            loss = nn.functional.cross_entropy(logits.to(dtype), t.to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.detach().double().cpu())
        return torch.stack(curve)

    exact = losses(network(PlainBlock), torch.float64, False)
    eager = losses(network(PlainBlock), torch.float32, amp)
    with served_by(backend, "batch_norm_act"), served_by(backend, "batch_norm_add_batch_norm_act"):
        ours = losses(network(fusedres.BasicBlock), torch.float32, amp)
    allowed = 2 * (eager - exact).abs().max() + (2e-2 if amp else 1e-4)
    assert (ours - exact).abs().max() <= allowed


def test_cifar_network_in_a_graph(backend, capture):
    """A whole training step as a graph: the losses of replays are those of plain steps."""
    with served_by(backend, "batch_norm_act"):
        torch.manual_seed(0)
        model = cifar_resnet(8).to(DEVICE, memory_format=torch.channels_last)
        twin = copy.deepcopy(model)
        x = torch.randn(8, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
        target = torch.randint(0, 10, (8,), device=DEVICE)

        def step_of(model: nn.Module):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

            def step() -> list[torch.Tensor]:
                loss = nn.functional.cross_entropy(model(x), target)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                return [loss.detach()]

            return step

        replay, (loss,) = capture(step_of(model))
        steps = 3 if DEVICE == "cuda" else 2  # capturing takes two steps for warming up and none for itself
        plain = step_of(twin)
        for _ in range(steps - 1):
            want = plain()[0]
        for _ in range(2):
            replay()
            want = plain()[0]
            torch.testing.assert_close(loss, want, rtol=2e-3, atol=1e-4)
        for name, value in model.state_dict().items():
            if "num_batches" in name:
                assert value == twin.state_dict()[name]


def test_small_calls_that_eager_serves(backend):
    """Under `auto` whatever serves a call, the values are eager's."""
    x, residual = torch.randn(2, 3, 4, 5, device=DEVICE), torch.randn(2, 3, 4, 5, device=DEVICE)
    assert torch.equal(F.add_act(x, residual), (x + residual).relu())
