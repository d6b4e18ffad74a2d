"""compute-sanitizer on a short subset: out-of-bounds and uninitialised accesses, races in shared memory, barriers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import BACKENDS, DEVICE, why_not

pytestmark = pytest.mark.gpu

SUBSET = Path(__file__).with_name("sanitized.py")
UNSUPPORTED = ("Device not supported", "No attachable process", "error 999", "Unable to find injection")
TIMEOUT = 75


def sanitizer() -> str | None:
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


@pytest.mark.parametrize("backend", BACKENDS)
def test_subset_runs(backend):
    """The subset itself, without the sanitizer."""
    if reason := why_not(backend, "batch_norm_act_max_pool"):
        pytest.skip(reason)
    done = subprocess.run([sys.executable, SUBSET, backend, DEVICE], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "24 calls"


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer_finds_nothing(tool, needs_gpu):
    program = sanitizer()
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    if reason := why_not("cuda", "batch_norm_act_max_pool"):
        pytest.skip(reason)
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, str(SUBSET), "cuda", DEVICE]
    environ = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor its own allocation, with its own end
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environ)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} took more than {TIMEOUT} s")
    output = done.stdout + done.stderr
    if any(text in output for text in UNSUPPORTED):
        pytest.skip(f"{tool} does not run on this machine: {output.strip().splitlines()[0]}")
    assert done.returncode == 0, output[-4000:]
    assert "24 calls" in output
    assert "ERROR SUMMARY: 0 errors" in output or "RACECHECK SUMMARY: 0 hazards" in output, output[-4000:]
