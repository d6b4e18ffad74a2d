"""SyncBatchNormAct2d over two and three gloo processes against one process on the joined batch."""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedres
from fusedres import SyncBatchNormAct2d, verification

_file = Path(__file__).with_name("sync_worker.py")
_spec = importlib.util.spec_from_file_location("sync_worker", _file)
worker = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)

BACKENDS = ["auto"]
if verification.backends("cpu")["cpu"] is None:
    BACKENDS.append("reference")  # beside the kernels


def launch(folder, processes, *arguments, **environment):
    """What each process found."""
    root = str(Path(fusedres.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, **environment}
    command = [sys.executable, "-W", "ignore", str(_file)]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(processes), str(folder), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(processes)
    ]
    try:
        for process in running:
            printed, _ = process.communicate(timeout=150)
            assert process.returncode == 0, printed
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Processes and backend -> what each process found; started once."""
    found = {}

    def of(processes, backend="auto"):
        if (processes, backend) not in found:
            only = {"auto": [], "reference": ["cases"], "two GPUs": ["cases", "cuda"]}[backend]
            folder = tmp_path_factory.mktemp("ranks")
            forced = "reference" if backend == "reference" else "auto"
            found[processes, backend] = launch(folder, processes, *only, FUSEDRES_BACKEND=forced)
        return found[processes, backend]

    return of


@pytest.fixture(scope="module")
def two(launched):
    return launched(2)


def eager_step(module, x, residual, dy, frozen, keep=None):
    """nn.BatchNorm2d, addition and ReLU; with ``keep`` in place of the ReLU's own mask."""
    x = x.detach().clone().requires_grad_("x" not in frozen)
    residual = None if residual is None else residual.detach().clone().requires_grad_()
    y = module(x)
    y = y if residual is None else y + residual
    pre = y
    if module.relu:
        y = torch.relu(y) if keep is None else y * keep
    leaves = {"dx": x, "dresidual": residual, "dweight": module.weight, "dbias": module.bias}
    leaves = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype)) if leaves else ()
    out = torch.relu(pre) if module.relu else pre
    return {"y": out.detach(), **dict(zip(leaves, grads, strict=True))}


def eager_twin(case, dtype):
    arguments = {k: v for k, v in case.module.items() if k != "act"}
    bias = arguments.pop("bias", True)
    module = nn.BatchNorm2d(case.channels, **arguments)
    if not bias:
        module.register_parameter("bias", None)
    like = case.prepared(fusedres.BatchNormAct2d)
    module.load_state_dict(like.state_dict())
    for name in ("weight", "bias"):
        if name in case.frozen:
            getattr(module, name).requires_grad_(False)
    module.relu = case.module.get("act", "relu") == "relu"
    return module.to(dtype) if dtype is not None else module


def joined(case, ranks, step):
    """One dict as a single process would have it: parts joined, parameter gradients added."""
    parts = [rank["cases"][case.name]["steps"][step] for rank in ranks]
    result = {}
    for name in parts[0]:
        if name in ("dweight", "dbias") or (name == "dresidual" and case.residual == "broadcast"):
            result[name] = sum(part[name].double() for part in parts)
        elif name != "calls":
            result[name] = torch.cat([part[name] for part in parts])
    return result


def check_error(name, ours, eager, exact):
    """The rule of fusedres/verification.py; what is not finite must be so in the same places."""
    finite = exact.isfinite()
    if not finite.all():
        assert torch.equal(ours.isfinite(), finite), name
        assert torch.equal(ours[~finite].isnan(), exact[~finite].isnan()), name
        ours, eager, exact = (torch.where(finite, t.double(), 0.0) for t in (ours, eager, exact))
    if exact.numel() == 0:
        return
    dtype = eager.dtype if eager.dtype != torch.float64 or ours.dtype == torch.float64 else ours.dtype
    tiny = (8 if dtype == torch.float64 else 1) * torch.finfo(dtype).eps * exact.abs().max()  # "exact" is float64 too
    allowed = 2 * (eager.double() - exact).abs().max() + tiny
    error = (ours.double() - exact).abs().max()
    assert error <= allowed, f"{name}: {error:.3e} > {allowed:.3e}"


def _case(processes, case, where, *marks):
    return pytest.param(processes, case, where, marks=marks, id=f"{processes} processes, {case.name}, {where}")


TWO_GPUS = (pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))
CASES = [_case(2, case, backend) for backend in BACKENDS for case in worker.TWO]
CASES += [_case(3, case, "auto") for case in worker.THREE]
CASES += [_case(2, case, "two GPUs", *TWO_GPUS) for case in worker.TWO]


@pytest.mark.parametrize(("processes", "case", "where"), CASES)
def test_as_one_process_on_the_joined_batch(launched, processes, case, where):
    """Output, gradients and running statistics by the project's rule of errors; the collectives that are needed."""
    ranks = launched(processes, where)
    eager, exact = eager_twin(case, None), eager_twin(case, torch.float64)
    for step in range(case.steps):
        inputs = case.inputs(step)
        got = joined(case, ranks, step)
        if case.channels_last:
            inputs = {
                k: None if v is None else v.contiguous(memory_format=torch.channels_last) for k, v in inputs.items()
            }
        wide = {k: None if v is None else v.double() for k, v in inputs.items()}
        keep = ~(got["y"] <= 0) if exact.relu else None
        want = eager_step(exact, **wide, frozen=case.frozen, keep=keep)
        theirs = eager_step(eager, **inputs, frozen=case.frozen, keep=keep)
        assert set(got) == set(want)
        for name, value in got.items():
            check_error(f"{name} in step {step}", value, theirs[name], want[name])

        calls = [rank["cases"][case.name]["steps"][step]["calls"] for rank in ranks]
        meets_in_backward = "x" not in case.frozen
        assert all(c == ["all_gather"] + ["all_reduce"] * meets_in_backward for c in calls)

    states = [rank["cases"][case.name]["state"] for rank in ranks]
    assert list(states[0]) == list(eager.state_dict())
    for name, value in states[0].items():
        assert all(torch.equal(state[name].nan_to_num(7.0), value.nan_to_num(7.0)) for state in states), name
        if name == "num_batches_tracked":
            assert value == case.steps
        elif name.startswith("running"):
            check_error(name, value, eager.state_dict()[name], exact.state_dict()[name])


# ---- folded regions and recomputed activations -----------------------------------------------------------------------


class WrittenOut(nn.Module):
    """A folded case in PyTorch's own modules; with ``mask`` in place of the last ReLU's own."""

    def __init__(self, case):
        super().__init__()
        self.case, self.inner, self.mask = case, case.module(), None

    def forward(self, x, residual=None):
        m = self.inner
        if self.case.kind == "conv":
            y = m["bn"](m["conv"](x))
            y = y if residual is None else y + residual
        elif self.case.kind == "Bottleneck":
            y = torch.relu(m.bn2(m.conv2(torch.relu(m.bn1(m.conv1(x))))))
            y = m.bn3(m.conv3(y)) + (x if m.downsample is None else m.downsample(x))
        else:
            y = m.bn2(m.conv2(torch.relu(m.bn1(m.conv1(x)))))
            y = y + (x if m.downsample is None else m.downsample(x))
        if not self.case.act:
            return y
        return torch.relu(y) if self.mask is None else y * self.mask


def written_out_step(module, inputs, mask=None):
    """Of the joined batch: what each process has of it joined, parameter gradients added."""
    module.mask = mask
    inputs = {name: t.detach().clone(memory_format=torch.preserve_format) for name, t in inputs.items()}
    dy = inputs.pop("dy")
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    y = module(**leaves)
    leaves |= {name: p for name, p in module.inner.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, grads, strict=True)}}


FOLDED = [_case(2, case, backend) for backend in BACKENDS for case in worker.FOLDED_TWO]
FOLDED += [_case(3, case, "auto") for case in worker.FOLDED_THREE]
FOLDED += [_case(2, case, "two GPUs", *TWO_GPUS) for case in worker.FOLDED_TWO]


@pytest.mark.parametrize(("processes", "case", "where"), FOLDED)
def test_folded_as_one_process_on_the_joined_batch(launched, processes, case, where):
    """By the rule of errors, float64 to its last digits; folded in all processes, or in none."""
    ranks = launched(processes, where)
    eager, exact = WrittenOut(case), WrittenOut(case).double()
    for step in range(case.steps):
        parts = [rank["folded"][case.name]["steps"][step] for rank in ranks]
        assert [part["folded"] > 0 for part in parts] == [case.folds] * processes
        assert all(part["calls"] == parts[0]["calls"] for part in parts)
        inputs = case.inputs(step)
        got = {}
        for name in parts[0].keys() - {"calls", "folded"}:
            tensors = [part[name] for part in parts]
            joins = name in ("y", "dx", "dresidual")
            got[name] = torch.cat(tensors) if joins else sum(t.double() for t in tensors)
        mask = ~(got["y"] <= 0) if case.dtype != torch.float64 else None
        want = written_out_step(exact, {name: t.double() for name, t in inputs.items()}, mask)
        theirs = written_out_step(eager, inputs, mask)
        assert set(got) == set(want)
        for name, value in got.items():
            if case.dtype == torch.float64:
                torch.testing.assert_close(value, want[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
            else:
                check_error(f"{name} in step {step}", value, theirs[name], want[name])

    states = [rank["folded"][case.name]["state"] for rank in ranks]
    assert list(states[0]) == list(eager.inner.state_dict())
    for name, value in states[0].items():
        assert all(torch.equal(state[name], value) for state in states), name
        if "running" in name and case.dtype != torch.float64:
            check_error(name, value, eager.inner.state_dict()[name], exact.inner.state_dict()[name])
        else:
            torch.testing.assert_close(value, eager.inner.state_dict()[name], rtol=1e-9, atol=1e-9)


def test_second_derivatives_of_a_folded_region(two):
    case = next(case for case in worker.FOLDED_TWO if case.name == "conv, residual")
    module = WrittenOut(case)
    want = worker.penalty(module.inner, module, **case.inputs(0))
    for name, value in want.items():
        found = [rank["twice, folded"][name] for rank in two]
        got = torch.cat(found) if name in ("x", "dx") else sum(found)
        torch.testing.assert_close(got, value, rtol=1e-8, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_statistics_keep_a_large_mean(two):
    """Means of 1e4 that differ between the processes, standard deviation 2: exact to float32's last bits."""
    case = next(c for c in worker.TWO if c.name == "large mean")
    case = copy.copy(case)
    x = case.inputs(0)["x"].double()
    y = joined(case, two, 0)["y"].double()
    norm = case.prepared(nn.BatchNorm2d).double()
    want = torch.relu(norm(x) + case.inputs(0)["residual"].double())
    assert (y - want).abs().max() < 2e-6


@pytest.mark.parametrize(
    "what",
    [
        "evaluation",
        "evaluation by the batch",
        "repeatable",
        "no_grad",
        "hooks",
        "group of one",
        "not in the group",
        "own group",
        "copies",
        "fx",
        "compiled",
    ],
)
def test_in_two_processes(two, what):
    """Each compared with what it must equal, bit for bit, by the processes themselves."""
    assert all(rank[what] for rank in two if what in rank)
    assert any(what in rank for rank in two)


def test_blocks_call_it_fused(two):
    for rank in two:
        assert max(rank["blocks"]) < 1e-6
        assert rank["blocks' collectives"] == 1 + 1 + 2 + 1


ERRORS = {
    "one value": ("ValueError", "more than 1 value per channel"),
    "3-D": ("ValueError", "expected 4D input"),
    "not a tensor": ("TypeError", "x must be a Tensor, but got list"),
    "integer": ("NotImplementedError", "torch.int64"),
    "dtype": ("RuntimeError", "mixed dtype"),
    "channels": ("RuntimeError", "should contain 4 elements"),
    "residual shape": ("RuntimeError", "residual must have a shape that broadcasts"),
    "residual not a tensor": ("TypeError", "residual must be a Tensor, but got float"),
    "eps": ("ValueError", "eps must be positive"),
    "act": ("ValueError", 'act must be "relu" or None'),
    "vmap": ("RuntimeError", "cannot be traced"),
    "jit.trace": ("RuntimeError", "cannot be traced"),
    "forward AD": ("RuntimeError", "cannot be traced"),
    "backend": ("RuntimeError", "backend 'cuda' cannot serve"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_bad_input(two, what):
    """Raised in every process, so that none is left waiting, and nothing is half-updated."""
    for rank in two:
        kind, words, unchanged = rank["errors"][what]
        assert (kind, unchanged) == (ERRORS[what][0], True), words
        assert ERRORS[what][1] in words


def test_second_derivatives(two):
    """In float64, of a loss that uses the first ones, on unequal parts."""
    x, v = worker.twice_inputs()
    x.requires_grad_()
    norm = nn.BatchNorm2d(5).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 5))
    y = torch.relu(norm(x) + v)
    (dx,) = torch.autograd.grad((y * y * v).sum(), (x,), create_graph=True)
    want = torch.autograd.grad(((dx + v) ** 2).sum(), (x, norm.weight))
    got = [torch.cat([rank["twice"][0] for rank in two]), sum(rank["twice"][1] for rank in two)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_autocast(two):
    assert all(rank["autocast"] == (torch.bfloat16, torch.float32, True) for rank in two)


def test_distributed_data_parallel(two):
    """A ResNet-8 in float64, three steps of SGD on unequal parts: the curve and the weights of a single process."""
    net = worker.make_net()
    inputs, targets = worker.images()
    losses = worker.train(net, list(zip(inputs, targets, strict=True)), share=1 / 6)
    both = [sum(parts) / 2 for parts in zip(*(rank["ddp"]["losses"] for rank in two), strict=True)]
    torch.testing.assert_close(torch.tensor(both), torch.tensor(losses), rtol=1e-9, atol=0)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(two[0]["ddp"]["state"][name], value, rtol=1e-8, atol=1e-10)
        assert torch.equal(two[0]["ddp"]["state"][name], two[1]["ddp"]["state"][name]), name
    net.eval()
    torch.testing.assert_close(two[0]["ddp evaluation"], net(inputs[0]), rtol=1e-8, atol=1e-10)


def test_distributed_data_parallel_float32(two):
    """The same in float32 and channels_last, as near to float64 as eager is in the same three steps."""
    inputs, targets = worker.images()
    exact = worker.train(worker.make_net(), list(zip(inputs, targets, strict=True)), share=1 / 6)
    both = [sum(parts) / 2 for parts in zip(*(rank["ddp float32"]["losses"] for rank in two), strict=True)]
    torch.testing.assert_close(torch.tensor(both), torch.tensor(exact), rtol=1e-4, atol=0)
    states = [rank["ddp float32"]["state"] for rank in two]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_group_of_one_through_its_collectives(device, layout, monkeypatch):
    """What one device can show of the way over processes: its ops, streams, collectives and gradients."""
    monkeypatch.setattr(SyncBatchNormAct2d, "is_synchronised", lambda self: True)
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        generator = torch.Generator().manual_seed(0)
        x, residual, dy = (
            torch.randn(6, 35, 9, 11, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
            for _ in range(3)
        )
        results = []
        for kind, dtype, where in ((SyncBatchNormAct2d, torch.float32, device), (nn.BatchNorm2d, torch.float64, "cpu")):
            module = kind(35).to(where, dtype)
            leaves = [t.detach().to(where, dtype).requires_grad_() for t in (x, residual)]
            out = torch.relu(module(leaves[0]) + leaves[1]) if kind is nn.BatchNorm2d else module(*leaves)
            grads = torch.autograd.grad(out, [*leaves, module.weight, module.bias], dy.to(where, dtype))
            results.append([out.detach(), *grads, module.running_mean, module.running_var])
        for ours, exact in zip(*results, strict=True):
            torch.testing.assert_close(ours.double().cpu(), exact, rtol=1e-5, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()


# ---- the module, in one process --------------------------------------------------------------------------------------


def test_without_a_group_it_is_the_plain_module(backend):
    x, residual = torch.randn(3, 5, 4, 4), torch.randn(3, 5, 4, 4)
    ours, plain = SyncBatchNormAct2d(5), fusedres.BatchNormAct2d(5)
    for _ in range(2):
        assert torch.equal(ours(x, residual), plain(x, residual))
    for a, b in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="more than 1 value"):
        ours(x[:1, :, :1, :1])
    ours.eval(), plain.eval()
    assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None, "eps": 1e-3}, {"dtype": torch.float64}],
    ids=str,
)
def test_same_state_as_torch(arguments):
    ours, theirs = SyncBatchNormAct2d(5, **arguments), nn.SyncBatchNorm(5, **arguments)
    assert isinstance(ours, nn.BatchNorm2d)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


def test_positional_arguments_are_torchs():
    group = object()
    ours = SyncBatchNormAct2d(5, 1e-3, 0.2, False, True, group, "cpu", torch.float64)
    assert (ours.eps, ours.momentum, ours.affine, ours.process_group) == (1e-3, 0.2, False, group)
    assert ours.running_mean.dtype == torch.float64


def test_repr_and_pickle():
    module = SyncBatchNormAct2d(5, eps=0.01, act=None)
    assert repr(module).startswith("SyncBatchNormAct2d(5, eps=0.01")
    assert "act=None" in repr(module)
    twin = pickle.loads(pickle.dumps(module))
    assert type(twin) is SyncBatchNormAct2d
    assert (twin.eps, twin.act, twin.process_group) == (0.01, None, None)


def test_deepcopy_shares_nothing_but_the_group():
    module = SyncBatchNormAct2d(5, process_group=object())
    net = nn.ModuleList([module, module])
    twin = copy.deepcopy(net)
    assert twin[0] is twin[1]
    assert twin[0].process_group is module.process_group
    assert all(a is not b for a, b in zip(twin.parameters(), net.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), net.state_dict().values(), strict=True))


def test_convert():
    group = object()
    net = nn.Sequential(
        fusedres.BasicBlock(4, 4), fusedres.BatchNormAct2d(4, momentum=None), nn.BatchNorm2d(4, affine=False), nn.ReLU()
    )
    net[1].eval()
    net[0].bn1.weight.requires_grad_(False)
    state, parameters = net.state_dict(), list(net.parameters())
    same = SyncBatchNormAct2d.convert_sync_batchnorm(net, group)
    assert same is net
    norms = [net[0].bn1, net[0].bn2, net[1], net[2]]
    assert all(type(m) is SyncBatchNormAct2d and m.process_group is group for m in norms)
    assert [m.act for m in norms] == [None, None, "relu", None]
    assert [m.training for m in norms] == [True, True, False, True]
    assert net[1].momentum is None
    assert net[2].weight is None
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert list(net.state_dict()) == list(state)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(net.state_dict().values(), state.values(), strict=True))
    again = SyncBatchNormAct2d.convert_sync_batchnorm(net)
    assert again[1].process_group is None
    assert again[1].act == "relu"


def test_convert_one_module():
    converted = SyncBatchNormAct2d.convert_sync_batchnorm(fusedres.BatchNormAct2d(4, bias=False))
    assert type(converted) is SyncBatchNormAct2d
    assert converted.bias is None
    assert converted.weight.device.type == "cpu"
    linear = nn.Linear(2, 2)
    assert SyncBatchNormAct2d.convert_sync_batchnorm(linear) is linear


def test_convert_others():
    """Batch norms that are not 2d go the way of torch's converter; what would lose its forward is refused."""
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm3d(3), nn.SyncBatchNorm(3), nn.InstanceNorm2d(3))
    kinds = [type(m) for m in SyncBatchNormAct2d.convert_sync_batchnorm(net)]
    assert kinds == [nn.SyncBatchNorm] * 3 + [nn.InstanceNorm2d]

    class Other(nn.BatchNorm2d):
        def forward(self, x):
            return -x

    class Named(nn.BatchNorm2d):
        pass

    with pytest.raises(TypeError, match="Other has a forward of its own"):
        SyncBatchNormAct2d.convert_sync_batchnorm(nn.Sequential(Other(3)))
    with pytest.raises(ValueError, match="LazyBatchNorm2d must be initialised"):
        SyncBatchNormAct2d.convert_sync_batchnorm(nn.LazyBatchNorm2d())
    assert type(SyncBatchNormAct2d.convert_sync_batchnorm(Named(3))) is SyncBatchNormAct2d


def test_converted_blocks_stay_fused(backend, step):
    """Without a process group a converted block is bit for bit the block it was."""
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(4, 16, 1, bias=False), nn.BatchNorm2d(16))
    block = fusedres.Bottleneck(4, 4, downsample=shortcut)
    twin = SyncBatchNormAct2d.convert_sync_batchnorm(copy.deepcopy(block))
    x = torch.randn(2, 4, 8, 8)
    for training in (True, False):
        a, b = (step(m.train(training), x) for m in (block, twin))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
