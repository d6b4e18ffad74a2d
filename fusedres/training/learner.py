"""A network with its optimizer and schedule: one training step, one evaluation, and the state to continue from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from . import distributed
from .config import TrainConfig
from .data import Batch


@dataclass(frozen=True)
class Score:
    """Means over the test images of all ranks."""

    loss: float
    accuracy: float  # in [0, 1]


def learning_rate_factor(step: int, *, warmup: int, total: int) -> float:
    """Linear from near 0 to 1 over ``warmup`` steps, then a half cosine down to 0 at ``total``."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Learner:
    """SGD with Nesterov momentum on label-smoothed cross entropy; under a process group with averaged gradients."""

    def __init__(self, model: nn.Module, config: TrainConfig, *, steps_per_epoch: int, device: torch.device) -> None:
        self.config, self.device = config, device
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=memory_format)
        self.parallel: nn.Module = self.model
        if distributed.world_size() > 1:
            device_ids = [device.index] if device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.model, device_ids=device_ids)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
            fused=device.type in ("cpu", "cuda"),
        )
        total = config.epochs * steps_per_epoch
        warmup = min(round(config.warmup_epochs * steps_per_epoch), total // 2)
        self._factor = partial(learning_rate_factor, warmup=warmup, total=total)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: self._factor(step))

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0 over all epochs."""
        return self.config.lr * self._factor(step)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp == "bf16")

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Train on one batch; returns its loss without waiting for the device."""
        with self._autocast():
            logits = self.parallel(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def _logits(self, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits and labels in evaluation mode; the model is left in training mode."""
        self.model.eval()
        for images, labels in batches:
            with torch.no_grad(), self._autocast():
                logits = self.model(images).float()
            yield logits, labels
        self.model.train()

    def evaluate(self, batches: Iterable[Batch]) -> Score:
        """Score on this rank's batches, averaged over all ranks."""
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, correct, images
        for logits, labels in self._logits(batches):
            totals[0] += F.cross_entropy(logits, labels, reduction="sum")
            totals[1] += (logits.argmax(1) == labels).sum()
            totals[2] += len(labels)
        loss, correct, images = distributed.sum_over_ranks(totals).tolist()
        return Score(loss / images, correct / images)

    def predict(self, batches: Iterable[Batch]) -> list[int]:
        return [label for logits, _ in self._logits(batches) for label in logits.argmax(1).tolist()]

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
