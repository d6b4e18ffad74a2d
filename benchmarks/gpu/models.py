"""Whole training steps of ResNet-50 on the device, bfloat16 autocast, channels_last, with and without a CUDA graph.

Of ours there are: `cuda` and `triton`, one backend and nothing folded; `fusedres`, the backend that is chosen and
nothing folded; `folded`, the last convolutions of all blocks folded into their norms; `auto`, what the table of this
device says, where there is one.

Run by the driver as a process of its own; a row of JSON per kind, batch and graph goes to a file as it is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusedres
from fusedres.ops import registry

from ..steps import MODES, Step, gate
from .device import CudaDevice, HostDevice
from .ops import FUSED

FOLDING = {**dict.fromkeys(FUSED, "never"), "fusedres": "never", "folded": "always", "auto": "auto"}  # by kind
KINDS = ("eager", *FOLDING, "compile", "compile-max")
LARGE = 32  # batches from here on are gated over three steps; smaller ones amplify rounding too fast
ONE_NODE = "FoldedBottleneckFunctionBackward"


def make_step(model: str, kind: str, batch: int, device: HostDevice) -> Step:
    step = Step(model, "fusedres" if kind in FOLDING else kind, "bfloat16", batch, device=device.device)
    for module in step.module.modules():
        if kind in FOLDING and hasattr(module, "folding"):
            module.folding = FOLDING[kind]
    return step


def served_as(kind: str) -> fusedres.use_backend:
    return fusedres.use_backend(kind if kind in FUSED else "auto")


def is_tuned(device: HostDevice) -> bool:
    """Whether anything was measured on the device, without which "auto" is "fusedres"."""
    if device.kind != "cuda":
        return False
    table = registry.table_of(device.device.index)
    return bool(table.choices or table.folding)


def folded_blocks(loss: Tensor) -> int:
    """Blocks whose forward was one node, for a refused fold goes unseen otherwise."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [after for after, _ in node.next_functions]
    return sum(type(node).__name__ == ONE_NODE for node in seen)


def measure_kind(
    model: str, kind: str, batch: int, device: HostDevice, graphs: Sequence[bool] = (False, True)
) -> Iterator[dict[str, Any]]:
    """A row without and one with a graph; losses are compared with eager's before anything is timed."""
    row: dict[str, Any] = {"model": model, "kind": kind, "batch": batch, "dtype": "bfloat16"}
    try:
        with served_as(kind):
            steps = {"eager": make_step(model, "eager", batch, device)}
            if kind != "eager":
                steps[kind] = make_step(model, kind, batch, device)
            row["losses"] = gate(model, "bfloat16", steps, rounds=3 if batch >= LARGE else 1)[kind]
            step = steps.pop(kind)
            steps.clear()
            if kind in FOLDING:
                row["folded_blocks"] = folded_blocks(step.loss())
            device.free()
            device.peak_megabytes()  # from here on
            for graph in graphs:
                call, timed = step.step, "calls"
                if graph:
                    (replay,) = device.capture(step.step)
                    call, timed = replay, replay.timed
                seconds = device.step_times(call)
                median = statistics.median(seconds)
                yield row | {
                    "graph": graph,
                    "timed": timed,
                    "ms": median * 1e3,
                    "images_per_s": batch / median,
                    "rounds_ms": [s * 1e3 for s in seconds],
                    "peak_mb": device.peak_megabytes(),
                }
    except Exception as error:  # a kind that fails is a result
        yield row | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    finally:
        torch.compiler.reset()
        device.free()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.models", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file that rows of JSON are appended to")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--kind", action="append", choices=KINDS, help="default: all but compile-max; repeatable")
    parser.add_argument("--batch", type=int, action="append", help="default 256; repeatable")
    parser.add_argument("--warm", action="store_true", help="only compile what will be needed")
    args = parser.parse_args(arguments)
    device = CudaDevice()
    torch.backends.cudnn.benchmark = True
    kinds = args.kind or KINDS[:-1]
    for batch in args.batch or (256,):
        for kind in kinds:
            if kind == "auto" and not is_tuned(device):
                print("auto: there is no table of this device", flush=True)
                continue
            if args.warm:
                if kind in (*MODES, *FOLDING):
                    with served_as(kind):
                        step = make_step(args.model, kind, batch, device)
                        for _ in range(1 if kind in MODES else 2):  # the second one knows what folds
                            step()
                continue
            with args.out.open("a") as file:
                for row in measure_kind(args.model, kind, batch, device):
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    print(kind, batch, row.get("error") or f"{row['ms']:.2f} ms, graph {row['graph']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
