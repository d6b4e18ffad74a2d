"""What a number depends on: CPU, versions, threads, memory regime, commit. No host names and no paths."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"


def _cpuinfo() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in first.splitlines())}


def cpu_name() -> str:
    info = _cpuinfo()
    name = info.get("model name") or platform.processor() or platform.machine()
    name = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*|\d+-Core", "", name, flags=re.IGNORECASE)
    if not re.search(r"\d", name) and "cpu family" in info:  # a virtual machine may hide the model
        name += f" family {info['cpu family']} model {info.get('model', '?')}"
    return " ".join(name.split())


def device_slug() -> str:
    return "cpu-" + re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")


def _cache_sizes() -> dict[str, str]:
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        row = {
            name: (index / name).read_text().strip() for name in ("type", "level", "size") if (index / name).exists()
        }
        if len(row) == 3 and row["type"] != "Instruction":
            sizes[f"L{row['level']}"] = row["size"]
    return sizes


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../fusedres", "../csrc", ".", ":!results")
        return git("rev-parse", "--short=12", "HEAD") + ("-modified" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(memory_regime: str) -> dict[str, Any]:
    import fusedres

    info = fusedres.info()
    return {
        "cpu": cpu_name(),
        "caches": _cache_sizes(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fusedres_cpu_capability": info["cpu"]["capability"],
        "served_by": {op: row["cpu"]["served_by"] for op, row in info["ops"].items()},
        "threads": torch.get_num_threads(),
        "memory_regime": memory_regime,
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "fusedres": fusedres.__version__,
        "pytest_benchmark": _version("pytest-benchmark"),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
    }


def write_result(name: str, env: dict[str, Any], body: Any, directory: Path | None = None) -> Path:
    """Write `<directory>/<name>.json`, by default under results/<device>/."""
    directory = directory or RESULTS / device_slug()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps({"environment": env, "results": body}, indent=1, default=float) + "\n")
    return path
