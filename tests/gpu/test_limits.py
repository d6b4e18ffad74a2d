"""At the limits of the device: tensors of more than 2^31 elements, no memory left, arguments that must be refused."""

from __future__ import annotations

import pytest
import torch

import fusedres
from fusedres import functional as F
from fusedres import verification

from .conftest import DEVICE, Call, served_by

# of one process, for two at a time would not fit
pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("limits")]

OTHER = "cpu" if DEVICE == "cuda" else "meta"
# (N, C, H, W): 64 elements beyond 2^31 in memory order, and a small one of the same kind for the CPU
HUGE = {"channels_last": (131072 + 1, 16, 32, 32), "contiguous": (131072 + 1, 16, 32, 32)}
HUGE_ON_CPU = (257, 16, 4, 4)


def _huge(layout: str, tensors: int) -> tuple[int, int, int, int]:
    if DEVICE != "cuda":
        return HUGE_ON_CPU
    n, c, h, w = shape = HUGE[layout]
    needed = n * c * h * w * 2 * tensors + (8 << 30)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory")
    return shape


def _filled(shape: tuple[int, ...], layout: str, seed: int) -> torch.Tensor:
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    t = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=form)
    return t.normal_(generator=torch.Generator(DEVICE).manual_seed(seed))


def _parts(n: int) -> list[slice]:
    """The first images, those around the middle and the last, where offsets no longer fit 32 bits."""
    return [slice(0, 8), slice(n // 2 - 4, n // 2 + 4), slice(n - 8, n)]


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_batch_norm_of_more_than_2_31_elements(layout, backend):
    with served_by(backend, "batch_norm_act"):
        n, c, h, w = shape = _huge(layout, 9)
        x, residual, dy = (_filled(shape, layout, seed) for seed in range(3))
        x[-1] += 3  # the last image counts
        x.requires_grad_()
        residual.requires_grad_()
        weight, bias = (torch.linspace(0.5, 1.5, c, device=DEVICE).requires_grad_() for _ in range(2))
        mean, var = torch.zeros(c, device=DEVICE), torch.ones(c, device=DEVICE)
        out = F.batch_norm_act(x, mean, var, weight, bias, residual, training=True, momentum=1.0)
        dx, dresidual, dweight, dbias = torch.autograd.grad(out, (x, residual, weight, bias), dy)

        m = n * h * w
        step = 4096
        chunks = [slice(i, min(i + step, n)) for i in range(0, n, step)]
        with torch.no_grad():
            total = sum(x[s].double().sum((0, 2, 3)) for s in chunks)
            true_mean = total / m
            centred = true_mean.view(1, c, 1, 1)
            squares = sum((x[s].double() - centred).square().sum((0, 2, 3)) for s in chunks)
            rstd = (squares / m + 1e-5).rsqrt()
            torch.testing.assert_close(mean.double(), true_mean, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(var.double(), squares / (m - 1), rtol=1e-5, atol=1e-7)
            g_sum, gx_sum = torch.zeros(2, c, dtype=torch.float64, device=DEVICE)
            for s in chunks:
                g = torch.where(out[s] > 0, dy[s].double(), 0.0)
                g_sum += g.sum((0, 2, 3))
                gx_sum += (g * (x[s].double() - centred)).sum((0, 2, 3))
            torch.testing.assert_close(dbias.double(), g_sum, rtol=1e-4, atol=1e-2)
            torch.testing.assert_close(dweight.double(), gx_sum * rstd, rtol=1e-4, atol=1e-2)
            for s in _parts(n):
                x_hat = (x[s].double() - centred) * rstd.view(1, c, 1, 1)
                y = x_hat * weight.double().view(1, c, 1, 1) + bias.double().view(1, c, 1, 1) + residual[s].double()
                torch.testing.assert_close(out[s].double(), y.relu(), rtol=2**-7, atol=2**-7)
                g = torch.where(out[s] > 0, dy[s].double(), 0.0)
                assert torch.equal(dresidual[s].double(), g)
                inner = g - (g_sum / m).view(1, c, 1, 1) - x_hat * (gx_sum * rstd / m).view(1, c, 1, 1)
                want = inner * (rstd * weight.double()).view(1, c, 1, 1)
                torch.testing.assert_close(dx[s].double(), want, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_add_of_more_than_2_31_elements(layout, backend):
    with served_by(backend, "add_act"):
        shape = _huge(layout, 7)
        x, residual, dy = (_filled(shape, layout, seed) for seed in range(3))
        x.requires_grad_()
        out = F.add_act(x, residual)
        (dx,) = torch.autograd.grad(out, x, dy)
        for s in _parts(shape[0]):
            want = (x[s] + residual[s]).relu()
            assert torch.equal(out[s], want)
            assert torch.equal(dx[s], torch.where(want > 0, dy[s], 0.0))


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory_for():
    """memory_for(bytes): from here on torch may allocate so much more than it holds now, on this device."""

    def limit(nbytes: int) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + nbytes) / total)

    yield limit
    if DEVICE == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@pytest.mark.parametrize(
    "op", ["batch_norm_act", "batch_norm_add_batch_norm_act", "batch_norm_act_max_pool", "add_act"]
)
def test_no_memory_for_the_output(op, backend, needs_gpu, memory_for):
    """torch.OutOfMemoryError, and nothing has moved: statistics, counters, parameters."""
    shape = (16, 64, 112, 112)  # 26 MB, pooled 6 MB
    case = verification.Case(op, shape, "bf16", "channels_last", residual="channels_last", momentum=None)
    with served_by(backend, op):
        call = Call(case)
        del call.dy
        before = [t.detach().clone() for t in call.tensors.values() if t.dim() < 4]
        memory_for(4 << 20)
        with pytest.raises(torch.OutOfMemoryError):
            verification.ours(case, call.tensors)
        after = [t.detach() for t in call.tensors.values() if t.dim() < 4]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_no_memory_for_the_gradients(backend, needs_gpu, memory_for):
    case = verification.Case("batch_norm_act", (16, 64, 112, 112), "bf16", "channels_last", residual="channels_last")
    with served_by(backend, "batch_norm_act"):
        call = Call(case)
        out = verification.ours(case, call.tensors)
        memory_for(4 << 20)
        with pytest.raises(torch.OutOfMemoryError):
            torch.autograd.grad(out, call.leaves, call.dy)


# ---- arguments -------------------------------------------------------------------------------------------------------

NORM = ("running_mean", "running_var", "weight", "bias")


@pytest.mark.parametrize("moved", [*NORM, "num_batches_tracked", "residual", "x2", "weight2", "running_var2"])
def test_mixed_devices(moved, backend):
    op = "batch_norm_add_batch_norm_act" if moved.endswith("2") else "batch_norm_act"
    residual = "contiguous" if moved == "residual" else None
    case = verification.Case(op, (4, 6, 5, 7), "f32", momentum=None, residual=residual)
    with served_by(backend, op):
        call = Call(case)
        tensors = dict(call.tensors)
        tensors[moved] = tensors[moved].detach().to(OTHER)
        before = call.state()
        with pytest.raises(RuntimeError, match=r"device|meta"):
            verification.ours(case, tensors)
        for name, t in before.items():
            assert torch.equal(call.buffers[name], t), f"{name} has moved"


@pytest.mark.parametrize("name", NORM)
@pytest.mark.parametrize("dtype", ["float64", "float16", "int32"])
def test_wrong_dtype_of_a_vector(name, dtype, backend):
    case = verification.Case("batch_norm_act", (4, 6, 5, 7), "bf16", momentum=None)
    with served_by(backend, "batch_norm_act"):
        call = Call(case)
        tensors = dict(call.tensors)
        tensors[name] = tensors[name].detach().to(getattr(torch, dtype))
        before = call.state()
        with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
            verification.ours(case, tensors)
        for buffer, t in before.items():
            assert torch.equal(call.buffers[buffer], t), f"{buffer} has moved"


@pytest.mark.parametrize("size", [5, 7, 0])
def test_wrong_size_of_a_vector(size, backend):
    with served_by(backend, "batch_norm_act"):
        x = torch.randn(4, 6, 5, 7, device=DEVICE)
        mean, var = torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE)
        with pytest.raises(RuntimeError):
            F.batch_norm_act(x, mean, var, torch.ones(size, device=DEVICE), training=True)
        assert torch.equal(mean, torch.zeros_like(mean))


def test_raw_ops_refuse_tensors_of_another_device(backend):
    """Without the checks of the public functions in front."""
    suffix = "_triton" if backend == "triton" else ""
    with served_by(backend, "batch_norm_act"):
        x = torch.randn(4, 6, 5, 7, device=DEVICE)
        vectors = [torch.ones(6, device=DEVICE) for _ in range(4)]
        vectors[2] = vectors[2].to(OTHER)
        op = getattr(torch.ops.fusedres, f"batch_norm_act{suffix}").default
        with pytest.raises((RuntimeError, NotImplementedError)):
            op(x, None, *vectors, None, True, 0.1, 1e-5, True, False)
        assert torch.equal(vectors[3], torch.ones_like(vectors[3]))


def test_backend_of_another_device():
    x = torch.ones(2, 3, 4, 5)
    with fusedres.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' cannot serve add_act"):
        F.add_act(x, x)
