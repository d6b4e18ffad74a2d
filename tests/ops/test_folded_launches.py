"""What a folded block asks of a device beside its large kernels: no answer, and not more small launches than are known.

The block runs on tensors without values, where an op that needs one raises; what the dispatcher sees is counted.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from fusedres.nn.norm import folding_decision
from fusedres.ops import folded_bottleneck, registry

ONE_NODE = "FoldedBottleneckFunctionBackward"
# On vectors and small matrices, by ATen, forward and backward: each is a launch, 16 times in a step of a ResNet-50.
MOST = {"identity": (31, 15), "projection": (31, 17)}


class Launches(TorchDispatchMode):
    """Counts the calls of ops that write something, allocations and views apart, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not func.is_view and "empty" not in name and not name.startswith("prim"):
            self.seen[name] += 1
        return out

    @property
    def own(self) -> int:
        return sum(n for name, n in self.seen.items() if name.startswith("fusedres"))

    @property
    def small(self) -> int:
        return sum(n for name, n in self.seen.items() if not name.startswith("fusedres") and "convolution" not in name)


@pytest.fixture
def fake(monkeypatch):
    """Tensors without values, under an autocast to bfloat16, and every op by its own name."""
    for op in registry.OPS.values():
        monkeypatch.setattr(op, "cpu", getattr(torch.ops.fusedres, op.name).default)
    monkeypatch.setattr(folded_bottleneck, "autocast_dtype", lambda x: torch.bfloat16)
    with FakeTensorMode():
        yield


def make_block(shape: str) -> tuple[fusedres.Bottleneck, Tensor]:
    inplanes, stride = (64, 1) if shape == "identity" else (32, 2)
    downsample = None
    if shape == "projection":
        downsample = nn.Sequential(nn.Conv2d(inplanes, 64, 1, stride, bias=False), nn.BatchNorm2d(64))
    block = fusedres.Bottleneck(inplanes, 16, stride, downsample)
    block.folding = "always"
    x = torch.empty(8, inplanes, 28, 28, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    return block, x.requires_grad_()


@pytest.mark.parametrize("shape", MOST)
def test_no_values_are_asked_for_and_few_small_launches(shape, fake):
    block, x = make_block(shape)
    folding_decision(block).found(True, "nothing to look at")
    with Launches() as forward:
        out = block(x)
    assert type(out.grad_fn).__name__ == ONE_NODE
    with Launches() as backward:
        torch.autograd.grad(out, [x, *block.parameters()], torch.empty_like(out))
    for launches, most in zip((forward, backward), MOST[shape], strict=True):
        assert launches.small <= most, launches.seen
    convolutions = 1 if shape == "identity" else 2
    # conv1 with statistics, those of x2, apply; moments and fold of each that is folded; the GEMM; running statistics
    assert forward.own == 4 + 2 * convolutions + 2 + convolutions
    # two reductions of ours, the GEMM, bn2, y1 again, bn1, the GEMM of dx; unfold of each that is folded
    assert backward.own == 6 + convolutions


def test_an_op_that_waits_is_seen(fake):
    with pytest.raises(DataDependentOutputException):
        float(torch.empty(3).sum())
