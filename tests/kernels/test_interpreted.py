"""The Triton kernels without a GPU, run by Triton's interpreter: the files interpret_*.py, each in its own process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SCRIPTS = sorted(Path(__file__).parent.glob("interpret_*.py"))


def run(script: Path, *options: str) -> None:
    environ = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(script)]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_interpreted(script):
    run(script)


@pytest.mark.slow
@pytest.mark.parametrize("script", [s for s in SCRIPTS if "mark.slow" in s.read_text()], ids=lambda script: script.stem)
def test_interpreted_at_length(script):
    run(script, "-m", "slow")
