"""Counts, in Triton's interpreter, the bytes that each kernel launch loads and stores, and refuses stray accesses.

    with count_bytes() as launches:
        batch_norm_act(...)
    launches[0].kernel, launches[0].loads, launches[0].stores

Every address that a launch touches must lie in a tensor that it was given: the strictest of guard zones. Needs
TRITON_INTERPRET=1 from the start of the process.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter


@dataclass(frozen=True)
class Launch:
    """``loads`` and ``stores`` are distinct bytes, ``requested_*`` count one that is touched twice twice."""

    kernel: str
    loads: int
    stores: int
    requested_loads: int
    requested_stores: int


# By kernel, over all launches of this process: how many there were, distinct bytes, requested bytes.
_totals: dict[str, list[int]] = {}


@atexit.register
def _write_totals() -> None:
    """To the file that ``FUSEDRES_BYTES_FILE`` names, for test_interpreted.py to report."""
    if path := os.environ.get("FUSEDRES_BYTES_FILE"):
        with open(path, "w") as file:
            json.dump(_totals, file)


class _Accesses:
    def __init__(self) -> None:
        self.by_size: dict[int, list[np.ndarray]] = {}
        self.requested = 0

    def add(self, pointers: Any, mask: np.ndarray) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data[np.broadcast_to(mask, pointers.data.shape).astype(bool)]
        self.by_size.setdefault(size, []).append(addresses.reshape(-1))
        self.requested += addresses.size * size

    def addresses(self) -> Iterator[tuple[int, np.ndarray]]:
        for size, arrays in self.by_size.items():
            yield size, np.unique(np.concatenate(arrays))

    def distinct(self) -> int:
        return sum(size * len(addresses) for size, addresses in self.addresses())


def _extents(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    found = []
    for t in tensors:
        if t.numel():
            last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
            found.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
    return found


def _check_inside(kernel: str, accesses: _Accesses, extents: list[tuple[int, int]]) -> None:
    for size, addresses in accesses.addresses():
        addresses = addresses.astype(np.int64)
        inside = np.zeros(len(addresses), dtype=bool)
        for begin, end in extents:
            inside |= (addresses >= begin) & (addresses + size <= end)
        if not inside.all():
            raise AssertionError(f"{kernel}: {(~inside).sum()} accesses of {size} bytes outside of its tensors")


@contextlib.contextmanager
def count_bytes() -> Iterator[list[Launch]]:
    """The launches inside the block, in order; filled as they run.

    Raises:
        AssertionError: from the launch, when a kernel touches memory outside of the tensors it was given.
    """
    launches: list[Launch] = []
    current: list[tuple[_Accesses, _Accesses]] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    # the original methods, under the names that the builder calls them by
    load, store, run = builder.create_masked_load, builder.create_masked_store, executor.__call__
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def counted_load(self: Any, pointers: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        current[-1][0].add(pointers, mask.data)
        return load(self, pointers, mask, *args, **kwargs)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        current[-1][1].add(pointers, mask.data)
        return store(self, pointers, value, mask, *args, **kwargs)

    def counted_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        for accesses in current[-1]:
            accesses.add(pointers, mask.data)
        return rmw(self, op, pointers, value, mask, *args, **kwargs)

    def counted_cas(self: Any, pointers: Any, *args: Any, **kwargs: Any) -> Any:
        for accesses in current[-1]:
            accesses.add(pointers, np.ones(pointers.data.shape, dtype=bool))
        return cas(self, pointers, *args, **kwargs)

    def counted_run(self: Any, *args: Any, **kwargs: Any) -> None:
        current.append((_Accesses(), _Accesses()))
        run(self, *args, **kwargs)
        loads, stores = current.pop()
        extents = _extents([t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)])
        for accesses in (loads, stores):
            _check_inside(self.fn.__name__, accesses, extents)
        launch = Launch(self.fn.__name__, loads.distinct(), stores.distinct(), loads.requested, stores.requested)
        launches.append(launch)
        total = _totals.setdefault(launch.kernel, [0, 0, 0])
        total[0] += 1
        total[1] += launch.loads + launch.stores
        total[2] += launch.requested_loads + launch.requested_stores

    with (
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(builder, "create_atomic_rmw", counted_rmw),
        mock.patch.object(builder, "create_atomic_cas", counted_cas),
        mock.patch.object(executor, "__call__", counted_run),
    ):
        yield launches
