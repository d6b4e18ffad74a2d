"""Where the time of a training step goes: every kernel of it by the call that launched it, in groups that add up.

Each call of an op is preceded by a mark, a kernel of its own, so that kernels are told apart by order and not by name.
Their times are those of a CUDA graph of the same step, profiled without marks. The passes of folded convolutions are
held against the bandwidth of a copy and the rate of a matrix product that the device reaches in the same run.

Run by the driver as a process of its own; a row of JSON per kind goes to a file as it is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedres.ops import conv1x1_bn_act as folded
from fusedres.ops import registry
from fusedres.ops.calls import arguments_of, call_traffic
from fusedres.ops.folded_bottleneck import FoldedBottleneckFunction
from fusedres.ops.tracing import in_backward

from .device import CudaDevice, HostDevice
from .models import FOLDING, make_step, served_as

Kernels = list[tuple[str, float]]

# Every kernel is of one of them.
GROUPS = (
    "3x3 convolutions",
    "folded: conv1",
    "folded: moments",
    "folded: output",
    "folded: products",
    "folded: input gradient",
    "folded: gradient of conv1's input",
    "1x1 convolutions",
    "batch norm and elementwise",
    "small matrices",
    "other small ops of folded blocks",
    "stem",
    "optimizer",
    "rest",
)
_SMALL = ("conv1x1_bn_fold", "conv1x1_bn_unfold", "conv1x1_bn_update_running")


@dataclass(frozen=True)
class Call:
    """A call of an op: its group and its name, and of a pass of a folded convolution its shape and its work."""

    group: str
    op: str
    shape: str = ""
    bytes: int = 0
    flops: int = 0


# ---- what a call is --------------------------------------------------------------------------------------------------


def _shape(n: int, k: int, *inputs: Tensor | None) -> str:
    return f"{n}x{'+'.join(str(y.size(1)) for y in inputs if y is not None)}->{k}"


# Of a pass over the pixels, from its arguments by name: group, shape, flops.


def _statistics(a: SimpleNamespace) -> tuple[str, str, int]:
    n, (k, c) = folded.pixels(a.x, 1), a.weight.shape
    return "folded: conv1", _shape(n, k, a.x), 2 * n * c * k


def _moments(a: SimpleNamespace) -> tuple[str, str, int]:
    n, c = folded.pixels(a.y, a.stride), a.y.size(1)
    return "folded: moments", f"{n}x{c}", n * c * (c + 1)  # of one triangle


def _apply(a: SimpleNamespace) -> tuple[str, str, int]:
    n, k = folded.pixels(a.y, a.stride), a.folded.size(0)
    group = "folded: gradient of conv1's input" if in_backward() else "folded: output"
    inputs = a.y.size(1) + (0 if a.y2 is None else a.y2.size(1))
    return group, _shape(n, k, a.y, a.y2), 2 * n * k * inputs


def _reduce(a: SimpleNamespace) -> tuple[str, str, int]:
    n, k = folded.pixels(a.y, a.stride), a.dy.size(1)
    inputs = a.need_products * (a.y.size(1) + (0 if a.y2 is None else a.y2.size(1)))
    return "folded: products", _shape(n, k, a.y, a.y2), 2 * n * k * inputs


def _backward_apply(a: SimpleNamespace) -> tuple[str, str, int]:
    n, k = folded.pixels(a.y, a.stride), a.dy.size(1)
    wanted = [x for x, need in ((a.y, a.need_dx), (a.y2, a.need_dx2)) if need]
    flops = sum(2 * n * x.size(1) * (k + x.size(1)) for x in wanted)
    return "folded: input gradient", _shape(n, k, *wanted), flops


_PASSES: dict[str, Callable[[SimpleNamespace], tuple[str, str, int]]] = {
    "conv1x1_statistics": _statistics,
    "conv1x1_moments": _moments,
    "conv1x1_bn_act_apply": _apply,
    "conv1x1_bn_act_backward_reduce": _reduce,
    "conv1x1_bn_act_backward_apply": _backward_apply,
}


def own_call(op: str, args: Sequence[Any]) -> Call:
    """A call of an op of this package, by any backend."""
    if op in _PASSES:
        func = getattr(torch.ops.fusedres, op).default
        group, shape, flops = _PASSES[op](arguments_of(func, args))
        return Call(group, op, shape, call_traffic(func, args).floor, flops)
    group = "stem" if "max_pool" in op else "small matrices" if op in _SMALL else "batch norm and elementwise"
    return Call(group, op)


def aten_call(op: str, args: Sequence[Any], is_activation: Callable[[Any], bool], in_block: bool) -> Call:
    """A call of an op of ATen; a first convolution and what pools are the stem."""
    if op.startswith("convolution"):
        weight = args[2 if op == "convolution_backward" else 1]
        rows, columns = weight.shape[2:]
        if weight.size(1) <= 4 or rows * columns > 9:
            return Call("stem", op)
        return Call("1x1 convolutions" if rows * columns == 1 else "3x3 convolutions", op)
    if op.startswith(("_foreach", "_fused")):
        return Call("optimizer", op)
    if "max_pool" in op:
        return Call("stem", op)
    if any(is_activation(a) for a in args):
        return Call("batch norm and elementwise", op)
    return Call("other small ops of folded blocks" if in_block else "rest", op)


# ---- recording -------------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Marks and notes every call of an op that runs under it, of ATen and of this package.

    Args:
        batch: images, by which activations are known. weights: the shapes of the parameters.

    Attributes:
        calls: in the order of their marks.
    """

    def __init__(self, mark: Callable[[], None], batch: int, weights: Iterable[torch.Size]) -> None:
        super().__init__()
        self._mark, self._batch, self._weights = mark, batch, set(weights)
        self._in_launcher = self._in_block = False
        self.calls: list[Call] = []

    def _is_activation(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.dim() == 4 and x.size(0) == self._batch and x.shape not in self._weights

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        namespace, _, op = func._schema.name.partition("::")
        if not self._in_launcher and not func.is_view:
            own = namespace == "fusedres"
            op = op.removesuffix("_reference").removesuffix("_triton") if own else op
            note = own_call(op, args) if own else aten_call(op, args, self._is_activation, self._in_block)
            self._note(note)
        return func(*args, **(kwargs or {}))

    def _note(self, call: Call) -> None:
        self._mark()
        self.calls.append(call)

    def _launcher(self, op: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
        """A Triton launcher, which no dispatcher sees."""

        @functools.wraps(launcher)
        def run(*args: Any) -> Any:
            self._note(own_call(op, args))
            self._in_launcher = True
            try:
                return launcher(*args)
            finally:
                self._in_launcher = False

        return run

    def _block(self, function: Callable[..., Any]) -> Any:
        """Forward or backward of the Function of a folded block."""

        def run(*args: Any) -> Any:
            self._in_block = True
            try:
                return function(*args)
            finally:
                self._in_block = False

        return staticmethod(run)

    @contextlib.contextmanager
    def everywhere(self) -> Iterator[Recorder]:
        """Sees all calls of a step."""
        block = FoldedBottleneckFunction
        methods = {name: block.__dict__[name] for name in ("forward", "backward")}
        launchers = {op: op.load_launcher() for op in registry.OPS.values() if op.why_not("triton") is None}
        try:
            for op, launcher in launchers.items():
                op._launcher = self._launcher(op.name, launcher)
            for name, method in methods.items():
                setattr(block, name, self._block(method.__func__))
            with self:
                yield self
        finally:
            for op, launcher in launchers.items():
                op._launcher = launcher
            for name, method in methods.items():
                setattr(block, name, method)


# ---- measuring -------------------------------------------------------------------------------------------------------


def timed(pieces: Sequence[Kernels], kernels: Kernels) -> tuple[list[Kernels], bool]:
    """The pieces with the times of ``kernels``, and whether these are the same kernels in the same order."""
    names = [name for piece in pieces for name, _ in piece]
    if names != [name for name, _ in kernels]:
        return list(pieces), False
    of_all = iter(kernels)
    return [[next(of_all) for _ in piece] for piece in pieces], True


def group_rows(calls: Sequence[Call], pieces: Sequence[Kernels]) -> list[dict[str, Any]]:
    """Calls, kernels and milliseconds of every group, the ops of each with theirs."""
    rows: dict[str, dict[str, Any]] = {
        group: {"group": group, "calls": 0, "kernels": 0, "ms": 0.0, "ops": {}} for group in GROUPS
    }
    for call, piece in zip(calls, pieces, strict=True):
        if not piece:
            continue  # an allocation
        row = rows[call.group]
        for of in (row, row["ops"].setdefault(call.op, {"calls": 0, "kernels": 0, "ms": 0.0})):
            of["calls"] += 1
            of["kernels"] += len(piece)
            of["ms"] += sum(seconds for _, seconds in piece) * 1e3
    for row in rows.values():
        row["ops"] = dict(sorted(row["ops"].items(), key=lambda item: -item[1]["ms"]))
    return [row for row in rows.values() if row["kernels"]]


def pass_rows(calls: Sequence[Call], pieces: Sequence[Kernels], bandwidth: float, rate: float) -> list[dict[str, Any]]:
    """Each pass of a folded convolution at each size: its time beside the least that its bytes or its products take."""
    seconds: dict[Call, list[float]] = defaultdict(list)
    for call, piece in zip(calls, pieces, strict=True):
        if call.bytes:
            seconds[call].append(sum(s for _, s in piece))
    rows = []
    for call, of in seconds.items():
        floors = {"bandwidth": call.bytes / bandwidth, "products": call.flops / rate}
        bound = max(floors, key=floors.__getitem__)
        median = statistics.median(of)
        rows.append(
            {
                "group": call.group,
                "shape": call.shape,
                "calls": len(of),
                "us": median * 1e6,
                "bytes": call.bytes,
                "flops": call.flops,
                "floor_us": floors[bound] * 1e6,
                "bound": bound,
                "share_of_floor": floors[bound] / median if median else None,
            }
        )
    return sorted(rows, key=lambda row: (GROUPS.index(row["group"]), -row["us"]))


def measure(model: str, kind: str, batch: int, device: HostDevice) -> dict[str, Any]:
    """A row: the step, and where its time goes. What a kind cannot do is its `error`."""
    row: dict[str, Any] = {"model": model, "kind": kind, "batch": batch, "dtype": "bfloat16"}
    try:
        with served_as(kind):
            step = make_step(model, kind, batch, device)
            step()  # takes decisions
            (replay,) = device.capture(step.step)
            seconds = statistics.median(device.step_times(replay))
            kernels = device.launched(replay)
            recorders: list[Recorder] = []

            def marked(mark: Callable[[], None]) -> None:
                recorder = Recorder(mark, batch, (p.shape for p in step.module.parameters()))
                recorders.append(recorder)
                with recorder.everywhere():
                    step.step()

            (before, *pieces) = device.pieces(marked)
            calls = recorders[-1].calls
            pieces, of_graph = timed(pieces, kernels[len(before) :])
        rate, bandwidth = device.matmul_rate(torch.bfloat16), device.copy_bandwidth()
        groups = group_rows(calls, pieces)
        total = sum(group["ms"] for group in groups)
        return row | {
            "ms": seconds * 1e3,
            "kernels_ms": total,
            "between_ms": seconds * 1e3 - total,  # kernels that wait for each other; below 0: some overlap
            "kernels": sum(group["kernels"] for group in groups),
            "timed": replay.timed,
            "kernels_timed": "graph" if of_graph else "calls",
            "copy_gb_per_s": bandwidth * 1e-9,
            "matmul_tflop_per_s": rate * 1e-12,
            "groups": groups,
            "passes": pass_rows(calls, pieces, bandwidth, rate),
        }
    except Exception as error:  # a kind that fails is a result
        return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    finally:
        device.free()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file that rows of JSON are appended to")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--kind", action="append", choices=("eager", *FOLDING), help="default folded; repeatable")
    parser.add_argument("--batch", type=int, default=256)
    args = parser.parse_args(arguments)
    device = CudaDevice()
    torch.backends.cudnn.benchmark = True
    with args.out.open("a") as file:
        for kind in args.kind or ("folded",):
            row = measure(args.model, kind, args.batch, device)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(kind, row.get("error") or f"{row['ms']:.2f} ms, kernels {row['kernels_ms']:.2f} ms", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
