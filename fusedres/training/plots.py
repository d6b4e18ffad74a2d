"""The demo's picture."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

INK, MUTED, GRID = "#1b1f24", "#6b7280", "#e5e7eb"
EAGER, BAND, FUSED, WRONG = "#475569", "#aab4c0", "#ea6a0c", "#c81e1e"

STYLE = {
    "figure.facecolor": "white",
    "font.size": 11,
    "font.family": ["DejaVu Sans"],
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def draw_comparison(result: dict[str, Any], images: Tensor, path: Path) -> None:
    """Both loss curves, times and accuracies, how far the curves are apart, and what was read, as a PNG.

    Args:
        result: as :func:`fusedres.training.comparison.compare` returns it.
        images: the test images, uint8 ``(N, H, W, C)``.
        path: of the PNG.
    """
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(12.8, 9.0), dpi=150)
        _header(figure, result)
        _strip(figure, result, images)
        grid = figure.add_gridspec(
            2, 2, width_ratios=(1.6, 1), height_ratios=(1.2, 1), left=0.062, right=0.968, top=0.70, bottom=0.105,
            hspace=0.40, wspace=0.17,
        )  # fmt: skip
        _loss(figure.add_subplot(grid[0, 0]), result)
        _times(figure.add_subplot(grid[0, 1]), result)
        _deviation(figure.add_subplot(grid[1, 0]), result)
        _accuracy(figure.add_subplot(grid[1, 1]), result)
        _footer(figure, result)
        figure.savefig(path)
        plt.close(figure)


def _header(figure: Figure, result: dict[str, Any]) -> None:
    ratio = result["speed_ratio"]
    title = "The same training, eager and fused"
    if ratio >= 1.02:
        title = f"The same training, {ratio:.2f}\N{MULTIPLICATION SIGN} as fast"
    figure.text(0.03, 0.948, title, size=24, weight="bold")
    pieces = [
        (f"{_model_name(result['model'])} learns to read digits, twice", MUTED, "normal"),
        (" from the same weights on the same batches: by ", MUTED, "normal"),
        ("eager PyTorch", EAGER, "bold"),
        (" and by ", MUTED, "normal"),
        ("fusedres", FUSED, "bold"),
    ]  # fmt: skip
    x = 0.03
    for text, colour, weight in pieces:
        drawn = figure.text(x, 0.912, text, size=12.5, color=colour, weight=weight)
        x += drawn.get_window_extent(figure.canvas.get_renderer()).width / figure.bbox.width


def _model_name(model: str) -> str:
    return model.replace("resnet", "ResNet-")


def _strip(figure: Figure, result: dict[str, Any], images: Tensor, count: int = 18) -> None:
    """Test images with what the fused network read; those that either network misread come last."""
    labels, read = result["test_labels"], result["test_predictions"]
    everything = range(len(labels))
    wrong = [i for i in everything if not labels[i] == read["eager"][i] == read["fused"][i]]
    misread = wrong[: count // 3]
    by_class = [[i for i in everything if labels[i] == label and i not in wrong] for label in sorted(set(labels))]
    in_turns = [i for group in itertools.zip_longest(*by_class) for i in group if i is not None]
    chosen = in_turns[: count - len(misread)] + misread

    width, left, right_edge = 0.0395, 0.03, 0.968
    pitch = (right_edge - left - width) / (count - 1)
    for place, index in enumerate(chosen):
        axes = figure.add_axes((left + place * pitch, 0.815, width, width * 12.8 / 9.0))
        axes.imshow(images[index].squeeze(-1).numpy(), cmap="gray_r", interpolation="nearest", vmin=0, vmax=255)
        axes.set_axis_off()
        is_wrong = index in wrong
        caption = str(labels[index])
        if is_wrong:
            answers = (read["eager"][index], read["fused"][index])
            caption += "\N{RIGHTWARDS ARROW}" + "|".join(map(str, dict.fromkeys(answers)))
        axes.text(0.5, -0.12, caption, transform=axes.transAxes, ha="center", va="top", size=11,
                  color=WRONG if is_wrong else MUTED, weight="bold" if is_wrong else "normal")  # fmt: skip
    both = sum(a == b for a, b in zip(read["eager"], read["fused"], strict=True))
    note = f"Of {len(labels)} test digits the two networks read {both} alike."
    if misread:
        note += f"  In red what either misread, {len(wrong)} in all (truth\N{RIGHTWARDS ARROW}eager|fusedres)."
    figure.text(0.03, 0.765, note, size=10, color=MUTED)


def _smooth(values: list[float], window: int) -> list[float]:
    half = window // 2
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _epoch_axis(axes: Axes, result: dict[str, Any]) -> list[float]:
    """Positions of the steps on an axis of epochs."""
    epochs = result["epochs"]
    axes.set_xlim(0, epochs)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    steps = len(result["eager"]["step_losses"])
    return [(i + 1) * epochs / steps for i in range(steps)]


def _loss(axes: Axes, result: dict[str, Any]) -> None:
    at = _epoch_axis(axes, result)
    steps_per_epoch = len(at) // result["epochs"]
    eager, fused = (_smooth(result[name]["step_losses"], steps_per_epoch // 2) for name in ("eager", "fused"))
    axes.plot(at, eager, color=BAND, lw=6, solid_capstyle="round")
    axes.plot(at, fused, color=FUSED, lw=1.8, solid_capstyle="round")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", size=0)
    axes.set_title("Training loss")
    axes.set_xlabel("epoch")
    anchor = int(len(at) * 0.36)
    _label(axes, "eager: the wide band", EAGER, (at[anchor], eager[anchor]), (14, 40))
    anchor = int(len(at) * 0.46)
    _label(axes, "fusedres: the line inside", FUSED, (at[anchor], fused[anchor]), (-170, -30))


def _label(axes: Axes, text: str, colour: str, point: tuple[float, float], offset: tuple[int, int]) -> None:
    axes.annotate(
        text, point, offset, textcoords="offset points", color=colour, weight="bold", size=11,
        arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.9, "shrinkA": 2, "shrinkB": 3},
    )  # fmt: skip


def _times(axes: Axes, result: dict[str, Any]) -> None:
    seconds = [result[name]["seconds_per_epoch"] for name in ("eager", "fused")]
    axes.set_title("Time for an epoch")
    axes.grid(False)
    for place, (name, colour, value) in enumerate(zip(("eager", "fusedres"), (EAGER, FUSED), seconds, strict=True)):
        axes.barh(-place, value, height=0.56, color=colour)
        axes.text(0, -place + 0.36, name, color=colour, weight="bold", va="bottom")
        axes.text(value, -place, f" {_seconds(value)}", va="center", ha="left", size=17, weight="bold", color=colour)
    megabytes = [f"{result[name]['saved_for_backward_bytes'] / 1e6:.1f}" for name in ("eager", "fused")]
    axes.text(
        0,
        -1.52,
        f"Saved for backward: {megabytes[0]} MB eager, {megabytes[1]} MB fusedres",
        color=MUTED,
        size=10,
        va="top",
    )
    axes.set_xlim(0, max(seconds) * 1.32)
    axes.set_ylim(-1.75, 0.75)
    axes.set_axis_off()


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1e3:.1f} ms"


def _deviation(axes: Axes, result: dict[str, Any]) -> None:
    at = _epoch_axis(axes, result)
    eager, fused, itself = result["eager"]["step_losses"], result["fused"]["step_losses"], result["eager_itself_losses"]
    floor = 1e-7  # rounding of a float32 loss; equal losses are drawn there
    apart = [max(abs(a - b), floor) for a, b in zip(eager, fused, strict=True)]
    apart_itself = [max(abs(a - b), floor) for a, b in zip(eager, itself, strict=False)]
    axes.plot(at, apart, color=FUSED, lw=1.4)
    axes.plot(at[: len(apart_itself)], apart_itself, color=BAND, lw=2.2)
    axes.set_yscale("log")
    axes.set_ylim(floor / 2, 2)
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.set_title("Difference of the losses: rounding, which training amplifies")
    axes.set_xlabel("epoch")
    labels = (("fusedres from eager", FUSED), ("eager from itself, in the other memory format", EAGER))
    for place, (text, colour) in enumerate(labels):
        axes.text(
            0.985, 0.23 - 0.15 * place, text, transform=axes.transAxes, ha="right", color=colour, weight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip


def _accuracy(axes: Axes, result: dict[str, Any]) -> None:
    epochs = range(1, result["epochs"] + 1)
    _epoch_axis(axes, result)
    axes.set_xlim(0.6, result["epochs"] + 0.4)
    for name, colour, width, size in (("eager", BAND, 6, 11), ("fused", FUSED, 1.8, 5)):
        accuracies = [100 * value for value in result[name]["epoch_accuracies"]]
        axes.plot(epochs, accuracies, color=colour, lw=width, marker="o", ms=size, mew=0)
    axes.set_ylim(0, 104)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %"))
    axes.set_title("Test accuracy")
    axes.set_xlabel("epoch")
    for place, (name, title, colour) in enumerate((("eager", "eager", EAGER), ("fused", "fusedres", FUSED))):
        text = f"{title}  {result[name]['test_accuracy']:.2%}".replace("%", " %")
        axes.text(
            0.97, 0.24 - 0.13 * place, text, transform=axes.transAxes, ha="right", color=colour, weight="bold", size=13
        )


def _footer(figure: Figure, result: dict[str, Any]) -> None:
    device = result["device"]
    if result["device_type"] == "cpu":
        device += f" ({result['cpu_capability']}), {result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    precision = "bfloat16 autocast" if result["amp"] == "bf16" else "float32"
    versions = result["versions"]
    facts = (
        f"{_model_name(result['model'])}, {result['train_images']:,} training images "
        f"of {result['image_size']}\N{MULTIPLICATION SIGN}{result['image_size']} pixels, "
        f"batch {result['batch_size']}, {precision}, {result['memory_format']}",
        f"{device}   torch {versions['torch']}, fusedres {versions['version']}   "
        "training steps only, in turns; medians"
        + ("; host memory recycled for both" if result["host_memory_reused"] else ""),
    )
    for line, text in enumerate(facts):
        figure.text(0.03, 0.034 - 0.021 * line, text, size=9, color=MUTED)
