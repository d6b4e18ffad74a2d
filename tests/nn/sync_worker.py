"""One process of the tests of SyncBatchNormAct2d: ``python sync_worker.py <rank> <processes> <folder> [cases] [cuda]``.

What it computes goes to ``<folder>/rank<rank>.pt`` as name -> whatever; test_sync.py starts the processes, computes the
same on the joined batch and asserts.
"""

from __future__ import annotations

import copy
import functools
import io
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from fusedres.nn.norm import conv_norm_act, folding_decision, norm_act, norm_act_max_pool, norm_add_norm_act


@dataclass
class Case:
    """A batch cut into ``parts`` images per process, through one module, ``steps`` times forward and backward."""

    name: str
    parts: tuple[int, ...]
    channels: int = 7
    area: tuple[int, int] = (5, 6)
    dtype: torch.dtype = torch.float32
    module: dict[str, Any] = field(default_factory=dict)
    channels_last: bool = False
    residual: str | None = None  # "same", "broadcast", "wider"
    data: str = "normal"  # "large mean", "tiny variance", "constant", "infinite"
    frozen: tuple[str, ...] = ()
    steps: int = 2

    def inputs(self, step: int) -> dict[str, Tensor | None]:
        """The joined batch: x, residual and dy."""
        generator = torch.Generator().manual_seed(1000 * step + self.channels)
        shape = (sum(self.parts), self.channels, *self.area)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1
        if self.data == "large mean":
            part = torch.repeat_interleave(torch.arange(len(self.parts)), torch.tensor(self.parts))
            x += 1e4 + 3 * part.view(-1, 1, 1, 1)  # and not the same in every process
        elif self.data == "tiny variance":
            x = 1 + 1e-5 * x
        elif self.data == "constant":
            x[:, 1] = 1234.567
        elif self.data == "infinite":
            x[-1, 2, 0, 0] = math.inf
            x[0, 3, 1, 1] = math.nan
        residual = None
        if self.residual is not None:
            size = shape if self.residual != "broadcast" else (1, self.channels, 1, 1)
            residual = torch.randn(size, generator=generator, dtype=torch.float64)
            residual = residual.to(torch.float64 if self.residual == "wider" else self.dtype)
        dy = torch.randn(shape, generator=generator, dtype=torch.float64)
        return {"x": x.to(self.dtype), "residual": residual, "dy": dy.to(self.dtype)}

    def prepared(self, kind: type[nn.Module], **arguments: Any) -> nn.Module:
        module = kind(self.channels, **self.module, **arguments)
        generator = torch.Generator().manual_seed(self.channels)
        for p in (module.weight, module.bias):
            if p is not None:
                p.data.copy_(torch.randn(self.channels, generator=generator) * 0.5 + 1)
        for name in ("weight", "bias"):
            if name in self.frozen:
                getattr(module, name).requires_grad_(False)
        return module


BF16, F16, F64 = torch.bfloat16, torch.float16, torch.float64
TWO = [
    Case("equal", (4, 4), channels=16),
    Case("odd channels", (3, 3), channels_last=True, residual="same"),
    Case("three channels", (2, 5), channels=3, channels_last=True),
    Case("many channels", (2, 1), channels=257, channels_last=True, residual="same"),
    Case("unequal", (1, 6), residual="same"),
    Case("second empty", (4, 0), channels_last=True, residual="same"),
    Case("first empty", (0, 5), channels=5),
    Case("all empty", (0, 0), residual="same"),
    Case("one value each", (1, 1), area=(1, 1)),
    Case("bfloat16", (3, 4), channels=24, dtype=BF16, channels_last=True, residual="same"),
    Case("bfloat16 alone", (3, 4), dtype=BF16, data="large mean"),
    Case("float16 throughout", (4, 2), channels=8, dtype=F16, module={"dtype": F16}, residual="same"),
    Case("float64", (3, 2), dtype=F64, module={"dtype": F64}, residual="same"),
    Case("large mean", (4, 3), data="large mean", residual="same"),
    Case("large mean, channels_last", (4, 3), data="large mean", channels_last=True),
    Case("tiny variance", (4, 3), data="tiny variance", module={"eps": 1e-12}),
    Case("constant", (4, 3), data="constant"),
    Case("infinite", (4, 3), data="infinite"),
    Case("cumulative average", (3, 4), module={"momentum": None}, steps=3),
    Case("no affine", (3, 4), module={"affine": False}, residual="same"),
    Case("no bias", (3, 4), module={"bias": False}),
    Case("no running statistics", (3, 4), module={"track_running_stats": False}),
    Case("nothing", (3, 4), module={"affine": False, "track_running_stats": False, "act": None}),
    Case("no activation", (3, 4), module={"act": None}, residual="same"),
    Case("frozen affine", (3, 4), frozen=("weight", "bias"), residual="same"),
    Case("frozen x", (3, 4), frozen=("x",), residual="same"),
    Case("only residual", (3, 4), frozen=("x", "weight", "bias"), residual="same"),
    Case("nothing needs a gradient", (3, 4), frozen=("x", "weight", "bias")),
    Case("broadcast residual", (3, 4), residual="broadcast"),
    Case("wider residual", (3, 4), residual="wider"),
    Case("strides", (3, 4), area=(8, 5)),
]
THREE = [
    Case("unequal, one empty", (2, 0, 5), channels_last=True, residual="same"),
    Case("unequal", (1, 4, 2), channels=33),
    Case("large mean", (2, 3, 4), data="large mean"),
    Case("bfloat16", (1, 2, 3), dtype=BF16, residual="same"),
    Case("cumulative average", (1, 1, 2), module={"momentum": None}, steps=3),
    Case("two empty", (0, 0, 3), channels=3),
]


@dataclass
class FoldedCase:
    """A 1x1 convolution and its norm, or a block, whose norms meet; folded, where every process can."""

    name: str
    parts: tuple[int, ...]
    kind: str = "conv"  # or "Bottleneck", "BasicBlock"
    dtype: torch.dtype = torch.float64
    folds: bool = True  # what is expected
    norm: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=lambda: {"folding": "always"})
    projection: bool = False
    residual: bool = False
    act: bool = True
    stride: int = 1
    area: tuple[int, int] = (6, 6)
    data: str = "normal"  # or "far apart": the processes' means differ; "nearly equal": channels, in the last process
    frozen: tuple[str, ...] = ()
    steps: int = 2

    @property
    def channels(self) -> int:
        return 16 if self.kind == "conv" else 32

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        if self.kind == "conv":
            conv = nn.Conv2d(self.channels, 48, 1, self.stride, bias=False)
            module: nn.Module = nn.ModuleDict({"conv": conv, "bn": nn.BatchNorm2d(48, **self.norm)})
        else:
            kind = getattr(fusedres, self.kind)
            inplanes, planes = self.channels, 8 if self.kind == "Bottleneck" else 32
            outplanes = planes * kind.expansion
            stride, shortcut = 1, None
            if self.projection:
                stride, planes = 2, planes // 2
                outplanes //= 2
                conv = nn.Conv2d(inplanes, outplanes, 1, 2, bias=False)
                shortcut = nn.Sequential(conv, nn.BatchNorm2d(outplanes, **self.norm))
            layer = functools.partial(nn.BatchNorm2d, **self.norm)
            module = kind(inplanes, planes, stride, shortcut, norm_layer=layer)
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d) and m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias)
        module = module.to(self.dtype)
        if self.data == "nearly equal":
            with torch.no_grad():
                weight = module["conv"].weight
                weight -= weight.mean(1, keepdim=True)
        for name in self.frozen:
            module.get_parameter(name).requires_grad_(False)
        return module

    def inputs(self, step: int) -> dict[str, Tensor]:
        """The joined batch: x, residual and dy."""
        generator = torch.Generator().manual_seed(step)
        n, (h, w) = sum(self.parts), self.area
        x = torch.randn(n, self.channels, h, w, generator=generator, dtype=torch.float64)
        part = torch.repeat_interleave(torch.arange(len(self.parts)), torch.tensor(self.parts)).view(-1, 1, 1, 1)
        if self.data == "far apart":
            x += 10 * part
        elif self.data == "nearly equal":
            x = torch.where(part == len(self.parts) - 1, x[:, :1] + 0.001 * x + 3, x)
        outplanes = 48 if self.kind == "conv" else self.channels // (2 if self.projection else 1)
        stride = 2 if self.projection else self.stride
        shape = (n, outplanes, -(-h // stride), -(-w // stride))
        residual, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        tensors = {"x": x, "dy": dy} | ({"residual": residual} if self.residual else {})
        return {k: v.to(self.dtype).contiguous(memory_format=torch.channels_last) for k, v in tensors.items()}

    def forward(self, module: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
        if self.kind != "conv":
            return module(x)
        act = nn.ReLU() if self.act else None
        decision = folding_decision(module)
        return conv_norm_act(module["conv"], module["bn"], x, residual, act, module.folding, decision)


ALWAYS, NEVER = {"folding": "always"}, {"folding": "never"}
RECOMPUTE = {"folding": "never", "recompute": True}
FOLDED_TWO = [
    FoldedCase("conv", (3, 2)),
    FoldedCase("conv, residual", (2, 4), residual=True),
    FoldedCase("conv, strided, linear", (9, 8), stride=2, act=False),
    FoldedCase("conv, cumulative average", (3, 2), norm={"momentum": None}, residual=True, steps=3),
    FoldedCase("conv, no affine", (3, 2), norm={"affine": False}),
    FoldedCase("conv, nothing", (3, 2), norm={"affine": False, "track_running_stats": False}, residual=True),
    FoldedCase("conv, means far apart", (3, 2), data="far apart", residual=True),
    FoldedCase("conv, frozen weight", (3, 2), frozen=("conv.weight",)),
    FoldedCase("conv, frozen norm", (3, 2), frozen=("bn.weight", "bn.bias")),
    FoldedCase("conv, float32", (12, 7), dtype=torch.float32, residual=True),
    FoldedCase("conv, float32, far apart", (12, 7), dtype=torch.float32, data="far apart"),
    FoldedCase("conv, bfloat16", (12, 7), dtype=BF16, residual=True),
    FoldedCase("conv, one too small", (3, 1), folds=False, residual=True),
    FoldedCase("conv, one empty", (4, 0), folds=False, residual=True),
    FoldedCase("conv, first empty", (0, 4), folds=False),
    FoldedCase("conv, one refuses", (6, 5), dtype=BF16, data="nearly equal", folds=False, steps=3),
    FoldedCase("conv, never", (3, 2), attributes=NEVER, folds=False),
    FoldedCase("Bottleneck", (3, 2), "Bottleneck"),
    FoldedCase("Bottleneck, projection", (5, 4), "Bottleneck", projection=True, area=(8, 8)),
    FoldedCase("Bottleneck, cumulative average", (3, 2), "Bottleneck", norm={"momentum": None}, steps=3),
    FoldedCase("Bottleneck, one too small", (3, 1), "Bottleneck", area=(5, 5), folds=False),
    FoldedCase("Bottleneck, one empty", (0, 3), "Bottleneck", folds=False),
    FoldedCase("Bottleneck, frozen", (3, 2), "Bottleneck", frozen=("conv1.weight", "bn3.bias")),
    FoldedCase("Bottleneck, recomputed", (3, 2), "Bottleneck", attributes=RECOMPUTE, folds=False),
    FoldedCase("Bottleneck, recomputed and folded", (3, 2), "Bottleneck", attributes=ALWAYS | {"recompute": True}),
    FoldedCase("BasicBlock, recomputed", (3, 2), "BasicBlock", attributes=RECOMPUTE, folds=False),
    FoldedCase(
        "BasicBlock, projection, recomputed", (3, 2), "BasicBlock", attributes=RECOMPUTE, projection=True, folds=False
    ),
    FoldedCase("BasicBlock, recomputed, one empty", (3, 0), "BasicBlock", attributes=RECOMPUTE, folds=False),
]
FOLDED_THREE = [
    FoldedCase("conv, residual", (3, 2, 4), residual=True),
    FoldedCase("conv, float32", (12, 7, 9), dtype=torch.float32, residual=True),
    FoldedCase("conv, one too small", (3, 1, 4), folds=False),
    FoldedCase("conv, one empty", (2, 0, 5), folds=False, residual=True),
    FoldedCase("Bottleneck", (3, 2, 4), "Bottleneck"),
    FoldedCase("Bottleneck, projection", (5, 4, 6), "Bottleneck", projection=True, area=(8, 8)),
    FoldedCase("Bottleneck, recomputed", (1, 2, 3), "Bottleneck", attributes=RECOMPUTE, folds=False),
    FoldedCase("BasicBlock, recomputed", (1, 2, 3), "BasicBlock", attributes=RECOMPUTE, folds=False),
]


class counting(TorchDispatchMode):
    """How often the op that applies a folded convolution is called meanwhile."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "conv1x1_bn_act_apply" in str(func)
        return func(*args, **(kwargs or {}))


def run_folded(case: FoldedCase, rank: int, device: torch.device) -> dict[str, Any]:
    module = fusedres.SyncBatchNormAct2d.convert_sync_batchnorm(case.module()).to(device)
    for name, value in case.attributes.items():
        setattr(module, name, value)
    results = {}
    for step in range(case.steps):
        own = {name: t.split(case.parts)[rank].to(device) for name, t in case.inputs(step).items()}
        own = {name: t.contiguous(memory_format=torch.channels_last) for name, t in own.items()}
        inputs = {name: own[name].requires_grad_() for name in ("x", "residual") if name in own}
        calls = []
        with recording(calls), counting() as counter:
            y = case.forward(module, own["x"], own.get("residual"))
        leaves = inputs | {name: p for name, p in module.named_parameters() if p.requires_grad}
        with recording(calls):
            grads = torch.autograd.grad(y, list(leaves.values()), own["dy"])
        found = {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, grads, strict=True)}}
        results[step] = {"calls": calls, "folded": counter.count, **{name: t.cpu() for name, t in found.items()}}
    return {"steps": results, "state": module.cpu().state_dict()}


def run_case(case: Case, rank: int, device: torch.device) -> dict[str, Any]:
    module = case.prepared(fusedres.SyncBatchNormAct2d).to(device)
    results = {}
    for step in range(case.steps):
        own = {
            name: v if v is None or v.size(0) != sum(case.parts) else v.split(case.parts)[rank]
            for name, v in case.inputs(step).items()
        }
        own = {name: None if v is None else v.to(device) for name, v in own.items()}
        if case.channels_last:
            own = {k: None if v is None else v.contiguous(memory_format=torch.channels_last) for k, v in own.items()}
        if case.name == "strides":
            own["x"] = own["x"].transpose(2, 3).contiguous().transpose(2, 3)
        x = own["x"].clone(memory_format=torch.preserve_format).requires_grad_("x" not in case.frozen)
        residual = None if own["residual"] is None else own["residual"].clone().requires_grad_()
        calls = []
        with recording(calls):
            y = module(x, residual)
            leaves = {"dx": x, "dresidual": residual, "dweight": module.weight, "dbias": module.bias}
            leaves = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
            grads = torch.autograd.grad(y, list(leaves.values()), own["dy"].to(y.dtype)) if leaves else ()
        found = {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}
        results[step] = {"calls": calls, **{name: value.cpu() for name, value in found.items()}}
        assert y.is_contiguous(memory_format=torch.channels_last if case.channels_last else torch.contiguous_format)
    return {"steps": results, "state": module.cpu().state_dict()}


class recording:
    """Names of the collectives that are started meanwhile."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def __enter__(self) -> None:
        from fusedres.ops import batch_norm_sync

        self.kept = (batch_norm_sync._all_gather, dist.all_reduce)

        def noted(name, function):
            def call(*args, **kwargs):
                self.calls.append(name)
                return function(*args, **kwargs)

            return call

        batch_norm_sync._all_gather = noted("all_gather", self.kept[0])
        dist.all_reduce = noted("all_reduce", self.kept[1])

    def __exit__(self, *exc: object) -> None:
        from fusedres.ops import batch_norm_sync

        batch_norm_sync._all_gather, dist.all_reduce = self.kept


def error_of(function: Any, module: nn.Module | None = None) -> tuple[str, str, bool]:
    """Class and words of what ``function()`` raises, and whether it left the module's state as it was."""
    before = {k: v.clone() for k, v in module.state_dict().items()} if module is not None else {}
    try:
        function()
    except Exception as error:
        same = all(torch.equal(v, before[k]) for k, v in module.state_dict().items()) if module is not None else True
        return type(error).__name__, str(error), same
    return "", "", False


def make_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return fusedres.models.cifar_resnet(8, num_classes=5).to(dtype)


def images(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 6, 3, 8, 8, generator=generator, dtype=dtype), torch.arange(18).view(3, 6) % 5


def train(net: nn.Module, batches: list[tuple[Tensor, Tensor]], share: float = 1.0) -> list[float]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for x, target in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), target, reduction="sum") * share
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def run_two(rank: int) -> dict[str, Any]:
    """What needs two processes beside the cases."""
    found: dict[str, Any] = {}
    norm = fusedres.SyncBatchNormAct2d

    # evaluation, and no process group: each process by itself, rank 1 not at all
    if rank == 0:
        x, module = torch.randn(3, 5, 4, 4), norm(5).eval()
        module.running_mean.normal_()
        plain = fusedres.BatchNormAct2d(5).eval()
        plain.load_state_dict(module.state_dict())
        calls = []
        with recording(calls):
            found["evaluation"] = torch.equal(module(x), plain(x)) and not calls
            module = norm(5, track_running_stats=False).eval()
            plain = fusedres.BatchNormAct2d(5, track_running_stats=False)
            found["evaluation by the batch"] = torch.equal(module(x), plain(x)) and not calls

    x = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(rank))
    module = norm(5)
    found["repeatable"] = all(torch.equal(norm(5)(x), module(x)) for _ in range(5))
    with torch.no_grad():
        found["no_grad"] = torch.equal(norm(5)(x), module(x))
    residual = torch.randn_like(x)

    # blocks call it fused
    eager = norm(5, act=None)
    relu = nn.ReLU()
    calls = []
    with recording(calls):
        fused = [
            norm_act(norm(5, act=None), x, residual, relu),
            norm_act(norm(5, act=None), x, None, relu),
            norm_add_norm_act(norm(5, act=None), x, norm(5, act=None), residual, relu),
            norm_act_max_pool(norm(5, act=None), x, nn.MaxPool2d(2), relu),
        ]
    want = [
        relu(eager(x) + residual),
        relu(eager(x)),
        relu(eager(x) + eager(residual)),
        nn.functional.max_pool2d(relu(eager(x)), 2),
    ]
    found["blocks"] = [(a - b).abs().max().item() for a, b in zip(fused, want, strict=True)]
    found["blocks' collectives"] = len(calls)
    hooked, seen = norm(5, act=None), []
    hooked.register_forward_hook(lambda *args: seen.append(1))
    norm_act(hooked, x, residual, relu)
    found["hooks"] = seen == [1]

    # groups
    groups = [dist.new_group([0]), dist.new_group([1]), dist.new_group([0, 1])]
    alone = norm(5, process_group=groups[rank])
    plain = fusedres.BatchNormAct2d(5)
    found["group of one"] = torch.equal(alone(x), plain(x))
    found["not in the group"] = torch.equal(norm(5, process_group=groups[1 - rank])(x), plain(x))
    both = norm(5, process_group=groups[2])
    found["own group"] = torch.equal(both(x), norm(5)(x))

    twin = copy.deepcopy(both)
    buffer = io.BytesIO()
    torch.save(both, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=False)
    found["copies"] = (
        twin.process_group is groups[2]
        and both.process_group is groups[2]
        and read.process_group is None
        and torch.equal(twin(x), both(x))
        and torch.equal(read(x), norm(5)(x))
    )

    # errors, the same on both
    module = norm(5)
    found["errors"] = {
        "one value": error_of(lambda: module(x[: 1 - rank, :, :1, :1]), module),
        "3-D": error_of(lambda: module(x[0]), module),
        "not a tensor": error_of(lambda: module([x]), module),
        "integer": error_of(lambda: module(x.long()), module),
        "dtype": error_of(lambda: module(x.double()), module),
        "channels": error_of(lambda: module(x[:, :4]), module),
        "residual shape": error_of(lambda: module(x, residual[:, :4]), module),
        "residual not a tensor": error_of(lambda: module(x, 1.0), module),
        "eps": error_of(lambda: norm(5, eps=0.0)(x)),
        "act": error_of(lambda: norm(5, act="gelu")),
        "vmap": error_of(lambda: torch.func.vmap(module)(x[None]), module),
        "jit.trace": error_of(lambda: torch.jit.trace(module, x), module),
        "forward AD": error_of(lambda: torch.func.jvp(module, (x,), (x,)), module),
    }
    with fusedres.use_backend("cuda"):
        found["errors"]["backend"] = error_of(lambda: module(x), module)
    dist.barrier()  # nobody is left in a collective

    # symbolic tracing keeps the call
    graph = torch.fx.symbolic_trace(nn.Sequential(norm(5)))
    found["fx"] = torch.equal(graph(x), norm(5)(x))

    found["twice"] = second_derivatives(rank)
    found["twice, folded"] = second_derivatives_folded(rank)

    # one graph, collectives included
    x = x.detach().requires_grad_()
    plain, module = norm(5), norm(5)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    results = []
    for function in (plain, compiled):
        y = function(x, residual)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    results[0] += (plain.running_var,)
    results[1] += (module.running_var,)
    found["compiled"] = all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    with torch.autocast("cpu", torch.bfloat16):
        module = nn.Sequential(nn.Conv2d(5, 5, 1), norm(5))
        y = module(x)
        y.float().sum().backward()
    found["autocast"] = (y.dtype, module[1].weight.grad.dtype, bool(y.isfinite().all()))

    # DistributedDataParallel
    inputs, targets = images()
    share = [4, 2]
    batches = [(a.split(share)[rank], b.split(share)[rank]) for a, b in zip(inputs, targets, strict=True)]
    net = norm.convert_sync_batchnorm(make_net())
    ddp = nn.parallel.DistributedDataParallel(net)
    # DDP divides the sum of the gradients by the number of processes.
    losses = train(ddp, batches, share=2 / 6)
    found["ddp"] = {"losses": losses, "state": net.state_dict()}
    net.eval()
    found["ddp evaluation"] = net(inputs[0]).detach()

    net = norm.convert_sync_batchnorm(make_net(torch.float32))
    ddp = nn.parallel.DistributedDataParallel(net)
    own = [(a.float(), b) for a, b in batches]
    own = [(a.contiguous(memory_format=torch.channels_last), b) for a, b in own]
    found["ddp float32"] = {"losses": train(ddp, own, share=2 / 6), "state": net.state_dict()}
    return found


def twice_inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(5, 5, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))


def second_derivatives(rank: int) -> tuple[Tensor, Tensor]:
    x, v = (t.split([4, 1])[rank] for t in twice_inputs())
    x.requires_grad_()
    norm = fusedres.SyncBatchNormAct2d(5).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 5))
    y = norm(x, v)
    (dx,) = torch.autograd.grad((y * y * v).sum(), (x,), create_graph=True)
    return torch.autograd.grad(((dx + v) ** 2).sum(), (x, norm.weight))


def second_derivatives_folded(rank: int) -> dict[str, Tensor]:
    case = next(case for case in FOLDED_TWO if case.name == "conv, residual")
    module = fusedres.SyncBatchNormAct2d.convert_sync_batchnorm(case.module())
    module.folding = "always"
    own = {name: t.split(case.parts)[rank] for name, t in case.inputs(0).items()}
    return penalty(module, functools.partial(case.forward, module), **own)


def penalty(module: nn.Module, forward: Any, x: Tensor, residual: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Gradients of the squares of gradients."""
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    out = forward(x, residual.contiguous(memory_format=torch.channels_last))
    (dx,) = torch.autograd.grad((out * out * dy).sum(), (x,), create_graph=True)
    names = [name for name, _ in module.named_parameters()]
    second = torch.autograd.grad((dx * dx).sum(), [x, *module.parameters()])
    return dict(zip(["x", *names], second, strict=True)) | {"dx": dx.detach()}


def main() -> None:
    rank, processes, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if "cuda" in sys.argv[4:] else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    cases = TWO if processes == 2 else THREE
    found: dict[str, Any] = {"cases": {case.name: run_case(case, rank, device) for case in cases}}
    folded = FOLDED_TWO if processes == 2 else FOLDED_THREE
    found["folded"] = {case.name: run_folded(case, rank, device) for case in folded}
    if processes == 2 and "cases" not in sys.argv[4:]:
        found |= run_two(rank)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
