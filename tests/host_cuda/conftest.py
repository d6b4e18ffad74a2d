"""Compiles csrc/cuda/<family>.cu for the host, with the cuda_runtime.h of this folder, and loads it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).parent
_CSRC = _HERE.parents[1] / "csrc"
_FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
_SCHEMAS = torch.library.Library("fusedres_host", "DEF")


@pytest.fixture(scope="session")
def host_cuda_ops(tmp_path_factory):
    """``load("add_act")`` -> namespace of the family's CUDA ops, which take CPU tensors here."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sanitize = ["-fsanitize=address,undefined"] if os.environ.get("FUSEDRES_SANITIZE") == "1" else []
    loaded = set()

    def load(family: str):
        if family not in loaded:
            source = _CSRC / "cuda" / f"{family}.cu"
            library = tmp_path_factory.mktemp("host_cuda") / f"{family}.so"
            includes = [f"-I{_HERE}", f"-I{_CSRC}", f"-isystem{Path(torch.__file__).parent / 'include'}"]
            define = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"
            torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
            inputs = ["-x", "c++", source, "-x", "none", torch_cpu]
            flags = [*_FLAGS, *sanitize, *includes, define, "-shared", "-Wl,-Bsymbolic"]
            subprocess.run([compiler, *flags, *inputs, "-o", library], check=True)
            for op in (family, f"{family}_backward"):
                schema = getattr(torch.ops.fusedres, op).default._schema
                _SCHEMAS.define(str(schema).removeprefix("fusedres::"))
            torch.ops.load_library(library)
            loaded.add(family)
        return torch.ops.fusedres_host

    return load
