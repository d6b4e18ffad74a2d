"""``make sanitize``: the native code under AddressSanitizer and UBSan.

Builds the package once more, with the sanitizers, into build/sanitize, and runs the tests of the ops with it, and some
cases of the tests of the CUDA kernels on the host (see tests/host_cuda/conftest.py). torch's own memory comes from the
sanitizer's malloc, so that a kernel that touches one byte beyond a tensor is seen.

Arguments go to pytest in place of the default selection.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "build" / "sanitize"
# Not what only repeats the kernels: sizes of whole networks, other instruction sets, compositions of the same ops.
LEFT_OUT = ("compile", "export", "leak", "over_sizes", "capabilities", "act_conv", "folding_decision")
CHOICE = " and not ".join(["(cpu or host_cuda)", *LEFT_OUT])
TESTS = ["tests/ops", "tests/host_cuda", "-k", CHOICE]


def library_path(name: str) -> str:
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    from fusedres import _C

    environ = {**os.environ, "FUSEDRES_SANITIZE": "1", "FUSEDRES_BUILD_CUDA": "0", "FUSEDRES_REQUIRE_EXT": "1"}
    environ["FUSEDRES_CPU_VARIANTS"] = _C.cpu_capability()  # the one that runs here, beside the baseline
    build = [sys.executable, "setup.py", "-q", "build", "--build-base", str(BASE), "--build-lib", str(BASE / "lib")]
    subprocess.run(build, check=True, cwd=ROOT, env=environ)

    # libstdc++ beside it, for the interpreter does not bring one and the sanitizer looks for its throw at the start
    runtime = " ".join(library_path(name) for name in ("libasan.so", "libstdc++.so"))
    environ.update(
        PYTHONPATH=str(BASE / "lib"),
        LD_PRELOAD=runtime,
        ASAN_OPTIONS="detect_leaks=0:detect_odr_violation=0",  # the interpreter never frees everything
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    options = ["-q", "-p", "no:cacheprovider", "--capture=sys"]  # the sanitizers write to the process's own stderr
    command = [Path(sys.executable).with_name("pytest"), *options, *(sys.argv[1:] or TESTS)]
    return subprocess.run(command, check=False, cwd=ROOT, env=environ).returncode


if __name__ == "__main__":
    sys.exit(main())
