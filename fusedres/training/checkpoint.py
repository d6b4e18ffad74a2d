"""Checkpoints: plain dictionaries of tensors and numbers that ``torch.load(..., weights_only=True)`` accepts."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from . import distributed
from .config import ConfigError

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` so that an interrupted write never replaces a good file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    torch.save({"format": FORMAT, **state}, scratch)
    os.replace(scratch, path)


def load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"--resume: there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"--resume: {path} is not a readable checkpoint ({str(error).splitlines()[0]})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ConfigError(f"--resume: {path} is not a checkpoint of `fusedres train`")
    return state


def random_state(device: torch.device) -> dict[str, list[torch.Tensor]]:
    """The states of torch's generators on every rank. Collective."""
    state = {"cpu": distributed.gather(torch.get_rng_state())}
    if device.type == "cuda":
        state["cuda"] = distributed.gather(torch.cuda.get_rng_state(device))
    return state


def set_random_state(state: dict[str, list[torch.Tensor]], device: torch.device) -> None:
    rank = distributed.rank()
    if rank < len(state["cpu"]):
        torch.set_rng_state(state["cpu"][rank])
    if device.type == "cuda" and rank < len(state.get("cuda", ())):
        torch.cuda.set_rng_state(state["cuda"][rank], device)
