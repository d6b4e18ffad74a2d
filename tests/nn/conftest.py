"""Comparison of a module with its eager twin, for the tests of this folder."""

import copy

import pytest
import torch
from torch import nn

import fusedres


class EagerTwin(nn.Module):
    """The published forward of a residual block, written out on the modules of a copy of it."""

    def __init__(self, block):
        super().__init__()
        self.block = copy.deepcopy(block)
        if isinstance(self.block.relu, nn.ReLU):
            self.block.relu.inplace = False

    def forward(self, x):
        b = self.block
        if isinstance(b, (fusedres.PreActBasicBlock, fusedres.PreActBottleneck)):
            a = b.relu(b.bn1(x))
            y = b.conv2(b.relu(b.bn2(b.conv1(a))))
            if isinstance(b, fusedres.PreActBottleneck):
                y = b.conv3(b.relu(b.bn3(y)))
            return y + (x if b.downsample is None else b.downsample(a))
        y = b.bn2(b.conv2(b.relu(b.bn1(b.conv1(x)))))
        if isinstance(b, fusedres.Bottleneck):
            y = b.bn3(b.conv3(b.relu(y)))
        y = y + (x if b.downsample is None else b.downsample(x))
        return b.relu(y)


def train_step(module, x, *extra):
    """Everything one forward and backward leave behind: output, input gradients, parameter gradients, buffers."""
    block = module.block if isinstance(module, EagerTwin) else module
    inputs = [t.detach().clone().requires_grad_() for t in (x, *extra)]
    y = module(*inputs)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    grads = torch.autograd.grad(y, [*inputs, *block.parameters()], dy)
    names = ["dx", "dresidual"][: len(inputs)] + [f"grad of {name}" for name, _ in block.named_parameters()]
    return {"output": y.detach(), **dict(zip(names, grads, strict=True)), **dict(block.named_buffers())}


def assert_no_worse(ours, eager, reference):
    """The rule for every number: at most twice eager's own distance from float64, and a few ulp."""
    assert ours.keys() == eager.keys() == reference.keys()
    for name, want in reference.items():
        if not want.is_floating_point():
            assert torch.equal(ours[name], want), name
            continue
        assert ours[name].dtype == eager[name].dtype, name
        error = (ours[name].double() - want.double()).abs().max()
        bound = 2 * (eager[name].double() - want.double()).abs().max()
        tiny = 2 * torch.finfo(ours[name].dtype).eps * want.abs().max()
        assert error <= bound + tiny, (
            f"{name}: {error:.3e} from float64, eager {bound / 2:.3e}, allowed {bound + tiny:.3e}"
        )


@pytest.fixture
def eager_twin():
    return EagerTwin


@pytest.fixture
def step():
    return train_step


@pytest.fixture
def no_worse():
    return assert_no_worse


def _cpu_served() -> bool:
    return fusedres.info()["libraries"]["_ops_cpu"]["loaded"]


@pytest.fixture(params=["auto", "reference", "cpu"])
def backend(request):
    """Each way the ops are served on a CPU."""
    if request.param == "cpu" and not _cpu_served():
        pytest.skip("the CPU library is not loaded")
    with fusedres.use_backend(request.param):
        yield request.param
