"""Which backend serves a call on a GPU, and whether a 1x1 convolution is folded there: measurements, per device.

Without an entry the order is CUDA library, Triton, eager PyTorch. The table that comes with the package
(``choices.json`` beside this file) has what was measured for it; ``python -m benchmarks.tune`` measures this machine's
device and writes a table of its own, which is read instead:

    $FUSEDRES_CACHE_DIR/choices-<device>.json        by default in ~/.cache/fusedres

A table counts for the device, the fusedres and the format that it names, and is ignored otherwise. Entries are by op,
dtype, layout and the sizes of the tensor and of its channels in powers of two, so that a table made from some shapes
serves their neighbours. Forward and backward are served by one entry: their masks must come from the same arithmetic.

Beside them the table says of 1x1 convolutions in training, by dtype, pixels, input and output channels, likewise in
powers of two, whether the convolution folded into its batch norm was faster than the two. Without an entry nothing is
known, and ``folding="auto"`` does not fold.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__

FORMAT = 2
CHOICES = ("cuda", "triton", "eager")
FOLDING = ("plain", "fold")
SHIPPED = Path(__file__).with_name("choices.json")

Key = tuple[str, torch.dtype, bool, int, int]
FoldingKey = tuple[torch.dtype, tuple[int, ...], int, int]


@dataclass(frozen=True)
class Choice:
    """One entry: ``backend`` serves ``op`` for tensors of ``dtype`` and ``layout`` whose number of elements, and of
    channels, have this many binary digits."""

    op: str
    dtype: str
    layout: str
    elements: int
    channels: int
    backend: str

    @property
    def key(self) -> Key:
        dtype = getattr(torch, self.dtype)
        if self.backend not in CHOICES or self.layout not in ("channels_last", "contiguous"):
            raise ValueError(f"unknown backend or layout in {self}")
        return self.op, dtype, self.layout == "channels_last", self.elements, self.channels


def key(op: str, x: Tensor) -> Key:
    """The entry that a call with the 4-D tensor ``x`` looks for."""
    return op, x.dtype, x.stride(1) == 1, x.numel().bit_length(), x.size(1).bit_length()


@dataclass(frozen=True)
class FoldingChoice:
    """One entry: ``conv1x1_bn_act`` of ``dtype``, whose ``channels`` (of one convolution, or of the two whose sum is
    taken), ``outputs`` and ``pixels`` have this many binary digits, is faster folded ("fold") or not ("plain")."""

    dtype: str
    channels: tuple[int, ...]
    outputs: int
    pixels: int
    choice: str

    @property
    def key(self) -> FoldingKey:
        if self.choice not in FOLDING:
            raise ValueError(f"neither fold nor plain in {self}")
        return getattr(torch, self.dtype), tuple(self.channels), self.outputs, self.pixels


def folding_key(channels: Sequence[int], outputs: int, pixels: int, dtype: torch.dtype) -> FoldingKey:
    """The entry that a 1x1 convolution in training looks for.

    Args:
        channels: that it reads, or that each of two convolutions reads whose sum is taken, in the order of the call.
        outputs: channels that it writes. pixels: of them each, over the batch. dtype: of what it reads.
    """
    return dtype, tuple(c.bit_length() for c in channels), outputs.bit_length(), pixels.bit_length()


@dataclass(frozen=True)
class Table:
    """Choices of one device, and in words where they come from or why there are none."""

    choices: Mapping[Key, str]
    source: str
    folding: Mapping[FoldingKey, str] = field(default_factory=dict)


def cache_directory() -> Path:
    """``FUSEDRES_CACHE_DIR``, else ``fusedres`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    if chosen := os.environ.get("FUSEDRES_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusedres"


def path_for(device: str) -> Path:
    """The file that ``benchmarks.tune`` writes for a device of this name."""
    return cache_directory() / f"choices-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def load(device: str) -> Table:
    """The table of a device: the user's where there is a valid one, else the package's."""
    user = path_for(device)
    missed = ""
    if user.exists():
        try:
            return _read(user, device, str(user))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            missed = f"{user} is ignored: {error}; "
    try:
        return _read(SHIPPED, device, f"{missed}{SHIPPED.name} of the package")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return Table({}, f"{missed}no measurements for this device ({error})")


def _read(path: Path, device: str, source: str) -> Table:
    content = json.loads(path.read_text())
    wanted = {"format": FORMAT, "fusedres": __version__}
    for name, value in wanted.items():
        if content[name] != value:
            raise ValueError(f"it is of {name} {content[name]!r}, not {value!r}")
    if device not in content["devices"]:
        raise ValueError(f"it has nothing on {device}")
    rows = content["devices"][device]
    backends = {choice.key: choice.backend for choice in (Choice(**row) for row in rows["backends"])}
    folding = {choice.key: choice.choice for choice in (FoldingChoice(**row) for row in rows["folding"])}
    return Table(backends, source, folding)


def save(
    device: str, choices: Iterable[Choice], measured: Mapping[str, Any], folding: Iterable[FoldingChoice] = ()
) -> Path:
    """Write the user's table for a device; ``measured`` is kept beside it to be read by people."""
    path = path_for(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"backends": [asdict(choice) for choice in choices], "folding": [asdict(choice) for choice in folding]}
    content = {"format": FORMAT, "fusedres": __version__, "measured": dict(measured), "devices": {device: rows}}
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(path)  # a reader sees the old table or the new one
    return path
