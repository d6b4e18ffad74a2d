"""Training steps compared, for the tests of this folder."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


def train_step(model, x):
    """Output, input gradient, parameter gradients and buffers of one forward and backward, in state-dict order."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    grads = torch.autograd.grad(y, [x, *model.parameters()], dy)
    names = ["dx", *(f"grad of {name}" for name, _ in model.named_parameters())]
    return {"output": y.detach(), **dict(zip(names, grads, strict=True)), **dict(model.named_buffers())}


def assert_same_values(got, want, *, rtol=1e-8, atol=1e-9):
    """Equal to rounding, entry by entry; the names may differ, their order may not."""
    for (name, value), expected in zip(got.items(), want.values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


class FusedOps(TorchDispatchMode):
    """Counts the fused ops that reach the dispatcher, by family, and refuses the eager ops that they replace."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        if namespace == "fusedres":
            name = name.split(".")[0].removesuffix("_reference")
            self.counts[name] = self.counts.get(name, 0) + 1
        else:
            assert not name.startswith(("native_batch_norm", "relu", "threshold", "max_pool")), name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def step():
    return train_step


@pytest.fixture
def same():
    return assert_same_values


@pytest.fixture
def fused_ops():
    return FusedOps
