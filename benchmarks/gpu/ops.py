"""Ops on the device against every peer at hand, forward and backward, each checked just before it is timed.

Run by the driver as a process of its own; a row of JSON per case and peer goes to a file as soon as it is measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusedres

from .. import cases
from ..cases import EPS, MOMENTUM, Case, case_traffic
from ..shapes import Shape, resnet_shapes
from .device import CudaDevice, HostDevice

Call = Callable[[str, Sequence[Tensor], Sequence[Tensor], bool], Tensor]
ALL_PEERS = ("eager", "compile", "compile-max", "cudnn", "cuda", "triton")
FUSED = ("cuda", "triton")
COMPILE_MODES = {"compile": None, "compile-max": "max-autotune-no-cudagraphs"}  # graphs are captured around all alike


def _cudnn(op: str, inputs: Sequence[Tensor], stats: Sequence[Tensor], training: bool) -> Tensor:
    """cuDNN's own batch norm, which torch does not choose for bfloat16; the rest as in eager."""

    def norm(x: Tensor, affine: Sequence[Tensor], running: Sequence[Tensor]) -> Tensor:
        return torch.ops.aten.cudnn_batch_norm(x, *affine, *running[:2], training, MOMENTUM, EPS)[0]

    out = norm(inputs[0], inputs[1:3], stats)
    if op == "batch_norm_act_max_pool":
        return torch.nn.functional.max_pool2d(torch.relu_(out), 3, 2, 1)
    if op == "batch_norm_add_batch_norm_act":
        out += norm(inputs[3], inputs[4:6], stats[2:])
    elif len(inputs) > 3:
        out += inputs[3]
    return torch.relu_(out)


def peer_call(peer: str, op: str) -> Call:
    """What a peer runs for an op.

    Raises:
        ValueError: an unknown peer, or one that has nothing for the op.
    """
    if peer == "eager":
        return cases.PEERS["eager"]
    if peer in COMPILE_MODES:
        torch.compiler.reset()  # it keeps only so many variants of a function, and then runs it as eager

        @functools.partial(torch.compile, mode=COMPILE_MODES[peer], dynamic=False, fullgraph=True)
        def compiled(inputs: Sequence[Tensor], stats: Sequence[Tensor]) -> Tensor:
            return cases.PEERS["eager"](op, inputs, stats, True)

        return lambda op, inputs, stats, training: compiled(inputs, stats)
    if peer == "cudnn" and op != "add_act":
        return _cudnn
    if peer in FUSED:
        return _forced(peer)
    raise ValueError(f"{peer} has nothing for {op}")


def _forced(backend: str) -> Call:
    def call(op: str, inputs: Sequence[Tensor], stats: Sequence[Tensor], training: bool) -> Tensor:
        with fusedres.use_backend(backend):
            return cases.PEERS["fusedres"](op, inputs, stats, training)

    return call


def peers_for(shape: Shape, device: str) -> tuple[str, ...]:
    """The peers that are measured for a shape on this kind of device."""
    if device != "cuda":
        return ("eager",)
    return tuple(p for p in ALL_PEERS if not (p == "cudnn" and shape.op == "add_act"))


class OpMeasurement:
    """One case on one device: each peer is captured, checked and timed."""

    def __init__(self, shape: Shape, dtype: str, layout: str, device: HostDevice) -> None:
        self.device = device
        self.case = Case(shape, dtype, layout, device=device.device)
        self.expected = self.case.expected()

    def measure(self, peer: str, call: Call | None = None) -> dict[str, Any]:
        """A row: times, bytes, and for ours the kernels. What a peer cannot do is its `error`."""
        shape = self.case.shape
        row: dict[str, Any] = {
            "op": shape.op,
            "residual": shape.residual,
            "shape": [shape.n, shape.c, shape.h, shape.w],
            "uses": dict(shape.uses),
            "dtype": self.case.dtype,
            "layout": self.case.layout,
            "peer": peer,
        }
        try:
            row |= self._timed(call or peer_call(peer, shape.op), peer in FUSED)
        except Exception as error:  # a peer that fails is a result
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        finally:
            self.device.free()
        return row

    def pipelined_seconds(self, peer: str) -> float:
        """Forward and backward called back to back, as in a training step without a graph: host or device, whichever
        is the slower. The values of a call are checked first.

        Raises:
            Exception: whatever keeps the peer from running, or AssertionError for wrong values.
        """
        call, case = peer_call(peer, self.case.shape.op), self.case
        forward, backward, stats = self._stages(call)
        out = forward()
        case.check(case.named(out, backward(out), stats), self.expected)
        return statistics.median(self.device.step_times(lambda: backward(forward())))

    def _stages(self, call: Call) -> tuple[Callable[[], Tensor], Callable[[Tensor], Sequence[Tensor]], list[Tensor]]:
        """Forward, backward, and the running statistics that the forward moves."""
        case = self.case
        stats = [t.clone() for t in case.stats]

        def forward() -> Tensor:
            return call(case.shape.op, case.inputs, stats, True)

        def backward(out: Tensor) -> Sequence[Tensor]:
            return torch.autograd.grad(out, case.inputs, case.grad_out)

        return forward, backward, stats

    def _timed(self, call: Call, ours: bool) -> dict[str, Any]:
        case = self.case
        forward, backward, stats = self._stages(call)
        replays = self.device.capture(forward, backward)
        _poison(replays[0].result, *replays[1].result)
        for i, t in enumerate(stats):
            t.fill_(i % 2)
        out = replays[0]()
        grads = replays[1]()
        self.device.synchronize()
        case.check(case.named(out, grads, stats), self.expected)

        there, back = self.device.median_times(replays)
        traffic = case_traffic(case.shape, cases.DTYPES[case.dtype], case.layout)
        copy = self.device.copy_bandwidth()
        row = {
            "timed": replays[0].timed,
            "forward_ms": there * 1e3,
            "backward_ms": back * 1e3,
            "ms": (there + back) * 1e3,
            "floor_bytes": traffic.floor,
            "gb_per_s": traffic.floor / (there + back) * 1e-9,
            "copy_gb_per_s": copy * 1e-9,
            "share_of_copy": traffic.floor / (there + back) / copy,
        }
        if ours:
            launches = (*traffic.forward.launches, *traffic.backward.launches)
            row["kernels"] = kernel_rows(self.device.kernels(replays), launches, copy)
        return row


def _poison(*results: Tensor) -> None:
    """NaN everywhere, so that what a replay does not write is seen."""
    with torch.no_grad():
        for t in results:
            t.detach().fill_(float("nan"))


def kernel_rows(kernels: Sequence[tuple[str, float]], launches: Sequence[Any], copy: float) -> list[dict[str, Any]]:
    """Each kernel with its bytes and share of the copy bandwidth, where as many kernels ran as there are launches."""
    rows: list[dict[str, Any]] = [{"name": name[:120], "us": seconds * 1e6} for name, seconds in kernels]
    if len(kernels) == len(launches):
        for row, launch in zip(rows, launches, strict=True):
            rate = launch.total / (row["us"] * 1e-6)
            row |= {"launch": launch.name, "bytes": launch.total, "gb_per_s": rate * 1e-9, "share_of_copy": rate / copy}
    return rows


def headline_shapes(batch: int = 256) -> list[Shape]:
    """ResNet-50's, those of the bars first: BN+add+ReLU and BN+ReLU, then the other ops; large before small."""
    order = {"batch_norm_act": 0, "batch_norm_act_max_pool": 1, "batch_norm_add_batch_norm_act": 2, "add_act": 3}
    shapes = resnet_shapes(("resnet50",), batch=batch)
    return sorted(shapes, key=lambda s: (order[s.op], not s.residual, -s.numel))


def measure_all(
    shapes: Iterable[Shape], dtype: str, layout: str, device: HostDevice, peers: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """A row per shape and peer; a shape that does not fit the device's memory is one row."""
    for shape in shapes:
        try:
            measurement = OpMeasurement(shape, dtype, layout, device)
        except torch.OutOfMemoryError as error:
            yield {"op": shape.op, "shape": [shape.n, shape.c, shape.h, shape.w], "error": str(error).splitlines()[0]}
            continue
        for peer in peers_for(shape, device.kind):
            if peers is None or peer in peers:
                yield measurement.measure(peer)
        del measurement
        device.free()


def warm(shapes: Iterable[Shape], device: HostDevice) -> None:
    """Compile what the peers will need, into the caches on disk; nothing of fusedres runs."""
    for mode in COMPILE_MODES:
        for shape in shapes:
            case = Case(shape, "bfloat16", device=device.device)
            out = peer_call(mode, shape.op)(shape.op, case.inputs, case.stats, True)
            torch.autograd.grad(out, case.inputs, case.grad_out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.ops", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="file that rows of JSON are appended to")
    parser.add_argument("--warm", action="store_true", help="only compile what torch.compile will need")
    parser.add_argument("--batch", type=int, action="append", help="default 256; repeatable")
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(cases.DTYPES))
    parser.add_argument("--layout", default="channels_last", choices=tuple(cases.FORMATS))
    parser.add_argument("--peer", action="append", choices=ALL_PEERS)
    args = parser.parse_args(arguments)
    device = CudaDevice()
    if args.warm:
        warm(headline_shapes(), device)
        return 0
    if args.out is None:
        parser.error("--out is needed")
    with args.out.open("a") as file:
        for batch in args.batch or (256,):
            for row in measure_all(headline_shapes(batch), args.dtype, args.layout, device, args.peer):
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(
                    row["op"], row["shape"], row.get("peer", ""), row.get("error") or f"{row['ms']:.3f} ms", flush=True
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
