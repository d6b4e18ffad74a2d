"""`fusedres train` as a process: what it prints, and Ctrl-C."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

import fusedres

COMMAND = [sys.executable, "-m", "fusedres", "train"]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fusedres.__file__).parents[1])}


def test_control_c_saves_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    arguments = [
        "--data",
        "synthetic:128",
        "--image-size",
        "8",
        "--batch-size",
        "16",
        "--epochs",
        "500",
        "--device",
        "cpu",
        "--out",
    ]
    process = subprocess.Popen(
        [*COMMAND, *arguments, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("epoch   2/500"):
                process.send_signal(signal.SIGINT)
                break
        rest, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors == ""
    assert rest.splitlines()[-1] == f"SIGINT: saved {out}/last.pt; go on with: fusedres train --out {out} --resume"

    state = torch.load(out / "last.pt", weights_only=True)
    done_epochs = state["epoch"]
    assert done_epochs >= 2
    with (out / "epochs.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == done_epochs
    resume = [*COMMAND, "--out", str(out), "--resume", "--epochs", str(done_epochs + 1)]
    done = subprocess.run(resume, capture_output=True, text=True, timeout=120, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert f"epoch {done_epochs + 1}/{done_epochs + 1}" in done.stdout
    assert torch.load(out / "last.pt", weights_only=True)["epoch"] == done_epochs + 1
