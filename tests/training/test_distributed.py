"""Two gloo processes under torchrun: the same parameters everywhere, and less loss than in the beginning."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedres

PROBE = """
import sys, torch
import torch.distributed as dist
from fusedres.training import trainer

fit = trainer.Trainer.fit

def probed(self):
    outcome = fit(self)
    flat = torch.cat([p.detach().flatten() for p in self.learner.model.parameters()])
    state = self.learner.optimizer.state
    momentum = torch.cat([state[p]["momentum_buffer"].flatten() for p in self.learner.model.parameters()])
    seen = torch.tensor(sorted(i for batch in self.data.order.batches(0) for i in batch))
    torch.save({"parameters": flat, "momentum": momentum, "seen": seen}, f"{sys.argv[1]}/rank{dist.get_rank()}.pt")
    return outcome

trainer.Trainer.fit = probed
from fusedres.cli import main
sys.exit(main(["train", *sys.argv[2:]]))
"""


def torchrun(folder, *arguments, timeout=240):
    script = folder / "probe.py"
    script.write_text(PROBE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fusedres.__file__).parents[1])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    return subprocess.run(
        [*command, str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        check=False,
    )


def run(folder, *arguments):
    done = torchrun(folder, *arguments, "--out", str(folder / "out"))
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    return done.stdout, ranks, torch.load(folder / "out" / "last.pt", weights_only=True)


SETTINGS = ["--data", "synthetic:128", "--image-size", "8", "--batch-size", "16", "--epochs", "3", "--device", "cpu"]


def test_two_processes(tmp_path):
    printed, ranks, state = run(tmp_path, *SETTINGS)
    assert torch.equal(ranks[0]["parameters"], ranks[1]["parameters"])
    assert torch.equal(ranks[0]["momentum"], ranks[1]["momentum"])
    assert sorted(torch.cat([rank["seen"] for rank in ranks]).tolist()) == list(range(128))

    with (tmp_path / "out" / "steps.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 3 * 4  # 128 images over two processes in batches of 16
    assert losses[-1] < 0.8 * losses[0]
    assert printed.count("epoch 3/3") == 1  # one process writes
    assert "2 processes, each on 1 CPU thread" in printed
    assert state["world_size"] == len(state["random"]["cpu"]) == 2


@pytest.mark.slow
def test_two_processes_resume(tmp_path):
    run(tmp_path, *SETTINGS)
    _, ranks, state = run(tmp_path, "--resume", "--epochs", "4")
    assert state["epoch"] == 4
    assert torch.equal(ranks[0]["parameters"], ranks[1]["parameters"])


@pytest.mark.slow
def test_two_processes_repeat(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    first, second = (run(folder, *SETTINGS)[1][0] for folder in folders)
    assert torch.equal(first["parameters"], second["parameters"])
