"""Whole training steps of a model, eager, torch.compiled and fused, from the same weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .plain_resnet import PlainCifarResNet, plain_resnet18, plain_resnet50

PLAIN: dict[str, Callable[[], nn.Module]] = {
    "resnet18": plain_resnet18,
    "resnet50": plain_resnet50,
    "cifar_resnet20": PlainCifarResNet,
}
INPUTS = {"resnet18": (3, 224, 224), "resnet50": (3, 224, 224), "cifar_resnet20": (3, 32, 32)}
KINDS = ("eager", "compile", "fusedres")
MODES = {"compile": None, "compile-max": "max-autotune-no-cudagraphs"}  # of torch.compile


def _fused(model: str) -> nn.Module:
    from fusedres import models

    return models.cifar_resnet(20) if model == "cifar_resnet20" else getattr(models, model)()


class Step:
    """One training step per call: forward, cross entropy, backward, SGD with momentum, gradients freed.

    `kind`: eager, fusedres, or a mode of torch.compile: compile, compile-max.
    """

    def __init__(
        self,
        model: str,
        kind: str = "eager",
        dtype: str = "float32",
        batch: int = 8,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16' (autocast), got {dtype!r}")
        torch.manual_seed(seed)
        plain = PLAIN[model]()
        module = plain if kind != "fusedres" else _fused(model)
        if module is not plain:
            module.load_state_dict(plain.state_dict(), strict=True)
        self.module = module.to(device, memory_format=torch.channels_last)
        classes = self.module.fc.out_features
        data = torch.Generator().manual_seed(seed)  # its own: the models draw differently many numbers
        x = torch.randn(batch, *INPUTS[model], generator=data)
        self.x = x.to(device, memory_format=torch.channels_last)
        self.target = torch.randint(0, classes, (batch,), generator=data).to(device)
        on_cpu = self.x.is_cpu
        # The cache of casted weights would outlive the capture of a graph, and each weight is used once anyway.
        self.autocast = {"enabled": dtype == "bfloat16", "cache_enabled": on_cpu}
        foreach = False if on_cpu else None
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-3, momentum=0.9, foreach=foreach)
        self.run = torch.compile(self.module, mode=MODES[kind]) if kind in MODES else self.module

    def loss(self) -> Tensor:
        with torch.autocast(self.x.device.type, torch.bfloat16, **self.autocast):
            logits = self.run(self.x)
        return nn.functional.cross_entropy(logits.float(), self.target)

    def step(self) -> Tensor:
        """The loss before the step, without waiting for it."""
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def __call__(self) -> float:
        return float(self.step())


def gate(model: str, dtype: str, steps: dict[str, Step], rounds: int = 3) -> dict[str, list[float]]:
    """The first losses of every kind, from the same weights; raise unless they are eager's.

    The first loss is held to the dtype's rounding. Later ones, which see the gradients, are held to 5 %: a network that
    was just initialised amplifies rounding by itself (torch.compile is off by 1 % on the third step in float32).
    """
    tolerance = {"float32": 1e-4, "bfloat16": 2e-2}[dtype]
    curves = {kind: [step() for _ in range(rounds)] for kind, step in steps.items()}
    for kind, curve in curves.items():
        errors = [abs(a - b) / abs(b) for a, b in zip(curve, curves["eager"], strict=True)]
        if not (errors[0] <= tolerance and all(e <= 0.05 for e in errors[1:])):
            raise AssertionError(f"{model} {dtype}: losses of {kind} {curve} are not eager's {curves['eager']}")
    return curves


@contextlib.contextmanager
def saved_storages(module: nn.Module) -> Iterator[dict[Any, int]]:
    """Bytes of every distinct storage saved for backward in the block, without the module's parameters and buffers."""
    owned = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: list[Tensor] = []  # keeps storages alive, so that no address is counted for two
    storages: dict[Any, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned and storage.nbytes():
            kept.append(tensor)
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield storages


def saved_megabytes(model: str, kind: str, dtype: str, batch: int) -> float:
    """MB (1e6 bytes) saved for backward by one forward pass and the loss."""
    step = Step(model, kind, dtype, batch)
    with saved_storages(step.module) as storages:
        loss = step.loss()
        total = sum(storages.values())
    del loss
    return total * 1e-6
