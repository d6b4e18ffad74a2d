"""`python -m benchmarks.traffic`: the bytes that every layer of ResNet-50 moves, and the form that its ops take.

Nothing is measured: bytes are those of the traffic functions beside each op, forms those of the CUDA launch planner.
`--write` renews TRAFFIC.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .cases import case_traffic
from .gpu.table import markdown
from .shapes import Shape, resnet_shapes

PAGE = Path(__file__).with_name("TRAFFIC.md")
BATCHES = (32, 64, 256)
DTYPE = torch.bfloat16
H200 = {"sms": 132, "l2_bytes": 50 << 20, "shared_bytes": 227 << 10}

# What the kernels of a forward and backward read and write: one list per op, "reads -> writes". A name is a pass over
# a tensor; k is a mask of one bit, p and dp are pooled (a quarter), i are eager's pooling indices (int64), j
# Inductor's (int8).
EAGER = {
    "batch_norm_act": ["x", "x -> y", "y -> y", "dy y -> g", "g x", "g x -> dx"],
    "batch_norm_act+residual": ["x", "x -> y", "y r -> y", "y -> y", "dy y -> g", "g x", "g x -> dx"],
    "batch_norm_add_batch_norm_act": [
        *("x", "x -> y", "x2", "x2 -> y2", "y y2 -> y", "y -> y"),
        *("dy y -> g", "g x", "g x -> dx", "g x2", "g x2 -> dx2"),
    ],
    "batch_norm_act_max_pool": ["x", "x -> y", "y -> y", "y -> p i", "dp i -> dy", "dy y -> g", "g x", "g x -> dx"],
    "add_act": ["x r -> y", "y -> y", "dy y -> g"],
}
# torch.compile: normalisation, addition and ReLU are one kernel; its backward takes the mask from the saved output.
INDUCTOR = {
    "batch_norm_act": ["x", "x -> y", "dy y x", "dy y x -> dx"],
    "batch_norm_act+residual": ["x", "x r -> y", "dy y x", "dy y x -> dx dr"],
    "batch_norm_add_batch_norm_act": ["x", "x2", "x x2 -> y", "dy y x x2", "dy y x x2 -> dx dx2"],
    "batch_norm_act_max_pool": ["x", "x -> y", "y -> p j", "dp j y x", "dp j y x -> dx"],
    "add_act": ["x r -> y", "dy y -> g"],
}


def size_of(name: str, itemsize: int) -> float:
    """Of a tensor in a pass, in tensors of x."""
    pooled = {"p": 1.0, "dp": 1.0, "i": 8 / itemsize, "j": 1 / itemsize}
    return 0.25 * pooled[name] if name in pooled else 1.0


def passes(kernels: Iterable[str], itemsize: int) -> float:
    """Tensor passes of a list of kernels."""
    names = [name for kernel in kernels for name in kernel.replace("->", " ").split()]
    return sum(size_of(name, itemsize) for name in names)


def op_name(shape: Shape) -> str:
    return shape.op + ("+residual" if shape.residual and shape.op == "batch_norm_act" else "")


@dataclass(frozen=True)
class Layer:
    """One fused region: bytes of forward and backward together."""

    shape: Shape
    tensor: int  # bytes of x
    forward: str  # form
    backward: str
    requested: int  # what our launches move between memory or L2 and the processors
    memory: int  # of it from and to device memory, if what fits L2 stays there between two passes
    eager: int
    inductor: int


def _planner() -> Callable[..., dict[str, Any]]:
    from fusedres import _C

    return _C.launch_plan


def layer(shape: Shape, plan: Callable[..., dict[str, Any]], device: dict[str, int]) -> Layer:
    """The traffic of one region with the form that the planner gives it on a device."""
    itemsize = DTYPE.itemsize
    t = shape.numel * itemsize
    eager, inductor = (round(passes(of[op_name(shape)], itemsize) * t) for of in (EAGER, INDUCTOR))
    if shape.op == "add_act":
        moved = case_traffic(shape, DTYPE)
        total = moved.forward.total + moved.backward.total
        return Layer(shape, t, "one launch", "one launch", total, total, eager, inductor)

    norms = 2 if shape.op == "batch_norm_add_batch_norm_act" else 1
    pooled = shape.op == "batch_norm_act_max_pool"
    forms, requested, memory = [], 0, 0
    for backward in (False, True):
        options = {"backward": backward, "norms": norms, "may_one_pass": not pooled, **device}
        chosen = plan(True, shape.n, shape.c, shape.h * shape.w, itemsize, **options)
        one_pass = chosen["form"] == "one_pass"
        numbers = 1 + norms if backward else 3 * norms
        tiles = chosen["partial_bytes"] // (4 * numbers * shape.c)
        form = {"tiles": tiles} if pooled else {"tiles": tiles, "form": chosen["form"]}
        both = case_traffic(shape, DTYPE, **form)
        moved = (both.backward if backward else both.forward).total
        requested += moved
        reread = 0 if one_pass or not chosen["fits_l2"] else t * (norms + backward)
        memory += moved - reread
        forms.append("one pass" if one_pass else "two passes, L2" if chosen["fits_l2"] else "two passes")
    return Layer(shape, t, forms[0], forms[1], requested, memory, eager, inductor)


def layers(batch: int, plan: Callable[..., dict[str, Any]], device: dict[str, int]) -> list[Layer]:
    """ResNet-50's fused regions as `fuse` makes them: no separate addition."""
    shapes = resnet_shapes(("resnet50",), batch=batch)
    return [layer(s, plan, device) for s in shapes if s.op != "add_act"]


def passes_table() -> str:
    rows = []
    shape = {"n": 256, "c": 256, "h": 56, "w": 56}
    for name in EAGER:
        op, _, residual = name.partition("+")
        moved = case_traffic(Shape(op, bool(residual) or op == "add_act", **shape), DTYPE)
        t = 256 * 256 * 56 * 56 * DTYPE.itemsize
        eager, inductor = (passes(of[name], DTYPE.itemsize) for of in (EAGER, INDUCTOR))
        ours = (moved.forward.floor + moved.backward.floor) / t
        cells = (f"{eager:.2f}", f"{inductor:.2f}", f"{ours:.2f}", f"{eager / ours:.2f}x", f"{inductor / ours:.2f}x")
        rows.append((f"`{name}`", *cells))
    return markdown(
        ("Forward and backward, bf16", "eager", "Inductor", "fusedres", "eager / ours", "Inductor / ours"), rows
    )


def kernels_table() -> str:
    return markdown(("", "eager", "Inductor"), [(f"`{n}`", ", ".join(EAGER[n]), ", ".join(INDUCTOR[n])) for n in EAGER])


def layers_table(found: Sequence[Layer]) -> str:
    rows = []
    for at in found:
        s = at.shape
        rows.append(
            (
                f"`{op_name(s)}` {s.c}x{s.h}x{s.w}",
                str(dict(s.uses)["resnet50"]),
                f"{at.tensor / 1e6:.1f}",
                at.forward,
                at.backward,
                f"{at.requested / 1e6:.1f}",
                f"{at.memory / 1e6:.1f}",
                f"{at.eager / at.requested:.2f}x",
            )
        )
    header = ("Region", "Uses", "x, MB", "Forward", "Backward", "moved, MB", "from memory, MB", "eager / ours")
    return markdown(header, rows)


def total_line(batch: int, found: Sequence[Layer]) -> str:
    """MB per image of all regions of a step."""

    def per_image(of: Callable[[Layer], int]) -> str:
        return f"{sum(of(at) * dict(at.shape.uses)['resnet50'] for at in found) / batch / 1e6:.0f}"

    return (
        f"A step moves, in all these regions, {per_image(lambda a: a.eager)} MB per image in eager,\n"
        f"{per_image(lambda a: a.inductor)} in Inductor and {per_image(lambda a: a.requested)} here, of which"
        f" {per_image(lambda a: a.memory)} from and to device memory."
    )


TEXT = """# Traffic

Made by `python -m benchmarks.traffic --write`; a test fails when it is out of date. Nothing on this page is measured on
a device. The functions `<op>_traffic` and `<op>_backward_traffic` beside each op in `fusedres/ops/` give the bytes of a
call, launch by launch; the tests of the Triton kernels count in its interpreter what each launch touches, and compare.

**Model.** A batch norm computes a few operations per element, so its time is its bytes over the bandwidth. Counted are
distinct bytes per launch: activations, masks (one bit per element), vectors per channel, partial sums. Training needs
the sums of a channel before its first result, so forward and backward go over their tensors twice, unless the values of
a channel stay on the chip:

- *one pass*: a block keeps a slab of channels in its shared memory between the sums and their use: one launch.
- *two passes, L2*: three launches. All that the first pass read fits the L2 cache, and the second takes the tiles in
  reverse order, so that it finds them there.
- *two passes*: three launches, everything from memory twice. Reverse order still saves what the cache holds of the end.

## Passes over a tensor

{passes}

Kernels behind the numbers, as reads -> writes; `y` is the activation, `r` the residual, `g` the masked gradient, `p`
pooled, `i` and `j` pooling indices of 8 bytes and 1. Ours are in the docstrings of the ops.

{kernels}

## ResNet-50, 224x224, bfloat16, channels_last

Forms are those of `_C.launch_plan` for {sms} multiprocessors, {l2} MiB of L2 and {shared} KiB of shared memory for a
block. The stem's statistics are a batch norm's; its second pass pools.
"""


def page(plan: Callable[..., dict[str, Any]], device: dict[str, int] = H200) -> str:
    """All of TRAFFIC.md."""
    text = TEXT.format(
        passes=passes_table(),
        kernels=kernels_table(),
        sms=device["sms"],
        l2=device["l2_bytes"] >> 20,
        shared=device["shared_bytes"] >> 10,
    )
    for batch in BATCHES:
        found = layers(batch, plan, device)
        text += f"\n### Batch {batch}\n\n{layers_table(found)}\n\n{total_line(batch, found)}\n"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"renew {PAGE.name} instead of printing")
    parser.add_argument("--sms", type=int, default=H200["sms"], help="multiprocessors, default %(default)s")
    parser.add_argument("--l2-mib", type=int, default=H200["l2_bytes"] >> 20, help="L2 cache, default %(default)s")
    args = parser.parse_args(arguments)
    try:
        plan = _planner()
    except ImportError as error:
        parser.error(f"the launch planner is in fusedres._C, which is not built: {error}")
    text = page(plan, H200 | {"sms": args.sms, "l2_bytes": args.l2_mib << 20})
    if args.write:
        PAGE.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
