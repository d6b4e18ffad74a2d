"""`pytest benchmarks/ --benchmark-only`: options, process-wide settings, and the bridge into pytest-benchmark."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the suites import each other as `benchmarks.*`

import torch

from benchmarks.environment import environment
from benchmarks.harness import set_memory_regime


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusedres benchmarks")
    group.addoption("--quick", action="store_true", help="fewer shapes and rounds")
    group.addoption("--bench-threads", type=int, default=1, help="torch threads; above 1: wall clock (default 1)")
    group.addoption("--memory", choices=("recycled", "default"), default="recycled", help="memory regime")
    group.addoption("--batch", type=int, default=8, help="batch size of the ResNet shapes (default 8)")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect bench_*.py here without asking the rest of the project for it."""
    known = parent.session.isinitpath(file_path) or any(map(file_path.match, parent.config.getini("python_files")))
    if file_path.match("bench_*.py") and not known:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


class ReplayClock:
    """A timer that shows pytest-benchmark the rounds `harness.compare` measured: its own loop cannot alternate."""

    now = 0.0

    def __call__(self) -> float:
        return ReplayClock.now


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "benchmark" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=ReplayClock()))


class Settings:
    """Command-line choices, once they are in force."""

    def __init__(self, config: pytest.Config) -> None:
        self.quick: bool = config.getoption("--quick")
        self.threads: int = config.getoption("--bench-threads")
        self.batch: int = config.getoption("--batch")
        torch.set_num_threads(self.threads)
        self.clock = "cpu" if self.threads == 1 else "wall"
        self.memory = set_memory_regime(config.getoption("--memory"))
        self.environment = environment(self.memory)

    @property
    def rounds(self) -> dict[str, Any]:
        return {"min_rounds": 7, "max_rounds": 15, "max_seconds": 0.5} if self.quick else {}


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Iterator[Settings]:
    threads = torch.get_num_threads()
    yield Settings(request.config)
    torch.set_num_threads(threads)


@pytest.fixture
def record(benchmark: Any, settings: Settings) -> Any:
    """record(seconds per round, group, **extra_info): enter measured rounds into pytest-benchmark's table and JSON."""

    def enter(seconds: Sequence[float], group: str, **extra: Any) -> None:
        rounds = iter([*seconds, seconds[-1]])

        def replay() -> None:
            ReplayClock.now += next(rounds)

        benchmark.group = group
        benchmark.extra_info.update(settings.environment | extra)
        benchmark.pedantic(replay, rounds=len(seconds), iterations=1)

    return enter
