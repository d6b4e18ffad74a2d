"""What the Triton kernels share: where a program's tile lies, statistics, vectors per channel, bit masks, launch plans.

A channels_last tensor is a matrix of N*H*W rows and C columns. A *slab* is COLS of its columns, a tile ROWS x COLS of
its elements. In a contiguous tensor a slab is a channel: a matrix of N rows, C*H*W apart, and H*W columns, with several
tiles side by side. The "flat" layout, for the elementwise passes only, is any of the two as one row. In all of them a
vector per channel is [1, COLS] or, for a slab that is one channel, [1, 1], and broadcasts over the tile.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)

# Launch arguments that must not make a new variant of a kernel: alignment is told by VEC.
SCALARS = ["channels", "rows", "units", "slabs", "col_tiles", "chunk_rows", "reverse", "parts"]


# ---- pieces of kernels -----------------------------------------------------------------------------------------------


@triton.jit
def round_to(y, dtype: tl.constexpr):
    """y in another dtype, to nearest even; the interpreter's own conversion from float32 to bfloat16 truncates."""
    if dtype == tl.bfloat16 or dtype == tl.float16:
        y = y.to(tl.float32)
    if INTERPRET and dtype == tl.bfloat16:
        bits = y.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        y = tl.where(y == y, rounded.to(tl.float32, bitcast=True), y)
    return y.to(dtype)


@triton.jit
def split_program(pid, slabs, col_tiles):
    """Slab, tile across and chunk of rows of a program: neighbours in memory are neighbours in time."""
    rest = pid // slabs
    return pid % slabs, rest % col_tiles, rest // col_tiles


@triton.jit
def chunk_of(chunk, chunk_rows, rows):
    """First row (int64) and number of rows of a chunk."""
    row = chunk.to(tl.int64) * chunk_rows
    return row, tl.minimum(rows - row, chunk_rows).to(tl.int32)


@triton.jit
def locate(
    slab,
    col_tile,
    row,
    channels,
    width,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Where the tiles of a slab lie: offset of the first (int64), distance of rows (int64), offsets inside
    [ROWS, COLS], and which columns exist [1, COLS]."""
    channels = channels.to(tl.int64) if WIDE else channels
    width = width.to(tl.int64) if WIDE else width
    col = (slab if LAYOUT == "channels_last" else col_tile) * COLS + tl.arange(0, COLS)[None, :]
    if WIDE and LAYOUT == "flat":
        col = col_tile.to(tl.int64) * COLS + tl.arange(0, COLS)[None, :]
    stride = channels * width if LAYOUT == "contiguous" else width
    stride64 = channels.to(tl.int64) * width if LAYOUT == "contiguous" else width.to(tl.int64)
    first = row * stride64
    if LAYOUT == "contiguous":
        first += slab.to(tl.int64) * width
    return first, stride64, tl.arange(0, ROWS)[:, None] * stride + col, col < width


@triton.jit
def channel_of(slab, col_tile, channels, LAYOUT: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    """The channels of a tile, [1, COLS] or [1, 1]."""
    if LAYOUT == "contiguous":
        return slab + tl.arange(0, 1)[None, :]
    elif LAYOUT == "channels_last":
        return slab * COLS + tl.arange(0, COLS)[None, :]
    else:
        tile = col_tile.to(tl.int64) if WIDE else col_tile
        return ((tile * COLS + tl.arange(0, COLS)[None, :]) % channels).to(tl.int32)


@triton.jit
def total(v, LAYOUT: tl.constexpr):
    """Sum of a tile [ROWS, COLS] per channel, in float64: once per chunk of rows, so that it costs nothing."""
    s = tl.sum(v.to(tl.float64), 0, keep_dims=True)
    if LAYOUT == "contiguous":
        s = tl.sum(s, 1, keep_dims=True)
    return s


@triton.jit
def _welford(x, inside, shift, mean, m2, k):
    """One value more per lane; a lane that is not inside stays as it was."""
    k += 1.0
    d = tl.where(inside, x.to(mean.dtype) - shift, mean)
    delta = d - mean
    mean = tl.fma(delta, 1.0 / k, mean)
    m2 = tl.fma(delta, d - mean, m2)
    return mean, m2, k


@triton.jit
def statistics_of_rows(
    x_ptr,
    slab,
    col_tile,
    row,
    count,
    channels,
    width,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(shift, mean - shift, M2, number of values) per channel over ``count`` rows; all but the first in float64.

    Each lane has Welford's recurrence over its own values, relative to the first value of the channel, so that a large
    mean costs no accuracy; at the end the lanes are merged (Chan). The state is a quarter of a tile, so that four loads
    are in flight without four times its registers.
    """
    SUB: tl.constexpr = ROWS // 4
    compute: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    first, stride, offset, exists = locate(slab, col_tile, row, channels, width, LAYOUT, SUB, COLS, WIDE)
    any_row = tl.zeros([1, 1], tl.int32) < count
    if LAYOUT == "contiguous":
        shift = tl.load(x_ptr + first + (col_tile * COLS + tl.arange(0, 1)[None, :]), mask=any_row, other=0.0)
    else:
        col = slab * COLS + tl.arange(0, COLS)[None, :]
        shift = tl.load(x_ptr + first + col, mask=exists & any_row, other=0.0)
    shift = shift.to(compute)
    r = tl.arange(0, SUB)[:, None]
    mean = tl.zeros([SUB, COLS], compute)
    m2 = tl.zeros([SUB, COLS], compute)
    k = tl.zeros([1, 1], compute)
    for t in range(tl.cdiv(count, ROWS)):
        at = first + t * ROWS * stride
        left = count - t * ROWS
        in0 = (r < left) & exists
        in1 = (r + SUB < left) & exists
        in2 = (r + 2 * SUB < left) & exists
        in3 = (r + 3 * SUB < left) & exists
        x0 = tl.load(x_ptr + at + offset, mask=in0, other=0.0)
        x1 = tl.load(x_ptr + (at + SUB * stride) + offset, mask=in1, other=0.0)
        x2 = tl.load(x_ptr + (at + 2 * SUB * stride) + offset, mask=in2, other=0.0)
        x3 = tl.load(x_ptr + (at + 3 * SUB * stride) + offset, mask=in3, other=0.0)
        mean, m2, k = _welford(x0, in0, shift, mean, m2, k)
        mean, m2, k = _welford(x1, in1, shift, mean, m2, k)
        mean, m2, k = _welford(x2, in2, shift, mean, m2, k)
        mean, m2, k = _welford(x3, in3, shift, mean, m2, k)
    lane_count = tl.where(exists, tl.maximum(count - r + SUB - 1, 0) // SUB, 0).to(compute)
    n = count.to(tl.float64)
    if LAYOUT == "contiguous":
        n = n * tl.minimum(width - col_tile * COLS, COLS).to(tl.float64)
    average = total(lane_count * mean, LAYOUT) / n
    away = mean - average.to(compute)
    return shift, average, total(m2 + lane_count * away * away, LAYOUT), n


@triton.jit
def save_statistics(
    stats_ptr,
    running_mean_ptr,
    running_var_ptr,
    counter_ptr,
    mean,
    m2,
    count,
    momentum,
    eps,
    channel,
    channels,
    CUMULATIVE: tl.constexpr,
):
    """Writes (mean, rstd, mean_low) and moves the running statistics; all arguments float64. Returns what it wrote.

    Where there are too few values for a variance, the running statistics stay as they are.
    """
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    exists = channel < channels
    moves = exists & (tl.zeros_like(mean) + count > 1.0)
    eps = tl.full([1, 1], eps, tl.float64)
    var = m2 / tl.maximum(count, 1.0)
    high = mean.to(dtype)
    low = (mean - high.to(tl.float64)).to(dtype)
    rstd = (1.0 / tl.sqrt(var + eps)).to(dtype)
    tl.store(stats_ptr + channel, high, mask=exists)
    tl.store(stats_ptr + channels + channel, rstd, mask=exists)
    tl.store(stats_ptr + 2 * channels + channel, low, mask=exists)
    if running_mean_ptr is not None:
        factor = tl.full([1, 1], momentum, tl.float64)
        if CUMULATIVE:
            factor = 1.0 / tl.full([1, 1], tl.load(counter_ptr), tl.float64)
        param: tl.constexpr = running_mean_ptr.dtype.element_ty
        old_mean = tl.load(running_mean_ptr + channel, mask=exists, other=0.0).to(tl.float64)
        old_var = tl.load(running_var_ptr + channel, mask=exists, other=0.0).to(tl.float64)
        new_mean = old_mean * (1.0 - factor) + mean * factor
        new_var = old_var * (1.0 - factor) + var * (count / (count - 1.0)) * factor
        tl.store(running_mean_ptr + channel, round_to(new_mean, param), mask=moves)
        tl.store(running_var_ptr + channel, round_to(new_var, param), mask=moves)
    return high, rstd, low


@triton.jit
def running_statistics(stats_ptr, running_mean_ptr, running_var_ptr, eps, channel, channels, writes):
    """(mean, rstd, mean_low) of evaluation; written to ``stats`` where ``writes``."""
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    exists = channel < channels
    eps = tl.full([1, 1], eps, tl.float64)
    mean = tl.load(running_mean_ptr + channel, mask=exists, other=0.0).to(tl.float64)
    var = tl.load(running_var_ptr + channel, mask=exists, other=1.0).to(tl.float64)
    high = mean.to(dtype)
    low = (mean - high.to(tl.float64)).to(dtype)
    rstd = (1.0 / tl.sqrt(var + eps)).to(dtype)
    tl.store(stats_ptr + channel, high, mask=writes)
    tl.store(stats_ptr + channels + channel, rstd, mask=writes)
    tl.store(stats_ptr + 2 * channels + channel, low, mask=writes)
    return high, rstd, low


@triton.jit
def saved_statistics(stats_ptr, channel, channels):
    """(mean, rstd, mean_low) of the forward."""
    exists = channel < channels
    mean = tl.load(stats_ptr + channel, mask=exists, other=0.0)
    rstd = tl.load(stats_ptr + channels + channel, mask=exists, other=0.0)
    low = tl.load(stats_ptr + 2 * channels + channel, mask=exists, other=0.0)
    return mean, rstd, low


@triton.jit
def scale_of(weight_ptr, rstd, channel, channels):
    if weight_ptr is None:
        return rstd
    else:
        return tl.load(weight_ptr + channel, mask=channel < channels, other=0.0).to(rstd.dtype) * rstd


@triton.jit
def shift_of(bias_ptr, rstd, channel, channels):
    if bias_ptr is None:
        return tl.zeros_like(rstd)
    else:
        return tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(rstd.dtype)


@triton.jit
def normalised(x, mean, low, scale, shift):
    """(centred x, bn(x)). The one expression of forward and backward: nothing in it is left to the compiler, so that
    the sign of an activation is the same in both."""
    centred = (x - mean) - low
    return centred, tl.fma(centred, scale, shift)


@triton.jit
def kept(y, dtype: tl.constexpr):
    """Whether the gradient passes: of the rounded output, and NaN passes."""
    return (round_to(y, dtype).to(y.dtype) <= 0.0) == 0


@triton.jit
def mask_width(width, LAYOUT: tl.constexpr):
    """Bytes of mask in a row: words of 16 bits run through a channels_last tensor, and start anew in every plane."""
    if LAYOUT == "channels_last":
        return width // 8
    else:
        return (width + 15) // 16 * 2


@triton.jit
def pack(keep, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A tile of truth values as bytes [ROWS, COLS / 8]."""
    bits = keep.to(tl.int32).reshape(ROWS, COLS // 8, 8) << tl.arange(0, 8)[None, None, :]
    return tl.sum(bits, 2).to(tl.uint8)


@triton.jit
def unpack(bytes, ROWS: tl.constexpr, COLS: tl.constexpr):
    return ((bytes.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1).reshape(ROWS, COLS) != 0


@triton.jit
def clear_padding(mask_ptr, rows, width):
    """The last byte of a channels_last mask where the last word is half full."""
    elements = rows.to(tl.int64) * width
    tl.store(mask_ptr + elements // 8, tl.zeros([], tl.uint8), mask=elements % 16 == 8)


# ---- launch plans ----------------------------------------------------------------------------------------------------


class Device(NamedTuple):
    """What plans depend on."""

    processors: int
    l2_bytes: int
    arch: str = ""  # "90" of sm_90, "gfx942"; "" in the interpreter


INTERPRETED_DEVICE = Device(4, 1 << 20)

# The table of launch parameters: elements of a tile by bytes of an element, for 256 threads. Of a pass that applies,
# two (16 bit) or four (32 bit) 16-byte accesses per thread and tensor; of one that reduces four, one per quarter.
APPLY_TILE = {2: 4096, 4: 4096, 8: 2048}
REDUCE_TILE = {2: 8192, 4: 4096, 8: 2048}
THREADS = 256
WAVEFRONT = 64 if torch.version.hip else 32
SLAB_BYTES = 128  # across a channels_last tile: four sectors, one line
ONE_PASS_SLAB_BYTES = 32  # one sector: narrow slabs make more programs
ONE_PASS_BYTES = 64 << 10  # of x in a slab, up to which one program does it all
PROGRAMS_PER_PROCESSOR = 8  # of passes that reduce: two waves of four resident ones; twice that of the others
MAX_TILES = 32  # of a program that reduces
APPLY_TILES = 4  # of a program that does not: shares the loads of the vectors per channel
REVERSE_UP_TO = 2  # times L2: larger tensors leave too little behind in it


@functools.cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    arch = properties.gcnArchName if torch.version.hip else f"{properties.major}{properties.minor}"
    return Device(properties.multi_processor_count, properties.L2_cache_size, arch)


def device_of(x: Tensor) -> Device:
    return _device(x.get_device()) if x.is_cuda else INTERPRETED_DEVICE


class Plan(NamedTuple):
    """How a pass over a tensor is cut: see the top of the file. ``parts`` are partial results per channel."""

    layout: str
    rows: int
    width: int
    vec: int
    slabs: int
    col_tiles: int
    chunk_rows: int
    chunks: int
    tile_rows: int
    tile_cols: int

    @property
    def parts(self) -> int:
        return self.chunks * self.col_tiles

    @property
    def grid(self) -> tuple[int]:
        return (self.slabs * self.col_tiles * self.chunks,)


def _power_of_two(n: int) -> int:
    return max(1, triton.next_power_of_2(n))


def _vec(width: int, itemsize: int) -> int:
    """Elements of the widest access, up to 16 bytes, that divides every row."""
    vec = 16 // itemsize
    while width % vec:
        vec //= 2
    return vec


@functools.lru_cache(maxsize=4096)
def _plan(shape: tuple[int, ...], layout: str, itemsize: int, device: Device, slab_bytes: int, reduces: bool) -> Plan:
    n, c, h, w = shape
    tile = (REDUCE_TILE if reduces else APPLY_TILE)[itemsize]
    if layout == "channels_last":
        rows, width = n * h * w, c
        cols = min(_power_of_two(c), slab_bytes // itemsize)
        slabs, col_tiles = max(1, triton.cdiv(c, cols)), 1
    elif layout == "contiguous":
        rows, width = n, h * w
        cols = min(max(16, _power_of_two(h * w)), tile // 4)
        slabs, col_tiles = max(1, c), max(1, triton.cdiv(width, cols))
    else:
        rows, width, cols = 1, n * c * h * w, tile
        slabs, col_tiles = 1, max(1, triton.cdiv(width, cols))
    if reduces and _vec(width, itemsize) * itemsize < 16:
        tile //= 2  # addresses and masks of narrow accesses take registers
    tile_rows = max(4, tile // cols) if reduces else max(1, tile // cols)
    row_tiles = max(1, triton.cdiv(rows, tile_rows))
    programs = device.processors * PROGRAMS_PER_PROCESSOR * (1 if reduces else 2)
    wanted = triton.cdiv(slabs * col_tiles * row_tiles, programs)
    per_program = min(max(wanted, 1), MAX_TILES if reduces else APPLY_TILES, row_tiles)
    chunks = triton.cdiv(row_tiles, per_program)
    return Plan(
        layout,
        rows,
        width,
        _vec(width, itemsize),
        slabs,
        col_tiles,
        per_program * tile_rows,
        chunks,
        tile_rows,
        cols,
    )


def layout_of(x: Tensor) -> str:
    return "channels_last" if x.is_contiguous(memory_format=torch.channels_last) else "contiguous"


def reduce_plan(x: Tensor, layout: str | None = None) -> Plan:
    """Few programs with many tiles each, for few partial results. ``layout`` where that of x is ambiguous."""
    return _plan(tuple(x.shape), layout or layout_of(x), x.element_size(), device_of(x), SLAB_BYTES, True)


def apply_plan(x: Tensor, layout: str | None = None) -> Plan:
    """More programs of few tiles, which even out."""
    return _plan(tuple(x.shape), layout or layout_of(x), x.element_size(), device_of(x), SLAB_BYTES, False)


def one_pass_plan(x: Tensor) -> Plan | None:
    """One program a slab, where a slab is small; else None."""
    n, c, h, w = x.shape
    layout, itemsize = layout_of(x), x.element_size()
    cols = min(_power_of_two(c), max(8, ONE_PASS_SLAB_BYTES // itemsize)) if layout == "channels_last" else 1
    if n * h * w * cols * itemsize > ONE_PASS_BYTES:
        return None
    plan = _plan(tuple(x.shape), layout, itemsize, device_of(x), cols * itemsize, True)
    return plan._replace(chunk_rows=max(1, plan.rows), chunks=1)


def launch_options(threads: int) -> dict[str, Any]:
    """No contraction but what the kernels say themselves (``tl.fma``): the same bits from every compiler."""
    return {"num_warps": threads // WAVEFRONT, "enable_fp_fusion": False}


def geometry(x: Tensor, plan: Plan, reverse: bool = False) -> dict[str, Any]:
    """The launch arguments that say where tiles lie."""
    stride = plan.width * (x.size(1) if plan.layout == "contiguous" else 1)
    return {
        "channels": x.size(1),
        "rows": plan.rows,
        "units": plan.width // plan.vec,
        "slabs": plan.slabs,
        "col_tiles": plan.col_tiles,
        "chunk_rows": plan.chunk_rows,
        "reverse": int(reverse),
        "LAYOUT": plan.layout,
        "VEC": plan.vec,
        "ROWS": plan.tile_rows,
        "COLS": plan.tile_cols,
        "WIDE": plan.tile_rows * stride + plan.width + plan.tile_cols >= 2**31,
        **launch_options(THREADS),
    }


def in_reverse(x: Tensor, tensors: int) -> bool:
    """Whether a second pass over ``tensors`` like x goes from the end, where the first left them in the L2 cache."""
    return tensors * x.nbytes <= REVERSE_UP_TO * device_of(x).l2_bytes


# ---- launchers -------------------------------------------------------------------------------------------------------


def wide_dtype(x: Tensor) -> torch.dtype:
    """Of statistics and sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check(x: Tensor, tensors: Iterable[Tensor | None], vectors: Iterable[Tensor | None]) -> None:
    """Refuse, before anything is launched, what would read or write out of bounds.

    Raises:
        RuntimeError: another device than x's, ``tensors`` with another shape or dtype, ``vectors`` that are not one
            dense number per channel.
    """
    if x.dim() != 4 or not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        raise RuntimeError("x must be 4-D and contiguous or channels_last")
    for t in tensors:
        if t is not None and (t.shape != x.shape or t.dtype != x.dtype or t.device != x.device):
            raise RuntimeError("tensors must have the shape, dtype and device of x")
    for v in vectors:
        if v is not None and (v.shape != x.shape[1:2] or v.device != x.device or not v.is_contiguous()):
            raise RuntimeError("vectors must be contiguous, of one element per channel, on the device of x")


def laid_out_like(t: Tensor, x: Tensor) -> Tensor:
    """t itself where its elements lie in memory as those of x, else a copy that does."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return t.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
