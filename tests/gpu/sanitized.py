"""Kernels at their tails, small enough for compute-sanitizer; run by test_sanitizer.py, not collected."""

from __future__ import annotations

import itertools
import sys

import torch

import fusedres
from fusedres import verification
from fusedres.verification import Case

SHAPES = [(3, 65, 5, 7), (2, 64, 9, 9), (5, 3, 6, 5)]


def main(backend: str, device: str) -> None:
    count = 0
    for op, shape, layout in itertools.product(verification.OPS[:4], SHAPES, ("channels_last", "contiguous")):
        residual = layout if op in ("batch_norm_act", "add_act") else None
        case = Case(op, shape, "bf16", layout, residual=residual)
        tensors = verification.place(verification.make_inputs(case), device)
        leaves = [tensors[name].requires_grad_() for name in verification.differentiable(tensors)]
        with fusedres.use_backend(backend):
            out = verification.ours(case, tensors)
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} calls")


if __name__ == "__main__":
    main(*sys.argv[1:])
