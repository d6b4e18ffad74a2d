"""Small tensors run by ATen, with few checks: what it refuses late must not leave anything half updated."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fusedres import functional as F

C = 4
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)
KINDS = {
    "plain": lambda v: v,
    "row": lambda v: v.view(1, C),
    "column": lambda v: v.view(C, 1),
    "short": lambda v: v[:-1],
    "long": lambda v: torch.cat([v, v[:1]]),
    "scalar": lambda v: v[0],
    "meta": lambda v: v.to("meta"),
    "sparse": lambda v: v.to_sparse(),
    "strided": lambda v: v.repeat_interleave(2)[::2],
    "expanded": lambda v: v[:1].expand(C),
    "none": lambda v: None,
}
NAMES = ("running_mean", "running_var", "weight", "bias")


def _vector(name: str, kind: str, dtype: torch.dtype) -> Tensor | None:
    return KINDS[kind](torch.full((C,), 0.0 if name in ("running_mean", "bias") else 1.0).to(dtype))


def _calls(x: Tensor, norm: dict[str, Tensor | None], training: bool, n: Tensor):
    other = {f"{k}2": v for k, v in norm.items()}
    good = {f"{k}2": _vector(k, "plain", torch.float32 if x.dtype is torch.float32 else x.dtype) for k in norm}
    options = {"training": training, "num_batches_tracked": n}
    yield lambda: F.batch_norm_act(x, **norm, **options)
    yield lambda: F.batch_norm_act(x, **norm, residual=x, **options)
    yield lambda: F.batch_norm_act_max_pool(x, **norm, **options)
    yield lambda: F.batch_norm_add_batch_norm_act(x, **norm, x2=x, **good, **options)
    swapped = {k.removesuffix("2"): v for k, v in good.items()}
    yield lambda: F.batch_norm_add_batch_norm_act(x, **swapped, x2=x, **other, **options)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_malformed_vector(name, dtype, training) -> None:
    """Every kind and dtype of one of the four vectors: refused with nothing updated, or served with everything."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, C, 4, 4, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    for kind, other in itertools.product(KINDS, DTYPES):
        norm = {n: _vector(n, "plain", dtype) for n in NAMES}
        try:
            norm[name] = _vector(name, kind, other)
        except (RuntimeError, NotImplementedError):  # no such tensor
            continue
        statistics = [norm[n] for n in NAMES[:2] if norm[n] is not None and kind not in ("meta", "sparse")]
        n = torch.tensor(3)
        for i, call in enumerate(_calls(x, norm, training, n)):
            before = [t.clone() for t in statistics]
            counted = n.item()
            try:
                out = call()
            except (RuntimeError, ValueError, NotImplementedError):
                assert n == counted, (kind, other, i)
                for a, b in zip(before, statistics, strict=True):
                    assert torch.equal(a, b), (kind, other, i)
            else:
                assert kind in ("plain", "strided", "expanded", "none"), (kind, other, i)
                assert out.dtype is dtype
                assert n == counted + training, (kind, other, i)


@pytest.mark.parametrize("size", [4, 64])
@pytest.mark.parametrize("form", ["batch_norm_act", "residual", "pair", "max_pool", "add_act"])
def test_tensor_that_leaked_from_a_transform(form, size) -> None:
    """A wrapper of a transform that is over still has its graph; autograd.Function would cut it off."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, C, size, size, generator=generator)

    def gradients(through_transform: bool) -> list[Tensor]:
        factor = torch.full((C, 1, 1), 1.5, requires_grad=True)
        made: list[Tensor] = []

        def scaled(v: Tensor) -> Tensor:
            made.append(v * factor)
            made.append((factor * v.sum()).view(-1))
            return made[0].sum()

        if through_transform:
            torch.func.grad(scaled)(x)
        else:
            scaled(x)
        y, weight = made
        norm = (None, None, weight)
        out = {
            "batch_norm_act": lambda: F.batch_norm_act(y, *norm, training=True),
            "residual": lambda: F.batch_norm_act(x, *norm, residual=y, training=True),
            "pair": lambda: F.batch_norm_add_batch_norm_act(x, *norm, None, y, *norm, None, training=True),
            "max_pool": lambda: F.batch_norm_act_max_pool(y, *norm, training=True),
            "add_act": lambda: F.add_act(x, y),
        }[form]()
        return [out.detach(), *torch.autograd.grad(out.square().sum(), factor)]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b)
