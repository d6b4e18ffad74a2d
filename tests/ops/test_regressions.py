"""Bugs that were once here."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedres
from fusedres import functional as F


def _norm(channels: int) -> tuple[torch.Tensor, ...]:
    return torch.zeros(channels), torch.ones(channels), torch.ones(channels), torch.zeros(channels)


def _forms(norm):
    return {
        "batch_norm_act": lambda x: F.batch_norm_act(x, *norm, training=True),
        "pair": lambda x: F.batch_norm_add_batch_norm_act(x, *norm, 2 * x, *norm, training=True),
        "max_pool": lambda x: F.batch_norm_act_max_pool(x, *norm, training=True),
        "add_act": lambda x: F.add_act(x, 2 * x),
    }


@pytest.mark.parametrize("form", list(_forms(None)))
def test_compiled_functorch_gradient(form) -> None:
    """The raw op's gradient was dropped without a word under torch.compile(torch.func.grad(f))."""
    call = _forms((None, None, torch.ones(4), torch.zeros(4)))[form]
    x = torch.randn(4, 4, 32, 32)

    def loss(x):
        return (call(x) ** 2).sum()

    want = torch.func.grad(loss)(x)
    got = torch.compile(torch.func.grad(loss), backend="eager", fullgraph=True)(x)
    assert want.norm() > 1
    torch.testing.assert_close(got, want)


def test_compiled_call_is_fused() -> None:
    """The check for transforms must not take every compiled call to ATen."""
    if not fusedres.info()["libraries"]["_ops_cpu"]["loaded"]:
        pytest.skip("no C++ backend")
    seen = []

    def backend(gm, _):
        seen.extend(str(node.target) for m in gm.modules() if hasattr(m, "graph") for node in m.graph.nodes)
        return gm

    x = torch.randn(8, 8, 32, 32, requires_grad=True)
    torch.compile(fusedres.BatchNormAct2d(8), backend=backend, fullgraph=True)(x)
    assert any("fusedres.batch_norm_act" in target for target in seen), seen


@pytest.mark.parametrize("size", [56, 32, 14])
def test_saved_tensors_repacked_in_another_layout(size) -> None:
    """The mask's bits were read in the layout of the unpacked x (torch's own save_on_cpu packs contiguous)."""

    def gradients(pack):
        generator = torch.Generator().manual_seed(0)
        x, residual, dy = (
            torch.randn(2, 8, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
            for _ in range(3)
        )
        norm = nn.BatchNorm2d(8)
        x.requires_grad_()
        residual.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = F.batch_norm_act(x, None, None, norm.weight, norm.bias, residual, training=True)
        return torch.autograd.grad(out, (x, residual, norm.weight, norm.bias), dy)

    for a, b in zip(gradients(lambda t: t.contiguous()), gradients(lambda t: t), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_hook_that_raises() -> None:
    """An exception of a pack hook was taken for the op's refusal, and the statistics moved twice."""
    bn = fusedres.BatchNormAct2d(8)

    def pack(_):
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        bn(torch.randn(8, 8, 32, 32, requires_grad=True))
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("batch_norm_act_backward", (None, True, True, True, False, True)),
        ("batch_norm_act_max_pool_backward", (True, True, [3, 3], [2, 2], [1, 1], [1, 1], False, True, True)),
    ],
)
def test_raw_backward_of_an_empty_batch(op, arguments) -> None:
    """A division by zero ended the process."""
    x = torch.empty(0, 4, 2, 2)
    dy = torch.empty(0, 4, 1, 1) if "pool" in op else x
    if not fusedres.info()["libraries"]["_ops_cpu"]["loaded"]:
        pytest.skip("no C++ backend")
    with pytest.raises(RuntimeError, match="empty"):
        getattr(torch.ops.fusedres, op)(dy, x, None, None, torch.zeros(3, 4), *arguments)


def test_raw_backward_checks_what_was_saved() -> None:
    """Statistics that overlap, or of another dtype, were read past their end."""
    if not fusedres.info()["libraries"]["_ops_cpu"]["loaded"]:
        pytest.skip("no C++ backend")
    x = torch.randn(2, 64, 4, 4)
    for stats in (torch.zeros(1).expand(3, 64), torch.zeros(3, 64, dtype=torch.float64), torch.zeros(64, 3).t()):
        with pytest.raises(RuntimeError, match="stats"):
            torch.ops.fusedres.batch_norm_act_backward(x, x, None, None, stats, None, True, True, True, False, True)


@pytest.mark.parametrize("stride", [2**40, 2**57])
def test_huge_stride(stride) -> None:
    """Row parts as many as the stride overflowed the scratch memory."""
    x = torch.randn(2, 4, 5, 6)
    counter = torch.tensor(0)
    out = F.batch_norm_act_max_pool(
        x, *_norm(4), kernel_size=1, stride=stride, padding=0, training=True, num_batches_tracked=counter
    )
    want = torch.relu(nn.functional.batch_norm(x, *_norm(4), True))[:, :, :1, :1]
    torch.testing.assert_close(out, want)
    assert counter == 1


@pytest.mark.parametrize("size", [4, 32])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_residual_that_cannot_be_added(dtype, size) -> None:
    """The statistics had moved before the addition was refused."""
    norm = _norm(4)
    x = torch.randn(2, 4, size, size)
    with pytest.raises((RuntimeError, NotImplementedError)):
        F.batch_norm_act(x, *norm, torch.zeros(x.shape).to(dtype), training=True)
    assert norm[0].abs().max() == 0


def test_strided_matrix() -> None:
    """A transposed (N, C) input raised IndexError."""
    x = torch.randn(8, 4).t()
    norm = _norm(8)
    want = torch.relu(nn.functional.batch_norm(x, *_norm(8), True))
    torch.testing.assert_close(F.batch_norm_act(x, *norm, training=True), want)


def test_evaluated_half_of_a_pair_ignores_infinities_where_no_gradient_flows() -> None:
    x, x2 = torch.randn(2, 4, 16, 32), torch.randn(2, 4, 16, 32)
    x2[0, 0, 0, 0] = -float("inf")
    x.requires_grad_()
    x2.requires_grad_()
    out = F.batch_norm_add_batch_norm_act(x, *_norm(4), x2, *_norm(4), training=True, training2=False)
    _, dx2 = torch.autograd.grad(out, (x, x2), torch.ones_like(out))
    assert dx2[0, 0, 0, 0] == 0
    assert dx2.isfinite().all()
