"""The Triton backend as seen by the registry: imported on first use, an op of its own in compiled graphs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

import fusedres
from fusedres.ops import registry

CODE = """
import sys, torch, fusedres
assert "triton" not in sys.modules
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck
from fusedres import functional as F
x, r = (torch.randn(2, 4, 3, 5, requires_grad=True) for _ in range(2))
seen = []

def record(graph, inputs):
    seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return torch._functorch.aot_autograd.make_boxed_func(graph.forward)

backend = aot_autograd(fw_compiler=record, bw_compiler=record)
with fusedres.use_backend("triton"):
    out = torch.compile(F.add_act, fullgraph=True, backend=backend)(x, r)
    out.square().sum().backward()
assert torch.equal(out, (x + r).relu())
assert torch.equal(x.grad, 2 * out) and torch.equal(r.grad, 2 * out)
opcheck(torch.ops.fusedres.add_act_triton.default, (x.detach(), r.detach(), True, True))
print(*[name for name in seen if name.startswith("fusedres")])
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_compiled_graphs_hold_the_triton_op():
    environ = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CODE], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["fusedres.add_act_triton.default", "fusedres.add_act_backward_triton.default"]


def test_reasons(monkeypatch):
    op = registry.OPS["add_act"]
    monkeypatch.setattr(registry, "_TRITON_INSTALLED", False)
    assert op.triton is None or op._launcher is not None
    assert op.why_not("triton") == "triton is not installed"
    with fusedres.use_backend("triton"), pytest.raises(RuntimeError, match=r"add_act: triton is not installed"):
        registry.serve(op, torch.empty(3))
