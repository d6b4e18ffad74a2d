"""Declares the ops, loads the native libraries and chooses who serves a call.

The only file that touches ``torch.library``. A family (``ops/<family>.py``) calls :func:`define` once per op and
:func:`serve` once per call; everything a user sees of backends (``use_backend``, ``info``) reads the tables kept here.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import choices

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")

_PACKAGE = Path(__file__).resolve().parent.parent
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # not imported: that takes a second
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_library = torch.library.Library("fusedres", "DEF")


class Op:
    """One declared op: its overloads per backend, and the reason for each one that is missing.

    ``cpu``, ``cuda``, ``triton`` and ``reference`` are callables with the op's schema, or None where nothing serves.
    ``family`` is the name of the forward: it and its backward are chosen together.
    """

    __slots__ = ("_launcher", "_load_launcher", "_triton_op", "_why_not", "cpu", "cuda", "family", "name", "reference")

    def __init__(self, name: str, load_launcher: Callable[[], Callable[..., Any]] | None) -> None:
        namespace = torch.ops.fusedres
        self.name = name
        self.family = name.removesuffix("_backward")
        self.reference = getattr(namespace, f"{name}_reference").default
        self.cpu: Callable[..., Any] | None = None
        self.cuda: Callable[..., Any] | None = None
        self._why_not: dict[str, str] = {}
        self._load_launcher = load_launcher
        self._launcher: Callable[..., Any] | None = None
        self._triton_op = getattr(namespace, f"{name}_triton").default if load_launcher else None

    @property
    def triton(self) -> Callable[..., Any] | None:
        """The Triton launcher, imported on first use; while a graph is compiled, the op around it."""
        if self._launcher is not None and not torch.compiler.is_compiling():
            return self._launcher
        if self.why_not("triton") is not None:
            return None
        return self._triton_op if torch.compiler.is_compiling() else self.load_launcher()

    def load_launcher(self) -> Callable[..., Any]:
        """Import the Triton launcher."""
        if self._launcher is None:
            self._launcher = self._load_launcher()
        return self._launcher

    def why_not(self, backend: str) -> str | None:
        """Why ``backend`` does not serve this op on this machine; None if it does."""
        if backend != "triton":
            return self._why_not.get(backend)
        if self._load_launcher is None:
            return "no Triton kernel for this op"
        if not _TRITON_INSTALLED:
            return "triton is not installed"
        if not _TRITON_INTERPRETED and not torch.cuda.is_available():
            return "no GPU (TRITON_INTERPRET=1 runs it on a CPU)"
        return None


OPS: dict[str, Op] = {}


def _why_not_built(name: str) -> str:
    """The reason that the build left beside the package."""
    try:
        return json.loads((_PACKAGE / "_build.json").read_text())[name]
    except (OSError, ValueError, KeyError):
        return "installed without building it"


class NativeLibrary:
    """A compiled library beside the package: where it is, and what the loader said."""

    def __init__(self, name: str, wanted: bool = True, why_not: str | None = None) -> None:
        self.name = name
        self.path = next(
            (str(p) for p in sorted(_PACKAGE.glob(f"{name}.*")) if p.suffix in (".so", ".dylib", ".pyd")), None
        )
        self.error: str | None = None
        self.loaded = False
        if not wanted:
            self.error = why_not
        elif self.path is None:
            self.error = f"not built: {_why_not_built(name)}"
        else:
            try:
                self._load()
                self.loaded = True
            except (OSError, ImportError, RuntimeError) as error:
                # torch.ops.load_library says only which file; the loader's own message is the cause.
                self.error = str(error.__cause__ or error).strip().splitlines()[0]

    def _load(self) -> None:
        torch.ops.load_library(self.path)

    def as_dict(self) -> dict[str, Any]:
        return {"loaded": self.loaded, "path": self.path, "error": self.error}


class _ExtensionModule(NativeLibrary):
    def _load(self) -> None:
        importlib.import_module(f"fusedres.{self.name}")


def _on_one_device(fake: Callable[..., Any]) -> Callable[..., Any]:
    """``fake``, refusing mixed devices: one meta tensor among real ones brings the whole call to the fake kernel."""

    @functools.wraps(fake)
    def checked(*args: Any) -> Any:
        devices = {a.device for a in args if isinstance(a, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"tensors must be on one device, but got {', '.join(sorted(map(str, devices)))}")
        return fake(*args)

    return checked


def _with_device_errors(overload: Callable[..., Any]) -> Callable[..., Any]:
    """``overload``, raising what eager raises where memory runs out or the device fails; its C++ can only raise
    RuntimeError, as it does for arguments."""

    def call(*args: Any) -> Any:
        try:
            return overload(*args)
        except RuntimeError as error:
            words = str(error)
            if "CUDA error: " in words:
                raise torch.AcceleratorError(words) from None
            if not words.startswith("out of memory: "):
                raise
            if args[0].is_cuda:
                torch.cuda.synchronize(args[0].device)  # where an earlier kernel failed, this says so
            raise torch.OutOfMemoryError(f"CUDA {words}") from None

    return call


def define(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    cuda: bool = False,
    triton: Callable[[], Callable[..., Any]] | None = None,
) -> Op:
    """Declare ``torch.ops.fusedres.<name>``, its sibling ``<name>_reference`` and, with a kernel, ``<name>_triton``.

    Args:
        schema: the part after the name, with annotated mutation.
        reference: plain ATen, any device; also what the op does on a device whose native library is absent.
        fake: shapes, dtypes and strides of the results.
        cuda: whether ``_ops_cuda`` implements the op.
        triton: a loader that returns the Triton launcher, called on first use.
    """
    for suffix in ("", "_reference", *(("_triton",) if triton else ())):
        _library.define(f"{name}{suffix}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"fusedres::{name}{suffix}", _on_one_device(fake), lib=_library)
    _library.impl(f"{name}_reference", reference, "CompositeExplicitAutograd")
    # Asked per op, for a library of another version may lack some.
    native = {key: torch._C._dispatch_has_kernel_for_dispatch_key(f"fusedres::{name}", key) for key in ("CPU", "CUDA")}
    for key, is_native in native.items():
        if not is_native:
            _library.impl(name, reference, key)

    op = Op(name, triton)
    if triton is not None:
        _library.impl(f"{name}_triton", lambda *args: op.load_launcher()(*args), "CompositeExplicitAutograd")
    overload = getattr(torch.ops.fusedres, name).default
    if native["CPU"]:
        op.cpu = overload
    else:
        op._why_not["cpu"] = f"_ops_cpu: {LIBRARIES['_ops_cpu'].error}"
    if native["CUDA"]:
        op.cuda = _with_device_errors(overload)
    else:
        op._why_not["cuda"] = f"_ops_cuda: {LIBRARIES['_ops_cuda'].error}" if cuda else "no CUDA kernel for this op"
    OPS[name] = op
    return op


def _load_libraries() -> dict[str, NativeLibrary]:
    libraries = {
        "_C": _ExtensionModule("_C"),
        "_ops_cpu": NativeLibrary("_ops_cpu"),
        "_ops_cuda": NativeLibrary("_ops_cuda", torch.version.cuda is not None, "this torch has no CUDA"),
    }
    if os.environ.get("FUSEDRES_REQUIRE_EXT") == "1":
        for library in (libraries["_C"], libraries["_ops_cpu"]):
            if not library.loaded:
                raise ImportError(f"FUSEDRES_REQUIRE_EXT=1, but {library.name} did not load: {library.error}")
    return libraries


LIBRARIES = _load_libraries()

# Instruction set of the CPU kernels: "avx512", "avx2", "baseline", or "none" where nothing can say.
CPU_CAPABILITY: str = importlib.import_module("fusedres._C").cpu_capability() if LIBRARIES["_C"].loaded else "none"


def _checked_backend(name: str, source: str) -> str | None:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, but got {name!r}")
    return None if name == "auto" else name


_forced: str | None = _checked_backend(os.environ.get("FUSEDRES_BACKEND") or "auto", "FUSEDRES_BACKEND")


class use_backend:
    """Choose who serves the ops: ``fusedres.use_backend("reference")``, as a call or as a context manager.

    ``"auto"`` (the default) picks per call and falls back to eager PyTorch; any other name is a demand, and a call that
    the named backend cannot serve raises RuntimeError. The choice is process-wide, as ``FUSEDRES_BACKEND`` is.

    Raises:
        ValueError: unknown name.
    """

    def __init__(self, name: str) -> None:
        global _forced
        chosen = _checked_backend(name, "backend")
        self._previous, _forced = _forced, chosen

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        global _forced
        _forced = self._previous


def backend() -> str:
    """The backend in force: ``"auto"`` or a forced one."""
    return _forced or "auto"


_tables: dict[int, choices.Table] = {}  # by index of the device


def table_of(device: int) -> choices.Table:
    """What was measured on a CUDA device, read once in a process."""
    table = _tables.get(device)
    if table is None:
        try:
            table = choices.load(torch.cuda.get_device_name(device))
        except (RuntimeError, AssertionError) as error:  # a fake tensor may be on a device that is not there
            table = choices.Table({}, f"no such device ({str(error).splitlines()[0]})")
        _tables[device] = table
    return table


def _measured(op: Op, x: Tensor) -> str | None:
    """What the table of the device says of tensors like ``x``; None where nothing was measured."""
    table = table_of(x.get_device()).choices
    return table.get(choices.key(op.family, x)) if table and x.dim() == 4 else None


def _automatic_on_cuda(op: Op, x: Tensor) -> Callable[..., Any] | None:
    """The measured choice, where there is one and it can serve; else the CUDA library, else Triton."""
    default = op.cuda or op.triton
    if default is None or torch.compiler.is_compiling():  # sizes may be symbols there
        return default
    choice = _measured(op, x)
    if choice == "eager":
        return None
    return (op.triton if choice == "triton" else None) or default


def serve(op: Op, x: Tensor) -> Callable[..., Any] | None:
    """The implementation of ``op`` for tensors like ``x``; None means eager PyTorch.

    Raises:
        RuntimeError: a forced backend cannot serve the call.
    """
    if _forced is None:
        if x.is_cpu:
            return op.cpu
        if x.is_cuda:
            return _automatic_on_cuda(op, x)
        return None
    if _forced == "reference":
        return op.reference
    implementation = getattr(op, _forced)
    if implementation is None:
        raise RuntimeError(f"backend {_forced!r} cannot serve {op.name}: {op.why_not(_forced)}")
    device = x.device.type
    if _forced != device and not (_forced == "triton" and (device == "cuda" or _TRITON_INTERPRETED)):
        raise RuntimeError(f"backend {_forced!r} cannot serve {op.name}: x is on {x.device}")
    return implementation


def native_ops(op: Op, backward_op: Op, x: Tensor) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """``op`` and ``backward_op`` in C++, where ``serve`` would give these; for calls that nothing traces.

    They check their arguments themselves, and refuse before they write anything.
    """
    if x.is_cpu:
        if op.cpu is None or not (_forced is None or _forced == "cpu"):
            return None
        return op.cpu._op, backward_op.cpu._op  # without the Python half of an overload
    if not x.is_cuda or op.cuda is None:
        return None
    if _forced != "cuda" and (_forced is not None or _measured(op, x) not in (None, "cuda")):
        return None
    return op.cuda, backward_op.cuda


def forced() -> bool:
    """Whether the user named a backend, so that no per-shape preference may divert the call to eager."""
    return _forced is not None


def served_by(op: Op, device: str) -> dict[str, str]:
    """For ``info()``: who serves ``op`` on ``device`` ("cpu" or "cuda"), and why nothing better does."""
    candidates = (("cpu", op.cpu),) if device == "cpu" else (("cuda", op.cuda), ("triton", op.triton))
    if _forced is not None:
        if _forced == "reference":
            return {"served_by": "reference", "why": "forced by the user"}
        if dict(candidates).get(_forced) is None:
            return {
                "served_by": "none",
                "why": f"forced to {_forced}: {op.why_not(_forced) or f'not a {device} backend'}",
            }
        return {"served_by": _forced, "why": "forced by the user"}
    missed = []
    for name, implementation in candidates:
        if implementation is not None:
            return {"served_by": name, "why": "; ".join([*missed, "fastest available"])}
        missed.append(f"{name}: {op.why_not(name)}")
    return {"served_by": "eager", "why": "; ".join(missed)}
