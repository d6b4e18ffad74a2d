"""Epochs, checkpoints and logs around :class:`~fusedres.training.learner.Learner`.

A run folder holds ``last.pt`` and ``best.pt`` (checkpoints), ``epochs.csv`` (one row for each epoch) and ``steps.csv``
(one row for each step, written when its epoch is complete). On a CPU a run that was interrupted anywhere and resumed
ends in the same bits as one that was not.
"""

from __future__ import annotations

import csv
import math
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from .. import info, reuse_host_memory
from . import checkpoint, distributed
from .config import ConfigError, TrainConfig, TrainingError
from .data import ImageData, load_data
from .learner import Learner
from .networks import build_model, plain_twin
from .progress import progress

EPOCH_FIELDS = ("epoch", "lr", "train_loss", "test_loss", "test_accuracy", "seconds", "images_per_second")
STEP_FIELDS = ("step", "epoch", "lr", "loss")


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device must be auto, cpu or cuda, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: this torch ({torch.__version__}) sees no GPU")
    return device


def serving_summary(device: torch.device, *, fused: bool) -> str:
    """What runs batch norm, ReLU and residuals: eager PyTorch, or who serves the fused op on ``device``."""
    if not fused:
        return "eager PyTorch"
    server = info()["ops"]["batch_norm_act"].get(device.type, {"served_by": "eager"})["served_by"]
    return f"fused ops, served by {server}"


class Interrupt:
    """Notes SIGINT and SIGTERM, so that the loop can end between two steps; another one, later, acts at once."""

    same_key = 1.0  # seconds: under torchrun one Ctrl-C arrives twice, from the terminal and from the launcher

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._noted = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._noted = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._noted > self.same_key:
            self._restore()
            raise KeyboardInterrupt

    def _restore(self) -> None:
        for name, handler in self._previous.items():
            signal.signal(name, handler)
        self._previous = {}

    def __enter__(self) -> Interrupt:
        for name in (signal.SIGINT, signal.SIGTERM):
            self._previous[name] = signal.signal(name, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()


class CsvLog:
    """A table on disk that grows by rows; opening it drops the rows that a resumed run will write again."""

    def __init__(self, path: Path, fields: tuple[str, ...], *, epochs: int) -> None:
        self.path, self.fields = path, fields
        kept: list[dict[str, str]] = []
        if epochs and path.is_file():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["epoch"]) <= epochs]
        scratch = path.with_name(path.name + ".tmp")
        with scratch.open("w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(kept)
        os.replace(scratch, path)

    def append(self, rows: Iterable[tuple[Any, ...]]) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows(rows)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``signal`` is what interrupted it, if anything did; ``writes`` on the rank that reports."""

    accuracy: float
    best_accuracy: float
    writes: bool
    signal: signal.Signals | None = None


class Trainer:
    """One run on one process; every process of a group makes one."""

    def __init__(self, config: TrainConfig, device: torch.device, state: dict[str, Any] | None = None) -> None:
        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        self.data: ImageData = load_data(
            config, device=device, rank=distributed.rank(), world_size=distributed.world_size()
        )
        self.learner = Learner(self._build(), config, steps_per_epoch=self.data.steps_per_epoch, device=device)
        self.epoch = self.step = 0  # what comes next: a step of an epoch
        self.losses = torch.zeros(self.data.steps_per_epoch, device=device)  # of the epoch so far
        self.seconds = 0.0
        self.accuracy = self.best_accuracy = 0.0
        if state is not None:
            self._load(state)

    def _build(self) -> nn.Module:
        config = self.config
        model = build_model(config.model, num_classes=len(self.data.classes), in_channels=self.data.channels)
        return model if config.fused else plain_twin(model)

    def _state(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "classes": list(self.data.classes),
            "world_size": distributed.world_size(),
            "epoch": self.epoch,
            "step": self.step,
            "losses": self.losses.cpu(),
            "seconds": self.seconds,
            "accuracy": self.accuracy,
            "best_accuracy": self.best_accuracy,
            "random": checkpoint.random_state(self.device),
            **self.learner.state_dict(),
        }

    def _load(self, state: dict[str, Any]) -> None:
        if state["world_size"] != distributed.world_size():
            raise ConfigError(
                f"--resume: the run was on {state['world_size']} processes, got {distributed.world_size()}"
            )
        if state["classes"] != list(self.data.classes) or len(state["losses"]) != self.data.steps_per_epoch:
            raise ConfigError(f"--resume: the data behind {self.config.data} are not what the run was trained on")
        self.learner.load_state_dict(state)
        self.epoch, self.step = state["epoch"], state["step"]
        self.losses.copy_(state["losses"])
        self.seconds = state["seconds"]
        self.accuracy, self.best_accuracy = state["accuracy"], state["best_accuracy"]
        checkpoint.set_random_state(state["random"], self.device)

    def _save(self, *names: str) -> None:
        state = self._state()  # collective: every rank comes here
        if distributed.rank() == 0:
            for name in names:
                checkpoint.save(self.config.folder / name, state)

    def _describe(self) -> str:
        parameters = sum(p.numel() for p in self.learner.model.parameters())
        threads = torch.get_num_threads()
        place = f"{threads} CPU thread{'s' if threads > 1 else ''}"
        if self.device.type == "cuda":
            place = torch.cuda.get_device_name(self.device)
        if distributed.world_size() > 1:
            place = f"{distributed.world_size()} processes, each on {place}"
        return (
            f"{self.config.model} ({parameters:,} parameters) on {self.config.data} "
            f"({self.data.train_size:,} images to train on, {self.data.test_size:,} to test)\n"
            f"{place}, {serving_summary(self.device, fused=self.config.fused)}"
        )

    def fit(self) -> Outcome:
        """Train to the last epoch or the first signal."""
        writes = distributed.rank() == 0
        if writes:
            self.config.folder.mkdir(parents=True, exist_ok=True)
            epoch_log = CsvLog(self.config.folder / "epochs.csv", EPOCH_FIELDS, epochs=self.epoch)
            step_log = CsvLog(self.config.folder / "steps.csv", STEP_FIELDS, epochs=self.epoch)

        steps = self.data.steps_per_epoch
        with progress(silent=not writes) as show, Interrupt() as interrupt:
            show.line(self._describe())
            bar = show.add(self.config.model, self.config.epochs * steps, self.epoch * steps + self.step)
            while self.epoch < self.config.epochs:
                if not self._train_epoch(show, bar, interrupt):
                    self._save("last.pt")
                    return Outcome(self.accuracy, self.best_accuracy, writes, interrupt.signal or signal.SIGINT)

                score = self.learner.evaluate(self.data.test_batches())
                losses = distributed.sum_over_ranks(self.losses / distributed.world_size()).tolist()
                train_loss = math.fsum(losses) / steps
                if not math.isfinite(train_loss):
                    raise TrainingError(
                        f"the loss became {train_loss} in epoch {self.epoch + 1}; a smaller --lr may help"
                    )
                self.epoch += 1
                lrs = [self.learner.lr_at((self.epoch - 1) * steps + step) for step in range(steps)]
                rate = steps * self.config.batch_size * distributed.world_size() / self.seconds
                if writes:
                    first = (self.epoch - 1) * steps + 1
                    step_log.append(
                        (first + i, self.epoch, lr, loss) for i, (lr, loss) in enumerate(zip(lrs, losses, strict=True))
                    )
                    row = (
                        self.epoch,
                        lrs[-1],
                        train_loss,
                        score.loss,
                        score.accuracy,
                        round(self.seconds, 4),
                        round(rate, 1),
                    )
                    epoch_log.append([row])
                status = (
                    f"loss {train_loss:.4f}   test {score.accuracy:7.2%}   {self.seconds:6.2f} s   {rate:,.0f} images/s"
                )
                show.line(f"epoch {self.epoch:>{len(str(self.config.epochs))}}/{self.config.epochs}   {status}")

                show.update(bar, self.epoch * steps, "")
                self.accuracy = score.accuracy
                best = score.accuracy > self.best_accuracy
                self.best_accuracy = max(score.accuracy, self.best_accuracy)
                self.step, self.seconds = 0, 0.0
                self.losses.zero_()
                self._save("last.pt", *(["best.pt"] if best else []))
        return Outcome(self.accuracy, self.best_accuracy, writes)

    def _train_epoch(self, show: Any, bar: Any, interrupt: Interrupt) -> bool:
        """The steps of the current epoch that are left; False if a signal came first."""
        steps = self.data.steps_per_epoch
        self.learner.model.train()
        resumed_at, begin = self.seconds, time.perf_counter()
        for images, labels in self.data.train_batches(self.epoch, self.step):
            self.losses[self.step] = self.learner.step(images, labels)
            self.step += 1
            self.seconds = resumed_at + time.perf_counter() - begin
            if show.live and self.step % 5 == 0:
                loss = self.losses[self.step - 1].item()
                show.update(
                    bar,
                    self.epoch * steps + self.step,
                    f"epoch {self.epoch + 1}/{self.config.epochs}   loss {loss:.4f}",
                )
            # The ranks have to agree on the step to stop at, and asking costs a round trip.
            ask = distributed.world_size() == 1 or self.step % 10 == 0
            if ask and distributed.any_rank(interrupt.signal is not None):
                return False
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.seconds = resumed_at + time.perf_counter() - begin
        return not distributed.any_rank(interrupt.signal is not None)


def train(config: TrainConfig, state: dict[str, Any] | None = None) -> Outcome:
    """Run ``config``, from the checkpoint ``state`` if there is one; under ``torchrun``, as one of its processes."""
    device = resolve_device(config.device)
    if device.type == "cpu":
        reuse_host_memory()
    torch.backends.cudnn.benchmark = True  # the shapes are the same in every step
    with distributed.process_group(device) as device:
        return Trainer(config, device, state).fit()
