"""The table that chooses between backends on a GPU: read, written, ignored when it is for something else, looked up."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import fusedres
from fusedres.ops import choices, registry

DEVICE = "NVIDIA H200"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def a_choice(backend: str = "triton", **changes) -> choices.Choice:
    row = {"op": "batch_norm_act", "dtype": "bfloat16", "layout": "channels_last", "elements": 11, "channels": 4}
    return choices.Choice(**(row | changes), backend=backend)


def a_fold(choice: str = "fold", **changes) -> choices.FoldingChoice:
    row = {"dtype": "bfloat16", "channels": (7,), "outputs": 9, "pixels": 18}
    return choices.FoldingChoice(**(row | changes), choice=choice)


def rows(backends: list, folding: list = ()) -> dict:
    return {"devices": {DEVICE: {"backends": backends, "folding": folding}}}


def test_shipped_table_is_of_this_version():
    content = json.loads(choices.SHIPPED.read_text())
    assert content["format"] == choices.FORMAT
    assert content["fusedres"] == fusedres.__version__
    for device in content["devices"]:
        table = choices.load(device)
        assert table.choices or table.folding


def test_where_it_is(cache, monkeypatch):
    assert choices.path_for(DEVICE) == cache / "choices-nvidia-h200.json"
    monkeypatch.delenv("FUSEDRES_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(choices.path_for("AMD Instinct MI300X/2")) == "/somewhere/fusedres/choices-amd-instinct-mi300x-2.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    assert str(choices.cache_directory()) == "/home/user/.cache/fusedres"


def test_saved_and_read(cache):
    assert "no measurements for this device" in choices.load(DEVICE).source
    path = choices.save(DEVICE, [a_choice(), a_choice("eager", elements=12)], {"torch": "2.13.0"})
    assert path == cache / "choices-nvidia-h200.json"
    table = choices.load(DEVICE)
    assert table.source == str(path)
    x = torch.empty((2, 8, 8, 8), dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    assert table.choices[choices.key("batch_norm_act", x)] == "triton"
    assert table.choices[choices.key("batch_norm_act", torch.cat([x, x]))] == "eager"
    assert choices.key("batch_norm_act", x.contiguous()) not in table.choices
    assert choices.key("batch_norm_act", x.float()) not in table.choices
    assert choices.key("add_act", x) not in table.choices
    assert not choices.load("NVIDIA H100").choices
    assert [p.name for p in cache.iterdir()] == [path.name]


def test_folding_saved_and_read(cache):
    assert not choices.load(DEVICE).folding
    folds = [a_fold(), a_fold("plain", channels=(10,)), a_fold("plain", channels=(7, 9)), a_fold(pixels=19)]
    choices.save(DEVICE, [a_choice()], {}, folds)
    table = choices.load(DEVICE)
    assert len(table.choices) == 1
    bf16 = torch.bfloat16

    def found(*arguments) -> str | None:
        return table.folding.get(choices.folding_key(*arguments))

    assert found((64,), 256, 64 * 56 * 56, bf16) == "fold"
    assert found([100], 300, 2**17, bf16) == "fold"  # neighbours
    assert found((512,), 256, 2**17, bf16) == "plain"
    assert found((64, 256), 256, 2**17, bf16) == "plain"
    assert found((64,), 256, 2**18, bf16) == "fold"
    for other in (((256, 64), 256, 2**17, bf16), ((64,), 512, 2**17, bf16), ((64,), 256, 2**17, torch.float32)):
        assert found(*other) is None
    choices.save(DEVICE, [a_choice()], {})
    assert not choices.load(DEVICE).folding


def test_folding_alone_leaves_backends_as_they_are(op, cache):
    choices.save(DEVICE, [], {}, [a_fold()])
    x = OnGpu(torch.empty((2, 8, 8, 8), dtype=torch.bfloat16).to(memory_format=torch.channels_last))
    assert registry.serve(op, x) == "cuda"
    assert registry.table_of(3).folding == {choices.folding_key((64,), 256, 2**17, torch.bfloat16): "fold"}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda c: c | {"format": 1}, "format 1, not 2"),
        (lambda c: c | {"fusedres": "0.0.1"}, "fusedres '0.0.1'"),
        (lambda c: c | {"devices": {}}, "nothing on NVIDIA H200"),
        (lambda c: {}, "format"),
        (lambda c: [], "list indices"),
        (lambda c: c | rows([{"op": "add_act"}]), "missing"),
        (lambda c: c | rows([vars(a_choice("cublas"))]), "unknown backend"),
        (lambda c: c | rows([vars(a_choice(dtype="bfloat17"))]), "bfloat17"),
        (lambda c: c | rows([], [{"channels": [7]}]), "missing"),
        (lambda c: c | rows([], [vars(a_fold("always"))]), "neither fold nor plain"),
        (lambda c: c | {"devices": {DEVICE: {"backends": []}}}, "folding"),
    ],
)
def test_other_tables_are_ignored_and_say_why(cache, spoil, words):
    path = choices.save(DEVICE, [a_choice()], {})
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    table = choices.load(DEVICE)
    assert not table.choices
    assert "is ignored" in table.source
    assert words in table.source
    path.write_text("{")
    assert "is ignored" in choices.load(DEVICE).source


class OnGpu:
    """A CPU tensor that says it is on a GPU: what `serve` looks at."""

    is_cpu, is_cuda = False, True
    device = torch.device("cuda", 3)

    def __init__(self, x: torch.Tensor) -> None:
        self._x = x

    def get_device(self) -> int:
        return 3

    def __getattr__(self, name: str):
        return getattr(self._x, name)


@pytest.fixture
def op(monkeypatch):
    """An op with both GPU backends, on a device that has been measured."""
    monkeypatch.setattr(registry, "_forced", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: {3: DEVICE}[index])
    monkeypatch.setattr(registry, "_tables", {})
    return SimpleNamespace(family="batch_norm_act", cpu=None, cuda="cuda", triton="triton")


def test_choice_per_shape(op, cache, monkeypatch):
    rows = [a_choice("triton"), a_choice("eager", elements=12), a_choice("cuda", elements=13)]
    choices.save(DEVICE, rows, {})
    x = torch.empty((2, 8, 8, 8), dtype=torch.bfloat16).to(memory_format=torch.channels_last)

    def served(n: int) -> object:
        return registry.serve(op, OnGpu(torch.cat([x] * n)))

    assert [served(n) for n in (1, 2, 4, 8)] == ["triton", None, "cuda", "cuda"]
    op.triton = None
    assert served(1) == "cuda"
    op.cuda = None
    assert served(4) is None
    op.triton = "triton"
    assert served(4) == "triton"
    assert registry.serve(op, OnGpu(torch.empty(8, 8))) == "triton"  # not 4-D: no entry
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert served(2) == "triton"
    monkeypatch.setattr(registry, "_forced", "triton")
    assert served(2) == "triton"


def test_files_are_read_once(op, cache, monkeypatch):
    choices.save(DEVICE, [a_choice()], {})
    x = OnGpu(torch.empty((2, 8, 8, 8), dtype=torch.bfloat16).to(memory_format=torch.channels_last))
    assert registry.serve(op, x) == "triton"
    monkeypatch.setattr(choices, "load", lambda device: pytest.fail("read again"))
    assert registry.serve(op, x) == "triton"
