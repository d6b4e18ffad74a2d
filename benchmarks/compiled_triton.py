"""Every Triton kernel compiled for GPUs that are not here, and what its machine code has.

``rows()`` calls the launchers on tensors without memory and compiles what they launch, with their own arguments: so a
variant that is measured here is one that runs. Used by ``tests/kernels/test_compiled.py``, which holds the limits, and
for the Triton half of ``benchmarks/results/compiled.json``. As a program it prints one JSON object a row:

    python -m benchmarks.compiled_triton [--targets 80,90,100,gfx942] [--cases 'batch_norm_act bf16*']

The process must not have TRITON_INTERPRET set.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fusedres.kernels import (
    add_act,
    batch_norm_act,
    batch_norm_act_max_pool,
    batch_norm_sync,
    common,
    conv1x1_bn_act,
    conv1x1_bn_fold,
)

TARGETS = {
    "80": GPUTarget("cuda", 80, 32),
    "90": GPUTarget("cuda", 90, 32),
    "100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PROCESSORS, L2_BYTES = 132, 50 << 20
_DTYPES = {
    "bf16": (torch.bfloat16, torch.float32),
    "f16": (torch.float16, torch.float32),
    "f32": (torch.float32, torch.float32),
    "f64": (torch.float64, torch.float64),
    "all-bf16": (torch.bfloat16, torch.bfloat16),
}
_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
_STEM = ((3, 3), (2, 2), (1, 1), (1, 1), False)


# ---- what is launched ------------------------------------------------------------------------------------------------


def _meta(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "channels_last") -> Tensor:
    memory_format = torch.channels_last if layout == "channels_last" and len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


class _Call:
    """Arguments of the launchers for one shape, dtype and layout."""

    def __init__(self, shape: tuple[int, ...], dtype: str, layout: str) -> None:
        self.dtype, param = _DTYPES[dtype]
        self.x = _meta(shape, self.dtype, layout)
        vector = _meta(shape[1:2], param)
        self.affine = (vector, vector)
        self.norm = (vector, vector, vector, vector, _meta((), torch.int64))
        self.stats = _meta((3, shape[1]), common.wide_dtype(self.x))

    def forward(self, residual: bool = False, training: bool = True, momentum: float | None = 0.1) -> Tensor:
        return batch_norm_act.batch_norm_act(
            self.x, self.x if residual else None, *self.norm, training, momentum, 1e-5, True, residual
        )[2]

    def backward(self, residual: bool = False, training: bool = True) -> None:
        mask = self.forward(True) if residual else None
        batch_norm_act.batch_norm_act_backward(
            self.x, self.x, *self.affine, self.stats, mask, training, True, True, residual, True
        )

    def pair(self) -> None:
        norm = (*self.norm, True, 0.1, 1e-5)
        batch_norm_act.batch_norm_add_batch_norm_act(self.x, *norm, self.x, *norm, True)

    def pair_backward(self) -> None:
        norm = (self.x, *self.affine, self.stats, True)
        batch_norm_act.batch_norm_add_batch_norm_act_backward(self.x, *norm, *norm, True, *[True] * 4)

    @property
    def sums(self) -> Tensor:
        """Of a process, as the synchronised norm exchanges them."""
        return _meta((2 * self.x.size(1) + 1,), torch.float64)

    def statistics(self) -> None:
        batch_norm_sync.batch_norm_statistics(self.x)

    def sync_apply(self, residual: bool = False, momentum: float | None = 0.1) -> Tensor:
        partials, norm = _meta((8, self.sums.size(0)), torch.float64), (*self.norm, momentum, 1e-5)
        return batch_norm_sync.batch_norm_act_apply(
            self.x, self.x if residual else None, partials, *norm, True, residual
        )[2]

    def sync_reduce(self, residual: bool = False) -> None:
        mask = self.sync_apply(True) if residual else None
        batch_norm_sync.batch_norm_act_backward_reduce(self.x, self.x, *self.affine, self.stats, mask, True, True)

    def sync_backward(self, residual: bool = False) -> None:
        mask = self.sync_apply(True) if residual else None
        saved = (self.x, self.x, *self.affine, self.stats, mask, self.sums)
        batch_norm_sync.batch_norm_act_backward_apply(*saved, True, True, residual)

    def stem(self, training: bool = True) -> None:
        batch_norm_act_max_pool.batch_norm_act_max_pool(self.x, *self.norm, training, 0.1, 1e-5, True, *_STEM)

    def stem_backward(self, training: bool = True) -> None:
        n, c, h, w = self.x.shape
        layout = common.layout_of(self.x)
        dy = _meta((n, c, (h + 1) // 2, (w + 1) // 2), self.dtype, layout)
        batch_norm_act_max_pool.batch_norm_act_max_pool_backward(
            dy, self.x, *self.affine, self.stats, training, True, *_STEM, True, True
        )

    def moments(self, norm: bool = False, stride: int = 1) -> None:
        conv1x1_bn_act.conv1x1_moments(self.x, self.stats if norm else None, stride)

    def convolution_statistics(self, k: int) -> None:
        conv1x1_bn_act.conv1x1_statistics(self.x, _meta((k, self.x.size(1)), self.dtype))

    def folded(self, c: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, mixing and offset of a folded convolution of c channels."""
        return _meta((k, c), self.dtype), _meta((c, c), self.dtype), _meta((c,), common.wide_dtype(self.x))

    def gradient(self, k: int) -> tuple[Tensor, Tensor]:
        """Of a convolution of x to k channels, and its mask."""
        n, _, h, w = self.x.shape
        dy = _meta((n, k, h, w), self.dtype)
        return dy, _meta((triton.cdiv(dy.numel(), 16) * 2,), torch.uint8)

    def folded_apply(self, k: int, x2: tuple[int, ...] | None = None, norm: bool = False) -> None:
        """With a residual, or with x2 as the shortcut at stride 2."""
        y2, folded2 = (None, None) if x2 is None else (_meta(x2, self.dtype), self.folded(x2[1], k)[0])
        residual = self.gradient(k)[0] if x2 is None else None
        folded, shift = self.folded(self.x.size(1), k)[0], _meta((k,), common.wide_dtype(self.x))
        conv1x1_bn_act.conv1x1_bn_act_apply(
            self.x, self.stats if norm else None, folded, shift, 1, y2, folded2, 2, residual, None, True, True
        )

    def input_gradient(self, k: int) -> None:
        """Of a convolution of k channels to those of x, beside a shortcut whose ReLU masks its gradient."""
        folded, shift = self.folded(self.x.size(1), k)[0], _meta((k,), common.wide_dtype(self.x))
        conv1x1_bn_act.conv1x1_bn_act_apply(
            self.x, None, folded, shift, 1, None, None, 1, *self.gradient(k), False, False
        )

    def folded_reduce(
        self, k: int, x2: tuple[int, ...] | None = None, norm: bool = False, need_g: bool = False
    ) -> None:
        y2 = None if x2 is None else _meta(x2, self.dtype)
        of_y = (self.x, self.stats if norm else None)
        conv1x1_bn_act.conv1x1_bn_act_backward_reduce(*self.gradient(k), *of_y, 1, y2, 2, need_g, True)

    def folded_backward(self, k: int, x2: tuple[int, ...] | None = None, norm: bool = False) -> None:
        second = (None,) * 4 if x2 is None else (_meta(x2, self.dtype), *self.folded(x2[1], k))
        of_y = (self.x, self.stats if norm else None, *self.folded(self.x.size(1), k), 1)
        conv1x1_bn_act.conv1x1_bn_act_backward_apply(*self.gradient(k), *of_y, *second, 2, True, x2 is not None)

    def add_act(self) -> None:
        _, mask = add_act.add_act(self.x, self.x, True, True)
        add_act.add_act_backward(self.x, mask)


class _Matrices:
    """Arguments of the launchers for the small matrices of one convolution, (K, C)."""

    def __init__(self, k: int, c: int, dtype: str, weight_dtype: str) -> None:
        self.dtype = _DTYPES[dtype][0]
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.weight = _meta((k, c, 1, 1), _DTYPES[weight_dtype][0])
        self.vector, self.running = _meta((k,), torch.float64), _meta((k,), torch.float32)
        self.mean, self.cov = _meta((c,), torch.float64), _meta((c, c), torch.float64)
        matrix_dtype = conv1x1_bn_act.matrix_dtype(self.dtype)
        self.covariance, self.products = _meta((c, c), matrix_dtype), _meta((k, c), matrix_dtype)
        self.stats = _meta((3, k), torch.float64)

    def fold(self, known: bool = False) -> None:
        """``known``: mean and variance of the output; then also a shift to add to."""
        moments = _meta((2, self.vector.size(0)), torch.float64) if known else None
        shift0 = _meta(self.vector.shape, self.wide) if known else None
        affine, of_input = (self.running, self.running), (self.mean, self.cov, moments)
        conv1x1_bn_fold.conv1x1_bn_fold(self.weight, *affine, *of_input, 1e-5, 1 << 18, shift0, self.dtype)

    def unfold(self, need_dconv_weight: bool = True, need_dy: bool = True) -> None:
        of_output = (self.stats, self.vector, self.products)
        conv1x1_bn_fold.conv1x1_bn_unfold(
            self.weight,
            self.running,
            self.mean,
            self.covariance,
            *of_output,
            1 << 18,
            self.dtype,
            need_dconv_weight,
            need_dy,
        )

    def update_running(self, momentum: float | None = 0.1) -> None:
        running = (self.running, self.running, _meta((), torch.int64), momentum)
        conv1x1_bn_fold.conv1x1_bn_update_running(*running, self.stats, 1 << 18)


_LARGE = (256, 256, 56, 56)
_SMALL = (32, 512, 7, 7)
_STEM_SHAPE = (256, 64, 112, 112)
_NARROW, _WIDE = (256, 64, 56, 56), (256, 512, 7, 7)  # inputs of the last convolution of a first and a last block
_MIDDLE = (256, 128, 28, 28)
_SHORTCUT, _WIDE_SHORTCUT = (256, 256, 56, 56), (256, 1024, 14, 14)  # of the blocks of _MIDDLE and _WIDE


_CONV1X1 = {
    "conv1x1_bn_act_apply": "folded_apply",
    "conv1x1_bn_act_backward_reduce": "folded_reduce",
    "conv1x1_bn_act_backward_apply": "folded_backward",
}


_SYNC = {
    "batch_norm_act_apply": "sync_apply",
    "batch_norm_act_backward_reduce": "sync_reduce",
    "batch_norm_act_backward_apply": "sync_backward",
}


def _add_sync(add: Callable[..., None]) -> None:
    for dtype, layout in itertools.product(("bf16", "f32", "f64"), ("channels_last", "contiguous")):
        add("batch_norm_statistics", _LARGE, dtype, layout, "statistics")
        for name, method in _SYNC.items():
            add(f"{name}+residual", _LARGE, dtype, layout, method, residual=True)
    for name, method in _SYNC.items():
        add(name, _LARGE, "bf16", "channels_last", method)
    add("batch_norm_act_apply cumulative", _LARGE, "bf16", "channels_last", "sync_apply", momentum=None)


def _add_conv1x1(add: Callable[..., None]) -> None:
    sizes = {"narrow": _NARROW, "wide": _WIDE}
    for norm, suffix in ((False, ""), (True, "+norm")):
        for (size, shape), dtype in itertools.product(sizes.items(), ("bf16", "f32")):
            add(f"conv1x1_moments{suffix} {size}", shape, dtype, "channels_last", "moments", norm=norm)
            for name, method in _CONV1X1.items():
                add(f"{name}{suffix} {size}", shape, dtype, "channels_last", method, k=4 * shape[1], norm=norm)
        for op, method in _CONV1X1.items():
            name, options = f"{op}{suffix}", {"norm": norm}
            add(f"{name} pair", _WIDE, "bf16", "channels_last", method, k=2048, x2=_WIDE_SHORTCUT, **options)
            add(f"{name} narrow pair", _MIDDLE, "bf16", "channels_last", method, k=512, x2=_SHORTCUT, **options)
            add(f"{name} odd", (64, 67, 28, 28), "bf16", "channels_last", method, k=130, **options)
            add(f"{name} odd", (64, 67, 28, 28), "f32", "channels_last", method, k=130, **options)
            add(f"{name} unaligned", (64, 84, 28, 28), "bf16", "channels_last", method, k=36, **options)
            add(f"{name} narrow", _NARROW, "f64", "channels_last", method, k=256, **options)
        for size, shape in sizes.items():
            name = f"conv1x1_bn_act_backward_reduce+g{suffix} {size}"
            add(name, shape, "bf16", "channels_last", "folded_reduce", k=4 * shape[1], need_g=True, norm=norm)
    for (size, shape), dtype in itertools.product(sizes.items(), ("bf16", "f32")):
        name = f"conv1x1_bn_act_apply+mask {size}"
        add(name, shape, dtype, "channels_last", "input_gradient", k=4 * shape[1])
    first = {"narrow": _LARGE, "middle": (256, 512, 28, 28), "wide": (256, 2048, 7, 7)}  # what blocks begin with
    for (size, shape), dtype in itertools.product(first.items(), ("bf16", "f32")):
        add(f"conv1x1_statistics {size}", shape, dtype, "channels_last", "convolution_statistics", k=shape[1] // 4)
    add("conv1x1_statistics narrow", _LARGE, "f16", "channels_last", "convolution_statistics", k=64)
    add("conv1x1_statistics narrow", _LARGE, "f64", "channels_last", "convolution_statistics", k=64)
    for dtype in ("bf16", "f32"):
        add("conv1x1_statistics odd", (64, 67, 28, 28), dtype, "channels_last", "convolution_statistics", k=130)
    add("conv1x1_statistics unaligned", (64, 84, 28, 28), "bf16", "channels_last", "convolution_statistics", k=36)
    add("conv1x1_moments strided", _SHORTCUT, "bf16", "channels_last", "moments", stride=2)


# (K, C): channels out and in
_MATRICES = {"narrow": (256, 64), "wide": (2048, 512), "reducing": (256, 1024), "odd": (130, 67), "unaligned": (36, 84)}


def _matrix_cases() -> dict[str, Callable[[], Any]]:
    table: dict[str, Callable[[], Any]] = {}
    for size, (k, c) in _MATRICES.items():
        for dtype, weight_dtype in (("bf16", "f32"), ("bf16", "bf16"), ("f32", "f32"), ("f64", "f64")):
            if size == "unaligned" and dtype != "bf16":
                continue
            of, name = _Matrices(k, c, dtype, weight_dtype), f"{size} {dtype} {weight_dtype}-weight"
            table[f"conv1x1_bn_fold {name}"], table[f"conv1x1_bn_unfold {name}"] = of.fold, of.unfold
    call = _Matrices(*_MATRICES["narrow"], "bf16", "f32")
    table["conv1x1_bn_fold known narrow bf16 f32-weight"] = lambda: call.fold(True)
    table["conv1x1_bn_unfold weight narrow bf16 f32-weight"] = lambda: call.unfold(need_dy=False)
    table["conv1x1_bn_unfold mixing narrow bf16 f32-weight"] = lambda: call.unfold(need_dconv_weight=False)
    table["conv1x1_bn_update_running narrow"] = call.update_running
    table["conv1x1_bn_update_running cumulative narrow"] = lambda: call.update_running(None)
    return table


def cases() -> dict[str, Callable[[], Any]]:
    """Name -> a call whose launches are compiled; the names start with the op and the dtype."""
    table: dict[str, Callable[[], Any]] = {}

    def add(name: str, shape: tuple[int, ...], dtype: str, layout: str, method: str, **options: Any) -> None:
        call = _Call(shape, dtype, layout)
        table[f"{name} {dtype} {layout}"] = lambda: getattr(call, method)(**options)

    for dtype in ("bf16", "f32"):
        for layout in ("channels_last", "contiguous"):
            add("batch_norm_act", _LARGE, dtype, layout, "forward")
            add("batch_norm_act+residual", _LARGE, dtype, layout, "forward", residual=True)
            add("batch_norm_act_backward", _LARGE, dtype, layout, "backward")
            add("batch_norm_act_backward+residual", _LARGE, dtype, layout, "backward", residual=True)
            add("batch_norm_add_batch_norm_act", _LARGE, dtype, layout, "pair")
            add("batch_norm_add_batch_norm_act_backward", _LARGE, dtype, layout, "pair_backward")
            add("batch_norm_act_max_pool", _STEM_SHAPE, dtype, layout, "stem")
            add("batch_norm_act_max_pool_backward", _STEM_SHAPE, dtype, layout, "stem_backward")
    for dtype in ("f16", "f64", "all-bf16"):
        add("batch_norm_act+residual", _LARGE, dtype, "channels_last", "forward", residual=True)
        add("batch_norm_act_backward+residual", _LARGE, dtype, "channels_last", "backward", residual=True)
        add("batch_norm_act_max_pool", _STEM_SHAPE, dtype, "channels_last", "stem")
        add("batch_norm_act_max_pool_backward", _STEM_SHAPE, dtype, "channels_last", "stem_backward")
    for dtype in ("bf16", "f32"):
        add("add_act", _LARGE, dtype, "channels_last", "add_act")
        add("batch_norm_act+residual small", _SMALL, dtype, "channels_last", "forward", residual=True)
        add("batch_norm_act_backward+residual small", _SMALL, dtype, "channels_last", "backward", residual=True)
        add("batch_norm_add_batch_norm_act small", _SMALL, dtype, "channels_last", "pair")
        add("batch_norm_add_batch_norm_act_backward small", _SMALL, dtype, "channels_last", "pair_backward")
        add("batch_norm_act+residual eval", _LARGE, dtype, "channels_last", "forward", residual=True, training=False)
        add(
            "batch_norm_act_backward+residual eval",
            _LARGE,
            dtype,
            "channels_last",
            "backward",
            residual=True,
            training=False,
        )
    add("batch_norm_act cumulative", _LARGE, "bf16", "channels_last", "forward", momentum=None)
    add("batch_norm_act+residual odd", (64, 67, 28, 28), "bf16", "channels_last", "forward", residual=True)
    add("batch_norm_act_backward+residual odd", (64, 67, 28, 28), "bf16", "channels_last", "backward", residual=True)
    _add_sync(add)
    _add_conv1x1(add)
    return table | _matrix_cases()


def launches(call: Callable[[], Any], target: str = "90") -> list[tuple[JITFunction, dict[str, Any]]]:
    """What ``call`` launches on a target: kernels and their arguments by name; nothing runs."""
    seen: list[tuple[JITFunction, dict[str, Any]]] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        seen.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(common, "device_of", return_value=common.Device(PROCESSORS, L2_BYTES, target)),
        mock.patch.object(common, "WAVEFRONT", TARGETS[target].warp_size),
    ):
        call()
    return seen


def source_of(kernel: JITFunction, arguments: dict[str, Any]) -> tuple[ASTSource, dict[str, int]]:
    """The kernel with the types, constants and alignments that a launch with ``arguments`` has, and its options."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments.pop(parameter.name)
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = f"*{_NAMES[value.dtype]}"
            aligned = True
        elif isinstance(value, float):
            signature[parameter.name], aligned = "fp64", False
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = not parameter.do_not_specialize and value % 16 == 0
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes), arguments


# ---- what comes out --------------------------------------------------------------------------------------------------


def _widest(text: str, pattern: str) -> int:
    """Bytes of the widest access; PTX says .v4.b32, .b64, .u8."""
    return max((int(n or 1) * int(bits) // 8 for n, bits in re.findall(pattern, text)), default=0)


def _matrix(text: str, pattern: str) -> str:
    """The matrix instructions that are there, by name; empty: none."""
    return " ".join(sorted(set(re.findall(pattern, text))))


def chained_dots(built: Any) -> int:
    """Dots that add to what an earlier one left, in the accumulators of the tensor cores."""
    ir = built.asm["ttir"]
    zeros = set(re.findall(r"(%\w+) = arith\.constant dense<0\.0+e\+00>", ir))
    return sum(accumulator not in zeros for accumulator in re.findall(r"tt\.dot %\S+, %\S+, (%\w+)", ir))


def _nvidia(built: Any) -> dict[str, Any]:
    ptx = built.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    copies = [int(n, 16) for n in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x[0-9a-f]+)[,;]", ptx)]
    found = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    return {
        "registers": int(found["REG"]),
        "spills": int(found["LOCAL"]) + int(found["STACK"]),  # bytes of local memory per thread
        "shared": built.metadata.shared,
        "load": max(_widest(ptx, r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bufs](\d+)\b"), *copies, 0),
        "store": _widest(ptx, r"st\.global[\w.:]*?(?:\.v(\d))?\.[bufs](\d+)\b"),
        "wide_loads": len(re.findall(r"ld\.global\S*\.(?:v4\.b32|v2\.b64)", ptx)) + copies.count(16),
        "wide_stores": len(re.findall(r"st\.global\S*\.(?:v4\.b32|v2\.b64)", ptx)),
        "float_atomics": len(re.findall(r"\b(?:atom|red)\S*\.f(?:16|32|64)", ptx)),
        "matrix": _matrix(ptx, r"\b(wgmma|tcgen05|mma)\.(?:mma|sync)"),
    }


def _amd(built: Any) -> dict[str, Any]:
    asm = built.asm["amdgcn"]
    numbers = {k: int(v) for k, v in re.findall(r"\.(\w+(?:_count|_size)): *(\d+)", asm)}
    widths = {"_dwordx4": 16, "_dwordx2": 8, "_dword": 4, "_ushort": 2, "_short": 2, "_ubyte": 1, "_byte": 1}

    def widest(kind: str) -> int:
        return max((w for name, w in widths.items() if re.search(rf"(?:global|buffer)_{kind}{name}\b", asm)), default=0)

    return {
        "registers": numbers["vgpr_count"],
        "spills": numbers["vgpr_spill_count"],
        "shared": built.metadata.shared,
        "load": widest("load"),
        "store": widest("store"),
        "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4\b", asm)),
        "wide_stores": len(re.findall(r"(?:global|buffer)_store_dwordx4\b", asm)),
        "float_atomics": len(re.findall(r"atomic_(?:p?k_)?add_(?:f16|f32|f64|bf16)", asm)),
        "matrix": _matrix(asm, r"\bv_(mfma)_"),
    }


def rows(targets: tuple[str, ...] = tuple(TARGETS), pattern: str = "*") -> Iterator[dict[str, Any]]:
    """One row per kernel launch of the cases that match ``pattern`` and target.

    Keys: ``case`` (op, dtype, layout), ``kernel``, ``target``, ``warps``; ``registers`` per thread, ``spills`` (bytes
    of local memory; AMD: vector registers), ``shared`` memory in bytes, ``load`` and ``store`` (bytes of the widest
    global access), ``wide_loads`` and ``wide_stores`` (number of 16-byte ones), ``float_atomics``, ``matrix``
    (instructions) and ``chained_dots`` (:func:`chained_dots`).
    """
    done: dict[Any, dict[str, Any]] = {}
    for case, call in cases().items():
        if not fnmatch.fnmatchcase(case, pattern):
            continue
        for target in targets:
            for kernel, arguments in launches(call, target):
                source, options = source_of(kernel, dict(arguments))
                key = (source.hash(), target)
                if key not in done:
                    built = triton.compile(source, target=TARGETS[target], options=options)
                    done[key] = _nvidia(built) if TARGETS[target].backend == "cuda" else _amd(built)
                    done[key]["chained_dots"] = chained_dots(built)
                yield {
                    "case": case,
                    "kernel": kernel.fn.__name__,
                    "target": target,
                    "warps": options["num_warps"],
                    **done[key],
                }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels and print what the code has")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--cases", default="*")
    args = parser.parse_args()
    for row in rows(tuple(args.targets.split(",")), args.cases):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
