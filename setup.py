"""Extensions and package directories; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
from build_native import BuildNative


def sources(pattern):
    return sorted(path.as_posix() for path in Path().glob(pattern))


setup(
    packages=[*find_packages(include=["fusedres", "fusedres.*"]), "fusedres.kernels"],
    package_dir={"fusedres.kernels": "kernels"},
    ext_modules=[
        Extension("fusedres._C", ["csrc/bindings.cpp"]),
        Extension("fusedres._ops_cpu", sources("csrc/cpu/*.cpp")),
        Extension("fusedres._ops_cuda", sources("csrc/cuda/*.cu")),
    ],
    cmdclass={"build_ext": BuildNative},
)
