"""Backends and calls that the op tests run over.

`backend`: every backend that this machine can run on a CPU, forced; `any_backend`: those and "auto"; `kernel`: the C++
kernels, or the reference where there are none.
`call`: every op with its flags, on small float64 tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres import verification

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

AVAILABLE = verification.backends("cpu")
FORCED = [name for name in AVAILABLE if AVAILABLE[name] is None and name != "auto"]
if os.environ.get("FUSEDRES_REQUIRE_EXT") == "1" and "cpu" not in FORCED:
    FORCED.append("cpu")  # its tests fail and say why


@dataclass
class Call:
    """One op with its flags, next to what eager calls it."""

    name: str
    case: verification.Case
    drop: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Fresh inputs; leaves that take gradients require them."""
        tensors = verification.make_inputs(self.case)
        for name in verification.differentiable(tensors):
            tensors[name] = tensors[name].to(dtype or tensors[name].dtype).requires_grad_()
        for name in verification.BUFFERS:
            if name in tensors and dtype and not name.startswith("num"):
                tensors[name] = tensors[name].to(dtype)
        return tensors

    @staticmethod
    def names(tensors: dict[str, Tensor]) -> list[str]:
        return verification.differentiable(tensors)

    def ours(self, tensors: dict[str, Tensor]) -> Tensor:
        return verification.ours(self.case, tensors)

    def eager(self, tensors: dict[str, Tensor]) -> Tensor:
        return verification.eager(self.case, tensors)

    def function(self, which: str, tensors: dict[str, Tensor]) -> Callable[..., Tensor]:
        """A pure function of the differentiable inputs, in the order of `names`; statistics are copied."""
        names = self.names(tensors)
        forward = getattr(self, which)

        def pure(*values: Tensor) -> Tensor:
            buffers = {name: tensors[name].clone() for name in verification.BUFFERS if name in tensors}
            return forward(dict(zip(names, values, strict=True)) | buffers)

        return pure


def _case(op: str, shape: tuple[int, int, int, int] = (3, 4, 4, 5), **flags: Any) -> verification.Case:
    return verification.Case(op, shape=shape, dtype="f64", **flags)


CALLS = [
    Call("bn-train", _case("batch_norm_act")),
    Call("bn-eval", _case("batch_norm_act", training=False)),
    Call("bn-train-noact", _case("batch_norm_act", act=None)),
    Call("bn-train-residual", _case("batch_norm_act", residual="contiguous")),
    Call("bn-eval-residual", _case("batch_norm_act", training=False, residual="contiguous")),
    Call("bn-train-residual-noact", _case("batch_norm_act", residual="contiguous", act=None)),
    Call("bn-train-channels_last-residual", _case("batch_norm_act", layout="channels_last", residual="channels_last")),
    Call("bn-train-noaffine", _case("batch_norm_act", affine="none")),
    Call("bn-train-weight", _case("batch_norm_act", affine="weight", residual="contiguous")),
    Call("bn-train-bias", _case("batch_norm_act", affine="bias", momentum=None)),
    Call("bn-train-nostats", _case("batch_norm_act", stats=False)),
    Call("bn2-train", _case("batch_norm_add_batch_norm_act")),
    Call("bn2-eval", _case("batch_norm_add_batch_norm_act", training=False)),
    Call("bn2-mixed", _case("batch_norm_add_batch_norm_act", training2=False)),
    Call("bn2-mixed-noaffine", _case("batch_norm_add_batch_norm_act", training=False, training2=True, affine="none")),
    Call("bn2-train-noact", _case("batch_norm_add_batch_norm_act", act=None, layout="channels_last")),
    Call("pool-train", _case("batch_norm_act_max_pool", shape=(2, 3, 7, 6))),
    Call("pool-train-channels_last", _case("batch_norm_act_max_pool", shape=(2, 3, 7, 6), layout="channels_last")),
    Call("pool-eval", _case("batch_norm_act_max_pool", shape=(2, 3, 7, 6), training=False, window=(2, 2, 0, 1, True))),
    Call(
        "pool-train-noact", _case("batch_norm_act_max_pool", shape=(2, 3, 7, 6), act=None, window=(3, 1, 1, 1, False))
    ),
    Call("add", _case("add_act")),
    Call("add-noact", _case("add_act", act=None)),
    Call("add-channels_last", _case("add_act", layout="channels_last")),
    Call("conv-train", _case("conv_bn_act", shape=(2, 4, 5, 4))),
    Call(
        "conv-eval-residual",
        _case("conv_bn_act", shape=(2, 4, 5, 4), training=False, residual="contiguous", conv=(8, 3, 2, 1, 2, True)),
    ),
    Call("fold-train", _case("conv1x1_bn_act", layout="channels_last")),
    Call("fold-train-residual", _case("conv1x1_bn_act", layout="channels_last", residual="channels_last")),
    Call("fold-train-strided-noact", _case("conv1x1_bn_act", conv=(5, 1, 2, 0, 1, False), act=None)),
    Call("fold-train-noaffine", _case("conv1x1_bn_act", affine="none", stats=False, residual="contiguous")),
    Call("fold-train-zero", _case("conv1x1_bn_act", affine="zero", momentum=None)),
    Call("fold-eval", _case("conv1x1_bn_act", training=False)),
    Call("fold2-train", _case("conv1x1_bn_add_conv1x1_bn_act", layout="channels_last", conv=(6, 1, 2, 0, 1, False))),
    Call("fold2-train-noact", _case("conv1x1_bn_add_conv1x1_bn_act", act=None, affine="weight")),
    Call("fold2-mixed", _case("conv1x1_bn_add_conv1x1_bn_act", training2=False)),
]
MAIN_CALLS = ("bn-train", "bn-eval", "bn-train-residual", "bn2-train", "pool-train", "add", "conv-train")
MAIN_CALLS += ("fold-train-residual", "fold2-train")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.fixturenames
    if "call" in names and "backend" in names:  # "auto" takes the main calls
        pairs = [(b, c) for b in FORCED for c in CALLS]
        pairs += [("auto", c) for c in CALLS if c.name in MAIN_CALLS]
        metafunc.parametrize(("backend", "call"), pairs, ids=[f"{b}-{c.name}" for b, c in pairs], indirect=["backend"])
    elif "call" in names and "kernel" in names:
        pairs = [(FORCED[-1], c) for c in CALLS] + [(b, c) for b in FORCED[:-1] for c in CALLS if c.name in MAIN_CALLS]
        metafunc.parametrize(("kernel", "call"), pairs, ids=[f"{b}-{c.name}" for b, c in pairs], indirect=["kernel"])
    elif "call" in names:
        metafunc.parametrize("call", CALLS, ids=[c.name for c in CALLS])
    elif "any_backend" in names:
        metafunc.parametrize("any_backend", [*FORCED, "auto"], indirect=True)
    elif "kernel" in names:
        metafunc.parametrize("kernel", FORCED[-1:], indirect=True)
    elif "backend" in names:
        metafunc.parametrize("backend", FORCED, indirect=True)
    if "main_call" in names:
        metafunc.parametrize("main_call", [c for c in CALLS if c.name in MAIN_CALLS], ids=MAIN_CALLS)


@pytest.fixture
def backend(request: pytest.FixtureRequest):
    """The test runs with each forced backend of this machine."""
    with fusedres.use_backend(request.param):
        yield request.param


any_backend = backend  # and with "auto"
kernel = backend  # only with the C++ kernels, or the reference where there are none


@pytest.fixture
def record_ops():
    """A context manager that lists the raw ops called in it, as (op, args, kwargs, results)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[tuple[Any, tuple, dict, Any]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            self.calls.append((func, args, kwargs or {}, result))
            return result

    return Record


@pytest.fixture
def saved_bytes():
    """A function that runs `forward()` and returns (output, bytes of the storages kept for backward)."""

    def measure(forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
        storages: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = forward()
        return out, sum(storages.values())

    return measure


@pytest.fixture
def twins():
    """BatchNormAct2d(act=None) and nn.BatchNorm2d with equal, nontrivial parameters and statistics."""

    def make(channels: int, **arguments: Any) -> tuple[nn.Module, nn.Module]:
        theirs = nn.BatchNorm2d(channels, **arguments)
        with torch.no_grad():
            if theirs.weight is not None:
                theirs.weight.uniform_(0.5, 1.5)
            if theirs.bias is not None:
                theirs.bias.normal_()
            if theirs.running_mean is not None:
                theirs.running_mean.normal_()
                theirs.running_var.uniform_(0.5, 1.5)
        mine = fusedres.BatchNormAct2d(channels, act=None, **arguments)
        mine.load_state_dict(theirs.state_dict())
        return mine, theirs

    return make


@pytest.fixture
def norm_arguments():
    """Running statistics and affine parameters of a batch norm over `channels`, as the functional forms take them."""

    def make(channels: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> list[Tensor]:
        g = torch.Generator().manual_seed(channels)
        weight = (0.5 + torch.rand(channels, generator=g)).to(dtype).requires_grad_(grad)
        bias = torch.randn(channels, generator=g).to(dtype).requires_grad_(grad)
        return [torch.zeros(channels, dtype=dtype), torch.ones(channels, dtype=dtype), weight, bias]

    return make
