"""PyTorch's own inputs: ModuleInfo of nn.BatchNorm2d and OpInfo of nn.functional.batch_norm (4-D), through ours."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fusedres
from fusedres import functional as F

pytest.importorskip("expecttest")
# Importing torch's test helpers would forbid setting backend flags for the rest of the process; other tests set them.
torch.backends.disable_global_flags = lambda: None
common_modules = pytest.importorskip("torch.testing._internal.common_modules")
common_methods = pytest.importorskip("torch.testing._internal.common_methods_invocations")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 5e-2, torch.float16: 5e-3}


def _close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module_info(dtype, training, backend) -> None:
    info = next(m for m in common_modules.module_db if m.module_cls is nn.BatchNorm2d)
    inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    assert inputs
    for case in inputs:
        args, kwargs = case.constructor_input.args, dict(case.constructor_input.kwargs)
        kwargs.setdefault("dtype", dtype)
        theirs = nn.BatchNorm2d(*args, **kwargs).train(training)
        mine = fusedres.BatchNormAct2d(*args, **kwargs, act=None).train(training)
        mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
        forward_args, forward_kwargs = case.forward_input.args, case.forward_input.kwargs
        results = []
        for module in (mine, theirs):
            inputs_now = [
                a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in forward_args
            ]
            out = module(*inputs_now, **forward_kwargs)
            dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            gradients = torch.autograd.grad(out, [inputs_now[0], *module.parameters()], dy)
            results.append([out, *gradients, *module.buffers()])
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype
            _close(a, b, dtype)


def _op_info():
    return next(o for o in common_methods.op_db if o.name == "nn.functional.batch_norm")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op_info_samples(dtype, backend) -> None:
    info, count = _op_info(), 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        if sample.input.dim() != 4:
            continue
        count += 1
        results = []
        for name in ("ours", "eager"):
            x = sample.input.detach().clone().requires_grad_()
            args = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in sample.args]
            kwargs = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in sample.kwargs.items()}
            leaves = [x]
            for key in ("weight", "bias"):
                if isinstance(kwargs.get(key), torch.Tensor):
                    leaves.append(kwargs[key].requires_grad_())  # noqa: PERF401
            if name == "ours":
                out = F.batch_norm_act(x, *args, **kwargs, act=None)
            else:
                out = nn.functional.batch_norm(x, *args, **kwargs)
            dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
            gradients = torch.autograd.grad(out, leaves, dy)
            results.append([out, *gradients, *(a for a in args if isinstance(a, torch.Tensor))])
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype
            _close(a, b, dtype)
    assert count >= 2


def test_op_info_samples_of_other_ranks(backend) -> None:
    """Two, three and five dimensions run as eager does."""
    for sample in _op_info().sample_inputs("cpu", torch.float32):
        if sample.input.dim() in (1, 4):
            continue
        args = [[a.clone() if isinstance(a, torch.Tensor) else a for a in sample.args] for _ in range(2)]
        mine = F.batch_norm_act(sample.input, *args[0], **sample.kwargs, act=None)
        theirs = nn.functional.batch_norm(sample.input, *args[1], **sample.kwargs)
        torch.testing.assert_close(mine, theirs)
        for a, b in zip(*args, strict=True):
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(a, b)


def test_op_info_errors(backend) -> None:
    """The error inputs of torch's max_pool2d raise the same class through the stem."""
    info = next(o for o in common_methods.op_db if o.name == "nn.functional.max_pool2d")
    count = 0
    for bad in info.error_inputs("cpu"):
        sample = bad.sample_input
        if sample.input.dim() != 4 or not sample.input.is_floating_point() or "return_indices" in sample.kwargs:
            continue
        try:
            nn.functional.max_pool2d(sample.input, *sample.args, **sample.kwargs)
        except Exception as error:
            expected = type(error)
        else:
            continue
        count += 1
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        window = dict(zip(names, sample.args, strict=False)) | sample.kwargs
        window.setdefault("stride", None)
        window.setdefault("padding", 0)
        channels = sample.input.shape[1]
        mean, var = torch.zeros(channels, dtype=sample.input.dtype), torch.ones(channels, dtype=sample.input.dtype)
        with pytest.raises(Exception) as caught:
            F.batch_norm_act_max_pool(sample.input, mean, var, training=True, **window)
        assert type(caught.value) is expected, (caught.value, window)
        assert torch.equal(mean, torch.zeros_like(mean))
    assert count >= 1


def test_module_suite_memory_format(backend) -> None:
    """test_memory_format of torch's module suite: contiguous and channels_last through a BatchNorm."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        module = fusedres.BatchNormAct2d(8, act=None).to(memory_format=memory_format)
        x = torch.randn(4, 8, 9, 9).to(memory_format=memory_format).requires_grad_()
        out = module(x)
        assert out.is_contiguous(memory_format=memory_format)
        out.sum().backward()
        assert x.grad.is_contiguous(memory_format=memory_format)
