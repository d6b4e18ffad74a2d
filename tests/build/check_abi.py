"""``make check-abi``: the libraries that are built here, under other versions of torch.

1. torch-abi-audit: only stable-ABI symbols, none newer than the oldest torch that we promise.
2. The same files, copied, under each torch of ``ABI_TORCHES`` (pip requirements, each in its own environment below
   build/abi): the libraries load and the ops' numbers are those of eager.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

OLDEST_TORCH = "2.10.0"
TORCHES = os.environ.get("ABI_TORCHES", f"torch=={OLDEST_TORCH} torch==2.13.0").split()
WORK = Path(__file__).resolve().parents[2] / "build" / "abi"

SMOKE = """
import torch, fusedres
from fusedres import functional as F

libraries = fusedres.info()["libraries"]
assert libraries["_ops_cpu"]["loaded"] and libraries["_C"]["loaded"], libraries
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
    x, residual = (torch.randn(4, 24, 9, 7).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    weight, bias = torch.rand(24) + 0.5, torch.randn(24)
    results = []
    for fused in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
        a, r, w, b = leaves
        mean, var = torch.zeros(24), torch.ones(24)
        if fused:
            with fusedres.use_backend("cpu"):
                y = F.add_act(F.batch_norm_act(a, mean, var, w, b, r, training=True), r)
        else:
            y = torch.nn.functional.batch_norm(a.float(), mean, var, w, b, training=True)
            y = ((y + r).relu() + r).relu().to(dtype)
        y.float().square().mean().backward()
        results.append([y, mean, var, *(t.grad for t in leaves)])
    for ours, eagers in zip(*results):
        scale = eagers.float().abs().max().item()
        torch.testing.assert_close(ours.float(), eagers.float(), rtol=0, atol=tolerance * scale)
torch.ops.load_library(libraries["_ops_cpu"]["path"])  # loading twice is harmless
print(f"torch {torch.__version__}: libraries load, add_act and batch_norm_act agree with eager")
"""


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def audit(package: Path) -> None:
    command = [Path(sys.executable).with_name("torch-abi-audit"), "--json", "--check", "torch", str(package)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for library in json.loads(result.stdout)["bundled_libs"]:
        torch_use, name = library["torch"], Path(library["path"]).name
        assert torch_use["stable"], f"{name} does not use the stable ABI: {torch_use}"
        assert version(torch_use["min_torch_version"]) <= version(OLDEST_TORCH), f"{name}: {torch_use}"
        print(f"{name}: {torch_use['stable_shim_count']} stable symbols, torch >= {torch_use['min_torch_version']}")


def environment(requirement: str) -> Path:
    """Python of an environment with that torch: this one, or one made for it and kept, for it may have gigabytes."""
    if requirement == f"torch=={importlib.metadata.version('torch').partition('+')[0]}":
        return Path(sys.executable)
    folder = WORK / requirement.replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
        subprocess.run([*pip, "numpy", requirement], check=True)
        (folder / "ready").touch()
    return python


def main() -> None:
    package = Path(importlib.util.find_spec("fusedres").origin).parent
    audit(package)
    copy = WORK / "package"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(package, copy / "fusedres", ignore=shutil.ignore_patterns("__pycache__"))
    environ = {**os.environ, "PYTHONPATH": str(copy), "FUSEDRES_REQUIRE_EXT": "1", "OMP_NUM_THREADS": "1"}
    for requirement in TORCHES:
        subprocess.run([environment(requirement), "-c", SMOKE], check=True, env=environ, cwd=WORK)


if __name__ == "__main__":
    sys.exit(main())
