"""What a training step moves between memory and processor, from the ops that it calls.

The step, forward and backward, runs on fake tensors: they have shapes and no values, so that any batch fits and nothing
is computed. Every op that the dispatcher sees is logged and counted:

- an op of this package by its traffic function, launch by launch;
- a convolution by what it must move at least: forward its input and output, the gradient of the input that of the
  output and its own, the gradient of the weight that of the output and the input;
- any other ATen op by the activations that it reads and writes, a batch norm's as often as its two passes do.

Activations are 4-dimensional tensors of as many images as the batch has; weights, the loss and small matrices outside
the ops of this package are not counted. What batch norms and elementwise ops move is all of it less what the
convolutions of the eager network must: a folded convolution moves bytes of both kinds at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ..nn.norm import folding_decision
from ..ops import folded_call, registry
from ..ops.calls import call_traffic, op_of
from ..ops.traffic import Launch
from .networks import build_model, make_plain

# What a step may be: the network in plain PyTorch, its ops fused, and with folded convolutions. "auto" is that of a
# device on which every layer that can be folded gains by it.
VARIANTS = ("eager", "fused", "auto", "always")
_FOLDING = {"fused": "never", "auto": "auto", "always": "always"}

_CONVOLUTIONS = ("aten::convolution", "aten::convolution_backward")
_TWICE = {  # arguments that both passes of an op read
    "aten::native_batch_norm": ("input",),
    "aten::native_batch_norm_backward": ("grad_out", "input"),
}
_UNREAD = {  # those of which only the shape matters, or that are overwritten
    "aten::max_pool2d_with_indices_backward": ("self",),
    **{f"aten::{name}": ("self",) for name in ("copy_", "fill_", "zero_", "zeros_like", "ones_like", "full_like")},
}
_MOVES_NOTHING = {
    f"aten::{name}" for name in ("empty_like", "new_empty", "new_empty_strided", "empty", "as_strided_", "set_")
}
# What autograd and autocast do with weights too, whose shape tells them from activations.
_OF_WEIGHTS_TOO = {f"aten::{name}" for name in ("_to_copy", "copy_", "clone")}


@dataclass
class OpTraffic:
    """Bytes of all calls of an op in a step."""

    calls: int = 0
    loads: int = 0
    stores: int = 0
    launches: Counter[str] = field(default_factory=Counter)  # bytes by the name of the launch

    @property
    def total(self) -> int:
        return self.loads + self.stores

    def add(self, launches: Sequence[Launch]) -> None:
        """One more call."""
        self.calls += 1
        for launch in launches:
            self.loads += launch.loads
            self.stores += launch.stores
            self.launches[launch.name] += launch.total


def _bytes(x: Tensor) -> int:
    """Distinct ones: an expanded dimension is there once."""
    return x.element_size() * math.prod(
        size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or not size
    )


def _read_by(x: Tensor, weight: Tensor, out: Tensor) -> int:
    """Bytes of the pixels of ``x`` that the windows of a convolution cover."""
    covered = (min(size, n * k) for size, n, k in zip(x.shape[2:], out.shape[2:], weight.shape[2:], strict=True))
    return x.element_size() * x.size(0) * x.size(1) * math.prod(covered)


class StepRecorder(TorchDispatchMode):
    """Counts what the ops that run under it move.

    Args:
        batch: images, by which activations are known. weights: the shapes of the parameters.

    Attributes:
        ops: by name, ``fusedres::batch_norm_act`` or ``aten::relu_``.
    """

    def __init__(self, batch: int, weights: set[torch.Size]) -> None:
        super().__init__()
        self.batch, self.weights = batch, weights
        self.ops: dict[str, OpTraffic] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        own = op_of(func)
        name = func._schema.name if own is None else f"fusedres::{own}"
        if own is not None:
            launches = call_traffic(func, args, kwargs).launches
        elif name in _CONVOLUTIONS:
            launches = self._convolution(name, args, result)
        else:
            launches = self._elementwise(func, name, args, kwargs, result)
        if launches:
            self.ops.setdefault(name, OpTraffic()).add(launches)
        return result

    @staticmethod
    def _convolution(name: str, args: Sequence[Any], result: Any) -> list[Launch]:
        if name == "aten::convolution":
            x, weight = args[:2]
            return [Launch("forward", _read_by(x, weight, result), _bytes(result))]
        dy, x, weight = args[:3]
        need_dx, need_dweight, _ = args[-1]
        read = _read_by(x, weight, dy)
        return [
            *([Launch("input gradient", _bytes(dy), _bytes(result[0]))] if need_dx else []),
            *([Launch("weight gradient", _bytes(dy) + read, 0)] if need_dweight else []),
        ]

    def _is_activation(self, name: str, x: Any) -> bool:
        if not isinstance(x, Tensor) or x.dim() != 4 or x.size(0) != self.batch:
            return False
        return name not in _OF_WEIGHTS_TOO or x.shape not in self.weights

    def _elementwise(
        self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> list[Launch]:
        results = result if isinstance(result, (tuple, list)) else (result,)
        written = [x for x in results if self._is_activation(name, x)]
        schema = func._schema.arguments
        given = [(schema[i], value) for i, value in enumerate(args)]
        given += [(argument, kwargs[argument.name]) for argument in schema if argument.name in kwargs]
        if name in _MOVES_NOTHING or func.is_view or not any(isinstance(x, Tensor) for x in results):
            return []
        loads = 0
        for argument, value in given:
            for x in value if isinstance(value, (tuple, list)) else (value,):
                if self._is_activation(name, x) and argument.name not in _UNREAD.get(name, ()):
                    loads += _bytes(x) * (2 if argument.name in _TWICE.get(name, ()) else 1)
        stores = sum(_bytes(x) for x in written)
        return [Launch("apply", loads, stores)] if loads + stores else []


_ASKED_FOR_FOLDS = ("folding_choice", "never_gains")  # functions whose first argument is "auto", "always" or "never"


@contextmanager
def _every_fold_gains() -> Iterator[None]:
    """Decide "auto" as where every layer that can be folded gains by it."""
    originals = {name: getattr(folded_call, name) for name in _ASKED_FOR_FOLDS}

    def gains(original: Callable[..., Any], asked: str, *args: Any, **kwargs: Any) -> Any:
        return original("always" if asked == "auto" else asked, *args, **kwargs)

    for name, original in originals.items():
        setattr(folded_call, name, partial(gains, original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(folded_call, name, original)


def _prepare(model: nn.Module, variant: str) -> None:
    if variant == "eager":
        make_plain(model)
        return
    for module in model.modules():
        if hasattr(module, "folding"):
            module.folding = _FOLDING[variant]
            folding_decision(module).safe = True  # fake tensors have no values to look at


def record_step(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, OpTraffic]:
    """What a forward and backward moves, by op; under autocast for images of 16 bits."""
    half = images.dtype.itemsize == 2
    recorder = StepRecorder(len(images), {p.shape for p in network.parameters()})
    with recorder:
        with torch.autocast(images.device.type, images.dtype if half else None, enabled=half):
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()
    return recorder.ops


def step_traffic(model: str, *, batch: int, image: int, dtype: torch.dtype, variant: str) -> dict[str, OpTraffic]:
    """What a training step of a network moves, by op.

    Args:
        model: its name, as ``fusedres train`` takes it.
        batch, image: images in a step, and their side; they are channels_last.
        dtype: of the activations.
        variant: one of ``VARIANTS``.

    Raises:
        ConfigError: an unknown network.
    """
    # Every call takes its fused form, whatever is built on this machine and however small the tensors.
    with FakeTensorMode(allow_non_fake_inputs=True), registry.use_backend("reference"), _every_fold_gains():
        network = build_model(model, num_classes=1000)
        _prepare(network, variant)
        images = torch.empty(batch, 3, image, image, dtype=dtype).to(memory_format=torch.channels_last)
        return record_step(network, images, torch.empty(batch, dtype=torch.int64))


def of_convolutions(ops: Mapping[str, OpTraffic]) -> int:
    """Bytes that the convolutions of a step must move at least."""
    return sum(moved.total for name, moved in ops.items() if name in _CONVOLUTIONS)


def of_all(ops: Mapping[str, OpTraffic]) -> int:
    return sum(moved.total for moved in ops.values())
