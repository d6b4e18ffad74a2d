"""Two gloo processes under torchrun: the same parameters everywhere, and less loss than in the beginning."""

import csv
import os
import subprocess
import sys
from pathlib import Path

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


def test_two_processes(tmp_path):
    settings = [
        "--data",
        "synthetic:128",
        "--image-size",
        "8",
        "--batch-size",
        "16",
        "--epochs",
        "3",
        "--device",
        "cpu",
    ]
    done = torchrun(tmp_path, *settings, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(ranks[0]["parameters"], ranks[1]["parameters"])
    assert torch.equal(ranks[0]["momentum"], ranks[1]["momentum"])
    assert sorted(torch.cat([rank["seen"] for rank in ranks]).tolist()) == list(range(128))

    with (tmp_path / "out" / "steps.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 3 * 4  # 128 images over two processes in batches of 16
    assert losses[-1] < 0.8 * losses[0]
    assert done.stdout.count("epoch 3/3") == 1  # one process writes
    assert "2 processes, each on 1 CPU thread" in done.stdout

    state = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    assert state["world_size"] == len(state["random"]["cpu"]) == 2
    again = torchrun(tmp_path, "--out", str(tmp_path / "out"), "--resume", "--epochs", "4")
    assert again.returncode == 0, again.stderr
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["epoch"] == 4
