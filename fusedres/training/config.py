"""The settings of a training run, their defaults per data set, and what is wrong with them, in one line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A setting or a path the user gave cannot work; the message is one line for the terminal."""


class TrainingError(RuntimeError):
    """The run itself went wrong; the message is one line for the terminal."""


# What a data set is trained with unless told otherwise.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 12, "batch_size": 64, "lr": 0.05, "weight_decay": 5e-4, "warmup_epochs": 2.0},
    "cifar10": {"epochs": 100, "batch_size": 128, "lr": 0.1, "weight_decay": 5e-4},
    "imagefolder": {
        "model": "resnet18",
        "epochs": 90,
        "batch_size": 64,
        "lr": 0.025,
        "weight_decay": 1e-4,
        "image_size": 224,
    },
    "synthetic": {"epochs": 3},
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the numbers of a run, and the few settings that do not (``RESUMABLE``)."""

    data: str = "digits"
    model: str = "resnet20"
    epochs: int = 12
    batch_size: int = 64  # images per step and process
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    warmup_epochs: float = 1.0
    fused: bool = True
    amp: str = "off"
    channels_last: bool = True
    image_size: int = 32
    seed: int = 0
    workers: int = 0
    device: str = "auto"
    out: str = "out/train"

    def __post_init__(self) -> None:
        def need(condition: bool, name: str, wanted: str) -> None:
            if not condition:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} must be {wanted}, got {getattr(self, name)!r}")

        need(self.epochs >= 1, "epochs", "at least 1")
        need(self.batch_size >= 2, "batch_size", "at least 2 (batch statistics)")
        need(self.lr > 0, "lr", "above 0")
        need(0 <= self.momentum < 1, "momentum", "in [0, 1)")
        need(self.weight_decay >= 0, "weight_decay", "0 or more")
        need(0 <= self.label_smoothing < 1, "label_smoothing", "in [0, 1)")
        need(self.warmup_epochs >= 0, "warmup_epochs", "0 or more")
        need(self.amp in ("bf16", "off"), "amp", "bf16 or off")
        need(self.image_size >= 8, "image_size", "at least 8")
        need(0 <= self.seed < 2**31, "seed", "in [0, 2**31)")
        need(self.workers >= 0, "workers", "0 or more")
        kind, _, rest = self.data.partition(":")
        need(kind in PRESETS, "data", "digits, cifar10:PATH, imagefolder:PATH or synthetic[:IMAGES]")
        if kind in ("cifar10", "imagefolder"):
            need(bool(rest), "data", f"{kind}:PATH")
        elif kind == "digits":
            need(not rest, "data", "digits, without a path")

    @property
    def data_kind(self) -> str:
        return self.data.partition(":")[0]

    @property
    def data_argument(self) -> str:
        return self.data.partition(":")[2]

    @property
    def folder(self) -> Path:
        return Path(self.out)

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> TrainConfig:
        """``settings`` over the data set's preset over the defaults."""
        kind = settings.get("data", cls.data).partition(":")[0]
        return cls(**{**PRESETS.get(kind, {}), **settings})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# A run may be resumed with another value of these. The last two leave the numbers as they would have been: order and
# augmentation of the images depend on neither the number of workers nor the folder.
RESUMABLE = ("epochs", "fused", "device", "workers", "out")


def resumed(saved: dict[str, Any], given: dict[str, Any]) -> TrainConfig:
    """The settings of a checkpoint, with what the command line may still change; refuses anything else that differs."""
    for name, value in given.items():
        if name not in RESUMABLE and saved.get(name) != value:
            option = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{option} was {saved.get(name)!r} in the run to resume, got {value!r}; leave it out or start anew"
            )
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in {**saved, **given}.items() if name in known})
