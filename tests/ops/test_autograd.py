"""Derivatives: gradcheck and gradgradcheck in float64, functorch transforms, forward mode, checkpointing, hooks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres import functional as F
from fusedres import verification


def test_gradcheck(call, kernel) -> None:
    tensors = call.tensors()
    values = [tensors[name] for name in call.names(tensors)]
    assert gradcheck(call.function("ours", tensors), values, eps=1e-6, atol=1e-6, nondet_tol=0.0)


def test_gradgradcheck(call, kernel) -> None:
    tensors = call.tensors()
    values = [tensors[name] for name in call.names(tensors)]
    assert gradgradcheck(call.function("ours", tensors), values, eps=1e-6, atol=1e-5, nondet_tol=0.0)


def test_double_backward_equals_eager(call, backend) -> None:
    """A gradient penalty, with respect to every input and to dy."""
    if call.case.affine == "bias":
        pytest.skip("eager has no double backward for a bias without a weight; gradgradcheck covers ours")
    results = []
    for which in ("ours", "eager"):
        tensors = call.tensors()
        values = [tensors[name] for name in call.names(tensors)]
        out = call.function(which, tensors)(*values)
        dy = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
        first = torch.autograd.grad(out, values, dy, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        results.append([*first, *torch.autograd.grad(penalty, [*values, dy], allow_unused=True)])
    for mine, theirs in zip(*results, strict=True):
        zero = torch.zeros(())
        mine, theirs = (zero if t is None else t for t in (mine, theirs))
        torch.testing.assert_close(
            mine.expand_as(theirs) if mine.dim() == 0 else mine,
            theirs.expand_as(mine) if theirs.dim() == 0 else theirs,
            rtol=1e-8,
            atol=1e-8,
            check_dtype=False,
        )


def test_float32_double_backward(main_call, backend) -> None:
    results = []
    for which in ("ours", "eager"):
        tensors = main_call.tensors(torch.float32)
        values = [tensors[name] for name in main_call.names(tensors)]
        out = main_call.function(which, tensors)(*values)
        first = torch.autograd.grad(out.square().sum(), values, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), values, allow_unused=True))
    for mine, theirs in zip(*results, strict=True):
        if theirs is not None:
            scale = theirs.abs().max().item()
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * max(scale, 1))


# --- functorch ---


def test_func_grad_and_vjp(call, backend) -> None:
    tensors = call.tensors()
    values = [tensors[name].detach() for name in call.names(tensors)]
    numbers = tuple(range(len(values)))
    results = []
    for which in ("ours", "eager"):
        pure = call.function(which, tensors)
        gradients = torch.func.grad(lambda *v, pure=pure: pure(*v).square().sum(), argnums=numbers)(*values)
        out, pull = torch.func.vjp(pure, *values)
        results.append([out, *gradients, *pull(torch.ones_like(out))])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_func_grad_of_grad(main_call, backend) -> None:
    tensors = main_call.tensors()
    values = [tensors[name].detach() for name in main_call.names(tensors)]
    results = []
    for which in ("ours", "eager"):
        pure = main_call.function(which, tensors)
        inner = torch.func.grad(lambda *v, pure=pure: pure(*v).square().sum())
        results.append(torch.func.grad(lambda *v, inner=inner: inner(*v).square().sum())(*values))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


def test_vmap(call, backend) -> None:
    """Over a leading dimension of x alone; running statistics cannot be updated per example, in eager neither."""
    tensors = call.tensors()
    names = call.names(tensors)
    values = [
        torch.stack([tensors[n].detach(), tensors[n].detach() * 0.5 + 1]) if n == "x" else tensors[n].detach()
        for n in names
    ]
    dims = tuple(0 if n == "x" else None for n in names)
    results = []
    for which in ("ours", "eager"):
        pure = call.function(which, tensors)
        try:
            results.append(torch.func.vmap(pure, dims)(*values))
        except Exception as error:
            results.append(error)
    mine, theirs = results
    if isinstance(theirs, Exception):
        assert isinstance(mine, (Exception, Tensor))
        return
    assert isinstance(mine, Tensor), f"eager can, ours cannot: {mine}"
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_per_sample_gradients(main_call, backend) -> None:
    """vmap of grad, in eval mode and without statistics (what Opacus-like code does)."""
    if main_call.case.training and main_call.case.op != "add_act":
        pytest.skip("per-example training statistics have no meaning")
    tensors = main_call.tensors()
    names = main_call.names(tensors)
    values = [tensors[n].detach() for n in names]
    values[0] = values[0].unsqueeze(1)
    dims = tuple(0 if n == "x" else None for n in names)
    if "residual" in names:
        values[names.index("residual")] = tensors["residual"].detach()[:1]
    results = []
    for which in ("ours", "eager"):
        pure = main_call.function(which, tensors)
        f = torch.func.grad(lambda *v, pure=pure: pure(*v).square().sum(), argnums=tuple(range(len(values))))
        results.append(torch.func.vmap(f, dims)(*values))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_jacrev_and_hessian(backend) -> None:
    weight = torch.tensor([0.7, -1.2], dtype=torch.float64)
    x = torch.randn(2, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def mine(w: Tensor) -> Tensor:
        return F.batch_norm_act(x, None, None, w, training=True).square().sum((0, 2, 3))

    def theirs(w: Tensor) -> Tensor:
        return torch.relu(nn.functional.batch_norm(x, None, None, w, training=True)).square().sum((0, 2, 3))

    torch.testing.assert_close(torch.func.jacrev(mine)(weight), torch.func.jacrev(theirs)(weight))
    second = torch.func.jacrev(torch.func.jacrev(mine))(weight)
    torch.testing.assert_close(second, torch.func.jacrev(torch.func.jacrev(theirs))(weight))


def test_functional_call(backend) -> None:
    """With replaced parameters and buffers: gradients reach the replacements, statistics go into them."""
    mine, theirs = fusedres.BatchNormAct2d(4, act=None), nn.BatchNorm2d(4)
    x = torch.randn(3, 4, 5, 5)
    results = []
    for module in (mine, theirs):
        g = torch.Generator().manual_seed(0)
        parameters = {"weight": torch.rand(4, generator=g) + 0.5, "bias": torch.randn(4, generator=g)}

        def loss(p, module=module):
            buffers = {
                "running_mean": torch.zeros(4),
                "running_var": torch.ones(4),
                "num_batches_tracked": torch.tensor(0),
            }
            return torch.func.functional_call(module, (p, buffers), (x,)).square().sum(), buffers

        gradients, buffers = torch.func.grad(loss, has_aux=True)(parameters)
        direct = {k: v.clone().requires_grad_() for k, v in parameters.items()}
        value, fresh = loss(direct)
        value.backward()
        results.append(
            [*gradients.values(), direct["weight"].grad, direct["bias"].grad, *fresh.values(), *buffers.values()]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert torch.equal(mine.running_mean, torch.zeros(4))


def test_forward_mode(call, backend) -> None:
    """The right tangent, or a clear error; never a lost one."""
    tensors = call.tensors()
    names = call.names(tensors)
    values = [tensors[n].detach() for n in names]
    tangents = [
        torch.randn(v.shape, dtype=v.dtype, generator=torch.Generator().manual_seed(i)) for i, v in enumerate(values)
    ]

    def tangent(which: str) -> Tensor | None:
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(v, t) for v, t in zip(values, tangents, strict=True)]
            return torch.autograd.forward_ad.unpack_dual(call.function(which, tensors)(*duals)).tangent

    try:
        mine = tangent("ours")
    except (NotImplementedError, RuntimeError) as error:
        assert "forward" in str(error).lower() or "jvp" in str(error).lower()  # noqa: PT017
        return
    assert mine is not None, "the tangent was lost"
    torch.testing.assert_close(mine, tangent("eager"), rtol=1e-8, atol=1e-8)


def test_func_jvp(main_call, backend) -> None:
    tensors = main_call.tensors()
    values = tuple(tensors[n].detach() for n in main_call.names(tensors))
    ones = tuple(torch.ones_like(v) for v in values)
    theirs = torch.func.jvp(main_call.function("eager", tensors), values, ones)[1]
    try:
        mine = torch.func.jvp(main_call.function("ours", tensors), values, ones)[1]
    except (NotImplementedError, RuntimeError) as error:
        assert "forward" in str(error).lower() or "jvp" in str(error).lower()  # noqa: PT017
        return
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


# --- what wraps a call ---


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(main_call, backend, reentrant) -> None:
    tensors = main_call.tensors()
    values = [tensors[n] for n in main_call.names(tensors)]
    pure = main_call.function("ours", tensors)
    want = torch.autograd.grad(pure(*values).square().sum(), values)
    checkpoint(pure, *values, use_reentrant=reentrant).square().sum().backward()
    for value, gradient in zip(values, want, strict=True):
        assert torch.equal(value.grad, gradient)


def test_checkpoint_moves_statistics_as_eager_does(backend) -> None:
    mine, theirs = fusedres.BatchNormAct2d(4, act=None), nn.BatchNorm2d(4)
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    for module in (mine, theirs):
        checkpoint(module, x, use_reentrant=False).sum().backward()
    assert mine.num_batches_tracked == theirs.num_batches_tracked
    torch.testing.assert_close(mine.running_mean, theirs.running_mean)
    torch.testing.assert_close(mine.running_var, theirs.running_var)


def test_saved_tensors_hooks_round_trip(main_call, backend) -> None:
    """What is saved can be moved away and brought back (offloading): packed to float64 numbers on the side."""
    tensors = main_call.tensors()
    values = [tensors[n] for n in main_call.names(tensors)]
    pure = main_call.function("ours", tensors)
    want = torch.autograd.grad(pure(*values).square().sum(), values)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        loss = pure(*values).square().sum()
    got = torch.autograd.grad(loss, values)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with torch.autograd.graph.save_on_cpu():
        loss = pure(*values).square().sum()
    got = torch.autograd.grad(loss, values)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_backward_twice(main_call, backend) -> None:
    tensors = main_call.tensors()
    values = [tensors[n] for n in main_call.names(tensors)]
    out = main_call.function("ours", tensors)(*values)
    first = torch.autograd.grad(out.sum(), values, retain_graph=True)
    second = torch.autograd.grad(out.sum(), values)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), values)


def test_tensor_hooks_and_anomaly_mode(main_call, backend) -> None:
    tensors = main_call.tensors()
    values = [tensors[n] for n in main_call.names(tensors)]
    seen = []
    values[0].register_hook(lambda g: seen.append(g.clone()))
    with torch.autograd.detect_anomaly(check_nan=True):
        out = main_call.function("ours", tensors)(*values)
        out.register_hook(lambda g: g * 2)
        out.sum().backward()
    assert len(seen) == 1
    want = torch.autograd.grad(2 * main_call.function("ours", tensors)(*values).sum(), values[0])[0]
    torch.testing.assert_close(values[0].grad, want)


def test_deterministic_algorithms(main_call, backend) -> None:
    tensors = main_call.tensors()
    values = [tensors[n] for n in main_call.names(tensors)]
    torch.use_deterministic_algorithms(True)
    try:
        out = main_call.function("ours", tensors)(*values)  # fresh memory is filled with NaN in this mode
        got = torch.autograd.grad(out.sum(), values)
    finally:
        torch.use_deterministic_algorithms(False)
    want = torch.autograd.grad(main_call.function("ours", tensors)(*values).sum(), values)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(g.isfinite().all() for g in got)


# --- autocast ---


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, residual_dtype, x_dtype, backend, norm_arguments) -> None:
    """Output and gradients in eager's dtypes, parameters and their gradients in float32."""
    results = []
    for which in ("ours", "eager"):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(3, 5, 6, 7, generator=g).to(x_dtype).requires_grad_()
        residual = torch.randn(3, 5, 6, 7, generator=g).to(residual_dtype).requires_grad_() if residual_dtype else None
        arguments = norm_arguments(5)
        with torch.autocast("cpu", dtype):
            if which == "ours":
                out = F.batch_norm_act(x, *arguments, residual, training=True)
            else:
                out = nn.functional.batch_norm(x, *arguments, True)
                out = torch.relu(out if residual is None else out + residual)
        dy = torch.randn(out.shape, generator=g).to(out.dtype)
        leaves = [x, *arguments[2:]] + ([residual] if residual_dtype else [])
        results.append([out, *arguments[:2], *torch.autograd.grad(out, leaves, dy)])
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        if mine.dim() == 4:
            far = (mine - theirs).abs() > 0.2 + 0.02 * theirs.abs()
            assert far.double().mean() < 0.01  # a mask may differ where a pre-activation rounds to zero
        else:
            torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=4.0)  # and then one dy is or is not in a sum


def test_autocast_of_the_other_ops(main_call, backend) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for which in ("ours", "eager"):
            tensors = main_call.tensors(torch.float32)
            if "conv_weight" not in tensors:
                for name in ("x", "x2", "residual"):
                    if name in tensors:
                        tensors[name] = tensors[name].detach().to(dtype).requires_grad_()
            values = [tensors[n] for n in main_call.names(tensors)]
            with torch.autocast("cpu", torch.bfloat16):
                out = main_call.function(which, tensors)(*values)
            results.append([out, *torch.autograd.grad(out.float().sum(), values)])
        for mine, theirs in zip(*results, strict=True):
            assert mine.dtype == theirs.dtype
        torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-2, atol=5e-2)


def test_half_modules(backend) -> None:
    """model.half() and model.bfloat16(): everything in one dtype, statistics too."""
    for dtype in (torch.bfloat16, torch.float16):
        mine, theirs = fusedres.BatchNormAct2d(6, act=None).to(dtype), nn.BatchNorm2d(6).to(dtype)
        x = torch.randn(4, 6, 5, 5).to(dtype).requires_grad_()
        for step in range(3):
            a, b = mine(x + step), theirs(x + step)
            assert a.dtype == b.dtype == dtype
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
            for p, q in zip(mine.buffers(), theirs.buffers(), strict=True):
                torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-2)
        a.sum().backward()
        assert mine.weight.grad.dtype == dtype


def test_every_call_has_cases() -> None:
    """The calls here and the verification table speak of the same ops."""
    from_table = set(verification.OPS)
    assert {
        "batch_norm_act",
        "batch_norm_add_batch_norm_act",
        "batch_norm_act_max_pool",
        "add_act",
        "conv_bn_act",
        "conv1x1_bn_act",
        "conv1x1_bn_add_conv1x1_bn_act",
    } == from_table
