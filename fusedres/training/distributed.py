"""The few collective operations the trainer needs; each is the identity in a single process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """The group ``torchrun`` asks for, if it does; gives the device of this process."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield device
        return
    backend = "gloo"
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # flags are exchanged between CPUs, without waiting for the GPU
    dist.init_process_group(backend)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def sum_over_ranks(x: Tensor) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def any_rank(flag: bool) -> bool:
    if world_size() == 1:
        return flag
    x = torch.tensor(int(flag))
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return bool(x)


def gather(x: Tensor) -> list[Tensor]:
    """One CPU tensor of the same shape from every rank."""
    if world_size() == 1:
        return [x]
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return parts
