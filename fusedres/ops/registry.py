"""Declares the ops, loads the native libraries and chooses who serves a call.

The only file that touches ``torch.library``. A family (``ops/<family>.py``) calls :func:`define` once per op and
:func:`serve` once per call; everything a user sees of backends (``use_backend``, ``info``) reads the tables kept here.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")

_PACKAGE = Path(__file__).resolve().parent.parent
_library = torch.library.Library("fusedres", "DEF")


class Op:
    """One declared op: its overloads per backend, and the reason for each one that is missing.

    ``cpu``, ``cuda``, ``triton`` and ``reference`` are callables with the op's schema, or None where nothing serves.
    """

    __slots__ = ("cpu", "cuda", "name", "reference", "triton", "why_not")

    def __init__(self, name: str, reference: Callable[..., Any]) -> None:
        self.name = name
        self.reference = reference
        self.cpu: Callable[..., Any] | None = None
        self.cuda: Callable[..., Any] | None = None
        self.triton: Callable[..., Any] | None = None
        self.why_not: dict[str, str] = {}


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
        import importlib

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


def _with_memory_errors(overload: Callable[..., Any]) -> Callable[..., Any]:
    """``overload``, raising what eager raises where memory runs out; its C++ can only raise RuntimeError."""

    def call(*args: Any) -> Any:
        try:
            return overload(*args)
        except RuntimeError as error:
            if not str(error).startswith("out of memory: "):
                raise
            if args[0].is_cuda:
                torch.cuda.synchronize(args[0].device)  # where an earlier kernel failed, this says so
            raise torch.OutOfMemoryError(f"CUDA {error}") from None

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
    """Declare ``torch.ops.fusedres.<name>`` and its sibling ``<name>_reference``.

    Args:
        schema: the part after the name, with annotated mutation.
        reference: plain ATen, any device; also what the op does on a device whose native library is absent.
        fake: shapes, dtypes and strides of the results.
        cuda: whether ``_ops_cuda`` implements the op.
        triton: a loader that returns the Triton launcher, called on first use.
    """
    for suffix in ("", "_reference"):
        _library.define(f"{name}{suffix}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"fusedres::{name}{suffix}", _on_one_device(fake), lib=_library)
    _library.impl(f"{name}_reference", reference, "CompositeExplicitAutograd")
    # Asked per op, for a library of another version may lack some.
    native = {key: torch._C._dispatch_has_kernel_for_dispatch_key(f"fusedres::{name}", key) for key in ("CPU", "CUDA")}
    for key, is_native in native.items():
        if not is_native:
            _library.impl(name, reference, key)

    namespace = torch.ops.fusedres
    op = Op(name, getattr(namespace, f"{name}_reference").default)
    overload = getattr(namespace, name).default
    if native["CPU"]:
        op.cpu = overload
    else:
        op.why_not["cpu"] = f"_ops_cpu: {LIBRARIES['_ops_cpu'].error}"
    if native["CUDA"]:
        op.cuda = _with_memory_errors(overload)
    else:
        op.why_not["cuda"] = f"_ops_cuda: {LIBRARIES['_ops_cuda'].error}" if cuda else "no CUDA kernel for this op"
    if triton is None:
        op.why_not["triton"] = "no Triton kernel for this op"
    elif not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        op.why_not["triton"] = "no GPU (TRITON_INTERPRET=1 runs it on a CPU)"
    else:
        try:
            launcher = triton()
        except ImportError as error:
            op.why_not["triton"] = str(error)
        else:
            op.triton = launcher
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


def serve(op: Op, x: Tensor) -> Callable[..., Any] | None:
    """The implementation of ``op`` for tensors like ``x``; None means eager PyTorch.

    Raises:
        RuntimeError: a forced backend cannot serve the call.
    """
    if _forced is None:
        if x.is_cpu:
            return op.cpu
        if x.is_cuda:
            return op.cuda or op.triton
        return None
    if _forced == "reference":
        return op.reference
    implementation = getattr(op, _forced)
    if implementation is None:
        raise RuntimeError(f"backend {_forced!r} cannot serve {op.name}: {op.why_not[_forced]}")
    device = x.device.type
    if _forced != device and not (
        _forced == "triton" and (device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
    ):
        raise RuntimeError(f"backend {_forced!r} cannot serve {op.name}: x is on {x.device}")
    return implementation


def forced() -> bool:
    """Whether the user named a backend, so that no per-shape preference may divert the call to eager."""
    return _forced is not None


def forced_elsewhere(name: str) -> bool:
    """Whether the user named another backend than ``name``."""
    return _forced is not None and _forced != name


def served_by(op: Op, device: str) -> dict[str, str]:
    """For ``info()``: who serves ``op`` on ``device`` ("cpu" or "cuda"), and why nothing better does."""
    candidates = (("cpu", op.cpu),) if device == "cpu" else (("cuda", op.cuda), ("triton", op.triton))
    if _forced is not None:
        if _forced == "reference":
            return {"served_by": "reference", "why": "forced by the user"}
        if dict(candidates).get(_forced) is None:
            return {
                "served_by": "none",
                "why": f"forced to {_forced}: {op.why_not.get(_forced, f'not a {device} backend')}",
            }
        return {"served_by": _forced, "why": "forced by the user"}
    missed = []
    for name, implementation in candidates:
        if implementation is not None:
            return {"served_by": name, "why": "; ".join([*missed, "fastest available"])}
        missed.append(f"{name}: {op.why_not[name]}")
    return {"served_by": "eager", "why": "; ".join(missed)}
