"""The package as it is installed: its version, its libraries, and what it says when one of them is bad."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fusedres

PACKAGE = Path(fusedres.__file__).parent
CUDA_LIBRARY = PACKAGE / "_ops_cuda.so"
needs_libraries = pytest.mark.skipif(not (PACKAGE / "_ops_cpu.so").exists(), reason="native libraries are not built")


def test_one_version():
    assert importlib.metadata.version("fusedres") == fusedres.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", fusedres.__version__)
    if fusedres.info()["libraries"]["_C"]["loaded"]:
        from fusedres import _C

        assert _C.build_info()["version"] == fusedres.__version__


def test_required_libraries_are_there():
    """What CI asks for: FUSEDRES_REQUIRE_EXT=1 and, where CUDA is to be built, the CUDA library."""
    if os.environ.get("FUSEDRES_REQUIRE_EXT") != "1":
        pytest.skip("FUSEDRES_REQUIRE_EXT is not 1")
    libraries = fusedres.info()["libraries"]
    assert libraries["_C"]["loaded"]
    assert libraries["_ops_cpu"]["loaded"]
    if os.environ.get("FUSEDRES_BUILD_CUDA") == "1":
        assert CUDA_LIBRARY.exists()


@needs_libraries
def test_cpu_capability(python):
    from fusedres import _C

    variants = _C.build_info()["cpu_variants"]
    assert _C.cpu_capability() in ("baseline", "avx2", "avx512")
    code = "from fusedres import _C; print(_C.cpu_capability())"
    for variant in variants:
        environ = {**os.environ, "FUSEDRES_CPU_CAPABILITY": variant}
        got = python("-c", code, env=environ).stdout.strip()
        order = ["baseline", "avx2", "avx512"]
        assert got == min(variant, _C.cpu_capability(), key=order.index)  # lowers, never raises


@pytest.fixture
def copied_package(tmp_path):
    """A copy of the package that a test may damage, and an environment in which it is the one that is imported."""
    shutil.copytree(PACKAGE, tmp_path / "fusedres", ignore=shutil.ignore_patterns("__pycache__"))
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environ.pop("FUSEDRES_REQUIRE_EXT", None)
    return tmp_path, environ


@needs_libraries
def test_a_library_that_does_not_load(copied_package, python):
    folder, environ = copied_package
    (folder / "fusedres" / "_ops_cpu.so").write_bytes(b"not a library")
    code = """
import torch, fusedres
x = torch.randn(2, 3, 4, 5)
assert torch.equal(fusedres.functional.add_act(x, x), (x + x).relu())
library = fusedres.info()["libraries"]["_ops_cpu"]
assert not library["loaded"]
print(library["error"])
"""
    result = python("-c", code, env=environ, cwd=folder)
    assert result.returncode == 0, result.stdout
    assert "_ops_cpu.so" in result.stdout  # the loader's words: file and reason
    assert "file too short" in result.stdout or "invalid ELF header" in result.stdout
    result = python("-c", "import fusedres", env={**environ, "FUSEDRES_REQUIRE_EXT": "1"}, cwd=folder)
    assert result.returncode != 0
    assert "FUSEDRES_REQUIRE_EXT=1, but _ops_cpu did not load" in result.stdout.splitlines()[-1]


def test_torch_older_than_supported(python):
    code = "import torch; torch.__version__ = '2.9.1'; import fusedres"
    result = python("-c", code)
    assert result.returncode != 0
    last = result.stdout.strip().splitlines()[-1]
    assert last.startswith("ImportError")
    assert "2.10" in last
    assert "2.9.1" in last


@pytest.fixture(scope="module")
def cuobjdump():
    """cuobjdump and its nvdisasm come with Triton."""
    triton = pytest.importorskip("triton")
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not CUDA_LIBRARY.exists():
        pytest.skip("_ops_cuda is not built")

    def run(*arguments: str) -> str:
        environ = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
        command = [folder / "cuobjdump", *arguments, CUDA_LIBRARY]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environ).stdout

    return run


class TestCudaLibrary:
    def test_architectures(self, cuobjdump):
        from fusedres import _C

        built = set(re.findall(r"sm_(\d+)[af]?\.cubin", cuobjdump("--list-elf")))
        assert built == {
            arch.removesuffix("+PTX").rstrip("af").replace(".", "") for arch in _C.build_info()["cuda_archs"]
        }
        assert "compute" in cuobjdump("--list-ptx") or "ptx" in cuobjdump("--list-ptx")

    def test_no_spills(self, cuobjdump):
        usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", cuobjdump("-res-usage"))
        assert len(usage) >= 3 * 4 * 2 * 5  # architectures, dtypes, widths, kernels
        for function, registers, stack in usage:
            assert int(stack) == 0, f"{function} spills"
            # The other kernels' registers are in benchmarks/results/compiled.json.
            assert int(registers) <= 64 or "add_act" not in function, f"{function} uses {registers} registers"

    @pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
    def test_wide_accesses(self, cuobjdump, arch):
        """The 16-byte variants load and store 16 bytes, at least half of a thread's loads before its first store."""
        functions = re.split(r"\n\s*Function : ", cuobjdump("-sass", "-arch", arch))[1:]
        widths = {"N3c108BFloat16E": 8, "N3c104HalfE": 8, "f": 4, "d": 2}
        checked = 0
        for function in functions:
            match = re.match(r"\S*?add_act_(backward_)?kernelI(N3c108BFloat16E|N3c104HalfE|f|d)Li(\d)E", function)
            if match is None or widths[match[2]] != int(match[3]):
                continue
            accesses = "".join(re.findall(r"\b(LD|ST)G\.E(?:\.\w+)*?\.128\b", function))
            loads = 4 if match[1] else 8
            assert "LD" * (loads // 2) in accesses, f"{function.splitlines()[0]}: {accesses}"
            assert accesses.count("LD") >= loads
            assert accesses.count("ST") >= 4
            checked += 1
        assert checked == 4 * (4 + 1)  # dtypes, (with and without ReLU and mask, backward)

    def test_needs_only_what_torch_brings(self):
        """The CUDA runtime is inside; torch's libraries are named, so that the process's own are used."""
        readelf = shutil.which("readelf")
        if readelf is None or not CUDA_LIBRARY.exists():
            pytest.skip("no readelf, or _ops_cuda is not built")
        dynamic = subprocess.run([readelf, "-d", CUDA_LIBRARY], capture_output=True, text=True, check=True).stdout
        needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
        assert {"libtorch_cuda.so", "libtorch_cpu.so"} <= needed
        system = ("libc.", "libm.", "libstdc++.", "libgcc_s.", "libdl.", "libpthread.", "librt.", "ld-linux")
        assert all(name.startswith(system) for name in needed if not name.startswith("libtorch"))
        assert "RPATH" not in dynamic
        assert "RUNPATH" not in dynamic
