"""torch.ops.fusedres.*: opcheck on every op, in the calls the functional forms make."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fusedres
from fusedres import verification
from fusedres.ops import batch_norm_sync


def _registered() -> set[str]:
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fusedres::")
    }
    return {n for n in names if not n.endswith(("_triton", "_cuda"))}


def _flatten(value):
    return (
        [value]
        if isinstance(value, Tensor)
        else [t for v in value for t in _flatten(v)]
        if isinstance(value, (tuple, list))
        else []
    )


def _copy(value):
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.preserve_format)
    return type(value)(_copy(v) for v in value) if isinstance(value, (tuple, list)) else value


def test_opcheck(call, backend, record_ops) -> None:
    """Schema, mutation annotations, fake kernels (shapes, strides, dtypes) and AOT dispatch with symbolic shapes."""
    tensors = call.tensors()
    values = [tensors[n] for n in call.names(tensors)]
    inputs = []

    class Record(record_ops):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fusedres":
                inputs.append((func, _copy(args), {k: _copy(v) for k, v in (kwargs or {}).items()}))
            return func(*args, **(kwargs or {}))

    with Record():
        out = call.ours(tensors)
        torch.autograd.grad(out.sum(), values)
    seen = set()
    for op, args, kwargs in inputs:
        if str(op) in seen:
            continue
        seen.add(str(op))
        torch.library.opcheck(op, args, kwargs)
    if (
        backend in ("reference", "cpu")
        and call.case.op not in verification.CONVOLUTIONS
        and not (call.case.op == "add_act" and not call.case.act)
    ):
        assert inputs, "no raw op was called"


def test_every_raw_op_is_exercised(record_ops) -> None:
    """The calls above reach every op that can run on a CPU."""
    from fusedres.functional import add_act

    available = verification.backends("cpu")
    reached = set()
    for name in ("reference", "cpu"):
        if available[name] is not None:
            continue
        with fusedres.use_backend(name), record_ops() as record:
            for op in verification.OPS:
                case = verification.Case(op, shape=(2, 4, 6, 6))
                tensors = verification.make_inputs(case)
                for n in verification.differentiable(tensors):
                    tensors[n].requires_grad_()
                verification.ours(case, tensors).sum().backward()
            add_act(torch.randn(3), torch.randn(3))
            bottleneck = fusedres.Bottleneck(16, 4)
            bottleneck.folding = "always"
            bottleneck(torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)).sum().backward()
            x = torch.randn(2, 4, 3, 3)  # what several processes call
            statistics, apply, reduce, finish = batch_norm_sync.implementations(x)
            _, stats, _ = apply(x, None, statistics(x)[None], *[None] * 5, 0.1, 1e-5, True, False)
            sums, _, _ = reduce(x, x, None, None, stats, None, True, False)
            finish(x, x, None, None, stats, None, sums, True, True, False)
        reached |= {func.__name__.split(".")[0] for func, *_ in record.calls if func.namespace == "fusedres"}
    with record_ops() as record:  # which not every library has
        y, weight = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last), torch.randn(5, 4)
        ops = torch.ops.fusedres
        ops.conv1x1_statistics(y, weight)
        mean, cov = ops.conv1x1_moments(y, None, 1)
        folded, shift, stats, covariance = ops.conv1x1_bn_fold(
            weight[..., None, None], None, None, mean, cov, None, 1e-5, 18, None, y.dtype
        )
        ops.conv1x1_bn_update_running(torch.zeros(5), torch.ones(5), None, 0.1, stats, 18)
        out, mask = ops.conv1x1_bn_act_apply(y, None, folded, shift, 1, None, None, 1, None, None, True, True)
        _, *sums, _ = ops.conv1x1_bn_act_backward_reduce(out, mask, y, None, 1, None, 1, True, True)
        _, _, *of_y = ops.conv1x1_bn_unfold(
            weight[..., None, None], None, mean, covariance, stats, *sums, 18, y.dtype, True, True
        )
        pair = (None, None, None, None, 1)
        ops.conv1x1_bn_act_backward_apply(out, mask, y, None, *of_y, 1, *pair, True, False)
    reached |= {func.__name__.split(".")[0] for func, *_ in record.calls if func.namespace == "fusedres"}
    missing = _registered() - reached
    if available["cpu"] is not None:
        missing = {n for n in missing if n.endswith("_reference")}
    assert not missing, missing


@pytest.mark.parametrize("op", sorted(_registered()))
def test_fake_kernel_on_meta(op) -> None:
    """Each op has a kernel for the meta device (its fake kernel)."""
    assert (
        torch._C._dispatch_has_kernel_for_dispatch_key(f"fusedres::{op}", "Meta")
        or torch._library.simple_registry.singleton.find(f"fusedres::{op}").fake_impl.kernel is not None
    )


def test_outputs_are_fully_written(main_call, backend) -> None:
    """Fresh memory holds NaN: an element that a kernel skips would keep it."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for dtype in (torch.float32, torch.bfloat16):
            tensors = main_call.tensors(torch.float32)
            if "conv_weight" not in tensors:
                for name in ("x", "x2", "residual"):
                    if name in tensors:
                        tensors[name] = tensors[name].detach().to(dtype).requires_grad_()
            values = [tensors[n] for n in main_call.names(tensors)]
            out = main_call.function("ours", tensors)(*values)
            for t in [out, *torch.autograd.grad(out.sum(), values)]:
                assert t.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)
