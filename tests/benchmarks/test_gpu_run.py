"""What `make gpu` does around the device: plan, time limits, failures, files, tables. Nothing here needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import host, kernels, models, ops, table
from benchmarks.gpu.env import architecture, gpu_environment, slug
from benchmarks.gpu.parts import Command, Outcome, Part, Runner, chosen
from fusedres import verification
from fusedres.cli import main as fusedres

ROOT = Path(driver.__file__).resolve().parents[2]


def python(code: str, name: str = "job", background: bool = False) -> Command:
    return Command(name, (sys.executable, "-c", code), background)


@pytest.fixture
def runner(tmp_path):
    said: list[str] = []
    made = Runner(60, tmp_path / "logs", os.environ, said.append)
    made.said = said
    return made


def statuses(outcomes: list[Outcome]) -> dict[str, str]:
    return {o.name: o.status for o in outcomes}


class TestParts:
    def test_a_failure_is_recorded_and_stops_nothing(self, runner):
        saved = []
        runner._after = lambda: saved.append(dict(runner.outcomes))
        parts = [
            Part("good", (python("print('fine')"),), 20),
            Part("bad", (python("print('the reason'); raise SystemExit(3)"), python("", name="beside")), 20),
            Part("missing", (Command("job", ("no-such-program",)),), 20),
            Part("next", (python("import os; print(os.getcwd())"),), 20),
        ]
        outcomes = runner.run(parts)
        assert statuses(outcomes) == {"good": "ok", "bad": "failed", "missing": "failed", "next": "ok"}
        bad, missing = outcomes[1:3]
        assert bad.exits == {"job": 3, "beside": 0}
        assert "the reason" in bad.output
        assert "no-such-program" in missing.output
        assert not outcomes[0].output
        assert runner.log("next", "job").read_text().strip() == str(runner.directory)
        assert [len(s) for s in saved] == [1, 2, 3, 4]  # files are written after every part
        assert any("the reason" in line for line in runner.said)

    def test_a_part_that_takes_too_long_ends_with_its_children(self, runner, tmp_path):
        pid = str(tmp_path / "child")
        child = f"import os, time; open({pid!r}, 'w').write(str(os.getpid())); time.sleep(60)"
        code = f"print('begun', flush=True); __import__('subprocess').run([{sys.executable!r}, '-c', {child!r}])"
        start = time.monotonic()
        (outcome,) = runner.run([Part("slow", (python(code), python("", name="quick")), 2)])
        assert time.monotonic() - start < 15
        assert outcome.status == "timeout"
        assert outcome.exits == {"job": None, "quick": 0}
        assert "begun" in outcome.output
        pid = int((tmp_path / "child").read_text())
        deadline = time.monotonic() + 5
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text():
            assert time.monotonic() < deadline, "the child lives on"
            time.sleep(0.05)

    def test_one_that_ignores_the_request_is_killed(self, runner):
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
        start = time.monotonic()
        (outcome,) = runner.run([Part("deaf", (python(code),), 1.5)])
        assert outcome.status == "timeout"
        assert time.monotonic() - start < 20

    def test_the_whole_run_is_bounded(self, tmp_path):
        now = [0.0]
        runner = Runner(100, tmp_path, os.environ, lambda text: None, clock=lambda: now[0])

        def spend(seconds: float) -> None:
            now[0] += seconds

        runner._after = lambda: spend(60)
        outcomes = runner.run([Part(name, (python(""),), 50) for name in ("first", "second", "third")])
        assert statuses(outcomes) == {"first": "ok", "second": "ok", "third": "skipped"}
        assert outcomes[2].why == "no time left"

    def test_needs_and_unless(self, runner):
        fail, work = (python("raise SystemExit(1)"),), (python(""),)
        parts = [
            Part("build", fail, 20),
            Part("build-other", work, 20, unless="build"),
            Part("either", work, 20, needs=("build", "build-other")),
            Part("only", work, 20, needs=("build",)),
            Part("not", work, 20, unless="either"),
        ]
        outcomes = {o.name: o for o in runner.run(parts)}
        assert [o.status for o in outcomes.values()] == ["failed", "ok", "ok", "skipped", "skipped"]
        assert outcomes["only"].why == "build did not succeed"
        assert outcomes["not"].why == "either succeeded"

    def test_background_outlasts_its_part_until_a_quiet_one(self, runner, tmp_path, monkeypatch):
        monkeypatch.setattr("benchmarks.gpu.parts.PATIENCE", 1)
        done = tmp_path / "done"
        short = f"import time; time.sleep(0.7); open({str(done)!r}, 'w')"
        parts = [
            Part(
                "first",
                (python(""), python(short, "short", True), python("import time; time.sleep(60)", "long", True)),
                20,
            ),
            Part("loud", (python(f"import os; raise SystemExit(os.path.exists({str(done)!r}))"),), 20),
            Part("quiet", (python(f"import os; raise SystemExit(not os.path.exists({str(done)!r}))"),), 20, quiet=True),
        ]
        start = time.monotonic()
        outcomes = runner.run(parts)
        assert time.monotonic() - start < 20
        assert statuses(outcomes) == {"first": "ok", "loud": "ok", "quiet": "ok"}
        assert outcomes[0].exits == {"job": 0}
        assert any("long in the background is ended" in line for line in runner.said)

    def test_chosen(self):
        parts = [Part("build", (), 1), Part("tests", (), 1, ("build",)), Part("ops", (), 1, ("build",), quiet=True)]
        assert [p.name for p in chosen(parts, (), ("tests",))] == ["build", "ops"]
        assert chosen(parts, ("ops",), ()) == [Part("ops", (), 1, (), quiet=True)]
        assert chosen(parts, ("build", "ops"), ()) == [parts[0], parts[2]]


class TestPlan:
    def test_most_valuable_first_and_within_nine_minutes(self, tmp_path):
        parts = driver.plan(tmp_path, 4)
        names = [p.name for p in parts]
        assert names[:8] == ["build", "build-triton", "env", "verify", "tests", "folding", "models", "kernels"]
        assert driver.SECONDS < 9 * 60
        assert len(names) == len(set(names))
        for part in parts:
            assert set(part.needs) <= set(names)
            for command in part.commands:
                if command.argv[2].startswith("benchmarks.gpu.") and command.argv[2] != "benchmarks.gpu.env":
                    assert command.background if "--warm" in command.argv else part.quiet
        assert set(verification.FOLDED) < set(driver.VERIFY)

    def test_tests_run_once(self, tmp_path):
        parts = {part.name: part for part in driver.plan(tmp_path, 4)}
        files = [Path(a) for name in ("tests", "folding") for a in parts[name].commands[0].argv if a.endswith(".py")]
        assert sorted(files) == driver.gpu_tests()
        assert [path.name for path in files if path == driver.FOLDING_TESTS] == ["test_folding.py"]

    @pytest.mark.skipif(torch.cuda.is_available(), reason="it would run them")
    def test_every_command_is_one_that_exists(self, tmp_path):
        """The arguments are parsed by the programs that they are for."""
        programs = {f"benchmarks.gpu.{m.__name__.rpartition('.')[2]}": m for m in (ops, models, host, kernels)}
        seen = set()
        for command in (c for p in driver.plan(tmp_path, 1) for c in p.commands):
            if command.argv[1] != "-m":
                continue
            name, arguments = command.argv[2], list(command.argv[3:])
            seen.add(name)
            if name in programs:  # as far as the device, which is not here
                with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
                    programs[name].main(arguments)
            elif name == "fusedres":
                assert fusedres(arguments) == 2
        assert seen == {*programs, "fusedres", "benchmarks.gpu.env", "pip", "pytest"}

    def test_files_with_tests_for_a_gpu(self):
        found = {path.relative_to(ROOT / "tests").as_posix() for path in driver.gpu_tests()}
        assert {path.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests/gpu").glob("test_*.py")} <= found
        assert "ops/test_add_act.py" not in found

    def test_environment(self, tmp_path):
        env = driver.environ(tmp_path, "9.0", {"PATH": "/bin", "PYTHONPATH": "/elsewhere"})
        assert env["PATH"] == "/bin"
        assert env["TORCH_CUDA_ARCH_LIST"] == "9.0"
        assert env["PYTHONPATH"].split(os.pathsep) == [str(tmp_path / "site"), str(ROOT)]
        assert driver.environ(tmp_path, "9.0", {"TORCH_CUDA_ARCH_LIST": "8.0"})["TORCH_CUDA_ARCH_LIST"] == "8.0"

    def test_arguments(self, capsys):
        assert driver.main(["--list", "--skip", "tests", "--only", "ops", "--only", "tests"]) == 0
        assert capsys.readouterr().out.split()[0] == "ops"
        with pytest.raises(SystemExit):
            driver.main(["--only", "opps"])
        assert "no part 'opps'; there are build," in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_and_an_exit_code(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--work", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONSAFEPATH": ""})
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"make gpu: torch {torch.__version__} sees no GPU\n"


def test_without_torch(monkeypatch):
    monkeypatch.setattr(driver.importlib.util, "find_spec", lambda name: None)
    assert "torch is not installed" in driver.no_gpu()


def test_names_of_devices():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert architecture((9, 0)) == "9.0"


def test_environment_names_no_host_and_no_path():
    import platform

    env = gpu_environment()
    text = json.dumps(env)
    assert env["torch"] == torch.__version__
    assert not platform.node() or platform.node() not in text
    assert str(Path.home()) not in text
    assert str(ROOT) not in text


def op_row(peer: str, ms: float, **changes) -> dict:
    row = {
        "op": "batch_norm_act",
        "residual": True,
        "shape": [256, 256, 56, 56],
        "dtype": "bfloat16",
        "layout": "channels_last",
        "peer": peer,
        "timed": "graph",
        "ms": ms,
        "share_of_copy": 0.9,
        "copy_gb_per_s": 4000.0,
    }
    return row | changes


OPS = [
    op_row("eager", 10.0),
    op_row("compile-max", 6.0),
    op_row("cudnn", 0.0, error="RuntimeError: not for bfloat16"),
    op_row(
        "cuda",
        5.0,
        kernels=[
            {"name": "a", "us": 1.0, "launch": "statistics", "share_of_copy": 0.95},
            {"name": "b", "us": 1.0, "launch": "finalise", "share_of_copy": 0.01},
            {"name": "c", "us": 1.0, "launch": "apply", "share_of_copy": 0.85},
        ],
    ),
    op_row("eager", 9.0, shape=[256, 64, 56, 56], residual=False),
    op_row("compile-max", 3.0, shape=[256, 64, 56, 56], residual=False),
    op_row("cuda", 4.0, shape=[256, 64, 56, 56], residual=False, timed="calls"),
]
del OPS[2]["ms"]
MODELS = (
    [
        {"model": "resnet50", "kind": kind, "batch": 256, "graph": graph, "images_per_s": images, "peak_mb": 9e3}
        for kind, graph, images in (("eager", False, 2400), ("eager", True, 2500), ("cuda", True, 3500))
    ]
    + [
        {"model": "resnet50", "kind": "folded", "batch": 256, "graph": True, "images_per_s": 5600, "folded_blocks": 16},
        {
            "model": "resnet50",
            "kind": "fusedres",
            "batch": 256,
            "graph": True,
            "images_per_s": 4480,
            "folded_blocks": 0,
        },
    ]
    + [{"model": "resnet50", "kind": "compile", "batch": 256, "error": "OutOfMemoryError: much"}]
)
_SMALL = {"shape": [2, 8, 2, 2], "dtype": "float32"}
HOST = [
    {"op": "add_act", "peer": "cuda", "forward_us": 9.5, **_SMALL},
    {"op": "batch_norm_act", "residual": True, "peer": "cuda", "forward_us": 13.25, **_SMALL},
    {"op": "batch_norm_act", "residual": False, "peer": "cuda", "forward_us": 12.5, **_SMALL},
    {"op": "batch_norm_act", "peer": "triton", "error": "no", **_SMALL},
]
GROUP = {"group": "folded: output", "calls": 16, "kernels": 16, "ms": 3.25, "ops": {}}
PASS = {
    "group": "folded: output",
    "shape": "802816x64->256",
    "calls": 3,
    "us": 200.0,
    "bytes": 1,
    "flops": 1,
    "floor_us": 170.0,
    "bound": "bandwidth",
    "share_of_floor": 0.85,
}
KERNELS = [
    {
        "model": "resnet50",
        "kind": "folded",
        "batch": 256,
        "ms": 42.5,
        "kernels_ms": 40.0,
        "between_ms": 2.5,
        "kernels": 1616,
        "copy_gb_per_s": 4000.0,
        "matmul_tflop_per_s": 650.0,
        "groups": [GROUP, GROUP | {"group": "rest", "kernels": 1600, "ms": 36.75}],
        "passes": [PASS, PASS | {"group": "folded: products", "share_of_floor": 0.75, "bound": "products"}],
    },
    {"model": "resnet50", "kind": "fusedres", "batch": 256, "error": "OutOfMemoryError: much"},
]


class TestTable:
    def test_bars(self):
        lines = {b.what: b for b in table.bars(OPS, MODELS, HOST)}

        def of(text: str) -> table.Bar:
            (found,) = [b for name, b in lines.items() if text in name and name.startswith("cuda")]
            return found

        against = of("forward+backward, against eager")
        assert against.measured.startswith("2.12x (2.00 .. 2.25, 2 shapes)")
        assert against.met
        compiled = of("against torch.compile max-autotune")
        assert compiled.measured.startswith("0.95x (0.75 .. 1.20")
        assert compiled.met is False
        assert of("NHWC, forward+backward, against cuDNN").met is None
        assert of("slowest pass").measured == "85%, batch_norm_act+residual 256x256x56x56 apply (2 passes)"
        assert of("slowest pass").met is False
        assert of("best peer").measured == "0.75x, batch_norm_act 256x64x56x56"
        assert of("CUDA graph, against eager").measured == "1.40x (3500 and 2500 images/s)"
        assert of("CUDA graph, against compile-max").met is None
        assert of("host time").measured == "13.2 us, batch_norm_act+residual 2x8x2x2 float32"
        assert of("host time").met is False
        assert all(b.met is None and b.measured == "not measured" for n, b in lines.items() if n.startswith("triton"))

    def test_bars_of_folding(self):
        lines = {b.what: b for b in table.bars(OPS, MODELS, HOST, KERNELS) if b.what.startswith("folded")}
        step, *against, slowest = lines.values()
        assert (step.measured, step.met) == ("5600 images/s", True)
        assert [b.measured for b in against] == [
            "1.25x (5600 and 4480 images/s)",
            "not measured",
            "2.24x (5600 and 2500 images/s)",
        ]
        assert [b.met for b in against] == [True, None, True]
        assert (slowest.measured, slowest.met) == ("75%, products 802816x64->256 (2 sizes)", False)
        nothing = [b for b in table.bars([], [], []) if b.what.startswith("folded")]
        assert [b.measured for b in nothing] == ["not measured"] * 5

    def test_report_of_anything(self):
        parts = [
            {"name": "build", "status": "ok", "seconds": 61.2},
            {"name": "ops", "status": "skipped", "why": "time"},
        ]
        env = {"device": "NVIDIA H200", "torch": "2.11.0"}
        text = table.report(env, parts, OPS, MODELS, HOST, KERNELS)
        assert "copy 4000 .. 4000 GB/s" in text
        assert "| build | ok | 61 |  |" in text
        assert "| batch_norm_act 256x64x56x56 | bfloat16 | channels_last | 9.000 | 3.000 | 4.000* (90%) |" in text
        assert "- batch_norm_act+residual 256x256x56x56 bfloat16, cudnn: RuntimeError: not for bfloat16" in text
        assert "| resnet50 | cuda | 256 | graph | 3500 | 1.40x | 9000 |" in text
        assert "| resnet50 | folded, 16 blocks folded | 256 | graph | 5600 | 2.24x |  |" in text
        assert "| folded: output | 3.250 (16) |" in text
        assert "| all kernels | 40.000 (1616) |" in text
        assert "| **step** | **42.500** |" in text
        assert "| output | 802816x64->256 | 3 | 200.0 | 170.0 | bandwidth | 85% |" in text
        assert "- fusedres: OutOfMemoryError: much" in text
        assert "OutOfMemoryError: much" in text
        empty = table.report({}, [], [], [], [])
        assert "not measured" in empty
        assert "No op was measured." in empty
        assert "No kernels were measured." in empty


class TestResults:
    def test_files_of_a_run(self, tmp_path):
        work, directory, copy = tmp_path / "work", tmp_path / "results", tmp_path / "out"
        logs = work / "logs"
        logs.mkdir(parents=True)
        (logs / "env-env.log").write_text('a warning\n{"torch": "2.11.0", "driver": "580"}\n')
        rows = [{"op": "add_act", "backend": "cuda", "cases": 7, "failed": 1, "multiple": None}]
        (logs / "verify-add_act.log").write_text(
            json.dumps({"rows": [*rows, rows[0] | {"failed": 0, "multiple": 1.5}]})
        )
        (work / "kernels.jsonl").write_text(json.dumps(KERNELS[0]))
        (work / "ops.jsonl").write_text("\n".join([json.dumps(OPS[0]), json.dumps(OPS[3]), '{"op": "cut o']))
        results = driver.Results(work, directory, copy, {"device": "NVIDIA H200", "torch": "?"})
        results.outcomes = {"ops": Outcome("ops", "timeout", 110.0, exits={"ops": None})}
        text = results.save()
        env = json.loads((directory / "env.json").read_text())
        assert env["environment"] == {"device": "NVIDIA H200", "torch": "2.11.0", "driver": "580"}
        assert env["parts"] == [{"name": "ops", "status": "timeout", "seconds": 110.0, "exits": {"ops": None}}]
        assert env["verify"] == [{"op": "add_act", "backend": "cuda", "cases": 14, "failed": 1, "multiple": "infinite"}]
        assert env["tests"] == {"counts": {}, "failed": []}
        assert json.loads((directory / "ops.json").read_text())["results"]["calls"] == [OPS[0], OPS[3]]
        assert json.loads((directory / "models.json").read_text())["results"] == []
        assert json.loads((directory / "kernels.json").read_text())["results"] == KERNELS[:1]
        assert (directory / "table.md").read_text() == text + "\n"
        files = ["env.json", "kernels.json", "models.json", "ops.json", "table.md"]
        assert sorted(p.name for p in copy.iterdir()) == files

    def test_counts_of_tests(self, tmp_path):
        log = tmp_path / "log"
        log.write_text(
            "../../tests/gpu/test_ops.py::test_a[cuda-f32] PASSED   [ 10%]\n"
            "../../tests/gpu/test_ops.py::test_b FAILED             [ 20%]\n"
            "[gw1] [ 30%] PASSED ../../tests/gpu/test_ops.py::test_c \n"
            "[gw0] [ 40%] SKIPPED ../../tests/gpu/test_ops.py::test_d \n"
            "FAILED ../../tests/gpu/test_ops.py::test_b - AssertionError\n"
            "==== 1 failed, 2 passed ====\n"
        )
        found = driver.test_counts(log)
        assert found == {"counts": {"passed": 2, "failed": 1, "skipped": 1}, "failed": ["gpu/test_ops.py::test_b"]}
        other = tmp_path / "other"
        other.write_text("[gw0] [ 40%] PASSED ../../tests/gpu/test_folding.py::test_e \n")
        assert driver.test_counts(log, other)["counts"] == {"passed": 3, "failed": 1, "skipped": 1}
        assert driver.test_counts(tmp_path / "none") == {"counts": {}, "failed": []}
