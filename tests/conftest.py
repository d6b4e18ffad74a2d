"""What every test starts from: the installed package with its libraries, fixed seeds, one thread."""

from __future__ import annotations

import os
import random

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # Subprocesses that tests start with `python -m` import the installed package too, not the source tree in their
    # working directory (Python >= 3.11).
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    try:
        import fusedres  # noqa: F401
    except ImportError as error:  # with FUSEDRES_REQUIRE_EXT=1: a library that is missing or does not load
        raise pytest.UsageError(f"fusedres does not import: {error}") from None


def pytest_report_header(config: pytest.Config) -> list[str]:
    import fusedres

    info = fusedres.info()
    libraries = [f"{name} {'live' if entry['loaded'] else entry['error']}" for name, entry in info["libraries"].items()]
    cpu = info["cpu"]
    return [
        f"fusedres {info['version']} from {os.path.dirname(fusedres.__file__)}, backend {info['backend']}",
        f"libraries: {'; '.join(libraries)}",
        f"cpu: {cpu['name']}, {cpu['capability']}; torch {info['torch']}, triton {info['triton']}",
        f"devices: {', '.join(info['devices'])}; {torch.get_num_threads()} threads, tests use 1 unless they say so",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available() and not os.environ.get("FUSEDRES_GPU_TEST_DEVICE"):
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords would include the names of folders
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def _same_start():
    """Seeds and threads. One thread: beside other load every parallel region of a small tensor waits milliseconds."""
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
