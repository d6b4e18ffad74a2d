"""benchmarks.tune: what is decided from given times, and a run on the CPU that stores and reads back a table."""

from __future__ import annotations

import pytest
import torch

from benchmarks import tune
from benchmarks.bench_conv1x1_bn_act import Layer
from benchmarks.gpu import folding, ops
from benchmarks.gpu.device import HostDevice
from benchmarks.shapes import Shape
from benchmarks.tune import FoldingTiming, Timing, decide, fastest
from fusedres import functional as F
from fusedres.ops import choices


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({"cuda": 1.0, "triton": 1.0, "eager": 1.0}, "cuda"),
        ({"cuda": 1.0, "triton": 0.98, "eager": 1.0}, "cuda"),  # within the margin
        ({"cuda": 1.0, "triton": 0.9, "eager": 0.89}, "triton"),
        ({"cuda": 1.0, "triton": 0.9, "eager": 0.5}, "eager"),
        ({"triton": 1.0, "eager": 2.0}, "triton"),
        ({"eager": 2.0}, "eager"),
    ],
)
def test_fastest(seconds, best):
    assert fastest(seconds) == best


def shape(n: int = 4, c: int = 64) -> Shape:
    return Shape("batch_norm_act", False, n, c, 8, 8)


def test_shapes_that_share_a_key_decide_together():
    both = {"cuda": 1.0, "triton": 0.5}
    timings = [
        Timing(shape(5), "bfloat16", "channels_last", both),
        Timing(shape(7), "bfloat16", "channels_last", {"cuda": 1.0, "triton": 4.0}),
        Timing(shape(5), "float32", "channels_last", both),
        Timing(shape(8), "bfloat16", "channels_last", {"triton": 1.0, "eager": 2.0}),
        Timing(shape(9), "bfloat16", "channels_last", {"cuda": 1.0}),
        Timing(shape(64), "bfloat16", "contiguous", {}),
    ]
    decided = {(c.dtype, c.elements): c.backend for c in decide(timings)}
    five, eight = (5 * 64 * 64).bit_length(), (8 * 64 * 64).bit_length()
    assert (7 * 64 * 64).bit_length() == five
    assert (9 * 64 * 64).bit_length() == eight
    # the geometric mean of 0.5 and 4 is above 1; with nothing that runs both shapes there is no choice
    assert decided == {("bfloat16", five): "cuda", ("float32", five): "triton"}


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({"plain": 1.0, "fold": 0.98}, "plain"),  # within the margin
        ({"plain": 1.0, "fold": 0.9}, "fold"),
        ({"plain": 1.0}, "plain"),
    ],
)
def test_folding_must_be_faster_by_the_margin(seconds, best):
    timing = FoldingTiming((64,), 256, 100_000, "bfloat16", seconds)
    (choice,) = decide([timing])
    assert choice.choice == best
    assert choice.key == choices.folding_key((64,), 256, 100_000, torch.bfloat16)


def test_layers_that_share_a_key_decide_together():
    faster, slower = {"plain": 1.0, "fold": 0.5}, {"plain": 1.0, "fold": 4.0}
    timings = [
        FoldingTiming((64,), 256, 70_000, "bfloat16", faster),
        FoldingTiming((64,), 256, 130_000, "bfloat16", slower),
        FoldingTiming((64,), 256, 70_000, "float32", faster),
        FoldingTiming((64, 64), 256, 70_000, "bfloat16", faster),
        FoldingTiming((128,), 512, 70_000, "bfloat16", slower),
        FoldingTiming((256,), 1024, 70_000, "bfloat16", {}),
    ]
    decided = {(c.dtype, c.channels): c.choice for c in decide(timings)}
    assert decided == {
        ("bfloat16", (7,)): "plain",
        ("float32", (7,)): "fold",
        ("bfloat16", (7, 7)): "fold",
        ("bfloat16", (8,)): "plain",
    }


def test_a_run(tmp_path, monkeypatch, capsys):
    """On the CPU, whose only peer is eager; what is stored is what `auto` looks up."""
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(tmp_path))
    device = HostDevice()
    device.step_seconds = 0.001
    small = [Shape("batch_norm_act", False, 2, 8, 4, 4), Shape("add_act", True, 2, 8, 4, 4)]
    monkeypatch.setattr(tune, "resnet_shapes", lambda batch: small)
    arguments = ["--batch", "2", "--dtype", "bfloat16", "--layout", "channels_last"]
    arguments += ["--op", "batch_norm_act", "--op", "add_act"]
    assert tune.main([*arguments, "--dry-run"], device) == 0
    assert not list(tmp_path.iterdir())
    assert tune.main(arguments, device) == 0
    out = capsys.readouterr().out
    assert "cuda: RuntimeError: backend 'cuda' cannot serve" in out
    assert "cuda: 0, triton: 0, eager: 2" in out
    table = choices.load(device.name)
    assert table.source == str(tmp_path / "choices-host.json")
    x = torch.empty((2, 8, 4, 4), dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    assert table.choices[choices.key("batch_norm_act", x)] == "eager"
    assert table.choices[choices.key("add_act", x)] == "eager"


def test_wrong_values_are_not_chosen(monkeypatch):
    device = HostDevice()
    device.step_seconds = 0.001

    def wrong(peer, op):
        call = ops.cases.PEERS["eager"]
        return call if peer == "eager" else lambda *at: call(*at) * 1.5

    monkeypatch.setattr(ops, "peer_call", wrong)
    said = []
    (timing,) = tune.measure([shape()], ["float32"], ["channels_last"], device, said.append)
    assert set(timing.seconds) == {"eager"}
    assert "AssertionError" in said[0]
    assert "is off by" in said[0]


LAYERS = [Layer(2, 8, 8, projection=projection) for projection in (False, True)]


def test_a_run_of_folding(tmp_path, monkeypatch, capsys):
    """What is stored is what is looked up for the calls that were measured."""
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(tmp_path))
    device = HostDevice()
    device.step_seconds = 0.001
    monkeypatch.setattr(tune, "layers", lambda batches: LAYERS)
    arguments = ["--op", "conv1x1_bn_act", "--dtype", "float32", "--dtype", "float16"]
    assert tune.main([*arguments, "--layout", "contiguous"], device) == 1  # only channels_last folds
    assert tune.main(arguments, device) == 0
    out = capsys.readouterr().out
    assert "conv1x1_bn_act[2x8x8x8->32 identity] float32: plain" in out
    assert "float16:" not in out
    table = choices.load(device.name)
    assert not table.choices
    keys = [choices.folding_key(channels, 32, 2 * 8 * 8, torch.float32) for channels in ((8,), (8, 16))]
    assert set(table.folding) == set(keys)
    assert set(table.folding.values()) <= {"fold", "plain"}


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.key)
def test_the_ways_are_what_they_are_called(layer, monkeypatch):
    """One folds and the other does not, and each is checked before it is timed."""
    device = HostDevice()
    device.step_seconds = 0.001
    case = folding.FoldingCase(layer, "float32", device)
    calls = []
    for name in ("batch_norm_act", "batch_norm_add_batch_norm_act"):
        function = getattr(F, name)
        monkeypatch.setattr(F, name, lambda *a, function=function, **k: calls.append(1) or function(*a, **k))
    assert case.seconds("plain") > 0
    assert calls
    calls.clear()
    assert case.seconds("fold") > 0
    assert not calls
    right = folding.FoldingCase.forward
    monkeypatch.setattr(folding.FoldingCase, "forward", lambda *a: right(*a) * 1.5)
    said = []
    assert tune.time_each(tuple(folding.WAYS), case.seconds, case.key, said.append) == {}
    assert len(said) == 2
    assert "is off by" in said[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert tune.main([]) == 2
    assert capsys.readouterr().err == f"benchmarks.tune: torch {torch.__version__} sees no GPU\n"
