"""Every fused region of a ResNet in training, derived from the architecture; tested against real models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

LAYERS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
EXPANSION = {"resnet18": 1, "resnet34": 1, "resnet50": 4}


@dataclass(frozen=True, order=True)
class Shape:
    """One distinct call: which op, with or without residual, and x's size. `uses` counts it per model."""

    op: str
    residual: bool
    n: int
    c: int
    h: int
    w: int
    uses: tuple[tuple[str, int], ...] = ()

    @property
    def numel(self) -> int:
        return self.n * self.c * self.h * self.w

    @property
    def key(self) -> str:
        tail = "+residual" if self.residual and self.op == "batch_norm_act" else ""
        return f"{self.op}{tail}[{self.n}x{self.c}x{self.h}x{self.w}]"


def _calls(model: str, image: int) -> Iterator[tuple[str, bool, int, int]]:
    """(op, residual, channels, side) of every fused region of one forward pass, in order."""
    side = (image - 1) // 2 + 1
    yield "batch_norm_act_max_pool", False, 64, side
    side = (side - 1) // 2 + 1
    channels, expansion = 64, EXPANSION[model]
    for stage, blocks in enumerate(LAYERS[model]):
        width = 64 << stage
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            out_side = (side - 1) // stride + 1
            if expansion == 1:
                yield "batch_norm_act", False, width, out_side
            else:  # the stride is on the 3x3
                yield "batch_norm_act", False, width, side
                yield "batch_norm_act", False, width, out_side
            out = width * expansion
            if stride != 1 or channels != out:
                yield "batch_norm_add_batch_norm_act", False, out, out_side
            else:
                yield "batch_norm_act", True, out, out_side
            yield "add_act", True, out, out_side  # the tail again, where its norm cannot be fused
            channels, side = out, out_side


def resnet_shapes(
    models: tuple[str, ...] = ("resnet18", "resnet50"), *, batch: int = 8, image: int = 224, op: str | None = None
) -> list[Shape]:
    """The distinct shapes of these models, largest first within an op; `op` keeps one op."""
    uses: dict[tuple[str, bool, int, int], dict[str, int]] = {}
    for model in models:
        for call in _calls(model, image):
            counts = uses.setdefault(call, {})
            counts[model] = counts.get(model, 0) + 1
    shapes = [
        Shape(name, residual, batch, c, side, side, tuple(sorted(counts.items())))
        for (name, residual, c, side), counts in uses.items()
        if op in (None, name)
    ]
    return sorted(shapes, key=lambda s: (s.op, s.residual, -s.numel, s.c))
