"""Copies of the source tree, to build in without disturbing it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.so", "_build.json", "*.egg-info", "build", "results")
PARTS = ["csrc", "kernels", "fusedres", "tests", "benchmarks"]
FILES = [
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    ".clang-format",
]


@pytest.fixture
def source_tree(tmp_path) -> Path:
    """The source tree as git knows it: nothing that was built."""
    tree = tmp_path / "fusedres-source"
    tree.mkdir()
    for part in PARTS:
        shutil.copytree(ROOT / part, tree / part, ignore=LEFT_OUT)
    for file in FILES:
        shutil.copy(ROOT / file, tree / file)
    return tree


@pytest.fixture
def small_source_tree(source_tree) -> Path:
    """The same with two small files in place of the kernels, to build in seconds."""
    for path in (source_tree / "csrc" / "cpu").iterdir():
        path.unlink()
    for path in (source_tree / "csrc" / "cuda").glob("*.cu"):
        path.unlink()
    for name in ("first", "second"):
        kernel = f"namespace fusedres::FUSEDRES_ISA {{ float {name}(float x) {{ return x < 0 ? -x : x; }} }}"
        text = f'#ifdef FUSEDRES_ISA\n#include "{name}.h"\n{kernel}\n#endif\n'
        (source_tree / "csrc" / "cpu" / f"{name}.cpp").write_text(text)
        (source_tree / "csrc" / "cpu" / f"{name}.h").touch()
    return source_tree


@pytest.fixture
def build_environment(monkeypatch) -> dict[str, str]:
    """The environment of a build: this one, without what the person who runs the tests set for it."""
    environ = dict(os.environ)
    for name in (
        "FUSEDRES_BUILD_CUDA",
        "FUSEDRES_REQUIRE_EXT",
        "FUSEDRES_SANITIZE",
        "TORCH_CUDA_ARCH_LIST",
        "CXX",
        "CXXFLAGS",
    ):
        environ.pop(name, None)
        monkeypatch.delenv(name, raising=False)
    environ["FUSEDRES_BUILD_CUDA"] = "0"
    return environ


def run(*command: object, **options: object) -> subprocess.CompletedProcess:
    """A command of this interpreter; both streams in ``stdout``."""
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)


@pytest.fixture
def python():
    return run


@pytest.fixture(scope="session")
def build_native():
    """csrc/build_native.py as a module."""
    spec = importlib.util.spec_from_file_location("build_native_under_test", ROOT / "csrc" / "build_native.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
