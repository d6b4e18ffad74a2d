"""What is installed, what loaded, and who serves each op."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .ops import registry


def _triton_version() -> str | None:
    # importing triton costs a second; its metadata does not
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _devices() -> list[str]:
    devices = ["cpu"]
    devices += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    if torch.xpu.is_available():
        devices.append("xpu")
    return devices


def info() -> dict[str, Any]:
    """Versions, libraries, SIMD level, devices, and for every op who serves it on each device and why.

    Returns:
        ``version, torch, python, platform, triton``; ``libraries`` (loaded, path and the loader's message of each);
        ``cpu`` (name, threads, capability: the instruction set in use); ``devices``; ``backend`` (forced, or "auto");
        ``choices`` (CUDA device -> the measurements that choose between backends, see ``benchmarks/tune.py``);
        ``ops`` (op -> device -> served_by, why). Devices other than CPU and CUDA are always served by eager PyTorch.
    """
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "triton": _triton_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "libraries": {name: library.as_dict() for name, library in registry.LIBRARIES.items()},
        "cpu": {"name": _cpu_name(), "threads": torch.get_num_threads(), "capability": registry.CPU_CAPABILITY},
        "devices": _devices(),
        "backend": registry.backend(),
        "choices": {f"cuda:{i}": registry.table_of(i).source for i in range(torch.cuda.device_count())},
        "ops": {
            name: {device: registry.served_by(op, device) for device in ("cpu", "cuda")}
            for name, op in registry.OPS.items()
        },
    }
