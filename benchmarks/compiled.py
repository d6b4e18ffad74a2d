"""`python -m benchmarks.compiled`: what the compilers make of every GPU kernel, without a GPU.

Per kernel and target: registers, bytes spilled, shared memory (CUDA: without what a launch adds), widest load and store
from global memory, floating point atomics. CUDA kernels for sm_80, sm_90 and sm_100 from a built library or from nvcc,
Triton kernels ahead of time for these and gfx942, in the variants that the launchers ask for (`compiled_triton.py`).
`--write` renews results/compiled.json, which carries a hash of the sources: the tests fail when it is stale, compare it
with the library that is installed, and in the long tier compile everything again.

    python -m benchmarks.compiled --write             # all; some minutes
    python -m benchmarks.compiled --source triton     # compare one half with the table
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .environment import RESULTS, _version

ROOT = Path(__file__).resolve().parent.parent
TABLE = RESULTS / "compiled.json"
FORMAT = 1
NVIDIA = (80, 90, 100)
SOURCES = {"nvcc": ("csrc/cuda", "csrc/common"), "triton": ("kernels",)}
MORE_REGISTERS = 8  # that do not count as a regression: another release of a compiler


@dataclass(frozen=True)
class Row:
    """One kernel on one target; `variant` is its template arguments, or the case that asked for it."""

    source: str
    kernel: str
    variant: str
    target: str
    registers: int
    spills: int
    shared: int
    load_bytes: int
    store_bytes: int
    float_atomics: int

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.source, self.kernel, self.variant, self.target


NUMBERS = ("registers", "spills", "shared", "load_bytes", "store_bytes", "float_atomics")


def source_hash(source: str, root: Path = ROOT) -> str:
    """Of all files that a half of the table depends on."""
    digest = hashlib.sha256()
    for folder in SOURCES[source]:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".cu", ".h", ".py"):
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# ---- machine code ----------------------------------------------------------------------------------------------------


def tools() -> Path:
    """Folder of cuobjdump and nvdisasm, which come with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def cuobjdump(*arguments: str | Path) -> str:
    folder = tools()
    environ = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    command = [folder / "cuobjdump", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environ).stdout


def access_bytes(modifiers: str) -> int:
    """Of a global access of SASS, from what follows its name: `.E.128.CONSTANT`."""
    found = re.search(r"\.(?:[US])?(8|16|64|128|256)\b", modifiers)
    return int(found[1]) // 8 if found else 4


def of_sass(text: str) -> dict[str, int]:
    """Widest accesses and floating point atomics of one function."""
    loads = [access_bytes(m) for m in re.findall(r"\bLDG(?:STS)?((?:\.\w+)*)", text)]
    stores = [access_bytes(m) for m in re.findall(r"\bSTG((?:\.\w+)*)", text)]
    atomics = re.findall(r"\b(?:RED|ATOM|ATOMG|REDG)(?:\.\w+)*\.(?:F16|BF16|F32|F64)\w*", text)
    return {
        "load_bytes": max(loads, default=0),
        "store_bytes": max(stores, default=0),
        "float_atomics": len(atomics),
    }


def of_cubin(path: Path, *select: str) -> dict[str, dict[str, int]]:
    """Mangled name -> numbers, of one cubin, or of one architecture of a library (`-arch sm_90`)."""
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", cuobjdump("-res-usage", *select, path)
    )
    found = {
        name: {"registers": int(registers), "spills": int(stack) + int(local), "shared": int(shared)}
        for name, registers, stack, shared, local in usage
    }
    for function in re.split(r"\n\s*Function : ", cuobjdump("-sass", *select, path))[1:]:
        found[function.split(None, 1)[0]] |= of_sass(function)
    return found


# ---- CUDA ------------------------------------------------------------------------------------------------------------


def readable(names: Sequence[str]) -> list[tuple[str, str]]:
    """(kernel, template arguments) of mangled names, without namespaces."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    found = []
    for line in text.splitlines():
        plain = re.sub(r"\(anonymous namespace\)::|fusedres::|c10::", "", line).removeprefix("void ")
        name, rest = re.fullmatch(r"(\w+)(.*)", plain).groups()
        found.append((name, template_arguments(rest)))
    return found


def template_arguments(text: str) -> str:
    """`float, 4, true` of `<float, (int)4, true>(float const*, long)`."""
    if not text.startswith("<"):
        return ""
    depth = 0
    for end, character in enumerate(text):  # noqa: B007
        depth += (character == "<") - (character == ">")
        if not depth:
            break
    return re.sub(r"\((?:bool|int|unsigned int|long)\)", "", text[1:end])


def rows_of_cubin(path: Path, arch: int, *select: str) -> Iterator[Row]:
    found = of_cubin(path, *select)
    for (kernel, variant), numbers in zip(readable(list(found)), found.values(), strict=True):
        yield Row("nvcc", kernel, variant, f"sm_{arch}", **numbers)


def rows_of_library(path: Path) -> list[Row]:
    """Of `_ops_cuda.so`, for every architecture that it was built for."""
    built = sorted({int(arch) for arch in re.findall(r"sm_(\d+)[af]?\.cubin", cuobjdump("--list-elf", path))})
    return [row for arch in built for row in rows_of_cubin(path, arch, "-arch", f"sm_{arch}")]


def nvcc_rows(directory: Path, archs: Iterable[int] = NVIDIA) -> list[Row]:
    """Compile every family to a cubin per architecture, with the flags of the build."""
    sys.path.insert(0, str(ROOT / "csrc"))
    from build_native import CXX_FLAGS, find_nvcc, find_torch

    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc is not found")
    defines = ["-DUSE_CUDA", *(flag for flag in CXX_FLAGS if flag.startswith("-D"))]
    flags = ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", *defines, "-isystem", str(find_torch() / "include")]
    rows = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        for arch in archs:
            cubin = directory / f"{source.stem}.sm_{arch}.cubin"
            command = [nvcc, *flags, "-cubin", f"-arch=sm_{arch}", str(source), "-o", str(cubin)]
            subprocess.run(command, check=True)
            rows += rows_of_cubin(cubin, arch)
    return rows


# ---- Triton ----------------------------------------------------------------------------------------------------------


def triton_rows() -> list[Row]:
    """What the launchers of `compiled_triton` compile; of a kernel that a case launches twice, the worse."""
    from . import compiled_triton

    rows: dict[tuple[str, str, str, str], Row] = {}
    for found in compiled_triton.rows():
        target = found["target"] if found["target"].startswith("gfx") else f"sm_{found['target']}"
        names = {"load_bytes": "load", "store_bytes": "store"}
        numbers = {name: found[names.get(name, name)] for name in NUMBERS}
        row = Row("triton", found["kernel"], found["case"], target, **numbers)
        if row.key in rows:
            worst = {n: (min if n.endswith("_bytes") else max)(numbers[n], getattr(rows[row.key], n)) for n in NUMBERS}
            row = replace(row, **worst)
        rows[row.key] = row
    return list(rows.values())


# ---- the table -------------------------------------------------------------------------------------------------------


def read_table(path: Path = TABLE) -> dict[str, Any]:
    return json.loads(path.read_text())


def rows_in(table: Mapping[str, Any], source: str) -> list[Row]:
    return [Row(**row) for row in table["rows"] if row["source"] == source]


def stale(table: Mapping[str, Any], root: Path = ROOT) -> list[str]:
    """Halves of the table whose sources have changed since, in words."""
    return [
        f"{source}: made from sources {table['sources'].get(source)}, which are now {source_hash(source, root)};"
        " run python -m benchmarks.compiled --write"
        for source in SOURCES
        if table["sources"].get(source) != source_hash(source, root)
    ]


def broken_promises(rows: Iterable[Row]) -> list[str]:
    """What no kernel may do: spill, or add floats atomically."""
    found = []
    for row in rows:
        name = " ".join(row.key)
        if row.spills:
            found.append(f"{name} spills {row.spills} bytes")
        if row.float_atomics:
            found.append(f"{name} has {row.float_atomics} floating point atomics")
    return found


def regressions(before: Iterable[Row], now: Iterable[Row]) -> list[str]:
    """What became worse, in words: more spills, more registers, narrower accesses; and rows on one side only."""
    old, new = {row.key: row for row in before}, {row.key: row for row in now}
    found = [f"{' '.join(key)} is not in the table" for key in new.keys() - old.keys()]
    found += [f"{' '.join(key)} is gone" for key in old.keys() - new.keys()]
    for key in old.keys() & new.keys():
        a, b = old[key], new[key]
        if b.spills > a.spills or b.float_atomics > a.float_atomics or b.registers > a.registers + MORE_REGISTERS:
            found.append(f"{' '.join(key)}: {a} became {b}")
        elif b.load_bytes < a.load_bytes or b.store_bytes < a.store_bytes:
            found.append(f"{' '.join(key)}: narrower accesses, {a} became {b}")
    return sorted(found)


def library() -> Path | None:
    """The CUDA library of the installed package."""
    import fusedres

    path = Path(fusedres.__file__).parent / "_ops_cuda.so"
    return path if path.exists() else None


def fresh_rows(source: str, from_library: Path | None) -> list[Row]:
    if source == "triton":
        return triton_rows()
    if from_library is not None:
        return rows_of_library(from_library)
    with tempfile.TemporaryDirectory() as directory:
        return nvcc_rows(Path(directory))


def write_half(source: str, rows: Iterable[Row]) -> None:
    """Put the rows of one half into the table in the place of those there are."""
    table = read_table() if TABLE.exists() else {"format": FORMAT, "tools": {}, "sources": {}, "rows": []}
    table["sources"][source] = source_hash(source)
    table["tools"][source] = nvcc_version_text() if source == "nvcc" else _version("triton")
    kept = [row for row in table.pop("rows") if row["source"] != source]
    found = sorted(kept + [asdict(row) for row in rows], key=lambda r: Row(**r).key)
    head = json.dumps(table, indent=1).rstrip("}\n ")
    lines = ",\n".join(f"  {json.dumps(row)}" for row in found)
    TABLE.write_text(f'{head}\n }},\n "rows": [\n{lines}\n ]\n}}\n')


def nvcc_version_text() -> str:
    sys.path.insert(0, str(ROOT / "csrc"))
    from build_native import find_nvcc, nvcc_version

    nvcc = find_nvcc()
    return ".".join(map(str, nvcc_version(nvcc))) if nvcc else "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__.split("\n")[0])
    parser.add_argument("--source", action="append", choices=tuple(SOURCES), help="default: both")
    parser.add_argument("--library", type=Path, help="read CUDA kernels from this library instead of compiling them")
    parser.add_argument("--write", action="store_true", help="renew the table instead of comparing with it")
    args = parser.parse_args(arguments)
    bad = []
    for source in args.source or list(SOURCES):
        rows = fresh_rows(source, args.library)
        bad += broken_promises(rows)
        if args.write:
            write_half(source, rows)
        else:
            bad += regressions(rows_in(read_table(), source), rows)
    print("\n".join(bad) or "as it should be")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
