"""Everything that holds without a GPU, on one: `pytest -m gpu`.

FUSEDRES_GPU_TEST_DEVICE=cpu runs the same tests on the CPU and its backends, which shows that the tests themselves work
(`tests/build/test_gpu_suite.py` does); what only a GPU has is skipped then.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedres
from fusedres import verification
from fusedres.ops import registry
from fusedres.verification import Case

DEVICE = os.environ.get("FUSEDRES_GPU_TEST_DEVICE", "cuda")
BACKENDS = ("cuda", "triton") if DEVICE == "cuda" else ("cpu", "reference")

# One of each kind of kernel, with several tiles, tails and whole vectors.
CASES = {
    "residual": Case("batch_norm_act", (8, 64, 28, 28), "bf16", "channels_last", residual="channels_last"),
    "plain": Case("batch_norm_act", (8, 64, 30, 30), "bf16", "channels_last"),
    "odd-nchw": Case("batch_norm_act", (6, 65, 15, 13), "f32", momentum=None, residual="contiguous"),
    "one-pass": Case("batch_norm_act", (4, 512, 7, 7), "f16", "channels_last"),
    "eval": Case("batch_norm_act", (8, 64, 28, 28), "bf16", "channels_last", training=False),
    "pair": Case("batch_norm_add_batch_norm_act", (8, 64, 28, 28), "bf16", "channels_last", residual="channels_last"),
    "stem": Case("batch_norm_act_max_pool", (4, 64, 30, 30), "bf16", "channels_last"),
    "add": Case("add_act", (8, 64, 28, 28), "bf16", "channels_last"),
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): runs in one process with its group, see pytest-xdist")


def why_not(backend: str, op: str) -> str | None:
    """Why a backend does not serve an op on the device under test."""
    if op in verification.BLOCKS or op in verification.CONVOLUTIONS:
        op = "batch_norm_act"
    return None if backend == "reference" else registry.OPS[op].why_not(backend)


@contextlib.contextmanager
def served_by(backend: str, op: str):
    """The backend is forced; a test of what it does not have is skipped, unless libraries are demanded."""
    reason = why_not(backend, op)
    if reason is not None:
        if os.environ.get("FUSEDRES_REQUIRE_EXT") == "1":
            pytest.fail(f"{backend} does not serve {op}: {reason}")
        pytest.skip(f"{backend} does not serve {op}: {reason}")
    with fusedres.use_backend(backend):
        yield


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def forced(backend: str, case: Case):
    """`backend`, forced for `case`."""
    with served_by(backend, case.op):
        yield backend


@pytest.fixture
def needs_gpu() -> None:
    if DEVICE != "cuda":
        pytest.skip("needs a GPU")


class Call:
    """Forward and backward of a case on tensors that stay where they are, so that a graph can replay it."""

    def __init__(self, case: Case, device: torch.device | str = DEVICE) -> None:
        self.case = case
        self.tensors = verification.place(verification.make_inputs(case), device)
        self.leaves = [self.tensors[name].requires_grad_() for name in verification.differentiable(self.tensors)]
        self.buffers = {name: self.tensors[name] for name in verification.BUFFERS if name in self.tensors}
        with torch.no_grad():
            start = self.state()
            self.dy = verification.cotangent(case, verification.ours(case, self.tensors))
            self.restore(start)

    def state(self) -> dict[str, Tensor]:
        return {name: t.clone() for name, t in self.buffers.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        for name, t in state.items():
            self.buffers[name].copy_(t)

    def __call__(self) -> list[Tensor]:
        """Output and gradients."""
        out = verification.ours(self.case, self.tensors)
        return [out, *torch.autograd.grad(out, self.leaves, self.dy)]

    def fresh(self) -> list[Tensor]:
        """The same from the statistics as they are now, which stay, on memory that was NaN."""
        state = self.state()
        results = [t.detach().clone() for t in self()]
        results += [t.clone() for t in self.buffers.values()]
        self.restore(state)
        return results


@pytest.fixture
def make_call() -> Callable[..., Call]:
    return Call


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    """Bit for bit."""
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text, i=i: f"result {i}: {text}")


@pytest.fixture
def bits() -> Callable[[list[Tensor], list[Tensor]], None]:
    return assert_same


@pytest.fixture
def capture() -> Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]:
    """capture(f) -> (replay, what f returned): a CUDA graph on a GPU, f itself elsewhere."""

    def capture(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if DEVICE != "cuda":
            results = function()

            def again() -> None:
                for old, new in zip(results, function(), strict=True):
                    old.data.copy_(new)

            return again, results
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = function()
        return graph.replay, results

    return capture


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """What is allocated without being written is NaN, not what the test before left there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
