"""use_backend, FUSEDRES_BACKEND and info(): what is forced is used or refused, what is automatic falls back."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import fusedres
from fusedres import functional as F
from fusedres import verification


def _namespaces_called(function, record_ops) -> set[str]:
    with record_ops() as record:
        function()
    return {func.__name__.split(".")[0] for func, *_ in record.calls if func.namespace == "fusedres"}


def _call():
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    F.batch_norm_act(x, torch.zeros(4), torch.ones(4), training=True).sum().backward()


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="nonsense") as info:
        fusedres.use_backend("nonsense")
    assert "reference" in str(info.value)
    for bad in (None, 3, "", "CPU"):
        with pytest.raises((ValueError, TypeError)):
            fusedres.use_backend(bad)
    assert fusedres.info()["backend"] == os.environ.get("FUSEDRES_BACKEND", "auto")


def test_context_manager_restores(record_ops) -> None:
    before = fusedres.info()["backend"]
    with fusedres.use_backend("reference"):
        assert fusedres.info()["backend"] == "reference"
        assert all(n.endswith("_reference") for n in _namespaces_called(_call, record_ops))
        with fusedres.use_backend("auto"):
            assert fusedres.info()["backend"] == "auto"
        assert fusedres.info()["backend"] == "reference"
    assert fusedres.info()["backend"] == before
    with pytest.raises(KeyError), fusedres.use_backend("reference"):
        raise KeyError
    assert fusedres.info()["backend"] == before


def test_plain_call_stays() -> None:
    before = fusedres.info()["backend"]
    try:
        fusedres.use_backend("reference")
        assert fusedres.info()["backend"] == "reference"
    finally:
        fusedres.use_backend(before)
    assert fusedres.info()["backend"] == before


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_forced_backend_that_cannot_serve_raises(name) -> None:
    """On CPU tensors; the statistics stay as they were."""
    mean = torch.zeros(4)
    with fusedres.use_backend(name), pytest.raises((RuntimeError, ValueError), match=name):
        F.batch_norm_act(torch.randn(2, 4, 6, 6), mean, torch.ones(4), training=True)
    with fusedres.use_backend(name), pytest.raises((RuntimeError, ValueError), match=name):
        F.add_act(torch.randn(3), torch.randn(3))
    assert torch.equal(mean, torch.zeros(4))


def test_backward_uses_the_backend_of_its_forward(record_ops) -> None:
    """A graph built under one backend is differentiated by it, whatever is chosen since."""
    if verification.backends("cpu")["cpu"] is not None:
        pytest.skip("one backend only")
    for first, second in (("reference", "cpu"), ("cpu", "reference")):
        x, r = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(2, 4, 6, 6, requires_grad=True)
        with fusedres.use_backend(first):
            out = F.batch_norm_act(x, torch.zeros(4), torch.ones(4), residual=r, training=True)
            want = torch.autograd.grad(out.sum(), (x, r), retain_graph=True)
        with fusedres.use_backend(second):
            got = torch.autograd.grad(out.sum(), (x, r))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_environment_variable() -> None:
    code = "import fusedres, json; print(json.dumps(fusedres.info()['backend']))"
    done = _python(code, FUSEDRES_BACKEND="reference")
    assert json.loads(done.stdout) == "reference", done.stderr
    done = _python(code, FUSEDRES_BACKEND="auto")
    assert json.loads(done.stdout) == "auto", done.stderr
    done = _python(code, FUSEDRES_BACKEND="nonsense")
    assert done.returncode != 0
    assert "nonsense" in done.stderr
    assert "FUSEDRES_BACKEND" in done.stderr


def test_info() -> None:
    info = fusedres.info()
    json.dumps(info)
    for key in ("version", "torch", "python", "triton", "platform", "libraries", "cpu", "devices", "backend", "ops"):
        assert key in info
    assert info["version"] == fusedres.__version__
    assert info["torch"] == torch.__version__
    assert {"_C", "_ops_cpu", "_ops_cuda"} <= set(info["libraries"])
    for library in info["libraries"].values():
        assert set(library) >= {"loaded", "path", "error"}
        assert library["loaded"] or library["error"]
    ops = {"batch_norm_act", "batch_norm_add_batch_norm_act", "batch_norm_act_max_pool", "add_act"}
    assert ops <= set(info["ops"])
    for name in ops:
        assert info["ops"][name]["cpu"]["served_by"]
        assert info["ops"][name]["cpu"]["why"]


def test_import_is_light() -> None:
    """`import fusedres` brings neither triton nor matplotlib nor the command line, and runs on no device."""
    code = (
        "import sys, fusedres; print([m for m in ('triton', 'matplotlib', 'rich', 'fusedres.cli') if m in sys.modules])"
    )
    done = _python(code)
    loaded = done.stdout.strip()
    assert "triton" not in loaded, done.stderr
    assert "matplotlib" not in loaded
    assert "rich" not in loaded
    assert "fusedres.cli" not in loaded


def test_backends_agree_on_nasty_inputs() -> None:
    """Any two backends, within the sum of their allowances: a cross-check of the checker."""
    available = [n for n, reason in verification.backends("cpu").items() if reason is None]
    case = verification.Case("batch_norm_act", shape=(4, 33, 9, 7), distribution="large_mean", residual="contiguous")
    outs = []
    for name in available:
        with fusedres.use_backend(name):
            outs.append(verification.run(case, verification.ours).values["out"])
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_cpu_capabilities(capability) -> None:
    """The kernels of every instruction set this machine has, by the same rule."""
    if verification.backends("cpu")["cpu"] is not None:
        pytest.skip("no C++ backend")
    done = _python("import fusedres; print(fusedres.info()['cpu']['capability'])", FUSEDRES_CPU_CAPABILITY=capability)
    if done.stdout.strip() != capability:
        pytest.skip(f"this machine has {done.stdout.strip()}")
    code = (
        "from fusedres import verification as v; import sys\n"
        "bad = [(c.name, f) for op in v.OPS for c in v.cases(op)[::4] if (f := v.failures(c, 'cpu'))]\n"
        "print(bad); sys.exit(bool(bad))"
    )
    done = _python(code, FUSEDRES_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_unknown_cpu_capability() -> None:
    if verification.backends("cpu")["cpu"] is not None:
        pytest.skip("no C++ backend")
    done = _python("import fusedres; print(fusedres.info()['cpu']['capability'])", FUSEDRES_CPU_CAPABILITY="sse9")
    assert done.returncode == 0 or "FUSEDRES_CPU_CAPABILITY" in done.stderr
