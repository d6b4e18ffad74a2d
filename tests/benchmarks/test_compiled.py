"""benchmarks/results/compiled.json: of these sources, no spills, no atomics, and no worse than what is built now."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks import compiled
from benchmarks.compiled import Row

ROOT = compiled.ROOT
needs_triton = pytest.mark.skipif(compiled._version("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def table():
    return compiled.read_table()


@pytest.fixture(scope="module")
def rows(table):
    return [Row(**row) for row in table["rows"]]


PER_CHANNEL = (
    "finish_gradients_kernel",
    "finish_statistics_kernel",
    "merge_parts_kernel",
    "summed_gradients_kernel",
)
SUMS = ("gradient_sums_kernel", "statistics_kernel", "pool_winners_kernel")  # whose results are small


def planned_blocks(row: Row) -> int | None:
    """Of 128 threads, that csrc/common/launch_plan.h counts on per multiprocessor; None of kernels it does not plan."""
    if row.source != "nvcc":
        return None
    if row.kernel == "forward_kernel":
        return 4 if row.variant.endswith("(Addend)2") else 6
    if row.kernel in ("backward_kernel", "gradient_sums_kernel"):
        is_apply_on_100 = row.kernel == "backward_kernel" and row.target == "sm_100"
        return 4 if row.variant.endswith("(Relu)2") or is_apply_on_100 else 5
    return 5 if row.kernel == "statistics_kernel" else None


class TestTable:
    def test_is_of_these_sources(self, table):
        assert table["format"] == compiled.FORMAT
        assert compiled.stale(table) == []

    def test_no_spills_and_no_atomics(self, rows):
        assert compiled.broken_promises(rows) == []

    def test_every_family_on_every_target(self, rows):
        for source, targets in (("nvcc", ()), ("triton", ("gfx942",))):
            assert {r.target for r in rows if r.source == source} == {"sm_80", "sm_90", "sm_100", *targets}
        families = [path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")]
        assert len({r.kernel for r in rows if r.source == "nvcc"}) >= 2 * len(families)

    def test_sixteen_bytes_where_tensors_are_walked(self, rows):
        """CUDA: every kernel over activations, but for the variants of add_act and of the stem that go by elements."""
        walk = [r for r in rows if r.source == "nvcc" and r.kernel not in PER_CHANNEL]
        whole = [r for r in walk if not (r.kernel.startswith(("pool_", "add_act")) and r.variant.split(", ")[1] == "1")]
        assert {r.kernel for r in whole} == {r.kernel for r in walk}
        assert [r for r in whole if r.load_bytes != 16] == []
        assert [r for r in whole if r.store_bytes != 16 and r.kernel not in SUMS] == []

    def test_as_many_blocks_fit_a_multiprocessor_as_are_planned(self, rows):
        """Registers, which are given out to warps by the 256. Shared memory: tests/ops/test_launch_plan.py."""
        seen = set()
        for row in rows:
            blocks = planned_blocks(row)
            if blocks is not None:
                seen.add(row.kernel)
                assert blocks * 4 * -(-32 * row.registers // 256) * 256 <= 65536, row
        assert seen == {"forward_kernel", "backward_kernel", "statistics_kernel", "gradient_sums_kernel"}


@needs_triton
class TestAgainstTheBuild:
    @pytest.mark.skipif(compiled.library() is None, reason="_ops_cuda is not built")
    def test_the_installed_library_is_no_worse(self, rows):
        built = compiled.rows_of_library(compiled.library())
        targets = {r.target for r in built}
        assert compiled.broken_promises(built) == []
        stored = [r for r in rows if r.source == "nvcc" and r.target in targets]
        assert compiled.regressions(stored, built) == []

    @pytest.mark.slow
    @pytest.mark.parametrize("source", compiled.SOURCES)
    def test_compiled_again(self, source):
        if source == "nvcc" and shutil.which("nvcc") is None:
            pytest.skip("nvcc is not on PATH")
        command = [sys.executable, "-m", "benchmarks.compiled", "--source", source]
        environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "TRITON_INTERPRET")}
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


A = Row("nvcc", "apply_kernel", "float, 4", "sm_90", 40, 0, 1024, 16, 16, 0)


class TestComparison:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"registers": 49}, "registers=49"),
            ({"spills": 8}, "spills=8"),
            ({"load_bytes": 8}, "narrower"),
            ({"store_bytes": 4}, "narrower"),
            ({"float_atomics": 1}, "float_atomics=1"),
            ({"variant": "float, 2"}, "is gone"),
        ],
    )
    def test_what_is_worse(self, changes, words):
        assert words in "; ".join(compiled.regressions([A], [replace(A, **changes)]))

    def test_what_is_not(self):
        assert compiled.regressions([A], [replace(A, registers=48, shared=2048)]) == []
        assert compiled.regressions([replace(A, spills=16, load_bytes=8)], [A]) == []

    def test_promises(self):
        assert compiled.broken_promises([A]) == []
        assert "spills 8 bytes" in compiled.broken_promises([replace(A, spills=8)])[0]
        assert "2 floating point atomics" in compiled.broken_promises([replace(A, float_atomics=2)])[0]

    def test_stale(self, tmp_path):
        for folders in compiled.SOURCES.values():
            for folder in folders:
                shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
        now = {source: compiled.source_hash(source, tmp_path) for source in compiled.SOURCES}
        assert compiled.stale({"sources": now}, tmp_path) == []
        with (tmp_path / "csrc" / "cuda" / "add_act.cu").open("a") as file:
            file.write("\n")
        (words,) = compiled.stale({"sources": now}, tmp_path)
        assert words.startswith("nvcc: made from sources")
        (tmp_path / "kernels" / "new.py").write_text("")
        assert len(compiled.stale({"sources": now}, tmp_path)) == 2


class TestReading:
    def test_accesses(self):
        names = [".E", ".E.128.CONSTANT", ".E.U16", ".E.64", ".E.S8.STRONG.GPU", ".E.ENL2.256"]
        assert [compiled.access_bytes(n) for n in names] == [4, 16, 2, 8, 1, 32]

    def test_sass(self):
        text = """
            /*0100*/ LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
            /*0110*/ LDG.E.U16 R9, desc[UR4][R2.64] ;
            /*0120*/ STG.E.64 desc[UR4][R2.64], R4 ;
            /*0130*/ RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R4 ;
            /*0140*/ ATOMG.E.ADD.STRONG.GPU PT, R2, desc[UR4][R2.64], R4 ;
        """
        assert compiled.of_sass(text) == {"load_bytes": 16, "store_bytes": 8, "float_atomics": 1}

    @pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
    def test_names(self):
        prefix = "_ZN8fusedres56_GLOBAL__N__eddd91b2_17_batch_norm_act_cu_7755e9cb_19472"
        names = [
            f"{prefix}24backward_one_pass_kernelIN3c104HalfELb0ELNS0_4ReluE2EEEvNS0_17BackwardArgumentsIT_EE",
            f"{prefix}13finish_kernelEv",
        ]
        assert compiled.readable(names) == [("backward_one_pass_kernel", "Half, false, (Relu)2"), ("finish_kernel", "")]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_spills_and_atomics_are_seen(tmp_path):
    """A kernel with both."""
    source = tmp_path / "bad.cu"
    source.write_text(
        "namespace fusedres {\n"
        "__global__ void bad_kernel(float* x, const int* at, int n) {\n"
        "  float a[64];\n"
        "  for (int i = 0; i < n; ++i) a[at[i] & 63] = x[i];\n"
        "  atomicAdd(x, a[n & 63]);\n"
        "}\n"
        "}\n"
    )
    subprocess.run(["nvcc", "-cubin", "-arch=sm_90", source, "-o", tmp_path / "bad.cubin"], check=True)
    rows = list(compiled.rows_of_cubin(tmp_path / "bad.cubin", 90))
    assert [r.kernel for r in rows] == ["bad_kernel"]
    assert len(compiled.broken_promises(rows)) == 2
