"""Triton's add_act without a GPU: run by the interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# Compiles a kernel for every target, dtype and direction, and prints what the machine code has. In its own process:
# triton's driver setup and its interpreter exclude each other.
COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fusedres.kernels import add_act as kernels

targets = [GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)] + [GPUTarget("hip", "gfx942", 64)]
for target in targets:
    for dtype in ("fp32", "bf16", "fp16", "fp64"):
        data, mask, count = f"*{dtype}", "*u8", "i64"
        forward = dict(x_ptr=data, residual_ptr=data, out_ptr=data, mask_ptr=mask, n=count, mask_bytes=count)
        backward = dict(dy_ptr=data, mask_ptr=mask, dx_ptr=data, n=count, mask_bytes=count)
        for kernel, arguments, constants in (
            (kernels._add_act_kernel, forward, dict(RELU=True, SAVE_MASK=True, BLOCK=kernels.BLOCK)),
            (kernels._add_act_backward_kernel, backward, dict(BLOCK=kernels.BLOCK)),
        ):
            signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
            # all but mask_bytes, which need not be a multiple of 16
            attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(arguments) - 1)}
            source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
            built = triton.compile(source, target=target, options={"num_warps": kernels.WARPS})
            if target.backend == "cuda":
                wide = len(re.findall(r"ld\\.global\\S*\\.v[24]\\.b(?:32|64)", built.asm["ptx"]))
                wide_stores = len(re.findall(r"st\\.global\\S*\\.v[24]\\.b(?:32|64)", built.asm["ptx"]))
                spills = built.asm["ptx"].count(".local")
            else:
                wide = built.asm["amdgcn"].count("load_dwordx4")
                wide_stores = built.asm["amdgcn"].count("store_dwordx4")
                spills = int(re.search(r"vgpr_spill_count: *(\\d+)", built.asm["amdgcn"])[1])
            print(target.arch, dtype, kernel.fn.__name__, wide, wide_stores, spills)
"""


def test_interpreted():
    script = Path(__file__).with_name("interpret_add_act.py")
    environ = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(script)]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


def test_compiled_for_gpus(tmp_path):
    environ = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environ.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert len(rows) == 4 * 4 * 2
    for arch, dtype, kernel, loads, stores, spills in rows:
        row = f"{kernel} {dtype} on {arch}"
        per_tensor = 4 if dtype == "fp32" else 8 if dtype == "fp64" else 2  # of 16 bytes, for 16 elements per thread
        if arch == "gfx942":
            per_tensor //= 2  # wavefronts of 64: half as many elements per thread
        tensors = 2 if kernel == "_add_act_kernel" else 1
        assert int(loads) >= tensors * per_tensor, f"{row}: {loads} loads of 16 bytes"
        assert int(stores) >= per_tensor, f"{row}: {stores} stores of 16 bytes"
        assert int(spills) == 0, f"{row} spills"
