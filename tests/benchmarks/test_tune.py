"""benchmarks.tune: what is decided from given times, and a run on the CPU that stores and reads back a table."""

from __future__ import annotations

import pytest
import torch

from benchmarks import tune
from benchmarks.gpu import ops
from benchmarks.gpu.device import HostDevice
from benchmarks.shapes import Shape
from benchmarks.tune import Timing, decide, fastest
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


def test_a_run(tmp_path, monkeypatch, capsys):
    """On the CPU, whose only peer is eager; what is stored is what `auto` looks up."""
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(tmp_path))
    device = HostDevice()
    device.step_seconds = 0.001
    small = [Shape("batch_norm_act", False, 2, 8, 4, 4), Shape("add_act", True, 2, 8, 4, 4)]
    monkeypatch.setattr(tune, "resnet_shapes", lambda batch: small)
    arguments = ["--batch", "2", "--dtype", "bfloat16", "--layout", "channels_last"]
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert tune.main([]) == 2
    assert capsys.readouterr().err == f"benchmarks.tune: torch {torch.__version__} sees no GPU\n"
