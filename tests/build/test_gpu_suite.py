"""`pytest -m gpu` without a GPU: all of it is found, and what does not need one runs on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path: Path, *arguments: str, **environ: str) -> str:
    """As `make gpu` runs it: from another folder."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-q"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), str(ROOT / "tests" / "gpu"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_without_a_gpu_everything_is_skipped(tmp_path):
    if torch.cuda.is_available():
        return
    assert re.search(r"^\d{3,} skipped in", run(tmp_path), re.M)


def test_the_suite_itself_works_on_the_cpu(tmp_path):
    """Its logic, on the CPU's backends; the table of cases has tests of its own."""
    out = run(tmp_path, "-k", "not test_rule and not reference", FUSEDRES_GPU_TEST_DEVICE="cpu")
    assert int(re.search(r"(\d+) passed", out)[1]) > 60
