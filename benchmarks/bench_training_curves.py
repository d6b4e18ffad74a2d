"""Training with folded convolutions against eager PyTorch: loss curves, and accuracies over seeds.

    python -m benchmarks.bench_training_curves

Every network is trained from the same weights on the same batches by eager PyTorch in channels_last, by eager PyTorch
in contiguous memory, which shows how far rounding alone moves a run, and by this package with `folding="always"`. One
thread, about 20 minutes. A finished run is stored at once in results/<device>/training_curves.json and, of the same
settings and commit, not repeated; docs/curves.png is drawn from that file.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusedres import Bottleneck
from fusedres.models import ResNet, cifar_resnet
from fusedres.training.comparison import count_ops, saved_for_backward_bytes
from fusedres.training.config import TrainConfig
from fusedres.training.data import ImageData, TensorData, load_data
from fusedres.training.learner import Learner
from fusedres.training.networks import plain_twin

from .environment import RESULTS, device_slug, environment
from .harness import set_memory_regime

NAME = "training_curves"
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "curves.png"
SEEDS = (0, 1, 2)
DTYPES = {"float32": "off", "bfloat16": "bf16"}  # and the autocast it is
KINDS = ("eager", "contiguous", "folded")
FIRST = 50  # steps whose losses are compared: later ones tell of chance, for training amplifies every rounding
CLASSES = 10
CPU = torch.device("cpu")


# ---- what is trained -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A network with its data and schedule.

    Attributes:
        title: for people. data: "digits" or "textures". images: of each class of the textures, for training.
        warmup: epochs of rising learning rate. most_steps: after which an epoch ends, or 0.
    """

    title: str
    data: str
    image_size: int
    epochs: int
    lr: float
    warmup: float = 2.0
    batch_size: int = 64
    images: int = 0
    most_steps: int = 0


RUNS = {
    "resnet20": Run("ResNet-20, projections", "digits", image_size=16, epochs=12, lr=0.05),
    "bottleneck56": Run("ResNet-56 of bottlenecks", "digits", image_size=16, epochs=8, lr=0.02),
    "resnet50": Run("ResNet-50, quarter width", "textures", image_size=64, epochs=3, lr=0.03, warmup=1, images=200),
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: cifar_resnet(20, shortcut="B", in_channels=1),
    "bottleneck56": lambda: cifar_resnet(56, bottleneck=True, shortcut="B", in_channels=1),
    "resnet50": lambda: ResNet(Bottleneck, (3, 4, 6, 3), CLASSES, zero_init_residual=True, width_per_group=16),
}


def quick(run: Run) -> Run:
    """Small enough for a test."""
    return replace(
        run, image_size=min(run.image_size, 32), epochs=2, batch_size=32, images=min(run.images, 8), most_steps=2
    )


def textures(per_class: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gratings under noise, uint8 (N, size, size, 3) and labels; a class is an angle, phase and colour are chance."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(per_class * CLASSES) % CLASSES
    angle = labels * math.pi / CLASSES
    phase, *colour = (torch.rand(4, len(labels), generator=generator) * 2 * math.pi).unbind()
    at = torch.arange(size) * (2 * math.pi * 6 / size)  # six waves across an image
    along = angle.cos()[:, None, None] * at[:, None] + angle.sin()[:, None, None] * at
    waves = torch.stack([(along + (phase + c)[:, None, None]).cos() for c in colour], -1)
    noise = torch.randn(waves.shape, generator=generator)
    return ((128 + 24 * waves + 32 * noise).clamp(0, 255)).to(torch.uint8), labels


def load(run: Run, config: TrainConfig) -> ImageData:
    if run.data == "digits":
        return load_data(config, device=CPU)
    train = textures(run.images, run.image_size, config.seed)
    test = textures(max(run.images // 6, 4), run.image_size, 10_000 + config.seed)
    names = [f"angle {i}" for i in range(CLASSES)]
    return TensorData("textures", train, test, names, config, pad=0, mirror=False, device=CPU)


# ---- one run ---------------------------------------------------------------------------------------------------------


def train(network: str, run: Run, dtype: str, kind: str, seed: int) -> dict[str, Any]:
    """A finished cell: losses of the first steps, accuracies after every epoch, what it saved and folded."""
    begin = time.process_time()
    config = TrainConfig(
        data="digits" if run.data == "digits" else "synthetic",
        epochs=run.epochs,
        batch_size=run.batch_size,
        lr=run.lr,
        warmup_epochs=run.warmup,
        image_size=run.image_size,
        amp=DTYPES[dtype],
        channels_last=kind != "contiguous",
        seed=seed,
    )
    data = load(run, config)
    torch.manual_seed(seed)
    model = NETWORKS[network]()
    if kind == "folded":
        for module in model.modules():
            if hasattr(module, "folding"):
                module.folding = "always"
    else:
        model = plain_twin(model)
    steps = min(run.most_steps or data.steps_per_epoch, data.steps_per_epoch)
    learner = Learner(model, config, steps_per_epoch=steps, device=CPU)

    probe, batch = copy.deepcopy(model), next(data.train_batches(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=config.amp == "bf16"):
        saved = saved_for_backward_bytes(probe, *batch)
        ops = count_ops(probe, *batch)
    losses, accuracies = [], []
    for epoch in range(run.epochs):
        losses += [learner.step(*batch).item() for batch in islice(data.train_batches(epoch), steps)]
        accuracies.append(learner.evaluate(data.test_batches()).accuracy)
    return {
        "steps": len(losses),
        "first_losses": losses[:FIRST],
        "last_loss": statistics.fmean(losses[-steps:]),
        "accuracies": accuracies,
        "test_images": data.test_size,
        "saved_bytes": saved,
        "folded_convolutions": sum(n for name, n in ops.items() if name.startswith("fusedres::conv1x1_moments")),
        "cpu_seconds": round(time.process_time() - begin, 1),
    }


# ---- all of them -----------------------------------------------------------------------------------------------------


def key_of(network: str, dtype: str, kind: str, seed: int) -> str:
    return f"{network} {dtype} {kind} {seed}"


def deviations(
    cells: dict[str, Any], network: str, one: tuple[str, str], other: tuple[str, str], seeds: Iterable[int]
) -> list[float]:
    """For each of the first steps, the largest distance of two losses over the seeds; both by dtype and kind."""
    apart = []
    for seed in seeds:
        a, b = (cells[key_of(network, *which, seed)]["first_losses"] for which in (one, other))
        apart.append([abs(x - y) for x, y in zip(a, b, strict=True)])
    return [max(at_step) for at_step in zip(*apart, strict=True)]


def summary(cells: dict[str, Any], runs: dict[str, Run], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each network and dtype: final accuracies; how far losses are from eager's, and in bfloat16 from eager's
    in float32, at the first step and at most in the first steps.

    Eager rounds in the same places in both memory formats, and folding in others: so in bfloat16 the distance from
    float32 says more.
    """
    rows = []
    for network, dtype in product(runs, DTYPES):
        row: dict[str, Any] = {"network": network, "dtype": dtype}
        for kind in KINDS:
            found = [cells[key_of(network, dtype, kind, seed)] for seed in seeds]
            final = [cell["accuracies"][-1] for cell in found]
            row[kind] = {
                "accuracy_mean": statistics.fmean(final),
                "accuracy_low": min(final),
                "accuracy_high": max(final),
                "saved_megabytes": found[0]["saved_bytes"] / 1e6,
                "folded_convolutions": found[0]["folded_convolutions"],
            }
            for name, other in (("from_eager", (dtype, "eager")), ("from_float32", ("float32", "eager"))):
                if other != (dtype, kind) and not (dtype == "float32" and name == "from_float32"):
                    apart = deviations(cells, network, (dtype, kind), other, seeds)
                    row[kind][name] = {"first": apart[0], "largest": max(apart)}
        rows.append(row)
    return rows


def table(rows: Iterable[dict[str, Any]]) -> str:
    def accuracy(of: dict[str, Any]) -> str:
        return f"{of['accuracy_mean']:6.1%} ({of['accuracy_low']:.1%} to {of['accuracy_high']:.1%})"

    def distances(row: dict[str, Any], name: str, kinds: Sequence[str]) -> str:
        found = [row[kind].get(name) for kind in kinds]
        return "".join(f"{'' if of is None else format(of['largest'], '.2g'):>12s}" for of in found)

    rows = list(rows)
    lines = [
        f"largest distance of a loss in the first {FIRST} steps, in bfloat16 from eager's in float32 too; and the test"
        " accuracy, with its range over the seeds",
        f"{'':24s}{'from eager:':18s}{'':6s}{'from float32:':24s}",
        f"{'':24s}{'contiguous':>12s}{'folded':>12s}{'eager':>12s}{'folded':>12s}   "
        + "".join(f"{kind:26s}" for kind in KINDS),
    ]
    lines += [
        f"{row['network']:14s}{row['dtype']:10s}"
        + distances(row, "from_eager", ("contiguous", "folded"))
        + distances(row, "from_float32", ("eager", "folded"))
        + "   "
        + "".join(f"{accuracy(row[kind]):26s}" for kind in KINDS).rstrip()
        for row in rows
    ]
    lines.append("saved for backward, eager and folded, and convolutions that folded:")
    for row in rows:
        eager, folded = row["eager"], row["folded"]
        megabytes = f"{eager['saved_megabytes']:6.1f} MB {folded['saved_megabytes']:6.1f} MB"
        lines.append(f"{row['network']:14s}{row['dtype']:10s}{megabytes}   {folded['folded_convolutions']}")
    return "\n".join(lines)


def stored(path: Path, env: dict[str, Any], settings: dict[str, Any], any_commit: bool = False) -> dict[str, Any]:
    """Finished cells of these settings, torch and instruction set, and of this commit or of any."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    if any(content["environment"].get(name) != env[name] for name in ("torch", "fusedres_cpu_capability")):
        return {}
    same = {n for n, values in settings.items() if content["results"]["settings"].get(n) == values}
    return {
        key: cell
        for key, cell in content["results"]["cells"].items()
        if key.split()[0] in same and (any_commit or cell["commit"] == env["commit"])
    }


def write(path: Path, env: dict[str, Any], body: dict[str, Any]) -> None:
    """JSON with lists of numbers on one line."""
    text = json.dumps({"environment": env, "results": body}, indent=1)
    text = re.sub(r"\[\s+([-0-9.,e+\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def measure(
    runs: dict[str, Run], seeds: Sequence[int], path: Path, say: Callable[[str], None], any_commit: bool = False
) -> dict[str, Any]:
    """Train what is not stored yet, one cell after the other; what the file then holds."""
    env = environment(set_memory_regime("recycled"))
    settings = {network: asdict(run) for network, run in runs.items()}
    cells = stored(path, env, settings, any_commit)
    body = {"settings": settings, "seeds": list(seeds), "first_steps": FIRST, "cells": cells}
    for network, dtype, kind, seed in product(runs, DTYPES, KINDS, seeds):
        key = key_of(network, dtype, kind, seed)
        if key not in cells:
            cells[key] = {"commit": env["commit"], **train(network, runs[network], dtype, kind, seed)}
            write(path, env, body)
            say(f"{key}: {cells[key]['accuracies'][-1]:.1%} after {cells[key]['cpu_seconds']:.0f} s")
    body["summary"] = summary(cells, runs, seeds)
    write(path, env, body)
    return body


# ---- picture ---------------------------------------------------------------------------------------------------------


def draw(body: dict[str, Any], path: Path) -> None:
    """Loss curves, their distances from eager's, and final accuracies, a column for each network, as a PNG."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    from fusedres.training.plots import BAND, EAGER, FUSED, INK, MUTED, STYLE

    cells, seeds, settings = body["cells"], body["seeds"], body["settings"]
    colours = {"eager": EAGER, "contiguous": BAND, "folded": FUSED}
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            3, len(settings), figsize=(12.8, 10.0), dpi=130, squeeze=False, layout="constrained"
        )
        for column, (network, run) in enumerate(settings.items()):
            loss, apart, accuracy = grid[:, column]
            for seed in seeds:
                for kind, width in (("eager", 5.0), ("folded", 1.3)):
                    losses = cells[key_of(network, "float32", kind, seed)]["first_losses"]
                    colour = BAND if kind == "eager" else FUSED
                    loss.plot(range(1, len(losses) + 1), losses, color=colour, lw=width, solid_capstyle="round")
            loss.set_title(run["title"])

            eager = ("float32", "eager")
            for label, which, style in (
                ("float32: eager, contiguous", ("float32", "contiguous"), {"color": BAND, "lw": 3.2}),
                ("float32: folded", ("float32", "folded"), {"color": FUSED, "lw": 1.4}),
                ("bfloat16: eager", ("bfloat16", "eager"), {"color": EAGER, "lw": 2.2, "ls": ":"}),
                ("bfloat16: folded", ("bfloat16", "folded"), {"color": FUSED, "lw": 1.6, "ls": ":"}),
            ):
                values = [max(v, 1e-7) for v in deviations(cells, network, which, eager, seeds)]
                apart.plot(range(1, len(values) + 1), values, **style, label=label)
            apart.set_yscale("log")
            apart.set_xlabel("step")
            for axes in (loss, apart):
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))

            for place, (dtype, kind) in enumerate(product(DTYPES, KINDS)):
                final = [100 * cells[key_of(network, dtype, kind, seed)]["accuracies"][-1] for seed in seeds]
                accuracy.plot([place] * len(final), final, "o", color=colours[kind], ms=8, alpha=0.75, mew=0)
                accuracy.plot([place - 0.3, place + 0.3], [statistics.fmean(final)] * 2, color=INK, lw=1.5)
            accuracy.set_xticks(range(len(DTYPES) * len(KINDS)), [kind for _ in DTYPES for kind in KINDS], size=8.5)
            accuracy.set_xlabel("     ".join(f"{dtype:^28s}" for dtype in DTYPES))
        grid[0, 0].set_ylabel(f"loss of the first {body['first_steps']} steps\neager: wide bands, folded: lines")
        grid[1, 0].set_ylabel("distance from the loss of eager float32\nlargest over the seeds")
        grid[1, 0].legend(frameon=False, fontsize=9)
        grid[2, 0].set_ylabel("test accuracy in %, each seed\nline: mean")
        figure.suptitle(
            'Training with folding="always", and eager in channels_last and contiguous memory', weight="bold", color=INK
        )
        figure.supxlabel(
            f"seeds {', '.join(map(str, seeds))}; of a seed all have the same weights and batches", size=9, color=MUTED
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_training_curves", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="one seed and a few steps: a check; needs --out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for both files, instead of results/<device> and docs")
    parser.add_argument("--any-commit", action="store_true", help="keep finished runs of other commits too")
    args = parser.parse_args(arguments)
    if args.quick and args.out is None:
        parser.error("--quick is no measurement: say with --out where to write")
    torch.set_num_threads(1)
    path = (args.out or RESULTS / device_slug()) / f"{NAME}.json"
    picture = PICTURE if args.out is None else args.out / PICTURE.name
    runs = {network: quick(run) for network, run in RUNS.items()} if args.quick else RUNS
    seeds = SEEDS[:1] if args.quick else SEEDS
    body = measure(runs, seeds, path, lambda line: print(line, flush=True), args.any_commit)
    draw(body, picture)
    print(table(body["summary"]))
    print("written:", path, picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
