"""``fusedres traffic``: the bytes that a training step moves, in eager PyTorch, fused and with folded convolutions.

Nothing is measured or computed: the step runs on tensors without values, and every op that it calls is counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

_NOTES = """\
fused    the ops of this package, folding="never"
auto     folding="auto", where every layer that can be folded gains by it
always   folding="always", which computes inner activations again in backward, to keep less

A convolution counts as what it must move at least: forward its input and output; the gradient of the input that of
the output and its own; the gradient of the weight that of the output and the input. A folded one, conv1x1_*, moves
that and what follows it, so what eager's convolutions must move is subtracted from every column. aten::add sums the
gradients of the two ways out of a block's input. Of partial sums there is one tile for each channel.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "traffic",
        help="bytes that a training step moves: eager, fused, folded",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="resnet50", metavar="NAME", help="as of `fusedres train` (%(default)s)")
    parser.add_argument("--batch", type=int, default=256, metavar="N", help="images in a step (%(default)s)")
    parser.add_argument("--image", type=int, metavar="N", help="side of the images (224; 32 for the CIFAR networks)")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="bf16", help="of the activations (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    from ..training.config import ConfigError
    from ..training.networks import CIFAR

    image = args.image if args.image is not None else 32 if args.model in CIFAR else 224
    for name, value, least in (("batch", args.batch, 2), ("image", image, 8)):
        if value < least:
            raise ConfigError(f"--{name} must be at least {least}, got {value}")
    found = measure(args.model, args.batch, image, args.dtype)
    print(json.dumps(found, indent=2) if args.json else render(found))
    return 0


def measure(model: str, batch: int, image: int, dtype: str) -> dict[str, Any]:
    """All variants of a step, ready for JSON."""
    import torch

    from ..training.traffic import VARIANTS, of_all, of_convolutions, step_traffic

    precision = getattr(torch, _DTYPES[dtype])
    steps = {v: step_traffic(model, batch=batch, image=image, dtype=precision, variant=v) for v in VARIANTS}
    least = of_convolutions(steps["eager"])

    def per_image(size: int) -> float:
        return round(size / batch / 1e6, 4)

    return {
        "model": model,
        "batch": batch,
        "image": image,
        "dtype": dtype,
        "unit": "MB per image",
        "convolutions_of_eager": per_image(least),
        "variants": {
            variant: {
                "batch_norm_and_elementwise": per_image(of_all(ops) - least),
                "all": per_image(of_all(ops)),
                "ops": {
                    name: {
                        "calls": moved.calls,
                        "loads": per_image(moved.loads),
                        "stores": per_image(moved.stores),
                        "launches": {launch: per_image(size) for launch, size in moved.launches.items()},
                    }
                    for name, moved in sorted(ops.items())
                },
            }
            for variant, ops in steps.items()
        },
    }


def render(found: Mapping[str, Any]) -> str:
    variants = found["variants"]
    names = sorted(
        {name for of in variants.values() for name in of["ops"]}, key=lambda name: ("convolution" not in name, name)
    )
    rows = []
    for name in names:
        ops = [of["ops"].get(name) for of in variants.values()]
        rows.append((name, *("" if op is None else f"{op['loads'] + op['stores']:.1f}" for op in ops)))
    least = f"{found['convolutions_of_eager']:.1f}"
    sums = [
        ("all", *(f"{of['all']:.1f}" for of in variants.values())),
        ("of which eager's convolutions, at least", *(least for _ in variants)),
        ("batch norm and elementwise", *(f"{of['batch_norm_and_elementwise']:.1f}" for of in variants.values())),
    ]
    header = ("", *variants)
    widths = [max(len(row[i]) for row in (header, *rows, *sums)) for i in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        return "  ".join(
            [row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()

    title = (
        f"{found['model']}, {found['batch']} images of {found['image']}x{found['image']}, {found['dtype']}:"
        " MB per image that a training step moves"
    )
    return "\n".join([title, "", line(header), *map(line, rows), "", *map(line, sums), "", _NOTES.rstrip()])
