"""The error rule on the device: the table of cases of `fusedres verify`, every op, block and backend."""

from __future__ import annotations

import pytest
import torch

import fusedres
from fusedres import functional as F
from fusedres import verification
from fusedres.ops import registry

from .conftest import BACKENDS, DEVICE, served_by

pytestmark = pytest.mark.gpu

# `fusedres verify --quick` runs every third case from the first on; Triton, which compiles for each, runs others here.
TABLE = [
    (op, backend, case)
    for op in verification.OPS + verification.BLOCKS
    for backend in BACKENDS
    for case in (verification.cases(op)[1::3] if backend in ("triton", "reference") else verification.cases(op))
]


@pytest.mark.parametrize(("op", "backend", "case"), TABLE, ids=[f"{o}-{b}-{c.name}" for o, b, c in TABLE])
def test_rule(op, backend, case):
    with served_by(backend, op):
        assert verification.failures(case, backend, DEVICE) == []


OPS = verification.OPS[:4]

# Sizes that take every form there is: one pass, two passes from the L2 cache, two passes from memory, many tiles.
LARGE = [
    (256, 64, 56, 56),
    (32, 2048, 7, 7),
    (3, 257, 111, 113),
    (64, 3, 224, 224),
    (2, 8, 1, 1),
]


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", LARGE, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize(
    "op", ["batch_norm_act", "batch_norm_add_batch_norm_act", "batch_norm_act_max_pool", "add_act"]
)
def test_large_shapes_against_float64_on_the_device(op, shape, layout, backend):
    """Too large for the table, whose float64 is computed on the CPU: outputs and gradients by relative L2 error."""
    if DEVICE == "cpu":
        shape = (min(shape[0], 2), *shape[1:])
    if op == "batch_norm_act_max_pool" and shape[2] < 3:
        pytest.skip("the window does not fit")
    window = (3, 2, 1, 1, False)
    residual = layout if op in ("batch_norm_act", "add_act") else None
    case = verification.Case(op, shape, "bf16", layout, residual=residual, window=window)

    def run(dtype, function):
        g = torch.Generator(DEVICE).manual_seed(0)
        form = torch.channels_last if layout == "channels_last" else torch.contiguous_format

        def draw(*size):
            t = torch.randn(size, generator=g, device=DEVICE).bfloat16()
            return (t.contiguous(memory_format=form) if t.dim() == 4 else t.float()).to(dtype or t.dtype)

        c = shape[1]
        names = {"batch_norm_add_batch_norm_act": ("x", "x2"), "batch_norm_act": ("x", "residual")}.get(op, ("x",))
        tensors = {name: draw(*shape) for name in (("x", "residual") if op == "add_act" else names)}
        affine = torch.float32 if dtype is None else dtype
        for suffix in () if op == "add_act" else ("", "2") if "x2" in tensors else ("",):
            tensors |= {"weight" + suffix: draw(c).to(affine), "bias" + suffix: draw(c).to(affine)}
            tensors |= {"running_mean" + suffix: draw(c).to(affine), "running_var" + suffix: draw(c).abs().to(affine)}
        names = verification.differentiable(tensors)
        leaves = [tensors[name].requires_grad_() for name in names]
        out = function(case, tensors)
        dy = torch.randn(out.shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE).bfloat16()
        grads = torch.autograd.grad(out, leaves, dy.to(out.dtype))
        buffers = {name: tensors[name] for name in verification.BUFFERS if name in tensors}
        return {"out": out.detach()} | dict(zip(names, grads, strict=True)) | buffers

    exact = run(torch.float64, verification.eager)
    eager = run(None, verification.eager)
    with served_by(backend, op):
        ours = run(None, verification.ours)
    for name, reference in exact.items():
        scale = reference.norm().clamp_min(1e-12)
        error, allowed = ((t[name].double() - reference).norm() / scale for t in (ours, eager))
        assert error <= 2 * allowed + 2**-7, f"{name}: {error:.2e}, eager {allowed:.2e}"


def test_auto_is_the_cuda_library_else_triton(needs_gpu):
    for name, op in registry.OPS.items():
        served = fusedres.info()["ops"][name]["cuda"]["served_by"]
        assert served == ("cuda" if op.cuda else "triton" if op.triton else "eager")
        x = torch.empty((1, 3, 5, 7), device=DEVICE)
        assert registry.serve(op, x) in (op.cuda, op.triton)


@pytest.mark.parametrize(
    "op", ["batch_norm_act", "batch_norm_add_batch_norm_act", "batch_norm_act_max_pool", "add_act"]
)
def test_gradcheck(op, backend):
    """float64: on the device in CUDA C++."""
    if backend == "triton":
        pytest.skip("float64 is for the C++ kernels")
    case = verification.Case(op, (2, 3, 4, 5), "f64", residual="contiguous" if op == "batch_norm_act" else None)
    tensors = verification.place(verification.make_inputs(case), DEVICE)
    names = verification.differentiable(tensors)
    for name in names:
        tensors[name] = (tensors[name] + 0.1).requires_grad_()

    def function(*values):
        buffers = {name: tensors[name].clone() for name in verification.BUFFERS if name in tensors}
        return verification.ours(case, dict(zip(names, values, strict=True)) | buffers)

    with served_by(backend, op):
        assert torch.autograd.gradcheck(function, [tensors[name] for name in names])


def test_empty_and_small(backend):
    with served_by(backend, "batch_norm_act"):
        for shape in ((0, 4, 3, 3), (2, 4, 0, 3)):
            x = torch.empty(shape, device=DEVICE, requires_grad=True)
            out = F.batch_norm_act(x, torch.zeros(4, device=DEVICE), torch.ones(4, device=DEVICE))
            assert out.shape == shape
        with pytest.raises(ValueError, match="more than 1 value"):
            F.batch_norm_act(torch.ones((1, 4, 1, 1), device=DEVICE), None, None, training=True)
