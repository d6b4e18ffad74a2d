"""How calls on CUDA tensors find their op, without a GPU: at once where the op checks its arguments itself.

`OnGpu` is a CPU tensor that says it is on a GPU, and the CUDA ops are the CPU's: the checks of both are the same C++
(`csrc/common/checks.h`). That the kernels make them too is tested in `tests/host_cuda/`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fusedres
from fusedres import functional as F
from fusedres import verification
from fusedres.ops import choices, registry
from fusedres.ops.choices import Table

from .test_bad_input import POOL, ROWS, TWO, _base, _clone, _unchanged

OPS = ("batch_norm_act", TWO, POOL, "add_act")
needs_native = pytest.mark.skipif(verification.backends("cpu")["cpu"] is not None, reason="no C++ kernels")


class OnGpu(Tensor):
    is_cpu, is_cuda = False, True
    __torch_function__ = torch._C._disabled_torch_function_impl

    def get_device(self) -> int:
        return 3


class Calls:
    """The CUDA ops of this test: which were called, what they raise, and how often the checks ran."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.error: Exception | None = None
        self.checked = 0

    def op(self, name: str):
        overload = getattr(torch.ops.fusedres, name).default

        def call(*args):
            self.names.append(name)
            if self.error is not None:
                raise self.error
            return overload(*args)

        return registry._with_device_errors(call)


@pytest.fixture
def cuda(monkeypatch) -> Calls:
    """A GPU of which nothing was measured."""
    calls = Calls()
    monkeypatch.setattr(registry, "_forced", None)
    monkeypatch.setattr(registry, "_tables", {3: Table({}, "")})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    for name, op in registry.OPS.items():
        if name.removesuffix("_backward") in OPS:
            monkeypatch.setattr(op, "cuda", calls.op(name))
    check = F.check_act

    def counted(act: object) -> None:
        calls.checked += 1
        check(act)

    monkeypatch.setattr(F, "check_act", counted)  # the first of the checks, of every op
    return calls


def _case(op: str, size: int) -> verification.Case:
    residual = "channels_last" if op in ("batch_norm_act", "add_act") else None
    return verification.Case(op, (2, 8, size, size), "f32", "channels_last", residual=residual, momentum=None)


def _on_gpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    def is_image(t: object) -> bool:
        return isinstance(t, Tensor) and t.dim() == 4 and t.layout is torch.strided

    return {name: t.as_subclass(OnGpu) if is_image(t) else t for name, t in tensors.items()}


def _run(case: verification.Case, grad: bool, arrange=_on_gpu) -> list[Tensor]:
    """Output, gradients and buffers of a call."""
    tensors = arrange(verification.make_inputs(case))
    leaves = [tensors[name].requires_grad_(grad) for name in verification.differentiable(tensors)]
    out = verification.ours(case, tensors)
    gradients = torch.autograd.grad(out.sum(), leaves) if grad else ()
    return [out.detach(), *gradients, *(tensors[n] for n in verification.BUFFERS if n in tensors)]


def _assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert all(torch.equal(a.as_subclass(Tensor), b) for a, b in zip(got, want, strict=True))


@needs_native
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("size", [3, 40])
@pytest.mark.parametrize("op", OPS)
def test_straight_to_the_op(cuda, op, size, grad) -> None:
    """Whatever the size: where ATen is the faster for small tensors was measured on CPUs."""
    case = _case(op, size)
    with fusedres.use_backend("cpu"):
        want = _run(case, grad, lambda tensors: tensors)
    cuda.names.clear()
    _assert_same(_run(case, grad), want)
    assert cuda.names == ([op, f"{op}_backward"] if grad else [op])
    assert cuda.checked == 0


def test_small_additions_on_a_gpu_are_fused(cuda) -> None:
    """Also by the way through the checks."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        _run(_case("add_act", 3), grad=True)
    assert cuda.names == ["add_act", "add_act_backward"]
    assert cuda.checked == 1


@needs_native
@pytest.mark.parametrize("bad", [row for row in ROWS if row.op in OPS], ids=str)
def test_what_the_op_refuses_is_said_in_words(cuda, bad) -> None:
    """The same errors as on a CPU, and nothing has moved."""
    arguments = _on_gpu(_base(bad.op) | _clone(bad.changes))
    before = _clone(arguments)
    with pytest.raises(bad.error) as info:
        getattr(F, bad.op)(**arguments)
    assert type(info.value) is bad.error
    assert all(words in str(info.value) for words in bad.says), info.value
    _unchanged(before, arguments)


@needs_native
def test_what_the_op_refuses_eager_may_serve(cuda) -> None:
    """A residual that broadcasts; what is left is fused."""
    arguments = _on_gpu(_base("batch_norm_act") | {"residual": torch.ones(5, 1, 1)})
    want = F.batch_norm_act(**_base("batch_norm_act") | {"residual": torch.ones(5, 1, 1)})
    torch.testing.assert_close(F.batch_norm_act(**arguments).as_subclass(Tensor), want)
    assert cuda.names == ["batch_norm_act", "batch_norm_act"]  # refused, then without the residual


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("out of memory: cannot allocate a tensor of 7 elements", torch.OutOfMemoryError),
        ("check_cuda, csrc/cuda/launch.h:1, CUDA error: unspecified launch failure", torch.AcceleratorError),
    ],
)
def test_no_second_try_after_a_failure(cuda, op, grad, message, error) -> None:
    cuda.error = RuntimeError(message)
    arguments = _on_gpu(_base(op))
    arguments["x"].requires_grad_(grad)
    before = _clone(arguments)
    with pytest.raises(error, match=message.split(": ")[0]) as info:
        getattr(F, op)(**arguments)
    assert type(info.value) is error
    assert cuda.names == [op]
    assert cuda.checked == 0
    _unchanged(before, arguments)


@needs_native
@pytest.mark.parametrize("op", OPS)
def test_failures_of_a_backward(cuda, op) -> None:
    arguments = _on_gpu(_base(op))
    out = getattr(F, op)(**arguments | {"x": arguments["x"].requires_grad_()})
    cuda.error = RuntimeError("out of memory: cannot allocate a tensor of 7 elements")
    with pytest.raises(torch.OutOfMemoryError):
        out.sum().backward()
    assert cuda.names == [op, f"{op}_backward"]


@needs_native
@pytest.mark.parametrize("op", OPS)
def test_measured_choices_hold(cuda, op, monkeypatch) -> None:
    case = _case(op, 40)
    x = verification.make_inputs(case)["x"].as_subclass(OnGpu)

    def served(**choice: str) -> list[str]:
        table = {choices.key(name, x): backend for name, backend in choice.items()}
        monkeypatch.setattr(registry, "_tables", {3: Table(table, "")})
        cuda.names.clear()
        _run(case, grad=True)
        return cuda.names.copy()

    for triton in (op, f"{op}_backward"):
        monkeypatch.setattr(registry.OPS[triton], "_launcher", getattr(torch.ops.fusedres, triton).default)
    fused = [op, f"{op}_backward"]
    assert served(another="eager") == fused
    assert served(**{op: "cuda"}) == fused
    assert cuda.checked == 0
    assert served(**{op: "eager"}) == []
    assert served(**{op: "triton"}) == []
    assert cuda.checked == 2
    with fusedres.use_backend("cuda"):
        assert served(**{op: "eager"}) == fused
    assert cuda.checked == 2


@needs_native
@pytest.mark.parametrize("op", OPS)
def test_other_ways_are_checked(cuda, op, monkeypatch) -> None:
    """Another backend by force, and where there is no CUDA library."""
    with fusedres.use_backend("reference"):
        _run(_case(op, 40), grad=True)
    monkeypatch.setattr(registry.OPS[op], "cuda", None)
    _run(_case(op, 40), grad=True)
    assert cuda.names == []
    assert cuda.checked == 2


@pytest.mark.parametrize("library", [True, False], ids=["cuda", "no library"])
@pytest.mark.parametrize("op", OPS)
def test_fake_tensors(cuda, op, library, monkeypatch) -> None:
    """On a device that is not there."""
    if not library:
        for name in (op, f"{op}_backward"):
            monkeypatch.setattr(registry.OPS[name], "cuda", None)
    if not torch.cuda.is_available():
        monkeypatch.setattr(registry, "_tables", {})
    with FakeTensorMode():
        arguments = _base(op) | ({} if op == "add_act" else {"training": False})
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                arguments[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
        out = getattr(F, op)(**arguments)  # without a graph, which torch without CUDA cannot record for such a device
    assert out.device.type == "cuda"
    assert out.shape == getattr(F, op)(**_base(op)).shape
    assert cuda.names == ([op] if library else [])
    assert cuda.checked == (not library)
