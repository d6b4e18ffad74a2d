"""The Triton kernels without a GPU, run by Triton's interpreter: the files interpret_*.py, each in its own process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SCRIPTS = sorted(Path(__file__).parent.glob("interpret_*.py"))


def run(script: Path, folder: Path, *options: str) -> dict[str, list[int]]:
    """Launches, distinct and requested bytes of each kernel."""
    counted = folder / "bytes.json"
    environ = {**os.environ, "TRITON_INTERPRET": "1", "FUSEDRES_BYTES_FILE": str(counted)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(script)]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout
    return json.loads(counted.read_text()) if counted.exists() else {}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_interpreted(script, tmp_path, capsys):
    """Also reports the bytes that were requested beside the distinct ones, which the scripts compare with the model."""
    totals = run(script, tmp_path)
    with capsys.disabled():
        for kernel, (launches, distinct, requested) in sorted(totals.items()):
            times = requested / max(1, distinct)
            print(f"\n{kernel:32s} {launches:5d} launches, {distinct:11,d} bytes, requested {times:5.2f} times", end="")


@pytest.mark.slow
@pytest.mark.parametrize("script", [s for s in SCRIPTS if "mark.slow" in s.read_text()], ids=lambda script: script.stem)
def test_interpreted_at_length(script, tmp_path):
    run(script, tmp_path, "-m", "slow")
