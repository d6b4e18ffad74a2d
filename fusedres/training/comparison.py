"""The demo: one network trained twice from the same weights on the same batches, by eager PyTorch and by fused ops.

The two take turns in one process, so that whatever else the machine does slows both: on a CPU step by step, on a GPU,
where every turn ends in waiting for the device, epoch by epoch. Only the training steps are timed.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from .. import info, reuse_host_memory
from .config import TrainConfig
from .data import Batch, ImageData
from .learner import Learner
from .networks import build_model, plain_twin
from .progress import LiveProgress, PlainProgress

YARDSTICK_EPOCHS = 2
FIRST_STEPS = 3  # before a difference in rounding has grown: training amplifies it


@dataclass
class Contender:
    """One of the runs, and what was measured on it."""

    name: str
    learner: Learner
    losses: list[float] = field(default_factory=list)  # of every step
    seconds: list[float] = field(default_factory=list)  # of every turn
    accuracies: list[float] = field(default_factory=list)  # after every epoch
    predictions: list[int] = field(default_factory=list)  # of the test images, in the end
    saved_bytes: int = 0
    ops: dict[str, int] = field(default_factory=dict)  # calls in one step

    def train(self, batches: list[Batch]) -> None:
        """One turn."""
        begin = time.perf_counter()
        losses = [self.learner.step(images, labels) for images, labels in batches]
        _synchronize(self.learner.device)
        self.seconds.append(time.perf_counter() - begin)
        self.losses += torch.stack(losses).tolist()

    def epoch_seconds(self, epochs: int) -> float:
        """Of a median epoch: the median turn, as often as there are turns in an epoch."""
        return statistics.median(self.seconds) * len(self.seconds) / epochs

    def summary(self, epochs: int) -> dict[str, Any]:
        return {
            "test_accuracy": self.accuracies[-1],
            "seconds_per_epoch": self.epoch_seconds(epochs),
            "saved_for_backward_bytes": self.saved_bytes,
            "ops_per_step": self.ops,
            "epoch_accuracies": self.accuracies,
            "step_losses": self.losses,
            "turn_seconds": self.seconds,
        }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def saved_for_backward_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes kept between forward and backward, each storage once, without the parameters and the images themselves."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), images, labels)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(images).float(), labels)
    total = sum(saved.values())  # while the graph keeps them alive, addresses are unique
    del loss
    return total


class _CountOps(TorchDispatchMode):
    """Counts what a fused op replaces, normalising, adding the shortcut and ReLU, and the fused ops themselves."""

    _WATCHED = re.compile(
        r"fusedres::|aten::(native|cudnn|miopen)_batch_norm|aten::_batch_norm|aten::relu|aten::threshold"
    )

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0].rstrip("_")
        if self._WATCHED.match(name) or (func is torch.ops.aten.add_.Tensor and args[0].dim() == 4):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count_ops(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, int]:
    """How often a training step calls each op that normalises, adds the shortcut or is a ReLU."""
    with _CountOps() as mode:
        F.cross_entropy(model(images).float(), labels).backward()
    return dict(sorted(mode.counts.items()))


def _largest_deviation(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def _contender(
    name: str, model: nn.Module, config: TrainConfig, steps_per_epoch: int, device: torch.device
) -> Contender:
    return Contender(name, Learner(model, config, steps_per_epoch=steps_per_epoch, device=device))


def threads_that_help(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """One thread, where that beats as many as torch would use: on a busy machine threads wait for each other."""
    offered = torch.get_num_threads()
    medians = {}
    for threads in {offered, 1}:
        torch.set_num_threads(threads)
        seconds = []
        for _ in range(5):
            begin = time.perf_counter()
            F.cross_entropy(model(images), labels).backward()
            seconds.append(time.perf_counter() - begin)
        medians[threads] = statistics.median(seconds)
    torch.set_num_threads(offered)
    return min(medians, key=medians.__getitem__)


def compare(
    config: TrainConfig, data: ImageData, device: torch.device, show: PlainProgress | LiveProgress
) -> dict[str, Any]:
    """Train both ways and measure; the result is ready for JSON. May lower the number of threads, and says so."""
    not_reused = reuse_host_memory() if device.type == "cpu" else "PyTorch keeps the memory of a GPU by itself"
    torch.backends.cudnn.benchmark = True  # the shapes are the same in every step
    torch.manual_seed(config.seed)
    steps = data.steps_per_epoch
    model = build_model(config.model, num_classes=len(data.classes), in_channels=data.channels)
    # Eager in the other memory format shows how far rounding alone moves a curve.
    other = dataclasses.replace(config, channels_last=not config.channels_last)
    yardstick = _contender("eager, other memory format", plain_twin(model), other, steps, device)
    eager = _contender("eager", plain_twin(model), config, steps, device)
    fused = _contender("fused", model, config, steps, device)
    runs = [eager, fused]

    probe_batch = next(data.train_batches(0))
    for run in runs:
        probe = copy.deepcopy(run.learner.model)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp == "bf16"):
            run.saved_bytes = saved_for_backward_bytes(probe, *probe_batch)
            run.ops = count_ops(probe, *probe_batch)
    threads_offered = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(threads_that_help(copy.deepcopy(eager.learner.model), *probe_batch))
    memory_format = torch.channels_last if other.channels_last else torch.contiguous_format

    bars = {run.name: show.add(run.name, config.epochs * steps) for run in runs}
    turn = 1 if device.type == "cpu" else steps
    for epoch in range(config.epochs):
        batches = list(data.train_batches(epoch))
        for start in range(0, steps, turn):
            for run in runs:
                run.train(batches[start : start + turn])
                if show.live and len(run.losses) % 4 == 0:
                    show.update(bars[run.name], len(run.losses))
            runs.reverse()
        if epoch < YARDSTICK_EPOCHS:
            yardstick.train([(images.clone(memory_format=memory_format), labels) for images, labels in batches])
        for run in (eager, fused):
            run.accuracies.append(run.learner.evaluate(data.test_batches()).accuracy)
            seconds = sum(run.seconds[-steps // turn :])
            loss = statistics.fmean(run.losses[-steps:])
            status = f"loss {loss:.4f}   test {run.accuracies[-1]:6.1%}   {seconds:5.2f} s/epoch"
            show.update(bars[run.name], len(run.losses), status)
            if not show.live:
                show.line(f"epoch {epoch + 1:>2}/{config.epochs}   {run.name}   {status}")
    for run in runs:
        run.predictions = run.learner.predict(data.test_batches())

    facts = info()
    served = {name: by.get(device.type) for name, by in facts["ops"].items() if _called(name, fused.ops)}
    first = min(FIRST_STEPS, steps)
    return {
        "model": config.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": config.data,
        "train_images": data.train_size,
        "test_images": data.test_size,
        "image_size": config.image_size,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "amp": config.amp,
        "memory_format": "channels_last" if config.channels_last else "contiguous",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else facts["cpu"]["name"],
        "device_type": device.type,
        "cpu_capability": facts["cpu"]["capability"],
        "threads": torch.get_num_threads(),
        "threads_offered": threads_offered,
        "host_memory_reused": not_reused is None,
        "host_memory_note": not_reused,
        "versions": {name: facts[name] for name in ("version", "torch", "python", "platform")},
        "served": served,
        "eager": eager.summary(config.epochs),
        "fused": fused.summary(config.epochs),
        "speed_ratio": eager.epoch_seconds(config.epochs) / fused.epoch_seconds(config.epochs),
        "saved_ratio": fused.saved_bytes / eager.saved_bytes,
        "loss_deviation": {
            "first_steps": first,
            "first": _largest_deviation(eager.losses[:first], fused.losses[:first]),
            "all": _largest_deviation(eager.losses, fused.losses),
            "eager_itself_first": _largest_deviation(eager.losses[:first], yardstick.losses[:first]),
            "eager_itself_all": _largest_deviation(eager.losses[: len(yardstick.losses)], yardstick.losses),
        },
        "eager_itself_losses": yardstick.losses,
        "test_labels": [label for _, labels in data.test_batches() for label in labels.tolist()],
        "test_predictions": {run.name: run.predictions for run in (eager, fused)},
    }


def _called(name: str, ops: dict[str, int]) -> bool:
    """Whether the op, or its reference form, is among the ``ops`` of a step."""
    return any(f"fusedres::{name}{suffix}" in ops for suffix in ("", "_reference"))
