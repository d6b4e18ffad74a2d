"""Build of the native libraries: what can be built here, as one ninja file.

``setup.py`` uses `BuildNative`. ``pyproject.toml`` names this module as its build backend: setuptools' own, except that
an isolated build reuses the torch of the environment it is built for (see `build_requirements`).

Environment: ``FUSEDRES_BUILD_CUDA=0|1``, ``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS``, ``CXX``, ``CXXFLAGS``, ``CUDA_HOME``,
``FUSEDRES_CPU_VARIANTS`` (default: ``baseline avx2 avx512``), ``FUSEDRES_SANITIZE=1`` (AddressSanitizer and UBSan).
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parents[1]
MINIMUM_TORCH = (2, 10)
CXX_FLAGS = [
    *("-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),  # never -ffast-math: NaN and Inf must propagate
    f"-DTORCH_TARGET_VERSION=0x{MINIMUM_TORCH[0]:02x}{MINIMUM_TORCH[1]:02x}000000000000ULL",
]
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}
SANITIZE_FLAGS = [
    *("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    # AddressSanitizer sees these as well; with them, and with its checks inline, a file compiles for minutes
    *("-fno-sanitize=null,object-size,vptr", "--param=asan-instrumentation-with-call-threshold=0"),
]
DEFAULT_CUDA_ARCHS = ["8.0", "9.0", "10.0"]


class BuildError(BaseError):
    """Ends the build with one line instead of a traceback."""


# --- the build backend of pyproject.toml


def build_requirements() -> list[str]:
    """torch, unless the environment that the build is for has one.

    Only torch's headers and the names of its libraries are needed, and the stable ABI makes any torch >= 2.10 as good
    as another. So where torch is installed already, an isolated build costs seconds and downloads nothing large; where
    it is not, ``torch>=2.10`` has to be downloaded for the package itself anyway.
    """
    return [] if find_torch() else [f"torch>={MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]}"]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + build_requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + build_requirements()


# --- what this machine has


def torch_version(torch_dir: Path) -> tuple[int, int]:
    match = re.search(r"__version__ = '(\d+)\.(\d+)", (torch_dir / "version.py").read_text())
    return (int(match[1]), int(match[2])) if match else (0, 0)


def find_torch(minimum: tuple[int, int] = MINIMUM_TORCH) -> Path | None:
    """Directory of an installed torch, found without importing it.

    It is on this interpreter's path unless the build is isolated; then it may still be in the site-packages of the
    environment that started the build, which pip's isolation hides.
    """
    spec = importlib.util.find_spec("torch")
    hidden = [*site.getsitepackages(), site.getusersitepackages()]
    found = ([Path(spec.origin).parent] if spec and spec.origin else []) + [Path(path) / "torch" for path in hidden]
    usable = (path for path in found if (path / "version.py").exists() and torch_version(path) >= minimum)
    return next(usable, None)


def find_cxx() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def find_ninja() -> list[str]:
    """The ninja of ``PATH``, or the package of this interpreter, whose environment need not be activated."""
    on_path = shutil.which("ninja")
    if on_path is None and importlib.util.find_spec("ninja") is None:
        raise BuildError("ninja is not found: pip install ninja, or drop --no-build-isolation")
    return [on_path] if on_path else [sys.executable, "-m", "ninja"]


def accepts(cxx: str, flags: list[str]) -> bool:
    command = [cxx, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def find_nvcc() -> str | None:
    """nvcc of ``CUDA_HOME`` if that is set; else of ``PATH``, of the usual place, or of PyPI's nvidia-cuda-nvcc."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=f"{home}/bin")
    wheels = [home for path in site.getsitepackages() for home in sorted(Path(path).glob("nvidia/cu*"), reverse=True)]
    folders = [os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in ["/usr/local/cuda", *wheels])]
    return next(filter(None, (shutil.which("nvcc", path=folder) for folder in folders)), None)


def nvcc_version(nvcc: str) -> tuple[int, int]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def cuda_archs(nvcc: str) -> list[str]:
    """``TORCH_CUDA_ARCH_LIST``, or the default cut to what this nvcc knows; PTX of the last one serves newer GPUs."""
    asked = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if asked != [""]:
        for arch in asked:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
                raise BuildError(f'TORCH_CUDA_ARCH_LIST: got {arch!r}, want numbers such as "8.0;9.0;10.0+PTX"')
        return asked
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    archs = [arch for arch in DEFAULT_CUDA_ARCHS if f"compute_{arch.replace('.', '')}" in known]
    return [*archs[:-1], f"{archs[-1]}+PTX"]


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cudart_flags(nvcc: str) -> list[str]:
    """Link flags of the static CUDA runtime, from the directories of nvcc's own link line or from the PyPI wheels."""
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    plan = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    top = re.search(r"(?m)^#\$ TOP=(.+)$", plan)
    folders = [*re.findall(r'"-L([^"]+)"', plan), *([f"{top[1]}/lib"] if top else [])]
    found = [f"-L{folder}" for folder in dict.fromkeys(folders) if Path(folder, "libcudart_static.a").exists()]
    return [*found, "-lcudart_static", "-ldl", "-lpthread", "-lrt"]


# --- the ninja file


class NinjaFile:
    """Rules and edges of a ninja file that runs in the source tree."""

    def __init__(self, directory: str) -> None:
        self.lines = [f"builddir = {directory}"]

    def rule(self, name: str, command: str, **variables: str) -> None:
        variables = {"command": command, "description": "$out", **variables}
        self.lines += [f"rule {name}", *(f"  {key} = {value}" for key, value in variables.items())]

    def edge(self, output: str, rule: str, inputs: list[str], **variables: str) -> str:
        self.lines.append(f"build {self.escape(output)}: {rule} {' '.join(map(self.escape, inputs))}")
        self.lines += [f"  {key} = {value}" for key, value in variables.items()]
        return output

    @staticmethod
    def escape(path: str) -> str:
        return re.sub(r"([$ :])", r"$\1", path)


def shell(arguments: list[str]) -> str:
    """Arguments as text for a ninja command line."""
    return shlex.join(arguments).replace("$", "$$")


class BuildNative(build_ext):
    """Builds what this machine has the tools for; ``fusedres/_build.json`` says why the rest is missing."""

    def run(self) -> None:
        self.missing = self.why_missing({extension.name for extension in self.extensions})
        for name, reason in self.missing.items():
            print(f"fusedres: {name.removeprefix('fusedres.')} is not built: {reason}", file=sys.stderr)
            Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)  # of an earlier build
        self.extensions = [extension for extension in self.extensions if extension.name not in self.missing]
        super().run()
        report = json.dumps({name.removeprefix("fusedres."): reason for name, reason in self.missing.items()}, indent=2)
        package = ROOT / "fusedres" if self.inplace else Path(self.build_lib) / "fusedres"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(report + "\n")

    def get_ext_filename(self, fullname: str) -> str:
        """``_C`` is a Python module; the others know nothing of Python: ``torch.ops.load_library`` loads them."""
        name = super().get_ext_filename(fullname)
        return name if fullname.endswith("_C") else str(Path(name).with_name(fullname.rpartition(".")[2] + ".so"))

    def why_missing(self, names: set[str]) -> dict[str, str]:
        """Extension -> reason, for those that cannot or shall not be built."""
        self.cxx = find_cxx()
        self.nvcc = None
        if sys.platform != "linux":
            reason = f"native code is built on Linux only, this is {sys.platform}; eager PyTorch serves every op"
            return dict.fromkeys(names, reason)
        if self.cxx is None or not accepts(self.cxx, CXX_FLAGS):
            reason = f"{self.cxx} does not compile C++20" if self.cxx else "no C++ compiler found"
            install = "install g++ >= 11 and reinstall for native kernels (Python and Triton work without)"
            return dict.fromkeys(names, f"{reason}; {install}")
        self.torch = find_torch()
        if self.torch is None:
            wanted = ".".join(map(str, MINIMUM_TORCH))
            old = find_torch(minimum=(0, 0))
            got = f"torch {'.'.join(map(str, torch_version(old)))} in {old}" if old else "no torch"
            remedy = "install it, or drop --no-build-isolation"
            raise BuildError(f"fusedres needs torch>={wanted} to build, found {got}; {remedy}")
        if importlib.util.find_spec("pybind11") is None:
            raise BuildError("pybind11 is not found: pip install pybind11, or drop --no-build-isolation")
        missing = {}
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            missing["fusedres._C"] = "Python.h not found; install Python's development headers (python3-dev)"
        if reason := self.why_no_cuda():
            missing["fusedres._ops_cuda"] = reason
        return missing

    def why_no_cuda(self) -> str | None:
        wanted = os.environ.get("FUSEDRES_BUILD_CUDA", "")
        if wanted not in ("", "0", "1"):
            raise BuildError(f"FUSEDRES_BUILD_CUDA: got {wanted!r}, want 0 or 1")
        if wanted == "0":
            return "FUSEDRES_BUILD_CUDA=0"
        nvcc = find_nvcc()
        if nvcc is None:
            install = "install the CUDA toolkit and put nvcc on PATH, or: pip install nvidia-cuda-nvcc nvidia-cuda-cccl"
            if wanted == "1":
                raise BuildError(f"FUSEDRES_BUILD_CUDA=1, but nvcc is not found; {install}")
            return f"nvcc not found; {install}"
        if wanted != "1":
            torch_cuda = re.search(r"(?m)^cuda\b.*= '(\d+)", (self.torch / "version.py").read_text())
            if torch_cuda is None:
                return "the installed torch has no CUDA; FUSEDRES_BUILD_CUDA=1 builds it all the same"
            if int(torch_cuda[1]) != nvcc_version(nvcc)[0]:
                both = f"nvcc is CUDA {nvcc_version(nvcc)[0]}, torch's is {torch_cuda[1]}"
                return f"{both}, which an older driver may not run; FUSEDRES_BUILD_CUDA=1 builds it all the same"
        self.nvcc = nvcc
        return None

    def build_extensions(self) -> None:
        if not self.extensions:
            return
        sanitize = SANITIZE_FLAGS if os.environ.get("FUSEDRES_SANITIZE") == "1" else []
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}{'-sanitize' if sanitize else ''}"
        self.directory = f"build/native-{tag}"  # kept between builds, so that only what changed is compiled
        self.flags = [*CXX_FLAGS, "-Icsrc", *os.environ.get("CXXFLAGS", "").split(), *sanitize]
        x86 = platform.machine() == "x86_64"
        wanted = os.environ.get("FUSEDRES_CPU_VARIANTS", " ".join(ISA_FLAGS)).split() if x86 else []
        extra = [isa for isa, flags in ISA_FLAGS.items() if isa in wanted and accepts(self.cxx, flags)]
        self.isas = ["baseline", *(isa for isa in extra if isa != "baseline")]
        self.archs = cuda_archs(self.nvcc) if self.nvcc else []

        self.ninja = NinjaFile(self.directory)
        cxx, link = shell([self.cxx]), shell([self.cxx, "-shared", "-Wl,--no-as-needed", *sanitize])
        self.ninja.rule("cxx", f"{cxx} -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
        self.ninja.rule("link", f"{link} $in $flags -o $out")
        self.ninja.rule("stub", f"{cxx} -shared -Wl,-soname,$soname -x c /dev/null -o $out")
        edges = {"_C": self.edges_c, "_ops_cpu": self.edges_cpu, "_ops_cuda": self.edges_cuda}
        libraries = {ext.name: edges[ext.name.rpartition(".")[2]](ext.sources) for ext in self.extensions}
        (ROOT / self.directory).mkdir(parents=True, exist_ok=True)
        (ROOT / self.directory / "build.ninja").write_text("\n".join([*self.ninja.lines, ""]))
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        command = [*find_ninja(), "-f", f"{self.directory}/build.ninja", "-j", jobs]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise BuildError("the native libraries did not compile; the compiler's messages are above")
        for name, library in libraries.items():
            target = Path(self.get_ext_fullpath(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            new = target.with_name(f"{target.name}.new")
            shutil.copy(ROOT / library, new)
            new.replace(target)  # a process that has the old one loaded keeps it

    def compile(self, sources: list[str], flags: list[str], suffix: str = "") -> list[str]:
        """Edges of C++ sources, relative to the source tree, to objects."""
        text = shell([*self.flags, *flags])
        return [self.ninja.edge(f"{self.directory}/{path}{suffix}.o", "cxx", [path], flags=text) for path in sources]

    def link(self, name: str, objects: list[str], libraries: list[str], flags: list[str] | None = None) -> str:
        """A shared library that needs torch's libraries by name and finds them in the process: torch is imported first.

        Where the torch at hand lacks one (libtorch_cuda in a CPU build), an empty stub of that name stands in.
        """
        paths = []
        for soname in libraries:
            path = self.torch / "lib" / soname
            stub = f"{self.directory}/stub/{soname}"
            paths.append(str(path) if path.exists() else self.ninja.edge(stub, "stub", [], soname=soname))
        return self.ninja.edge(f"{self.directory}/{name}", "link", [*objects, *paths], flags=shell(flags or []))

    def torch_includes(self) -> list[str]:
        return ["-isystem", str(self.torch / "include")]

    def edges_c(self, sources: list[str]) -> str:
        import pybind11

        version = re.search(r'__version__ = "(.+)"', (ROOT / "fusedres/_version.py").read_text())
        defines = {
            "FUSEDRES_VERSION": version[1],
            "FUSEDRES_CXX_FLAGS": " ".join(self.flags),
            "FUSEDRES_ISAS": " ".join(self.isas),
            "FUSEDRES_CUDA_VERSION": ".".join(map(str, nvcc_version(self.nvcc))) if self.nvcc else "",
            "FUSEDRES_CUDA_ARCHS": " ".join(self.archs),
        }
        includes = [*("-isystem", pybind11.get_include()), *("-isystem", sysconfig.get_path("include"))]
        includes += self.torch_includes()
        flags = [*includes, *(f'-D{name}="{value}"' for name, value in defines.items())]
        return self.link("_C.so", self.compile(sources, flags), [])

    def edges_cpu(self, sources: list[str]) -> str:
        """Each source is compiled once per instruction set for its kernels, and once to register the ops with torch."""
        without = [f"-DFUSEDRES_WITHOUT_{isa.upper()}" for isa in ISA_FLAGS if isa not in self.isas]
        sources = sorted(sources, key=lambda path: -(ROOT / path).stat().st_size)  # the longest to compile first
        objects = []
        for isa in self.isas:
            objects += self.compile(sources, [*ISA_FLAGS[isa], f"-DFUSEDRES_ISA={isa}"], f".{isa}")
        objects += self.compile(sources, [*without, *self.torch_includes()])
        return self.link("_ops_cpu.so", objects, ["libtorch_cpu.so"])

    def edges_cuda(self, sources: list[str]) -> str:
        defines = ["-DUSE_CUDA", *(flag for flag in CXX_FLAGS if flag.startswith("-D"))]
        host = ["-ccbin", self.cxx, "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
        flags = ["-std=c++20", "-O3", "-Icsrc", *defines, *self.torch_includes(), *host, *gencode(self.archs)]
        compile_command = f"{shell([self.nvcc, '--threads=0'])} -MMD -MF $out.d $flags -c $in -o $out"
        self.ninja.rule("nvcc", compile_command, depfile="$out.d", deps="gcc")
        text = shell(flags)
        objects = [self.ninja.edge(f"{self.directory}/{path}.o", "nvcc", [path], flags=text) for path in sources]
        runtime = [*cudart_flags(self.nvcc), "-Wl,--exclude-libs,ALL"]
        return self.link("_ops_cuda.so", objects, ["libtorch_cuda.so", "libtorch_cpu.so"], runtime)
