"""The Triton kernels compiled for GPUs that are not here: what the machine code has (benchmarks/compiled_triton.py)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ROOT = Path(__file__).parents[2]
REGISTERS = {"80": 255, "90": 255, "100": 255, "gfx942": 512}  # that a thread may have
# (target, cases): every kernel for sm_90, its most used forms for the others; `make test-full` compiles them all
QUICK = [
    ("90", "batch_norm_a* *bf16 channels_last"),
    ("80", "batch_norm_act_backward+residual bf16 channels_last"),
    ("100", "batch_norm_act_backward+residual bf16 channels_last"),
    ("gfx942", "batch_norm_act_backward+residual bf16 channels_last"),
    ("gfx942", "batch_norm_act_max_pool_backward bf16 channels_last"),
    ("90", "batch_norm_statistics bf16 channels_last"),
    ("90", "conv1x1_* bf16 channels_last"),
    ("90", "conv1x1_bn_act_backward_* narrow f32 channels_last"),
    ("80", "conv1x1_bn_act_backward_* narrow bf16 channels_last"),
    ("100", "conv1x1_bn_act_backward_* wide bf16 channels_last"),
    ("gfx942", "conv1x1_bn_act_backward_* narrow bf16 channels_last"),
    ("80", "conv1x1_statistics wide bf16 channels_last"),
    ("100", "conv1x1_statistics narrow bf16 channels_last"),
    ("gfx942", "conv1x1_statistics wide bf16 channels_last"),
    ("90", "conv1x1_bn_* bf16 f32-weight"),
    ("90", "conv1x1_bn_update_running *"),
    ("80", "conv1x1_bn_*fold odd bf16 f32-weight"),
    ("100", "conv1x1_bn_*fold wide bf16 f32-weight"),
    ("gfx942", "conv1x1_bn_*fold wide bf16 f32-weight"),
]
SHARED = {"80": 163 << 10, "90": 227 << 10, "100": 227 << 10, "gfx942": 64 << 10}  # bytes that a program may have
# and every finalise
OF_VECTORS = ("_combine_kernel", "_merge_tiles_kernel", "_merge_parts_kernel", "_coefficients_kernel")
MATRIX = {"80": "mma", "90": "wgmma", "100": "tcgen05", "gfx942": "mfma"}


def compile_rows(tmp_path: Path, targets: str, cases: str) -> list[dict]:
    """In its own process: triton's driver setup and its interpreter exclude each other."""
    environ = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environ.pop("TRITON_INTERPRET", None)
    # The benchmarks are found behind the package that is installed, which the source tree would shadow.
    run = "runpy.run_module('benchmarks.compiled_triton', run_name='__main__')"
    code = f"import runpy, sys; sys.path.append({str(ROOT)!r}); {run}"
    command = [sys.executable, "-c", code, "--targets", targets, "--cases", cases]
    result = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def check_gemm(row: dict, name: str) -> None:
    float64 = " f64 " in row["case"] or ("moments" in row["case"] and " f32 " in row["case"])
    matrix = "mma" if float64 and row["target"] != "gfx942" else MATRIX[row["target"]]
    assert row["matrix"] == matrix, f"{name}: {row['matrix']}"
    # a reduction over rows leaves the float32 accumulators of the tensor cores at every step
    chained = row["kernel"] == "_rows_kernel" or float64
    assert (row["chained_dots"] > 0) == chained, f"{name}: {row['chained_dots']} dots add to earlier ones"
    assert row["shared"] <= SHARED[row["target"]], f"{name}: {row['shared']} bytes of shared memory"
    if " odd " in row["case"]:
        return
    if " unaligned " in row["case"]:
        assert row["load"] >= 8, f"{name}: widest load {row['load']}"
        return
    assert row["load"] == 16, f"{name}: widest load {row['load']}"
    assert row["wide_loads"] >= 4, f"{name}: {row['wide_loads']} loads of 16 bytes"
    # on AMD some results go out as the accumulators lie
    assert row["store"] >= (8 if row["target"] == "gfx942" else 16), f"{name}: widest store {row['store']}"


def check_matrices(row: dict, name: str) -> None:
    multiplies = " known " not in row["case"]
    assert row["matrix"] == ("" if not multiplies else "mfma" if row["target"] == "gfx942" else "mma"), name
    assert row["shared"] <= SHARED[row["target"]], f"{name}: {row['shared']} bytes of shared memory"
    assert row["load"] == 16 or " odd " in row["case"], f"{name}: widest load {row['load']}"


def check(row: dict) -> None:
    name = f"{row['kernel']} in {row['case']} on {row['target']}"
    assert row["spills"] == 0, f"{name} spills"
    assert row["float_atomics"] == 0, f"{name} has float atomics"
    assert row["registers"] <= REGISTERS[row["target"]], f"{name}: {row['registers']} registers"
    if row["kernel"] in ("_rows_kernel", "_columns_kernel"):
        check_gemm(row, name)
        return
    if row["kernel"] in ("_fold_kernel", "_unfold_kernel"):
        check_matrices(row, name)
        return
    assert row["shared"] <= 8192, f"{name}: {row['shared']} bytes of shared memory"
    of_vectors = "finalise" in row["kernel"] or row["kernel"] in OF_VECTORS
    if of_vectors or " odd " in row["case"]:
        return
    if "channels_last" in row["case"]:
        assert row["load"] == 16, f"{name}: widest load {row['load']}"
        assert row["wide_loads"] >= 2, f"{name}: {row['wide_loads']} loads of 16 bytes"
        stores_tensor = "apply" in row["kernel"] or row["kernel"] in ("_pool_kernel", "_one_pass_kernel")
        assert row["store"] == 16 or not stores_tensor, f"{name}: widest store {row['store']}"


@pytest.mark.parametrize(("target", "cases"), QUICK)
def test_compiled(tmp_path, target, cases):
    rows = compile_rows(tmp_path, target, cases)
    assert rows
    for row in rows:
        check(row)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["80", "90", "100", "gfx942"])
def test_every_kernel_compiled(tmp_path, target):
    rows = compile_rows(tmp_path, target, "*")
    assert len({row["kernel"] for row in rows}) == 26
    for row in rows:
        check(row)
