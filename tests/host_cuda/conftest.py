"""Compiles .cu files for the host, with the cuda_runtime.h of this folder, and loads them."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedres.ops import registry

_HERE = Path(__file__).parent
_CSRC = _HERE.parents[1] / "csrc"
_FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wno-unknown-pragmas"),
]
_SANITIZE = [
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=null,object-size,vptr"),
    *("-fsanitize-sections=host_cuda_shared.*", "--param=asan-instrumentation-with-call-threshold=0"),
]
_IS_SANITIZED = os.environ.get("FUSEDRES_SANITIZE") == "1"
_MOST_CASES = 12  # of one test, under the sanitizers
_SCHEMAS = torch.library.Library("fusedres_host", "DEF")

_REGISTERED = r'm\.impl\("(\w+)"'

# In which order blocks, warps and lanes take turns: see block.h.
ORDERS = ("forward", "reverse", "1", "2")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under the sanitizers, a few cases of every test, always the same: compiling takes most of the time as it is."""
    if not _IS_SANITIZED:
        return
    cases: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if item.path.parent == _HERE:
            cases.setdefault((item.path, item.originalname), []).append(item)
    draw = random.Random(0)
    kept = {item for those in cases.values() for item in draw.sample(those, min(len(those), _MOST_CASES))}
    left_out = {item for those in cases.values() for item in those} - kept
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def compile_for_host():
    """``compile(source, target, *flags)``; ``sanitize`` says whether with AddressSanitizer and UBSan."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")

    def run(source: Path, target: Path, *flags: object, sanitize: bool) -> Path:
        inputs = ["-x", "c++", source, "-x", "none", f"-Wl,-T,{_HERE / 'shared_memory.ld'}"]
        options = [*_FLAGS, *(_SANITIZE if sanitize else []), f"-I{_HERE}", f"-I{_CSRC}"]
        subprocess.run([compiler, *options, *inputs, *flags, "-o", target], check=True)
        return target

    return run


@pytest.fixture(scope="session")
def host_cuda_ops(compile_for_host, tmp_path_factory):
    """``load("add_act")`` -> namespace of the family's CUDA ops, which take CPU tensors here."""
    loaded = set()

    def load(family: str):
        if family not in loaded:
            source = _CSRC / "cuda" / f"{family}.cu"
            torch_home = Path(torch.__file__).parent
            library = compile_for_host(
                source,
                tmp_path_factory.mktemp("host_cuda") / f"{family}.so",
                *("-isystem", torch_home / "include", "-include", _HERE / "torch_on_host.h"),
                *("-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-shared", "-Wl,-Bsymbolic"),
                torch_home / "lib" / "libtorch_cpu.so",
                sanitize=_IS_SANITIZED,
            )
            for op in re.findall(_REGISTERED, source.read_text()):
                schema = getattr(torch.ops.fusedres, op).default._schema
                _SCHEMAS.define(str(schema).removeprefix("fusedres::"))
            torch.ops.load_library(library)
            loaded.add(family)
        return torch.ops.fusedres_host

    return load


@pytest.fixture
def host_cuda_backend(host_cuda_ops, monkeypatch):
    """``use("add_act")``: until the test ends, the family's CUDA ops are what backend "cpu" is."""

    def use(family: str):
        ops = host_cuda_ops(family)
        for name in re.findall(_REGISTERED, (_CSRC / "cuda" / f"{family}.cu").read_text()):
            monkeypatch.setattr(registry.OPS[name], "cpu", getattr(ops, name).default)
        monkeypatch.setattr(registry, "_forced", "cpu")
        return ops

    return use


@pytest.fixture(autouse=True)
def _poison():
    """Uninitialised memory is NaN (uint8: 255), so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _bits(result: Any) -> list[bytes]:
    results = result if isinstance(result, (tuple, list)) else [result]
    return [t.contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in results]


@pytest.fixture
def in_every_order(monkeypatch):
    """``in_every_order(call)`` -> what it returns, which has the same bits whatever the order of the threads."""

    def run(call: Callable[[], Any]) -> Any:
        results = []
        for order in ORDERS:
            monkeypatch.setenv("HOST_CUDA_ORDER", order)
            results.append(call())
            assert _bits(results[-1]) == _bits(results[0]), f"order {order} differs from {ORDERS[0]}"
        return results[0]

    return run
