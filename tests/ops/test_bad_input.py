"""Wrong arguments: eager's class, a message that names the argument, got and wanted, and nothing written.

The class is computed from eager in each test, where eager raises; the few rows that ask for another class say so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres import functional as F

NAN = float("nan")
FOLD = "conv1x1_bn_act"
FOLD2 = "conv1x1_bn_add_conv1x1_bn_act"


def _x(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 5, 6, 7), generator=torch.Generator().manual_seed(0))


def _image(*shape: int) -> Tensor:
    return _x(*shape).contiguous(memory_format=torch.channels_last)


def _norm(suffix: str = "", channels: int = 5) -> dict[str, Any]:
    return {
        "running_mean" + suffix: torch.full((channels,), 0.25),
        "running_var" + suffix: torch.full((channels,), 1.5),
        "weight" + suffix: torch.linspace(0.5, 1.5, channels),
        "bias" + suffix: torch.linspace(-1, 1, channels),
    }


def _base(op: str) -> dict[str, Any]:
    """Valid arguments of an op, as keywords."""
    if op == "add_act":
        return {"x": _x(), "residual": _x(), "act": "relu"}
    if op in (FOLD, FOLD2):
        arguments = {k: v for k, v in _base("batch_norm_act").items() if k != "x"}
        arguments |= {"y": _image(), "conv_weight": _x(5, 5, 1, 1), "stride": 1, "folding": "always"}
        if op == FOLD2:
            del arguments["residual"]
            second = {"y2": _image(2, 6, 12, 14), "conv_weight2": _x(5, 6, 1, 1), "stride2": 2}
            arguments |= {**second, **_norm("2"), "num_batches_tracked2": torch.tensor(9)}
        return arguments
    arguments: dict[str, Any] = {"x": _x(), **_norm(), "training": True, "momentum": 0.1, "eps": 1e-5, "act": "relu"}
    arguments["num_batches_tracked"] = torch.tensor(7)
    if op == "batch_norm_act":
        arguments["residual"] = None
    elif op == "batch_norm_add_batch_norm_act":
        arguments |= {"x2": _x(), **_norm("2"), "num_batches_tracked2": torch.tensor(9)}
    elif op == "batch_norm_act_max_pool":
        arguments |= {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": False}
    elif op == "conv_bn_act":
        arguments |= {
            "conv_weight": _x(5, 5, 3, 3),
            "conv_bias": None,
            "stride": 1,
            "padding": 1,
            "dilation": 1,
            "groups": 1,
        }
        arguments["residual"] = None
    return arguments


def _ours(op: str, a: dict[str, Any]) -> Tensor:
    return getattr(F, op)(**a)


def _eager_norm(a: dict[str, Any], x: Tensor, suffix: str = "") -> Tensor:
    stats = (a[name + suffix] for name in ("running_mean", "running_var", "weight", "bias"))
    training, momentum, eps = (a.get(n + suffix, a[n]) for n in ("training", "momentum", "eps"))
    return nn.functional.batch_norm(x, *stats, training, momentum, eps)


def _eager(op: str, a: dict[str, Any]) -> Tensor:
    if op in (FOLD, FOLD2):
        y = _eager_norm(a, nn.functional.conv2d(a["y"], a["conv_weight"], None, a["stride"]))
        if op == FOLD2:
            y = y + _eager_norm(a, nn.functional.conv2d(a["y2"], a["conv_weight2"], None, a["stride2"]), "2")
        return torch.relu(y if a.get("residual") is None else y + a["residual"])
    x = a["x"]
    if op == "conv_bn_act":
        x = nn.functional.conv2d(
            x, a["conv_weight"], a["conv_bias"], a["stride"], a["padding"], a["dilation"], a["groups"]
        )
    y = x if op == "add_act" else _eager_norm(a, x)
    if op == "batch_norm_add_batch_norm_act":
        y = y + _eager_norm(a, a["x2"], "2")
    if a.get("residual") is not None or op == "add_act":
        y = y + a["residual"]
    y = torch.relu(y)
    if op == "batch_norm_act_max_pool":
        y = nn.functional.max_pool2d(y, a["kernel_size"], a["stride"], a["padding"], a["dilation"], a["ceil_mode"])
    return y


@dataclass
class Bad:
    """One wrong call: what is changed, what is raised, what the message holds."""

    op: str
    changes: dict[str, Any]
    error: type[Exception]
    says: tuple[str, ...] = ()
    eager: bool = True  # eager raises the same class, or accepts it
    name: str = field(default="")

    def __str__(self) -> str:
        return self.name or f"{self.op}-" + ",".join(f"{k}={_show(v)}" for k, v in self.changes.items())


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        flags = ("sparse" * value.is_sparse, "meta" * value.is_meta, "grad" * value.requires_grad)
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{''.join(flags)}"
    return repr(value)


def _batch_norm_rows(op: str, suffix: str = "") -> list[Bad]:
    """What can be wrong with one batch norm of an op; `suffix` for the second one."""

    def row(error: type[Exception], says: tuple[str, ...], eager: bool = True, **changes: Any) -> Bad:
        return Bad(
            op, {k + suffix if k not in ("training", "eps") else k: v for k, v in changes.items()}, error, says, eager
        )

    def name(argument: str) -> str:
        return argument + suffix

    rows = []
    for argument, size in (("running_mean", 6), ("running_var", 4), ("weight", 7), ("bias", 3)):
        rows += [
            row(RuntimeError, (name(argument), str(size), "5"), **{argument: torch.ones(size)}),
            row(RuntimeError, (name(argument), "5"), **{argument: torch.tensor(1.0)}),
            row(TypeError, (name(argument), "list", "Tensor"), **{argument: [1.0] * 5}),
            row(RuntimeError, (name(argument), "float64", "float32"), **{argument: torch.ones(5, dtype=torch.float64)}),
            row(RuntimeError, (name(argument), "int64", "float32"), **{argument: torch.ones(5, dtype=torch.int64)}),
            row(RuntimeError, (name(argument), "meta", "cpu"), **{argument: torch.ones(5, device="meta")}),
        ]
    rows += [
        row(TypeError, (name("weight"), "float", "Tensor"), weight=1.0),
        row(RuntimeError, (name("running_mean"), "5"), running_mean=torch.zeros(1)),
        row(ValueError, (name("running_mean"), name("running_var"), "None"), running_mean=None),
        row(ValueError, (name("running_mean"), name("running_var"), "None"), running_var=None),
        row(RuntimeError, (name("running_mean"), "grad"), running_mean=torch.zeros(5, requires_grad=True)),
        row(RuntimeError, (name("running_var"), "grad"), running_var=torch.ones(5, requires_grad=True)),
        row(
            RuntimeError,
            (name("running_mean"),),
            running_mean=None,
            running_var=None,
            training=False,
            num_batches_tracked=None,
        ),
        row(TypeError, (name("num_batches_tracked"),), num_batches_tracked=3),
        row(RuntimeError, (name("num_batches_tracked"),), num_batches_tracked=torch.tensor(3.0)),
        row(RuntimeError, (name("num_batches_tracked"),), num_batches_tracked=torch.zeros(5, dtype=torch.int64)),
    ]
    return rows


def _input_rows(op: str) -> list[Bad]:
    x = _x()
    return [
        Bad(op, {"x": [1.0, 2.0]}, TypeError, ("x", "list", "Tensor"), eager=False),
        Bad(op, {"x": None}, TypeError, ("x", "None", "Tensor"), eager=False),
        Bad(op, {"x": x.numpy()}, TypeError, ("x", "ndarray", "Tensor"), eager=False, name=f"{op}-x=ndarray"),
        Bad(op, {"x": 3.0}, TypeError, ("x", "float", "Tensor"), eager=False),
        Bad(op, {"act": "gelu"}, ValueError, ("act", "gelu", "relu")),
        Bad(op, {"act": True}, ValueError, ("act", "True", "relu")),
        Bad(op, {"act": ""}, ValueError, ("act", "relu")),
    ]


def _dtype_rows(op: str, argument: str = "x") -> list[Bad]:
    x = _x()
    return [
        Bad(op, {argument: x.int()}, NotImplementedError, (argument, "int32", "float32")),
        Bad(op, {argument: x.long()}, NotImplementedError, (argument, "int64", "float32")),
        Bad(op, {argument: x > 0}, NotImplementedError, (argument, "bool", "float32")),
        Bad(op, {argument: x + 0j}, NotImplementedError, (argument, "complex64", "float32")),
        Bad(op, {argument: x.to(torch.float8_e4m3fn)}, NotImplementedError, (argument, "float8_e4m3fn", "float32")),
        Bad(op, {argument: x.to_sparse()}, NotImplementedError, (argument, "sparse")),
    ]


def _number_rows(op: str) -> list[Bad]:
    one = {"x": _x(1, 5, 1, 1)}
    if op == "batch_norm_add_batch_norm_act":
        one["x2"] = _x(1, 5, 1, 1)
    if op == "conv_bn_act":
        one = {"x": _x(1, 5, 3, 3), "padding": 0}
    if op == "batch_norm_act_max_pool":
        one |= {"kernel_size": 1, "padding": 0}
    if op in (FOLD, FOLD2):
        one = {"y": _image(1, 5, 1, 1)} | ({"y2": _image(1, 6, 2, 2)} if op == FOLD2 else {})
    return [
        Bad(op, {"eps": 0.0}, ValueError, ("eps", "0.0", "positive")),
        Bad(op, {"eps": -1.0}, ValueError, ("eps", "-1.0", "positive")),
        Bad(op, {"eps": -1e-5, "training": False}, ValueError, ("eps", "-1e-05", "negative")),
        Bad(op, {"eps": "small"}, TypeError, ("eps", "str", "float")),
        Bad(op, {"eps": None}, TypeError, ("eps", "None", "float"), eager=op not in (TWO, FOLD2)),
        Bad(op, {"momentum": "fast"}, TypeError, ("momentum", "str", "float")),
        Bad(op, {"momentum": 1j}, TypeError, ("momentum", "complex", "float")),
        Bad(op, {"momentum": None, "num_batches_tracked": None}, TypeError, ("momentum", "None", "float")),
        Bad(op, {"training": "yes"}, TypeError, ("training", "str", "bool")),
        Bad(op, {"training": None}, TypeError, ("training", "None", "bool")),
        Bad(op, {"training": 1}, TypeError, ("training", "int", "bool")),
        Bad(op, one, ValueError, ("more than 1 value per channel", "1, 5, 1, 1"), name=f"{op}-one value per channel"),
    ]


def _residual_rows(op: str) -> list[Bad]:
    return [
        Bad(op, {"residual": _x(2, 4, 6, 7)}, RuntimeError, ("residual", "2, 4, 6, 7", "2, 5, 6, 7")),
        Bad(op, {"residual": _x(3, 5, 6, 7)}, RuntimeError, ("residual", "3, 5, 6, 7", "2, 5, 6, 7")),
        Bad(op, {"residual": [1.0]}, TypeError, ("residual", "list", "Tensor")),
        Bad(op, {"residual": "x"}, TypeError, ("residual", "str", "Tensor")),
        Bad(op, {"residual": torch.ones(2, 5, 6, 7, device="meta")}, RuntimeError, ("residual", "meta", "cpu")),
        Bad(op, {"residual": _x() + 0j}, NotImplementedError, ("residual", "complex")),
    ]


def _folded_rows(op: str, suffix: str = "") -> list[Bad]:
    """The operands of a 1x1 convolution."""
    y, weight, stride = f"y{suffix}", f"conv_weight{suffix}", f"stride{suffix}"
    channels = 6 if suffix else 5
    shape = (2, 6, 12, 14) if suffix else (2, 5, 6, 7)
    rows = [replace(row, eager=False) for row in _dtype_rows(op, y) + _dtype_rows(op, weight)]
    return [
        *rows,
        Bad(op, {y: [1.0, 2.0]}, TypeError, (y, "list", "Tensor"), eager=False),
        Bad(op, {y: None}, TypeError, (y, "None", "Tensor"), eager=False),
        Bad(op, {y: _x(*shape[1:])}, RuntimeError, (y, "4 dimensions", str(shape[1:])), eager=False),
        Bad(op, {y: _image(2, 4, 6, 7)}, RuntimeError, (weight, y, f"5, {channels}, 1, 1", "4 channels")),
        Bad(op, {y: _image(*shape).double()}, RuntimeError, ()),
        Bad(op, {y: _image(*shape).to("meta")}, RuntimeError, ("meta", "cpu")),
        Bad(op, {weight: [1.0]}, TypeError, (weight, "list", "Tensor")),
        Bad(op, {weight: None}, TypeError, (weight, "None", "Tensor")),
        Bad(op, {weight: _x(5, channels, 3, 3)}, RuntimeError, (weight, f"5, {channels}, 3, 3", "1, 1")),
        Bad(op, {weight: _x(5, channels, 1, 2)}, RuntimeError, (weight, f"5, {channels}, 1, 2", "1, 1")),
        Bad(op, {weight: _x(5, channels)}, RuntimeError, (weight, f"5, {channels}", "4 dimensions")),
        Bad(op, {weight: _x(5, 3, 1, 1)}, RuntimeError, (weight, "5, 3, 1, 1", f"{channels} channels")),  # groups
        Bad(op, {weight: _x(6, channels, 1, 1)}, RuntimeError, ("6", "5")),
        Bad(op, {weight: _x(5, channels, 1, 1).double()}, RuntimeError, ()),
        Bad(op, {weight: _x(5, channels, 1, 1).bfloat16()}, RuntimeError, ()),
        Bad(op, {weight: _x(5, channels, 1, 1).to("meta")}, RuntimeError, (weight, "meta", "cpu")),
        Bad(op, {stride: 0}, RuntimeError, ("stride",)),
        Bad(op, {stride: -1}, RuntimeError, ("stride",)),
        Bad(op, {stride: "a"}, TypeError, (stride, "'a'", "int")),
        Bad(op, {stride: 1.0}, TypeError, (stride, "1.0", "int")),
        Bad(op, {stride: (1, 1, 1)}, RuntimeError, (stride, "1, 1, 1")),
    ]


POOL = "batch_norm_act_max_pool"
CONV = "conv_bn_act"
TWO = "batch_norm_add_batch_norm_act"

ROWS = [
    *_input_rows("batch_norm_act"),
    *_dtype_rows("batch_norm_act"),
    *_number_rows("batch_norm_act"),
    *_batch_norm_rows("batch_norm_act"),
    *_residual_rows("batch_norm_act"),
    Bad("batch_norm_act", {"x": _x().double()}, RuntimeError, ("float64", "float32")),
    Bad(
        "batch_norm_act",
        {"x": _x().bfloat16(), "weight": torch.ones(5).bfloat16()},
        RuntimeError,
        ("bfloat16", "float32"),
    ),
    Bad("batch_norm_act", {"x": _x().bfloat16(), "weight": torch.ones(5).half()}, RuntimeError, ("weight", "float16")),
    Bad("batch_norm_act", {"x": _x().to("meta")}, RuntimeError, ("meta", "cpu")),
    Bad("batch_norm_act", {"x": _x(2, 6, 6, 7)}, RuntimeError, ("running_mean", "6", "5")),
    Bad("batch_norm_act", {"x": _x(5)}, RuntimeError, ()),
    # the second norm is refused before the first has moved
    *_input_rows(TWO),
    *_dtype_rows(TWO),
    *_dtype_rows(TWO, "x2"),
    *_number_rows(TWO),
    *_batch_norm_rows(TWO),
    *_batch_norm_rows(TWO, "2"),
    Bad(TWO, {"x2": [1.0]}, TypeError, ("x2", "list", "Tensor"), eager=False),
    Bad(TWO, {"x2": None}, TypeError, ("x2", "None", "Tensor"), eager=False),
    Bad(TWO, {"x2": _x(2, 5, 6, 8)}, RuntimeError, ("x2", "2, 5, 6, 8", "2, 5, 6, 7")),
    Bad(TWO, {"x2": _x(3, 5, 6, 7)}, RuntimeError, ("x2", "3, 5, 6, 7", "2, 5, 6, 7")),
    Bad(TWO, {"x2": _x(2, 6, 6, 7)}, RuntimeError, ("running_mean2", "6", "5")),
    Bad(TWO, {"x2": _x(1, 5, 1, 1)}, ValueError, ("more than 1 value per channel", "1, 5, 1, 1")),
    Bad(TWO, {"eps2": 0.0}, ValueError, ("eps", "0.0", "positive")),
    Bad(TWO, {"eps2": "a"}, TypeError, ("eps2", "str", "float")),
    Bad(TWO, {"momentum2": "a"}, TypeError, ("momentum2", "str", "float")),
    Bad(TWO, {"momentum2": None, "num_batches_tracked2": None}, TypeError, ("momentum2", "None", "float")),
    Bad(TWO, {"training2": "a"}, TypeError, ("training2", "str", "bool")),
    # the pool is refused before the norm has moved
    *_input_rows(POOL),
    *_dtype_rows(POOL),
    *_number_rows(POOL),
    *_batch_norm_rows(POOL),
    Bad(POOL, {"kernel_size": 0}, RuntimeError, ("kernel_size", "0")),
    Bad(POOL, {"kernel_size": -1}, RuntimeError, ("kernel_size", "-1")),
    Bad(POOL, {"kernel_size": 11}, RuntimeError, ("kernel_size", "11")),
    Bad(POOL, {"kernel_size": (3, 3, 3)}, RuntimeError, ("kernel_size", "3, 3, 3")),
    Bad(POOL, {"kernel_size": ()}, RuntimeError, ("kernel_size",)),
    Bad(POOL, {"kernel_size": "3"}, TypeError, ("kernel_size", "'3'", "int")),
    Bad(POOL, {"kernel_size": 3.0}, TypeError, ("kernel_size", "3.0", "int")),
    Bad(POOL, {"kernel_size": None}, TypeError, ("kernel_size", "None", "int")),
    Bad(POOL, {"stride": 0}, RuntimeError, ("stride", "0")),
    Bad(POOL, {"stride": -2}, RuntimeError, ("stride", "-2")),
    Bad(POOL, {"stride": 2.0}, TypeError, ("stride", "2.0", "int")),
    Bad(POOL, {"stride": (1, 2, 3)}, RuntimeError, ("stride", "1, 2, 3")),
    Bad(POOL, {"padding": 2}, RuntimeError, ("padding", "2", "half")),
    Bad(POOL, {"padding": -1}, RuntimeError, ("padding", "-1", "negative")),
    Bad(POOL, {"padding": "same"}, TypeError, ("padding", "'same'", "int")),
    Bad(POOL, {"dilation": 0}, RuntimeError, ("dilation", "0")),
    Bad(POOL, {"dilation": 9}, RuntimeError, ("dilation", "9")),
    Bad(POOL, {"dilation": "a"}, TypeError, ("dilation", "'a'", "int")),
    Bad(POOL, {"ceil_mode": "a"}, TypeError, ("ceil_mode", "str", "bool")),
    Bad(POOL, {"ceil_mode": None}, TypeError, ("ceil_mode", "None", "bool")),
    # add_act
    *_input_rows("add_act"),
    Bad("add_act", {"residual": _x(2, 4, 6, 7)}, RuntimeError, ("residual", "2, 4, 6, 7", "2, 5, 6, 7")),
    Bad("add_act", {"residual": [1.0]}, TypeError, ("residual", "list", "Tensor")),
    Bad("add_act", {"residual": None}, TypeError, ("residual", "None", "Tensor")),
    Bad("add_act", {"x": _x() > 0, "residual": _x() > 0}, RuntimeError, ("ool",)),
    Bad("add_act", {"x": _x() + 0j}, NotImplementedError, ("complex",)),
    Bad("add_act", {"residual": _x().to("meta")}, RuntimeError, ("residual", "meta", "cpu")),
    # the convolution
    *_input_rows(CONV),
    *_number_rows(CONV),
    *_batch_norm_rows(CONV),
    *_residual_rows(CONV),
    Bad(CONV, {"x": _x(2, 4, 6, 7)}, RuntimeError, ("5", "4")),
    Bad(CONV, {"conv_weight": [1.0]}, TypeError, ("conv_weight", "list", "Tensor")),
    Bad(CONV, {"conv_weight": _x(5, 5, 3)}, RuntimeError, ()),
    Bad(CONV, {"conv_weight": _x(5, 5, 3, 3).double()}, RuntimeError, ()),
    Bad(CONV, {"conv_weight": _x(6, 5, 3, 3)}, RuntimeError, ("6", "5")),
    Bad(CONV, {"conv_weight": None}, TypeError, ("conv_weight", "None", "Tensor")),
    Bad(CONV, {"conv_bias": torch.ones(3)}, RuntimeError, ("bias", "3", "5")),
    Bad(CONV, {"conv_bias": [1.0]}, TypeError, ("conv_bias", "list", "Tensor")),
    Bad(CONV, {"stride": 0}, RuntimeError, ("stride",)),
    Bad(CONV, {"stride": "a"}, TypeError, ("stride",)),
    Bad(CONV, {"padding": -1}, RuntimeError, ("padding",)),
    Bad(CONV, {"padding": "around"}, RuntimeError, ("padding", "around")),
    Bad(CONV, {"padding": "same", "stride": 2}, RuntimeError, ("padding", "same")),
    Bad(CONV, {"dilation": 0}, RuntimeError, ("dilation",)),
    Bad(CONV, {"groups": 0}, RuntimeError, ("groups",)),
    Bad(CONV, {"groups": 2}, RuntimeError, ("groups",)),
    Bad(CONV, {"groups": "a"}, TypeError, ("groups",)),
    Bad(CONV, {"conv_weight": _x(5, 5, 9, 9)}, RuntimeError, ("9",)),
    # folded, nothing has moved when the second of a pair is refused
    *_folded_rows(FOLD),
    *_number_rows(FOLD),
    *_batch_norm_rows(FOLD),
    *_residual_rows(FOLD),
    *_folded_rows(FOLD2),
    *_folded_rows(FOLD2, "2"),
    *_number_rows(FOLD2),
    *_batch_norm_rows(FOLD2),
    *_batch_norm_rows(FOLD2, "2"),
    Bad(FOLD2, {"stride2": 1}, RuntimeError, ()),
    Bad(FOLD2, {"eps2": 0.0}, ValueError, ("eps", "0.0", "positive")),
    Bad(FOLD2, {"eps2": "a"}, TypeError, ("eps2", "str", "float")),
    Bad(FOLD2, {"momentum2": "a"}, TypeError, ("momentum2", "str", "float")),
    Bad(FOLD2, {"momentum2": None, "num_batches_tracked2": None}, TypeError, ("momentum2", "None", "float")),
    Bad(FOLD2, {"training2": "a"}, TypeError, ("training2", "str", "bool")),
    *(Bad(op, {"act": act}, ValueError, ("act", "relu")) for op in (FOLD, FOLD2) for act in ("gelu", True, "")),
    *(Bad(op, {"folding": f}, ValueError, ("folding", "auto")) for op in (FOLD, FOLD2) for f in ("yes", True, None)),
]


def _unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, value in before.items():
        if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta:
            a, b = value.detach().contiguous(), after[name].detach().contiguous()
            assert torch.equal(a.view(torch.uint8) if a.dim() else a, b.view(torch.uint8) if b.dim() else b), (
                f"{name} was changed"
            )


def _clone(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.clone().detach().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else copy.deepcopy(v)
        for k, v in arguments.items()
    }


def test_base_calls_are_valid() -> None:
    for op in ("batch_norm_act", TWO, POOL, "add_act", CONV, FOLD, FOLD2):
        _ours(op, _base(op))
        _eager(op, _base(op))


def test_enough_cases() -> None:
    assert len(ROWS) + len(CONSTRUCTORS) + len(MODULE_CALLS) >= 100


@pytest.mark.parametrize("bad", ROWS, ids=str)
def test_functional(bad: Bad, backend: str) -> None:
    arguments = _base(bad.op) | _clone(bad.changes)
    eager_error = None
    if "act" not in bad.changes:
        try:
            _eager(bad.op, _clone(arguments))
        except Exception as error:
            eager_error = type(error)
    if bad.eager and eager_error is not None:
        assert bad.error is eager_error, f"this table says {bad.error}, eager raises {eager_error}"
    before = _clone(arguments)
    with pytest.raises(Exception) as info:
        _ours(bad.op, arguments)
    _unchanged(before, arguments)
    assert type(info.value) is bad.error, f"{type(info.value).__name__}: {info.value}"
    message = str(info.value)
    missing = [fragment for fragment in bad.says if fragment not in message]
    assert not missing, f"the message lacks {missing}: {message}"


# --- modules ---

CONSTRUCTORS: list[tuple[str, Callable[[], Any], Callable[[], Any] | None, type[Exception], tuple[str, ...]]] = [
    ("str", lambda: fusedres.BatchNormAct2d("a"), lambda: nn.BatchNorm2d("a"), TypeError, ()),
    ("negative", lambda: fusedres.BatchNormAct2d(-1), lambda: nn.BatchNorm2d(-1), RuntimeError, ("-1",)),
    ("float", lambda: fusedres.BatchNormAct2d(2.5), lambda: nn.BatchNorm2d(2.5), TypeError, ()),
    ("None", lambda: fusedres.BatchNormAct2d(None), lambda: nn.BatchNorm2d(None), TypeError, ()),
    ("nothing", lambda: fusedres.BatchNormAct2d(), lambda: nn.BatchNorm2d(), TypeError, ("num_features",)),
    ("unknown", lambda: fusedres.BatchNormAct2d(5, foo=1), lambda: nn.BatchNorm2d(5, foo=1), TypeError, ("foo",)),
    (
        "dtype",
        lambda: fusedres.BatchNormAct2d(5, dtype=torch.int32),
        lambda: nn.BatchNorm2d(5, dtype=torch.int32),
        RuntimeError,
        (),
    ),
    (
        "device",
        lambda: fusedres.BatchNormAct2d(5, device="nope"),
        lambda: nn.BatchNorm2d(5, device="nope"),
        RuntimeError,
        (),
    ),
    ("act", lambda: fusedres.BatchNormAct2d(5, act="gelu"), None, ValueError, ("act", "gelu", "relu")),
    ("act-true", lambda: fusedres.BatchNormAct2d(5, act=True), None, ValueError, ("act", "True", "relu")),
    (
        "act-positional",
        lambda: fusedres.BatchNormAct2d(5, 1e-5, 0.1, True, True, None, None, True),
        None,
        TypeError,
        (),
    ),
    ("conv-str", lambda: fusedres.ConvBNAct2d("a", 3, 3), lambda: nn.Conv2d("a", 3, 3), TypeError, ()),
    ("conv-negative", lambda: fusedres.ConvBNAct2d(-4, 3, 3), lambda: nn.Conv2d(-4, 3, 3), RuntimeError, ("-4",)),
    (
        "conv-groups-0",
        lambda: fusedres.ConvBNAct2d(4, 4, 3, groups=0),
        lambda: nn.Conv2d(4, 4, 3, groups=0),
        ValueError,
        ("groups",),
    ),
    (
        "conv-groups-in",
        lambda: fusedres.ConvBNAct2d(4, 4, 3, groups=3),
        lambda: nn.Conv2d(4, 4, 3, groups=3),
        ValueError,
        ("in_channels",),
    ),
    (
        "conv-groups-out",
        lambda: fusedres.ConvBNAct2d(4, 6, 3, groups=4),
        lambda: nn.Conv2d(4, 6, 3, groups=4),
        ValueError,
        ("out_channels",),
    ),
    (
        "conv-padding",
        lambda: fusedres.ConvBNAct2d(4, 4, 3, padding="foo"),
        lambda: nn.Conv2d(4, 4, 3, padding="foo"),
        ValueError,
        ("foo",),
    ),
    (
        "conv-same",
        lambda: fusedres.ConvBNAct2d(4, 4, 3, stride=2, padding="same"),
        lambda: nn.Conv2d(4, 4, 3, stride=2, padding="same"),
        ValueError,
        ("same",),
    ),
    ("conv-kernel", lambda: fusedres.ConvBNAct2d(4, 4, None), lambda: nn.Conv2d(4, 4, None), TypeError, ()),
    ("conv-act", lambda: fusedres.ConvBNAct2d(4, 4, 3, act="gelu"), None, ValueError, ("act", "gelu", "relu")),
]


@pytest.mark.parametrize("row", CONSTRUCTORS, ids=lambda r: r[0])
def test_constructors(row) -> None:
    _, ours, eager, error, says = row
    if eager is not None:
        with pytest.raises(error):
            eager()
    with pytest.raises(error) as info:
        ours()
    assert all(fragment in str(info.value) for fragment in says), str(info.value)


MODULE_CALLS: list[tuple[str, tuple[Any, ...], type[Exception], tuple[str, ...]]] = [
    ("3d", (_x(5, 6, 7),), ValueError, ("4D", "3D")),
    ("5d", (_x(2, 5, 6, 7, 8),), ValueError, ("4D", "5D")),
    ("2d", (_x(2, 5),), ValueError, ("4D", "2D")),
    ("0d", (torch.tensor(1.0),), ValueError, ("4D", "0D")),
    ("channels", (_x(2, 6, 6, 7),), RuntimeError, ("running_mean", "6", "5")),
    ("int", (_x().int(),), NotImplementedError, ("int32",)),
    ("int-3d", (_x(5, 6, 7).int(),), ValueError, ("4D", "3D")),
    ("double", (_x().double(),), RuntimeError, ("float64", "float32")),
    ("one-value", (_x(1, 5, 1, 1),), ValueError, ("more than 1 value per channel",)),
    ("list", ([1.0],), TypeError, ("list", "Tensor")),
    ("none", (None,), TypeError, ("None", "Tensor")),
    ("residual-shape", (_x(), _x(2, 4, 6, 7)), RuntimeError, ("residual", "2, 4, 6, 7")),
    ("residual-list", (_x(), [1.0]), TypeError, ("residual", "list")),
    ("meta", (_x().to("meta"),), RuntimeError, ("meta",)),
]


@pytest.mark.parametrize("row", MODULE_CALLS, ids=lambda r: r[0])
def test_module_calls(row, backend) -> None:
    """nn.BatchNorm2d counts a batch it then refuses; ours changes nothing."""
    _, arguments, error, says = row
    plain = nn.BatchNorm2d(5)
    try:
        plain(arguments[0])
    except Exception as eager_error:
        if error is not TypeError:
            assert type(eager_error) is error  # noqa: PT017
    module = fusedres.BatchNormAct2d(5)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error) as info:
        module(*arguments)
    assert type(info.value) is error
    assert all(fragment in str(info.value) for fragment in says), str(info.value)
    _unchanged(before, module.state_dict())
    assert module.num_batches_tracked == 0


@pytest.mark.parametrize("attribute", ["eps", "momentum"])
def test_module_attributes_of_wrong_type(attribute, backend) -> None:
    """nn.BatchNorm2d takes anything in its constructor and fails at the call."""
    module = fusedres.BatchNormAct2d(5, **{attribute: "a"})
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(TypeError, match=attribute):
        nn.BatchNorm2d(5, **{attribute: "a"})(_x()) if attribute == "momentum" else module(_x())
    with pytest.raises(TypeError, match=attribute):
        module(_x())
    _unchanged(before, module.state_dict())


def test_conv_module_leaves_statistics_alone(backend) -> None:
    module = fusedres.ConvBNAct2d(4, 5, 3)
    before = copy.deepcopy(module.state_dict())
    for bad, error in ((_x(2, 5, 6, 7), RuntimeError), (_x(2, 4, 2, 2), RuntimeError), (_x(1, 4, 3, 3), ValueError)):
        with pytest.raises(error):
            module(bad)
    with pytest.raises(RuntimeError, match="residual"):
        module(_x(2, 4, 6, 7), _x(2, 5, 6, 7))
    _unchanged(before, module.state_dict())


def test_unknown_keyword_and_missing_arguments() -> None:
    for op in ("batch_norm_act", TWO, POOL, "add_act", CONV, FOLD, FOLD2):
        with pytest.raises(TypeError, match="nonsense"):
            getattr(F, op)(**_base(op), nonsense=1)
        with pytest.raises(TypeError, match="missing"):
            getattr(F, op)()


@pytest.mark.parametrize("argument", ["x", "weight", "running_mean"])
def test_errors_come_before_autograd(argument, backend) -> None:
    """Also with gradients on, and on the second call, nothing is half done."""
    a = _base("batch_norm_act")
    a["x"].requires_grad_()
    a["weight"].requires_grad_()
    F.batch_norm_act(**a).sum().backward()
    bad = {"x": _x(2, 6, 6, 7), "weight": torch.ones(6, requires_grad=True), "running_mean": torch.zeros(6)}[argument]
    before = _clone(a)
    with pytest.raises(RuntimeError):
        F.batch_norm_act(**(a | {argument: bad}))
    _unchanged(before, a)
