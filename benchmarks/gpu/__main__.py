"""`make gpu`: build, verify, test and measure on this machine's GPU, in under nine minutes.

Every part is bounded, and its failure is recorded without stopping the rest. Results go to
benchmarks/results/<device>/{env,ops,models,kernels}.json and table.md after every part, and to $OUT as well where that
is set, so that a run which is cut short leaves what it had. Exit code: 0, 1 if a part failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .parts import Command, Outcome, Part, Runner, chosen

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 530.0
BUILT = ("build", "build-triton")
VERIFY = (
    "batch_norm_act",
    "batch_norm_add_batch_norm_act",
    "batch_norm_act_max_pool",
    "add_act",
    "conv_bn_act",
    "conv1x1_bn_act",
    "conv1x1_bn_add_conv1x1_bn_act",
    "BasicBlock",
    "Bottleneck",
)
OURS = ("eager", "cuda", "triton")
FOLDING_TESTS = ROOT / "tests" / "gpu" / "test_folding.py"


def gpu_tests() -> list[Path]:
    """The files that have tests for a GPU: collecting all the others would take as long as many of these."""
    return [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in p.read_text()]


def plan(work: Path, workers: int) -> list[Part]:
    """Everything there is to do, most valuable first; `work` is where builds, caches and rows go."""
    python = sys.executable

    def module(name: str, *arguments: str, background: bool = False, label: str = "") -> Command:
        return Command(label or name.rpartition(".")[2], (python, "-m", name, *arguments), background)

    def ops(*arguments: str) -> tuple[Command, ...]:
        return (module("benchmarks.gpu.ops", "--out", str(work / "ops.jsonl"), *arguments),)

    def models(*arguments: str, background: bool = False, label: str = "models") -> Command:
        out = ("--out", str(work / "models.jsonl"))
        return module("benchmarks.gpu.models", *out, *arguments, background=background, label=label)

    def options(name: str, *values: object) -> list[str]:
        return [text for value in values for text in (f"--{name}", str(value))]

    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--upgrade", "-q"]
    pip = Command("pip", (python, *install, "--target", str(work / "site"), str(ROOT)))
    without_nvcc = Command("pip", ("env", "FUSEDRES_BUILD_CUDA=0", *pip.argv))
    spread = ["-n", str(workers), "--dist", "loadgroup"] if workers > 1 else []
    pytest = ["-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", *spread]
    pytest += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]

    def tests(*files: Path) -> tuple[Command, ...]:
        return (Command("pytest", (python, *pytest, *map(str, files))),)

    of_the_rest = [path for path in gpu_tests() if path != FOLDING_TESTS]
    # The peers' compilation takes longer than anything else, so it goes on beside what measures nothing.
    warm = [
        module("benchmarks.gpu.ops", "--warm", background=True, label="compile-ops"),
        models("--warm", "--kind", "compile", background=True, label="compile-model"),
        models("--warm", "--kind", "compile-max", background=True, label="compile-model-max"),
    ]
    verify = [
        module("fusedres", "verify", "--quick", "--json", "--device", "cuda", "--op", op, label=op) for op in VERIFY
    ]
    # So does that of folded GEMMs, in one process, for the first model.
    warm_folded = models("--warm", "--kind", "folded", background=True, label="compile-folded")
    all_kinds = ("eager", "cuda", "folded", "fusedres", "compile", "triton", "auto")
    kernels = module(
        "benchmarks.gpu.kernels", "--out", str(work / "kernels.jsonl"), *options("kind", "folded", "fusedres")
    )
    small = ["--batch", "32", "--batch", "8", "--batch", "1"]
    return [
        Part("build", (pip, *warm), 150),
        Part("build-triton", (without_nvcc,), 60, unless="build"),
        Part("env", (module("benchmarks.gpu.env"), warm_folded), 30),
        Part("verify", tuple(verify), 90, BUILT),
        Part("tests", tests(*of_the_rest), 120, BUILT),
        Part("folding", tests(FOLDING_TESTS), 120, BUILT),
        Part("models", (models(*options("kind", *all_kinds)),), 110, BUILT, quiet=True),
        Part("kernels", (kernels,), 45, BUILT, quiet=True),
        Part("ops", ops(), 130, BUILT, quiet=True),
        Part("host", (module("benchmarks.gpu.host", "--out", str(work / "host.jsonl")),), 25, BUILT, quiet=True),
        Part("models-max", (models("--kind", "compile-max"),), 60, BUILT, quiet=True),
        Part("small-models", (models(*options("kind", *OURS), *options("batch", 1, 8)),), 45, BUILT, quiet=True),
        Part("ops-fp16", ops("--dtype", "float16", *options("peer", *OURS, "cudnn")), 35, BUILT, quiet=True),
        Part("small-ops", ops(*small, *options("peer", *OURS)), 40, BUILT, quiet=True),
        Part("ops-nchw", ops("--layout", "contiguous", *options("peer", *OURS)), 35, BUILT, quiet=True),
    ]


def environ(work: Path, architecture: str, base: Mapping[str, str]) -> dict[str, str]:
    """Of every part: the package that was built, caches beside it, this device's architecture."""
    return {
        "TORCH_CUDA_ARCH_LIST": architecture,
        "FUSEDRES_CPU_VARIANTS": "baseline",  # a third of the time to build, and what is measured runs on the GPU
        **base,
        # the working directory is none of these, so that the built package is not shadowed by the source tree
        "PYTHONPATH": os.pathsep.join([str(work / "site"), str(ROOT)]),
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TRITON_CACHE_DIR": str(work / "triton"),
    }


def parsed(line: str) -> Any:
    """The JSON of a line; None where it is something else or was cut off by a time limit."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def rows(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON that are whole."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(parsed, lines) if isinstance(row, dict)]


def json_in(log: Path) -> dict[str, Any]:
    """The last line of a log that is a JSON object, else nothing."""
    return (rows(log) or [{}])[-1]


def test_counts(*logs: Path) -> dict[str, Any]:
    """Tests by outcome, and the names of those that failed, from pytest's verbose output; also of a run cut short."""
    text = "\n".join(log.read_text(errors="replace") for log in logs if log.exists())
    outcomes = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL)"
    found = [(o, t) for t, o in re.findall(rf"(?m)^(\S+::\S+) {outcomes}\b", text)]
    found += re.findall(rf"(?m)^\[gw\d+\] \[ *\d+%\] {outcomes} (\S+::\S+)", text)  # of pytest-xdist
    counts = {outcome.lower(): sum(o == outcome for o, _ in found) for outcome in dict.fromkeys(o for o, _ in found)}
    failed = sorted({test.rpartition("tests/")[2] for outcome, test in found if outcome in ("FAILED", "ERROR")})
    return {"counts": counts, "failed": failed}


class Results:
    """What a run leaves, written anew after every part."""

    def __init__(self, work: Path, directory: Path, copy: Path | None, facts: Mapping[str, Any]) -> None:
        self.work, self.directory, self.copy = work, directory, copy
        self.facts = dict(facts)
        self.outcomes: Mapping[str, Outcome] = {}

    def verification(self) -> list[dict[str, Any]]:
        """A line per op and backend: cases, failures, worst multiple of eager's error."""
        lines: dict[tuple[str, str], dict[str, Any]] = {}
        for op in VERIFY:
            for row in json_in(self.work / "logs" / f"verify-{op}.log").get("rows", ()):
                key = (row["op"], row["backend"])
                line = lines.setdefault(key, {"op": key[0], "backend": key[1], "cases": 0, "failed": 0, "multiple": 0})
                line["cases"] += row["cases"]
                line["failed"] += row["failed"]
                worst = row["multiple"] if row["multiple"] is not None else math.inf
                line["multiple"] = max(line["multiple"], worst)
        # JSON has no infinity
        return [line | ({} if math.isfinite(line["multiple"]) else {"multiple": "infinite"}) for line in lines.values()]

    def save(self) -> str:
        """Write all files; returns the table."""
        from .table import report

        logs = self.work / "logs"
        env = self.facts | json_in(logs / "env-env.log")
        parts = [outcome.as_dict() for outcome in self.outcomes.values()]
        ops, models, host, kernels = (
            rows(self.work / f"{name}.jsonl") for name in ("ops", "models", "host", "kernels")
        )
        text = report(env, parts, ops, models, host, kernels)
        self.directory.mkdir(parents=True, exist_ok=True)
        pages = {
            "env.json": {
                "environment": env,
                "parts": parts,
                "verify": self.verification(),
                "tests": test_counts(logs / "tests-pytest.log", logs / "folding-pytest.log"),
            },
            "ops.json": {"environment": env, "results": {"calls": ops, "host": host}},
            "models.json": {"environment": env, "results": models},
            "kernels.json": {"environment": env, "results": kernels},
        }
        for name, page in pages.items():
            (self.directory / name).write_text(json.dumps(page, indent=1, default=str) + "\n")
        (self.directory / "table.md").write_text(text + "\n")
        if self.copy is not None:
            self.copy.mkdir(parents=True, exist_ok=True)
            for name in (*pages, "table.md"):
                shutil.copy(self.directory / name, self.copy / name)
        return text


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="repeatable")
    parser.add_argument("--skip", action="append", default=[], metavar="PART", help="repeatable")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of the whole run, default {SECONDS:.0f}")
    parser.add_argument("--results", type=Path, help="default benchmarks/results/<device>")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu", help="builds, caches, logs")
    parser.add_argument("--list", action="store_true", help="print the parts and run nothing")
    args = parser.parse_args(arguments)
    names = [part.name for part in plan(args.work, 1)]
    for name in (*args.only, *args.skip):
        if name not in names:
            parser.error(f"no part {name!r}; there are {', '.join(names)}")
    return args


def no_gpu() -> str | None:
    """Why this machine cannot run it, in one line; None if it can."""
    if importlib.util.find_spec("torch") is None:
        return f"torch is not installed for {sys.executable}; PYTHON=... names another Python"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    return None


def facts() -> dict[str, Any]:
    """Of the device, before anything is built."""
    import torch

    from .env import architecture

    return {
        "device": torch.cuda.get_device_name(0),
        "capability": architecture(torch.cuda.get_device_capability(0)),
        "torch": str(torch.__version__),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    workers = min(8, len(os.sched_getaffinity(0))) if importlib.util.find_spec("xdist") else 1
    parts = chosen(plan(args.work, workers), args.only, args.skip)
    if args.list:
        for part in parts:
            print(f"{part.name:<14} {part.seconds:4.0f} s  {', '.join(command.name for command in part.commands)}")
        return 0
    if missing := no_gpu():
        print(f"make gpu: {missing}", file=sys.stderr)
        return 2
    from .env import slug

    device = facts()
    for stale in args.work.glob("*.jsonl"):
        stale.unlink()
    shutil.rmtree(args.work / "logs", ignore_errors=True)
    out = os.environ.get("OUT")
    directory = args.results or ROOT / "benchmarks" / "results" / slug(device["device"])
    results = Results(args.work, directory, Path(out) if out else None, device)
    settings = environ(args.work, device["capability"], os.environ)

    def say(text: str) -> None:
        print(text, flush=True)

    runner = Runner(args.seconds, args.work / "logs", settings, say, after=lambda: results.save() and None)
    results.outcomes = runner.outcomes
    runner.run(parts)
    print(f"\n{results.save()}\n\nwritten: {directory}")
    return 1 if any(o.status in ("failed", "timeout") for o in runner.outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
