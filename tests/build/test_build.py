"""The native build: what it compiles again, what it says when a tool is missing, what it makes of the environment."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from setuptools import Distribution, Extension

BUILD = ["setup.py", "-q", "build_ext", "--inplace"]


def compiled(output: str) -> set[str]:
    """Objects that ninja says it made."""
    return {Path(line.split()[-1]).name for line in output.splitlines() if re.match(r"\[\d+/\d+\] .*\.o$", line)}


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_touched_file_is_the_only_one_compiled(small_source_tree, build_environment, python):
    options = {"cwd": small_source_tree, "env": build_environment}
    first = python(*BUILD, **options)
    assert first.returncode == 0, first.stdout
    variants = {name for name in compiled(first.stdout) if name.startswith("first.cpp")}
    assert {"first.cpp.o", "first.cpp.baseline.o"} <= variants
    assert compiled(first.stdout) == variants | {name.replace("first", "second") for name in variants} | {
        "bindings.cpp.o"
    }
    assert compiled(python(*BUILD, **options).stdout) == set()

    source = small_source_tree / "csrc" / "cpu" / "first.cpp"
    source.write_text(source.read_text() + "// changed\n")
    assert compiled(python(*BUILD, **options).stdout) == variants
    (small_source_tree / "csrc" / "cpu" / "first.h").write_text("// changed\n")
    assert compiled(python(*BUILD, **options).stdout) == variants - {"first.cpp.o"}

    # what a source's error looks like: the compiler's words, then one line
    source.write_text("#error broken on purpose\n")
    broken = python(*BUILD, **options)
    assert broken.returncode != 0
    assert "broken on purpose" in broken.stdout
    assert "Traceback" not in broken.stdout
    assert broken.stdout.strip().splitlines()[-1].startswith("error: the native libraries did not compile")


def test_without_compiler_the_package_is_complete_but_for_its_libraries(
    source_tree, build_environment, python, tmp_path
):
    """Installs, says why it is slower, serves every op by eager PyTorch, and puts nothing else into site-packages."""
    target = tmp_path / "site-packages"
    install = ["-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--target", target, source_tree]
    result = python(*install, env={**build_environment, "CXX": "no-such-compiler"})
    assert result.returncode == 0, result.stdout
    assert re.search(r"fusedres: _ops_cpu is not built: no C\+\+ compiler found; install g\+\+", result.stdout)
    names = {path.name for path in target.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"fusedres", "bin"}
    assert not list(target.rglob("*.so"))
    assert (target / "fusedres" / "kernels" / "add_act.py").exists()
    assert set(json.loads((target / "fusedres" / "_build.json").read_text())) == {"_C", "_ops_cpu", "_ops_cuda"}

    code = """
import torch, fusedres
x, r = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
assert torch.equal(fusedres.functional.add_act(x, r), (x + r).relu())
info = fusedres.info()
assert fusedres.__file__.startswith({target!r}), fusedres.__file__
assert not any(library["loaded"] for library in info["libraries"].values())
print(info["libraries"]["_ops_cpu"]["error"])
"""
    environ = {**build_environment, "PYTHONPATH": str(target)}
    result = python("-c", code.format(target=str(target)), env=environ, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "no C++ compiler" in result.stdout


@pytest.fixture
def command(build_native, build_environment):
    """A build command that has been asked nothing yet."""
    names = ["_C", "_ops_cpu", "_ops_cuda"]
    extensions = [Extension(f"fusedres.{name}", []) for name in names]
    command = build_native.BuildNative(Distribution({"name": "fusedres", "ext_modules": extensions}))
    command.torch = Path(torch.__file__).parent
    return command


class TestCuda:
    def test_not_wanted(self, command, monkeypatch):
        monkeypatch.setenv("FUSEDRES_BUILD_CUDA", "0")
        assert command.why_no_cuda() == "FUSEDRES_BUILD_CUDA=0"

    def test_no_nvcc(self, command, monkeypatch):
        monkeypatch.setenv("CUDA_HOME", "/nonexistent")
        assert "nvcc not found" in command.why_no_cuda()

    def test_no_nvcc_but_wanted(self, source_tree, build_environment, python):
        environ = {**build_environment, "FUSEDRES_BUILD_CUDA": "1", "CUDA_HOME": "/nonexistent"}
        result = python(*BUILD, cwd=source_tree, env=environ)
        assert result.returncode != 0
        (line,) = result.stdout.strip().splitlines()
        assert line.startswith("error: FUSEDRES_BUILD_CUDA=1, but nvcc is not found")
        assert "pip install nvidia-cuda-nvcc" in line

    def test_bad_value(self, command, build_native, monkeypatch):
        monkeypatch.setenv("FUSEDRES_BUILD_CUDA", "yes")
        with pytest.raises(build_native.BuildError, match="FUSEDRES_BUILD_CUDA: got 'yes', want 0 or 1"):
            command.why_no_cuda()

    @pytest.mark.parametrize(
        ("torch_cuda", "nvcc", "reason"),
        [
            ("None", (13, 0), "the installed torch has no CUDA"),
            ("'12.8'", (13, 0), "nvcc is CUDA 13, torch's is 12"),
            ("'13.2'", (13, 0), None),
        ],
    )
    def test_default_follows_torch(self, command, build_native, monkeypatch, tmp_path, torch_cuda, nvcc, reason):
        (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\ncuda: Optional[str] = {torch_cuda}\n")
        command.torch = tmp_path
        monkeypatch.setattr(build_native, "find_nvcc", lambda: "/usr/bin/nvcc")
        monkeypatch.setattr(build_native, "nvcc_version", lambda _: nvcc)
        got = command.why_no_cuda()
        assert got is None if reason is None else reason in got
        monkeypatch.setenv("FUSEDRES_BUILD_CUDA", "1")
        assert command.why_no_cuda() is None

    def test_arch_list(self, build_native, monkeypatch):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0a 10.0+PTX")
        archs = build_native.cuda_archs("nvcc")
        assert archs == ["8.6", "9.0a", "10.0+PTX"]
        assert build_native.gencode(archs) == [
            "-gencode=arch=compute_86,code=sm_86",
            "-gencode=arch=compute_90a,code=sm_90a",
            "-gencode=arch=compute_100,code=sm_100",
            "-gencode=arch=compute_100,code=compute_100",
        ]
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
        with pytest.raises(build_native.BuildError, match="TORCH_CUDA_ARCH_LIST: got 'Hopper'"):
            build_native.cuda_archs("nvcc")


def test_torch_too_old_to_build(command, build_native, monkeypatch, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.9.1'\n")
    monkeypatch.setattr(build_native.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build_native.site, "getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setattr(build_native.site, "getusersitepackages", lambda: str(tmp_path / "user"))
    with pytest.raises(build_native.BuildError, match=r"needs torch>=2.10 to build, found torch 2.9"):
        command.why_missing({"fusedres._C"})
    assert build_native.build_requirements() == ["torch>=2.10"]
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.10.0+cpu'\n")
    assert build_native.build_requirements() == []


def test_ninja_of_an_environment_that_is_not_activated(build_native, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    command = build_native.find_ninja()
    assert command == [sys.executable, "-m", "ninja"]
    subprocess.run([*command, "--version"], check=True)
    monkeypatch.setattr(build_native.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build_native.BuildError, match="pip install ninja"):
        build_native.find_ninja()


def test_max_jobs(small_source_tree, build_environment, tmp_path, python):
    """MAX_JOBS reaches ninja: one that only writes down its arguments."""
    ninja = tmp_path / "bin" / "ninja"
    ninja.parent.mkdir()
    ninja.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nexit 1\n')
    ninja.chmod(0o755)
    environ = {**build_environment, "MAX_JOBS": "3", "PATH": f"{ninja.parent}:{build_environment['PATH']}"}
    python(*BUILD, cwd=small_source_tree, env=environ)
    assert (tmp_path / "arguments").read_text().split()[-2:] == ["-j", "3"]


def test_sdist(source_tree, build_environment, python, tmp_path):
    """Everything that a build, the tests and a reader need, and nothing that was built."""
    result = python(
        "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, source_tree, env=build_environment
    )
    assert result.returncode == 0, result.stdout
    (archive,) = tmp_path.glob("fusedres-*.tar.gz")
    listing = subprocess.run(["tar", "-tzf", archive], capture_output=True, text=True, check=True).stdout
    inside = {name.partition("/")[2] for name in listing.splitlines()}
    wanted = {
        path.relative_to(source_tree).as_posix()
        for part in ("csrc", "kernels", "fusedres", "tests", "benchmarks")
        for path in (source_tree / part).rglob("*")
        if path.is_file() and "egg-info" not in path.as_posix()
    }
    assert wanted - inside == set()
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "Makefile"} <= inside
    assert [name for name in inside if name.endswith((".so", ".pyc", "_build.json"))] == []


def check_wheel(folder: Path) -> None:
    (wheel,) = folder.glob("fusedres-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"fusedres"}  # and its .dist-info
    assert {"fusedres/_ops_cpu.so", "fusedres/kernels/__init__.py", "fusedres/kernels/add_act.py"} <= names
    assert any(name.startswith("fusedres/_C.") for name in names)
    assert not any("csrc" in name or "tests" in name for name in names)


@pytest.mark.slow
def test_isolated_build_reuses_torch(small_source_tree, build_environment, python, tmp_path):
    """``pip install .``: what pip downloads for it is small, for torch's headers come from the environment."""
    command = ["-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", tmp_path / "wheels", small_source_tree]
    result = python(*command, env=build_environment)
    assert result.returncode == 0, result.stdout
    assert "Installing build dependencies" in result.stdout  # those of pyproject.toml
    assert "Installing backend dependencies" not in result.stdout  # those that build_native adds: none
    check_wheel(tmp_path / "wheels")


@pytest.mark.slow
def test_build_frontend(small_source_tree, build_environment, python, tmp_path):
    """``python -m build``: sdist, and a wheel from it, in an environment of its own, which needs a torch."""
    version = torch.__version__.partition("+")[0]
    constraint = tmp_path / "constraint.txt"
    constraint.write_text(f"torch=={version}\n")
    environ = {**build_environment, "PIP_CONSTRAINT": str(constraint)}
    result = python("-m", "build", "--outdir", tmp_path / "wheels", small_source_tree, env=environ)
    assert result.returncode == 0, result.stdout
    check_wheel(tmp_path / "wheels")
