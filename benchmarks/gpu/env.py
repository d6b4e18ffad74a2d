"""What a number measured on a GPU depends on: device, driver, versions, commit. No host names and no paths."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from ..environment import _commit, _version, cpu_name


def slug(device: str) -> str:
    """Name of the directory of results of a device."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def architecture(capability: tuple[int, int]) -> str:
    """For TORCH_CUDA_ARCH_LIST."""
    return f"{capability[0]}.{capability[1]}"


def _first_line(*command: str, pattern: str = "(.+)") -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(pattern, done.stdout)
    return found[1].strip() if found else None


def gpu_environment() -> dict[str, Any]:
    """Facts for env.json; what cannot be told is None."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "triton": _version("triton"),
        "nvcc": _first_line("nvcc", "--version", pattern=r"release ([\d.]+)"),
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks_mhz": _first_line("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits"),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": _commit() or os.environ.get("GIT_COMMIT"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "devices": torch.cuda.device_count(),
            "capability": architecture(torch.cuda.get_device_capability(0)),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "memory_bytes": properties.total_memory,
        }
    try:
        import fusedres
    except ImportError as error:
        return facts | {"fusedres": None, "fusedres_error": str(error)}
    info = fusedres.info()
    libraries = {name: library["error"] or "loaded" for name, library in info["libraries"].items()}
    return facts | {
        "fusedres": info["version"],
        "libraries": {name: re.sub(r"\S*/", "", text) for name, text in libraries.items()},
        "served_by": {op: row["cuda"]["served_by"] for op, row in info["ops"].items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    print(json.dumps(gpu_environment()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
