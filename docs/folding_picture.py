"""Draws ``docs/folding.png``: the tensors of a Bottleneck in eager, fused and folded training.

python docs/folding_picture.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch, Rectangle

KEPT, WRITTEN, BITS, ABSENT = "kept for backward", "written, then dropped", "kept, one bit per element", "never exists"
COLOURS = {KEPT: "#1f4e79", WRITTEN: "#9dc3e6", BITS: "#1f4e79", ABSENT: "white"}

# Name and channels in units of C, in the order in which they come to be.
FORWARD = (("x1", 1), ("y1", 1), ("x2", 1), ("y2", 1), ("x3 = conv3(y2)", 4), ("bn3(x3)", 4), ("out", 4), ("mask", 4))
BACKWARD = (("G", 4), ("dx3", 4), ("dy2", 1), ("dx2", 1), ("dy1", 1), ("dx1", 1), ("conv1's part", 4), ("dx", 4))

K, W, B, A = KEPT, WRITTEN, BITS, ABSENT
SCHEMES = {
    "eager": ((K, K, K, K, K, W, K, A), (W, W, W, W, W, W, W, W)),
    "fused\nbatch norm": ((K, K, K, K, K, A, K, B), (W, W, W, W, W, W, W, W)),
    "folded": ((K, W, K, A, A, A, K, B), (A, A, W, W, W, W, A, W)),
}


def _draw_row(axes: plt.Axes, y: float, tensors: tuple[tuple[str, int], ...], states: tuple[str, ...]) -> None:
    left = 0.0
    for (_, channels), state in zip(tensors, states, strict=True):
        low, height = (y + 0.29, 0.02) if state == BITS else (y, 0.6)
        edge = {"edgecolor": "#999999", "linestyle": ":"} if state == ABSENT else {"edgecolor": "black"}
        axes.add_patch(Rectangle((left, low), channels, height, facecolor=COLOURS[state], linewidth=0.8, **edge))
        left += channels + 0.35


def draw(path: Path) -> None:
    """Write the picture to ``path``."""
    figure, both = plt.subplots(2, 1, figsize=(10, 5.6), layout="constrained")
    for axes, title, tensors, which in zip(
        both, ("forward", "backward: gradients"), (FORWARD, BACKWARD), (0, 1), strict=True
    ):
        for row, states in enumerate(SCHEMES.values()):
            _draw_row(axes, 2 - row, tensors, states[which])
        left, width = 0.0, sum(channels + 0.35 for _, channels in tensors)
        for name, channels in tensors:
            axes.text(left + channels / 2, 2.72, name, ha="center", va="bottom", fontsize=8)
            left += channels + 0.35
        axes.set(xlim=(-0.2, width), ylim=(-0.15, 3.15), yticks=[2.3, 1.3, 0.3], yticklabels=SCHEMES, xticks=[])
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    legend = [
        Patch(facecolor=COLOURS[s], edgecolor="#999999" if s == ABSENT else "black", linestyle=":" if s == A else "-")
        for s in (KEPT, WRITTEN, ABSENT)
    ]
    figure.legend(legend, (KEPT, WRITTEN, ABSENT), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle("A Bottleneck in training; widths are channels, C or 4C (a line: one bit per element)", fontsize=11)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(Path(__file__).with_name("folding.png"))
