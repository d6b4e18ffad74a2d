"""``fusedres demo``: train ResNet-20 on handwritten digits twice, by eager PyTorch and by fused ops, side by side.

Same weights, same batches, same machine. Prints a table; writes demo.png and demo.json to the folder given by --out.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from ..training.config import ConfigError, TrainConfig, TrainingError

WANTED_ACCURACY = 0.97


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="train a ResNet on handwritten digits, eager and fused, and draw both",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", default="out", metavar="DIR", help="folder for demo.png and demo.json (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="two epochs on smaller images: a check, not a measurement")
    parser.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help=f"epochs (12; {WANTED_ACCURACY:.0%} accuracy is only required from there)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--amp", choices=("bf16", "off"), default="off", help="autocast (%(default)s)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto (a GPU if there is one), cpu or cuda")


def run(args: argparse.Namespace) -> int:
    from ..training.comparison import compare
    from ..training.data import load_data
    from ..training.progress import progress
    from ..training.trainer import resolve_device

    try:
        from ..training.plots import draw_comparison
    except ImportError:
        raise ConfigError("the picture needs matplotlib: pip install 'fusedres[demo]'") from None
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        raise ConfigError("the demo is for one process; `fusedres train` runs under torchrun")

    begin = time.perf_counter()
    full = TrainConfig.from_settings({"data": "digits"})
    settings = {"data": "digits", "seed": args.seed, "amp": args.amp, "device": args.device, "out": args.out}
    if args.quick:
        settings |= {"epochs": 2, "image_size": 16, "warmup_epochs": 1.0}
    if args.epochs is not None:
        settings["epochs"] = args.epochs
    config = TrainConfig.from_settings(settings)
    device = resolve_device(config.device)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)

    with progress() as show:
        show.line(
            f"ResNet-20 on {config.data}, twice from the same weights on the same batches: eager PyTorch and fusedres\n"
        )
        data = load_data(config, device=device)
        result = compare(config, data, device, show)
    (folder / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    draw_comparison(result, data.test_images.cpu(), folder / "demo.png")
    print(
        f"\n{render(result)}\n\n{folder / 'demo.png'} and demo.json written, {time.perf_counter() - begin:.0f} s in all"
    )

    accuracies = [result[name]["test_accuracy"] for name in ("eager", "fused")]
    if not args.quick and config.epochs >= full.epochs and min(accuracies) < WANTED_ACCURACY:
        raise TrainingError(f"test accuracy is {min(accuracies):.2%}, expected at least {WANTED_ACCURACY:.0%}")
    return 0


def render(result: dict[str, Any]) -> str:
    """The result as a table and a few lines."""
    from ..training.progress import table

    eager, fused = result["eager"], result["fused"]
    megabytes = [run["saved_for_backward_bytes"] / 1e6 for run in (eager, fused)]
    rows = [
        ("test accuracy", f"{eager['test_accuracy']:.2%}", f"{fused['test_accuracy']:.2%}", ""),
        (
            "time for an epoch",
            f"{eager['seconds_per_epoch']:.3f} s",
            f"{fused['seconds_per_epoch']:.3f} s",
            f"{result['speed_ratio']:.2f}x as fast",
        ),
        ("saved for backward", *(f"{size:.1f} MB" for size in megabytes), f"{result['saved_ratio']:.2f}x as much"),
        (
            "norm, residual and ReLU in a step",
            *(f"{sum(run['ops_per_step'].values())} ops" for run in (eager, fused)),
            "",
        ),
    ]
    deviation = result["loss_deviation"]
    threads = result["threads"]
    place = f"{result['device']}, {result['cpu_capability']}, {threads} thread{'s' if threads > 1 else ''}"
    if result["device_type"] == "cuda":
        place = result["device"]
    elif threads < result["threads_offered"]:
        place += f" of {result['threads_offered']} (the machine is busy: fewer are faster)"
    served = [
        f"{name}: {by['served_by']} ({by['why']})" for name, by in result["served"].items() if "backward" not in name
    ]
    memory = "recycled (reuse_host_memory) for both" if result["host_memory_reused"] else result["host_memory_note"]
    return "\n".join(
        (
            table(("", "eager", "fused", ""), rows),
            "",
            f"largest deviation of the loss: {deviation['first']:.1e} in the first {deviation['first_steps']} steps "
            f"(eager from itself in the other memory format: {deviation['eager_itself_first']:.1e}), "
            f"{deviation['all']:.1e} in all",
            f"served by     {'; '.join(served) or 'eager PyTorch'}",
            f"machine       {place}, torch {result['versions']['torch']}, {result['memory_format']}",
            f"host memory   {memory}",
        )
    )
